# SPDX-License-Identifier: Apache-2.0
"""Lists of requests: read, named; what is finished, what is sampled together."""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.sample import outputs
from launch.sample.outputs import Request
from pyramid_jax.pipeline.video import VideoPipeline

logger = logging.getLogger(__name__)

# What a line of a list may say.
FIELDS = {"prompt": str, "negative": str, "seed": int, "image": str}


class Job(NamedTuple):
    """A request, and the file that it becomes."""

    request: Request
    path: Path


def read_requests(path: str | Path, like: Request, each: int = 1) -> list[Request]:
    """The requests in a text file; what a line does not say is that of `like`.

    A line is a prompt, or a JSON object with "prompt" and maybe "negative", "seed" and
    "image", whose path is relative to the file. Empty lines and those that begin with #
    say nothing. Seeds count up from that of `like`, over the copies of all lines.

    Args:
        each: copies of every line, with seeds that count up.

    Raises:
        ValueError: naming the line that is wrong; or there is no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the list of prompts {path} is not a file; correct the path")
    found: list[Request] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        default = dataclasses.replace(like, seed=like.seed + len(found))
        try:
            found += copies(_request(line, default, path.parent), each)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} has no prompt; write one on every line")
    return found


def copies(request: Request, count: int) -> list[Request]:
    """So many requests that differ in the seed only, which counts up."""
    seeds = range(request.seed, request.seed + count)
    return [dataclasses.replace(request, seed=seed) for seed in seeds]


def jobs(requests: Sequence[Request], folder: str | Path, kind: str) -> list[Job]:
    """A file of a kind in a folder for every request."""
    named = enumerate(requests)
    return [Job(r, Path(folder) / file_name(i, r, kind)) for i, r in named]


def file_name(place: int, request: Request, kind: str) -> str:
    """The name of a file: its place in the list, the prompt in brief, the seed."""
    words = re.sub(r"\W+", "_", request.prompt.lower()).strip("_")[:40].rstrip("_")
    parts = f"{place:04}", words, str(request.seed)
    return "_".join(filter(None, parts)) + f".{kind}"


def waiting(model: VideoPipeline, jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose files are not there yet; all are checked before.

    Raises:
        ValueError: naming every file that is there and was made from something else;
            or a job that can't be done.
    """
    left, others = [], []
    for job in jobs:
        recipe = outputs.recipe(model, job.request)
        outputs.check_kind(job.path, job.request)
        if not job.path.exists():
            left.append(job)
        elif differing := _differing(job.path, recipe):
            others.append(f"{job.path} ({differing})")
    if others:
        raise ValueError(
            "these files are there already, made from something else:\n  "
            + "\n  ".join(others)
            + "\nwrite to another folder, or move them away"
        )
    if done := len(jobs) - len(left):
        logger.info("%d of %d are finished already", done, len(jobs))
    return left


def batches(jobs: Sequence[Job], most: int) -> Iterator[list[Job]]:
    """Neighbours that can be sampled together, at most so many."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (
            len(batch) == most or not outputs.alike(batch[-1].request, job.request)
        ):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _request(line: str, like: Request, folder: Path) -> Request:
    """What one line says."""
    said = json.loads(line) if line.startswith("{") else {"prompt": line}
    wrong = {k: v for k, v in said.items() if not isinstance(v, FIELDS.get(k, ()))}
    if wrong or "prompt" not in said:
        raise ValueError(
            f'found {said}, expected at least "prompt", and "negative" and "image" as '
            'text, "seed" as a whole number'
        )
    if "image" in said:
        said |= {"image": folder / said["image"]}
    return dataclasses.replace(like, **said)


def _differing(path: Path, wanted: outputs.Recipe) -> str:
    """What a file was made with differently, "" if nothing."""
    try:
        there = dataclasses.asdict(outputs.read(path).recipe)
    except ValueError:
        return "it does not say what from"
    pairs = ((k, there[k], v) for k, v in dataclasses.asdict(wanted).items())
    return ", ".join(f"{k} {old!r}, not {new!r}" for k, old, new in pairs if old != new)
