# SPDX-License-Identifier: Apache-2.0
"""The newcomer's walk: commands at a home of their own, with a clock."""

from pathlib import Path

import pytest

from benchmarks import newcomer


def test_a_command_is_timed_at_home_and_one_that_fails_says_so(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    times = newcomer.took("pwd > $HOME/here", tmp_path, home)
    assert (home / "here").read_text().strip() == str(tmp_path)
    assert times["seconds"] >= 0 and times["cpu_seconds"] >= 0
    with pytest.raises(ValueError, match="false failed"):
        newcomer.took("false", tmp_path, home)
