# SPDX-License-Identifier: Apache-2.0
"""The released networks with random weights: Euler steps, decoding, training, text."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ours
from benchmarks.attention import all_pairs
from benchmarks.device.chip import milliseconds, peak_memory
from benchmarks.device.records import Log
from benchmarks.sample import PROMPTS
from benchmarks.stages import Run, Stage, by_stage, utilisation
from benchmarks.video import CLIP_G, CLIP_L, Case
from benchmarks.video import case as released
from benchmarks.workload import Workload
from pyramid_jax import flops
from pyramid_jax.data.pixels import to_uint8
from pyramid_jax.mask import TokenMask
from pyramid_jax.models.clip import CLIPConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.noise import KeyedNoise
from pyramid_jax.pipeline.denoise import Progress, denoise
from pyramid_jax.pipeline.prompts import LIMIT
from pyramid_jax.sharding import to_host
from pyramid_jax.vae.autoencoder import vae_codec
from pyramid_jax.vae.codec import Codec, Pieces

STEPS = 3  # Euler steps of every stage that are timed
DECODED = 5  # latent frames: the first, and some more for a steady state
TRAINED = 5  # steps, of which the first compiles
TINY = Case(
    Workload(depth=2, width=64, heads=1, cells=(8, 8), sampled=2),
    T5Config(vocabulary=LIMIT, heads=1, head_dim=8, mlp_width=8, blocks=1),
    tuple(
        CLIPConfig(77, width, mlp_width=8, blocks=1, projection=width)
        for width in (CLIP_L, CLIP_G)
    ),
    VAEConfig(
        encoder_widths=(8,) * 4,
        decoder_widths=(8,) * 4,
        encoder_layers=(1,) * 4,
        decoder_layers=(1,) * 4,
        groups=4,
    ),
    first_steps=2,
    video_steps=2,
    dtype="float32",
)
TINY_ROW = Workload(depth=2, width=64, heads=1, cells=(8, 8), frames=3, caption=16)
# Five seconds at 768p, of which a row has a segment of every stage.
ROW = Workload("mmdit", 24, 1536, 24, (96, 160), frames=16)


def euler(preset: str, log: Log, tiny: bool) -> None:
    """Euler steps with guidance at every stage, and what those of a video take.

    They are those of a whole video, but fewer, in the loop of the pipeline itself.
    First come the units after the first, in which a video spends most of its time.
    """
    case = TINY if tiny else released(preset)
    params = {"dit": case.weights_of("transformer")}
    jax.block_until_ready(params)
    log("weights", count=case.work.parameters, dtype=case.dtype)
    for later in (True, False):
        units = _units(case, params, later, _early(log, preset))
        # A given frame is the first unit; each of the spans has shapes of its own.
        for _ in range(1 + later * len(case.plan.spans(case.work.sampled))):
            next(units)
        units.close()
        run = _sampled(case, params, later)
        stages = by_stage(case, [run], text=0.0)
        for stage in reversed(stages):
            log("step", preset=preset, measured=stage)
        steps = case.video_steps if later else case.first_steps
        log("units", preset=preset, **_whole(case, stages, steps))


def decoder(log: Log, tiny: bool) -> None:
    """Frames a second from latents to 8 bits on the host, one latent or two at once.

    Two programs decode a video, one for its first frame and one for all later pieces.
    Where convolutions are tuned as they are compiled, that takes most of the time: what
    is known of a piece is told before the next one.
    """
    case = TINY if tiny else released("768p_5s")
    weights = jax.block_until_ready(case.weights_of("VAE"))
    log("weights", count=case.parameters["VAE"], dtype=case.dtype)
    codec = vae_codec(case.autoencoder(weights))
    count = 2 if tiny else DECODED
    shape = (1, count, *case.work.cells, case.latent.channels)
    latents = jax.random.normal(jax.random.key(0), shape)
    for together in (1,) if tiny else (1, 2):
        pieces = Pieces(frames=together * case.latent.temporal)
        tell = partial(log, "piece", latents_at_once=together, size=case.size)
        first = sum(_pieces(codec, latents, pieces, partial(tell, compiles=True)))
        again = sum(_pieces(codec, latents, pieces, partial(tell, compiles=False)))
        frames, seconds = _timed(partial(_pixels, codec, latents, pieces))
        _, whole = _timed(partial(_pictures, codec, latents, pieces))
        log(
            "decoded",
            latents_at_once=together,
            size=case.size.height_width,
            frames=frames,
            compiling=first - again,
            frames_per_second=frames / whole,
            on_device=frames / seconds,
            peak_gib=peak_memory(),
        )


def training(log: Log, tiny: bool) -> None:
    """A whole training step, loss to moving average, on one packed row."""
    work = TINY_ROW if tiny else ROW
    dtype = "float32" if tiny else "bfloat16"
    dit = replace(work.model.dit, dtype=dtype, remat="nothing")
    model = replace(work.model, dit=dit)
    pairs = all_pairs(TokenMask(*map(np.asarray, work.mask)))
    forward = sum(product.flops * count for product, count in work.products().items())
    blocks = dit.double_blocks + dit.single_blocks
    forward += 4 * pairs * dit.width * blocks
    count = 3 * forward  # what recomputation adds is not counted
    log("row", tokens=sum(work.tokens), pairs=pairs, flops=count)
    take, seconds = ours.training(work, model), []
    for _ in range(3 if tiny else TRAINED):
        loss, taken = _timed(lambda: float(take()))
        seconds.append(taken)
        log("taken", seconds=taken, loss=loss)
    median = float(np.median(seconds[1:]))
    rate = flops.peak(jax.devices()[0].device_kind)
    log(
        "trained",
        tokens=sum(work.tokens),
        parameters=work.parameters,
        seconds=median,
        compiling=seconds[0] - median,
        tflops=count / median / 1e12,
        utilisation=None if rate is None else count / median / rate,
        peak_gib=peak_memory(),
    )


def text(log: Log, tiny: bool) -> None:
    """T5 and CLIP on a prompt and a negative prompt, without tokenizers."""
    case = TINY if tiny else released("768p_5s")
    encoder = case.encoder(case.weights_of("text encoders"))
    _, first = _timed(lambda: jax.block_until_ready(encoder(PROMPTS)))
    ms = milliseconds(lambda: encoder(PROMPTS), repeats=3)
    count = case.parameters["text encoders"]
    log("encoded", parameters=count, first=first, ms=ms, peak_gib=peak_memory())


def _pieces(
    codec: Codec, latents: jax.Array, pieces: Pieces, tell: Callable[..., None]
) -> Iterator[float]:
    """Seconds of one piece of a video after another, told as soon as it is there."""
    decoded = codec.decoded(latents, pieces)
    while True:
        x, seconds = _timed(lambda: jax.block_until_ready(next(decoded, None)))
        if x is None:
            return
        tell(frames=x.shape[1], seconds=seconds)
        yield seconds


def _pixels(codec: Codec, latents: jax.Array, pieces: Pieces) -> int:
    """Decodes latents on the device, and counts the frames."""
    pixels = jax.block_until_ready(list(codec.decoded(latents, pieces)))
    return sum(x.shape[1] for x in pixels)


def _pictures(codec: Codec, latents: jax.Array, pieces: Pieces) -> int:
    """Decodes latents into 8 bits on the host, and counts the frames."""
    pixels = [to_uint8(to_host(x)) for x in codec.decoded(latents, pieces)]
    return sum(x.shape[1] for x in pixels)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    begin = time.perf_counter()
    value = call()
    return value, time.perf_counter() - begin


def _units(
    case: Case, params: Any, later: bool, callback: Callable[[Progress], None]
) -> Iterator[jax.Array]:
    """The units of a video after a given first frame, or the first frame alone."""
    cfg, shape = case.cfg, (*case.work.cells, case.latent.channels)
    few = replace(case, first_steps=STEPS, video_steps=STEPS)
    frames = case.work.sampled if later else 1
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 1))
    frame = jax.random.normal(jax.random.key(2), (1, 1, *shape)) if later else None
    return denoise(
        cfg,
        params,
        jax.tree.map(jnp.asarray, case.work.prompts),
        (frames, *shape),
        KeyedNoise(keys, shape, len(cfg.stages), cfg.gamma),
        few.plan,
        scales=np.asarray(few.options.guidance.scales(frames), np.float32),
        first_frame=frame,
        callback_on_step_end=callback,
    )


def _sampled(case: Case, params: Any, later: bool) -> Run:
    """When each step of the units ends."""
    ends: list[tuple[Progress, float]] = []
    began = time.perf_counter()
    for _ in _units(
        case, params, later, lambda step: ends.append((step, time.perf_counter()))
    ):
        pass
    return Run(began, ends, time.perf_counter())


def _early(log: Log, preset: str) -> Callable[[Progress], None]:
    """Tells which stages are compiled while others are, and of each one step's time."""
    last = [time.perf_counter()]

    def tell(progress: Progress) -> None:
        last.append(time.perf_counter())
        about: dict[str, Any] = {"preset": preset, "stage": progress.stage}
        if progress.step == 0:
            log("compiled", **about)
        if progress.step == 1:  # which began when the one before had ended
            log("early", **about, ms=1e3 * (last[-1] - last[-2]))

    return tell


def _whole(case: Case, stages: list[Stage], steps: int) -> dict[str, Any]:
    """What these units take with so many steps at every stage."""
    seconds = sum(stage.seconds for stage in stages) * steps / STEPS
    count = sum(stage.flops for stage in stages) * steps // STEPS
    return {
        "units": stages[0].units,
        "steps": steps,
        "size": case.size,
        "seconds": seconds,
        "flops": count,
        "utilisation": utilisation(case, count, seconds),
        "peak_gib": peak_memory(),
    }
