# SPDX-License-Identifier: Apache-2.0
"""Makes files batch after batch, and shows how far it is."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from launch.sample import outputs
from launch.sample.lists import batches
from launch.sample.outputs import Job
from pyramid_jax.pipeline.denoise import Progress, StepCallback
from pyramid_jax.pipeline.video import VideoPipeline

# Time is left to tell once everything is compiled.
COMPILING = "{n:.2f}/{total} |{bar:20}| {elapsed}, compiling{postfix}"
BAR = "{n:.2f}/{total} |{bar:20}| {elapsed}<{remaining}{postfix}"


def run(pipeline: VideoPipeline, jobs: Sequence[Job], batch: int) -> None:
    """Makes all files, as many together as can be, and shows the progress."""
    groups = list(batches(jobs, batch))
    if len(groups) > -(-len(jobs) // batch):
        print(
            f"{len(jobs)} videos are made in {len(groups)} batches: those of one batch "
            "have one size, one first frame, the same choices, and seeds that count up"
        )
    run_groups(pipeline, groups)


def run_groups(pipeline: VideoPipeline, groups: Sequence[Sequence[Job]]) -> None:
    """Makes the files of each group together, and shows the progress."""
    every = 0.1 if sys.stderr.isatty() else 30.0
    total = sum(map(len, groups))
    with tqdm(total=total, bar_format=COMPILING, smoothing=0, mininterval=every) as bar:
        for group in groups:
            begun = bar.n
            for render in outputs.make(pipeline, group, progress_bar(bar, len(group))):
                bar.write(str(render.path))
            bar.update(begun + len(group) - bar.n)


def progress_bar(bar: tqdm, videos: int) -> StepCallback:
    """Moves a bar that counts videos after every step of so many of them."""
    begun = bar.n

    def step(progress: Progress) -> None:
        bar.set_postfix_str(str(progress), refresh=False)
        bar.update(begun + progress.done * videos - bar.n)
        last_shape = progress.unit > 0 or progress.units == 1
        if last_shape and progress.stage == progress.stages - 1:
            _tell_time_left(bar)

    return step


def _tell_time_left(bar: tqdm) -> None:
    """Tells it by the speed from now on; what compiling took says nothing."""
    if bar.bar_format != BAR:
        bar.bar_format, bar.initial, bar.start_t = BAR, bar.n, time.time()
