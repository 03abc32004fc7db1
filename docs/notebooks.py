# SPDX-License-Identifier: Apache-2.0
"""Executes the notebooks, and keeps what they print and draw in the files.

    python -m docs.notebooks
    python -m docs.notebooks --only=01_the_pyramid

A notebook is written as a script (notebooks/01_the_pyramid.py); the file beside it has
the same cells with their outputs, which GitHub and the site show. Pictures get a
palette of few colours, so that the files stay small.
"""

import argparse
import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbclient
import nbformat
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
COLOURS = 256  # of a picture
_PATIENCE = 1800  # seconds for a cell and for the start, on a busy machine


def executed(script: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of its cells, pictures as they were drawn."""
    notebook = jupytext.read(script)
    client = nbclient.NotebookClient(
        notebook,
        timeout=_PATIENCE,
        startup_timeout=_PATIENCE,
        kernel_name="python3",
        resources={"metadata": {"path": str(script.parent)}},
    )
    client.execute()
    return notebook


def kept(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same with small pictures, without progress and what no other run repeats."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _smaller(data["image/png"])
                output.data = {"image/png": data["image/png"]}
    notebook.metadata.pop("language_info", None)
    return notebook


def _smaller(picture: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    file = io.BytesIO()
    # An octree keeps colours of small parts; cutting at medians mixes them.
    picked = image.quantize(
        COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    )
    picked.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    scripts = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.py"))}
    parser = argparse.ArgumentParser(description="Executes the notebooks.")
    parser.add_argument("--only", choices=list(scripts), help="execute one of them")
    options = parser.parse_args(arguments)
    for name, script in scripts.items():
        if options.only in (None, name):
            file = script.with_suffix(".ipynb")
            ids = (
                [cell.id for cell in nbformat.read(file, 4).cells]
                if file.exists()
                else []
            )
            notebook = kept(executed(script))
            for cell, before in zip(notebook.cells, ids, strict=False):
                cell.id = before
            nbformat.write(notebook, file)
            print(f"{file}: {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
