# SPDX-License-Identifier: Apache-2.0
"""Answers are kept, whatever happens to the process that writes them."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.compare.answers import Answer, kept, read_answers
from launch.compare.study import QUESTIONS

ALL_LEFT = dict.fromkeys(QUESTIONS, "left")


def answer(pair: int, rater: str = "anna") -> Answer:
    return Answer(rater, pair, 0, ALL_LEFT)


def write(path: Path, *answers: Answer) -> None:
    with kept(path, 9) as file:
        for each in answers:
            file.add(each)


def test_answers_are_found_again_and_never_rewritten(tmp_path: Path):
    path = tmp_path / "new" / "answers.jsonl"
    write(path, answer(0), answer(3, "zoë"))
    before = path.read_bytes()
    write(path, answer(1))
    assert path.read_bytes().startswith(before)
    assert read_answers(path, 9) == [answer(0), answer(3, "zoë"), answer(1)]
    with kept(path, 9) as file:
        assert (
            len(file) == 3 and file.answered("zoë", 3) and not file.answered("zoë", 0)
        )


def test_the_first_answer_to_a_pair_stays(tmp_path: Path):
    other = answer(0)._replace(choices=dict.fromkeys(QUESTIONS, "same"))
    write(tmp_path / "a.jsonl", answer(0), other)
    assert read_answers(tmp_path / "a.jsonl", 9) == [answer(0)]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_line_that_a_crash_cut_off_is_asked_again(tmp_path: Path, cut: int, caplog):
    path = tmp_path / "a.jsonl"
    write(path, answer(0), answer(1))
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + second[:cut])
    assert read_answers(path, 9) == [answer(0)]
    assert "the last line is not whole; it is asked again" in caplog.text
    write(path, answer(2))
    assert read_answers(path, 9) == [answer(0), answer(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "line 2: found no rater, pair, left, choices; correct the line, or"),
        ({"pair": 9}, "line 2: pair 9, left 0: expected 0 to 8, 0 or 1"),
        ({"pair": True}, "line 2: pair True"),
        ({"left": 2}, "line 2: pair 1, left 2"),
        ({"rater": ""}, "line 2: '' is no name"),
        ({"choices": {"aesthetic quality": "left"}}, "line 2: the answers .* are not"),
        ({"choices": ALL_LEFT | {"motion smoothness": "up"}}, "line 2: the answers"),
        ({"choices": []}, "line 2: the answers"),
        ({"pair": 0}, "line 2: anna has rated pair 0 before"),
    ],
)
def test_a_line_that_is_no_answer_is_named(
    tmp_path: Path, change: dict[str, Any] | None, message: str
):
    path = tmp_path / "a.jsonl"
    write(path, answer(0))
    line = [] if change is None else answer(1)._asdict() | change
    with path.open("a") as file:
        file.write(f"{json.dumps(line)}\n")
    for read in (lambda: read_answers(path, 9), lambda: write(path)):
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"\n", b"[" * 99_999 + b"\n"])
def test_damage_in_the_middle_is_named(tmp_path: Path, damage: bytes):
    path = tmp_path / "a.jsonl"
    write(path, answer(0))
    path.write_bytes(damage + path.read_bytes())
    with pytest.raises(ValueError, match=r"line 1: .*; correct the line, or"):
        read_answers(path, 9)


def test_a_second_process_is_refused(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    with kept(path, 9), pytest.raises(ValueError, match="another process writes to"):
        write(path)
    write(path)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch):
    path, real = tmp_path / "a.jsonl", os.write

    def full(descriptor: int, data: bytes) -> int:
        real(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with kept(path, 9) as file:
        file.add(answer(0))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            file.add(answer(1))
        monkeypatch.setattr(os, "write", real)
        assert not file.answered("anna", 1)
        file.add(answer(2))
    assert read_answers(path, 9) == [answer(0), answer(2)]
