# SPDX-License-Identifier: Apache-2.0
"""Training steps as a run takes them, and its data alone, on whatever device there is.

    python -m benchmarks.train_step --config=tiny \
        --config.data.manifest=data/shapes/manifest.jsonl [--steps=40] [--to=FILE]

The run is a real one, of any config, in a temporary folder: its own log says how long
steps took, in windows of five, compiling left out. Then the same rows are made again
while nothing is trained. `benchmarks.cpu_vs_reference` has the original beside it,
`benchmarks.device` the released sizes.
"""

import resource
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks.device.report import table
from benchmarks.timing import environment, spread
from launch import start
from launch.config_flag import define_config
from launch.evaluate.reports import write_report
from pyramid_jax.data.loader import batches
from pyramid_jax.shapes import Rows
from pyramid_jax.train import experiment, train
from pyramid_jax.training.metrics import JSONL, read_metrics

WINDOW = 5  # steps of a line of the log
PACKAGES = ("jax", "flax", "grain", "numpy")
UNITS = {
    "seconds": "seconds of a step",
    "tokens_per_second": "tokens a second",
    "token_utilisation": "share of places that hold tokens",
    "model_tflops_per_second": "TFLOP a second that the model needs",
    "utilisation": "share of the device's peak",
    "data_wait": "share of the time that it waits for rows",
    "device_gib": "GiB of a device, at most",
    "host_gib": "GiB of the first process, at most",
    "rows": "rows a second, nothing trained",
    "examples": "examples a second",
    "frames": "frames a second, of videos that examples are cut from",
}


def steps(cfg: Any, folder: Path, count: int) -> dict[str, list[float]]:
    """What a run of `count` steps, after those of the first window, logs of itself."""
    with cfg.unlocked():
        cfg.loop.update(log_every=WINDOW, save_every=WINDOW + count, sample_every=0)
        cfg.loop.steps = WINDOW + count
        cfg.optimizer.warmup_steps = 0
        cfg.prompts = ()
    train(cfg, folder)
    lines = [x for x in read_metrics(folder / JSONL) if x["step"] > WINDOW]
    found = {name: [x[name] for x in lines if name in x] for name in UNITS}
    found["seconds"] = [1 / x["steps_per_second"] for x in lines]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {name: x for name, x in (found | {"host_gib": [peak]}).items() if x}


def data(cfg: Any, folder: Path, count: int) -> dict[str, list[float]]:
    """Rates at which `count` batches, or a few more, are made of files.

    Rows are packed in rounds, so whole rounds count, after the first. No file is kept
    in memory, as if there were more of them than a run takes.
    """
    with cfg.unlocked():
        cfg.data.cache_mib = 0
    described = experiment(cfg)
    tokenize = None if described.model.text is None else described.tokenize
    ahead = described.data.open_rows
    count = -(-count // ahead) * ahead
    with closing(batches(described.data, tokenize, folder)) as rows:
        made: list[tuple[Rows, float]] = []
        for _ in range(ahead + count):
            made.append((next(rows), time.perf_counter()))
    since = made[-1][1] - made[ahead - 1][1]
    examples = sum(int((each.stage >= 0).sum()) for each, _ in made[ahead:])
    each = {"rows": count * described.data.batch, "examples": examples}
    each["frames"] = examples * described.data.frames
    return {name: [x / since] for name, x in each.items()}


def main(values: flags.FlagValues) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = steps(values.config, Path(folder) / "run", values.steps)
        found |= data(values.config, Path(folder), values.steps)
    result = environment(PACKAGES) | {
        "config": values.config.to_dict(),
        "devices": jax.device_count(),
        "steps": values.steps,
        "found": {name: spread(x)._asdict() for name, x in found.items()},
    }
    print(step_table(result))
    if values.to:
        write_report(values.to, result)


def step_table(result: Mapping[str, Any]) -> str:
    """The numbers as a Markdown table, under what they were measured on."""
    head = f"{result['devices']} x {result['device']}, {result['threads']} threads"
    rows = []
    for name, numbers in result["found"].items():
        median, low, high = (numbers[key] for key in ("median", "low", "high"))
        rows.append((UNITS[name], f"{median:.4g}", f"{low:.4g} to {high:.4g}"))
    return table((head, "median", "quartiles"), rows)


def define(_: flags.FlagValues) -> None:
    """Declares the flags."""
    define_config()
    flags.DEFINE_integer("steps", 40, "Steps that are timed.", 2 * WINDOW)
    flags.DEFINE_string("to", None, "File to write the result to, as JSON.")
    flags.mark_flag_as_required("config")


if __name__ == "__main__":
    start.run(main, define)
