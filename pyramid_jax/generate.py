# SPDX-License-Identifier: Apache-2.0
"""The front door: a model in a folder, and videos and images from its prompts."""

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from pyramid_jax import autoencoder, config, sampler
from pyramid_jax import prompts as released
from pyramid_jax.autoencoder import Autoencoder
from pyramid_jax.checkpoint.trees import placing, read_tree, write_tree
from pyramid_jax.codec import Codec, Pieces
from pyramid_jax.config import ModelConfig, SampleConfig
from pyramid_jax.data.tokenizer import Tokenize, load_tokenizer
from pyramid_jax.data.video_io import to_model, to_uint8
from pyramid_jax.prompts import PromptEncoder
from pyramid_jax.shapes import Array, Text
from pyramid_jax.sharding import to_host, unbox
from pyramid_jax.stepping import Inputs, Stepper, Watch

# The models that ship with the package: pixels are latents, or a VAE makes them.
ASSETS = Path(__file__).parent / "assets"
TINY, TINY_LATENT = ASSETS / "tiny", ASSETS / "tiny_latent"
# Prompts are padded to a multiple of it, so that few lengths compile.
TEXT_MULTIPLE = 16


@dataclass(frozen=True)
class Size:
    """Of the pixels of a video; `frames` 1 is an image."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class VideoModel:
    """A text-to-video model with its weights. Make one with `load`.

    Attributes:
        defaults: steps and guidance where a call gives none.
        mesh: the devices to sample on; None: where the weights are.
        vae: decodes latents; None where latents are pixels.
        pieces: how much is decoded at once; None: two latent frames.
        watch: is told of every Euler step that has ended, see `stepping.Progress`.
        prompts: reads the prompts of models with T5 and CLIP, which get the endings
            that the released models were trained with; None: the model reads them.
        name: that of its folder.
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
                as many negative prompts as neither one nor the prompts.
        """
        return self._pixels(self.latents(prompts, size, negative, seed, options))

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
        first = self._first(image, size, seed)
        made = self.latents(prompts, size, negative, seed, options, first)
        return self._pixels(made)

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
        first = None if image is None else self._first(image, size, seed)
        units = self.units(prompts, size, negative, seed, options, first)
        if self.cfg.latent.spatial == 1:
            begins = itertools.chain([True], itertools.repeat(False))
            made = map(self.cfg.latent.denormalise, units, begins)
        else:
            pieces = None if self.pieces is None else replace(self.pieces, frames=None)
            made = self._codec().stream(units, pieces or Pieces())
        return (to_uint8(to_host(frames)) for frames in made)

    def latents(
        self,
        prompts: str | Sequence[str],
        size: Size,
        negative: str | Sequence[str] | None = None,
        seed: int = 0,
        options: SampleConfig | None = None,
        first: Float[np.ndarray, "1 h w c"] | None = None,
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
        first: Float[np.ndarray, "1 h w c"] | None = None,
    ) -> Iterator[Float[jax.Array, "b _ h w c"]]:
        """The normalised latents of unit after unit; unit 0 is `first` if given.

        Raises:
            FloatingPointError: a step made numbers that are not finite.
        """
        shape = self._check(size)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("there is no prompt; give at least one")
        if options is None:
            options = self.defaults if first is None else self.defaults.with_image()
        scales = options.guidance.scales(_units(shape, self.cfg))
        guided = bool(scales[0] > 0)  # parity: the first scale decides for all units
        inputs = Inputs(
            scales=np.asarray(scales, np.float32) if guided else None,
            text=self._text(prompts, negative, guided),
            keys=jax.vmap(jax.random.key)(seed + np.arange(len(prompts))),
            first=None if first is None else np.stack([first] * len(prompts)),
        )
        how = options.sampler(self.cfg)
        stepper = Stepper(self.cfg, how, shape, self.mesh, self.watch)
        return stepper(self.params, inputs)

    def _text(
        self,
        prompts: list[str],
        negative: str | Sequence[str] | None,
        guided: bool,
    ) -> Text:
        """A row for every negative prompt if `guided`, then one for every prompt."""
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
        return _encode_text(self.cfg, self.params, ids, segment)

    def _check(self, size: Size) -> tuple[int, int, int, int]:
        """The shape (t, h, w, c) of the latents of a video."""
        latent, layout = self.cfg.latent, self.cfg.layout
        grid = latent.grid(size.height, size.width, layout.patch, len(self.cfg.stages))
        shape = (latent.frames(size.frames), *grid, latent.channels)
        _units(shape, self.cfg)
        return shape

    def _first(
        self, image: UInt8[np.ndarray, "h w 3"], size: Size, seed: int
    ) -> Float[np.ndarray, "1 y x c"]:
        """Normalised latents, drawn from the VAE's posterior if there is one."""
        if image.shape[:2] != (size.height, size.width):
            raise ValueError(
                f"the image has {image.shape[0]} x {image.shape[1]} pixels, the video "
                f"{size.height} x {size.width}; resize and crop the image first"
            )
        _, *cells, channels = self._check(size)
        pixels, latent = to_model(image)[None], self.cfg.latent
        if latent.spatial == 1:
            return latent.normalise(pixels)
        shape = (1, 1, *cells, channels)
        noise = jax.random.normal(jax.random.key(seed), shape)
        return to_host(self._codec().encode(pixels[None], noise))[0]

    def _pixels(
        self, latents: Float[jax.Array, "b t y x c"]
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        there = to_host(latents)
        if self.cfg.latent.spatial == 1:
            return to_uint8(self.cfg.latent.denormalise(there))
        pieces = self.pieces or Pieces(frames=2 * self.cfg.latent.temporal)
        return to_uint8(to_host(self._codec().decode(there, pieces)))

    def _codec(self) -> Codec:
        if self.vae is None:
            raise ValueError(
                "this model has no VAE to decode with; put one into the folder "
                f"{autoencoder.INSIDE!r} of the model's, or use `latents`"
            )
        return autoencoder.codec(self.vae, self.mesh)


def load(
    folder: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    text: bool = True,
) -> VideoModel:
    """The model in a folder that `save` or `launch.convert` wrote.

    Weights are read one parameter at a time and go straight to where they belong.

    Args:
        mesh: the devices that share weights and work; None: the first one.
        dtype: of weights and matrix products, "float32" or "bfloat16"; None: weights as
            they are stored, products as the model's config says.
        text: False leaves out T5 and CLIP, for which `latents` of a model then fails.

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    folder = Path(folder)
    about = folder / "config.json"
    if not about.is_file():
        raise ValueError(f"{folder} has no config.json; give a folder of a saved model")
    sections = json.loads(about.read_text())
    cfg = config.model_config(sections["model"])
    if dtype is not None:
        cfg = replace(cfg, dit=replace(cfg.dit, dtype=dtype))
    like = jax.eval_shape(partial(config.initialise, cfg), jax.random.key(0))
    params = read_tree(
        folder / "weights.safetensors", unbox(like), placing(like, mesh, dtype)
    )
    beside = folder / cfg.tokenizer
    tokenize = load_tokenizer(beside if beside.is_file() else cfg.tokenizer)
    inside = folder / autoencoder.INSIDE
    vae = autoencoder.load(inside, dtype) if inside.is_dir() else None
    if vae is not None and vae.latent != cfg.latent:
        raise ValueError(
            f"{inside} has latents {vae.latent}, but the model was trained on "
            f"{cfg.latent}; put the VAE there that made the latents of its training"
        )
    prompts = None
    if text and cfg.text is None and any(folder.glob("text_encoder*")):
        prompts = released.load(folder, dtype or cfg.dit.dtype, mesh)
    defaults = config.sample_config(sections["sample"])
    name = folder.resolve().name
    return VideoModel(
        cfg, params, tokenize, defaults, mesh, vae, prompts=prompts, name=name
    )


def save(
    folder: str | Path,
    cfg: ModelConfig,
    defaults: SampleConfig,
    params: Any,
    vae: Autoencoder | None = None,
) -> None:
    """Writes config.json, weights.safetensors, tokenizer.json, and a VAE into vae/.

    Weights are host arrays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if Path(cfg.tokenizer).is_file():
        kept = folder / "tokenizer.json"
        if not (kept.exists() and kept.samefile(cfg.tokenizer)):
            shutil.copyfile(cfg.tokenizer, kept)
        cfg = replace(cfg, tokenizer=kept.name)
    sections = {
        "model": config.model_section(cfg),
        "sample": asdict(defaults),
    }
    (folder / "config.json").write_text(json.dumps(sections, indent=1) + "\n")
    write_tree(folder / "weights.safetensors", params)
    if vae is not None:
        autoencoder.save(folder / autoencoder.INSIDE, vae)


def text_batch(
    tokenize: Tokenize, texts: Sequence[str]
) -> tuple[Int[np.ndarray, "b m"], Int[np.ndarray, "b m"]]:
    """Token ids, one text per row, padded on the left; their segments (0 or -1)."""
    tokens = [tokenize(text) for text in texts]
    length = -(-max(map(len, tokens)) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    ids = np.zeros((len(texts), length), np.int32)
    segment = np.full((len(texts), length), -1, np.int32)
    for row, row_segment, given in zip(ids, segment, tokens, strict=True):
        row[length - len(given) :] = given
        row_segment[length - len(given) :] = 0
    return ids, segment


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
    return config.encode_text(cfg, params, ids, segment, 1)
