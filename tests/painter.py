# SPDX-License-Identifier: Apache-2.0
"""A model without weights, for tests of what stands around a model."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from configs import pairs
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.model import SampleConfig, model_config
from pyramid_jax.pipeline.denoise import Progress, StepCallback
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.request import VideoRequest
from pyramid_jax.pipeline.video import VideoPipeline

LAST = Progress(3, 4, 1, 2, 5, 6, 1.0, jnp.zeros(1))


@dataclass(frozen=True)
class Painter(VideoPipeline):
    """The embedded model without weights: videos are one colour, the seed's."""

    def run(
        self,
        request: VideoRequest,
        *,
        output: str = "uint8",
        callback_on_step_end: StepCallback | None = None,
    ) -> VideoOutput:
        if callback_on_step_end is not None:
            callback_on_step_end(LAST._replace(step=4))
            callback_on_step_end(LAST)
        size, prompts = request.size, request.prompts
        shape = (len(prompts), size.frames, size.height, size.width, 3)
        frames = np.full(shape, request.seed % 256, np.uint8)
        return VideoOutput(frames, prompts, request.seed, self.defaults.fps)

    def streamed(
        self,
        request: VideoRequest,
        *,
        callback_on_step_end: StepCallback | None = None,
    ) -> Iterator[np.ndarray]:
        whole = self.run(request, callback_on_step_end=callback_on_step_end).frames
        yield from np.split(whole, [1], axis=1)


def painter() -> Painter:
    section = pairs.get_config().model
    with section.unlocked():
        section.update(edges=(0.0, 0.5, 1.0))
    section.latent.temporal = 2
    cfg = model_config(section.to_dict())
    options = SampleConfig(
        first_steps=(10, 10),
        video_steps=(6, 6),
        image_guidance=1.5,
        sizes=((32, 32, 7), (32, 64, 5)),
        fps=8.0,
    )
    return Painter(cfg, None, load_tokenizer(cfg.tokenizer), options, name="painter")
