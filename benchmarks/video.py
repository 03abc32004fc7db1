# SPDX-License-Identifier: Apache-2.0
"""A whole text-to-video model with random weights, and the video that it samples.

Everything runs but the tokenizers: text encoders, units, stages and steps with
guidance, the VAE's decoder, 8-bit frames on the host. Weights are made on the device,
so nothing is read and the host needs no memory for them.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np

from benchmarks.workload import Workload
from pyramid_jax import flops, layout, sharding
from pyramid_jax.latents import LatentConfig
from pyramid_jax.model import ModelConfig, SampleConfig
from pyramid_jax.models import vae
from pyramid_jax.models.clip import CLIPConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline import prompts
from pyramid_jax.pipeline.prompts import LIMIT, Network, PromptEncoder, Tokenizer
from pyramid_jax.pipeline.request import VideoRequest
from pyramid_jax.pipeline.sizes import Size
from pyramid_jax.pipeline.video import VideoPipeline
from pyramid_jax.units import SamplerPlan, Unit
from pyramid_jax.vae.autoencoder import Autoencoder

SMALL = "small"
RELEASED = {  # height, width and frames in pixels; 24 frames are a second
    "384p_5s": Size(384, 640, 121),
    "768p_5s": Size(768, 1280, 121),
    "768p_10s": Size(768, 1280, 241),
}
PRESETS = (SMALL, *RELEASED)
CLIP_L, CLIP_G = 768, 1280  # their widths


@dataclass(frozen=True)
class Case:
    """A model and a video.

    Args:
        work: the transformer, the latents' size, how many latent frames are sampled.
        first_steps, video_steps: Euler steps of every stage, of unit 0 and of others.
        clips: one for each part of the pooled vector.
        dtype: of weights and matrix products.
        attention: a backend of `kernels.attention`; None: its default.
        scans: see `SamplerPlan`.
        reuse, last_step: see `SampleConfig`.
        clean_history: see `DiTConfig`.
    """

    work: Workload
    t5: T5Config
    clips: tuple[CLIPConfig, ...]
    vae: VAEConfig
    first_steps: int = 20
    video_steps: int = 10
    dtype: str = "bfloat16"
    attention: str | None = None
    scans: int = 1
    reuse: bool = True
    last_step: bool = True
    clean_history: bool = False
    latent: LatentConfig = field(default_factory=LatentConfig)

    @property
    def size(self) -> Size:
        """Of the video in pixels."""
        height, width = (side * self.latent.spatial for side in self.work.cells)
        return Size(height, width, self.vae.frames(self.work.sampled))

    def request(self, model: VideoPipeline, prompt: str) -> VideoRequest:
        """The video of this case for a prompt."""
        height, width = self.size.height_width
        return model.request(
            prompt, height=height, width=width, num_frames=self.size.frames, seed=0
        )

    def flops(self, slots: bool = True) -> int:
        """Of all Euler steps of a video, for a prompt and a negative prompt.

        Args:
            slots: count the empty slots of the history, too; with reuse there are none.
        """
        total = 0
        for index in range(layout.units(self.work.sampled, self._per_unit)):
            for k in range(len(self.cfg.stages)):
                unit = self.unit(index, k)
                first, count = self.step(unit, k, slots), len(self.plan.sigmas(k, unit))
                once = self.plan.reads_once(unit, k)
                later = self.known_step(unit, k) if once else first
                total += 2 * (first + (count - 1) * later)
        return total

    @property
    def plan(self) -> SamplerPlan:
        """How videos are sampled, where there is memory for all reuse."""
        stages = range(len(self.cfg.stages)) if self.reuse else ()
        return self.options.plan(self.cfg, tuple(stages))

    def unit(self, index: int, stage: int) -> Unit:
        """A unit as a stage reads it."""
        spans = [(0, 1), *self.plan.spans(self.work.sampled)]
        (span,) = ((begin, end) for begin, end in spans if begin <= index < end)
        return self.plan.unit(index, span, stage, self.work.sampled)

    def read(self, unit: Unit, stage: int) -> list[int]:
        """Video tokens of each frame, or slot of one, that a step reads."""
        clips = unit.clips(stage, self.cfg.layout)
        return flops.of_clips(self.cfg, self.work.cells, clips)

    @property
    def _per_unit(self) -> int:
        return self.cfg.layout.frames_per_unit

    def step(self, unit: Unit, stage: int, slots: bool = False) -> int:
        """FLOP of an Euler step on one row; `slots` counts empty ones, too."""
        cfg, weights, read = self.cfg, self.work.weights, sum(self.read(unit, stage))
        seen = flops.frames(cfg, self.work.cells, stage, int(unit.index))
        if unit.slots is None:
            known = LIMIT + sum(seen) - read
            return flops.step(weights, cfg, 0, self.read(unit, stage), known=known)
        empty = read - sum(seen) if slots else 0
        return flops.step(weights, cfg, LIMIT, seen, empty)

    def known_step(self, unit: Unit, stage: int) -> int:
        """FLOP of an Euler step whose history has been read."""
        cfg, cells = self.cfg, self.work.cells
        seen = flops.frames(cfg, cells, stage, int(unit.index))
        past, current = seen[: -self._per_unit], seen[-self._per_unit :]
        known = LIMIT + sum(past)
        return flops.step(self.work.weights, cfg, 0, current, known=known)

    @property
    def options(self) -> SampleConfig:
        """Steps, and the guidance of the released models."""
        stages = len(self.cfg.stages)
        first, video = (
            (steps,) * stages for steps in (self.first_steps, self.video_steps)
        )
        return SampleConfig(
            first,
            video,
            last_step=self.last_step,
            scans=self.scans,
            reuse=self.reuse,
        )

    @property
    def cfg(self) -> ModelConfig:
        """The transformer's config in this case's dtype."""
        dit = replace(
            self.work.model.dit,
            dtype=self.dtype,
            attention=self.attention,
            clean_history=self.clean_history,
        )
        return replace(self.work.model, dit=dit)

    @cached_property
    def weights(self) -> dict[str, Any]:
        """Shapes of the weights of each network."""
        init = partial(vae.initialise_vae, self.vae)
        return {
            "transformer": self.work.weights,
            "text encoders": tuple(
                sharding.unbox(prompts.abstract_encoder(cfg))
                for cfg in (self.t5, *self.clips)
            ),
            "VAE": sharding.unbox(jax.eval_shape(init, jax.random.key(0))),
        }

    @property
    def parameters(self) -> dict[str, int]:
        """How many numbers each network has learned."""
        return {
            name: sum(leaf.size for leaf in jax.tree.leaves(tree))
            for name, tree in self.weights.items()
        }

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """Random weights of every network on the device."""
        return random_weights(self.weights, self.dtype)

    def model(self) -> VideoPipeline:
        """What `pyramid_jax.load` returns for a converted model."""
        weights = self.loaded
        return VideoPipeline(
            self.cfg,
            {"dit": weights["transformer"]},
            tokenize=lambda text: [],  # the prompts have tokenizers of their own
            defaults=self.options,
            vae=self.autoencoder(weights["VAE"]),
            prompts=self.encoder(weights["text encoders"]),
        )

    def autoencoder(self, weights: Any) -> Autoencoder:
        """The VAE with these weights."""
        cfg = replace(self.vae, dtype=self.dtype)
        return Autoencoder(cfg, self.latent, weights)

    def encoder(self, weights: Any) -> PromptEncoder:
        """The text encoders with these weights, for fixed tokens."""
        cfgs = [replace(cfg, dtype=self.dtype) for cfg in (self.t5, *self.clips)]
        limits = LIMIT, *(cfg.positions for cfg in self.clips)
        words = tuple(Tokenizer(Words(limit), limit) for limit in limits)
        return PromptEncoder(tuple(map(Network, cfgs, weights)), words)

    def weights_of(self, network: str) -> Any:
        """Random weights of one network on the device."""
        return random_weights(self.weights[network], self.dtype)


@dataclass(frozen=True)
class Words:
    """Stands for a tokenizer: every text has `count` tokens, the last the largest."""

    count: int

    @property
    def ids(self) -> list[int]:
        """The tokens of any text."""
        return np.arange(self.count).tolist()

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.ids}


def random_weights(shapes: Any, dtype: str) -> Any:
    """Arrays of these shapes with deviation 0.02, made on the device one by one."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    different = list({leaf.shape for leaf in leaves})
    draw = partial(_compiled_normal, keys[0], dtype)
    with ThreadPoolExecutor() as pool:  # perf: compilers work side by side
        normal = dict(zip(different, pool.map(draw, different), strict=True))
    pairs = zip(keys, leaves, strict=True)
    return tree.unflatten([normal[leaf.shape](key) for key, leaf in pairs])


def case(preset: str, variant: str = "mmdit") -> Case:
    """The small case for a CPU, in float32, or a released model with random weights.

    Raises:
        ValueError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; use one of {PRESETS}")
    return _small(variant) if preset == SMALL else _released(variant, RELEASED[preset])


def _small(variant: str) -> Case:
    """Few and narrow layers; widths where networks meet are as released."""
    work = Workload(variant, depth=6, width=384, heads=6, cells=(16, 24), sampled=3)
    widths = (32, 32, 64, 64)
    return Case(
        work,
        T5Config(vocabulary=1024, heads=8, mlp_width=1024, blocks=2),
        _clips(variant, blocks=(2, 2), vocabulary=1024),
        VAEConfig(
            encoder_widths=widths,
            decoder_widths=widths,
            encoder_layers=(1,) * 4,
            decoder_layers=(1,) * 4,
        ),
        first_steps=2,
        video_steps=2,
        dtype="float32",
    )


def _released(variant: str, size: Size) -> Case:
    latent = LatentConfig()
    width, heads = (1920, 30) if variant == "miniflux" else (1536, 24)
    cells = (size.height // latent.spatial, size.width // latent.spatial)
    sampled = latent.frames(size.frames)
    work = Workload(variant, 24, width, heads, cells, sampled=sampled)
    return Case(work, T5Config(), _clips(variant), VAEConfig())


def _clips(
    variant: str, blocks: tuple[int, int] = (12, 32), vocabulary: int = 49408
) -> tuple[CLIPConfig, ...]:
    """CLIP ViT-L, and for the SD3-style model CLIP ViT-bigG."""
    large = CLIPConfig(vocabulary, CLIP_L, blocks=blocks[0])
    if variant == "miniflux":
        return (large,)
    giant = CLIPConfig(
        vocabulary,
        CLIP_G,
        heads=20,
        mlp_width=4 * CLIP_G,
        blocks=blocks[1],
        quick_gelu=False,
        projection=CLIP_G,
    )
    return replace(large, projection=CLIP_L), giant


def _compiled_normal(
    key: jax.Array, dtype: str, shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
    def normal(key: jax.Array) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, dtype)

    return jax.jit(normal).lower(key).compile()
