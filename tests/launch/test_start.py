# SPDX-License-Identifier: Apache-2.0
"""What commands have in common: flags, messages, and the cache of compiled programs."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from launch import start
from pyramid_jax import programs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "jax_compilation_cache_dir"
SHORTEST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No cache is configured, and the folder of caches is a new one."""
    before = {name: jax.config.values[name] for name in (FOLDER, SHORTEST)}
    jax.config.update(FOLDER, None)
    monkeypatch.setenv(start.CACHES, str(tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    programs.keep(None)


def test_programs_are_kept_in_the_users_folder_of_caches(tmp_path: Path):
    start.enable_compile_cache()
    assert jax.config.values[FOLDER] == str(tmp_path / "pyramid_jax" / "programs")


def test_without_a_folder_of_caches_it_is_the_one_in_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv(start.CACHES)
    monkeypatch.setenv("HOME", str(tmp_path))
    start.enable_compile_cache()
    folder = tmp_path / ".cache" / "pyramid_jax" / "programs"
    assert jax.config.values[FOLDER] == str(folder)


def test_a_folder_that_the_user_chose_stays():
    jax.config.update(FOLDER, "mine")
    start.enable_compile_cache()
    assert jax.config.values[FOLDER] == "mine"


def test_a_user_who_wants_no_cache_gets_none():
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        start.enable_compile_cache()
        assert jax.config.values[FOLDER] is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_programs_that_a_process_compiles_are_in_its_folder(tmp_path: Path):
    script = (
        "import jax\n"
        "from launch import start\n"
        "start.enable_compile_cache()\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x + 1)(1.0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert list((tmp_path / "pyramid_jax" / "programs").glob("*-cache"))


COMMAND = """
import jax
from absl import flags
from launch import start
from pyramid_jax import programs

def main(values):
    print(values.to)
    if values.to == "nowhere":
        raise ValueError("nowhere is no folder; give another --to")
    if values.to == "missing":
        open("missing/file")
    if values.to == "full":
        with open("/dev/full", "w") as file:
            file.write("a" * 100_000)
    if values.to == "logs":
        import logging, transformers
        logging.getLogger("pyramid_jax.kernels.attention").info("attention over rows")
        logging.getLogger("pyramid_jax.data").warning("skipped a.mp4")
        logging.getLogger("absl").warning("a type handler is overridden")
        jax.devices()
    if values.to == "memory":
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\\nat")
    if values.to == "bug":
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

def define(flag_values):
    flags.DEFINE_string("to", "runs", "folder", flag_values=flag_values)
    flags.DEFINE_float("fps", 8, "rate", lower_bound=0, flag_values=flag_values)

start.run(main, define)
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a command with these arguments."""
    parts = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(parts, capture_output=True, text=True)


def test_a_command_gets_its_flags():
    done = command("--to=here")
    assert (done.returncode, done.stdout) == (0, "here\n")


def test_a_wrong_value_becomes_one_line_and_exit_code_1():
    done = command("--to=nowhere")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.endswith(": nowhere is no folder; give another --to\n")
    assert "Traceback" in command("--to=nowhere", "--verbose").stderr


def test_numbers_that_are_not_finite_are_refused():
    for number in ("nan", "inf"):
        done = command(f"--fps={number}")
        assert done.returncode == 1 and not done.stdout
        said = f"flag --fps={number}: expected a finite number; see --help\n"
        assert done.stderr.endswith(said) and len(done.stderr.splitlines()) == 1


def test_a_full_memory_is_one_line_and_a_bug_is_not():
    done = command("--to=memory")
    assert done.returncode == 1
    assert "Out of memory.; work on fewer or smaller videos" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" in command("--to=memory", "--verbose").stderr
    assert "Traceback" in command("--to=bug").stderr


def test_arguments_that_are_no_flags_are_refused():
    done = command("--to=here", "there")
    assert done.returncode == 1 and not done.stdout.startswith("here")
    assert "unknown arguments ['there']; see --help" in done.stdout + done.stderr


def test_the_message_begins_with_the_name_of_the_command(tmp_path: Path):
    parts = [sys.executable, "-m", "launch.reconstruct", f"--model={tmp_path}"]
    parts += ["--input=missing.mp4", f"--to={tmp_path}/out.mp4"]
    done = subprocess.run(parts, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("pyramid-jax reconstruct: ")


def test_missing_files_and_full_disks_are_one_line():
    for to, said in {
        "missing": "missing/file: No such file or directory; correct the path",
        "full": "No space left on device; make room, or write to another disk",
    }.items():
        done = command(f"--to={to}")
        assert done.returncode == 1 and said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert "Traceback" in command("--to=missing", "--verbose").stderr


def test_a_command_says_what_it_does_and_warnings_and_no_more():
    done = command("--to=logs")
    assert (done.stdout, done.stderr) == ("logs\n", "skipped a.mp4\n")
    told = command("--to=logs", "--verbose").stderr
    assert "attention over rows" in told and "compiled programs are kept" in told


def test_a_folder_that_takes_no_files_is_refused(tmp_path: Path):
    start.check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "a", Path("/proc/nope")):
        with pytest.raises(ValueError, match="nothing can be written to the folder"):
            start.check_writable(folder)
