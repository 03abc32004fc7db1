# SPDX-License-Identifier: Apache-2.0
"""The kernels for attention: right or wrong, how fast beside others, with which tiles.

Values and gradients are compared with the formula in float64. On a CPU, rows are small
and kernels interpreted.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import tune_attention as tune
from benchmarks.attention import (
    REDUCED,
    Workload,
    all_pairs,
    compare,
    errors,
    problem,
)
from benchmarks.attention_rivals import NAMES, NEEDS, backend
from benchmarks.device.records import Log
from launch.compile.cases import case
from pyramid_jax.kernels.attention import BACKENDS, attention, default
from pyramid_jax.kernels.tiles import Tile, Tiles, tiles_for
from pyramid_jax.kernels.trial import failure
from pyramid_jax.mask import TokenMask

ROWS = {  # a row of tokens for each kind of work
    "768p": "768p stage 2 unit 15",
    "384p": "384p stage 2 unit 15",
    "packed": "packed 24576",
}
HEADS = 24
NARROW = ("pallas_mosaic_gpu",)  # kernels that take types of two bytes only
TRIALS = ((64, "bfloat16"), (64, "float32"), (128, "bfloat16"))
# Rows with blocks of every kind, and the longest one of sampling in 5 seconds of 768p.
CHECKED = ("384p stage 2 unit 8", "packed 8192", "scattered", ROWS["768p"])
# Largest error as a share of the largest value; bfloat16 has 8 bits.
ALLOWED = {"bfloat16": 0.02, "float32": 2e-5}
# Of `tune_attention.CANDIDATES`, those that compilers promise most of.
TILES = (
    *(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    *(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 128, 8, 2)),
    *(Tile(128, 32, 4, 3), Tile(128, 64, 4, 3)),
)
TINY_TILES = (Tile(64, 64),)
TUNED = "attention_tiles.json"
# Compiled for the longest, or such that a kernel breaks the device and ends the step.
LAST = ("flex_flash", "tokamax", "jax_pallas")


def correctness(log: Log, tiny: bool) -> None:
    """The trial and the errors of every kernel for this device."""
    device = jax.default_backend()
    made_for = {name: NEEDS[name] for name in BACKENDS if name in NEEDS}
    kernels = [n for n, needs in made_for.items() if tiny or needs == device]
    trials = ((16, "float32"),) if tiny else TRIALS

    def takes(name: str, dtype: str) -> bool:
        return name not in NARROW or dtype != "float32"

    for name in kernels:
        for dim, dtype in (each for each in trials if takes(name, each[1])):
            kernel, plain = (partial(attention, backend=b) for b in (name, "xla"))
            why = failure(kernel, plain, dim, dtype)
            log("trial", kernel=name, dim=dim, dtype=dtype, failure=why)
    log("default", backend=default(4096, 64, "bfloat16"))
    work = REDUCED if tiny else Workload()
    for title in CHECKED[1:2] if tiny else CHECKED:
        for dtype in ("float32",) if tiny else ALLOWED:
            given = problem(replace(work, dtype=dtype), title, 2)
            for name in (each for each in kernels if takes(each, dtype)):
                about = {"kernel": name, "case": title, "dtype": dtype}
                try:
                    found: dict[str, Any] = errors(given, backend(name, given))
                    found["right"] = max(found.values()) <= ALLOWED[dtype]
                except Exception as reason:  # the other cases may still be right
                    found = {"right": False, "failure": str(reason)[:500]}
                log("error", **about, tokens=given.q.shape[1], **found)


def against_others(kind: str, log: Log, tiny: bool) -> None:
    """How fast every implementation is on a row, one after the other.

    Args:
        kind: a key of `ROWS`.
    """
    work, heads = (REDUCED, 2) if tiny else (Workload(repeats=5), HEADS)
    title = REDUCED.cases[0] if tiny else ROWS[kind]
    given = problem(work, title, heads)
    pairs = all_pairs(given.mask)
    log("row", case=title, tokens=given.q.shape[1], heads=heads, pairs=pairs)
    for name in contestants(jax.default_backend()):
        begin = time.monotonic()
        (one,) = compare(replace(work, rivals=(name,)), given, pairs).values()
        took = round(time.monotonic() - begin, 1)
        log("time", case=title, rival=name, took=took, measured=one)


def contestants(device: str) -> list[str]:
    """Implementations that are worth a comparison on a kind of device."""
    plain = ("blocks",) if device == "cpu" else ("xla", "blocks")
    fitting = [n for n in NAMES if NEEDS.get(n, device) == device and n not in plain]
    first = [name for name in fitting if name not in LAST]
    return [*first, *(name for name in LAST if name in fitting)]


def tiles(log: Log, tiny: bool) -> None:
    """The fastest block sizes for heads of width 64; also as a table of tiles."""
    for title in (REDUCED.cases[0],) if tiny else (ROWS["768p"], ROWS["packed"]):
        _tuned(title, log, tiny)


def _tuned(title: str, log: Log, tiny: bool) -> None:
    name = tune.BACKENDS.get(jax.default_backend(), "pallas_triton")
    dim, heads, dtype = (16, 1, "float32") if tiny else (64, HEADS, "bfloat16")
    row = case(title, REDUCED.scale if tiny else 1.0)
    mask = TokenMask(*map(jnp.asarray, row))
    length = mask.segment.shape[1]
    setting = tune.Setting(name, mask, dim, heads, dtype, 1 if tiny else 5)

    def clock(several: Sequence[Tiles], only_forward: bool) -> dict[Tiles, float]:
        times = tune.milliseconds(setting, several, only_forward)
        found = [{"tiles": tile, "ms": ms} for tile, ms in times.items()]
        log("tried", case=title, only_forward=only_forward, found=found)
        return times

    parts = tune.PARTS[name][:1] if tiny else tune.PARTS[name]
    options = TINY_TILES if tiny else TILES
    if name == "pallas_tpu":
        options = tune.candidates(name)
    start = tiles_for(name, dim, dtype, length)
    choice = tune.tuned(start, parts, options, clock)
    log("tiles", case=title, dim=dim, dtype=dtype, **choice._asdict())
    entry = tune.entry(setting, choice, title, length)
    tune.write_tiles(log.folder / TUNED, [entry])
