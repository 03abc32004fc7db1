# SPDX-License-Identifier: Apache-2.0
"""The tables in documents are what the results say."""

from pathlib import Path

import pytest

from benchmarks import figures, tables
from benchmarks.device.records import Log
from benchmarks.device.report import report


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.stem)
def test_documents_have_the_tables_of_the_results(path: Path):
    """If not, run `python -m benchmarks.tables`."""
    text = path.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text


def test_readme_states_no_measured_figures():
    """So none can be left behind when it is measured again."""
    text = tables.DOCUMENTS[0].read_text(encoding="utf-8")
    stated = "; ".join(these for _, these in figures.figures(text)).split("; ")
    assert not [figure for figure in stated if not figure[-1].isdigit()]


def test_every_table_is_in_a_document():
    texts = [path.read_text(encoding="utf-8") for path in tables.DOCUMENTS]
    for name in tables.TABLES:
        assert any(f"<!-- table: {name} -->" in text for text in texts), name


def test_what_stands_between_the_comments_is_replaced(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "toy", lambda: "new")
    text = "a\n<!-- table: toy -->\nold\n\nold\n<!-- end -->\nb <!-- end -->"
    assert tables.with_tables(text) == text.replace("old\n\nold", "new")
    with pytest.raises(ValueError, match="no table 'joy'; there are device, speed"):
        tables.with_tables(text.replace("toy", "joy"))


def test_devices_are_told_one_after_the_other(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.of_devices(report) == tables.NONE
    log = Log(tmp_path, "ceilings")
    for name in ("H100", "H200"):
        where = {"device": name, "jax": "1", "python": "3", "commit": "a", "date": "b"}
        log("begins", tiny=False, environment=where)
        log("product", tflops=700.0)
        (tmp_path / "results.jsonl").rename(tmp_path / f"device_{name}.jsonl")
    told = tables.of_devices(report)
    assert (
        told.index("H100: jax 1") < told.index("| 700 TFLOP/s |") < told.index("H200")
    )


def test_results_of_small_shapes_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    Log(tmp_path, "ceilings")("begins", tiny=True)
    (tmp_path / "results.jsonl").rename(tmp_path / "device_cpu.jsonl")
    with pytest.raises(ValueError, match="holds results of --tiny"):
        tables.of_devices(report)
