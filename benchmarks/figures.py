# SPDX-License-Identifier: Apache-2.0
"""Figures in sentences of documents: filled in from results, or stated with a source.

python -m benchmarks.figures

A number of a file in benchmarks/results/ stands between two comments and is replaced,
as tables are (benchmarks/tables.py): `<!-- number: {page[seconds][first]:.2f} -->0.89
<!-- end -->`, in Python's format; `:.1f x 1e3` multiplies first. All other figures of a
page, which are decimals, thousands and numbers with a unit, are in
benchmarks/results/stated.json, by section, with what they come from. The command lists
those of pages that were changed; a new section then needs its source.
"""

import argparse
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STATED = RESULTS / "stated.json"
PAGES = tuple(sorted((ROOT / "docs").glob("*.md")))
# Sources of figures begin with one of these.
SOURCES = {
    "counted": "from shapes, by the function or command that is named",
    "given": "by a config, a file, a definition or arithmetic on the spot",
    "predicted": "from counts and rates that the page states",
    "published": "by others",
    "measured once": "and not kept in a file, which the section says",
}
UNIT = (
    r"%|ms|us|s|seconds|minutes|hours|[KMGT]i?B(?:/s)?|[MGTP]FLOP(?:/s)?|dB"
    r"|times as fast|steps|frames"
)
_NUMBER = r"\d(?:[\d.,]*\d)?"
FIGURE = re.compile(
    rf"(?:{_NUMBER} (?:to|and|or|of|/) )*{_NUMBER} ?(?:{UNIT})(?![\w-])"
    r"|(?<![\d.,])(?:\d+\.\d+|\d{1,3}(?:,\d{3})+)(?!\.?\d)"
)
_PLACE = re.compile(r"(<!-- number: (.+?) -->).*?(<!-- end -->)", re.DOTALL)
_NOT_STATED = re.compile(
    r"<!-- (?:table|number): .*?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL
)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)

Stated = dict[str, dict[str, dict[str, str]]]


class _Format(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        spec, _, factor = format_spec.partition(" x ")
        return format(value * float(factor) if factor else value, spec)


def with_numbers(text: str, results: Mapping[str, Any]) -> str:
    """A document with its numbers as the results say.

    Raises:
        ValueError: no result has what stands in a comment.
    """

    def written(place: re.Match[str]) -> str:
        begin, wanted, end = place.groups()
        try:
            return f"{begin}{_Format().format(wanted, **results)}{end}"
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"no number {wanted!r} in {RESULTS.name}: {error!r}"
            ) from error

    return _PLACE.sub(written, text)


def read_results(folder: Path = RESULTS) -> dict[str, Any]:
    """What every file of a folder holds, by its name; of devices by `_key`."""
    results = {path.stem: _json(path) for path in folder.glob("*.json")}
    for path in folder.glob("*.jsonl"):
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        results[path.stem] = {_key(record): record for record in records}
    return results


def _key(record: Mapping[str, Any]) -> str:
    """E.g. "ceilings product" or "euler_768p step later 2"."""
    names = [*(record[k] for k in ("step", "what")), record.get("rival")]
    measured = record.get("measured", {})
    names += [record.get("units"), measured.get("units"), measured.get("stage")]
    return " ".join(str(name) for name in names if name is not None)


def figures(text: str) -> Iterator[tuple[str, str]]:
    """Headings of the sections of a document that state figures, and the figures."""
    for title, body in sections(_NOT_STATED.sub(" ", text)):
        if found := FIGURE.findall(f"{title}\n{body}"):
            yield title, "; ".join(found)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """The headings of a document, and what stands below each until the next."""
    _, *parts = _HEADING.split(f"# \n{text}")
    return zip(parts[::2], parts[1::2], strict=True)


def stated(before: Stated) -> Stated:
    """What the pages state now, with the sources of before."""
    every: Stated = {}
    for page in PAGES:
        known = before.get(page.name, {})
        own: dict[str, dict[str, str]] = {}
        for title, these in figures(page.read_text(encoding="utf-8")):
            source = known.get(title, {}).get("source", "")
            all_of = [own[title]["figures"], these] if title in own else [these]
            own[title] = {"source": source, "figures": "; ".join(all_of)}
        if own:
            every[page.name] = own
    return every


def main(argv: Sequence[str] | None = None) -> None:
    """Lists what the pages state."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    now = stated(_json(STATED) if STATED.exists() else {})
    STATED.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for page, sections in now.items():
        for title, section in sections.items():
            if not section["source"]:
                print(f"{STATED.name}: {page}, {title!r}: say what it comes from")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
