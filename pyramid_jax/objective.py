# SPDX-License-Identifier: Apache-2.0
"""The training objective, elementwise on packed clean tokens.

Everything random (time, history corruption, white noise) is drawn here, on the device,
from a key per row: a loss depends on neither the number of hosts nor that of devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pyramid_jax import pyramid
from pyramid_jax.pyramid import TIME_SCALE, Stage
from pyramid_jax.shapes import Array, Rows, Text, Tokens, Velocity


class Draws(NamedTuple):
    """All randomness of a training step.

    `level` decides the position in the stage, `corruption` the noise of the history
    (both uniform in [0, 1), one per segment), `z` is white noise per token value.
    """

    level: Float[jax.Array, "b s"]
    corruption: Float[jax.Array, "b s"]
    z: Float[jax.Array, "b n p"]


class NoisyRow(NamedTuple):
    """What the network gets, and the velocity that the current tokens should get."""

    tokens: Tokens
    time: Float[jax.Array, "b s"]
    target: Float[jax.Array, "b n p"]


class Losses(NamedTuple):
    """The mean loss and, for the metrics, sums and counts of segments per stage."""

    loss: Float[jax.Array, ""]
    stage_sum: Float[jax.Array, "stages"]
    stage_count: Float[jax.Array, "stages"]

    @property
    def weight(self) -> Any:
        """The number of segments, over which the loss is a mean; a float32 scalar."""
        return self.stage_count.sum()


def draw(key: jax.Array, rows: Rows) -> Draws:
    """Independent draws for every row of a batch, from one key."""
    (n, p), s = rows.clean.shape[1:], rows.stage.shape[1]

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        level, corruption, z = jax.random.split(key, 3)
        return (
            jax.random.uniform(level, (s,), jnp.float32),
            jax.random.uniform(corruption, (s,), jnp.float32),
            jax.random.normal(z, (n, p), jnp.float32),
        )

    return Draws(*jax.vmap(one)(jax.random.split(key, rows.clean.shape[0])))


class HistoryNoise(NamedTuple):
    """How much noise the past has in training.

    Args:
        most: fraction of noise, of which every segment has up to this.
        first_frame_share: how many of the segments see the first frame of their video
            as it is, as if it had been given (image to video).
    """

    most: float = 1 / 3
    first_frame_share: float = 0.0

    def of(
        self, uniform: Float[jax.Array, "b s"], rows: Rows
    ) -> Float[jax.Array, "b n 1"]:
        """The fraction of every token, by one draw in [0, 1) for each segment.

        Below the share, the draw says that the frame is given; what is left of it, that
        is again uniform, decides how much noise the segment has.
        """
        share, u = jnp.float32(self.first_frame_share), per_token(uniform, rows)
        given = u < share
        level = (u - jnp.where(given, 0, share)) / jnp.where(given, share, 1 - share)
        clean = given & (rows.frame == 0)[..., None]
        return jnp.where(clean, 0, self.most * level)


PAPER_NOISE = HistoryNoise()


class StagePath(NamedTuple):
    """The straight paths that a batch's current tokens take, and their history.

    `history` holds what past tokens are while the unit is on its way, `late` and
    `early` the network's times at both ends of each segment's stage.
    """

    start: Float[jax.Array, "b n p"]
    end: Float[jax.Array, "b n p"]
    history: Float[jax.Array, "b n p"]
    late: Float[jax.Array, "b s"]
    early: Float[jax.Array, "b s"]

    def at(self, sigma: Float[jax.Array, "b s"], rows: Rows) -> NoisyRow:
        """The rows where every segment is at its `sigma` of the path."""
        x = pyramid.interpolate(self.start, self.end, per_token(sigma, rows))
        tokens = self.tokens(x, rows)
        return NoisyRow(
            tokens, self.time(sigma), pyramid.velocity(self.start, self.end)
        )

    def tokens(self, x: Float[jax.Array, "b n p"], rows: Rows) -> Tokens:
        """The rows with current tokens `x`."""
        values = jnp.where(rows.current[..., None], x, self.history)
        return Tokens(values, rows.position, rows.segment, rows.frame)

    def time(
        self, sigma: Float[Array, ""] | Float[Array, "b s"]
    ) -> Float[jax.Array, "b s"]:
        """The network's times at `sigma` of each segment's stage."""
        return self.early + sigma * (self.late - self.early)


def stage_path(
    rows: Rows,
    draws: Draws,
    stages: Sequence[Stage],
    noise: HistoryNoise = PAPER_NOISE,
) -> StagePath:
    """The paths of a batch: noise at their ends, and a little in the history.

        history: x = (1 - c)·clean + c·z,    c uniform in [0, noise.most), per segment

    with start and end from `pyramid.endpoints`.

    Source: paper eq. 9 and 10, section 3.3; the reference's `add_pyramid_noise`.
    """
    s, e, late, early = (
        per_segment(np.asarray(column, np.float32), rows)
        for column in zip(*stages, strict=True)
    )
    start, end = pyramid.endpoints(
        rows.clean, rows.coarser, draws.z, per_token(s, rows), per_token(e, rows)
    )
    c = noise.of(draws.corruption, rows)
    history = (1 - c) * rows.clean + c * draws.z
    return StagePath(start, end, history, late, early)


def noisy(
    rows: Rows,
    draws: Draws,
    stages: Sequence[Stage],
    noise: HistoryNoise = PAPER_NOISE,
) -> NoisyRow:
    """A batch at random places of its paths.

        current: x = sigma·start + (1 - sigma)·end,  target = start - end

    Source: paper eq. 11; the reference's `add_pyramid_noise`.
    """
    # parity: the position in a stage is one of 1000.
    index = jnp.clip(jnp.floor(draws.level * TIME_SCALE), 0, TIME_SCALE - 1)
    sigma = 1 - index / TIME_SCALE
    return stage_path(rows, draws, stages, noise).at(sigma, rows)


def squared_error(
    predicted: Float[jax.Array, "b n p"],
    target: Float[jax.Array, "b n p"],
    rows: Rows,
    stages: int,
) -> Losses:
    """Mean squared error of each segment's current tokens, then of the segments."""
    error = jnp.square(predicted.astype(jnp.float32) - target.astype(jnp.float32))
    s = rows.stage.shape[1]
    current = jnp.where(rows.current, rows.segment, -1)
    member = jax.nn.one_hot(current, s, dtype=jnp.float32)
    tokens = member.sum(axis=1)
    per_segment = jnp.einsum("bns,bn->bs", member, error.mean(axis=-1))
    per_segment = per_segment / jnp.maximum(tokens, 1.0)

    present = (tokens > 0).astype(jnp.float32)
    by_stage = (
        jax.nn.one_hot(rows.stage, stages, dtype=jnp.float32) * present[..., None]
    )
    return Losses(
        loss=(per_segment * present).sum() / jnp.maximum(present.sum(), 1.0),
        stage_sum=jnp.einsum("bsk,bs->k", by_stage, per_segment),
        stage_count=by_stage.sum(axis=(0, 1)),
    )


def loss(
    velocity: Velocity,
    rows: Rows,
    text: Text,
    draws: Draws,
    stages: Sequence[Stage],
    noise: HistoryNoise = PAPER_NOISE,
) -> Losses:
    """How far `velocity` is from the path's direction on a batch of packed rows."""
    example = noisy(rows, draws, stages, noise)
    predicted = velocity(example.tokens, example.time, text)
    return squared_error(predicted, example.target, rows, len(stages))


def per_segment(
    of_stage: Float[np.ndarray, "k"], rows: Rows
) -> Float[jax.Array, "b s"]:
    """The value of each segment's stage."""
    return jnp.asarray(of_stage)[jnp.maximum(rows.stage, 0)]


def per_token(
    of_segment: Float[jax.Array, "b s"], rows: Rows
) -> Float[jax.Array, "b n 1"]:
    """The value of each token's segment."""
    segment = jnp.maximum(rows.segment, 0)
    return jnp.take_along_axis(of_segment, segment, axis=1)[..., None]
