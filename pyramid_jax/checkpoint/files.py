# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors files, each read only when it is used."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open


class StoredTensor:
    """A tensor on disk: its shape is known, numpy reads its values."""

    def __init__(self, file: Any, key: str):
        self._file, self._key = file, key
        self.shape = tuple(file.get_slice(key).get_shape())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._file.get_tensor(self._key)
        return values if dtype is None else values.astype(dtype)


class StoredTensors(Mapping[str, StoredTensor]):
    """All tensors of the given files, by name, unread."""

    def __init__(self, paths: list[Path]):
        self._file: dict[str, Any] = {}
        for path in paths:
            file = safe_open(path, framework="numpy")
            if again := self._file.keys() & set(file.keys()):
                raise ValueError(
                    f"{path} repeats {sorted(again)} of another file of its folder; "
                    "keep one of them"
                )
            self._file |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, key: str) -> StoredTensor:
        return StoredTensor(self._file[key], key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)


def read(path: str | Path) -> StoredTensors:
    """The tensors of a .safetensors file, or of all such files in a folder.

    Raises:
        ValueError: there is no such file, or two of them hold the same tensor.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"{path} has no .safetensors file; give such a file or a folder of them"
        )
    return StoredTensors(files)
