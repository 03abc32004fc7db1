# SPDX-License-Identifier: Apache-2.0
"""Sampling step by step: the same videos as in one program, observed and checked."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import tiny
from pyramid_jax import sampler, sharding
from pyramid_jax.guidance import Guidance
from pyramid_jax.model import (
    ModelConfig,
    SampleConfig,
    empty_memory,
    initialise,
    model_config,
    velocity_network,
)
from pyramid_jax.noise import KeyedNoise
from pyramid_jax.pipeline import denoise as module
from pyramid_jax.pipeline.denoise import Progress, denoise
from pyramid_jax.shapes import Text
from pyramid_jax.units import SamplerPlan

SECTION = tiny.get_config("smoke").model.to_dict()
# perf: every stage compiles a step of its own; two are enough to climb.
CFG: ModelConfig = model_config(SECTION | {"edges": (0, 0.5, 1)})
SHAPE = (5, 16, 16, 3)
VIDEOS = 2


class Inputs(NamedTuple):
    """What videos are sampled from."""

    scales: np.ndarray | None
    text: Text
    noise: KeyedNoise
    first_frame: np.ndarray | None


def plan(
    scans: int = 1,
    steps: int = 2,
    model: ModelConfig = CFG,
    reuse: tuple[int, ...] = (),
) -> SamplerPlan:
    stages = len(model.stages)
    options = SampleConfig((steps,) * stages, (2,) * stages, scans=scans)
    return options.plan(model, reuse)


@pytest.fixture(scope="module")
def params() -> dict:
    """Weights of a small network, none of them zero."""
    init = jax.jit(partial(initialise, CFG))
    leaves, tree = jax.tree.flatten(sharding.unbox(init(jax.random.key(0))))
    rng = np.random.default_rng(1)
    noisy = [x + np.float32(0.1) * rng.normal(size=x.shape) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in noisy])


def inputs(guided: bool = True, first: np.ndarray | None = None) -> Inputs:
    """Features of two prompts, after those of their negative prompts if guided."""
    rows = VIDEOS * (1 + guided)
    rng = np.random.default_rng(2)
    features = rng.normal(size=(rows, 16, CFG.dit.text_width)).astype(np.float32)
    pooled = rng.normal(size=(rows, 1, CFG.dit.pooled_width)).astype(np.float32)
    scales = Guidance(3, 2).scales(SHAPE[0]).astype(np.float32) if guided else None
    text = Text(*map(jnp.asarray, (features, np.zeros((rows, 16), np.int32), pooled)))
    keys = jax.random.key_data(jax.random.split(jax.random.key(3), VIDEOS))
    return Inputs(scales, text, KeyedNoise(keys, SHAPE[1:], len(CFG.stages)), first)


def in_one_program(
    params: dict, given: Inputs, how: SamplerPlan, model: ModelConfig = CFG
) -> jax.Array:
    velocity = velocity_network(model, params)
    options = {"scales": given.scales, "first_frame": given.first_frame}
    options["memory"] = partial(empty_memory, model, given.text)
    return jax.jit(
        lambda: sampler.sample(velocity, given.text, SHAPE, given.noise, how, **options)
    )()


def units(
    params: dict, given: Inputs, how: SamplerPlan, model: ModelConfig = CFG, **options
) -> Iterator:
    options |= {"scales": given.scales, "first_frame": given.first_frame}
    return denoise(model, params, given.text, SHAPE, given.noise, how, **options)


def in_steps(params: dict, given: Inputs, how: SamplerPlan, **options) -> jax.Array:
    return jnp.concatenate(list(units(params, given, how, **options)), 1)


def compiled() -> int:
    step: Any = module._euler_step
    return step.jitted._cache_size()


@pytest.mark.parametrize(
    ("guided", "image"),
    [(True, False), pytest.param(False, True, marks=pytest.mark.slow)],
)
def test_steps_make_the_video_that_one_program_makes(params, guided, image):
    given = inputs(guided, first_image() if image else None)
    stepped = in_steps(params, given, plan())
    whole = in_one_program(params, given, plan())
    np.testing.assert_allclose(stepped, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("history", ["full", "none"])
def test_steps_make_that_video_whatever_a_unit_sees(params, history):
    """Sequences are one unit, the only one that comes."""
    cut = dataclasses.replace(CFG.layout, history=history)
    model = dataclasses.replace(CFG, layout=cut)
    given, how = inputs(), plan(model=model)
    options = {"scales": given.scales}
    at = given.text, SHAPE, given.noise, how
    stepped = list(denoise(model, params, *at, **options))
    velocity = velocity_network(model, params)
    whole = jax.jit(lambda: sampler.sample(velocity, *at, **options))()
    assert len(stepped) == (1 if history == "none" else SHAPE[0])
    found = jnp.concatenate(stepped, 1)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-4)


def test_fewer_history_slots_change_nothing(params):
    one = in_steps(params, inputs(), plan())
    many = in_steps(params, inputs(), plan(scans=3))
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-4)


def test_eight_devices_make_the_same_video(params):
    mesh = sharding.device_mesh(data=2, context=2, tensor=2)
    alone = in_steps(params, inputs(), plan())
    spread = in_steps(params, inputs(), plan(), mesh=mesh)
    np.testing.assert_allclose(spread, alone, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_weights_on_many_devices_are_used_where_they_are(params):
    mesh = sharding.device_mesh(data=8)
    there = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    spread = in_steps(there, inputs(), plan())
    np.testing.assert_allclose(
        spread, in_steps(params, inputs(), plan()), rtol=0, atol=1e-4
    )


def first_image() -> np.ndarray:
    rng = np.random.default_rng(4)
    return rng.normal(size=(VIDEOS, 1, *SHAPE[1:])).astype(np.float32)


@pytest.mark.parametrize(
    ("guided", "image", "scans", "stages"),
    [
        (True, False, 1, (0, 1)),
        pytest.param(False, False, 2, (0,), marks=pytest.mark.slow),
        pytest.param(True, True, 1, (0, 1), marks=pytest.mark.slow),
        pytest.param(False, True, 2, (1,), marks=pytest.mark.slow),
    ],
)
def test_keys_and_values_of_earlier_units_may_be_reused(
    params, guided, image, scans, stages
):
    """In every unit that can, also where the first prompt is shorter than the other."""
    given = inputs(guided, first_image() if image else None)
    segment = given.text.segment.at[0, :5].set(-1)
    given = given._replace(text=given.text._replace(segment=segment))
    plain = in_steps(params, given, plan(scans))
    reused = in_steps(params, given, plan(scans, reuse=stages))
    np.testing.assert_allclose(reused, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stages", [(), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_given_units_are_continued_with_and_without_reuse(params, stages):
    plain = in_steps(params, inputs(), plan())
    how = dataclasses.replace(plan(reuse=stages), begin=3)
    longer = in_steps(params, inputs(first=np.asarray(plain[:, :3])), how)
    np.testing.assert_allclose(longer, plain, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_keys_and_values_may_be_reused_in_one_program(params):
    how = plan(reuse=(0, 1))
    one = in_one_program(params, inputs(), how)
    np.testing.assert_allclose(
        one, in_one_program(params, inputs(), plan()), rtol=0, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(("image", "stages"), [(False, (0, 1)), (True, (1,))])
def test_a_clean_history_may_be_read_once_in_a_stage(params, image, stages):
    """By both drivers, in units that keep something for the next and in others."""
    dit = dataclasses.replace(CFG.dit, clean_history=True)
    model = dataclasses.replace(CFG, dit=dit)
    given = inputs(first=first_image() if image else None)
    plain = in_steps(params, given, plan(model=model), model=model)
    how = plan(model=model, reuse=stages)
    told: list[Progress] = []
    watch = {"callback_on_step_end": told.append}
    once = in_steps(params, given, how, model=model, **watch)
    np.testing.assert_allclose(once, plain, rtol=0, atol=1e-5)
    program = in_one_program(params, given, how, model)
    np.testing.assert_allclose(program, plain, rtol=0, atol=1e-5)
    assert told[-1].done == 1
    assert np.abs(plain - in_steps(params, given, plan())).max() > 1e-3


def test_two_devices_reuse_keys_and_values_that_are_divided_by_heads(
    params, monkeypatch
):
    kept = []
    step = module._euler_step

    def watched(program, *arguments):
        made = step(program, *arguments)
        for memory in (arguments[-1], made[2]):
            if memory is not None:
                keys = memory.blocks["double"].keys
                kept.append((keys.sharding.shard_shape(keys.shape)[3], keys.shape[3]))
        return made

    mesh = sharding.device_mesh(data=1, context=2, devices=jax.devices()[:2])
    alone = in_steps(params, inputs(), plan())
    monkeypatch.setattr(module, "_euler_step", watched)
    spread = in_steps(params, inputs(), plan(reuse=(0, 1)), mesh=mesh)
    np.testing.assert_allclose(spread, alone, rtol=0, atol=1e-5)
    assert set(kept) == {(1, 2)}  # the only head, and one of zeros


def test_what_a_stage_reads_does_not_depend_on_the_length():
    """From unit k + 2 on: one new coarse frame, one per finer stage, and its own."""

    def read(t: int) -> list[list[int]]:
        units = module._units(t, plan(reuse=(0, 1)), from_image=False)
        clips = (
            [unit.clips(k, CFG.layout) for k, unit in enumerate(of)] for of in units
        )
        return [[sum(len(c.frame) for c in each) for each in of] for of in clips]

    assert read(9) == [[1, 1], [2, 2], [2, 3], *[[2, 3]] * 6]
    assert read(6) == read(9)[:6]


def test_units_of_a_window_read_as_many_tokens_and_compile_nothing_new(params):
    how, shape = dataclasses.replace(plan(), window=SHAPE[0] - 1), (8, *SHAPE[1:])
    in_steps(params, inputs(), plan())
    before, given = compiled(), inputs()
    scales = np.full(shape[0], 2, np.float32)
    made = denoise(CFG, params, given.text, shape, given.noise, how, scales=scales)
    assert jnp.concatenate(list(made), 1).shape[1] == shape[0]
    assert compiled() == before
    read = [
        [
            sum(len(c.frame) for c in unit.clips(k, CFG.layout))
            for k, unit in enumerate(u)
        ]
        for u in module._units(100, how, from_image=True)
    ]
    assert read == [read[0]] * 99 and max(read[0]) == SHAPE[0]


def test_every_step_is_reported_and_all_work_is_done_at_the_end(params):
    told: list[Progress] = []
    in_steps(params, inputs(), plan(steps=3), callback_on_step_end=told.append)
    stages = len(CFG.stages)
    assert len(told) == stages * (3 + 2 * (SHAPE[0] - 1))
    assert [at.done for at in told] == sorted({at.done for at in told})
    assert told[-1].done == 1
    assert str(told[0]).startswith(f"unit 1/5, stage 1/{stages}, step 1/3")


def test_units_come_one_by_one(params):
    told: list[Progress] = []
    one_by_one = units(params, inputs(), plan(), callback_on_step_end=told.append)
    assert next(one_by_one).shape == (VIDEOS, 1, *SHAPE[1:])
    assert {at.unit for at in told} == {0}
    next(one_by_one)
    assert told[-1].unit == 1


def test_a_unit_comes_when_the_devices_have_a_step_of_the_next(params, monkeypatch):
    """What is made of it follows its last step at once, and the host waits later."""
    events, step = [], module._euler_step

    def noted(*arguments):
        events.append("step")
        return step(*arguments)

    def finish(latents):
        events.append("finish")
        return latents + 1

    monkeypatch.setattr(module, "_euler_step", noted)
    made = []
    for unit in units(params, inputs(), plan(), finish=finish):
        events.append("unit")
        made.append(unit)
    later = ["finish", "step", "unit", "step", "step", "step"] * (SHAPE[0] - 1)
    assert events == ["step"] * 4 + later + ["finish", "unit"]
    np.testing.assert_array_equal(
        jnp.concatenate(made, 1), in_steps(params, inputs(), plan()) + 1
    )


def test_more_steps_units_or_guidance_compile_nothing_new(params):
    in_steps(params, inputs(), plan(steps=2))
    before = compiled()
    other = inputs()._replace(scales=np.full(SHAPE[0], 5, np.float32))
    in_steps(params, other, plan(steps=4))
    assert compiled() == before


def test_broken_weights_are_named(params):
    head = {
        **params["dit"]["head"],
        "bias": jnp.full_like(params["dit"]["head"]["bias"], jnp.nan),
    }
    broken = {**params, "dit": {**params["dit"], "head": head}}
    message = r"unit 1/5, stage 1/\d, step 1/2: .*weights dit/head/bias are not finite"
    with pytest.raises(FloatingPointError, match=message):
        in_steps(broken, inputs(), plan())


def test_broken_prompts_and_overflow_are_told_apart(params):
    given = inputs()
    text = given.text._replace(pooled=jnp.full_like(given.text.pooled, np.inf))
    with pytest.raises(FloatingPointError, match="features of a prompt are not finite"):
        in_steps(params, given._replace(text=text), plan())
    scales = np.array([3, np.inf, 2, 2, 2], np.float32)
    with pytest.raises(FloatingPointError, match=r"unit 2/5.*overflows in float32"):
        in_steps(params, given._replace(scales=scales), plan())
