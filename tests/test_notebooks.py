# SPDX-License-Identifier: Apache-2.0
"""Notebooks run from top to bottom, and are kept as pairs with their pictures."""

import base64
import io
from pathlib import Path

import jupytext
import nbformat
import numpy as np
import pytest
from PIL import Image

from docs.notebooks import executed, kept

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
# Half a minute of sampling, large masks, or training; `make test-slow` runs them.
LONG = {"00_make_a_video", "02_tokens_and_masks"}
LONG |= {"03_kernels_and_visits", "05_drift_and_extension", "06_train_a_tiny_model"}
LARGEST = 300_000  # bytes of a file


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """The kind and the text of every cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def kinds_of_output(notebook: nbformat.NotebookNode) -> set[str]:
    """What the cells show, of which nothing may be a warning or an error."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    return {kind for output in outputs for kind in output.get("data", {})}


@pytest.mark.notebook
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow) if path.stem in LONG else path
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_from_top_to_bottom(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STEPS", "3")  # of training, where there is any
    assert "image/png" in kinds_of_output(executed(path))


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
def test_a_notebook_is_kept_with_small_pictures_and_nothing_of_its_run(path: Path):
    """If not, run `python -m docs.notebooks`."""
    file = path.with_suffix(".ipynb")
    assert file.stat().st_size < LARGEST
    pair = nbformat.read(file, as_version=4)
    assert "image/png" in kinds_of_output(pair)
    text = file.read_text(encoding="utf-8")
    assert not any(part in text for part in (str(ROOT), "site-packages"))
    assert all(cell.get("execution_count") is None for cell in pair.cells)


def test_pictures_get_a_palette_and_counts_are_dropped():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    picture = {"image/png": base64.b64encode(file.getvalue()).decode()}
    drawn = nbformat.v4.new_output("display_data", picture | {"text/plain": "<Figure>"})
    cell = nbformat.v4.new_code_cell("draw()", outputs=[drawn], execution_count=3)
    (after,) = kept(nbformat.v4.new_notebook(cells=[cell])).cells
    assert after.execution_count is None and after.outputs[0].data.keys() == {
        "image/png"
    }
    small = base64.b64decode(after.outputs[0].data["image/png"])
    assert Image.open(io.BytesIO(small)).size == (64, 64)
    assert len(small) < len(file.getvalue()) / 2
