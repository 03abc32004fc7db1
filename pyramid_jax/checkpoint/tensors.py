# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors and PyTorch files, each read only when it is used."""

import json
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pyramid_jax.checkpoint.safetensors_file import StoredTensor, open_safetensors

PICKLED = (".bin", ".pth", ".pt")
# Where a training run of the original keeps its weights, beside its other states.
WEIGHTS = "model"


class PickledTensor:
    """A tensor in a file that PyTorch has mapped; numpy reads the values."""

    def __init__(self, tensor: Any, torch: Any):
        self.shape = tuple(tensor.shape)
        self.dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        # numpy alone has no bfloat16: by way of its bits
        bits = self.dtype.name == "bfloat16"
        self._tensor = tensor.view(torch.int16) if bits else tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._tensor.numpy().view(self.dtype)
        return values if dtype is None else values.astype(dtype, copy=False)


StoredTensors = dict[str, StoredTensor | PickledTensor]  # by name, unread


def read_tensors(path: str | Path) -> StoredTensors:
    """The tensors of a file, or of all files in a folder that hold tensors.

    In a folder .safetensors files come first; only without any, those of PyTorch (.bin,
    .pth, .pt) are read, which needs torch to be installed.

    Raises:
        ValueError: there is no such file, one is damaged, one that the folder's index
            lists is missing, two of them hold the same tensor, or torch is missing.
    """
    path = Path(path)
    files = _files(path) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"{path} has no .safetensors file, nor one of PyTorch "
            f"({', '.join(PICKLED)}); give such a file or a folder of them"
        )
    stored: StoredTensors = {}
    for file in files:
        pickled = file.suffix in PICKLED
        tensors = _pickled(file) if pickled else open_safetensors(file)
        if repeated := stored.keys() & tensors.keys():
            raise ValueError(
                f"{file} repeats {sorted(repeated)} of another file of its folder; "
                "keep one of them"
            )
        stored |= tensors
    return stored


def subset(tensors: Mapping[str, Any], start: str) -> dict[str, Any]:
    """The tensors whose names begin with `start`, without it; all, if none does.

    The checkpoints of the original's training runs name all tensors of the transformer
    `dit.…` and those of the VAE `vae.…`, beside tensors of other networks.
    """
    own = {k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)}
    return own or dict(tensors)


def _files(folder: Path) -> list[Path]:
    for suffixes in ((".safetensors",), PICKLED):
        names = {file.name for file in folder.iterdir() if file.suffix in suffixes}
        for index in folder.glob(f"*{suffixes[0]}.index.json"):
            listed = set(json.loads(index.read_text())["weight_map"].values())
            if missing := sorted(listed - names):
                raise ValueError(f"{folder} lacks {missing}; copy these files, too")
        if names:
            return [folder / name for name in sorted(names)]
    return []


def _pickled(path: Path) -> dict[str, PickledTensor]:
    try:
        torch = import_module("torch")
    except ImportError as missing:
        raise ValueError(
            f"{path} can only be read with torch; `pip install 'pyramid_jax[torch]'`, "
            "or convert the file to .safetensors where torch is"
        ) from missing
    try:
        # The checkpoints of the original's VAE training hold their options, too.
        with torch.serialization.safe_globals([Namespace]):
            # Mapped, so that a tensor is read when it is used; files of torch before
            # 1.6, which are no archives, can't be.
            tensors = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),
            )
    except Exception as error:  # whatever a damaged file makes of pickle and zip
        raise ValueError(
            f"{path} can't be read by torch ({error}); copy the file again, or save it "
            "with a recent torch"
        ) from error
    if isinstance(inner := tensors.get(WEIGHTS), Mapping) and inner:
        tensors = inner
    others = [key for key, value in tensors.items() if not hasattr(value, "shape")]
    if others:
        raise ValueError(
            f"{path} holds {others}, which are no tensors; give a file of weights, "
            "saved from the part of this one that has them"
        )
    return {key: PickledTensor(tensor, torch) for key, tensor in tensors.items()}
