# SPDX-License-Identifier: Apache-2.0
"""What all data sets share: records in endless new orders, read by workers.

Workers hand over failures like any other example, so what comes out depends on the seed
and the number of hosts only, not on the number of workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
from absl import flags

from pyramid_jax.data.examples import Failure, Shuffled
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.packing import Handed, Sound

READY = 2  # batches made ahead

# number of the example on this host, its record -> an example, a NamedTuple
Make = Callable[[int, Record], Any | Failure]


@dataclass(frozen=True)
class RecordSource:
    """Records, and how a host reads its share of them.

    Args:
        workers: processes that make examples; 0 makes them in this one.
        max_bad: fraction of the files that may be unusable.
        shard: index and count of the hosts.
        folder: gets `skipped.jsonl`, a line for each file that could not be used.

    Raises:
        ValueError: a shard that can't be.
    """

    records: tuple[Record, ...]
    seed: int
    workers: int
    max_bad: float
    shard: tuple[int, int]
    folder: Path

    def __post_init__(self):
        host, hosts = self.shard
        if not 0 <= host < hosts:
            raise ValueError(
                f"shard {self.shard} must be the index and the count of the hosts, "
                "e.g. (0, 1)"
            )

    def examples(self, make: Make) -> grain.IterDataset:
        """This host's examples as dicts, endlessly and without the unusable ones."""
        if not flags.FLAGS.is_parsed():  # grain reads flags
            flags.FLAGS.mark_as_parsed()
        host, hosts = self.shard
        records = grain.MapDataset.source(Shuffled(self.records, self.seed))
        made = Handed(records[host::hosts].map_with_index(make), self.workers)
        files = len({record.path for record in self.records})
        sound = Sound(self.folder / "skipped.jsonl", self.max_bad, files)
        return grain.experimental.FlatMapIterDataset(made, sound)


def ahead(batches: grain.IterDataset) -> grain.DatasetIterator:
    """An iterator that makes some batches ahead, in a thread."""
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=READY
        )
    )
