# SPDX-License-Identifier: Apache-2.0
"""Weights that wait in the host's memory, and are on their devices while they are used.

A parked array keeps its sharding, in another kind of memory: it knows where it belongs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

HOST, DEVICE = "pinned_host", "device"  # JAX's names of kinds of memory


def parked(tree: Any) -> Any:
    """The arrays of a tree in the host's memory; they remember their devices."""
    return _moved(tree, HOST)


def is_parked(x: Any) -> bool:
    """Whether an array, or the shape of one, waits on the host for its devices."""
    return getattr(getattr(x, "sharding", None), "memory_kind", None) == HOST


@contextmanager
def present(tree: Any) -> Iterator[Any]:
    """The arrays of a tree on their devices.

    Those that were parked are moved once, and leave the devices at the end.
    """
    there = jax.tree.map(lambda x: _moved(x, DEVICE) if is_parked(x) else x, tree)
    try:
        yield there
    finally:
        moved = zip(jax.tree.leaves(there), jax.tree.leaves(tree), strict=True)
        for x, original in moved:
            if is_parked(original):
                x.delete()


def _moved(tree: Any, kind: str) -> Any:
    where = jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree)
    return jax.device_put(tree, where)
