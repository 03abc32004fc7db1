# SPDX-License-Identifier: Apache-2.0
"""Measures models and clips, and makes clips for public evaluators.

    pyramid-jax evaluate --captions=200                       # an embedded model
    pyramid-jax evaluate --videos=FOLDER --against=FOLDER     # anybody's clips
    pyramid-jax evaluate --suite=vbench --model=MODEL --to=FOLDER --shard=1/8
    pyramid-jax evaluate --results=FOLDER                     # of VBench, as totals

An embedded model is measured by how often its videos show what their captions say.
Clips are measured without any download: flicker, smoothness, motion, drift, spectra,
and distances to real clips. docs/evaluation.md tells more.
"""

from functools import partial

from absl import flags

from launch import start
from launch.evaluate import vbench
from launch.evaluate.adherence import TASKS, evaluate_adherence
from launch.evaluate.clips import evaluate_clips
from launch.evaluate.judges import JUDGES
from launch.evaluate.reports import write_report
from launch.evaluate.suites import SUITES, evaluate_suite
from launch.sample import choices
from pyramid_jax.pipeline.request import SEEDS

JOBS = ("videos", "suite", "results")
# Flags that say nothing without the flag of their job.
BELONG = {
    **dict.fromkeys(("against", "paired"), "videos"),
    **dict.fromkeys(("prompts", "shard", "dry_run", "scale"), "suite"),
}


def evaluate(options: flags.FlagValues) -> None:
    """Does what the flags say.

    Raises:
        ValueError: more than one of the jobs, what can't be done, or a library that is
            not installed.
    """
    given = [f"--{name}" for name in JOBS if options[name].value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are different jobs; give one of them")
    for name, job in BELONG.items():
        if options[name].present and not options[job].value:
            raise ValueError(f"--{name} belongs to --{job}, which is missing")
    run = evaluate_adherence
    if options.videos:
        run = evaluate_clips
    elif options.suite:
        run = evaluate_suite
    elif options.results:
        run = evaluate_results
    try:
        run(options)
    except ImportError as error:
        raise ValueError(str(error)) from error


def evaluate_results(options: flags.FlagValues) -> None:
    """Prints what VBench's scores of all dimensions amount to, and writes it."""
    scores = vbench.read_scores(options.results)
    totals = vbench.totals(scores)
    print(vbench.score_table(scores, totals))
    if options.to:
        write_report(options.to, totals._asdict() | {"dimensions": scores})


def define(into: flags.FlagValues) -> None:
    """Defines the flags of this command."""
    text = partial(flags.DEFINE_string, flag_values=into)
    whole = partial(flags.DEFINE_integer, flag_values=into)
    switch = partial(flags.DEFINE_bool, flag_values=into)
    choice = partial(flags.DEFINE_enum, flag_values=into)
    whole("captions", 200, "Captions to sample.", lower_bound=2)
    choice("judge", "pairs", [*JUDGES], "Data set of the model, and who judges it.")
    choice("task", "t2v", TASKS, "Text to video, image to video, or text to image.")
    text(
        "videos", None, "Folder of clips, or .npy file with a row of features of each."
    )
    text("against", None, "The same of real clips.")
    switch("paired", False, "Clips of one name show the same: PSNR and SSIM, too.")
    choice("suite", None, SUITES, "Evaluator to make clips for.")
    text("prompts", None, "Its prompts; none: those of VBench that ship.")
    text("shard", "1/1", "K/N: the K-th of N parts, each made by its own process.")
    switch("dry_run", False, "List the files of a suite, and end.")
    scale_help = "Show every pixel of a suite's clips as a block of so many."
    whole("scale", 1, scale_help, lower_bound=1, upper_bound=64)
    text("results", None, "Folder, or file, of scores of all dimensions of VBench.")
    choices.define_choices(into)
    whole(
        "batch", None, "Videos sampled together; none: 20, of suites 1.", lower_bound=1
    )
    text("negative", None, "What videos do not show; none: what the model recommends.")
    seed_help = (
        "Seed of the choice of captions, and of the first video; others count up."
    )
    whole("seed", 0, seed_help, lower_bound=0, upper_bound=SEEDS - 1)
    text("to", None, "JSON file for the numbers; of a suite, folder for its clips.")


HEADINGS = {
    "captions": "an embedded model",
    "videos": "clips",
    "suite": "clips for public evaluators",
    **choices.HEADINGS,
    "negative": "all that is sampled or written",
}

if __name__ == "__main__":
    start.run(evaluate, define, HEADINGS)
