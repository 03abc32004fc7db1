# SPDX-License-Identifier: Apache-2.0
"""Trains a student that samples in few steps, or continues such a run.

    pyramid-jax distill --config=student:pairs --workdir=runs/pairs_student \\
        --start=runs/pairs/model
    pyramid-jax distill --config=student:mmdit_384p --show_config

The student starts from the weights of its teacher (--start) and learns to go in one
step where the teacher goes in several, guided. The config's section `teacher` tells how
it goes, everything else is as in training; set entries as in --config.teacher.steps=6.
"""

from functools import partial

from absl import flags

from launch import cluster, start, train
from pyramid_jax.distill import distill

if __name__ == "__main__":
    for module in (train, cluster):
        flags.adopt_module_key_flags(module)
    start.run(partial(train.run, distill, "teacher"), headings=train.HEADINGS)
