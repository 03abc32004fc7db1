# SPDX-License-Identifier: Apache-2.0
r"""Fine-tunes any model to read history and text at time 0, once per stage.

    pyramid-jax train --config=clean_history:pairs --workdir=runs/pairs_clean \
        --start=runs/pairs/model
    pyramid-jax train --config=clean_history:mmdit_768p --workdir=runs/mmdit_clean \
        --start=models/sd3_768p --config.data.manifest=data/latents_768p/manifest.jsonl
    pyramid-jax train --config=clean_history:smoke --workdir=runs/smoke --start=TINY

What follows the colon is the config that the model was trained with: data, network and
devices stay as they are, and so does the noise in the history. A step of sampling then
reads current tokens only, but the first of every stage. Nobody has tuned a model so.
"""

from typing import Any

from configs import base


def get_config(model: str = "pairs") -> Any:
    """The config of a model's fine-tuning; `smoke` is a minute on a laptop."""
    cfg, mode = base.named(model)
    with cfg.unlocked():
        cfg.model.dit.clean_history = True
    if mode == "full":
        base.fine_tune(cfg, steps=3000)
    return cfg
