# SPDX-License-Identifier: Apache-2.0
"""Manifests: one JSON object per line, a video or image and what it shows.

    {"video": "clips/00000.mp4", "text": "a red circle moves left"}
    {"image": "stills/00000.png", "text": "a lighthouse at dusk"}

Paths are relative to the manifest's folder. A record may also name files that
launch.prepare made from it: "text_fea", features of its text, and "latent", its
latent. Other keys are ignored.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["video", "image"]
Split = Literal["training", "held out"]

# Files made from a record: the field of `Record` -> the key, named as in the original.
_PREPARED = {"features": "text_fea", "latent": "latent"}

_REPORTED = 10


@dataclass(frozen=True)
class Record:
    """One video or image file and its caption.

    Args:
        features: stored features of the caption.
        latent: stored latent of the video or image.
    """

    path: Path
    kind: Kind
    text: str
    features: Path | None = None
    latent: Path | None = None


def read_manifest(path: str | Path) -> tuple[Record, ...]:
    """The records of a manifest, in order, their paths joined with its folder.

    Blank lines are skipped; whether the named files exist is seen when they are read.

    Raises:
        ValueError: no such file, or no line, or a list of the bad lines.
    """
    path = Path(path)
    records, problems = [], []
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(line, path.parent))
        except (ValueError, RecursionError) as error:
            problems.append(f"  line {number}: {error}")
    if problems:
        rest = len(problems) - _REPORTED
        shown = problems[:_REPORTED] + ([f"  and {rest} more"] if rest > 0 else [])
        raise ValueError(
            "\n".join([f"manifest {path} has {len(problems)} bad line(s):", *shown])
            + "\ncorrect or remove them"
        )
    if not records:
        raise ValueError(
            f"manifest {path} is empty; write lines such as "
            '{"video": "clip.mp4", "text": "what it shows"}'
        )
    return tuple(records)


def split_records(
    records: Sequence[Record], held_out: int, split: Split
) -> Sequence[Record]:
    """The records of one part of a manifest, whose last `held_out` are held out.

    Raises:
        ValueError: nothing would be left to train on.
    """
    first = len(records) - held_out
    if first < 1:
        raise ValueError(
            f"held_out {held_out} leaves nothing of the {len(records)} records; hold "
            "out fewer, or use more data"
        )
    if split == "held out":
        return tuple(records[first:])
    return _First(records, first) if held_out else records


class _First(Sequence[Record]):
    """The first of many records, which are read one by one."""

    def __init__(self, records: Sequence[Record], count: int):
        self._records, self._count = records, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._records[range(self._count)[index]]


def text_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 or, if it begins with a mark, in UTF-16.

    Raises:
        ValueError: no such file, or text in another encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} can't be read ({error.strerror}); correct the path"
        ) from error
    try:
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} can't be read as text in UTF-8 ({error}); convert it, e.g. with "
            f"iconv -f LATIN1 -t UTF-8 {path}"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} is no text, or in UTF-16 or 32; convert it to UTF-8")
    # Not `splitlines`, which also breaks a line where a form feed stands.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def write_manifest(path: str | Path, records: Iterable[Record]) -> Path:
    """Writes records as a manifest, their paths relative to its folder where possible.

    The file appears complete or not at all. Returns its path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for record in records:
        name = _relative(record.path, path.parent)
        fields = {record.kind: name, "text": record.text}
        for field, key in _PREPARED.items():
            if (file := getattr(record, field)) is not None:
                fields[key] = _relative(file, path.parent)
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    return partial.replace(path)


def _record(line: str, folder: Path) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(fields, dict):
        raise ValueError('expected an object such as {"video": ..., "text": ...}')
    kinds = [kind for kind in get_args(Kind) if kind in fields]
    if len(kinds) != 1:
        count = "both" if kinds else "neither"
        raise ValueError(f'has {count} of "video" and "image", expected one')
    prepared = {field: key for field, key in _PREPARED.items() if key in fields}
    for key in (kinds[0], "text", *prepared.values()):
        value = fields.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'"{key}" is {json.dumps(value)}, expected some text')
    paths = {field: folder / fields[key] for field, key in prepared.items()}
    return Record(folder / fields[kinds[0]], kinds[0], fields["text"], **paths)


def _relative(path: Path, folder: Path) -> str:
    """A path relative to a folder if it is inside, else absolute."""
    path, folder = path.absolute(), folder.absolute()
    return (
        path.relative_to(folder) if path.is_relative_to(folder) else path
    ).as_posix()
