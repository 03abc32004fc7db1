# SPDX-License-Identifier: Apache-2.0
"""Released models that are changed, and what is said about them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pyramid_jax.convert.convert import convert_model
from pyramid_jax.convert.source import ReleasedFolder


def changed(
    folder: Path, to: Path, file: str, change: Callable[[dict], object]
) -> None:
    """Copies a model if need be, and changes the tensors of one of its files."""
    if not to.exists():
        shutil.copytree(folder, to)
    tensors = load_file(to / file)
    change(tensors)
    save_file(tensors, to / file, metadata={"format": "pt"})


def reported(source: ReleasedFolder, to: Path) -> list[str]:
    """The problems in the one error of a conversion, which must not write anything."""
    with pytest.raises(ValueError, match="can't be converted") as raised:
        convert_model(source, to)
    assert not to.exists()
    return [line.strip() for line in str(raised.value).splitlines()[1:]]
