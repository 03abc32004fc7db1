# SPDX-License-Identifier: Apache-2.0
"""What a call of a pipeline makes: the words of a user, and all that follows."""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Key, Shaped, UInt8
from PIL import Image

from pyramid_jax.data.pictures import fit_picture, read_picture
from pyramid_jax.model import ModelConfig, SampleConfig
from pyramid_jax.pipeline import sizes
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.sizes import Size
from pyramid_jax.shapes import Array

logger = logging.getLogger(__name__)

Picture = str | Path | Image.Image | Shaped[Array, "..."]
Steps = int | Sequence[int]  # Euler steps of every stage, the same number or one each
SEEDS = 2**31  # different ones below it make different videos


@dataclass(frozen=True)
class VideoRequest:
    """Videos of one size, with every choice made.

    Attributes:
        prompts, negative_prompts: one each for every video.
        seed: of the first video; video i is drawn from `seed + i`.
        image: the first frame of all videos, of their size; None samples it, too.
        video: the first frames of all videos, or of each.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seed: int
    size: Size
    options: SampleConfig
    image: UInt8[np.ndarray, "h w 3"] | None = None
    video: UInt8[np.ndarray, "_ f h w 3"] | None = None

    @property
    def given(self) -> UInt8[np.ndarray, "_ f h w 3"] | None:
        """The frames that are not sampled, of all videos, or of each."""
        return self.video if self.image is None else self.image[None, None]

    @property
    def keys(self) -> Key[jax.Array, "videos"]:
        """What each video is drawn from, alone or in any batch."""
        return jax.vmap(jax.random.key)(self.seed + np.arange(len(self.prompts)))


def resolve(
    cfg: ModelConfig,
    defaults: SampleConfig,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    *,
    image: Picture | None = None,
    video: VideoOutput | Shaped[Array, "..."] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    seconds: float | None = None,
    num_inference_steps: Steps | None = None,
    video_num_inference_steps: Steps | None = None,
    guidance_scale: float | None = None,
    video_guidance_scale: float | None = None,
    seed: int | None = None,
    num_videos_per_prompt: int = 1,
    preset: str | None = None,
    options: SampleConfig | None = None,
) -> VideoRequest:
    """The request of a user of a model with these defaults; see `VideoPipeline`.

    Raises:
        ValueError: no prompt, a list of negative prompts that is not as long as that of
            prompts, or a size, a length, steps or a video that the model can't use.
    """
    if seconds is not None:
        if num_frames is not None:
            raise ValueError("give the number of frames or seconds, not both")
        num_frames = sizes.nearest_frames(seconds, cfg, defaults)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    clips = None
    if video is not None:
        clips = _clips(cfg, defaults, video, (height, width))
        height, width = clips.shape[2:4]
        usual = sizes.default_size(cfg, defaults, height, width).frames
        num_frames = num_frames or clips.shape[1] + usual - 1
    size = sizes.default_size(cfg, defaults, height, width, num_frames)
    sizes.latent_shape(cfg, size)
    if not prompts or num_videos_per_prompt < 1:
        raise ValueError(
            f"there is no prompt, or no video of it ({len(prompts)} prompts, "
            f"{num_videos_per_prompt} videos of each); give at least one"
        )
    negatives = _each(negative_prompt, len(prompts))
    for text in (*prompts, *negatives):
        check_text(text)
    if options is None:
        options = defaults if image is None else defaults.with_image()
    if preset is not None:
        options = options.with_preset(preset)
    steps = {
        "first_steps": _steps(num_inference_steps, cfg),
        "video_steps": _steps(video_num_inference_steps, cfg),
    }
    scales = {"first": guidance_scale, "video": video_guidance_scale}
    guidance = replace(options.guidance, **not_none(scales))
    options = replace(options, guidance=guidance, **not_none(steps))
    options.plan(cfg)  # raises
    videos = len(prompts) * num_videos_per_prompt
    if seed is None:
        seed = random.randrange(SEEDS - videos)
        logger.info("the seed is %d", seed)
    check_seed(seed, videos)
    copies = range(num_videos_per_prompt)
    if clips is not None:
        _check_clips(clips, size, len(prompts), image is not None)
        clips = np.repeat(clips, len(copies), axis=0) if len(clips) > 1 else clips
        window = options.window or sizes.longest_window(cfg, defaults, size)
        options = replace(options, window=window)
    return VideoRequest(
        prompts=tuple(text for text in prompts for _ in copies),
        negative_prompts=tuple(text for text in negatives for _ in copies),
        seed=int(seed),
        size=size,
        options=options,
        image=None if image is None else _picture(image, size.height_width),
        video=clips,
    )


def check_text(text: Any) -> None:
    """Raises ValueError for a prompt that is no text, or not in Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"the prompt {text!r} is a {type(text).__name__}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt {text!r} is no text in UTF-8 ({error.reason}); type it in a "
            "terminal that uses UTF-8, or give it in a file"
        ) from error


def check_seed(seed: Any, videos: int = 1) -> None:
    """Raises ValueError unless the seeds of so many videos are whole, 0 to 2³¹ - 1."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed <= SEEDS - videos:
        raise ValueError(
            f"seed {seed!r} must be a whole number of 0 to {SEEDS - videos} (of "
            f"{videos} videos, whose seeds count up)"
        )


def _picture(image: Picture, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(image, str | Path):
        return read_picture(image, size)
    return fit_picture(image, size)


def _clips(
    cfg: ModelConfig,
    defaults: SampleConfig,
    video: VideoOutput | Shaped[Array, "..."],
    size: tuple[int | None, int | None],
) -> UInt8[np.ndarray, "_ f h w 3"]:
    """The newest frames of videos that can be continued, in a size that can be made."""
    pixels = np.asarray(video.in_8_bits() if isinstance(video, VideoOutput) else video)
    if pixels.ndim not in (4, 5) or not pixels.size:
        raise ValueError(
            f"the video is an array of shape {pixels.shape}; expected (frames, height, "
            "width, 3), or a video for every prompt, (videos, frames, height, width, 3)"
        )
    pixels = pixels[None] if pixels.ndim == 4 else pixels
    if size == (None, None):
        size = sizes.clip_size(defaults, pixels.shape[2:4])
    made = sizes.default_size(cfg, defaults, *size, 1).height_width  # raises
    newest = pixels[:, -sizes.continued_frames(cfg, pixels.shape[1]) :]
    return np.stack([[fit_picture(frame, made) for frame in clip] for clip in newest])


def _check_clips(
    clips: UInt8[np.ndarray, "_ f h w 3"], size: Size, prompts: int, image: bool
) -> None:
    """Raises ValueError unless a request can continue the videos."""
    if image:
        raise ValueError("an image and a video were given; a video begins with one")
    if size.frames <= clips.shape[1]:
        raise ValueError(
            f"{size.frames} frames were asked for, but the video that is continued has "
            f"{clips.shape[1]}; ask for more than that"
        )
    if len(clips) not in (1, prompts):
        raise ValueError(
            f"{len(clips)} videos for {prompts} prompts; give one for each, or a "
            "single one for all"
        )


def _each(negative: str | Sequence[str], count: int) -> list[str]:
    """A negative prompt for every prompt."""
    if isinstance(negative, str):
        return [negative] * count
    if len(negative) != count:
        raise ValueError(
            f"{len(negative)} negative prompts for {count} prompts; give one for each, "
            "or a single string for all"
        )
    return list(negative)


def _steps(steps: Steps | None, cfg: ModelConfig) -> tuple[int, ...] | None:
    if isinstance(steps, int):
        return (steps,) * len(cfg.stages)
    return None if steps is None else tuple(steps)


def not_none(choices: dict[str, Any]) -> dict[str, Any]:
    """The choices that are made."""
    return {name: value for name, value in choices.items() if value is not None}
