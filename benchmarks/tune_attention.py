# SPDX-License-Identifier: Apache-2.0
"""Chooses block sizes for the Pallas kernels by timing them on the device at hand.

python -m benchmarks.tune_attention                # into the table of the package
python -m benchmarks.tune_attention --to mine.json --dims 64 --cases 'packed 24576'
python -m benchmarks.tune_attention --backend pallas_mosaic_gpu    # on a Hopper GPU

For every width of heads and every case, candidates for one kernel at a time run in
turns, after all have been compiled at once; the fastest median wins. Those that the
compiler refuses, or whose results differ, are left out. An entry is written for rows up
to the length of its case; that of the longest case serves all longer rows, too. This
needs an accelerator.
"""

import argparse
import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import turn
from benchmarks.timing import environment, interleaved, spread
from launch.compile.cases import case
from pyramid_jax.kernels.attention import attention
from pyramid_jax.kernels.tiles import TABLE, Entry, Tile, Tiles, read_tiles, tiles_for
from pyramid_jax.mask import TokenMask

logger = logging.getLogger(__name__)

BACKENDS = {"gpu": "pallas_triton", "tpu": "pallas_tpu"}
# The parts of `Tiles` that are chosen one after the other; a TPU's kernels share one.
PARTS = {
    "pallas_triton": Tiles._fields,
    "pallas_mosaic_gpu": Tiles._fields,
    "pallas_tpu": ("all",),
}
CANDIDATES = {
    "pallas_triton": ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "pallas_mosaic_gpu": ((64, 128, 256), (64, 128), (8,), (2, 4), (0, 8, 16)),
    "pallas_tpu": ((256, 512, 1024), (256, 512, 1024)),
}
CASES = ("384p stage 2 unit 8", "768p stage 2 unit 8", "packed 24576")
WIDTHS = (64, 128)
SHARE = 0.03  # of the largest value: how far results may differ between block sizes


# Gives milliseconds of several tiles, of the forward pass alone or of both.
Clock = Callable[[Sequence[Tiles], bool], dict[Tiles, float]]


class Setting(NamedTuple):
    """What block sizes are chosen for."""

    backend: str
    mask: TokenMask
    dim: int
    heads: int = 24
    dtype: str = "bfloat16"
    repeats: int = 10


class Choice(NamedTuple):
    """The fastest tiles; milliseconds of both passes with the old and the new ones."""

    tiles: Tiles
    before: float
    after: float


def candidates(backend: str) -> list[Tile]:
    """Tiles that are worth a try for one kernel."""
    return [Tile(*sizes) for sizes in itertools.product(*CANDIDATES[backend])]


def tuned(
    start: Tiles, parts: Sequence[str], options: Sequence[Tile], clock: Clock
) -> Choice:
    """The fastest of the options for each part, starting from `start`.

    Raises:
        ValueError: `start` does not run.
    """
    best = start
    for part in parts:
        several = [best, *(_changed(best, part, tile) for tile in options)]
        times = clock(several, part == "forward")
        best = min(times, key=lambda tiles: times[tiles])
    times = clock([start, best], False)
    return Choice(best, times[start], times[best])


def milliseconds(
    setting: Setting, several: Sequence[Tiles], only_forward: bool
) -> dict[Tiles, float]:
    """The median milliseconds of a call with each of the tiles that agree."""
    programs = agreeing(setting, several, only_forward)
    turns = {key: turn(call, jax.block_until_ready) for key, call in programs.items()}
    runs = {key: run for key, (run, _) in turns.items()}
    times = interleaved(runs, setting.repeats)
    return {
        key: 1e3 * spread(seconds).median / turns[key][1]
        for key, seconds in times.items()
    }


def agreeing(
    setting: Setting, several: Sequence[Tiles], only_forward: bool
) -> dict[Tiles, Callable[[], Any]]:
    """A call for each of the tiles that compile and compute what the first ones do.

    Raises:
        ValueError: the first ones do not run.
    """
    arrays, programs, first = _arrays(setting), {}, None
    compiled = functools.partial(_compiled, setting, arrays, only_forward)
    different = list(dict.fromkeys(several))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compiled, different))
    for tiles, program in zip(different, made, strict=True):
        try:
            if isinstance(program, Exception):
                raise program
            call = functools.partial(program, setting.mask, *arrays)
            result = call()
            difference = float(_difference(result, first or result))
        except Exception as reason:  # each compiler has its own kinds
            text = str(reason).split("\n")[0]
            if first is None:
                raise ValueError(f"the present tiles {tiles} fail: {text}") from reason
            logger.info("%s is refused: %s", tiles, text)
            continue
        first = first or result
        if difference <= SHARE:
            programs[tiles] = call
        else:
            logger.warning("%s computes something else", tiles)
    return programs


def entry(setting: Setting, choice: Choice, name: str, length: int | None) -> Entry:
    """The entry of the table for the tiles chosen on a case on this device."""
    system = environment(("jax",))
    return Entry(
        setting.backend,
        system["device"],
        setting.dtype,
        setting.dim,
        length,
        choice.tiles,
        f"measured {system['date']}, jax {system['jax']}, {name}, {setting.heads} "
        f"heads: {choice.before:.3f} ms before, {choice.after:.3f} ms after",
    )


def use(entry: Entry) -> tuple[Any, ...]:
    """What an entry is for; no two entries of a table share it."""
    return entry.backend, entry.device, entry.dtype, entry.dim, entry.length


def write_tiles(path: Path, entries: Sequence[Entry]) -> None:
    """Puts entries into a table; they replace those for the same use."""
    old = read_tiles(path) if path.exists() else ()
    by_use = {use(entry): entry for entry in (*old, *entries)}
    order = sorted(by_use.values(), key=lambda entry: (entry.backend, entry.narrowness))
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in order)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    read_tiles.cache_clear()


def main(argv: Sequence[str] | None = None) -> None:
    """Times candidates as the arguments say, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, help=f"default {CASES}")
    parser.add_argument("--dims", nargs="+", type=int, default=WIDTHS, help="widths")
    parser.add_argument("--heads", type=int, default=24, help="default 24")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10, help="turns, default 10")
    parser.add_argument("--backend", choices=PARTS, help="default: the device's")
    parser.add_argument("--to", type=Path, default=TABLE, help="default: the package's")
    options = parser.parse_args(argv)
    backend = options.backend or BACKENDS.get(jax.default_backend(), "")
    if jax.default_backend() not in BACKENDS:
        parser.error(
            "block sizes are timed on a GPU or a TPU; JAX sees only "
            f"{jax.devices()[0].device_kind}"
        )
    masks = {name: case(name) for name in options.cases}
    order = sorted(masks, key=lambda name: masks[name].segment.shape[1])
    for dim, name in itertools.product(options.dims, order):
        mask = TokenMask(*map(jnp.asarray, masks[name]))
        length = mask.segment.shape[1]
        setting = Setting(
            backend, mask, dim, options.heads, options.dtype, options.repeats
        )
        start = tiles_for(backend, dim, options.dtype, length)
        clock = functools.partial(milliseconds, setting)
        choice = tuned(start, PARTS[backend], candidates(backend), clock)
        line = entry(setting, choice, name, None if name == order[-1] else length)
        write_tiles(options.to, [line])
        print(f"width {dim}, {name}: {line.source}; {choice.tiles}", flush=True)


def _changed(tiles: Tiles, part: str, tile: Tile) -> Tiles:
    """The tiles with another one for one kernel, or for all."""
    if part == "all":
        return Tiles(tile, tile, tile)
    return tiles._replace(**{part: tile})


def _arrays(setting: Setting) -> list[jax.Array]:
    """Queries, keys, values and what comes back."""
    draw = np.random.default_rng(0)
    shape = (*setting.mask.segment.shape, setting.heads, setting.dim)
    arrays = (draw.standard_normal(shape, np.float32) for _ in range(4))
    return [jnp.asarray(x, setting.dtype) for x in arrays]


def _compiled(
    setting: Setting, arrays: Sequence[jax.Array], only_forward: bool, tiles: Tiles
) -> Callable[..., list[jax.Array]] | Exception:
    """The kernels with these tiles, the forward pass or both; or why there are none."""

    @jax.jit
    def both(
        mask: TokenMask, q: jax.Array, k: jax.Array, v: jax.Array, back: jax.Array
    ):
        def form(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, mask, setting.backend, tiles)

        if only_forward:
            return [form(q, k, v)]
        out, pull = jax.vjp(form, q, k, v)
        return [out, *pull(back)]

    try:
        return both.lower(setting.mask, *arrays).compile()
    except Exception as reason:
        return reason


@jax.jit
def _difference(found: list[jax.Array], first: list[jax.Array]) -> jax.Array:
    """The largest one, as a share of the largest value."""
    pairs = [
        (x.astype(jnp.float32), y.astype(jnp.float32))
        for x, y in zip(found, first, strict=True)
    ]
    return jnp.stack([jnp.abs(x - y).max() / jnp.abs(y).max() for x, y in pairs]).max()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
