# SPDX-License-Identifier: Apache-2.0
"""Tensors in files: safetensors, read and written one at a time; PyTorch's, read.

A safetensors file begins with a header (a JSON object: type, shape and place of every
tensor). So the contents of a file are known without reading values, and a writer that
knows names, types and shapes writes the header first and the values in any order:
neither needs more memory than one tensor.
"""

import json
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGN = 8  # bytes; the header is filled up with spaces
# Libraries that read the original's files ask for this entry.
METADATA = {"__metadata__": {"format": "pt"}}
PICKLED = (".bin", ".pth", ".pt")
# Where a training run of the original keeps its weights, beside its other states.
TRAINED = "model"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: type and shape are known, numpy reads the values."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.read()
        return values if dtype is None else values.astype(dtype, copy=False)


StoredTensors = dict[str, StoredTensor]  # by name


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


def _pickled(path: Path) -> StoredTensors:
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
    if isinstance(inner := tensors.get(TRAINED), Mapping) and inner:
        tensors = inner
    others = [key for key, value in tensors.items() if not hasattr(value, "shape")]
    if others:
        raise ValueError(
            f"{path} holds {others}, which are no tensors; give a file of weights, "
            "saved from the part of this one that has them"
        )
    return {key: _mapped(tensor, torch) for key, tensor in tensors.items()}


def _mapped(tensor: Any, torch: Any) -> StoredTensor:
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    # numpy alone has no bfloat16: by way of its bits
    bits = tensor.view(torch.int16) if dtype.name == "bfloat16" else tensor
    return StoredTensor(dtype, tuple(tensor.shape), lambda: bits.numpy().view(dtype))


# -------------------------------------------------------------------------- safetensors


def open_safetensors(path: str | Path) -> StoredTensors:
    """The tensors of a file by name, unread.

    Raises:
        ValueError: the file is missing, of another format, or was cut off.
    """
    try:
        # perf: without mapping the file, whose pages would count as memory in use.
        file: Any = safe_open(path, "numpy", backend="pread")
        tensors = {}
        for name in file.offset_keys():
            entry, read = file.get_slice(name), partial(file.get_tensor, name)
            dtype = DTYPES[entry.get_dtype()]
            tensors[name] = StoredTensor(dtype, tuple(entry.get_shape()), read)
        return tensors
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} can't be read as safetensors ({error}); copy the file again"
        ) from error


def write_tensors(
    path: str | Path, specs: Mapping[str, Any], values: Iterable[tuple[str, Any]]
) -> None:
    """Writes a file whose tensors are known before their values are.

    The file gets its name once every tensor is written, otherwise nothing is left of
    it. Equal tensors make equal files.

    Args:
        specs: anything with a type and a shape for every name.
        values: every name once, in any order, with what numpy can turn into an array.

    Raises:
        ValueError: a type that the format does not have.
        AssertionError: a tensor is unknown, of another type or shape, or was forgotten.
    """
    expected = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in specs.items()}
    unknown = {str(spec.dtype) for spec in expected.values() if spec.dtype not in NAMES}
    if unknown:
        raise ValueError(
            f"tensors of {sorted(unknown)} can't be stored; use {sorted(DTYPES)}"
        )
    header, places, end = dict[str, Any](METADATA), {}, 0
    # Wide types first, so that every tensor is aligned; then by name.
    for name in sorted(
        expected, key=lambda name: (-expected[name].dtype.itemsize, name)
    ):
        spec, places[name] = expected[name], end
        size = spec.size * spec.dtype.itemsize
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (end, end + size),
        }
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            file.truncate(start + end)
            for name, tensor in values:
                assert name in places, f"{name} is unknown, or written twice"
                x, spec = np.asarray(tensor), expected[name]
                assert (x.shape, x.dtype) == (spec.shape, spec.dtype), name
                file.seek(start + places.pop(name))
                np.ascontiguousarray(x).reshape(-1).view(np.uint8).tofile(file)
        assert not places, f"forgotten: {sorted(places)}"
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
