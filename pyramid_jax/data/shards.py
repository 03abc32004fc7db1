# SPDX-License-Identifier: Apache-2.0
"""Training data in few large files: latents and features of captions, ready to read.

A data set is a folder of shards, each of which some host wrote (`launch.prepare`):

    00003-of-00008/000017.array_record      a piece: records of one shard, in order
    00003-of-00008.json                     how many are in each piece; written last
    empty.safetensors, made_with.json       as in folders of stored features and latents

A record is a safetensors file by itself: its caption, latent, and features if there are
any. A worker keeps the pieces' counts and some open files in memory, and no record.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from safetensors.numpy import save

from pyramid_jax.data.manifest import Kind, Record

_SHARD = re.compile(r"(\d{5})-of-(\d{5})\.json")
_OPEN = 64  # files of a worker
_NOTES = "__metadata__"
# The library's function for bytes has no bfloat16.
_TYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class ShardRecord(Record):
    """A record with everything that training needs of it.

    Args:
        arrays: its `latent`, and `tokens` and `pooled` if its caption has features.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Shards(Sequence[ShardRecord]):
    """The records of a folder of shards, read when they are asked for.

    Raises:
        ValueError: the folder lacks shards, or a record can't be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._pieces: list[str] = []
        counts: list[int] = []
        for path in _complete(self.folder):
            for number, count in enumerate(json.loads(path.read_bytes())["pieces"]):
                self._pieces.append(piece_path(path.with_suffix(""), number).as_posix())
                counts.append(count)
        self._ends = np.cumsum(np.array(counts, np.int64))
        self._files: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[piece - 1]) if piece else 0
        path = self._pieces[piece]
        try:
            (entry,) = self._file(piece).read([int(index) - begin])
            return decoded_record(entry, self.folder)
        except (RuntimeError, LookupError, ValueError) as error:
            raise ValueError(
                f"record {index - begin} of {path} can't be read ({error}); write the "
                "shard again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}  # workers open their own

    def _file(self, piece: int) -> Any:
        if piece not in self._files:
            # perf: records come in random order; reading ahead would be thrown away.
            options = "readahead_buffer_size:0,max_parallelism:0"
            self._files[piece] = ArrayRecordReader(self._pieces[piece], options)
            if len(self._files) > _OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(piece)
        return self._files[piece]


def piece_path(shard: Path, number: int) -> Path:
    """The file of a piece in the folder of a shard."""
    return shard / f"{number:06}.array_record"


def shard_name(index: int, count: int) -> str:
    """What a shard is called, of `count`."""
    return f"{index:05}-of-{count:05}"


def are_shards(path: str | Path) -> bool:
    """Whether there are shards in a folder, all of them or not."""
    path = Path(path)
    return path.is_dir() and any(_SHARD.fullmatch(x.name) for x in path.iterdir())


def encoded_record(record: Record, arrays: Mapping[str, np.ndarray]) -> bytes:
    """A record and its arrays in bytes."""
    whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    notes = {"path": str(record.path), "kind": record.kind, "text": record.text}
    return save(whole, notes)


def decoded_record(entry: bytes, folder: Path) -> ShardRecord:
    """The record that `encoded_record` made bytes of, in a folder of shards."""
    start = 8 + int.from_bytes(entry[:8], "little")
    header = json.loads(entry[8:start])
    notes = header.pop(_NOTES)
    arrays = {}
    for name, about in header.items():
        begin, end = (start + offset for offset in about["data_offsets"])
        values = np.frombuffer(entry[begin:end], _TYPES[about["dtype"]])
        arrays[name] = values.reshape(about["shape"])
    kind: Kind = "image" if notes["kind"] == "image" else "video"
    # Its features are inside; beside this path are those of the empty caption.
    features = folder / "inside" if "tokens" in arrays else None
    path = Path(notes["path"])
    return ShardRecord(path, kind, notes["text"], features, path, arrays)


def _complete(folder: Path) -> list[Path]:
    """The descriptions of all shards of a folder."""
    names = sorted(x.name for x in folder.iterdir() if _SHARD.fullmatch(x.name))
    counts = {name.split("-of-")[1] for name in names}
    if len(counts) != 1:
        raise ValueError(
            f"{folder} has shards of several data sets, {names[:3]}; keep those of one"
        )
    count = int(counts.pop().removesuffix(".json"))
    wanted = [f"{shard_name(i, count)}.json" for i in range(count)]
    if missing := sorted(set(wanted) - set(names)):
        raise ValueError(
            f"{folder} lacks {len(missing)} of {count} shards, {missing[:3]}; run the "
            "commands that write them again until they end"
        )
    return [folder / name for name in wanted]
