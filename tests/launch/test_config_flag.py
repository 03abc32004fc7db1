# SPDX-License-Identifier: Apache-2.0
"""A config is found by its name or path; what is wrong with it is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.config_flag import ConfigParser, names
from pyramid_jax.config import asset_path
from pyramid_jax.pipeline.folder import TINY
from tests.house.sources import ROOT

PARSER = ConfigParser("config")


def test_a_config_that_ships_has_a_name():
    by_path = PARSER.parse(str(ROOT / "configs" / "tiny.py:smoke"))
    assert PARSER.parse("tiny:smoke") == by_path != PARSER.parse("tiny")
    assert {"tiny", "vae", "mmdit_768p"} <= set(names())
    assert not {"base", "__init__"} & set(names())
    assert by_path.is_locked


def test_a_name_or_file_that_is_not_there_is_refused_with_the_names_that_are():
    for missing in ("tinny", "configs/tinny.py", "base", str(ROOT / "configs")):
        with pytest.raises(ValueError, match=f"no config '{missing}'.* of ablations, "):
            PARSER.parse(missing)


def test_a_file_that_is_no_config_is_refused(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def config(): ...")
    with pytest.raises(ValueError, match="has no function get_config"):
        PARSER.parse(str(file))


def test_a_mistake_inside_a_config_is_none_in_a_flag(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import tiny\n"
        "def get_config():\n"
        "    cfg = tiny.get_config()\n"
        "    cfg.data.bach = 2\n"
    )
    with pytest.raises(RuntimeError, match="can't be made") as caught:
        PARSER.parse(str(file))
    assert "bach" in str(caught.value.__cause__)


def test_files_that_ship_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert asset_path("pyramid_jax/assets/tiny") == TINY
    assert asset_path("pyramid_jax/tiny") == Path("pyramid_jax/tiny")
    here = tmp_path / "pyramid_jax" / "assets" / "tiny"
    here.mkdir(parents=True)
    assert asset_path("pyramid_jax/assets/tiny").resolve() == here


MISTAKES = {
    ("--config=tiny", "--config.data.bach=2"): "no entry 'bach'; did you mean 'batch'?",
    ("--workdir=runs/a",): "--config is missing",
    ("--config=tinny", "--workdir=runs/a"): "there is no config 'tinny'",
    ("--config=tiny:fast", "--workdir=runs/a"): "unknown mode 'fast'",
    ("--config=tiny:smoke",): "--workdir is missing",
    ("--config=pairs_vae", "--workdir=runs/a"): "is for pyramid-jax train-vae",
    ("--config=tiny", "--wrkdir=runs/a"): "Unknown command line flag 'wrkdir'",
    ("--config=tiny", "runs/a"): "unknown arguments ['runs/a']",
}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line(arguments: tuple[str, ...]):
    command = [sys.executable, "-m", "pyramid_jax", "train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("pyramid-jax train: ") and MISTAKES[arguments] in line
