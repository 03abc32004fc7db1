# SPDX-License-Identifier: Apache-2.0
"""From examples of the data workers to batches of packed rows.

The state of every step is a few numbers: how many messages of the workers are used up,
and the place in the last one and in the rows packed from it.
"""

import json
import logging
from pathlib import Path
from typing import Any

import grain
import numpy as np

from pyramid_jax.data.examples import Failure
from pyramid_jax.shapes import Rows

logger = logging.getLogger(__name__)

Message = list[Any]  # examples, which are NamedTuples, and `Failure`s

_EXAMPLES = 8  # perf: of a message; each message costs a worker about 0.1 ms
_SHARED = 2**20  # perf: bytes from which an array is shared instead of sent
_OPEN_ROWS = 8  # rows that are filled at once, at least


class Handed(grain.IterDataset[Message]):
    """What the workers hand over, in the order of `examples`.

    Its state does not tell how many workers there are, so that a run may be resumed
    with any number of them.

    Args:
        workers: processes; 0 works in this one.
    """

    def __init__(self, examples: grain.MapDataset, workers: int):
        super().__init__()
        self._messages = examples.batch(_EXAMPLES, batch_fn=list)
        self._workers = workers

    def __iter__(self) -> "_HandedIterator":
        return _HandedIterator(self)

    def start(self, at: int) -> grain.DatasetIterator[Message]:
        """An iterator from message `at` on, with workers of its own."""
        read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        messages = grain.experimental.WithOptionsIterDataset(
            self._messages[at:].to_iter_dataset(read),
            grain.experimental.DatasetOptions(min_shm_size=_SHARED),
        )
        workers = grain.MultiprocessingOptions(num_workers=self._workers)
        return iter(messages.mp_prefetch(workers))


class _HandedIterator(grain.DatasetIterator[Message]):
    def __init__(self, handed: Handed):
        super().__init__()
        self._handed, self._at, self._running = handed, 0, None

    def __next__(self) -> Message:
        if self._running is None:
            self._running = self._handed.start(self._at)
        message = next(self._running)
        self._at += 1
        return message

    def get_state(self) -> dict[str, int]:
        return {"message": self._at}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._at = state["message"]

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None


class Sound(grain.experimental.FlatMapTransform):
    """Passes examples on; logs, lists and counts failures, and stops if too many."""

    max_fan_out = _EXAMPLES

    def __init__(self, listed: Path, max_bad: float, files: int):
        self._listed, self._most, self._files = listed, max_bad * files, files
        self._bad: set[str] = set()

    def flat_map(self, element: Message) -> list[dict]:
        for failure in element:
            if isinstance(failure, Failure) and failure.path not in self._bad:
                self._bad.add(failure.path)
                self._report(failure)
        return [e._asdict() for e in element if not isinstance(e, Failure)]

    def _report(self, failure: Failure) -> None:
        logger.warning("skipped %s: %s", failure.path, failure.reason)
        self._listed.parent.mkdir(parents=True, exist_ok=True)
        with self._listed.open("a", encoding="utf-8") as file:
            file.write(json.dumps(failure._asdict(), ensure_ascii=False) + "\n")
        if len(self._bad) > self._most or len(self._bad) == self._files:
            raise ValueError(
                f"{len(self._bad)} of {self._files} files can not be used, the last is "
                f"{failure.path} ({failure.reason}); {self._listed} lists them: repair "
                "or remove them, or raise max_bad"
            )


def packed(
    examples: grain.IterDataset, budget: dict[str, int], batch: int
) -> grain.IterDataset[Rows]:
    """Batches of rows, each filled with the examples that still fit.

    Args:
        budget: of a row: tokens of `video` and `text`; segments, for `stage` and
            `pooled`.
    """
    rows = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct=budget,
        padding_struct={name: -1 if name == "stage" else None for name in budget},
        num_packing_bins=-(-_OPEN_ROWS // batch) * batch,
        shuffle_bins=False,
    )
    return rows.batch(batch).map(_rows)


def _rows(packed: dict[str, np.ndarray]) -> Rows:
    """`Rows` of a packed batch. Grain counts segments from 1, 0 is padding."""
    video, stage = packed["video"], packed["stage"]
    fields = {
        name: np.ascontiguousarray(video[name]) for name in video.dtype.names or ()
    }
    return Rows(
        **fields,
        segment=packed["video_segment_ids"] - 1,
        stage=stage,
        text=packed["text"],
        text_segment=packed["text_segment_ids"] - 1,
        pooled=packed["pooled"],
    )
