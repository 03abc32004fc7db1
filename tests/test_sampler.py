# SPDX-License-Identifier: Apache-2.0
"""The sampler under velocities without a network: exact ones, one that mixes all."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import layout, pyramid, sampler
from pyramid_jax.guidance import Guidance
from pyramid_jax.kernels.attention import attention
from pyramid_jax.layout import Layout
from pyramid_jax.mask import TokenMask
from pyramid_jax.noise import KeyedNoise
from pyramid_jax.pyramid import Stage
from pyramid_jax.shapes import Text, Tokens
from pyramid_jax.units import SamplerPlan

KEYS = jax.random.split(jax.random.key(0), 2)
FEW = SamplerPlan(
    stages=pyramid.stages((0, 0.5, 1)), first_steps=(3, 2), video_steps=(2, 2)
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def prompts(*pooled: float) -> Text:
    """One prompt per row, told by a number."""
    order = jnp.zeros((len(pooled), 1), jnp.int32)
    numbers = jnp.array(pooled, jnp.float32).reshape(-1, 1, 1)
    return Text(numbers, order, numbers)


def size(t: int, plan: SamplerPlan) -> tuple[int, int, int, int]:
    """Of a video of `t` frames with one channel, one token large at the first stage."""
    side = 2 ** (len(plan.stages) - 1) * plan.layout.patch
    return t, side, side, 1


def keyed(plan: SamplerPlan, keys: jax.Array = KEYS) -> KeyedNoise:
    frame = size(1, plan)[1:]
    return KeyedNoise(jax.random.key_data(keys), frame, len(plan.stages), plan.gamma)


def run(
    velocity: Callable,
    text: Text,
    t: int,
    plan: SamplerPlan,
    keys: jax.Array = KEYS,
    **options,
) -> jax.Array:
    """A video of `t` frames; the options are those of `sampler.sample`."""
    if "scales" in options:
        options["scales"] = jnp.array(options["scales"], jnp.float32)
    shape, noise = size(t, plan), keyed(plan, keys)
    sample = partial(sampler.sample, velocity, text, shape, noise, plan, **options)
    return jax.jit(sample)()


# --------------------------------------------------------------------------- velocities


def straight(
    x: jax.Array, clean: jax.Array, coarser: jax.Array, time: jax.Array, stage: Stage
) -> jax.Array:
    """The velocity of the path of a stage that leads through `x` to `clean`."""
    sigma = (time - stage.time_end) / (stage.time_start - stage.time_end)
    signal = pyramid.interpolate(stage.start * coarser, stage.end * clean, sigma)
    left = sigma * (1 - stage.start) + (1 - sigma) * (1 - stage.end)
    ends = pyramid.endpoints(clean, coarser, (x - signal) / left, *stage[:2])
    return pyramid.velocity(*ends)


def inside(time: jax.Array, stage: Stage) -> jax.Array:
    """Which rows are at this stage: the clock tells."""
    return ((stage.time_end < time) & (time <= stage.time_start))[..., None]


def to_target(target: jax.Array, cfg: SamplerPlan) -> Callable:
    """Leads to a known video."""
    levels = pyramid.levels(target, len(cfg.stages))
    patch = cfg.layout.patch

    def velocity(tokens: Tokens, time: jax.Array, text: Text, last: int) -> jax.Array:
        b, t = target.shape[:2]
        frame, y, x = jnp.moveaxis(tokens.position.astype(jnp.int32), 2, 0)
        out = jnp.zeros_like(tokens.values)
        for k, stage in enumerate(cfg.stages):
            h, w = layout.grid(levels[k], patch)
            below = pyramid.up(levels[k - 1]) if k else jnp.zeros_like(levels[0])
            clean, coarser = (
                layout.patchify(level, patch).reshape(b, t, h, w, -1)[
                    jnp.arange(b)[:, None], frame, y.clip(0, h - 1), x.clip(0, w - 1)
                ]
                for level in (levels[k], below)
            )
            v = straight(tokens.values, clean, coarser, time[..., None], stage)
            out = jnp.where(inside(time, stage), v, out)
        return out[:, -last:]

    return velocity


def to_previous_frame(
    tokens: Tokens, time: jax.Array, text: Text, last: int
) -> jax.Array:
    """Leads every frame to the one before it, found among the tokens (patches of 1)."""
    place = tokens.position
    before = tokens.frame[:, :, None] - 1 == tokens.frame[:, None, :]
    before &= tokens.segment[:, None, :] == 0

    def past(place: jax.Array) -> jax.Array:
        """The mean of the previous frame's tokens that are at the same place."""
        same = (place[:, :, None, 1:] == place[:, None, :, 1:]).all(-1) & before
        weight = same.astype(jnp.float32)
        return weight @ tokens.values / jnp.maximum(weight.sum(-1, keepdims=True), 1)

    clean, coarser = past(place), past(place // 2)
    out = jnp.zeros_like(clean)
    for stage in pyramid.stages():
        v = straight(tokens.values, clean, coarser, time[..., None], stage)
        out = jnp.where(inside(time, stage), v, out)
    return out[:, -last:]


def mixing(tokens: Tokens, time: jax.Array, text: Text, last: int) -> jax.Array:
    """Depends on all there is: history, places, the clock and the prompt."""
    x = jnp.sin(tokens.values + tokens.position.sum(-1, keepdims=True))
    x = x[:, :, None, :]
    seen = attention(x, x, x, TokenMask(tokens.segment, tokens.frame))[:, :, 0]
    return jnp.sin(3 * seen + (time / 300)[..., None] + text.pooled)[:, -last:]


# -------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("edges", "per_unit", "t"),
    [
        ((0, 1 / 3, 2 / 3, 1), 1, 4),
        ((0, 1 / 3, 2 / 3, 1), 2, 5),
        ((0, 0.5, 1), 1, 3),
        ((0, 0.25, 0.5, 0.75, 1), 1, 3),
        ((0, 1 / 3, 2 / 3, 1), 1, 1),
    ],
)
def test_an_exact_velocity_lands_on_the_data(edges, per_unit, t):
    """Through all stages, jumps and units; only float32 rounding is left."""
    stages = pyramid.stages(edges)
    cfg = SamplerPlan(
        stages=stages,
        layout=Layout(frames_per_unit=per_unit),
        first_steps=(2,) * len(stages),
        video_steps=(3,) * len(stages),
    )
    target = normal(1, 2, *size(t, cfg))
    video = run(to_target(target, cfg), prompts(0, 0), t, cfg)
    np.testing.assert_allclose(video, target, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("history", "per_unit"), [("full", 1), ("full", 2), ("none", 1)]
)
def test_an_exact_velocity_lands_on_the_data_whatever_a_unit_sees(history, per_unit):
    """With a full history, and with all frames as one unit."""
    plan = SamplerPlan(
        layout=Layout(frames_per_unit=per_unit, history=history),
        first_steps=(2, 2, 2),
        video_steps=(3, 3, 3),
    )
    target = normal(1, 2, *size(5, plan))
    video = run(to_target(target, plan), prompts(0, 0), 5, plan)
    np.testing.assert_allclose(video, target, rtol=0, atol=1e-5)


def test_a_full_history_shows_the_frame_before_at_the_resolution_of_the_unit():
    plan = SamplerPlan(layout=Layout(patch=1, history="full"), video_steps=(2, 2, 2))
    image = normal(2, 2, 1, 4, 4, 1)
    video = run(to_previous_frame, prompts(0, 0), 5, plan, first_frame=image)
    np.testing.assert_allclose(video, jnp.tile(image, (1, 5, 1, 1, 1)), atol=2e-5)


def test_a_sequence_is_one_call_of_the_network_per_step_with_all_frames():
    calls = []

    def noting(tokens: Tokens, time: jax.Array, text: Text, last: int) -> jax.Array:
        calls.append((tokens.values.shape[1], last))
        return tokens.values[:, -last:]

    plan = SamplerPlan(layout=Layout(history="none"))
    jax.eval_shape(lambda: run(noting, prompts(0, 0), 4, plan))
    assert calls == [(4, 4), (16, 16), (64, 64)]


def test_a_sequence_can_not_continue_an_image():
    plan = SamplerPlan(layout=Layout(history="none"))
    image = normal(2, 2, 1, 8, 8, 1)
    with pytest.raises(ValueError, match="can't continue an image; give no first"):
        run(mixing, prompts(0, 0), 4, plan, first_frame=image)


def test_an_exact_velocity_continues_a_given_image():
    image = normal(2, 2, 1, 4, 4, 1)
    target = normal(1, 2, *size(3, FEW)).at[:, :1].set(image)
    video = run(to_target(target, FEW), prompts(0, 0), 3, FEW, first_frame=image)
    np.testing.assert_array_equal(video[:, :1], image)
    np.testing.assert_allclose(video, target, rtol=0, atol=1e-5)


def test_every_unit_sees_the_frame_before_it_at_every_stage():
    """A velocity that leads to the previous frame makes a still video of the image."""
    cfg = SamplerPlan(layout=Layout(patch=1), video_steps=(2, 2, 2))
    image = normal(2, 2, 1, 4, 4, 1)
    video = run(to_previous_frame, prompts(0, 0), 5, cfg, first_frame=image)
    np.testing.assert_allclose(video, jnp.tile(image, (1, 5, 1, 1, 1)), atol=2e-5)


@pytest.fixture(scope="module")
def mixed() -> jax.Array:
    """A video of two prompts and 6 frames under `mixing`."""
    return run(mixing, prompts(0.1, 0.2), 6, FEW)


def test_a_longer_video_starts_with_the_frames_of_a_shorter_one(mixed):
    short = run(mixing, prompts(0.1, 0.2), 3, FEW)
    np.testing.assert_allclose(mixed[:, :3], short, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scans", [2, 9])
def test_dividing_the_units_into_scans_changes_nothing(mixed, scans):
    cfg = dataclasses.replace(FEW, scans=scans)
    divided = run(mixing, prompts(0.1, 0.2), 6, cfg)
    np.testing.assert_allclose(mixed, divided, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_given_units_are_continued_as_if_they_had_been_sampled(mixed):
    cfg = dataclasses.replace(FEW, begin=4)
    longer = run(mixing, prompts(0.1, 0.2), 6, cfg, first_frame=mixed[:, :4])
    np.testing.assert_allclose(longer, mixed, rtol=0, atol=2e-6)


def test_a_window_shows_the_first_unit_and_the_newest_ones(mixed):
    """Unit 5 is what unit 3 would be without units 1 and 2."""
    text, window = prompts(0.1, 0.2), dataclasses.replace(FEW, window=3)
    bounded = run(mixing, text, 6, window)
    np.testing.assert_allclose(bounded[:, :4], mixed[:, :4], rtol=0, atol=2e-6)
    assert np.abs(bounded[:, 5] - mixed[:, 5]).max() > 1e-3
    seen = bounded[:, jnp.array([0, 3, 4])]
    drawn, after = keyed(FEW), dataclasses.replace(FEW, begin=3)
    alone = sampler.sample(
        mixing,
        text,
        size(4, FEW),
        lambda u, n: drawn(u + 2, n),
        after,
        first_frame=seen,
    )
    np.testing.assert_allclose(alone[:, 3], bounded[:, 5], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("t", "scans", "given", "expected"),
    [
        (1, 1, False, 3),
        (2, 1, False, 6),
        (9, 1, False, 6),
        (9, 2, False, 9),
        (9, 1, True, 3),
    ],
)
def test_the_network_is_traced_once_per_stage_and_scan(t, scans, given, expected):
    calls = []

    def counting(tokens: Tokens, time: jax.Array, text: Text, last: int) -> jax.Array:
        calls.append(tokens.values.shape)
        return tokens.values[:, -last:]

    cfg = SamplerPlan(scans=scans)
    image = normal(0, 2, 1, 8, 8, 1) if given else None
    jax.eval_shape(lambda: run(counting, prompts(0, 0), t, cfg, first_frame=image))
    assert len(calls) == expected


def test_later_scans_have_no_fewer_history_slots_than_they_need():
    """Of 9 units, two scans see at most 4 and 8 frames of history at stage 0."""
    lengths = []

    def noting(tokens: Tokens, time: jax.Array, text: Text, last: int) -> jax.Array:
        lengths.append(tokens.values.shape[1])
        return tokens.values[:, -last:]

    cfg = SamplerPlan(scans=2)
    jax.eval_shape(lambda: run(noting, prompts(0, 0), 9, cfg))
    assert lengths[::3] == [1, 5, 9]


def test_a_video_does_not_depend_on_the_others_of_its_batch(mixed):
    alone = run(mixing, prompts(0.2), 6, FEW, KEYS[1:])
    np.testing.assert_allclose(mixed[1:], alone, rtol=0, atol=2e-6)
    assert jnp.abs(mixed[0] - mixed[1]).max() > 0.1


# ----------------------------------------------------------------------------- guidance


def test_guidance_of_1_is_the_prompt_alone(mixed):
    text = prompts(-0.4, -0.3, 0.1, 0.2)
    guided = run(mixing, text, 6, FEW, scales=[1.0] * 6)
    np.testing.assert_allclose(guided, mixed, rtol=0, atol=5e-6)


def test_guidance_of_0_is_the_negative_prompt_alone(mixed):
    text = prompts(0.1, 0.2, -0.4, -0.3)
    guided = run(mixing, text, 6, FEW, scales=[0.0] * 6)
    np.testing.assert_allclose(guided, mixed, rtol=0, atol=5e-6)


def test_every_unit_is_guided_by_its_own_scale():
    """Where the velocity is linear in the prompt, guidance extrapolates the prompt."""

    def linear(tokens: Tokens, time: jax.Array, text: Text, last: int) -> jax.Array:
        return jnp.broadcast_to(text.pooled, tokens.values[:, -last:].shape)

    scales = (7.0, 5.0, 3.5)
    guided = run(linear, prompts(0.1, 0.2, 0.5, 0.3), 3, FEW, scales=scales)
    for unit, scale in enumerate(scales):
        text = prompts(0.1 + scale * (0.5 - 0.1), 0.2 + scale * (0.3 - 0.2))
        plain = run(linear, text, 3, FEW)
        np.testing.assert_allclose(guided[:, unit], plain[:, unit], atol=1e-5)


def test_the_first_frame_has_a_scale_of_its_own():
    np.testing.assert_array_equal(Guidance(9.0, 4.0).scales(3), [9, 4, 4])
    np.testing.assert_array_equal(Guidance(9.0, 4.0).scales(1), [9])
    for wrong in ({"first": np.nan}, {"video": -1}, {"decay": np.inf}, {"floor": 1e9}):
        with pytest.raises(ValueError, match=f"guidance {next(iter(wrong))}="):
            Guidance(**wrong)


def test_decaying_guidance_falls_to_its_floor():
    scales = Guidance(first=4.0, video=9.0, decay=0.75, floor=2.0).scales(5)
    np.testing.assert_array_equal(scales, [4, 3.25, 2.5, 2, 2])


def test_scales_may_be_what_guidance_returns():
    text, scales, shape = prompts(0, 0, 1, 1), Guidance().scales(2), size(2, FEW)
    sample = partial(sampler.sample, mixing, text, shape, keyed(FEW), FEW)
    video = jax.eval_shape(lambda: sample(scales=scales))
    assert video.shape == (2, *shape)


# ------------------------------------------------------------------------------- config


def test_leaving_out_the_last_steps_moves_the_result_a_little(mixed):
    """0.001 of each stage's path, for a velocity of size 1."""
    fewer = dataclasses.replace(FEW, last_step=False)
    near = run(mixing, prompts(0.1, 0.2), 6, fewer)
    assert 1e-6 < jnp.abs(near - mixed)[:, :2].max() < 1e-2


@pytest.mark.parametrize("name", ["first_steps", "video_steps"])
def test_steps_for_another_number_of_stages_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}=\(10, 10\) .* each of the 3 stages"):
        SamplerPlan(**{name: (10, 10)})


def test_reuse_needs_a_stage_that_exists_and_a_memory():
    with pytest.raises(ValueError, match=r"reuse=\(3,\) must name stages, of 0 to 2"):
        SamplerPlan(reuse=(3,))
    with pytest.raises(ValueError, match=r"reuse=\(0,\) needs a memory"):
        run(mixing, prompts(0), 4, dataclasses.replace(FEW, reuse=(0,)), KEYS[:1])


def test_a_length_that_is_no_whole_number_of_units_is_refused():
    cfg = SamplerPlan(layout=Layout(frames_per_unit=2))
    with pytest.raises(ValueError, match="use 3 or 5"):
        run(mixing, prompts(0), 4, cfg, KEYS[:1])
