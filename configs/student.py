# SPDX-License-Identifier: Apache-2.0
r"""A student of any model: one or two steps per stage, and no second branch.

    pyramid-jax distill --config=student:pairs --workdir=runs/pairs_student \
        --start=runs/pairs/model
    pyramid-jax distill --config=student:mmdit_384p --workdir=runs/mmdit_student \
        --start=models/sd3_384p --config.data.manifest=data/latents_384p/manifest.jsonl
    pyramid-jax distill --config=student:smoke --workdir=runs/smoke --start=TINY

What follows the colon is the config that the teacher was trained with: the student has
its data, network and devices. The teacher's frozen weights, and their average, take 8
bytes per weight more than training does. Nobody has distilled a released model.
"""

from typing import Any

from configs import base


def get_config(teacher: str = "pairs") -> Any:
    """The config of a teacher's student; `smoke` is a minute on a laptop."""
    cfg, mode = base.named(teacher)
    stages = len(cfg.model.edges) - 1
    with cfg.unlocked():
        # pyramid_jax.reflow.ReflowConfig
        cfg.teacher = {
            "steps": 4,
            "guidance": dict(cfg.sample.guidance),
            "at_start": 0.5,
        }
    # One step per stage, and the one of 0.001 that is left out.
    cfg.sample.update(
        first_steps=(2,) * stages, video_steps=(2,) * stages, last_step=False
    )
    cfg.sample.guidance.update(first=0.0, video=0.0)
    with cfg.unlocked():
        cfg.sample.image_guidance = None
    cfg.data.dropout = 0.0
    if mode == "full":
        base.fine_tune(cfg, steps=1500)
    return cfg
