# SPDX-License-Identifier: Apache-2.0
"""Images beside videos: how many, where, and each once per epoch."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pyramid_jax.data.examples import stage_of
from pyramid_jax.data.manifest import Record, write_manifest
from pyramid_jax.data.mixture import GROUP, Mixture
from tests.packed import config, taken_parts


def records(kind: str, first: int, count: int) -> list[Record]:
    names = range(first, first + count)
    return [Record(Path(f"{name}.x"), kind, str(name)) for name in names]


MIXTURE = Mixture(records("video", 10, 5), records("image", 30, 3), 1 / 8)


@pytest.mark.parametrize(("share", "images"), [(1 / 8, 80), (0.01, 6), (1.0, 640)])
def test_a_share_of_successive_examples_are_images(share: float, images: int):
    mixture = Mixture(MIXTURE.videos, MIXTURE.images, share)
    drawn = [mixture.of(number, seed=1) for number in range(10 * GROUP)]
    kinds = [kind[0].kind for kind, _ in drawn]
    assert kinds.count("image") == images
    for kind in (MIXTURE.videos, MIXTURE.images):  # none is left out, none comes twice
        numbers = [number for of, number in drawn if of is kind]
        assert numbers == list(range(len(numbers)))


def test_images_are_of_all_stages_and_elsewhere_in_every_group(tmp_path: Path):
    cfg = config(tmp_path)
    image = [n for n in range(100 * GROUP) if MIXTURE.of(n, 1)[0] is MIXTURE.images]
    stages = Counter(stage_of(cfg, number) for number in image)
    assert all(
        abs(stages[k] / 800 - share / 4) < 0.06 for k, share in enumerate((1, 2, 1))
    )
    rows = Counter(number % cfg.batch for number in image)
    assert abs(rows[0] - rows[1]) < 100


def test_rows_hold_examples_of_both_manifests(tmp_path: Path):
    """Rows of one segment, so that parts are in the order of the examples."""
    images = [Record(tmp_path / f"{n}.png", "image", str(n)) for n in range(30, 33)]
    cfg = config(
        tmp_path, segments=1, images=tmp_path / "images.jsonl", image_share=0.25
    )
    write_manifest(tmp_path / "images.jsonl", images)
    found = taken_parts(GROUP // cfg.batch, cfg, tmp_path)
    counts = Counter(part.text[1] for part in found)
    of_images = {name: counts.pop(name) for name in range(30, 33)}
    assert sum(of_images.values()) == GROUP // 4 and min(of_images.values()) == 5
    assert set(counts) == set(range(10, 22)) and set(counts.values()) == {4}
    still = [part for part in found if part.text[1] >= 30]
    assert {part.unit for part in still} == {0}
    cfg = replace(cfg, held_out=4)  # of which none are images
    held = taken_parts(20, cfg, tmp_path, split="held out")
    assert {part.text[1] for part in held} == {18, 19, 20, 21}
