# SPDX-License-Identifier: Apache-2.0
"""`make setup` takes the newest Python that runs, and the packages pinned for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("python3.13", "python3.12", "python3")
SHIM = """#!/bin/sh
echo "$0: command not found"
exit 127
"""
# An interpreter of another version, which notes the commands that it is given.
FAKE = """#!/bin/sh
echo "{name} $*" >> {folder}/log
case "$1 $2 $3" in
"-c "*) exec {real} -c "import collections, sys
sys.version_info = collections.namedtuple('Version', 'major minor')(3, {minor})
$2" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip freeze") printf 'audioop-lts==1.0\\njax==9.9\\n' ;;
esac
"""


@pytest.fixture
def folder(tmp_path):
    """A checkout in which nothing can be installed, and shims alone on the path."""
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
    (tmp_path / "requirements").mkdir()
    for lock in (ROOT / "requirements").glob("*.lock"):
        (tmp_path / "requirements" / lock.name).write_text("# How to renew.\njax==1\n")
    for name in NAMES:
        command(tmp_path, name, SHIM)
    return tmp_path


def command(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def interpreter(folder: Path, name: str, minor: int) -> None:
    text = FAKE.format(name=name, folder=folder, real=sys.executable, minor=minor)
    command(folder, name, text)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make in the folder, whatever make the tests were started by."""
    return subprocess.run(
        ["make", f"--file={ROOT / 'Makefile'}", *arguments],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("run", "chosen", "lock"),
    [
        ({"python3.13": 13, "python3.12": 12, "python3": 11}, "python3.13", 12),
        ({"python3.12": 12, "python3": 11}, "python3.12", 12),
        ({"python3": 11}, "python3", 11),
        ({"python3": 14}, "python3", 12),
    ],
)
def test_setup_takes_the_newest_python_that_runs(folder, run, chosen, lock):
    for name, minor in run.items():
        interpreter(folder, name, minor)
    done = make(folder, "setup")
    assert done.returncode == 0, done.stderr
    log = (folder / "log").read_text()
    assert f"{chosen} -m venv .venv\n" in log
    assert f"--requirement requirements/python3.{lock}.lock\n" in log


def test_another_python_can_be_named(folder):
    interpreter(folder, "python3.12", 12)
    interpreter(folder, "python-of-mine", 11)
    assert make(folder, "setup", "PYTHON=python-of-mine").returncode == 0
    log = (folder / "log").read_text()
    assert "python-of-mine -m venv .venv\n" in log
    assert "python3.12 -" not in log


def test_a_python_that_is_too_old_is_refused(folder):
    interpreter(folder, "python3", 10)
    done = make(folder, "setup")
    assert done.returncode != 0
    assert "python3 is Python 3.10, 3.11 or newer is needed" in done.stderr
    assert "-m venv" not in (folder / "log").read_text()


@pytest.mark.parametrize(("minor", "lock"), [(11, 11), (13, 12)])
def test_lock_writes_the_lock_of_the_environment(folder, minor, lock):
    interpreter(folder, "python3", minor)
    assert make(folder, "setup").returncode == 0
    assert make(folder, "lock").returncode == 0
    for path in (folder / "requirements").iterdir():
        new = 'audioop-lts==1.0; python_version >= "3.13"\njax==9.9\n'
        pins = new if path.name == f"python3.{lock}.lock" else "jax==1\n"
        assert path.read_text() == f"# How to renew.\n{pins}"
