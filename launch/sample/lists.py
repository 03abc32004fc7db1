# SPDX-License-Identifier: Apache-2.0
"""Lists of prompts: read, named; what is finished, what is sampled together."""

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from launch.sample import outputs
from launch.sample.outputs import Job, Recipe
from pyramid_jax.data.manifest import text_lines
from pyramid_jax.data.stored import differences
from pyramid_jax.pipeline.video import VideoPipeline

logger = logging.getLogger(__name__)


class Line(NamedTuple):
    """What a line of a list says; None: as for all lines."""

    prompt: str
    negative: str | None = None
    seed: int | None = None
    image: Path | None = None
    video: Path | None = None

    @property
    def given(self) -> Path | None:
        """The file that its video begins with."""
        return self.image or self.video


# What an object in a list may say.
FIELDS = {"prompt": str, "negative": str, "seed": int, "image": str, "video": str}


def read_lines(path: str | Path) -> list[Line]:
    """The lines of a text file.

    A line is a prompt, or a JSON object with "prompt" and maybe "negative", "seed", and
    "image" or "video", whose paths are relative to the file. Empty lines and those that
    begin with # say nothing.

    Raises:
        ValueError: naming the line that is wrong; or there is no prompt.
    """
    path = Path(path)
    lines = []
    for number, text in enumerate(text_lines(path), 1):
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        try:
            lines.append(_line(text, path.parent))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no prompt; write one on every line")
    return lines


def file_name(place: int, prompt: str, seed: int, kind: str) -> str:
    """The name of a file: its place in the list, the prompt in brief, the seed."""
    words = re.sub(r"\W+", "_", prompt.lower()).strip("_")[:40].rstrip("_")
    return "_".join(filter(None, (f"{place:04}", words, str(seed)))) + f".{kind}"


def waiting(pipeline: VideoPipeline, jobs: Sequence[Job]) -> list[Job]:
    """The jobs whose files do not exist yet; all are checked before.

    Raises:
        ValueError: naming every file that exists and was made from something else; or
            a job that can't be done.
    """
    left, others = [], []
    for job in jobs:
        recipe = outputs.recipe(pipeline, job)
        outputs.check_kind(job)
        if not job.path.exists():
            left.append(job)
        elif differences := _differences(job, recipe):
            others.append(f"{job.path} ({differences})")
    if others:
        raise ValueError(
            "these files exist already, made from something else:\n  "
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
        if batch and (len(batch) == most or not outputs.alike(batch[-1], job)):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _line(text: str, folder: Path) -> Line:
    fields: Any = json.loads(text) if text.startswith("{") else {"prompt": text}
    wrong = {k: v for k, v in fields.items() if not isinstance(v, FIELDS.get(k, ()))}
    if wrong or "prompt" not in fields:
        raise ValueError(
            f'found {fields}, expected at least "prompt", and "negative", "image" and '
            '"video" as text, "seed" as a whole number'
        )
    given = fields.keys() & {"image", "video"}
    paths = {name: folder / fields[name] for name in given}
    return Line(**fields | paths)


def _differences(job: Job, recipe: Recipe) -> str:
    """What a job's file was made with differently, "" if nothing."""
    try:
        old = dataclasses.asdict(outputs.read(job.path, job.records).recipe)
    except ValueError:
        return "it does not say what from"
    was, wanted = (flatten_dict(x, sep=".") for x in (old, dataclasses.asdict(recipe)))
    return differences(was, wanted)
