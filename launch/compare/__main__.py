# SPDX-License-Identifier: Apache-2.0
"""Asks people which of two models makes better videos, blind and pair by pair.

    pyramid-jax compare --videos=FOLDER --against=FOLDER    # clips of the same prompts
    pyramid-jax compare --model=MODEL --against=MODEL       # samples 50 prompts first
    pyramid-jax compare --results

shows a page that asks raters three questions about pairs of clips. Sides are random,
and nothing on the page says which model a clip is from. Answers are kept in --to; the
same command goes on. It needs the extra `web`: `pip install "pyramid_jax[web]"`.
"""

import json
import logging
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from launch import start
from launch.compare import answers, preferences
from launch.compare.study import Study, paired
from launch.evaluate.reports import write_report
from launch.evaluate.suites import write_manifest
from launch.sample import choices
from launch.sample.lists import Line, file_name, read_lines, waiting
from launch.sample.outputs import Job
from launch.sample.progress import run
from pyramid_jax.pipeline.request import SEEDS, check_seed, check_text
from pyramid_jax.pipeline.video import VideoPipeline

try:
    import uvicorn

    from launch.compare.page import StudyPage
except ModuleNotFoundError as error:
    sys.exit(f"pyramid-jax compare: {error}; run pip install 'pyramid_jax[web]'")

PROMPTS = Path(__file__).with_name("prompts.txt")
LOOPBACK = ("127.0.0.1", "localhost")
ANSWERS, MANIFEST, RESULTS = "answers.jsonl", "manifest.json", "results.json"
SIDE = 256  # pixels of the smaller side of a small video


def compare(options: Any) -> None:
    """Shows the page of a study, or what came of it.

    Raises:
        ValueError: folders that can't be compared, or another study in the folder.
    """
    folder = Path(options.to)
    if options.results:
        show_results(folder)
        return
    if not options.against:
        raise ValueError(
            "--against is missing; give the folder of the other clips, or of the other "
            "model"
        )
    start.check_writable(folder)
    names = (options.videos or options.model), options.against
    folders = names if options.videos else sampled(options, folder)
    study = Study(names, paired(*map(Path, folders)), options.seed)
    write_manifest(folder, study.manifest())
    with answers.kept(folder / ANSWERS, len(study.pairs)) as file:
        serve(StudyPage(study, file), options.host, options.port)
        print(f"{len(file)} answers are in {file.path}; --results adds them up")


def show_results(folder: Path) -> None:
    """Prints what raters prefer, and writes it beside their answers.

    Raises:
        ValueError: the folder has no study, or nobody has rated.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file() or not (folder / ANSWERS).is_file():
        raise ValueError(f"{folder} has no study; give the --to of one that was begun")
    known = json.loads(manifest.read_text(encoding="utf-8"))
    given = answers.read_answers(folder / ANSWERS, len(known["pairs"]))
    report = preferences.report_of(known, given)
    print(preferences.preference_table(report))
    write_report(folder / RESULTS, report)


def sampled(options: Any, folder: Path) -> tuple[Path, Path]:
    """Folders of clips of two models, which are made where they are missing.

    Raises:
        ValueError: prompts that can't be read, or what a model can't make.
    """
    lines = read_lines(options.prompts or PROMPTS)
    check_seed(options.seed, len(lines))
    choices.check_choices(options)
    for line in lines:
        check_text(line.prompt)
        check_text(line.negative or options.negative or "")
    folders = folder / "first", folder / "second"
    models = options.model, options.against
    for model, target in zip(models, folders, strict=True):
        pipeline = choices.chosen_model(options, model)
        jobs = clip_jobs(pipeline, options, lines, target)
        if left := waiting(pipeline, jobs):
            print(f"sampling {len(left)} clips of {model}")
            run(pipeline, left, options.batch)
    return folders


def clip_jobs(
    pipeline: VideoPipeline, options: Any, lines: list[Line], folder: Path
) -> list[Job]:
    """The files of a model, a clip for each prompt; seeds count up."""
    jobs = []
    for place, line in enumerate(lines):
        seed = options.seed + place if line.seed is None else line.seed
        request = choices.requested(pipeline, options, line, seed)
        path = folder / file_name(place, line.prompt, seed, "mp4")
        scale = max(1, SIDE // min(request.size.height, request.size.width))
        jobs.append(Job(request, path, line.image, scale))
    return jobs


def serve(page: StudyPage, host: str, port: int) -> None:
    """Shows a page until Ctrl-C.

    Raises:
        ValueError: another program has the port, or there is no such address.
    """
    local = host in LOOPBACK
    if not local:
        logging.warning("everyone who reaches %s can rate under any name", host)
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise ValueError(
            f"{host}, port {port}: {error.strerror}; give another --host or --port"
        ) from error
    # A browser sends the name it was given: no other site may pose as this one.
    application = page.application([*LOOPBACK] if local else ["*"])
    config = uvicorn.Config(
        application, log_level="warning", lifespan="off", timeout_graceful_shutdown=5
    )
    print(f"the page: http://{host}:{port}\nCtrl-C ends it", flush=True)
    try:
        uvicorn.Server(config).run([listening])
    except KeyboardInterrupt:
        pass
    finally:
        listening.close()


def define(into: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    text = partial(flags.DEFINE_string, flag_values=into)
    whole = partial(flags.DEFINE_integer, flag_values=into)
    text("videos", None, "Folder of clips of one model; none: those of --model.")
    text("against", None, "Folder of clips of the other; without --videos, its model.")
    text("to", "runs/compare", "Folder of the study: clips, answers, results.")
    flags.DEFINE_bool(
        "results", False, "Print what raters prefer, and end.", flag_values=into
    )
    prompts_help = "File with a prompt, or a JSON object, on every line; none: 50 that "
    text("prompts", None, f"{prompts_help}the embedded models know.")
    text("negative", None, "What videos do not show; none: what a model recommends.")
    seed_help = "Seed of sides and order, and of the first video; others count up."
    whole("seed", 0, seed_help, lower_bound=0, upper_bound=SEEDS - 1)
    whole("batch", 1, "Videos sampled together.", lower_bound=1)
    choices.define_choices(into)
    text("host", LOOPBACK[0], "Address to listen on.")
    whole("port", 7861, "Port to listen on.", lower_bound=1, upper_bound=65535)


HEADINGS = {
    "videos": "what is compared",
    "prompts": "clips that are sampled first",
    **choices.HEADINGS,
    "host": "address",
}

if __name__ == "__main__":
    start.run(compare, define, HEADINGS)
