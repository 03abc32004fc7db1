# SPDX-License-Identifier: Apache-2.0
"""The judge of bouncing pairs: what a clip shows, and features for Fréchet distances.

A small convolutional network looks at single frames. For each colour it says whether an
object of it is there, of which kind, and where. Over a clip its answers are added, and
the way of the places is the motion. It learns from drawn frames with noise and blur,
see launch/pairs/train_judge.py, never from what a model makes.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Float, UInt8
from scipy import ndimage

import pyramid_jax
from launch.pairs.scene import COLOURS, KINDS, Actor
from pyramid_jax.checkpoint import files
from pyramid_jax.shapes import Array

WEIGHTS = Path(pyramid_jax.__file__).parent / "assets" / "pairs_judge"
PLACES = 4  # pixels per cell and side of the map in which objects are placed

_WIDTHS = 24, 48, 64, 96
_PRESENT = 0.5  # mean probability from which an object is there
_MOVED = 5.0  # pixels
_BATCH = 64  # frames at once
_CHANGE = 6.0  # of changes beside means, which vary about 11 times as much


class Sight(NamedTuple):
    """What is seen in frames; places are in pixels, y first."""

    present: Float[Array, "b colours"]
    kind: Float[Array, "b colours kinds"]
    place: Float[Array, "b colours 2"]
    features: Float[Array, "b d"]


class JudgeNet(nn.Module):
    """Frames with pixels in [-1, 1] to logits, places and features."""

    @nn.compact
    def __call__(self, frames: Float[jax.Array, "b h w 3"]) -> Sight:
        narrow, middle, wide, widest = _WIDTHS
        x = nn.relu(nn.Conv(narrow, (3, 3), (2, 2))(frames))
        x = nn.relu(nn.Conv(middle, (3, 3), (2, 2))(x))
        fine = x = nn.relu(nn.Conv(wide, (3, 3))(nn.GroupNorm(4)(x)))
        x = nn.relu(nn.Conv(widest, (3, 3), (2, 2))(nn.GroupNorm(4)(x)))
        x = x + nn.relu(nn.Conv(widest, (3, 3))(nn.GroupNorm(4)(x)))
        x = nn.GroupNorm(4)(x)
        coarse = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = jnp.concatenate([fine, coarse], axis=-1)

        colours = len(COLOURS)
        logits = nn.Conv(colours, (3, 3))(x)
        weights = rearrange(logits, "b h w k -> b k (h w)")
        present = jax.nn.logsumexp(weights, axis=-1)
        weights = jax.nn.softmax(weights, axis=-1)
        cells = rearrange(x, "b h w c -> b (h w) c")
        seen = jnp.einsum("bkn,bnc->bkc", weights, cells)
        hidden = nn.relu(nn.Dense(widest)(seen))
        kind = nn.Dense(len(KINDS))(hidden)

        y, x_ = np.indices(logits.shape[1:3]).reshape(2, -1)
        where = np.stack([y, x_], axis=-1) * PLACES + (PLACES - 1) / 2
        place = jnp.einsum("bkn,nz->bkz", weights, where.astype(np.float32))
        features = cells.mean(axis=1)
        return Sight(present, kind, place, features)


class Verdict(NamedTuple):
    """What a clip shows: its objects, and for each whether it moved as an actor does.

    An actor's motion is "" if it stays where it is.
    """

    actors: tuple[Actor, ...]

    def right(self, expected: Sequence[Actor]) -> dict[str, bool]:
        """Whether colours, kinds and motions are those that a caption names."""
        seen = {actor.colour: actor for actor in self.actors}
        found = [seen.get(actor.colour) for actor in expected]
        pairs = list(zip(found, expected, strict=True))
        return {
            "colours": len(seen) == len(expected) and None not in found,
            "kinds": all(a is not None and a.kind == b.kind for a, b in pairs),
            "motions": all(a is not None and a.motion == b.motion for a, b in pairs),
        }


def judge_pair(clip: UInt8[np.ndarray, "f h w 3"], params: Any = None) -> Verdict:
    """What a clip of any length and size shows; an image has no motion."""
    sight = look(clip, params)
    places = np.asarray(sight.place)
    probability = 1 / (1 + np.exp(-sight.present))
    log_kind = np.asarray(jax.nn.log_softmax(sight.kind))
    mean = probability.mean(axis=0)
    actors = []
    for i, colour in enumerate(COLOURS):
        if mean[i] < _PRESENT:
            continue
        votes = (probability[:, i, None] * log_kind[:, i]).sum(axis=0)
        visible = probability[:, i] > 0.5
        motion = _motion(places[visible, i])
        actors.append(Actor(colour, KINDS[votes.argmax()], motion))
    return Verdict(tuple(actors))


def clip_features(
    clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], params: Any = None
) -> Float[np.ndarray, "clips d"]:
    """Features of clips, of which Fréchet distances are taken.

    Means over the frames say what is seen, mean changes from frame to frame how it
    moves.
    """
    rows = []
    for clip in clips:
        x = np.asarray(look(clip, params).features)
        change = abs(np.diff(x, axis=0)).mean(axis=0) if len(x) > 1 else 0 * x[0]
        rows.append(np.concatenate([x.mean(axis=0), _CHANGE * change]))
    return np.stack(rows)


def look(clip: UInt8[np.ndarray, "f h w 3"], params: Any = None) -> Sight:
    """What the network sees in every frame, in numpy."""
    params = judge_weights() if params is None else params
    frames = clip.astype(np.float32) / 127.5 - 1
    batch = min(_BATCH, len(frames))
    padded = np.resize(frames, (-(-len(frames) // batch) * batch, *frames.shape[1:]))
    parts = [_see(params, padded[i : i + batch]) for i in range(0, len(padded), batch)]
    return Sight(*(np.concatenate(x)[: len(clip)] for x in zip(*parts, strict=True)))


@functools.cache
def judge_weights() -> Any:
    """The weights that ship with the package."""
    return files.read_weights(WEIGHTS, abstract_weights(), lambda _, x: jnp.asarray(x))


def abstract_weights() -> Any:
    """Names and shapes of the judge's weights."""
    frame = jnp.zeros((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(JudgeNet().init, jax.random.key(0), frame)["params"]


@jax.jit
def _see(params: Any, frames: Float[jax.Array, "b h w 3"]) -> Sight:
    sight: Any = JudgeNet().apply({"params": params}, frames)
    return sight


def _motion(places: Float[np.ndarray, "f 2"]) -> str:
    """The motion of an object from its places over time."""
    if len(places) < 2:
        return ""
    smooth = ndimage.median_filter(places, (5, 1), mode="nearest")
    low, high = np.percentile(smooth, [8, 92], axis=0)
    down, across = (high - low > _MOVED).tolist()
    if down and across:
        return "diagonally"
    return "up and down" if down else "sideways" if across else ""
