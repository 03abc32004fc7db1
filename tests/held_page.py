# SPDX-License-Identifier: Apache-2.0
"""The web page as it is started, except that its videos wait where a test says.

A file `hold` among the results has the beginning of a step's name, such as
"unit 2/9": a video that has come there goes on when the file says something else, or is
gone. So a test sees a video that is half made for as long as it needs, however busy the
machine is.
"""

import runpy
import time
from typing import Any

from launch.sample.outputs import Job, Render
from launch.web.service import VideoService
from pyramid_jax.pipeline.denoise import Progress, StepCallback

_make = VideoService.make


def make(self: VideoService, job: Job, on_step: StepCallback, *others: Any) -> Render:
    """What `VideoService.make` does, in its own time."""

    def held(progress: Progress) -> None:
        on_step(progress)
        while str(progress).startswith(_held(self)):
            time.sleep(0.05)

    return _make(self, job, held, *others)


def _held(service: VideoService) -> str:
    try:
        return (service.folder / "hold").read_text()
    except FileNotFoundError:
        return "no step"


if __name__ == "__main__":
    VideoService.make = make
    runpy.run_module("launch.web", run_name="__main__", alter_sys=True)
