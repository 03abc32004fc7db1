# SPDX-License-Identifier: Apache-2.0
"""What a chip gives the simplest programs: a large product, a large copy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention import turn
from benchmarks.device.records import Log
from benchmarks.timing import Spread, interleaved, spread

SIDE, TINY_SIDE = 8192, 128
GIB = 2**30


def ceilings(log: Log, tiny: bool) -> None:
    """The rates that nothing else will exceed by much."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    log("chip", platform=device.client.platform_version, memory=memory)
    side = TINY_SIDE if tiny else SIDE
    x, y = (jax.random.normal(jax.random.key(i), (side, side)) for i in (0, 1))
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    ms = milliseconds(lambda: product(x, y))
    log("product", side=side, ms=ms, tflops=2 * side**3 / ms.median / 1e9)
    long = jax.random.normal(jax.random.key(2), (8 * side, side))
    copy = jax.jit(lambda x: x + 1)  # a copy alone would be left out
    ms = milliseconds(lambda: copy(long))
    log("copy", bytes=long.nbytes, ms=ms, tbps=2 * long.nbytes / ms.median / 1e9)


def milliseconds(call: Callable[[], Any], repeats: int = 7) -> Spread:
    """Of calls of a compiled program, as many together as last long enough."""
    run, count = turn(call, jax.block_until_ready)
    (times,) = interleaved({"": run}, repeats).values()
    return spread([1e3 * seconds / count for seconds in times])


def peak_memory() -> float | None:
    """The most GiB that the device has held so far; None: it does not tell."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / GIB
