# SPDX-License-Identifier: Apache-2.0
"""What a text-to-video model is: its config, its weights, its functions.

Here the method meets the networks, which don't know each other.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from pyramid_jax import objective, pyramid
from pyramid_jax.config import build, check_entries, fields
from pyramid_jax.guidance import Guidance
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import NONE, Layout
from pyramid_jax.models import layers
from pyramid_jax.models.cache import Cache, empty_cache
from pyramid_jax.models.dit import (
    STACKED,
    DiT,
    DiTConfig,
    Modulations,
    initialise_dit,
)
from pyramid_jax.models.layers import unstacked
from pyramid_jax.models.text_encoder import TextConfig, TextEncoder
from pyramid_jax.objective import HistoryNoise
from pyramid_jax.pyramid import Stage
from pyramid_jax.shapes import Array, Rows, Text, Tokens
from pyramid_jax.units import SamplerPlan

MMDIT = DiTConfig()
MINIFLUX = DiTConfig(
    width=1920,
    heads=30,
    double_blocks=8,
    single_blocks=16,
    pooled_width=768,
    rope_axes=(16, 24, 24),
    position_table=None,
    qk_eps=1e-6,
    text_ends_early=False,
)
VARIANTS = {"mmdit": MMDIT, "miniflux": MINIFLUX}
# Ways to sample, by name: the original's numbers, and near ones in fewer steps.
PRESETS: Mapping[str, Mapping[str, bool]] = {
    "faithful": {"last_step": True},
    "fast": {"last_step": False, "reuse": True},
}
# What they are and cost: Euler steps of the SD3-style model, and the PSNR of a video of
# the embedded one beside `faithful` (docs/performance.md).
PRESET_NOTES: Mapping[str, str] = {
    "faithful": "the original's numbers, 8.19 PFLOP for 768p and 5 s",
    "fast": "no steps that are 0.001 wide, 7.39 PFLOP, PSNR 65 dB",
}


@dataclass(frozen=True)
class ModelConfig:
    """What the weights of a text-to-video model mean.

    Args:
        text: the encoder that is trained with the DiT; None: the features are given.
        edges, shift, gamma: of the pyramid's stages, see `pyramid.stages`.
        corrupt: largest noise fraction of the history in training.
        first_frame_share: how many of the segments with a history see the first frame
            without noise in training, as image to video does.
        tokenizer: a tokenizer.json, or "byt5".
    """

    dit: DiTConfig
    layout: Layout
    latent: LatentConfig
    text: TextConfig | None = None
    edges: tuple[float, ...] = pyramid.THIRDS
    shift: float = 1.0
    gamma: float = 1 / 3
    corrupt: float = 1 / 3
    first_frame_share: float = 0.0
    tokenizer: str = "byt5"

    def __post_init__(self):
        patch, channels = self.layout.patch, self.latent.channels
        if self.dit.patch_values != patch**2 * channels:
            raise ValueError(
                f"patch_values {self.dit.patch_values} must be {patch**2 * channels} "
                f"= {patch}² (patch) x {channels} (channels)"
            )
        if self.text is not None and {self.text.width} != {
            self.dit.text_width,
            self.dit.pooled_width,
        }:
            raise ValueError(
                f"text width {self.text.width} must equal the DiT's text_width "
                f"{self.dit.text_width} and pooled_width {self.dit.pooled_width}"
            )
        check_entries(self, lambda c: 0 <= c <= 1, "0 (clean) to 1", "corrupt")
        check_entries(self, lambda c: 0 <= c <= 1, "0 to 1", "first_frame_share")
        if self.first_frame_share and self.layout.history == NONE:
            raise ValueError(
                f"first_frame_share {self.first_frame_share}, but whole sequences "
                f"(layout.history {NONE!r}) have no history; use 0"
            )

    @property
    def history_noise(self) -> HistoryNoise:
        """Of training."""
        return HistoryNoise(self.corrupt, self.first_frame_share)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the pyramid, coarsest first."""
        return pyramid.stages(self.edges, self.shift, self.gamma)


@dataclass(frozen=True)
class SampleConfig:
    """Defaults for sampling a model: Euler steps per stage, guidance; what it can make.

    Args:
        image_guidance: scale of later units where the first frame is given; None: that
            of `guidance`.
        renoising: what jumps between stages add, one of `pyramid.RENOISING`.
        reuse: keys and values are reused from unit to unit, where there is memory for
            them; the numbers are the same, up to the order of sums.
        window: how many units a unit sees at most, see `SamplerPlan`; None: all.
        sizes: (height, width, frames of the longest video) of the training, () where
            they are not known.
        fps: frames per second of the training.
    """

    first_steps: tuple[int, ...] = (20, 20, 20)
    video_steps: tuple[int, ...] = (10, 10, 10)
    guidance: Guidance = field(default_factory=Guidance)
    last_step: bool = True
    scans: int = 1
    reuse: bool = True
    window: int | None = None
    image_guidance: float | None = None
    renoising: str = pyramid.CORRECTIVE
    sizes: tuple[tuple[int, int, int], ...] = ()
    fps: float = 24.0

    def __post_init__(self):
        known = pyramid.RENOISING
        check_entries(self, lambda x: x in known, f"one of {known}", "renoising")

    def with_image(self) -> "SampleConfig":
        """These choices where the first frame is given."""
        if self.image_guidance is None:
            return self
        guidance = dataclasses.replace(self.guidance, video=self.image_guidance)
        return dataclasses.replace(self, guidance=guidance)

    def with_preset(self, name: str) -> "SampleConfig":
        """These choices in one of the `PRESETS`.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; use one of {sorted(PRESETS)}")
        return dataclasses.replace(self, **PRESETS[name])

    def plan(self, model: ModelConfig, reuse: tuple[int, ...] = ()) -> SamplerPlan:
        """These choices for one model, some of whose stages reuse keys and values.

        Raises:
            ValueError: numbers of steps that do not fit the model's stages.
        """
        return SamplerPlan(
            stages=model.stages,
            layout=model.layout,
            first_steps=self.first_steps,
            video_steps=self.video_steps,
            gamma=model.gamma,
            last_step=self.last_step,
            scans=self.scans,
            reuse=reuse,
            clean_history=model.dit.clean_history,
            window=self.window,
        )


# ---------------------------------------------------------------------------- parsing


def model_config(section: Mapping[str, Any]) -> ModelConfig:
    """The `model` section of a config, or the same read from a model's config.json.

    `variant` names the DiT that the entries of `dit` change.

    Raises:
        ValueError: unknown variant or entry, or values that don't fit together.
    """
    section = dict(section)
    variant = section.pop("variant")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; use one of {sorted(VARIANTS)}")
    entries = fields(DiTConfig, section.pop("dit"))
    if isinstance(entries.get("remat"), bool):  # in folders of older versions
        entries["remat"] = layers.NOTHING if entries["remat"] else layers.PRODUCTS
    dit = dataclasses.replace(VARIANTS[variant], **entries)
    text = section.pop("text", None)
    layout = {"position_table": dit.position_table} | dict(section.pop("layout"))
    return build(
        ModelConfig,
        section
        | {
            "dit": dit,
            "layout": build(Layout, layout),
            "latent": build(LatentConfig, section.pop("latent")),
            "text": None if text is None else build(TextConfig, text),
        },
    )


def model_section(model: ModelConfig) -> dict[str, Any]:
    """What `model_config` reads, all entries spelled out."""
    return dataclasses.asdict(model) | {"variant": "mmdit"}


def sample_config(section: Mapping[str, Any]) -> SampleConfig:
    """The `sample` section of a config."""
    section = dict(section)
    guidance = build(Guidance, section.pop("guidance", {}))
    sizes = tuple(tuple(size) for size in section.pop("sizes", ()))
    return build(SampleConfig, section | {"guidance": guidance, "sizes": sizes})


# ----------------------------------------------------------------- functions of a model


def initialise(model: ModelConfig, key: jax.Array) -> Any:
    """Fresh weights {"dit": ..., "text": ...}, in boxes that name their axes."""
    of_dit, of_text = jax.random.split(key)
    params = {"dit": initialise_dit(model.dit, of_dit)}
    if model.text is not None:
        encoder, order = TextEncoder(model.text), jnp.zeros((1, 1), jnp.int32)
        params["text"] = encoder.init(of_text, order, order, 1)["params"]
    return params


def encode_text(
    model: ModelConfig, params: Any, ids: jax.Array, segment: jax.Array, segments: int
) -> Text:
    """Captions of a batch of rows, as the DiT sees them."""
    if model.text is None:
        raise ValueError(
            "this model has no text encoder of its own; give text features"
        )
    weights = {"params": params["text"]}
    text: Any = TextEncoder(model.text).apply(weights, ids, segment, segments)
    return text


def velocity_network(
    model: ModelConfig, params: Any, modulations: Modulations | None = None
) -> Callable[..., Any]:
    """The network as a `shapes.Velocity`, a function of tokens, time and text.

    Where it has a clean history and answers all tokens, it has to be told which are
    `current`.

    Args:
        modulations: at the one time that the function will be called with, if they are
            known; time and pooled text are not read then.
    """
    variables = {"params": params["dit"]}
    apply: Any = partial(DiT(model.dit).apply, variables, modulations=modulations)

    def velocity(
        tokens: Tokens,
        time: Float[Array, "b s"],
        text: Text,
        last: int | None = None,
        memory: Cache | None = None,
        first: int = 0,
        *,
        current: Bool[Array, "b n"] | None = None,
    ) -> Any:
        if memory is None:
            return apply(tokens, time, text, last, current=current)
        rest = {"first": first, "method": "continued"}
        return apply(tokens, time, text, last, memory, **rest)

    return velocity


def empty_memory(model: ModelConfig, text: Text, tokens: int) -> Cache:
    """What the network remembers of rows with such texts before it has read them.

    Args:
        tokens: of the video, that there will be in the end.

    Raises:
        ValueError: the model is not causal, so that nothing stays the same.
    """
    rows, words = text.segment.shape
    return empty_cache(model.dit, rows, words + tokens)


def modulations(
    model: ModelConfig,
    params: Any,
    pooled: Float[jax.Array, "b 1 pooled"],
    stage: int,
    sigma: Float[Array, ""],
) -> Modulations:
    """What modulates the network in an Euler step that begins at `sigma` of a stage."""
    time = jnp.full((len(pooled), 1), pyramid.time(sigma, model.stages[stage]))
    variables = {"params": params["dit"]}
    made: Any = DiT(model.dit).apply(variables, time, pooled, method="modulations")
    return made


def unrolled(params: Any) -> Any:
    """The weights with a tree for every block, as the compiler then sees them.

    perf: on a GPU, steps are faster without a loop, which copies the weights of a block
    before it uses them; compiling takes longer, by the depth.
    """
    dit = params["dit"]
    trees = {name: unstacked(dit[name]) for name in STACKED if name in dit}
    return params | {"dit": dit | trees}


def row_text(model: ModelConfig, params: Any, rows: Rows) -> Text:
    """The captions of packed rows: encoded ids, or the features they come with."""
    if model.text is None:
        return Text(rows.text, rows.text_segment, rows.pooled)
    segments = rows.stage.shape[1]
    return encode_text(model, params, rows.text, rows.text_segment, segments)


def training_loss(
    model: ModelConfig, params: Any, rows: Rows, key: jax.Array, step: Any = None
) -> tuple[Float[jax.Array, ""], objective.Losses]:
    """The training loss of a batch, and its sums per stage; the same at every step."""
    velocity: Any = velocity_network(model, params)
    losses = objective.loss(
        partial(velocity, current=rows.current),
        rows,
        row_text(model, params, rows),
        objective.draw(key, rows),
        model.stages,
        model.history_noise,
    )
    return losses.loss, losses
