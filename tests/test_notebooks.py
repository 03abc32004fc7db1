# SPDX-License-Identifier: Apache-2.0
"""Notebooks run from top to bottom, and documents name things that exist."""

import importlib
import re
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
LONG = {"00_make_a_video"}  # half a minute of sampling; `make notebooks` runs it
DOCUMENTS = [ROOT / "docs" / name for name in ("equations.md", "architecture.md")]
# `pyramid_jax/mask.py`, `tests/test_mask.py` and the like; a folder ends with a slash.
PATH = re.compile(r"`((?:pyramid_jax|tests|configs|launch|docs|notebooks)/[\w./]*)`")
# `pyramid.renoise` and the like: a module of the package, a name in it.
MODULES = "pyramid layout mask rotary latents shapes objective sampler config generate"
NAME = re.compile(rf"`({MODULES.replace(' ', '|')})\.(?!py`)(\w+)(?:\.(\w+))?")


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """The kind and the text of every cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def problems(text: str) -> list[str]:
    """What a document names in backquotes that does not exist."""
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    for module, *names in NAME.findall(text):
        found = importlib.import_module(f"pyramid_jax.{module}")
        for name in filter(None, names):
            if not hasattr(found, name):
                missing.append(f"{module}.{'.'.join(names)}")
                break
            found = getattr(found, name)
    return missing


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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_document_names_files_and_functions_that_exist(path: Path):
    assert not problems(path.read_text(encoding="utf-8"))


def test_a_wrong_name_in_a_document_is_seen():
    right = "`pyramid.renoise(x, z, s)` of `pyramid_jax/pyramid.py`, `mask.TokenMask`"
    assert not problems(right)
    wrong = "`pyramid.rennoise`, `latents.LatentConfig.grids`, `tests/test_magic.py`"
    assert len(problems(wrong)) == 3
