# SPDX-License-Identifier: Apache-2.0
"""Latents of bouncing pairs that never become videos: drawn, encoded, stored."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from launch.pairs.dataset import DRAWING, FILMING, Pair, pair
from launch.pairs.scene import Settings, Split
from launch.prepare.storage import remember, save_arrays
from pyramid_jax.data.manifest import Record, write_manifest
from pyramid_jax.vae.autoencoder import Autoencoder, raw_encoder

_DRAWN = 64  # pairs that wait for the encoder, for each process that draws


def write_pair_latents(
    folder: str | Path,
    clips: int,
    vae: Autoencoder,
    settings: Settings = FILMING,
    *,
    seed: int = 0,
    split: Split = "training",
    batch: int = 32,
    workers: int = 0,
) -> Path:
    """Stores the latents of the first pairs of a split; returns their manifest.

    They are those of `write_pairs` before a codec has seen them. Files that exist are
    kept, so an interrupted run goes on where it stopped.

    Args:
        batch: pairs of one shape that are encoded together.
        workers: processes that draw; 0 draws in this one.

    Raises:
        ValueError: no clips are asked for, or the folder has files that were made with
            something else.
    """
    if clips < 1:
        raise ValueError(f"clips is {clips}, expected 1 or more")
    folder, encode = Path(folder), raw_encoder(vae, seed)
    drawn = {"pairs": DRAWING, "seed": seed, "split": split, **asdict(settings)}
    remember(folder, {"files": "latents", "vae": vae.digest, **drawn})
    paths = [folder / f"{number:06}.safetensors" for number in range(clips)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    draw = partial(pair, seed=seed, split=split, settings=settings)
    waiting: dict[tuple[int, ...], list[tuple[int, Pair]]] = defaultdict(list)

    def store(group: Sequence[tuple[int, Pair]]) -> None:
        # perf: batches of one size, so that every shape is compiled once.
        filled = [*group, *[group[-1]] * (batch - len(group))]
        pixels = np.stack([each.pixels for _, each in filled])
        latents = encode(pixels, np.array([number for number, _ in filled]))
        for (number, _), latent in zip(group, latents, strict=False):
            save_arrays(paths[number], {"latent": latent.astype(np.float16)})

    told = {}
    for number, each in zip(missing, _each(draw, missing, workers), strict=True):
        told[number] = each.kind, each.text
        group = waiting[each.pixels.shape]
        group.append((number, each))
        if len(group) == batch:
            store(waiting.pop(each.pixels.shape))
    for group in waiting.values():
        store(group)
    for number in set(range(clips)) - told.keys():
        each = draw(number)
        told[number] = each.kind, each.text
    records = [
        Record(path.with_suffix(".mp4"), *told[number], latent=path)
        for number, path in enumerate(paths)
    ]
    return write_manifest(folder / "manifest.jsonl", records)


def _each(draw: partial[Pair], numbers: Sequence[int], workers: int) -> Iterator[Pair]:
    """The pairs of some numbers in their order."""
    if not workers:
        yield from map(draw, numbers)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for first in range(0, len(numbers), _DRAWN * workers):
            part = numbers[first : first + _DRAWN * workers]
            yield from pool.map(draw, part, chunksize=8)
