# SPDX-License-Identifier: Apache-2.0
"""Trains adapters (LoRA) of a model, or continues such a run.

    pyramid-jax lora --config=lora:tiny --workdir=runs/style --start=MODEL
    pyramid-jax lora --config=lora:mmdit_384p --show_config
    pyramid-jax sample --model=MODEL --lora=runs/style/lora.safetensors --prompt="..."

The weights of the model (--start) stay as they are; what is trained is a small file
beside them. The config's section `lora` says its rank and its layers, everything else
is as in training; set entries as in --config.lora.rank=32.
"""

from functools import partial

from absl import flags

from launch import cluster, start, train
from pyramid_jax.finetune import finetune

if __name__ == "__main__":
    for module in (train, cluster):
        flags.adopt_module_key_flags(module)
    start.run(partial(train.run, finetune, "lora"), headings=train.HEADINGS)
