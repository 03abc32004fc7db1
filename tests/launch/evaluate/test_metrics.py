# SPDX-License-Identifier: Apache-2.0
"""Metrics of a clip: known damage makes each worse, and flicker is VBench's."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from launch.evaluate import clips, metrics
from launch.evaluate.metrics import Clip, ClipMetrics
from launch.pairs.dataset import pair

cv2 = pytest.importorskip("cv2")
FOLDER = Path(__file__).parent / "clips"
FILES = sorted(FOLDER.glob("*.mp4"))
REAL = pair(0, 5, "held out", kind="video").pixels
FRAMES = len(REAL)
FADING = np.linspace(0, 1, FRAMES)[:, None, None, None]


def bytes_of(video: np.ndarray) -> Clip:
    return np.rint(video).clip(0, 255).astype(np.uint8)


def noisy(clip: Clip) -> Clip:
    return bytes_of(clip + np.random.default_rng(0).normal(0, 20, clip.shape))


def shuffled(clip: Clip) -> Clip:
    return np.random.default_rng(0).permutation(clip)


def still(clip: Clip) -> Clip:
    return np.repeat(clip[:1], len(clip), axis=0)


def blurred(clip: Clip, sigma: float = 2.0) -> Clip:
    return bytes_of(ndimage.gaussian_filter(1.0 * clip, (0, sigma, sigma, 0)))


def pale(clip: Clip) -> Clip:
    return bytes_of(clip.mean(axis=(1, 2), keepdims=True) / 2 + clip / 2)


def grey(clip: Clip) -> Clip:
    return bytes_of(np.repeat(clip.mean(axis=-1, keepdims=True), 3, axis=-1))


def reddened(clip: Clip) -> Clip:
    return bytes_of(clip + np.array([40.0, 0, 0]))


def fading(damage: Callable[[Clip], Clip]) -> Callable[[Clip], Clip]:
    """Damage that grows from nothing in the first frame to all of it in the last."""
    return lambda clip: bytes_of((1 - FADING) * clip + FADING * damage(clip))


def slowing(clip: Clip) -> Clip:
    """The same film, which comes to rest at its end."""
    last = FRAMES - 1
    return clip[np.minimum(np.arange(FRAMES), last // 2)]


WORSE = [  # metric, damage, and the least factor by which it falls, or rises if above 1
    ("flicker", noisy, 0.95),
    ("flicker", shuffled, 0.97),
    ("smoothness", noisy, 0.98),
    ("smoothness", shuffled, 0.98),
    ("dynamic", still, 0.0),
    ("flow", still, 0.01),
    ("flow", shuffled, 2.0),
    ("sharpness", blurred, 0.7),
    ("sharpness", noisy, 1.5),
    ("contrast", pale, 0.6),
    ("saturation", grey, 0.01),
    ("sharpness_drift", fading(blurred), 3.0),
    ("contrast_drift", fading(pale), 3.0),
    ("saturation_drift", fading(grey), 3.0),
    ("flow_drift", slowing, 2.0),
    ("colour_drift", fading(reddened), 3.0),
]


@pytest.fixture(scope="module")
def real() -> ClipMetrics:
    return metrics.measure(REAL, 8.0)


@pytest.mark.parametrize(("name", "damage", "factor"), WORSE)
def test_damage_changes_the_metric_that_is_made_for_it(name, damage, factor, real):
    before = getattr(real, name)
    after = getattr(metrics.measure(damage(REAL), 8.0), name)
    if factor > 1:
        assert after > factor * before
    else:
        assert after <= factor * before


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_flicker_is_that_of_vbench(path: Path):
    """Of its own code, and of its formula on what this OpenCV reads."""
    assert len(FILES) == 3
    flicker = metrics.flicker(clips.read_clip(path)[0])
    reader, frames = cv2.VideoCapture(str(path)), []
    while (found := reader.read())[0]:
        frames.append(found[1].astype(np.float32))
    errors = [np.mean(cv2.absdiff(a, b)) for a, b in itertools.pairwise(frames)]
    assert flicker == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-6)

    recorded = json.loads(FOLDER.with_name("vbench_flicker.json").read_text())
    version = ".".join(cv2.__version__.split(".")[:2])
    if version in recorded:
        assert flicker == pytest.approx(recorded[version][path.name], abs=1e-6)


def test_a_still_clip_is_perfect_and_at_rest():
    result = metrics.measure(still(REAL), 8.0)
    assert result.flicker == result.smoothness == 1
    assert result.dynamic == result.flow == 0
    drift = [x for name, x in result._asdict().items() if name.endswith("drift")]
    assert len(drift) == 5 and not any(drift)


@pytest.mark.parametrize("fps", [8.0, 24.0])
def test_flow_is_the_speed_at_which_a_picture_moves(fps: float):
    picture = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(64, 96)), 2)
    picture = bytes_of(128 + 400 * picture)[..., None].repeat(3, axis=-1)
    clip = np.stack([np.roll(picture, 2 * i, axis=1) for i in range(13)])
    result = metrics.measure(clip, fps)
    assert result.flow == pytest.approx(2 * fps / 64, rel=0.05)
    assert result.dynamic == 1 and result.smoothness > 0.99
    assert result.flow_drift < 0.05 * result.flow


def test_large_frames_have_the_flow_of_small_ones():
    large = REAL.repeat(8, axis=1).repeat(8, axis=2)
    assert metrics.brightness(large).shape == (FRAMES, 256, 256)
    expected = metrics.measure(REAL[:4], 8.0).flow
    assert metrics.measure(large[:4], 8.0).flow == pytest.approx(expected, rel=0.3)


def test_slow_motion_is_not_dynamic_but_the_same_film_played_faster_is():
    """The rule looks at about 8 frames per second."""
    texture = bytes_of(
        128
        + 400
        * ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(64, 64)), 2)
    )
    clip = np.stack([np.roll(texture, i, axis=0) for i in range(33)])
    clip = clip[..., None].repeat(3, axis=-1)
    assert metrics.measure(clip, 8.0).dynamic == 0  # 1 of 64 pixels, 6/256 are needed
    assert metrics.measure(clip, 32.0).dynamic == 1


def test_ends_are_fifteen_percent_and_at_least_one_frame():
    assert metrics.ends(100) == (slice(0, 15), slice(85, 100))
    assert metrics.ends(121) == (slice(0, 18), slice(103, 121))
    assert metrics.ends(3) == (slice(0, 1), slice(2, 3))


def test_the_spectrum_of_a_wave_peaks_at_its_frequency():
    wave = 128 + 100 * np.sin(2 * np.pi * np.arange(64) * 10.5 / 32 / 2)
    clip = bytes_of(np.broadcast_to(wave[:, None, None], (2, 64, 64, 3)))
    assert metrics.spectrum(clip).argmax() == 5  # 10.5 / 64 per pixel, of bins 1 / 32
    assert np.isfinite(metrics.spectrum(np.zeros_like(clip))).all()


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (3, 11, 32, 3)])
def test_short_and_small_clips_are_refused(shape):
    with pytest.raises(ValueError, match="3 frames or more of at least 12 pixels"):
        metrics.measure(np.zeros(shape, np.uint8), 8.0)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    metrics.opencv.cache_clear()
    with pytest.raises(ImportError, match=r"pyramid_jax\[evaluate\]"):
        metrics.brightness(REAL)
