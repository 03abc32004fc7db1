# SPDX-License-Identifier: Apache-2.0
"""Encoding and decoding videos: frames per second and memory, alone or side by side.

python -m benchmarks.vae
python -m benchmarks.vae --height 384 --width 640 --frames 121 --dtype bfloat16
python -m benchmarks.vae --reference ~/Pyramid-Flow --to result.json

A video is worked on whole, in chunks, and in chunks of tiles. Memory is what the
compiler reserves for the largest step beside weights. The last command needs a checkout
of the original and its packages; both sides then run in turns. Weights are fresh.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from benchmarks.reference_vae import OriginalVAE
from benchmarks.timing import CLOCKS, Spread, environment, interleaved, ratios, spread
from pyramid_jax import sharding
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import Codec, Pieces

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers")
DIRECTIONS, WAYS = ("encode", "decode"), ("whole", "chunked", "tiled")
MIB = 2**20


@dataclass(frozen=True)
class Workload:
    """Sizes of the VAE and of the video; the levels are those of the released VAE.

    Args:
        first: width of the finest level; the released VAE has 128.
        layers: residual blocks of a level of the encoder; the decoder has one more.
        height, width, frames: of the video, in pixels.
        chunk: pixel frames of a chunk after the first.
        tile: height and width of a tile, in pixels.
    """

    first: int = 32
    layers: int = 1
    dtype: str = "float32"
    height: int = 64
    width: int = 96
    frames: int = 17
    chunk: int = 8
    tile: int = 64

    @property
    def cfg(self) -> VAEConfig:
        """The VAE."""
        widths = tuple(self.first * times for times in (1, 2, 4, 4))
        return VAEConfig(
            encoder_widths=widths,
            decoder_widths=widths,
            encoder_layers=(self.layers,) * 4,
            decoder_layers=(self.layers + 1,) * 4,
            dtype=self.dtype,
        )

    @cached_property
    def params(self) -> Any:
        """Fresh weights."""
        init = jax.jit(partial(vae.initialise_vae, self.cfg))
        return sharding.unbox(init(jax.random.key(0)))

    @property
    def parameters(self) -> int:
        """How many numbers the VAE learns."""
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.params))

    @property
    def codec(self) -> Codec:
        """The VAE as functions."""
        return autoencoder.vae_codec(Autoencoder(self.cfg, LatentConfig(), self.params))

    def pieces(self, how: str) -> Pieces:
        """How much is worked on at once in one of the `WAYS`."""
        chunk = None if how == "whole" else self.chunk
        return Pieces(chunk, self.tile if how == "tiled" else None)

    def inputs(self, what: str) -> Float[np.ndarray, "1 _ _ _ c"]:
        """The pixels or latents that are encoded or decoded."""
        shape = (1, self.frames, self.height, self.width, self.cfg.pixels)
        if what == "decode":
            side, every = self.cfg.spatial_factor, self.cfg.temporal_factor
            cells = (self.height // side, self.width // side, self.cfg.latent)
            shape = (1, 1 + (self.frames - 1) // every, *cells)
        return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@dataclass(frozen=True)
class Measured:
    """Seconds of one way to encode or decode the video, on both sides.

    `ratio` is reference over jax; `memory` is in bytes.
    """

    seconds: Spread
    frames_per_second: float
    memory: int
    reference: Spread | None = None
    ratio: Spread | None = None


def measure(
    work: Workload, repeats: int, clock: str = "wall", reference: Path | None = None
) -> dict[str, Measured]:
    """Runs every way `repeats` times on each side, in turns.

    Args:
        clock: a key of `CLOCKS`.
        reference: a checkout of the original; None measures this project alone.

    Raises:
        ValueError: see `OriginalVAE`; sizes that do not fit the VAE.
    """
    original = None
    if reference is not None:
        sizes = (work.parameters, work.tile, work.chunk)
        original = OriginalVAE(reference, work.cfg, *sizes)
    results = {}
    for what in DIRECTIONS:
        for how in WAYS:
            runs = {"jax": _run(work, what, how)}
            if original is not None:
                runs["reference"] = original.run(what, how, work.inputs(what))
            times = interleaved(runs, repeats, clock)
            seconds = spread(times["jax"])
            both = (
                (spread(times["reference"]), ratios(times, "reference", "jax"))
                if original is not None
                else ()
            )
            rate = work.frames / seconds.median
            memory = step_memory(work, what, how)
            results[f"{what}, {how}"] = Measured(seconds, rate, memory, *both)
    return results


def step_memory(work: Workload, what: str, how: str) -> int:
    """Bytes that the largest compiled step needs at once, without the weights."""
    x = work.inputs(what)
    side, every = work.cfg.spatial_factor, work.cfg.temporal_factor
    shrink, thin = (1, 1) if what == "encode" else (side, every)
    pieces = work.pieces(how)
    if pieces.tile is not None:
        x = x[:, :, : pieces.tile // shrink, : pieces.tile // shrink]
    step: Callable = partial(getattr(vae, what), work.cfg)
    piece = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    past = None
    if pieces.frames is not None:
        first = jax.ShapeDtypeStruct((1, 1, *x.shape[2:]), jnp.float32)
        _, past = jax.eval_shape(step, work.params, first)
        later = (1, pieces.frames // thin, *x.shape[2:])
        piece = jax.ShapeDtypeStruct(later, jnp.float32)
    # Unused weights would be dropped from the arguments.
    form = jax.jit(step, donate_argnums=2, keep_unused=True)
    compiled = form.lower(work.params, piece, past).compile()
    memory = compiled.memory_analysis()
    weights = sum(x.nbytes for x in jax.tree.leaves(work.params))
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes
    taken += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return int(taken - weights)


def report(work: Workload, results: dict[str, Measured]) -> str:
    """The result as a table for a terminal."""
    where = environment(PACKAGES)
    lines = [
        f"VAE of {work.parameters / 1e6:.1f} M weights, {work.dtype}; {work.frames} "
        f"frames of {work.height}x{work.width}; {where['device']}, {where['cpu']}, "
        f"load {where['load']}, jax {where['jax']}, torch {where['torch']}",
        f"{'':18}{'seconds':28}{'frames/s':>9}{'MiB':>9}   {'original':28}ratio",
    ]
    for name, row in results.items():
        memory = row.memory / MIB
        line = f"{name:18}{row.seconds!s:28}{row.frames_per_second:9.2f}{memory:9.0f}"
        lines.append(f"{line}   {row.reference or ''!s:28}{row.ratio or ''}".rstrip())
    return "\n".join(lines)


def as_json(work: Workload, results: dict[str, Measured], clock: str) -> dict[str, Any]:
    """The results and their circumstances, as JSON values."""

    def plain(row: Measured) -> dict[str, Any]:
        values = {field.name: getattr(row, field.name) for field in fields(row)}
        return {
            name: value._asdict() if isinstance(value, Spread) else value
            for name, value in values.items()
        }

    return {
        "workload": asdict(work),
        "parameters": work.parameters,
        "clock": clock,
        "environment": environment(PACKAGES),
        "measured": {name: plain(row) for name, row in results.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in fields(Workload):
        default: Any = field.default
        text = f"default {default}"
        parser.add_argument(
            f"--{field.name}", type=type(default), default=default, help=text
        )
    parser.add_argument("--reference", type=Path, help="checkout of the original")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default wall")
    parser.add_argument("--to", type=Path, help="JSON file for the result")
    arguments = vars(parser.parse_args(argv))
    options = ("repeats", "clock", "reference", "to")
    repeats, clock, reference, to = (arguments.pop(name) for name in options)
    work = Workload(**arguments)
    results = measure(work, repeats, clock, reference)
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        result = as_json(work, results, clock)
        to.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(report(work, results))


def _run(work: Workload, what: str, how: str) -> Callable[[], jax.Array]:
    codec, x, pieces = work.codec, jnp.asarray(work.inputs(what)), work.pieces(how)
    if what == "encode":
        return lambda: codec.encode(x, None, pieces)
    return lambda: codec.decode(x, pieces)


if __name__ == "__main__":
    main()
