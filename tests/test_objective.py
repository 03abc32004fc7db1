# SPDX-License-Identifier: Apache-2.0
"""The objective on packed rows, against the same mathematics on whole latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import layout, objective, pyramid
from pyramid_jax.layout import Layout
from pyramid_jax.objective import Draws, HistoryNoise, Losses
from pyramid_jax.shapes import Rows, Text, Tokens
from pyramid_jax.training.step import gradients

STAGES = pyramid.stages()
LEVELS = pyramid.levels(
    np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype(np.float32), 3
)
# (stage, unit) of the segments of each row; the second row has padding, and one less.
PACKED = [[(2, 1), (0, 2), (1, 0)], [(1, 2), (2, 0)]]
TEXT = Text(jnp.zeros((2, 1, 1)), jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 3, 1)))


def packed() -> Rows:
    """The rows of `PACKED`, cut from one video; padding is full of nonsense."""

    def row(segments: list[tuple[int, int]]) -> list[np.ndarray]:
        parts = [
            layout.segment(LEVELS, layout.compact(layout.clips(*at, slots=3)), Layout())
            for at in segments
        ]
        fields = [np.concatenate(field) for field in zip(*parts, strict=True)]
        lengths = [len(part.frame) for part in parts]
        segment = np.repeat(np.arange(len(parts)), lengths).astype(np.int32)
        more = 40 - len(segment)
        clean, coarser, position, frame, current = (
            np.concatenate([x, np.full((more, *x.shape[1:]), 9, x.dtype)])
            for x in fields
        )
        segment = np.concatenate([segment, np.full(more, -1, np.int32)])
        stage = [*(stage for stage, _ in segments), -1][:3]
        return [clean, coarser, position, segment, frame, current, np.int32(stage)]

    fields = [np.stack(field) for field in zip(*map(row, PACKED), strict=True)]
    word = np.zeros((2, 1), np.int32)
    return Rows(*fields, text=word, text_segment=word, pooled=np.zeros((2, 3, 0)))


ROWS = packed()
REAL = (ROWS.segment >= 0) & ROWS.current


def draws(level: float | None = None) -> Draws:
    """Random draws; `level` may be given for all segments."""
    random = np.random.default_rng(1)
    levels = random.uniform(size=(2, 3)) if level is None else np.full((2, 3), level)
    corruption, z = random.uniform(size=(2, 3)), random.normal(size=ROWS.clean.shape)
    return Draws(*(jnp.asarray(x, jnp.float32) for x in (levels, corruption, z)))


def each_segment():
    """(row, segment, stage, unit) of every segment."""
    for b, segments in enumerate(PACKED):
        for s, (stage, unit) in enumerate(segments):
            yield b, s, stage, unit


# ------------------------------------------------------------------------------ tokens


def test_noisy_tokens_are_the_patches_of_noisy_latents():
    """The current unit is on the path of its stage, with the velocity of that path."""
    drawn = draws()
    example = objective.noisy(ROWS, drawn, STAGES)
    for b, s, k, unit in each_segment():
        here = (ROWS.segment[b] == s) & ROWS.current[b]
        clean = LEVELS[k][unit : unit + 1]
        below = pyramid.up(LEVELS[k - 1][unit : unit + 1]) if k else 0 * clean
        z = layout.unpatchify(np.asarray(drawn.z[b, here]), layout.grid(clean, 2), 2)
        start, end = pyramid.endpoints(clean, below, z, STAGES[k].start, STAGES[k].end)
        sigma = 1 - np.floor(float(drawn.level[b, s]) * 1000) / 1000
        x = layout.patchify(pyramid.interpolate(start, end, sigma), 2)
        v = layout.patchify(pyramid.velocity(start, end), 2)
        np.testing.assert_allclose(example.tokens.values[b, here], x, atol=1e-6)
        np.testing.assert_allclose(example.target[b, here], v, atol=1e-6)


def test_history_is_a_mixture_with_the_noise_level_of_its_segment():
    drawn = draws()
    example = objective.noisy(ROWS, drawn, STAGES, HistoryNoise(0.5))
    for b, s, *_ in each_segment():
        past = (ROWS.segment[b] == s) & ~ROWS.current[b]
        c = 0.5 * float(drawn.corruption[b, s])
        mixture = (1 - c) * ROWS.clean[b, past] + c * np.asarray(drawn.z[b, past])
        np.testing.assert_allclose(example.tokens.values[b, past], mixture, atol=1e-6)


def test_a_share_of_segments_sees_the_first_frame_as_it_is():
    drawn = draws()
    share = float(np.median(drawn.corruption))
    example = objective.noisy(ROWS, drawn, STAGES, HistoryNoise(0.5, share))
    given = []
    for b, s, _, unit in each_segment():
        past = (ROWS.segment[b] == s) & ~ROWS.current[b]
        uniform, first = float(drawn.corruption[b, s]), past & (ROWS.frame[b] == 0)
        seen, clean = example.tokens.values[b], ROWS.clean[b]
        given += [uniform < share] * (unit > 0)
        if uniform < share:
            np.testing.assert_array_equal(seen[first], clean[first])
            past, c = past & ~first, 0.5 * uniform / share
        else:
            c = 0.5 * (uniform - share) / (1 - share)
        mixture = (1 - c) * clean[past] + c * np.asarray(drawn.z[b, past])
        np.testing.assert_allclose(seen[past], mixture, atol=1e-6)
    assert {*given} == {False, True}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_noise_of_later_frames_does_not_depend_on_the_share(share: float):
    """At both ends, where one draw has nothing to share."""
    uniform, noise = draws().corruption, HistoryNoise(0.5, share)
    later = ROWS._replace(frame=ROWS.frame + 1)
    fraction = noise.of(uniform, later)
    np.testing.assert_array_equal(fraction, HistoryNoise(0.5).of(uniform, later))
    np.testing.assert_array_equal(
        noise.of(uniform, ROWS)[(ROWS.frame == 0) & (ROWS.segment >= 0)] == 0, share > 0
    )


def test_without_corruption_history_is_clean():
    example = objective.noisy(ROWS, draws(), STAGES, HistoryNoise(0.0))
    past = (ROWS.segment >= 0) & ~ROWS.current
    np.testing.assert_array_equal(example.tokens.values[past], ROWS.clean[past])


@pytest.mark.parametrize(
    ("level", "times"),
    [
        (0.0, (1000, 744, 386)),
        (0.0019, (999.744, 743.642, 385.615)),
        (0.4001, (897.6, 600.8, 232.0)),
        (0.5001, (872.0, 565.0, 193.5)),
        (0.9999, (744.256, 386.358, 1.385)),
    ],
)
def test_times_are_those_of_the_original(level, times):
    """One of 1000 for each stage; recorded at places 0, 1, 400, 500 and 999."""
    example = objective.noisy(ROWS, draws(level), STAGES)
    for b, s, k, _ in each_segment():
        assert example.time[b, s] == pytest.approx(times[k], abs=1e-3)


def test_places_of_tokens_are_passed_on():
    tokens = objective.noisy(ROWS, draws(), STAGES).tokens
    for name in ("position", "segment", "frame"):
        np.testing.assert_array_equal(getattr(tokens, name), getattr(ROWS, name))


# -------------------------------------------------------------------------------- loss


def exact(tokens: Tokens, time: jax.Array, text: Text) -> jax.Array:
    """The velocity of the path through every token, told by its clock and `clean`."""
    x, v = np.asarray(tokens.values, np.float64), np.zeros(tokens.values.shape)
    for b, s, k, _ in each_segment():
        stage, here = STAGES[k], ROWS.segment[b] == s
        clean, coarser = ROWS.clean[b, here], ROWS.coarser[b, here]
        now = np.asarray(time, np.float64)[b, s]
        sigma = (now - stage.time_end) / (stage.time_start - stage.time_end)
        signal = pyramid.interpolate(stage.start * coarser, stage.end * clean, sigma)
        left = sigma * (1 - stage.start) + (1 - sigma) * (1 - stage.end)
        z = (x[b, here] - signal) / left
        ends = pyramid.endpoints(clean, coarser, z, stage.start, stage.end)
        v[b, here] = pyramid.velocity(*ends)
    return jnp.asarray(v, jnp.float32)


@pytest.mark.parametrize("level", [0.0, 0.35, 0.8])
def test_the_exact_velocity_has_no_loss(level):
    losses = objective.loss(exact, ROWS, TEXT, draws(level), STAGES)
    assert losses.loss < 1e-10


def test_another_velocity_has_a_loss():
    losses = objective.loss(
        lambda *args: 1.1 * exact(*args), ROWS, TEXT, draws(0.35), STAGES
    )
    assert losses.loss > 1e-3


def test_history_and_padding_do_not_count():
    target = jnp.asarray(ROWS.clean)
    elsewhere = jnp.where(jnp.asarray(REAL)[..., None], target, target + 7)
    assert (ROWS.segment == -1).any() and not REAL.all()
    losses = objective.squared_error(elsewhere, target, ROWS, 3)
    assert losses.loss == 0.0


def test_every_current_token_counts():
    target = jnp.asarray(ROWS.clean)

    def loss(predicted: jax.Array) -> jax.Array:
        return objective.squared_error(predicted, target, ROWS, 3).loss

    sensitive = jnp.abs(jax.grad(loss)(target + 1)) > 0
    np.testing.assert_array_equal(sensitive, np.tile(REAL[..., None], (1, 1, 8)))


def test_segments_count_alike_whatever_their_size():
    """Errors of 1 to 5, one for each segment: sums per stage are their squares."""
    error = np.array([[1, 2, 3], [4, 5, 0]], np.float32)
    of_token = np.take_along_axis(error, ROWS.segment.clip(0), axis=1)[..., None]
    target = jnp.asarray(ROWS.clean)
    losses = objective.squared_error(target + of_token, target, ROWS, 3)
    assert losses.loss == pytest.approx((1 + 4 + 9 + 16 + 25) / 5, rel=1e-5)
    np.testing.assert_allclose(losses.stage_sum, [4, 9 + 16, 1 + 25], rtol=1e-5)
    np.testing.assert_array_equal(losses.stage_count, [1, 2, 2])


def test_rows_without_segments_have_no_loss():
    empty = ROWS._replace(segment=np.full_like(ROWS.segment, -1))
    target = jnp.asarray(ROWS.clean)
    losses = objective.squared_error(target + 1, target, empty, 3)
    assert losses.loss == 0.0 and losses.stage_count.sum() == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_rows_with_fewer_segments_weigh_less_in_any_microbatches(parts: int):
    def loss(scale: jax.Array, rows: Rows, _: jax.Array) -> tuple[jax.Array, Losses]:
        ones = jnp.ones_like(rows.clean)
        losses = objective.squared_error(scale * rows.clean, ones, rows, 3)
        return losses.loss, losses

    rows = jax.tree.map(jnp.asarray, ROWS)
    whole = jax.grad(loss, has_aux=True)(0.3, rows, None)[0]
    value, losses, gradient = gradients(loss, 0.3, rows, jax.random.key(0), parts)
    assert value == pytest.approx(float(losses.stage_sum.sum()) / 5, rel=1e-6)
    assert gradient == pytest.approx(float(whole), rel=1e-6)


# ------------------------------------------------------------------------------- draws


def test_rows_and_segments_have_draws_of_their_own():
    drawn = objective.draw(jax.random.key(0), ROWS)
    for uniform in (drawn.level, drawn.corruption):
        assert uniform.shape == ROWS.stage.shape
        assert (uniform >= 0).all() and (uniform < 1).all()
    assert drawn.z.shape == ROWS.clean.shape
    for part in drawn:
        assert len(np.unique(part)) == part.size
    assert drawn.z.mean() == pytest.approx(0, abs=0.12)
    assert drawn.z.std() == pytest.approx(1, abs=0.1)


def test_draws_depend_on_the_key_alone():
    first, again, other = (objective.draw(jax.random.key(i), ROWS) for i in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.isin(a, c).any()
