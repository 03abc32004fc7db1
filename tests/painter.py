# SPDX-License-Identifier: Apache-2.0
"""A model without weights, for tests of what stands around a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from configs import tiny_latent
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.model import SampleConfig, model_config
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.video import Size, VideoPipeline

LAST = Progress(unit=3, units=4, stage=1, stages=2, step=5, steps=6, done=1.0)


@dataclass(frozen=True)
class Painter(VideoPipeline):
    """The embedded model without weights: videos are one colour, the seed's."""

    def text_to_video(
        self, prompts: str | Sequence[str], size: Size, *, seed: int = 0, **choices: Any
    ) -> UInt8[np.ndarray, "b f h w 3"]:
        if self.watch is not None:
            self.watch(LAST._replace(step=4))
            self.watch(LAST)
        shape = (len(prompts), size.frames, size.height, size.width, 3)
        return np.full(shape, seed % 256, np.uint8)


def painter() -> Painter:
    cfg = model_config(tiny_latent.get_config().model.to_dict())
    options = SampleConfig(
        first_steps=(10, 10),
        video_steps=(6, 6),
        image_guidance=1.5,
        sizes=((32, 32, 7), (32, 64, 5)),
        fps=8.0,
    )
    return Painter(cfg, None, load_tokenizer(cfg.tokenizer), options, name="painter")
