# SPDX-License-Identifier: Apache-2.0
"""Videos that visitors asked for, made one after the other.

They belong to the service, not to a page that may be closed or loaded again: what a
visitor asked for last is found by a random id that only his browser knows.
"""

import logging
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event, Lock

import numpy as np
from jaxtyping import UInt8

from launch.sample.outputs import Job, Render
from launch.web.service import Continuation, VideoService, WebForm
from pyramid_jax.pipeline.denoise import Progress

WAITING = 8  # videos beside the one that is made
VISITORS = 1000  # whose last video is known
CLOSED = "the page was closed before the video was finished; ask for it again"


class VideoTask:
    """A video from the moment that a visitor asks for it.

    `step` and `done` say how far it is, `frames` are those that exist, in parts;
    `future` has the result in the end.
    """

    def __init__(self, job: Job):
        self.job, self.step, self.done = job, "", 0.0
        self.frames: list[UInt8[np.ndarray, "_ h w 3"]] = []
        self.asked = time.monotonic()
        self.future: Future[Render] = Future()

    def error(self) -> str | None:
        """Why a task that has ended has no result, in words for visitors."""
        try:
            error = self.future.exception()
        except CancelledError:
            return CLOSED
        if error is None or isinstance(error, ValueError | FloatingPointError):
            return error and str(error)
        return "the video could not be made; the log of the page says why"


class TaskQueue:
    """What is made with a service, in one thread, first come, first served."""

    def __init__(self, service: VideoService):
        self.service = service
        self._closed, self._lock = Event(), Lock()
        self._thread = ThreadPoolExecutor(1, "video")
        self._open: list[VideoTask] = []
        self._latest: dict[str, VideoTask] = {}

    def add(self, form: WebForm | Continuation, visitor: str = "") -> VideoTask:
        """Takes what a visitor asks for; without an id it is not found again.

        Raises:
            ValueError: the form is refused, too many videos wait, or the queue is
                closed.
        """
        task = VideoTask(self.service.job(form))
        with self._lock:
            if self._closed.is_set():
                raise ValueError(CLOSED)
            if len(self._unfinished()) > WAITING:
                raise ValueError(f"{WAITING} videos wait already; try again later")
            self._open.append(task)
            if visitor:
                self._latest.pop(visitor, None)  # the newest come last
                self._latest[visitor] = task
                for forgotten in list(self._latest)[:-VISITORS]:
                    del self._latest[forgotten]
            task.future = self._thread.submit(self._make, task)
        return task

    def latest(self, visitor: str) -> VideoTask | None:
        """What a visitor asked for last, finished or not."""
        return self._latest.get(visitor) if visitor else None

    def status(self, task: VideoTask) -> str:
        """How far a task is, in words."""
        with self._lock:
            unfinished = self._unfinished()
            before = unfinished.index(task) if task in unfinished else 0
        if before:
            return f"waiting for {before} earlier video{'s' if before > 1 else ''}"
        return task.step or "reading the prompt"

    def close(self) -> None:
        """Ends the video that is being made with its next step, and waits for that."""
        with self._lock:
            self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _unfinished(self) -> list[VideoTask]:
        self._open = [task for task in self._open if not task.future.done()]
        return self._open

    def _make(self, task: VideoTask) -> Render:
        def show(progress: Progress) -> None:
            if self._closed.is_set():
                raise ValueError(CLOSED)
            task.step, task.done = str(progress), progress.done

        def keep(frames: UInt8[np.ndarray, "1 _ h w 3"]) -> None:
            if not task.frames:
                waited, name = time.monotonic() - task.asked, task.job.path.name
                logging.info("%s: first frame after %.2f s", name, waited)
            task.frames.append(frames[0])

        try:
            return self.service.make(task.job, show, keep)
        except (ValueError, FloatingPointError):
            raise
        except Exception:
            logging.exception("%s was not made", task.job.path)
            raise
        finally:
            task.frames = []
