# SPDX-License-Identifier: Apache-2.0
"""What raters answered, in a file that only grows: a line for each pair and rater."""

import datetime
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from launch.compare.study import CHOICES, QUESTIONS, rater_name

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a rater says of a pair, by its number: of every question, a choice.

    `left` is 0 or 1, the clip that was shown on the left.
    """

    rater: str
    pair: int
    left: int
    choices: dict[str, str]


class AnswerFile:
    """The answers so far, and the file that holds them. `kept` opens it."""

    def __init__(self, path: Path, descriptor: int, answers: list[Answer]):
        self.path = path
        self._descriptor, self._lock = descriptor, Lock()
        self._answers = {(each.rater, each.pair): each for each in answers}

    def __len__(self) -> int:
        return len(self._answers)

    def answered(self, rater: str, pair: int) -> bool:
        """Whether a rater has answered a pair."""
        return (rater, pair) in self._answers

    def add(self, answer: Answer) -> None:
        """Writes an answer to the disk; the first of a rater to a pair stays.

        Raises:
            OSError: the disk takes no more; what was written before is whole.
        """
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps(answer._asdict() | {"date": date}, ensure_ascii=False)
        with self._lock:
            if (key := (answer.rater, answer.pair)) in self._answers:
                return
            size = os.fstat(self._descriptor).st_size
            try:
                _write(self._descriptor, f"{line}\n".encode())
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise
            self._answers[key] = answer


@contextmanager
def kept(path: Path, pairs: int) -> Iterator[AnswerFile]:
    """The file of answers of a study of so many pairs, new or continued.

    A last line that a crash cut off is removed.

    Raises:
        ValueError: another process has it, or a line says no answer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process writes to {path}; end it, or give another --to"
            ) from error
        answers = read_answers(path, pairs)
        whole = path.read_bytes().rpartition(b"\n")
        os.ftruncate(descriptor, len(whole[0] + whole[1]))
        yield AnswerFile(path, descriptor, answers)
    finally:
        os.close(descriptor)


def read_answers(path: Path, pairs: int) -> list[Answer]:
    """The answers in a file; a last line that a crash cut off counts for nothing.

    Raises:
        ValueError: naming the line that says no answer to one of so many pairs, or says
            one again.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        logger.warning("%s: the last line is not whole; it is asked again", path)
    answers: dict[tuple[str, int], Answer] = {}
    for number, line in enumerate(lines, 1):
        try:
            answer = _answer(line, pairs)
            if (key := (answer.rater, answer.pair)) in answers:
                raise ValueError(f"{answer.rater} has rated pair {answer.pair} before")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}; correct the line, or remove it"
            ) from error
        answers[key] = answer
    return [*answers.values()]


def check_choices(choices: Any) -> dict[str, str]:
    """The choices of an answer, if there is one for every question.

    Raises:
        ValueError: anything else.
    """
    named = isinstance(choices, dict) and choices.keys() == QUESTIONS.keys()
    if not named or not all(choice in CHOICES for choice in choices.values()):
        raise ValueError(
            f"the answers {choices} are not one of {', '.join(CHOICES)} for each of "
            f"{', '.join(QUESTIONS)}"
        )
    return choices


def _answer(line: bytes, pairs: int) -> Answer:
    fields = json.loads(line)
    if not isinstance(fields, dict) or not {*Answer._fields} <= fields.keys():
        raise ValueError(f"found no {', '.join(Answer._fields)}")
    rater, pair, left, choices = (fields[name] for name in Answer._fields)
    if type(pair) is not int or not 0 <= pair < pairs or left not in (0, 1):
        raise ValueError(f"pair {pair}, left {left}: expected 0 to {pairs - 1}, 0 or 1")
    return Answer(rater_name(rater), pair, left, check_choices(choices))


def _write(descriptor: int, data: bytes) -> None:
    """Writes all bytes, to the disk itself."""
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)
