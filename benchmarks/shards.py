# SPDX-License-Identifier: Apache-2.0
"""Memory that a data worker needs for the records of many shards: index and order.

    python -m benchmarks.shards --records=10000000 --to=benchmarks/results/shards.json

The shards are only described, not written: a worker knows how many records are in each
piece, and the order of an epoch. It keeps two orders, as one epoch ends and the next
begins. Examples that are ready and the cache of latents (`data.cache_mib`) come on top.
"""

import json
import pickle
import resource
import tempfile
import time
from pathlib import Path

from absl import app, flags

from launch.prepare.shards import PIECE
from pyramid_jax.data.shards import Shards, shard_name
from pyramid_jax.data.source import epoch_order

SHARDS, EPOCHS = 64, 2


def describe(folder: Path, records: int) -> None:
    """Writes what the shards of so many records say of themselves."""
    for index in range(SHARDS):
        own = len(range(index, records, SHARDS))
        whole, rest = divmod(own, PIECE)
        pieces = [PIECE] * whole + [rest] * bool(rest)
        path = folder / f"{shard_name(index, SHARDS)}.json"
        path.write_text(json.dumps({"pieces": pieces}), encoding="utf-8")


def peak_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(_: object) -> None:
    count = flags.FLAGS.records
    with tempfile.TemporaryDirectory() as name:
        describe(Path(name), count)
        before, began = peak_mib(), time.process_time()
        shards = Shards(name)
        index, opened = peak_mib(), time.process_time()
        orders = [epoch_order(0, epoch, count) for epoch in range(EPOCHS)]
        after, ordered = peak_mib(), time.process_time()
    assert len(shards) == count == len(orders[0])
    found = {
        "records": count,
        "shards": SHARDS,
        "records_of_a_piece": PIECE,
        "index_mib": round(index - before, 1),
        "index_cpu_seconds": round(opened - began, 2),
        "pickled_index_mib": round(len(pickle.dumps(shards)) / 2**20, 1),
        "orders_mib": round(sum(x.nbytes for x in orders) / 2**20, 1),
        "index_and_orders_peak_mib": round(after - before, 1),
        "cpu_seconds_per_epoch_order": round((ordered - opened) / EPOCHS, 2),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if flags.FLAGS.to:
        Path(flags.FLAGS.to).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_integer("records", 10_000_000, "Records of all shards.", lower_bound=1)
    flags.DEFINE_string("to", None, "File to write the result to, as JSON.")
    app.run(main)
