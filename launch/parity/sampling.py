# SPDX-License-Identifier: Apache-2.0
"""Whole sampling runs with recorded noise, observed through the network's calls.

Both drivers of the sampler are replayed. `sampler.sample` asks a velocity function; the
one given here writes down what it is asked and what it answers, so that every unit and
stage is compared, not only the video. `pipeline.denoise` reports the end of every step;
it is replayed with reuse, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from launch.parity import vae
from launch.parity.cases import QUICK, SAMPLING, Answer, Case, Scenario, latent_back
from launch.parity.model import Model, load, recorded_text, text
from launch.parity.model import velocity as velocity_of
from pyramid_jax import layout, pyramid, sampler
from pyramid_jax.guidance import Guidance
from pyramid_jax.latents import LatentConfig
from pyramid_jax.model import ModelConfig
from pyramid_jax.noise import Noise
from pyramid_jax.pipeline.denoise import Progress, denoise
from pyramid_jax.shapes import Text, Tokens
from pyramid_jax.units import SamplerPlan

HOST = "from the host"  # the driver that users' pipelines have
REUSE = "with reuse"  # of keys and values, in all stages that can


class Call(NamedTuple):
    """One question to the network (without empty slots) and its answer."""

    values: np.ndarray
    answer: np.ndarray


class Run(NamedTuple):
    """The settings of a recorded call of the original's pipeline, as this package's.

    `pyramid` are those of `ModelConfig`'s arguments that decide the stages.
    """

    pyramid: dict[str, Any]
    plan: SamplerPlan
    text: Text
    scales: np.ndarray | None
    first_frame: np.ndarray | None
    shape: tuple[int, int, int, int]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["starts", "first", "jumps"],
    meta_fields=["from_image", "frames_per_unit"],
)
@dataclass(frozen=True)
class RecordedNoise:
    """The recorded noise of every unit, as `noise.KeyedNoise` draws it from keys.

    Args:
        starts: at stage 0, of all frames that are sampled.
        first: block noise of every jump of unit 0, where units have several frames.
        jumps: the same of all other units, one after the other.
        from_image: the first frame is given, so that unit 0 has no noise.
    """

    starts: Any
    first: Any
    jumps: Any
    from_image: bool
    frames_per_unit: int

    def __call__(self, unit: int | jax.Array, frames: int) -> Noise:
        """The noise of one unit of so many frames."""
        shift = int(self.from_image)
        begin = unit - shift if frames == 1 else (unit - 1) * frames + 1 - shift
        starts = jnp.asarray(self.starts)
        start = jax.lax.dynamic_slice_in_dim(starts, begin, frames, axis=1)
        if frames < self.frames_per_unit:
            return Noise(start, tuple(map(jnp.asarray, self.first)))
        place = unit - (shift if self.frames_per_unit == 1 else 1)
        return Noise(start, tuple(jnp.asarray(x)[place] for x in self.jumps))


def fits(scenario: Scenario) -> bool:
    """Whether a scenario is one of these."""
    return "draw.init_noise" in scenario.tensors


def replay(case: Case, scenario: Scenario) -> Iterator[Answer]:
    """The answers to a recorded sampling run, by both drivers of the sampler."""
    model = load(case, scenario.settings)
    autoencoder = vae.of_sampling(case)
    run = _settings(scenario, model)
    from_image = run.first_frame is not None
    if from_image and autoencoder is not None:
        run = run._replace(first_frame=vae.first_latent(autoencoder, case, scenario))
    noise = _noise(scenario, run)
    recorded = from_image and autoencoder is None
    note = "the first latent is the recorded one" * recorded

    latents, calls = _as_one_program(model, run, noise)
    yield Answer("out.latents", latent_back(latents), SAMPLING, note=note)
    if autoencoder is not None:
        yield from vae.frames(autoencoder, case, latents)
    yield from _observed(scenario, run, calls)
    yield from _from_the_host(model, run, noise, note, HOST)
    stages = tuple(range(len(run.plan.stages)))
    reusing = run._replace(plan=replace(run.plan, reuse=stages))
    if any(reusing.plan.remembered(run.shape[0], k) for k in stages):
        yield from _from_the_host(model, reusing, noise, note, REUSE)


def _as_one_program(
    model: Model, run: Run, noise: RecordedNoise
) -> tuple[jax.Array, list[Call]]:
    """What `sampler.sample` makes, and what it asked the network."""
    calls: list[Call] = []

    def velocity(
        tokens: Tokens, time: Any, text: Text, last: Any = None, *_: Any, **__: Any
    ) -> jax.Array:
        answer = velocity_of(model.cfg, model.params, tokens, time, text)

        def note(values: Any, segment: Any, answer: Any) -> None:
            filled = np.asarray(segment)[0] >= 0
            calls.append(Call(*(np.asarray(x)[:, filled] for x in (values, answer))))

        io_callback(note, None, tokens.values, tokens.segment, answer, ordered=True)
        return answer[:, -last:]

    def sample() -> jax.Array:
        asked = velocity, run.text, run.shape, noise, run.plan
        first = run.first_frame
        return sampler.sample(*asked, scales=run.scales, first_frame=first)

    latents = jax.jit(sample, compiler_options=QUICK)()
    jax.effects_barrier()
    return latents, calls


def _from_the_host(
    model: Model, run: Run, noise: RecordedNoise, note: str, way: str
) -> Iterator[Answer]:
    """The same by `pipeline.denoise`: the end of every stage, and the video."""
    ends: dict[str, np.ndarray] = {}

    def step(progress: Progress) -> None:
        if progress.step == progress.steps - 1:
            name = f"out.unit{progress.unit}.stage{progress.stage}"
            ends[name] = latent_back(progress.latents)

    cfg = ModelConfig(
        model.cfg, model.layout, LatentConfig(run.shape[-1]), **run.pyramid
    )
    units = denoise(
        cfg,
        {"dit": model.params},
        run.text,
        run.shape,
        noise,
        run.plan,
        scales=run.scales,
        first_frame=run.first_frame,
        callback_on_step_end=step,
    )
    latents = jnp.concatenate(list(units), axis=1)
    yield Answer("out.latents", latent_back(latents), SAMPLING, note=note, way=way)
    for name, value in ends.items():
        yield Answer(name, value, SAMPLING, way=way)


def _settings(scenario: Scenario, model: Model) -> Run:
    call, settings = scenario.settings["call"], scenario.settings.get("pipeline", {})
    arguments = {
        "edges": tuple(settings.get("stage_range", pyramid.THIRDS)),
        "shift": settings.get("timestep_shift", 1.0),
        "gamma": settings.get("scheduler_gamma", 1 / 3),
    }
    stages = pyramid.stages(*arguments.values())
    from_image = call["function"] == "generate_i2v"
    steps = [_each(call[name], len(stages)) for name in _steps(from_image)]
    plan = SamplerPlan(stages, model.layout, *steps, gamma=arguments["gamma"])

    _, c, t, h, w = scenario.tensors["out.latents"].shape
    units = layout.units(t, model.layout.frames_per_unit)
    first = scenario.latent("out.latents")[:, :1] if from_image else None
    words = [recorded_text(scenario, "in.pos.")]
    scales = None
    if call["guidance_scale"] > 0:  # of the first frame, which decides for all
        words.insert(0, recorded_text(scenario, "in.neg."))
        scales = _guidance(call).scales(units).astype(np.float32)
    both: Any = [np.concatenate(part) for part in zip(*words, strict=True)]
    return Run(arguments, plan, text(*both), scales, first, (t, h, w, c))


def _steps(from_image: bool) -> tuple[str, str]:
    first = "num_inference_steps"
    return (first, first) if from_image else (first, f"video_{first}")


def _each(steps: int | list[int], stages: int) -> tuple[int, ...]:
    return (steps,) * stages if isinstance(steps, int) else tuple(steps)


def _guidance(call: dict[str, Any]) -> Guidance:
    first, video = call["guidance_scale"], call["video_guidance_scale"]
    if call.get("use_linear_guidance"):
        decay, floor = call.get("alpha", 0.5), call.get("min_guidance_scale", 2.0)
        return Guidance(first, video, decay, floor)
    return Guidance(first, video)


def _noise(scenario: Scenario, run: Run) -> RecordedNoise:
    """The recorded noise of a run."""
    stages, from_image = len(run.plan.stages), run.first_frame is not None
    white = scenario.latent("draw.init_noise")
    start = np.asarray(pyramid.noise_levels(white, stages)[0])
    per_unit = run.plan.layout.frames_per_unit
    units = layout.units(run.shape[0], per_unit)

    def jump(unit: int, stage: int) -> np.ndarray:
        return scenario.latent(f"draw.unit{unit}.stage{stage}.block_noise")

    alone = per_unit > 1 and not from_image
    first = [jump(0, k) for k in range(1, stages)] if alone else []
    later = range(int(from_image or per_unit > 1), units)
    jumps = [np.stack([jump(u, k) for u in later]) for k in range(1, stages) if later]
    return RecordedNoise(start, first, jumps, from_image, per_unit)


def _observed(scenario: Scenario, run: Run, calls: list[Call]) -> Iterator[Answer]:
    """Starts, histories, first answers and ends of every stage of every unit."""
    plan, left = run.plan, iter(calls)
    units = layout.units(run.shape[0], plan.layout.frames_per_unit)
    for unit in range(run.first_frame is not None, units):
        steps = plan.video_steps if unit else plan.first_steps
        scale = None if run.scales is None else float(run.scales[unit])
        for k in range(len(plan.stages)):
            mine = [next(left) for _ in range(steps[k])]
            name = f"unit{unit}.stage{k}"
            past = scenario.family(f"mid.{name}.history")
            clips = [scenario.tensors[clip].shape for clip in past]
            shapes = [*clips, scenario.tensors[f"out.{name}"].shape]
            patch = plan.layout.patch
            seen = _clips(mine[0].values, shapes, patch)
            names = [*past, f"mid.{name}.latent_start"]
            for clip, value in zip(names, seen, strict=True):
                yield Answer(clip, value, SAMPLING)
            answers = [_clips(call.answer, shapes, patch)[-1] for call in mine]
            yield Answer(f"mid.{name}.model_out0", answers[0], SAMPLING)
            x = _clips(mine[-1].values, shapes, patch)[-1]
            yield Answer(
                f"out.{name}", _last_step(x, answers[-1], steps[k], scale), SAMPLING
            )


def _last_step(
    x: np.ndarray, answer: np.ndarray, steps: int, scale: float | None
) -> np.ndarray:
    """Where the last Euler step of a stage leads from `x`."""
    sigma, end = pyramid.sigmas(steps)[-2:]
    if scale is None:
        return pyramid.euler(x, answer, sigma, end)
    negative, positive = np.split(answer, 2)
    guided = negative + scale * (positive - negative)
    return pyramid.euler(np.split(x, 2)[1], guided, sigma, end)


def _clips(
    values: np.ndarray, shapes: list[tuple[int, ...]], patch: int
) -> list[np.ndarray]:
    """The last clips of a row of tokens, of the recorded shapes, oldest first."""
    clips = []
    for _, _, t, h, w in reversed(shapes):
        grid = (h // patch, w // patch)
        values, part = np.split(values, [-t * grid[0] * grid[1]], axis=1)
        clips.append(latent_back(layout.unpatchify(part, grid, patch)))
    return clips[::-1]
