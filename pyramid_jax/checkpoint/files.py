# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors and PyTorch files, each read only when it is used."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

PICKLED = (".bin", ".pth", ".pt")


class StoredTensor:
    """A tensor on disk: its shape is known, numpy reads its values."""

    def __init__(self, file: Any, key: str):
        self._file, self._key = file, key
        self.shape = tuple(file.get_slice(key).get_shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._file.get_tensor(self._key)
        return values if dtype is None else values.astype(dtype)


class PickledTensor:
    """A tensor that PyTorch has read."""

    def __init__(self, tensor: Any):
        self._tensor = tensor
        self.shape = tuple(tensor.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.asarray(self._tensor.float())  # numpy has no bfloat16
        return values if dtype is None else values.astype(dtype)


class StoredTensors(Mapping[str, StoredTensor | PickledTensor]):
    """All tensors of the given files, by name, unread."""

    def __init__(self, paths: list[Path]):
        self._tensor: dict[str, StoredTensor | PickledTensor] = {}
        for path in paths:
            found = _pickled(path) if path.suffix in PICKLED else _stored(path)
            if again := self._tensor.keys() & found.keys():
                raise ValueError(
                    f"{path} repeats {sorted(again)} of another file of its folder; "
                    "keep one of them"
                )
            self._tensor |= found

    def __getitem__(self, key: str) -> StoredTensor | PickledTensor:
        return self._tensor[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensor)

    def __len__(self) -> int:
        return len(self._tensor)


def read(path: str | Path) -> StoredTensors:
    """The tensors of a file, or of all files in a folder that hold tensors.

    In a folder .safetensors files come first; only without any, those of PyTorch (.bin,
    .pth, .pt) are read, which needs torch to be installed.

    Raises:
        ValueError: there is no such file, two of them hold the same tensor, or torch is
            missing.
    """
    path = Path(path)
    files = _files(path) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"{path} has no .safetensors file, nor one of PyTorch "
            f"({', '.join(PICKLED)}); give such a file or a folder of them"
        )
    return StoredTensors(files)


def _files(folder: Path) -> list[Path]:
    pickled = sorted(file for file in folder.iterdir() if file.suffix in PICKLED)
    return sorted(folder.glob("*.safetensors")) or pickled


def _stored(path: Path) -> dict[str, StoredTensor]:
    file = safe_open(path, framework="numpy")
    return {key: StoredTensor(file, key) for key in file.keys()}  # noqa: SIM118


def _pickled(path: Path) -> dict[str, PickledTensor]:
    try:
        import torch
    except ImportError as missing:
        raise ValueError(
            f"{path} can only be read with torch; `pip install 'pyramid_jax[torch]'`, "
            "or convert the file to .safetensors where torch is"
        ) from missing
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    others = [key for key, value in tensors.items() if not hasattr(value, "shape")]
    if others:
        raise ValueError(
            f"{path} holds {others}, which are no tensors; give a file of weights, "
            "saved from the part of this one that has them"
        )
    return {key: PickledTensor(tensor) for key, tensor in tensors.items()}
