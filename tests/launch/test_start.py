# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled programs is on in commands, where the user has not decided."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from launch import start

FOLDER = "jax_compilation_cache_dir"


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No cache is configured, and the folder of caches is a new one."""
    before = jax.config.values[FOLDER]
    jax.config.update(FOLDER, None)
    monkeypatch.setenv(start.CACHES, str(tmp_path))
    yield
    jax.config.update(FOLDER, before)


def test_programs_are_kept_in_the_users_folder_of_caches(tmp_path: Path):
    start.enable()
    assert jax.config.values[FOLDER] == str(tmp_path / "pyramid_jax" / "programs")


def test_without_a_folder_of_caches_it_is_the_one_in_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv(start.CACHES)
    monkeypatch.setenv("HOME", str(tmp_path))
    start.enable()
    there = tmp_path / ".cache" / "pyramid_jax" / "programs"
    assert jax.config.values[FOLDER] == str(there)


def test_a_folder_that_the_user_chose_stays():
    jax.config.update(FOLDER, "mine")
    start.enable()
    assert jax.config.values[FOLDER] == "mine"


def test_a_user_who_wants_no_cache_gets_none():
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        start.enable()
        assert jax.config.values[FOLDER] is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_programs_that_a_process_compiles_are_in_its_folder(tmp_path: Path):
    script = (
        "import jax\n"
        "from launch import start\n"
        "start.enable()\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x + 1)(1.0)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert list((tmp_path / "pyramid_jax" / "programs").glob("*-cache"))
