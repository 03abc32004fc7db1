# SPDX-License-Identifier: Apache-2.0
"""The front door: a model in a folder, and videos and images from its prompts."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Key, UInt8

from pyramid_jax import sampler, sharding
from pyramid_jax.data.tokenizer import Tokenize, text_batch
from pyramid_jax.data.video_io import to_model, to_uint8
from pyramid_jax.model import ModelConfig, SampleConfig, encode_text
from pyramid_jax.pipeline import folder as saved
from pyramid_jax.pipeline import memory
from pyramid_jax.pipeline import prompts as released
from pyramid_jax.pipeline.denoise import Inputs, Stepper, Watch
from pyramid_jax.pipeline.memory import MemoryPlan, ModelParts, Work
from pyramid_jax.pipeline.prompts import PromptEncoder
from pyramid_jax.shapes import Array, Text
from pyramid_jax.sharding import to_host
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import Codec, Pieces

logger = logging.getLogger(__name__)

# The models that ship with the package: pixels are latents, or a VAE makes them.
ASSETS = Path(__file__).parents[1] / "assets"
TINY, TINY_LATENT = ASSETS / "tiny", ASSETS / "tiny_latent"


@dataclass(frozen=True)
class Size:
    """Of the pixels of a video; `frames` 1 is an image."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class VideoPipeline:
    """A text-to-video model with its weights. Make one with `load`.

    Attributes:
        defaults: steps and guidance where a call gives none.
        mesh: the devices to sample on; None: where the weights are.
        vae: decodes latents; None where latents are pixels.
        pieces: how much is decoded at once; None: as much as there is room for, up to
            two latent frames.
        watch: is told of every Euler step that has ended, see `stepping.Progress`.
        prompts: reads the prompts of models with T5 and CLIP, which get the endings
            that the released models were trained with; None: the model reads them.
        name: that of its folder.
        limit: bytes of a device, of which work that needs more is refused; None: what
            the device lends, math.inf: refuse nothing.
    """

    cfg: ModelConfig
    params: Any
    tokenize: Tokenize
    defaults: SampleConfig
    mesh: Mesh | None = None
    vae: Autoencoder | None = None
    pieces: Pieces | None = None
    prompts: PromptEncoder | None = None
    watch: Watch | None = None
    name: str = ""
    limit: float | None = None

    def text_to_video(
        self,
        prompts: str | Sequence[str],
        size: Size,
        *,
        negative: str | Sequence[str] | None = None,
        seed: int = 0,
        options: SampleConfig | None = None,
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        """A video per prompt; video i is that of its prompt alone with `seed + i`.

        Args:
            negative: what guidance leads away from; one for all prompts, or one each;
                None: "", or what the released models are led away from.

        Raises:
            ValueError: a size or number of frames that the model can't make, no prompt,
                as many negative prompts as neither one nor the prompts; or what it
                takes does not fit the devices, see `plan`.
        """
        return self._video(self._order(prompts, size, negative, seed, options))

    def image_to_video(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        prompts: str | Sequence[str],
        frames: int,
        *,
        negative: str | Sequence[str] | None = None,
        seed: int = 0,
        options: SampleConfig | None = None,
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        """Videos that begin with `image`, one for every prompt; see `text_to_video`."""
        height, width = image.shape[:2]
        size = Size(height, width, frames)
        order = self._order(prompts, size, negative, seed, options, image)
        return self._video(order)

    def text_to_image(
        self, prompts: str | Sequence[str], height: int, width: int, **options: Any
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """An image for every prompt; the options are those of `text_to_video`."""
        return self.text_to_video(prompts, Size(height, width), **options)[:, 0]

    def stream(
        self,
        prompts: str | Sequence[str],
        size: Size,
        *,
        image: UInt8[np.ndarray, "h w 3"] | None = None,
        negative: str | Sequence[str] | None = None,
        seed: int = 0,
        options: SampleConfig | None = None,
    ) -> Iterator[UInt8[np.ndarray, "b _ h w 3"]]:
        """The frames of `text_to_video` (`image_to_video`) as soon as they exist.

        First comes a single frame, then those of unit after unit. Memory for decoding
        does not depend on the length.
        """
        order = self._order(prompts, size, negative, seed, options, image)
        pieces = self._ready(order, streamed=True)
        return self._streamed(self._units(order, self._first(order)), pieces)

    def plan(
        self,
        size: Size,
        videos: int = 1,
        options: SampleConfig | None = None,
        streamed: bool = False,
    ) -> MemoryPlan:
        """The memory that videos take on every device, phase by phase; print it."""
        order = self._order([""] * videos, size, None, 0, options)
        return memory.plan(self._networks, self._work(order, streamed), self.mesh)

    def latents(
        self,
        prompts: str | Sequence[str],
        size: Size,
        negative: str | Sequence[str] | None = None,
        seed: int = 0,
        options: SampleConfig | None = None,
        first: Float[np.ndarray, "b 1 h w c"] | None = None,
    ) -> Float[jax.Array, "b t h w c"]:
        """The normalised latents of `text_to_video`; see `units`."""
        made = self.units(prompts, size, negative, seed, options, first)
        return jnp.concatenate(list(made), axis=1)

    def units(
        self,
        prompts: str | Sequence[str],
        size: Size,
        negative: str | Sequence[str] | None = None,
        seed: int = 0,
        options: SampleConfig | None = None,
        first: Float[np.ndarray, "b 1 h w c"] | None = None,
    ) -> Iterator[Float[jax.Array, "b _ h w c"]]:
        """The normalised latents of unit after unit; unit 0 is `first` if given.

        Raises:
            FloatingPointError: a step made numbers that are not finite.
        """
        order = self._order(prompts, size, negative, seed, options, first)
        self._fit(Work(order.shape, len(order.prompts), order.options))
        return self._units(order, first)

    def _order(
        self,
        prompts: str | Sequence[str],
        size: Size,
        negative: str | Sequence[str] | None,
        seed: int,
        options: SampleConfig | None,
        first: np.ndarray | None = None,
    ) -> "_Order":
        shape = self._check(size)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("there is no prompt; give at least one")
        if options is None:
            options = self.defaults if first is None else self.defaults.with_image()
        return _Order(prompts, shape, negative, seed, options, first)

    def _units(
        self, order: "_Order", first: Float[np.ndarray, "b 1 h w c"] | None
    ) -> Iterator[Float[jax.Array, "b _ h w c"]]:
        """The latents of unit after unit; the prompts are read at once."""
        scales = order.options.guidance.scales(_units(order.shape, self.cfg))
        guided = bool(scales[0] > 0)  # parity: the first scale decides for all units
        inputs = Inputs(
            scales=np.asarray(scales, np.float32) if guided else None,
            text=self._text(order, guided),
            keys=order.keys,
            first=first,
        )
        how = order.options.sampler(self.cfg)
        stepper = Stepper(self.cfg, how, order.shape, self.mesh, self.watch)

        def units() -> Iterator[jax.Array]:
            with sharding.present({"dit": self.params["dit"]}) as params:
                yield from stepper(params, inputs)

        return units()

    def _text(self, order: "_Order", guided: bool) -> Text:
        """A row for every negative prompt if `guided`, then one for every prompt."""
        prompts, negative = order.prompts, order.negative
        if negative is None:
            negative = "" if self.prompts is None else released.NEGATIVE
        away = _negatives(negative, len(prompts)) if guided else []
        if self.prompts is not None:
            return self.prompts([*away, *released.finished(prompts)])
        if self.cfg.text is None:
            raise ValueError(
                "this model reads features of T5 and CLIP, which are not loaded; put "
                "text encoders and tokenizers into its folder, and load it with text"
            )
        ids, segment = text_batch(self.tokenize, [*away, *prompts])
        with sharding.present({"text": self.params["text"]}) as params:
            return _encode_text(self.cfg, params, ids, segment)

    def _check(self, size: Size) -> tuple[int, int, int, int]:
        """The shape (t, h, w, c) of the latents of a video."""
        latent, layout = self.cfg.latent, self.cfg.layout
        grid = latent.grid(size.height, size.width, layout.patch, len(self.cfg.stages))
        shape = (latent.frames(size.frames), *grid, latent.channels)
        _units(shape, self.cfg)
        return shape

    def _first(self, order: "_Order") -> Float[np.ndarray, "b 1 y x c"] | None:
        """Normalised latents, drawn for every video from the VAE's posterior."""
        if order.first is None:
            return None
        _, *cells, channels = order.shape
        side = self.cfg.latent.spatial
        given, made = order.first.shape[:2], tuple(side * n for n in cells)
        if given != made:
            raise ValueError(
                f"the image has {given[0]} x {given[1]} pixels, the video "
                f"{made[0]} x {made[1]}; resize and crop the image first"
            )
        pixels = np.stack([to_model(order.first)[None]] * len(order.prompts))
        if side == 1:
            return self.cfg.latent.normalise(pixels)
        draw = partial(jax.random.normal, shape=(1, *cells, channels))
        with self._codec("encoder") as codec:
            return to_host(codec.encode(pixels, jax.vmap(draw)(order.keys)))

    def _video(self, order: "_Order") -> UInt8[np.ndarray, "b f h w 3"]:
        """Each piece goes to the host before the next one is decoded."""
        pieces = self._ready(order)
        units = self._units(order, self._first(order))
        there = to_host(jnp.concatenate(list(units), axis=1))
        if pieces is None:
            return to_uint8(self.cfg.latent.denormalise(there))
        with self._codec("decoder") as codec:
            made = [to_uint8(to_host(x)) for x in codec.decoded(there, pieces)]
        return np.concatenate(made, axis=1)

    def _streamed(
        self, units: Iterator[jax.Array], pieces: Pieces | None
    ) -> Iterator[UInt8[np.ndarray, "b _ h w 3"]]:
        if pieces is None:
            for number, unit in enumerate(units):
                raw = self.cfg.latent.denormalise(unit, begins=number == 0)
                yield to_uint8(to_host(raw))
            return
        with self._codec("decoder") as codec:
            for frames in codec.stream(units, replace(pieces, frames=None)):
                yield to_uint8(to_host(frames))

    @contextmanager
    def _codec(self, part: str) -> Iterator[Codec]:
        """Half of the VAE, on the devices as long as it is used."""
        assert self.vae is not None
        with sharding.present({part: self.vae.params[part]}) as params:
            yield autoencoder.vae_codec(self.vae._replace(params=params), self.mesh)

    def _work(self, order: "_Order", streamed: bool = False) -> Work:
        """What is to be made, with the pieces that there is room for."""
        image = order.first is not None and self.cfg.latent.spatial > 1
        count = len(order.prompts)
        work = Work(order.shape, count, order.options, self.pieces, image, streamed)
        if self.cfg.latent.spatial == 1:
            return work._replace(pieces=None)
        if work.pieces is not None or self.vae is None:
            return work
        most = self._most
        return work._replace(
            pieces=memory.pieces(self._networks, work, self.mesh, most)
        )

    def _ready(self, order: "_Order", streamed: bool = False) -> Pieces | None:
        """The pieces to decode in, where there is a VAE; everything fits."""
        if self.vae is None and self.cfg.latent.spatial > 1:
            raise ValueError(
                "this model has no VAE to decode with; put one into the folder "
                f"{autoencoder.INSIDE!r} of the model's, or use `latents`"
            )
        work = self._work(order, streamed)
        self._fit(work)
        return work.pieces

    def _fit(self, work: Work) -> None:
        found = memory.plan(self._networks, work, self.mesh)
        logger.info("memory:\n%s", found)
        found.check(self._most)

    @property
    def _networks(self) -> ModelParts:
        read = self.prompts
        encoders = () if read is None else (read.t5, *read.clips)
        return ModelParts(self.cfg, self.params, self.vae, encoders)

    @property
    def _most(self) -> float | None:
        """Bytes of a device, if they are known."""
        return memory.limit(self.mesh) if self.limit is None else self.limit


class _Order(NamedTuple):
    """What a caller wants: `shape` of the latents, `first` a given image or latents."""

    prompts: list[str]
    shape: tuple[int, int, int, int]
    negative: str | Sequence[str] | None
    seed: int
    options: SampleConfig
    first: np.ndarray | None

    @property
    def keys(self) -> Key[jax.Array, "b"]:
        """What each video is drawn with, alone or in any batch."""
        return jax.vmap(jax.random.key)(self.seed + np.arange(len(self.prompts)))


def load(
    folder: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    text: bool = True,
    offload: bool = False,
) -> VideoPipeline:
    """The model in a folder that `folder.save_model` or `launch.convert` wrote.

    Weights are read one parameter at a time and go straight to where they belong.

    Args:
        mesh: the devices that share weights and work; None: the first one.
        dtype: of weights and matrix products, "float32" or "bfloat16"; None: weights as
            they are stored, products as the model's config says.
        text: False leaves out T5 and CLIP, for which `latents` of a model then fails.
        offload: weights wait in the host's memory, and are on the devices only in the
            phase that uses them: text, image, Euler steps, decoding.

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    found = saved.read_model(folder, mesh, dtype, text, offload)
    return VideoPipeline(mesh=mesh, **found._asdict())


def _negatives(negative: str | Sequence[str], count: int) -> list[str]:
    if isinstance(negative, str):
        return [negative] * count
    if len(negative) != count:
        raise ValueError(
            f"{len(negative)} negative prompts for {count} prompts; give one for each, "
            "or a single string for all"
        )
    return list(negative)


def _units(shape: tuple[int, int, int, int], cfg: ModelConfig) -> int:
    return sampler.layout.units(shape[0], cfg.layout.frames_per_unit)


@partial(jax.jit, static_argnames="cfg")
def _encode_text(
    cfg: ModelConfig, params: Any, ids: Int[Array, "b m"], segment: Int[Array, "b m"]
) -> Text:
    return encode_text(cfg, params, ids, segment, 1)
