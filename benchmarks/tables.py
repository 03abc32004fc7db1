# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and numbers of README and docs from benchmarks/results/.

python -m benchmarks.tables

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`; what is
there is replaced; so are numbers (benchmarks/figures.py). What `benchmarks.device` has
found is in files device_*.jsonl, one for each device; small shapes are refused.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablations import report as ablations
from benchmarks.decoder import decoder_table
from benchmarks.device.records import Record, chosen, read_records
from benchmarks.device.report import heading, highlights, report, table
from benchmarks.fewstep import points_table
from benchmarks.figures import PAGES, read_results, with_numbers
from benchmarks.leaderboard import leaderboard
from benchmarks.speed import deviation_table, speed_table
from benchmarks.train_step import step_table
from launch.evaluate.adherence import adherence_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", *PAGES)
NONE = "No GPU or TPU has been measured yet."
VARIANTS = {"cpu_mmdit.json": "mmdit", "cpu_miniflux.json": "miniFLUX"}
TASKS = {"t2v": "Text to video", "i2v": "Image to video", "t2i": "Text to image"}
PARTS = {
    "dense": "matrix products with weights",
    "attention": "attention",
    "rest": "norms, modulation, rotation, activation, residuals",
    "update": "AdamW, clipping, moving average",
}
MIB, GIB = 2**20, 2**30
PLANNED = ("products", "attention", "rest")  # shares of a predicted step
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A document with its tables and numbers as the results say.

    Raises:
        ValueError: no table has the name in a comment.
    """

    def written(place: re.Match[str]) -> str:
        begin, name, end = place.groups()
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; there are {', '.join(TABLES)}")
        return f"{begin}{TABLES[name]()}\n{end}"

    return with_numbers(_PLACE.sub(written, text), read_results(RESULTS))


def of_devices(tell: Callable[[Sequence[Record]], str]) -> str:
    """What there is to tell of every device that was measured.

    Raises:
        ValueError: a file has results of small shapes.
    """
    texts = []
    for path in sorted(RESULTS.glob("device_*.jsonl")):
        records = read_records(path)
        if chosen(records, "begins", tiny=True):
            raise ValueError(f"{path} holds results of --tiny, no measurement; drop it")
        texts.append(f"{heading(records)}.\n\n{tell(records)}")
    return "\n\n".join(texts) or NONE


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        path.write_text(with_tables(text), encoding="utf-8")


def _parity() -> str:
    """How many recorded tensors are those of the original."""
    verdicts = _result("parity.json")["verdicts"]
    return (
        f"**{verdicts['ok']} tensors equal the original's, {verdicts['FAIL']} differ** "
        "([what, and how closely](docs/parity.md)): `make parity`"
    )


def _steps() -> str:
    """A training step and sampling on a CPU, beside the original."""
    rows = []
    for variant, result in _variants():
        work = result["workload"]
        what = f"{work['sampled']} latent frames, {work['steps']} steps per stage"
        names = {"training step": "training step", "sampling": f"sampling {what}"}
        for name, title in names.items():
            rows.append([f"{variant}, {title}", *_sides(result["comparisons"][name])])
    return table(("processor seconds", *_SIDES), rows)


def _parts() -> str:
    """What a training step on a CPU consists of."""
    variants, results = zip(*_variants(), strict=True)
    rows = [
        [title, *(f"{result['breakdown'][part]:.2f}" for result in results)]
        for part, title in PARTS.items()
    ]
    return table(("part", *(f"{variant}, seconds" for variant in variants)), rows)


def _vae() -> str:
    """Encoding and decoding on a CPU, beside the original."""
    result = _result("vae.json")
    work = result["workload"]
    frames, tile = work["chunk"], work["tile"]
    ways = {
        "whole": "whole",
        "chunked": f"{frames} frames at once",
        "tiled": f"{frames} frames of {tile} x {tile} at once",
    }
    rows = []
    for name, one in result["measured"].items():
        what, _, way = name.partition(", ")
        both = {"jax": one["seconds"], **one}
        memory = f"{one['memory'] / MIB:.0f}"
        rows.append([f"{what}, {ways[way]}", *_sides(both), memory])
    return table(("processor seconds", *_SIDES, "memory, MiB"), rows)


def _video() -> str:
    """A whole video on a CPU, beside the original."""
    comparisons = _result("cpu_sample.json")["comparisons"]
    titles = {
        "video": "video, from token ids to frames",
        "text encoders": "text encoders, prompt and negative prompt",
        "noise": "noise",
        "decoder": "decoder, to 8-bit frames",
    }
    rows = ([title, *_sides(comparisons[name])] for name, title in titles.items())
    return table(("processor seconds", *_SIDES), rows)


def _calls() -> str:
    """What a call per Euler step costs."""
    loops = _result("cpu_sample.json")["loops"]
    titles = {
        "tiny": "48 steps of 2 blocks of width 64, 17 to 53 tokens",
        "small": "18 steps of 6 blocks of width 384, 134 to 344 tokens",
    }
    rows = []
    for name, title in titles.items():
        both = (f"{loops[name][way]['median']:.3g}" for way in ("program", "calls"))
        extra = {k: 1e3 * v for k, v in loops[name]["per_step"].items()}
        rows.append([title, *both, f"{_spread(extra, 1)} ms"])
    head = ("one program", "a call per step", "extra per step")
    return table(("processor seconds", *head), rows)


def _precision() -> str:
    """What fewer bits cost."""
    result = _result("precision.json")
    rows = []
    for dtype, one in result["embedded"].items():
        drift = f"{result['random'][dtype]:.2%}"
        rows.append([dtype, drift, f"{one['error']:.2%}", f"{one['psnr']:.1f} dB"])
    return table(("", "random weights", "embedded model", "its frames' PSNR"), rows)


def _warm() -> str:
    """What a process takes to its first Euler step."""
    modes = {"cold": "no programs", "jax": "JAX's cache", "kept": "kept programs"}
    head = ("imports", "weights", "programs", "running", "total")
    rows = []
    for case in _result("warm_start.json")["cases"].values():
        for mode, title in modes.items():
            what = f"{case['depth']} blocks of width {case['width']}, {title}"
            medians = (case["modes"][mode][part]["median"] for part in head)
            rows.append([what, *(f"{median:.2f}" for median in medians)])
    return table(
        ("processor seconds", *head[:-1], "to the end of the first step"), rows
    )


def _lora() -> str:
    """What the training of adapters takes on a device."""
    found = _result("plan_lora_mmdit_384p.json")["memory"]
    rows = {
        "frozen weights, adapters, their average and moments, and a row": "arguments",
        "everything temporary, with `remat`": "temporary",
        "**in all: predicted**": "total",
    }
    return table(
        ("", "GB"),
        ([title, f"{found[part] / 1e9:.2f}"] for title, part in rows.items()),
    )


def _newcomer() -> str:
    """What the first commands take."""
    if not (RESULTS / "newcomer.json").exists():
        return "No walk has been recorded yet: `python -m benchmarks.newcomer` does."
    rows = []
    for name, step in _result("newcomer.json")["walk"].items():
        command = f"`{step['command'].replace('.venv/bin/', '')}`"
        times = (f"{step[clock]:.0f}" for clock in ("cpu_seconds", "seconds"))
        rows.append([name, command, *times])
    return table(("", "command", "processor seconds", "seconds"), rows)


def _plans() -> str:
    """Training steps that compilers made for machines that were not here."""
    rows = []
    for path in sorted(RESULTS.glob("plan_*.json")):
        plan = json.loads(path.read_text(encoding="utf-8"))
        mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1)
        exchanges, seconds = plan["exchanges"], plan["seconds"]
        waited = sum(x["seconds"] for x in exchanges if not x["hidden"])
        shares = (seconds.get(k, 0) / seconds["step"] for k in PLANNED)
        used, room = plan["memory"]["total"] / GIB, plan["capacity"] / GIB
        rows.append([
            f"{plan['config']}, {plan['machine']}",
            f"{mesh}, {plan['rows']} rows",
            f"{used:.1f} of {room:.0f}",
            f"{sum(x['bytes'] for x in exchanges) / GIB:.1f}, {waited:.2f} s",
            f"{seconds['step']:.2f} s",
            *(f"{share:.0%}" for share in shares),
            f"{plan['utilisation']:.0%}",
        ])  # fmt: skip
    if not rows:
        return "No plan has been made yet: `make compile-configs` does."
    head = ("mesh", "GiB of a device", "GiB exchanged, waited", "step")
    return table(("config, machine", *head, *PLANNED, "utilisation"), rows)


def _pairs() -> str:
    """What the model of bouncing pairs shows, by task."""
    found = (_result(path.name) for path in sorted(RESULTS.glob("pairs_*.json")))
    return "\n\n".join(f"{_task(each)}:\n\n{_shown(each)}" for each in found)


def _clean_history() -> str:
    """What the model of bouncing pairs shows that reads its history once per stage."""
    names = {
        "as it ships": "pairs_t2v.json",
        "with the switch alone": "clean_history_untuned.json",
        "tuned to it": "clean_history.json",
        "3,000 steps more, on the same clips": "clean_history_long.json",
        "or 700 steps more, on 4,800 new ones": "clean_history_new.json",
        "the last one, later frames guided by 3": "clean_history_guided.json",
    }
    found = {title: _result(name) for title, name in names.items()}
    rows = {title: each["rows"]["model"] for title, each in found.items()}
    return adherence_table(rows, found["tuned to it"]["captions"])


def _task(found: dict[str, Any]) -> str:
    """E.g. "Text to video, 17 frames"."""
    frames = found["frames"]
    return TASKS[found["task"]] + (f", {frames} frames" if frames > 1 else "")


def _shown(found: dict[str, Any]) -> str:
    return adherence_table(found["rows"], found["captions"])


_SIDES = ("this project", "original", "original / this project")
# What stands between the comments, by the name in the first.
TABLES: dict[str, Callable[[], str]] = {
    "device": lambda: of_devices(report),
    "speed": lambda: of_devices(lambda records: table(("", ""), highlights(records))),
    "parity": _parity,
    "steps": _steps,
    "parts": _parts,
    "vae": _vae,
    "video": _video,
    "calls": _calls,
    "precision": _precision,
    "warm": _warm,
    "lora": _lora,
    "newcomer": _newcomer,
    "presets": speed_table,
    "deviation": deviation_table,
    "decoder": decoder_table,
    "plans": _plans,
    "train_step": lambda: step_table(_result("train_step.json")),
    "pairs": _pairs,
    "students": lambda: points_table(_result("fewstep.json")),
    "clean_history": _clean_history,
    "pairs_video": lambda: _shown(_result("pairs_t2v.json")),
    "tiny_model": lambda: _shown(_result("tiny_model.json")),
    **ablations.TABLES,
    "leaderboard": leaderboard,
}


def _result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _variants() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, variant in VARIANTS.items():
        yield variant, _result(name)


def _sides(both: dict[str, Any]) -> list[str]:
    """The medians of both sides, and how they compare."""
    ours, theirs = (both[side]["median"] for side in ("jax", "reference"))
    digits = 2 if ours > 0.05 else 4
    return [f"{ours:.{digits}f}", f"{theirs:.2f}", _spread(both["ratio"], 2)]


def _spread(of: dict[str, float], digits: int) -> str:
    median, low, high = (f"{of[k]:.{digits}f}" for k in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


if __name__ == "__main__":
    main()
