# SPDX-License-Identifier: Apache-2.0
"""Two checkouts are compared byte by byte, and nothing is the same by accident."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import same_bytes
from benchmarks.same_bytes import Case, Outcome

VIDEO = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
ONE = Outcome({"a.npz": VIDEO})


def test_equal_frames_are_the_same():
    assert not same_bytes.difference(ONE, Outcome({"a.npz": VIDEO.copy()}))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Outcome({"a.npz": VIDEO ^ 1}), "12 of 12 bytes differ"),
        (Outcome({"a.npz": VIDEO[..., :1]}), r"uint8\[1, 2, 2, 1\]"),
        (Outcome({"b.npz": VIDEO}), "NEW .'b.npz'"),
        (Outcome({}, "unknown flag"), "NEW failed: unknown flag"),
    ],
)
def test_a_difference_is_told(other: Outcome, message: str):
    with pytest.raises(AssertionError, match=message):
        assert not same_bytes.difference(ONE, other), same_bytes.difference(ONE, other)


def test_two_checkouts_that_write_nothing_are_not_the_same():
    assert same_bytes.difference(Outcome({}), Outcome({}))


def test_flags_get_the_names_of_the_newer_checkout():
    flags = ["--seed=1", "--negative=a=b", "--last_step"]
    renamed = same_bytes.renamed(flags, {"negative": "negative_prompt"})
    assert renamed == ["--seed=1", "--negative_prompt=a=b", "--last_step"]


def test_a_command_that_fails_says_why(tmp_path: Path):
    case = Case("wrong", "launch.demo", ["--sed=1"])
    outcome = same_bytes.run(case, same_bytes.ROOT, tmp_path / "out")
    assert not outcome.files and "sed" in outcome.error
