# SPDX-License-Identifier: Apache-2.0
"""Figures in sentences are those of the results, or are stated with a source."""

import json
from pathlib import Path

import pytest

from benchmarks import figures

STATED = json.loads(figures.STATED.read_text(encoding="utf-8"))


def test_pages_state_what_is_listed():
    """If not, run `python -m benchmarks.figures`, and look at what it changes."""
    assert figures.stated(STATED) == STATED


def test_every_source_is_of_a_known_kind():
    for page, sections in STATED.items():
        for title, section in sections.items():
            kind = section["source"].partition(":")[0]
            assert kind in figures.SOURCES, (page, title, section["source"])


def test_sections_say_which_measurements_are_not_kept():
    for page in figures.PAGES:
        text = page.read_text(encoding="utf-8")
        for title, section in STATED.get(page.name, {}).items():
            if "measured once" in section["source"]:
                own = [body for head, body in figures.sections(text) if head == title]
                assert any("not kept in a file" in body for body in own), title


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "3.4 to 5.1 % in 20.3 s, or 1,261 MiB",
            ["3.4 to 5.1 %", "20.3 s", "1,261 MiB"],
        ),
        ("jax 0.10.2 of 2026-11-27, in 3 rooms", []),
        ("0.5 and `0.7` [here](a0.9.md)", ["0.5"]),
        ("<!-- number: {a} -->4.2<!-- end --> ms\n```\n1.5 s\n```", []),
    ],
)
def test_figures_are_decimals_thousands_and_what_has_a_unit(
    text: str, found: list[str]
):
    assert [these for _, these in figures.figures(text)] == (
        ["; ".join(found)] if found else []
    )


def test_a_page_that_is_edited_by_hand_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = tmp_path / "page.md"
    monkeypatch.setattr(figures, "PAGES", (page,))
    page.write_text("# Speed\nIt takes 4.0 s.\n", encoding="utf-8")
    before = figures.stated({"page.md": {"Speed": {"source": "given", "figures": ""}}})
    assert before == {"page.md": {"Speed": {"source": "given", "figures": "4.0 s"}}}
    page.write_text("# Speed\nIt takes 3.9 s.\n", encoding="utf-8")
    assert figures.stated(before) != before


def test_numbers_are_filled_in_from_results(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"b c": [{"d": 0.0123}]}')
    record = {"step": "s", "what": "step", "measured": {"units": "later", "stage": 2}}
    (tmp_path / "e.jsonl").write_text(json.dumps(record))
    results = figures.read_results(tmp_path)
    assert set(results["e"]) == {"s step later 2"}
    text = "<!-- number: {a[b c][0][d]%s} -->old<!-- end --> ms"
    for how, value in ((":.1f x 1e3", "12.3"), (":.0%", "1%"), ("", "0.0123")):
        written = figures.with_numbers(text % how, results)
        assert written == (text % how).replace("old", value)
        assert figures.with_numbers(written, results) == written
    with pytest.raises(ValueError, match=r"no number '\{a\[f\]\}' in results"):
        figures.with_numbers("<!-- number: {a[f]} --><!-- end -->", results)
