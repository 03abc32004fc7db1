# SPDX-License-Identifier: Apache-2.0
"""Tensors in files: safetensors, read and written one at a time; PyTorch's, read.

A safetensors file begins with a header (a JSON object: type, shape and place of every
tensor). So the contents of a file are known without reading values, and a writer that
knows names, types and shapes writes the header first and the values in any order:
neither needs more memory than one tensor.
"""

import itertools
import json
import logging
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

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
# Types of one byte, which are read as bfloat16: it holds them exactly.
NARROW = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in (DTYPES | NARROW).items()}
EXPONENT = np.uint16(0x7F80)  # of bfloat16; all ones: infinite, or no number
ALIGN = 8  # bytes; the header is filled up with spaces
# Libraries that read the original's files ask for this entry.
NOTES, METADATA = "__metadata__", {"format": "pt"}
PICKLED = (".bin", ".pth", ".pt")
# The names that libraries give to weights, and those of parts of them.
PLAIN = ("diffusion_pytorch_model", "pytorch_model", "model")
PART = re.compile(r"(.+)-(\d+)-of-(\d+)")
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
    .pth, .pt) are read, which needs torch to be installed. Which of several files count
    says an index, else their names, see `weight_files`. Numbers of one byte (float8)
    become bfloat16.

    Raises:
        ValueError: there is no such file, one is damaged, one that the folder's index
            lists is missing, two of them hold the same tensor, or torch is missing.
    """
    path = Path(path)
    files = weight_files(path) if path.is_dir() else [path]
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


def subset(
    tensors: Mapping[str, Any], start: str, names: Collection[str] = ()
) -> dict[str, Any]:
    """The tensors whose names begin with `start`, without it; all, if none does.

    The checkpoints of the original's training runs name all tensors of the transformer
    `dit.…` and those of the VAE `vae.…`, beside tensors of other networks. What else
    all names have in front (`module.`, `ema.`) is left out if `names` are behind it.
    """
    parts = [name.split(".")[:-1] for name in tensors]
    common = itertools.takewhile(
        lambda column: len(set(column)) == 1, zip(*parts, strict=False)
    )
    fronts = itertools.accumulate((f"{column[0]}." for column in common), initial="")
    for front, head in itertools.product(fronts, (start, "")):
        prefix = front + head
        own = {k[len(prefix) :]: x for k, x in tensors.items() if k.startswith(prefix)}
        if own.keys() & set(names):
            if front:
                logger.warning("names of tensors are read without their %r", front)
            return own
    own = {k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)}
    return own or dict(tensors)


def finite_values(name: str, tensor: Any) -> np.ndarray:
    """The values of a tensor.

    Raises:
        ValueError: some of them are infinite, or no numbers.
    """
    values = np.asarray(tensor)
    if values.dtype == DTYPES["BF16"]:  # perf: twice as fast, beside other threads
        finite = values.view(np.uint16) & EXPONENT != EXPONENT
    else:
        finite = np.isfinite(values)
    if bad := values.size - np.count_nonzero(finite):
        raise ValueError(
            f"{bad} of {values.size} values of {name} are infinite or no numbers; get "
            "undamaged weights, of another precision if these overflowed"
        )
    return values


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its network; [] if there are none.

    Hidden files and those of LoRAs don't count. Where there is an index, the files that
    it lists do; else that with a plain name (`PLAIN`), or all parts; copies in another
    precision (`model.fp16.safetensors`) only where they are alone.

    Raises:
        ValueError: an index is damaged, or a part is missing.
    """
    visible = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    visible = [path for path in visible if "lora" not in path.stem.lower()]
    for suffixes in ((".safetensors",), PICKLED):
        files = [path for path in visible if path.suffix in suffixes]
        stems = {path.stem for path in files}
        plain = [path for path in files if path.stem in PLAIN]
        indexes = [folder / f"{stem}{suffixes[0]}.index.json" for stem in PLAIN]
        wanted = {name for index in indexes for name in _listed(index)}
        wanted |= set() if wanted or plain else _all_parts(files)
        if missing := sorted(wanted - {path.name for path in files}):
            raise ValueError(f"{folder} lacks {missing}; copy these files, too")
        if wanted or plain:
            return [folder / name for name in sorted(wanted)] or plain
        if files:
            return [x for x in files if x.stem.split(".")[0] not in stems - {x.stem}]
    return []


def _listed(index: Path) -> set[str]:
    """The names of the files that an index lists; none where there is no index."""
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of weights ({type(error).__name__}: {error}); copy "
            "it again, or remove it if one file holds all weights"
        ) from error


def _all_parts(files: Iterable[Path]) -> set[str]:
    """The names of all parts of files such as `model-00001-of-00002.safetensors`."""
    names = set()
    for path in files:
        if match := PART.fullmatch(path.stem):
            stem, digits, count = match.groups()
            numbers = range(1, int(count) + 1)
            names |= {
                f"{stem}-{i:0{len(digits)}}-of-{count}{path.suffix}" for i in numbers
            }
    return names


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
    dtype, shape = np.dtype(str(tensor.dtype).removeprefix("torch.")), tensor.shape
    wide, narrow = DTYPES["BF16"], dtype in NARROW.values()
    # numpy alone has neither bfloat16 nor float8: by way of their bits
    if narrow or dtype == wide:
        tensor = tensor.view(torch.int8 if narrow else torch.int16)

    def read() -> np.ndarray:
        values = tensor.numpy().view(dtype)
        return values.astype(wide) if narrow else values

    return StoredTensor(wide if narrow else dtype, tuple(shape), read)


# -------------------------------------------------------------------------- safetensors


def open_safetensors(path: str | Path) -> StoredTensors:
    """The tensors of a file by name, unread.

    Raises:
        ValueError: the file is missing, of another format, or was cut off.
    """
    try:
        # perf: without mapping the file, whose pages would count as memory in use.
        file: Any = safe_open(path, "numpy", backend="pread")
        start, header = _header(path)
        tensors = {}
        for name in file.offset_keys():
            entry = file.get_slice(name)
            kind, shape = entry.get_dtype(), tuple(entry.get_shape())
            stored = NARROW[kind] if kind in NARROW else DTYPES[kind]
            place = start + header[name]["data_offsets"][0]
            read = partial(_values, path, place, stored, shape)
            dtype = DTYPES["BF16"] if kind in NARROW else stored
            tensors[name] = StoredTensor(dtype, shape, read)
        return tensors
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} can't be read as safetensors ({error}); copy the file again"
        ) from error


def file_metadata(path: str | Path) -> dict[str, str]:
    """What a file that can be opened says beside its tensors."""
    return _header(path)[1].get(NOTES, {})


def _header(path: str | Path) -> tuple[int, dict[str, Any]]:
    """Where the values in a file begin, and what it says of each tensor."""
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def _values(
    path: str | Path, place: int, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """The values of a tensor; `NARROW` ones become bfloat16.

    perf: the library, and numpy's function for files, let no other thread run.
    """
    values = np.empty(shape, dtype)
    left = values.reshape(-1).view(np.uint8)
    with Path(path).open("rb", buffering=0) as file:
        file.seek(place)
        while left.size:
            if not (read := file.readinto(left.data)):
                raise ValueError(f"{path} was cut off meanwhile; copy the file again")
            left = left[read:]
    return values.astype(ml_dtypes.bfloat16) if dtype in NARROW.values() else values


def write_tensors(
    path: str | Path,
    specs: Mapping[str, Any],
    values: Iterable[tuple[str, Any]],
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a file whose tensors are known before their values are.

    The file gets its name once every tensor is written, otherwise nothing is left of
    it. Equal tensors make equal files.

    Args:
        specs: anything with a type and a shape for every name.
        values: every name once, in any order, with what numpy can turn into an array.
        notes: what else the file says, see `file_metadata`.

    Raises:
        ValueError: a type that the format does not have.
        AssertionError: a tensor is unknown, of another type or shape, or was forgotten.
    """
    expected = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in specs.items()}
    unknown = {str(spec.dtype) for spec in expected.values() if spec.dtype not in NAMES}
    if unknown:
        raise ValueError(
            f"tensors of {sorted(unknown)} can't be stored; use {[*NAMES.values()]}"
        )
    header: dict[str, Any] = {NOTES: METADATA | dict(notes)}
    places, end = {}, 0
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
