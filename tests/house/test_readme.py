# SPDX-License-Identifier: Apache-2.0
"""Every command of README runs, as it stands there, with the inputs it speaks of.

A walk types some of them one after the other, in a folder that has what a user has:
clips with captions and, in the cache of the hub, a released model, which is small here.
What takes long gets flags behind the command; nothing else is changed. Commands that no
walk types have a file that runs them, or what they start: CI ends with `make test`, and
a slow test makes the videos of `make demo`.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks import newcomer
from launch import moving_shapes
from pyramid_jax.data.video_io import read_video, video_info, write_video
from tests import original_files
from tests.house.documents import README, commands, run
from tests.house.sources import ROOT

# The environment of `make test-compile`; another one has no compilers.
COMPILERS = ROOT / ".venv-compile" / "bin" / "python"
CLIPS = 4
FEW_STEPS = f"{newcomer.SHORT} --config.loop.steps=5 --config.loop.sample_every=0"
# Flags behind commands that begin so. The last one of a name counts.
SHORTER = {
    "pyramid-jax train": FEW_STEPS,
    "pyramid-jax lora": FEW_STEPS,
    "pyramid-jax sample --model=models/": "--steps=1 --video_steps=1",
    "pyramid-jax evaluate --captions=": "--captions=2 --batch=2",
}


class Walk(NamedTuple):
    """Commands by their beginnings, and what is there when they have run.

    Args:
        says: what they print, among other things.
        videos: frames, height and width of the one sample that fits a pattern.
        files: patterns of other files.
        python: the interpreter that runs them.
    """

    commands: tuple[str, ...]
    says: tuple[str, ...] = ()
    videos: Mapping[str, tuple[int, int, int]] = MappingProxyType({})
    files: tuple[str, ...] = ()
    python: Path = Path(sys.executable)


WALKS = {
    "sample": Walk(
        ("pyramid-jax sample --prompt=",),
        videos={"*red_circle*.mp4": (33, 256, 256)},
    ),
    "convert": Walk(
        ("pyramid-jax convert", "pyramid-jax sample --model=models/"),
        says=("76 tensors", "all fits"),
        videos={"*lighthouse*.mp4": (121, 384, 640)},
    ),
    "train": Walk(
        (
            *("pyramid-jax prepare", "pyramid-jax train", "pyramid-jax lora"),
            "pyramid-jax sample --model=runs/mine/model",
            "pyramid-jax sample --model=pyramid_jax/assets/tiny --lora=",
        ),
        videos={"*waves*.mp4": (8, 256, 256), "*red_circle*.mp4": (8, 32, 32)},
        files=(
            *("runs/*/metrics.jsonl", "runs/*/loss.png", "runs/mine/model/config.json"),
            "runs/style/lora*.safetensors",
        ),
    ),
    "evaluate": Walk(
        ("pyramid-jax evaluate --captions=", "pyramid-jax evaluate --videos="),
        says=("| 2 captions |", "| chance |", f"| {CLIPS} clips |", "| colour drift |"),
    ),
    "memory": Walk(("pyramid-jax memory",), says=("decoding", "reuse keys and values")),
    "compile": Walk(
        ("pyramid-jax compile",),
        says=("on v5p:4x4x4: 64 devices", "it fits"),
        python=COMPILERS,
    ),
}
# Other commands, also those in sentences: the file that runs them, and how it does.
ELSEWHERE = {
    "make demo": ("tests/pipeline/test_video.py", "demo.make(model, tmp_path"),
    "make docs": (".ci/run", "make docs"),
    "make parity": ("tests/launch/test_parity.py", "GOLDEN"),
    "make test": (".ci/run", "make test"),
    "make web": ("tests/page_server.py", '"launch.web"'),
    "pip install": ("tests/launch/test_console.py", 'pip("install"'),
    "pyramid-jax --help": ("tests/launch/test_console.py", 'console("--help")'),
    "python -m docs.pictures": ("tests/house/test_pictures.py", "pictures.drawing()"),
}
IN_SENTENCES = re.compile(r"`((?:make|pip|python|pyramid-jax) [^`\n]+)`")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: clips, each with a text file of the same name beside it."""
    clips = tmp_path / "clips"
    for i, caption in enumerate(moving_shapes.captions()[:CLIPS]):
        video = moving_shapes.render(caption, np.random.default_rng(i))
        write_video(clips / f"{i}.mp4", video, 8)
        (clips / f"{i}.txt").write_text(caption.text)
    return tmp_path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for a cache of the hub with a released model, but no network."""
    cache, commit = tmp_path_factory.mktemp("hub"), "0" * 40
    model = cache / "models--rain1011--pyramid-flow-miniflux"
    original_files.write(model / "snapshots" / commit, "miniflux")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def typed(line: str) -> str:
    """The command with the flags that make it short."""
    more = [flags for begin, flags in SHORTER.items() if line.startswith(begin)]
    return " ".join([line, *more])


def shape(path: Path) -> tuple[int, ...]:
    """Frames, height and width of a video, all of which is decoded."""
    info = video_info(path)
    size = info.height, info.width
    return read_video(path, size, info.frames, info.fps).shape[:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKS)
def test_commands_run(name: str, folder: Path, hub: dict[str, str]):
    walk = WALKS[name]
    if not walk.python.exists():
        pytest.skip("needs the compilers that `make test-compile` installs")
    lines = [typed(x) for x in commands(README) if x.startswith(walk.commands)]
    said = run(lines, folder, python=walk.python, more=hub)
    assert [text for text in walk.says if text not in said] == []
    for pattern, size in walk.videos.items():
        made = (folder / "runs" / "sample").glob(pattern)
        assert [*map(shape, made)] == [size], pattern
    for pattern in walk.files:
        files = [*folder.glob(pattern)]
        assert files and all(file.stat().st_size for file in files), pattern


def test_every_command_has_one_test():
    sentences = IN_SENTENCES.findall(README.read_text(encoding="utf-8"))
    lines = [*commands(README), *sentences]
    walks = [begin for walk in WALKS.values() for begin in walk.commands]
    for begin in (*walks, *ELSEWHERE, *SHORTER):
        assert any(line.startswith(begin) for line in lines), f"no {begin}"
    for line in lines:
        tests = [begin for begin in (*walks, *ELSEWHERE) if line.startswith(begin)]
        assert len(tests) == 1, f"{line!r} has {len(tests)} tests"
    for file, how in ELSEWHERE.values():
        assert how in (ROOT / file).read_text(encoding="utf-8"), f"{file}: no {how}"
