# SPDX-License-Identifier: Apache-2.0
"""The front door: a model in a folder, and videos and images from its prompts."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from pyramid_jax import sharding
from pyramid_jax.data.pixels import to_model, to_uint8
from pyramid_jax.data.tokenizer import Tokenize
from pyramid_jax.model import ModelConfig, SampleConfig
from pyramid_jax.noise import KeyedNoise
from pyramid_jax.pipeline import memory
from pyramid_jax.pipeline import prompts as released
from pyramid_jax.pipeline.denoise import StepCallback, denoise
from pyramid_jax.pipeline.folder import read_model
from pyramid_jax.pipeline.memory import WINDOWS, MemoryPlan, ModelParts, Work
from pyramid_jax.pipeline.output import (
    VideoOutput,
    check_kind,
    collect_frames,
    with_given,
)
from pyramid_jax.pipeline.prompts import PromptEncoder
from pyramid_jax.pipeline.request import Picture, VideoRequest, resolve
from pyramid_jax.pipeline.sizes import TrainedSize, latent_shape, trained_sizes
from pyramid_jax.shapes import Array, Text
from pyramid_jax.sharding import to_host
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import WHOLE, Codec, Pieces, pixel_codec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoPipeline:
    """A text-to-video model with its weights. Make one with `load`, then call it.

    Attributes:
        defaults: steps and guidance where a call gives none.
        mesh: the devices to sample on; None: where the weights are.
        vae: decodes latents; None where latents are pixels.
        pieces: how much is decoded at once; None: as much as there is room for, up to
            two latent frames.
        prompts: reads the prompts of models with T5 and CLIP, which get the endings
            that the released models were trained with; None: the model reads them.
        name: that of its folder.
        memory_limit: bytes of a device; work that needs more is refused. None: what the
            device lends, math.inf: refuse nothing.
    """

    cfg: ModelConfig
    params: Any
    tokenize: Tokenize
    defaults: SampleConfig
    mesh: Mesh | None = None
    vae: Autoencoder | None = None
    pieces: Pieces | None = None
    prompts: PromptEncoder | None = None
    name: str = ""
    memory_limit: float | None = None

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        output: str = "uint8",
        callback_on_step_end: StepCallback | None = None,
        **choices: Any,
    ) -> VideoOutput:
        """Videos for prompts; what is not given is what the model was made for.

        Args:
            output: kind of the frames: "uint8", "float32" in [0, 1], or "pil".
            callback_on_step_end: is called with a `denoise.Progress` after every step.
            image: the first frame of image-to-video: a path, a PIL image or an array
                (uint8, or floats in [0, 1]), scaled to cover the size and cropped.
            negative_prompt: what guidance steers away from; one for all prompts, or
                one each; None: "", or what is recommended for the released models.
            height, width: in pixels.
            num_frames: of a video, 1 for images; or give its length in `seconds`.
            num_inference_steps: Euler steps of every stage for the first frame, as
                `video_num_inference_steps` for all later ones; one number, or one for
                each stage.
            guidance_scale: of the first frame, 0 for no guidance at all, as
                `video_guidance_scale` of later ones.
            video: what is continued, see `extend`.
            seed: video i is that of its prompt alone with `seed + i`, on any number of
                devices; None draws a seed.
            num_videos_per_prompt: with seeds that count up.
            preset: "faithful": the original's numbers, 8.19 PFLOP for 768p and 5 s;
                "fast": no steps that are 0.001 wide, 7.39 PFLOP, PSNR 65 dB; or None.
            options: all choices about steps and guidance at once; others change them.

        All but the first two are keywords of `request.resolve`, and of every method
        that takes `choices`.

        Raises:
            ValueError: a size, a length or steps that the model can't use, no prompt,
                or what it takes does not fit the devices, see `memory_plan`.
            FloatingPointError: a step made numbers that are not finite.
        """
        request = self.request(prompt, **choices)
        return self.run(
            request, output=output, callback_on_step_end=callback_on_step_end
        )

    def text_to_video(self, prompt: str | Sequence[str], **choices: Any) -> VideoOutput:
        """Videos for prompts; the choices are those of calling the pipeline."""
        return self(prompt, **choices)

    def image_to_video(
        self, image: Picture, prompt: str | Sequence[str], **choices: Any
    ) -> VideoOutput:
        """Videos that begin with an image; the choices are those of the pipeline."""
        return self(prompt, image=image, **choices)

    def extend(
        self, video: VideoOutput | Array, prompt: str | Sequence[str], **choices: Any
    ) -> VideoOutput:
        """Videos that go on from given ones; the choices are those of the pipeline.

        A video keeps its frames, but for the oldest if they are no whole units. Without
        a length it becomes as much longer as a video usually is. Beyond the length that
        the model was made for, a unit sees as many units as it saw in training.

        Args:
            video: a result, or frames as uint8 or floats in [0, 1], `f h w 3`, or
                `videos f h w 3` with one for every prompt.
        """
        return self(prompt, video=video, **choices)

    def text_to_image(self, prompt: str | Sequence[str], **choices: Any) -> VideoOutput:
        """Images, which are videos of one frame; the choices are the pipeline's."""
        return self(prompt, num_frames=1, **choices)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        callback_on_step_end: StepCallback | None = None,
        **choices: Any,
    ) -> Iterator[UInt8[np.ndarray, "videos _ h w 3"]]:
        """The frames of the same call as soon as they exist, in 8 bits.

        First comes a single frame, then those of unit after unit, each while the device
        begins the next. Memory for decoding does not depend on the length.
        """
        request = self.request(prompt, **choices)
        return self.streamed(request, callback_on_step_end=callback_on_step_end)

    def latents(
        self,
        prompt: str | Sequence[str],
        *,
        first_frame: Float[np.ndarray, "videos _ h w c"] | None = None,
        callback_on_step_end: StepCallback | None = None,
        **choices: Any,
    ) -> Float[jax.Array, "videos t h w c"]:
        """The normalised latents of the same call; needs no VAE without an image.

        Args:
            first_frame: normalised latents in place of an image, or of a video.
        """
        if first_frame is not None and first_frame.shape[1] == 1:
            choices.setdefault("options", self.defaults.with_image())
        request = self.request(prompt, **choices)
        work = Work(self._shape(request), len(request.prompts), request.options)
        work = self._reusing(work)
        self._check_memory(work)
        given = self._given(request) if first_frame is None else first_frame
        units = self._units(request, given, work.reuse, callback_on_step_end)
        return jnp.concatenate(list(units()), axis=1)

    def request(self, prompt: str | Sequence[str], **choices: Any) -> VideoRequest:
        """What calling the pipeline with these arguments would make; for `run`."""
        if choices.get("negative_prompt") is None:
            recommended = "" if self.prompts is None else released.NEGATIVE
            choices["negative_prompt"] = recommended
        return resolve(self.cfg, self.defaults, prompt, **choices)

    def run(
        self,
        request: VideoRequest,
        *,
        output: str = "uint8",
        callback_on_step_end: StepCallback | None = None,
    ) -> VideoOutput:
        """Makes the videos of a request; see calling the pipeline."""
        check_kind(output)
        work, first = self._fitting_work(request), self._given(request)
        units = self._units(request, first, work.reuse, callback_on_step_end)
        latents = to_host(jnp.concatenate(list(units()), axis=1))
        with self._codec("decoder") as codec:
            pixels = map(to_host, codec.decoded(latents, work.pieces or WHOLE))
            frames = collect_frames(with_given(pixels, request.video), output)
        return VideoOutput(frames, request.prompts, request.seed, self.defaults.fps)

    def streamed(
        self,
        request: VideoRequest,
        *,
        callback_on_step_end: StepCallback | None = None,
    ) -> Iterator[UInt8[np.ndarray, "videos _ h w 3"]]:
        """The frames of `run` as soon as they exist, see `stream`."""
        work = self._fitting_work(request, streamed=True)
        first, callback = self._given(request), callback_on_step_end
        units = self._units(request, first, work.reuse, callback)
        window = self.cfg.layout.largest_unit(work.shape[0]) * self.cfg.latent.temporal
        pieces = replace(work.pieces or WHOLE, frames=window)

        def frames() -> Iterator[UInt8[np.ndarray, "b _ h w 3"]]:
            with self._codec("decoder") as codec:
                pixels = map(to_host, units(finish=codec.incremental(pieces)))
                yield from map(to_uint8, with_given(pixels, request.video))

        return frames()

    @property
    def sizes(self) -> tuple[TrainedSize, ...]:
        """The sizes that the model was made for, its favourite first, or ()."""
        return trained_sizes(self.defaults)

    def memory_plan(self, request: VideoRequest, streamed: bool = False) -> MemoryPlan:
        """The memory that a request takes on every device, phase by phase; print it."""
        return memory.memory_plan(self._parts, self._work(request, streamed), self.mesh)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(x.size for x in leaves)
        types = "/".join(sorted({str(x.dtype) for x in leaves}))
        sizes = ", ".join(map(str, self.sizes)) or "sizes unknown"
        return (
            f"VideoPipeline({self.name or 'unnamed'}: {count / 1e6:.1f} M {types} "
            f"weights, {sizes}, {self.defaults.fps:g} frames per second)"
        )

    # ------------------------------------------------------------------ one phase each

    def _units(
        self,
        request: VideoRequest,
        given: Float[np.ndarray, "b _ h w c"] | None,
        reuse: tuple[int, ...],
        callback: StepCallback | None,
    ) -> Callable[..., Iterator[jax.Array]]:
        """`denoise` of a request, whose prompts are read at once."""
        shape = self._shape(request)
        units = self.cfg.layout.units(shape[0])
        scales = request.options.guidance.scales(units)
        guided = bool(scales[0] > 0)  # parity: the first scale decides for all units
        keys = jax.random.key_data(request.keys)
        pyramid = len(self.cfg.stages), self.cfg.gamma, request.options.renoising
        noise = KeyedNoise(keys, shape[1:], *pyramid)
        text, plan = self._text(request, guided), request.options.plan(self.cfg, reuse)
        if given is not None:
            plan = replace(plan, begin=self.cfg.layout.units(given.shape[1]))
        choices = {
            "scales": np.asarray(scales, np.float32) if guided else None,
            "first_frame": given,
            "mesh": self.mesh,
            "callback_on_step_end": callback,
        }

        def units_of_request(**finish: Any) -> Iterator[jax.Array]:
            with sharding.present({"dit": self.params["dit"]}) as params:
                at = self.cfg, params, text, shape, noise, plan
                yield from denoise(*at, **choices, **finish)

        return units_of_request

    def _text(self, request: VideoRequest, guided: bool) -> Text:
        """A row for every negative prompt if `guided`, then one for every prompt."""
        negatives = request.negative_prompts if guided else ()
        if self.prompts is not None:
            return self.prompts([*negatives, *released.finished(request.prompts)])
        texts = *negatives, *request.prompts
        return released.read_texts(self.cfg, self.params, self.tokenize, texts)

    def _given(
        self, request: VideoRequest
    ) -> Float[np.ndarray, "videos _ y x c"] | None:
        """Normalised latents, drawn for every video from the VAE's posterior."""
        if (given := request.given) is None:
            return None
        latent, each = self.cfg.latent, (len(request.prompts), *given.shape[1:])
        pixels = to_model(np.broadcast_to(given, each))
        shape = latent.frames(given.shape[1]), *self._shape(request)[1:]
        draw = partial(jax.random.normal, shape=shape, dtype=jnp.float32)
        noise = jax.vmap(draw)(request.keys)
        pieces = Pieces(WINDOWS[0] * latent.temporal)
        with self._codec("encoder") as codec:
            return to_host(codec.encode(pixels, noise, pieces))

    @contextmanager
    def _codec(self, part: str) -> Iterator[Codec]:
        """Half of the VAE, on the devices as long as it is used; pixels as they are."""
        if self.vae is None:
            yield pixel_codec(self.cfg.latent)
            return
        with sharding.present({part: self.vae.params[part]}) as params:
            yield autoencoder.vae_codec(self.vae._replace(params=params), self.mesh)

    # -------------------------------------------------------------------------- memory

    def _shape(self, request: VideoRequest) -> tuple[int, int, int, int]:
        """The shape (t, h, w, c) of the latents of a video."""
        return latent_shape(self.cfg, request.size)

    @property
    def _parts(self) -> ModelParts:
        reader = self.prompts
        encoders = () if reader is None else reader.networks
        return ModelParts(self.cfg, self.params, self.vae, encoders)

    @property
    def _limit(self) -> float | None:
        if self.memory_limit is None:
            return memory.device_memory(self.mesh)
        return self.memory_limit

    def _work(self, request: VideoRequest, streamed: bool = False) -> Work:
        """What is to be made, with the pieces and the reuse that there is room for."""
        latent, given = self.cfg.latent.spatial > 1, request.given
        work = Work(
            self._shape(request),
            len(request.prompts),
            request.options,
            self.pieces if latent else None,
            given.shape[1] if latent and given is not None else 0,
            streamed,
        )
        if latent and self.pieces is None and self.vae is not None:
            pieces = memory.decoding_pieces(self._parts, work, self.mesh, self._limit)
            work = work._replace(pieces=pieces)
        return self._reusing(work)

    def _reusing(self, work: Work) -> Work:
        """The work, with stages that reuse keys and values where these fit."""
        stages = memory.reusing_stages(self._parts, work, self.mesh, self._limit)
        return work._replace(reuse=stages)

    def _fitting_work(self, request: VideoRequest, streamed: bool = False) -> Work:
        """What is to be made, all of which fits; with pieces where there is a VAE."""
        if self.vae is None and self.cfg.latent.spatial > 1:
            raise ValueError(
                "this model has no VAE to decode with; put one into the folder "
                f"{autoencoder.INSIDE!r} of the model's, or use `latents`"
            )
        work = self._work(request, streamed)
        self._check_memory(work)
        return work

    def _check_memory(self, work: Work) -> None:
        plan = memory.memory_plan(self._parts, work, self.mesh)
        logger.info("memory:\n%s", plan)
        plan.check(self._limit)


def load(
    folder: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    text: bool = True,
    offload: bool = False,
    unrolled: bool = False,
    *,
    lora: Mapping[str | Path, float] = MappingProxyType({}),
) -> VideoPipeline:
    """The model in a folder that training or `launch.convert` wrote.

    Weights are read one parameter at a time and go straight to where they belong.

    Args:
        mesh: the devices that share weights and work; None: the first one.
        dtype: of weights and matrix products, "float32" or "bfloat16"; "int8" or "fp8":
            bfloat16, with products of eight bits in the blocks (`kernels.quantised`);
            None: weights as they are stored, products as the model's config says.
        text: False leaves out T5 and CLIP, without which no prompt can be read.
        offload: weights wait in the host's memory, but for the phase that uses them.
        unrolled: blocks are compiled one by one: slowly, for faster steps on a GPU.
        lora: files of adapters, and how strongly each is added (1: as it was trained).

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    model = read_model(folder, mesh, dtype, text, offload, unrolled, lora=lora)
    return VideoPipeline(mesh=mesh, **model._asdict())
