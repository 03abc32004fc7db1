# SPDX-License-Identifier: Apache-2.0
"""Clips for VBench and EvalCrafter: their names, their seeds, and their files.

Evaluators list folders and take every file for a clip, so theirs hold nothing else.
What made a clip, and the manifest, stand beside these folders:

    TO/videos, TO/temporal_flickering    clips
    TO/recipes                           a JSON file for every clip
    TO/manifest.json                     how all were made; prompt and seed of each
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from launch import start
from launch.evaluate import vbench
from launch.sample import outputs
from launch.sample.choices import check_choices, chosen_model, requested
from launch.sample.lists import Line, waiting
from launch.sample.outputs import Job
from launch.sample.progress import run_groups
from pyramid_jax.data.manifest import text_lines
from pyramid_jax.pipeline.request import check_seed, check_text
from pyramid_jax.pipeline.video import VideoPipeline

SUITES = ("vbench", "evalcrafter")
VIDEOS, FLICKERING = "videos", "temporal_flickering"
COPIES, FLICKERING_COPIES = 5, 25  # clips of a prompt
EVALCRAFTER = 700  # prompts

_LONGEST = 240  # bytes of a file's name, of 255, with what is added for a moment


class SuiteClip(NamedTuple):
    """A clip: its prompt and seed, and its files, relative to the suite's folder.

    `dimensions` are what VBench judges by it.
    """

    prompt: str
    seed: int
    files: tuple[str, ...]
    dimensions: tuple[str, ...] = ()


def evaluate_suite(options: flags.FlagValues) -> None:
    """Makes the clips of a suite, or with --dry_run lists them.

    Raises:
        ValueError: prompts that can't be read or be names of files, a model that can't
            make the clips, or a folder that holds something else.
    """
    clips = suite_clips(options.suite, options.prompts, options.seed)
    (shard, shards), batch = parse_shard(options.shard), options.batch or 1
    if options.dry_run:
        for group in groups_of(clips, batch)[shard::shards]:
            for clip in group:
                print("\n".join(f"{file}\tseed {clip.seed}" for file in clip.files))
        return
    print(summary(options.suite, clips))
    check_choices(options)
    check_text(options.negative or "")
    folder = Path(options.to or f"runs/{options.suite}")
    start.check_writable(folder)
    check_only_clips(folder, clips)
    pipeline = chosen_model(options)
    jobs = suite_jobs(pipeline, options, clips, folder)
    write_manifest(folder, manifest(pipeline, options, clips, jobs[0]))
    mine = groups_of(list(zip(clips, jobs, strict=True)), batch)[shard::shards]
    make_groups(pipeline, mine, folder)


def suite_clips(suite: str, prompts: str | None, seed: int) -> list[SuiteClip]:
    """The clips of a suite, whose seeds count up.

    Args:
        prompts: VBench's file, None for the one that ships with the package; or
            EvalCrafter's folder of text files, or a file with a prompt on every line.

    Raises:
        ValueError: prompts that can't be read, or be names of files; seeds that are too
            large.
    """
    if suite == "vbench":
        named = list(_vbench_names(vbench.read_prompts(prompts)))
    elif prompts is None:
        raise ValueError(
            "EvalCrafter's prompts don't ship with the package; clone its repository, "
            "and give its folder with --prompts=EvalCrafter/prompts"
        )
    else:
        named = list(_evalcrafter_names(Path(prompts)))
    check_seed(seed, len(named))
    for clip in named:
        check_text(clip.prompt)
        name = Path(clip.files[0]).name
        if clip.files[0].count("/") > 1 or len(name.encode()) > _LONGEST:
            raise ValueError(
                f"the prompt {clip.prompt!r} can't be the name of a file; leave it out"
            )
    return [clip._replace(seed=seed + i) for i, clip in enumerate(named)]


def summary(suite: str, clips: Sequence[SuiteClip]) -> str:
    """How many files there will be, and how many the evaluator expects."""
    counts = {name: 0 for name in (VIDEOS, FLICKERING)}
    for clip in clips:
        for file in clip.files:
            counts[file.split("/")[0]] += 1
    videos, flickering = counts.values()
    if suite == "vbench":
        full = vbench.CLIPS, vbench.FLICKERING_CLIPS
        text = (
            f"{videos:,} + {flickering:,} files, VBench has {full[0]:,} + {full[1]:,}"
        )
    else:
        text = f"{videos:,} files, EvalCrafter has {EVALCRAFTER}"
    return f"{text}; {len(clips):,} clips are sampled"


def parse_shard(text: str) -> tuple[int, int]:
    """Which part, from 0, of how many, from text such as "1/4", the first of four.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    shard, shards = (int(x) for x in match.groups()) if match else (0, 0)
    if not 1 <= shard <= shards:
        raise ValueError(f"shard {text!r} is not K/N with 1 <= K <= N; give e.g. 1/4")
    return shard - 1, shards


def groups_of(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """What is sampled together, whatever is finished: results never depend on it."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def check_only_clips(folder: Path, clips: Sequence[SuiteClip]) -> None:
    """Checks that the folders of clips hold nothing else.

    Raises:
        ValueError: naming what else they hold.
    """
    expected = {file for clip in clips for file in clip.files}
    found = {
        f"{name}/{path.name}"
        for name in {file.split("/")[0] for file in expected}
        for path in (folder / name).glob("*")
    }
    if others := sorted(found - expected):
        raise ValueError(
            f"{folder} holds {', '.join(others[:3])}{' ...' * (len(others) > 3)}, "
            "which the evaluator would take for clips; move them away, or give another "
            "folder"
        )


def suite_jobs(
    pipeline: VideoPipeline, options: Any, clips: Sequence[SuiteClip], folder: Path
) -> list[Job]:
    """The files to sample, the first of every clip.

    Raises:
        ValueError: what the model can't make.
    """
    first = requested(pipeline, options, Line(clips[0].prompt), clips[0].seed)
    return [
        Job(
            replace(first, prompts=(clip.prompt,), seed=clip.seed),
            folder / clip.files[0],
            scale=options.scale,
            records=_records(folder, clip.files[0]),
        )
        for clip in clips
    ]


def manifest(
    pipeline: VideoPipeline, options: Any, clips: Sequence[SuiteClip], job: Job
) -> dict[str, Any]:
    """How the clips of a suite are made, as JSON."""
    recipe = asdict(outputs.recipe(pipeline, job))
    protocol = {k: v for k, v in recipe.items() if k not in ("prompt", "seed", "image")}
    return {
        "suite": options.suite,
        "protocol": protocol,
        "clips": [clip._asdict() for clip in clips],
    }


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes manifest.json, unless it is there.

    Raises:
        ValueError: one is there that says something else.
    """
    path, text = (
        folder / "manifest.json",
        json.dumps(content, indent=1, ensure_ascii=False),
    )
    if path.is_file():
        if path.read_text(encoding="utf-8") != text + "\n":
            raise ValueError(
                f"{path} is that of another suite, model or choice; give another "
                "folder with --to, or the choices that it has"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".manifest.{os.getpid()}.json"  # of this shard
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def make_groups(
    pipeline: VideoPipeline,
    groups: Sequence[Sequence[tuple[SuiteClip, Job]]],
    folder: Path,
) -> None:
    """Samples the groups that are not finished, and copies clips of two folders."""
    pairs = [pair for group in groups for pair in group]
    left = {job.path for job in waiting(pipeline, [job for _, job in pairs])}
    if len(left) < len(pairs):
        print(f"{len(pairs) - len(left)} of {len(pairs)} clips are finished already")
    jobs = [[job for _, job in group] for group in groups]
    unfinished = [each for each in jobs if any(job.path in left for job in each)]
    try:
        if unfinished:
            run_groups(pipeline, unfinished)
    except KeyboardInterrupt:
        print("the same command makes what is not finished")
        raise
    for clip, _ in pairs:
        for file in clip.files[1:]:
            _copy(folder, clip.files[0], file)


def _copy(folder: Path, file: str, copy: str) -> None:
    """A clip, and what made it, under a second name."""
    (folder / copy).parent.mkdir(parents=True, exist_ok=True)
    records = _records(folder, copy)
    records.mkdir(parents=True, exist_ok=True)
    old = outputs.beside(folder / file, _records(folder, file))
    new = outputs.beside(folder / copy, records)
    for source, target in ((old, new), (folder / file, folder / copy)):
        if not target.exists():
            part = records / f".{os.getpid()}.part"
            shutil.copyfile(source, part)
            os.replace(part, target)


def _records(folder: Path, file: str) -> Path:
    return folder / "recipes" / Path(file).parent


def _vbench_names(prompts: dict[str, tuple[str, ...]]) -> Iterator[SuiteClip]:
    """All clips of the main folder, then those that only flickering needs."""
    flickering = [prompt for prompt, names in prompts.items() if FLICKERING in names]
    for prompt, names in prompts.items():
        for copy in range(COPIES):
            folders = (VIDEOS, *[FLICKERING] * (prompt in flickering))
            files = tuple(f"{folder}/{prompt}-{copy}.mp4" for folder in folders)
            yield SuiteClip(prompt, 0, files, names)
    for prompt in flickering:
        for copy in range(COPIES, FLICKERING_COPIES):
            files = (f"{FLICKERING}/{prompt}-{copy}.mp4",)
            yield SuiteClip(prompt, 0, files, (FLICKERING,))


def _evalcrafter_names(prompts: Path) -> Iterator[SuiteClip]:
    if prompts.is_dir():
        paths = sorted(prompts.glob("[0-9][0-9][0-9][0-9].txt"))
        texts = {path.stem: " ".join(text_lines(path)).strip() for path in paths}
    else:
        lines = [line.strip() for line in text_lines(prompts)]
        texts = {f"{i:04}": text for i, text in enumerate(filter(None, lines))}
    if not texts:
        raise ValueError(
            f"{prompts} holds no prompt; give a folder with 0000.txt, 0001.txt ..., or "
            "a file with a prompt on every line"
        )
    for name, text in texts.items():
        yield SuiteClip(text, 0, (f"{VIDEOS}/{name}.mp4",))
