# SPDX-License-Identifier: Apache-2.0
"""Notebooks run from top to bottom, and are kept as pairs without outputs."""

from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
LONG = {"00_make_a_video"}  # half a minute of sampling; `make notebooks` runs it


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """The kind and the text of every cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow) if path.stem in LONG else path
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_from_top_to_bottom(path: Path):
    notebook = jupytext.read(path)
    where = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,  # seconds for a cell and for the start, on a busy machine
        startup_timeout=300,
        kernel_name="python3",
        resources=where,
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_and_its_script_have_the_same_cells(path: Path):
    pair = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(pair)
    assert cells(pair) == cells(jupytext.read(path)), (
        f"run: jupytext --sync notebooks/{path.name}"
    )


def test_every_notebook_has_a_script():
    assert {path.with_suffix(".ipynb") for path in NOTEBOOKS} == set(
        (ROOT / "notebooks").glob("*.ipynb")
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path):
    pair = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    for cell in pair.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
