# SPDX-License-Identifier: Apache-2.0
"""Batches that are made once and repeated, where a device is faster than its host.

Noise, times and the corruption of the history are drawn in the step, so a batch that
comes again is not the same example again.
"""

from typing import Any

import grain

from pyramid_jax.data.source import epoch_order


class KeptBatches(grain.DatasetIterator[Any]):
    """The first batches of an iterator, round after round in new orders.

    The first round makes them. A state is how many batches have been taken; after
    `set_state`, the kept ones are made again before the next comes.

    Args:
        made: the iterator, at its beginning.
        count: how many are kept.
        seed: of the orders.
    """

    def __init__(self, made: grain.DatasetIterator[Any], count: int, seed: int):
        super().__init__()
        self._made, self._count, self._seed = made, count, seed
        self._kept: list[Any] = []
        self._taken = 0

    def __next__(self) -> Any:
        epoch, place = divmod(self._taken, self._count)
        if epoch:
            place = int(epoch_order(self._seed, epoch, self._count)[place])
        needed = self._count if epoch else place + 1
        while len(self._kept) < needed:
            self._kept.append(next(self._made))
        self._taken += 1
        return self._kept[place]

    def get_state(self) -> dict[str, int]:
        return {"taken": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        self._taken = state["taken"]

    def close(self) -> None:
        self._kept.clear()
        self._made.close()
