# SPDX-License-Identifier: Apache-2.0
"""Two small folders of clips: grey ones in the first, brighter ones in the second."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.sample import outputs
from launch.sample.lists import file_name
from launch.sample.outputs import Job
from tests.painter import painter

PROMPTS = ("a red circle moves left", "a green star moves up", "a blue ring moves down")
GREY, BRIGHT = 60, 180  # the first clip's seed, which is its brightness


def write_clips(folder: Path, seed: int, prompts: Sequence[str] = PROMPTS) -> Path:
    """A clip of every prompt in the brightness of its seed; seeds count up."""
    model = painter()
    for i, prompt in enumerate(prompts):
        request = model.request(prompt, num_frames=3, seed=seed + i)
        path = folder / file_name(i, prompt, seed + i, "mp4")
        outputs.make(model, [Job(request, path, scale=4)])
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return write_clips(folder / "elder", GREY), write_clips(folder / "younger", BRIGHT)
