# SPDX-License-Identifier: Apache-2.0
"""Records in endless new orders, read by workers; unusable files are counted.

Examples are numbered through the whole run. Every row of the global batch is a stream
of its own: row 3 of 8 gets the examples 3, 11, 19 and so on, whichever host makes it.
Workers hand over failures like any other example. So what comes out depends on the seed
and the number of rows only, neither on hosts nor on workers.
"""

import functools
import json
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from pyramid_jax.config import check_entries
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.mixture import Mixture
from pyramid_jax.data.pictures import picture_size, read_picture
from pyramid_jax.data.pixels import HeightWidth
from pyramid_jax.data.video_io import read_video, video_size
from pyramid_jax.data.workers import Message, Workers

logger = logging.getLogger(__name__)

_EXAMPLES = 8  # perf: of a message; each message costs a worker about 0.1 ms
_SPARED = 3  # bad files of a small set that don't end a run
_READY = 2  # batches that are made in advance
_ORDERED = 2  # messages that are made in advance, per worker
_alone = threading.Lock()  # while a cache changes

# The number of an example and its record -> the example, a NamedTuple. It may raise
# ValueError or OSError for a record that can't be used, and is pickled for the workers.
MakeExample = Callable[[int, Record], Any]


@dataclass(frozen=True)
class SourceConfig:
    """Which videos and images are read, and how.

    Args:
        height, width: of the pixels of every video and image.
        frames: pixel frames of a video.
        fps: at which they are taken from the file.
        batch: rows, or clips, of all hosts together.
        workers: processes of a host that decode; 0 decodes in the one that trains.
        cache_mib: memory for decoded clips, per worker.
        max_bad: fraction of the manifest's files that may be unusable; of a small set
            three may be, or a quarter, unless it is 0.
        held_out: records at the manifest's end that are not trained on but measured.

    Raises:
        ValueError: a value is out of range.
    """

    manifest: str | Path
    height: int
    width: int
    frames: int
    fps: float
    batch: int
    _: KW_ONLY
    seed: int = 0
    workers: int = 0
    cache_mib: int = 512
    max_bad: float = 0.01
    held_out: int = 0

    def __post_init__(self):
        sizes = ("height", "width", "frames", "fps", "batch")
        check_entries(self, lambda x: x > 0, "over 0", *sizes)
        counts = ("seed", "workers", "cache_mib", "held_out")
        check_entries(self, lambda x: x >= 0, "0 or more", *counts)
        check_entries(self, lambda x: 0 <= x <= 1, "0 to 1", "max_bad")

    @property
    def threads(self) -> bool:
        """Whether the workers are threads of the process that trains."""
        return False


def read_examples(
    make: MakeExample,
    records: Sequence[Record] | Mixture,
    cfg: SourceConfig,
    folder: str | Path,
    rows: Sequence[int],
    batch: int,
) -> dict[int, grain.IterDataset[dict[str, Any]]]:
    """The examples of some rows as dicts, endlessly and without the unusable ones.

    Args:
        folder: gets `skipped.jsonl`, a line for each file that could not be used.
        rows: those of a batch that are read here.
        batch: rows of all hosts.

    Raises:
        ValueError: rows that can't be; an iterator raises when more files than
            `max_bad` are unusable.
    """
    if not set(rows) <= set(range(batch)) or not rows:
        raise ValueError(
            f"rows {list(rows)} must be one or more of those of a batch of {batch}, "
            "which count from 0"
        )
    let_grain_read_flags()
    message = functools.partial(_message, make, records, cfg.seed)
    workers = Workers(message, cfg.workers, cfg.threads)
    ahead = -(-_ORDERED * cfg.workers // len(rows))
    mixed = isinstance(records, Mixture)
    kinds = (records.videos, records.images) if mixed else (records,)
    bad_files = BadFiles(
        Path(folder) / "skipped.jsonl", cfg.max_bad, sum(map(_files, kinds))
    )
    streams = {row: _Messages(workers, row, batch, ahead) for row in rows}
    flat = grain.experimental.FlatMapIterDataset
    return {row: flat(stream, bad_files) for row, stream in streams.items()}


def in_advance(batches: grain.IterDataset) -> grain.DatasetIterator:
    """An iterator that makes some batches in advance, in a thread."""
    prefetch = grain.experimental.ThreadPrefetchIterDataset
    return iter(prefetch(batches, prefetch_buffer_size=_READY))


class Together(grain.IterDataset[dict[str, Any]]):
    """Data sets by name whose elements come together; their states have the names.

    A state may have more names than these, which are those of other hosts.
    """

    def __init__(self, parts: Mapping[str, grain.IterDataset]):
        super().__init__(list(parts.values()))
        self._parts = dict(parts)

    def __iter__(self) -> "_TogetherIterator":
        return _TogetherIterator({n: iter(part) for n, part in self._parts.items()})


class _TogetherIterator(grain.DatasetIterator[dict[str, Any]]):
    def __init__(self, parts: Mapping[str, grain.DatasetIterator]):
        super().__init__(list(parts.values()))
        self._by_name = parts

    def __next__(self) -> dict[str, Any]:
        return {name: next(part) for name, part in self._by_name.items()}

    def get_state(self) -> dict[str, Any]:
        return {name: part.get_state() for name, part in self._by_name.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        if missing := sorted(self._by_name.keys() - state.keys()):
            raise ValueError(
                f"the position in the data lacks the rows {', '.join(missing)}; "
                "continue with the batch that the run began with"
            )
        for name, part in self._by_name.items():
            part.set_state(state[name])


def let_grain_read_flags() -> None:
    """Marks the flags as parsed, since grain reads them, in a program without any."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


# ------------------------------------------------------------------------ one record


class Failure(NamedTuple):
    """A file that can't be used, and why."""

    path: str
    reason: str


def attempt(make: MakeExample, number: int, record: Record) -> Any | Failure:
    """The example that `make` makes of a record, or why it can't."""
    try:
        return make(number, record)
    except (ValueError, OSError) as error:
        return Failure(str(record.path), str(error))


def nearest_size(sizes: tuple[HeightWidth, ...], record: Record) -> HeightWidth:
    """The size whose aspect ratio is nearest to that of a record's file.

    Raises:
        ValueError: a missing or broken file, if there is a choice.
    """
    if len(sizes) == 1:
        return sizes[0]
    shown = picture_size if record.kind == "image" else video_size
    return nearest(sizes, shown(record.path))


def nearest(sizes: tuple[HeightWidth, ...], shown: HeightWidth) -> HeightWidth:
    """The size whose aspect ratio is nearest to a height and a width in any unit."""
    height, width = shown
    return min(sizes, key=lambda s: abs(np.log(s[0] / s[1] * width / height)))


def read_pixels(
    record: Record,
    size: HeightWidth,
    frames: int,
    fps: float,
    place: float = 0.0,
    least: int | None = None,
) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of a record's file, of an image its only one.

    Arguments and errors are those of `video_io.read_video`.
    """
    if record.kind == "image":
        return read_picture(record.path, size)[None]
    return read_video(record.path, size, frames, fps, place, least)


class ArrayCache:
    """Keeps the arrays that were used last in memory, also of several threads.

    Args:
        room: bytes of memory.
    """

    def __init__(self, room: int):
        self._room = room
        self._arrays: OrderedDict[Hashable, list[np.ndarray]] = OrderedDict()

    def get(
        self, key: Hashable, make: Callable[[], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """The arrays of a key, made if they are not in memory."""
        with _alone:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        arrays = make()
        with _alone:
            if key in self._arrays:  # another thread was faster
                return self._arrays[key]
            self._arrays[key] = arrays
            self._room -= sum(array.nbytes for array in arrays)
            while self._room < 0:
                _, oldest = self._arrays.popitem(last=False)
                self._room += sum(array.nbytes for array in oldest)
        return arrays


def _files(records: Sequence[Record]) -> int:
    """How many files there are; those of shards are not read for it."""
    listed = isinstance(records, tuple)
    return len({x.path for x in records}) if listed else len(records)


def _message(
    make: MakeExample,
    records: Sequence[Record] | Mixture,
    seed: int,
    numbers: range,
) -> Message:
    """The examples of the run with these numbers, or why they can't be made."""
    message = []
    for number in numbers:
        mixed = isinstance(records, Mixture)
        kind, count = records.of(number, seed) if mixed else (records, number)
        epoch, place = divmod(count, len(kind))
        index = epoch_order(seed, epoch, len(kind))[place]
        try:
            record = kind[index]
        except ValueError as error:
            message.append(Failure(f"record {index}", str(error)))
            continue
        message.append(attempt(make, number, record))
    return message


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> Int[np.ndarray, "_"]:
    """The places of records in an epoch, by the place of an example in it."""
    # perf: grain's own shuffle takes milliseconds per record of a small data set.
    order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


# --------------------------------------------------------------------------- workers


class _Messages(grain.IterDataset[Message]):
    """The messages of one row, in the order of its examples.

    The state of an iterator is how many messages are used up. It tells neither how many
    workers there are nor who makes the other rows.
    """

    def __init__(self, workers: Workers, row: int, batch: int, ahead: int):
        super().__init__()
        self._workers, self._row = workers, row
        self._batch, self._ahead = batch, ahead

    def __iter__(self) -> "_MessageIterator":
        return _MessageIterator(self._workers, self._numbers, self._ahead)

    def _numbers(self, message: int) -> range:
        """The numbers of the examples of a message."""
        first = self._row + message * _EXAMPLES * self._batch
        return range(first, first + _EXAMPLES * self._batch, self._batch)


class _MessageIterator(grain.DatasetIterator[Message]):
    def __init__(self, workers: Workers, numbers: Callable[[int], range], ahead: int):
        super().__init__()
        self._workers, self._numbers, self._ahead = workers, numbers, ahead
        self._count, self._ordered = 0, deque[Callable[[], Message]]()

    def __next__(self) -> Message:
        while len(self._ordered) <= self._ahead:
            numbers = self._numbers(self._count + len(self._ordered))
            self._ordered.append(self._workers.order(numbers))
        message = self._ordered.popleft()()
        self._count += 1
        return message

    def get_state(self) -> dict[str, int]:
        return {"message": self._count}

    def set_state(self, state: dict[str, int]) -> None:
        self._ordered.clear()
        self._count = state["message"]

    def close(self) -> None:
        self._ordered.clear()
        self._workers.close()


class BadFiles(grain.experimental.FlatMapTransform):
    """Passes examples on; logs, lists and counts the files that failed.

    Args:
        path: file that gets a line of JSON for each of them.
        max_bad: fraction of `files` that may fail.
    """

    max_fan_out = _EXAMPLES

    def __init__(self, path: Path, max_bad: float, files: int):
        self._path, self._max_bad, self._files = path, max_bad, files
        self._bad: set[str] = set()

    def flat_map(self, element: Message) -> list[dict[str, Any]]:
        """The examples of a message as dicts."""
        for failure in element:
            if isinstance(failure, Failure):
                self.report(failure)
        return [e._asdict() for e in element if not isinstance(e, Failure)]

    def report(self, failure: Failure) -> None:
        """Counts a file once.

        Raises:
            ValueError: too many files have failed.
        """
        if failure.path in self._bad:
            return
        self._bad.add(failure.path)
        logger.warning("skipped %s: %s", failure.path, failure.reason)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(failure._asdict(), ensure_ascii=False) + "\n")
        count, files = len(self._bad), self._files
        spared = min(_SPARED, files / 4) if self._max_bad else 0
        if count > max(self._max_bad * files, spared) or count == files:
            raise ValueError(
                f"{count} of {files} files cannot be used, the last is {failure.path} "
                f"({failure.reason}); {self._path} lists them: repair or remove them, "
                "or raise max_bad (--config.data.max_bad=0.1 in training, "
                "--max_bad=0.1 of prepare)"
            )
