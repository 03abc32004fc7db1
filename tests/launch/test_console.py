# SPDX-License-Identifier: Apache-2.0
"""A new user's commands, from an installed wheel, in a folder of his own."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from launch import moving_shapes
from pyramid_jax.__main__ import COMMANDS
from pyramid_jax.data.video_io import read_video, write_video
from tests.house.sources import INSTALLED, ROOT

SHIPPED = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
# These have argparse instead of absl's flags.
ARGPARSE = ("parity", "compile")

Console = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in INSTALLED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in SHIPPED:
        shutil.copy(ROOT / name, source)
    pip("wheel", ".", "--no-build-isolation", "--wheel-dir=dist", cwd=source)
    return next(source.glob("dist/*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", f"--target={folder}", str(wheel), cwd=folder)
    return folder


@pytest.fixture
def console(site: Path, tmp_path: Path) -> Console:
    """Runs the installed command in an empty folder."""
    one_device = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "XLA_FLAGS": one_device,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "tests"),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [site / "bin" / "pyramid-jax", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


def pip(*arguments: str, cwd: Path) -> None:
    """Runs pip; it asks no index for anything."""
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", *arguments, *options]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wheel_adds_one_package_with_all_its_files(wheel: Path):
    with zipfile.ZipFile(wheel) as file:
        names = {Path(name) for name in file.namelist()}
    top = {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")}
    assert top == {"pyramid_jax"}
    inside = Path("pyramid_jax", "_programs")
    for name in INSTALLED:
        target = Path() if name == "pyramid_jax" else inside
        kinds = "*.py", "*.json", "*.html", "*.txt"
        sources = [path for kind in kinds for path in (ROOT / name).rglob(kind)]
        assert {target / path.relative_to(ROOT) for path in sources} <= names


def test_help_lists_every_command_in_a_line(console: Console):
    done = console("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = re.findall(r"^  ([\w-]+) +([A-Z].*)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in lines] == list(COMMANDS)
    assert all(len(text) < 80 and text[-1] in ".?" for _, text in lines)
    assert console().stdout == done.stdout


def test_every_program_is_a_command():
    files = [*(ROOT / "launch").glob("*.py"), *(ROOT / "launch").glob("*/__main__.py")]
    programs = [path for path in files if "\nif __name__ ==" in path.read_text()]
    names = {p.stem if p.parent.name == "launch" else p.parent.name for p in programs}
    assert {name.replace("_", "-") for name in names} == set(COMMANDS)


def test_an_unknown_command_is_one_line(console: Console):
    done = console("sing", "--loud")
    assert done.returncode and not done.stdout
    assert re.fullmatch(r"pyramid-jax: .*'sing'; use one of demo, .*\n", done.stderr)


def test_help_of_a_command_is_sentences_in_groups(console: Console):
    done = console("sample", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: pyramid-jax sample")
    options = done.stdout.partition("\n--")[0]
    assert "\nwhat to make:\n" in options and "--prompt TEXT" in options
    assert "absl" not in options


def test_videos_are_made_from_the_installed_wheel(console: Console, tmp_path: Path):
    prompt = "a red circle moves left"
    options = ["--frames=1", "--steps=2", "--to=out"]
    done = console("sample", f"--prompt={prompt}", *options)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_configs_of_the_wheel_are_found_by_name_and_import_each_other(
    console: Console, site: Path, tmp_path: Path
):
    own = tmp_path / "mine.py"
    own.write_text(
        "from configs import base, tiny\n"
        "def get_config(mode='full'):\n"
        "    cfg = tiny.get_config(mode)\n"
        "    cfg.data.manifest = base.__file__\n"
        "    return cfg\n"
    )
    done = console("train", "--config=mine.py:smoke", "--show_config")
    assert done.returncode == 0, done.stderr
    inside = site / "pyramid_jax" / "_programs" / "configs" / "base.py"
    assert f"--config.data.manifest={inside}" in done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "sample"])
def test_every_command_has_help(command: str):
    done = module(f"launch.{command.replace('-', '_')}", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: pyramid-jax {command} ")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ARGPARSE])
def test_what_options_mean_is_said_in_sentences(command: str):
    done = module(f"launch.{command.replace('-', '_')}", "--help")
    groups = done.stdout[re.search(r"^[\w ,]+:\n  -", done.stdout, re.M).start() :]
    options = re.split(r"\n +(?=--)", groups)[1:]
    texts = [" ".join(re.split(r"\s{2,}", x, maxsplit=1)[1].split()) for x in options]
    assert texts and all(re.match(r"[A-Z].*\.", text) for text in texts)


@pytest.mark.slow
def test_a_model_is_trained_from_the_installed_wheel(console: Console, tmp_path: Path):
    steps = [
        ("prepare", "--embedded", "--clips=16", "--to=data/shapes"),
        ("train", "--config=tiny:smoke", "--workdir=runs/a", "--config.data.workers=1"),
        ("train-vae", "--config=pairs_vae:smoke", "--workdir=runs/vae"),
        ("evaluate", "--captions=2", "--batch=2", "--model=pyramid_jax/assets/tiny"),
    ]
    for step in steps:
        done = console(*step)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "a" / "model" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_own_videos_become_a_model_as_readme_says(console: Console, tmp_path: Path):
    section = (ROOT / "README.md").read_text().partition("**Train on a folder of clips")
    block = section[2].split("```")[1].replace("\\\n", " ")
    clips = tmp_path / "clips"
    for i, caption in enumerate(moving_shapes.captions()[:12]):
        video = moving_shapes.render(caption, np.random.default_rng(i))
        write_video(clips / f"{i}.mp4", video, 8)
        (clips / f"{i}.txt").write_text(caption.text)
    lines = [line for line in block.splitlines() if line.startswith("pyramid-jax")]
    assert len(lines) == 3
    for line in lines:
        words = re.findall(r'(?:[^\s"]|"[^"]*")+', line)[1:]
        words = [word.replace('"', "") for word in words]
        words = ["--config=tiny:smoke" if w == "--config=tiny" else w for w in words]
        done = console(*words)
        assert done.returncode == 0, done.stderr
    made = next((tmp_path / "runs" / "sample").glob("*.mp4"))
    assert len(read_video(made, (256, 256), 3, 8.0)) == 3


def module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of the checkout as a module."""
    command: Sequence[str] = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
