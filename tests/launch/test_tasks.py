# SPDX-License-Identifier: Apache-2.0
"""Videos that wait, are made, fail or are given up, without the page."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from launch.sample import outputs
from launch.sample.outputs import Job, Render
from launch.web import tasks as queue
from launch.web.service import VideoService, WebForm
from launch.web.tasks import TaskQueue, VideoTask
from tests.painter import painter

MODEL = painter()
WISH = WebForm(prompt="a red circle moves left", size="32x32", frames=7)


@dataclass(frozen=True)
class Gated(VideoService):
    """A service that begins no video before its gate is open, or fails."""

    gate: Event = field(default_factory=Event)
    begun: Event = field(default_factory=Event)
    errors: list[Exception] = field(default_factory=list)

    def make(self, job: Job, *callbacks: Callable[..., None] | None) -> Render:
        self.begun.set()
        assert self.gate.wait(60)
        if self.errors:
            raise self.errors.pop()
        return super().make(job, *callbacks)


@pytest.fixture
def service(tmp_path: Path) -> Gated:
    (tmp_path / "uploads").mkdir()
    return Gated(MODEL, tmp_path / "results", tmp_path / "uploads")


@pytest.fixture
def tasks(service: Gated) -> Iterator[TaskQueue]:
    tasks = TaskQueue(service)
    yield tasks
    service.gate.set()
    tasks.close()


def test_videos_are_made_one_after_the_other(tasks: TaskQueue, service: Gated):
    first, second, third = (tasks.add(WISH) for _ in range(3))
    assert tasks.status(first) == "reading the prompt"
    assert tasks.status(second) == "waiting for 1 earlier video"
    assert tasks.status(third) == "waiting for 2 earlier videos"
    service.gate.set()
    paths = [task.future.result(60).path for task in (first, second, third)]
    assert len(set(paths)) == 3 and all(path.is_file() for path in paths)
    assert tasks.status(third) == "unit 4/4, stage 2/2, step 6/6"
    assert third.done == 1.0 and third.error() is None


def test_new_frames_are_there_while_a_video_is_made(
    tasks: TaskQueue, service: Gated, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[int]] = []

    def save(*arguments: Any) -> Render:
        seen.append([len(part) for part in task.frames])
        return whole(*arguments)

    whole = outputs.save
    monkeypatch.setattr(outputs, "save", save)
    task = tasks.add(WISH)
    service.gate.set()
    task.future.result(60)
    assert seen == [[1, 6]] and not task.frames


def test_a_visitor_finds_his_last_video_and_nobody_elses(
    tasks: TaskQueue, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(queue, "VISITORS", 2)
    tasks.add(WISH)
    tasks.add(WISH, "anna")
    ben, anna, cleo = (tasks.add(WISH, name) for name in ("ben", "anna", "cleo"))
    assert tasks.latest("anna") is anna and tasks.latest("cleo") is cleo
    assert tasks.latest("ben") is None and not ben.future.done()  # forgotten, not ended
    assert tasks.latest("") is None and tasks.latest("dora") is None


def test_what_is_refused_does_not_wait(tasks: TaskQueue):
    with pytest.raises(ValueError, match="the prompt is empty"):
        tasks.add(WISH._replace(prompt=""), "anna")
    assert tasks.latest("anna") is None
    for _ in range(1 + queue.WAITING):
        tasks.add(WISH)
    with pytest.raises(ValueError, match="8 videos wait already; try again later"):
        tasks.add(WISH, "anna")
    assert tasks.latest("anna") is None


def ended(tasks: TaskQueue, service: Gated, error: Exception) -> VideoTask:
    service.errors.append(error)
    service.gate.set()
    task = tasks.add(WISH)
    assert task.future.exception(60) is error
    return task


def test_visitors_are_told_only_what_is_meant_for_them(
    tasks: TaskQueue, service: Gated, caplog: pytest.LogCaptureFixture
):
    known = ended(tasks, service, FloatingPointError("not finite in step 3"))
    assert known.error() == "not finite in step 3" and not caplog.records
    other = ended(tasks, service, OSError("no space left in /home/secret"))
    assert other.error() == "the video could not be made; the log of the page says why"
    assert "no space left in /home/secret" in caplog.text
    assert tasks.add(WISH).future.result(60).path.is_file()


def test_a_closed_queue_stops_at_the_next_step_and_leaves_no_file(
    tasks: TaskQueue, service: Gated
):
    begun, waiting = tasks.add(WISH), tasks.add(WISH)
    assert service.begun.wait(60)
    tasks._closed.set()
    service.gate.set()
    tasks.close()
    for task in (begun, waiting):
        assert task.error() == queue.CLOSED
    with pytest.raises(ValueError, match="the page was closed before the video"):
        tasks.add(WISH)
    assert not list(service.folder.glob("*"))
