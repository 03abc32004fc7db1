# SPDX-License-Identifier: Apache-2.0
"""All that is measured on a device runs here with small shapes, and fails alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device import __main__ as device
from benchmarks.device.records import OUTPUT, RESULTS, Log, chosen, read_records
from benchmarks.device.report import heading, highlights, report, summary
from benchmarks.device.steps import STEPS
from tests.house.sources import ROOT

MISSING = ("av", "grain", "array_record", "tensorboardX", "ml_collections", "typeguard")
# Hides packages as if nobody had installed them.
BLIND = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({MISSING!r}))
from pyramid_jax import pipeline
for module in pkgutil.iter_modules(pipeline.__path__, "pyramid_jax.pipeline."):
    importlib.import_module(module.name)
"""
# Steps that end in every way.
STEPS_THAT_END = """
import os, subprocess, time
from benchmarks.device import __main__ as device
from benchmarks.device.steps import STEPS, Step

def abort(log, tiny):
    log("number", value=1)
    os.abort()

def hang(log, tiny):
    log("number", value=2, helper=subprocess.Popen(["sleep", "99"]).pid)
    time.sleep(99)

def full(log, tiny):
    raise RuntimeError("RESOURCE_EXHAUSTED: no memory | at all")

def fine(log, tiny):
    log("number", value=float("nan"))

STEPS.clear()
STEPS.update(abort=Step(abort, 10), hang=Step(hang, 1), full=Step(full, 10))
STEPS.update(fine=Step(fine, 10))
"""


def run(script: str, *arguments: str) -> str:
    """What a process prints that runs the steps after a script."""
    script += (
        "from benchmarks.device import __main__ as device\n"
        f"device.main({list(arguments)!r})\n"
    )
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache/tests"),
    }
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_steps_run_where_packages_for_data_and_logs_are_missing(tmp_path: Path):
    run(BLIND, "--tiny", "--only=ceilings,correctness", f"--to={tmp_path}")
    records = read_records(tmp_path / RESULTS)
    outcomes = [record["outcome"] for record in chosen(records, "ends")]
    output = (tmp_path / OUTPUT).read_text(encoding="utf-8")
    assert outcomes == ["done", "done"], output
    errors = chosen(records, "error")
    assert len(errors) == 2 and all(record["right"] for record in errors)


@pytest.mark.slow  # eleven processes
def test_every_step_runs_and_is_told(tmp_path: Path):
    printed = run(BLIND, "--tiny", "--budget=5400", f"--to={tmp_path}")
    records = read_records(tmp_path / RESULTS)
    output = (tmp_path / OUTPUT).read_text(encoding="utf-8")
    outcomes = {record["step"]: record["outcome"] for record in chosen(records, "ends")}
    assert outcomes == dict.fromkeys(STEPS, "done"), output
    assert all(record["environment"]["commit"] for record in chosen(records, "begins"))
    told = {record["what"] for record in records}
    assert {"product", "copy", "units", "trained", "decoded", "encoded"} <= told
    pieces = [(r["frames"], r["compiles"]) for r in chosen(records, "piece")]
    assert pieces == [(1, True), (8, True), (1, False), (8, False)]
    assert {r["kernel"] for r in chosen(records, "trial", failure=None)} == {
        "pallas_tpu",
        "pallas_triton",
    }
    errors = chosen(records, "error")
    assert len(errors) == 2 and all(record["right"] for record in errors)
    for preset in ("768p_5s", "384p_5s"):
        units = [r["units"] for r in chosen(records, "units", preset=preset)]
        assert units == ["later", "first"]
        assert len(chosen(records, "step", preset=preset)) == 6
    timed = [r["measured"] for r in chosen(records, "time", rival="xla")]
    assert len(timed) == 3 and all(one["forward"]["median"] > 0 for one in timed)
    (tuned,) = json.loads((tmp_path / "attention_tiles.json").read_text())
    assert tuned["backend"] == "pallas_triton"
    assert "small shapes: no measurement" in printed
    assert all(f"| {name} |" in printed for name, _ in summary(records))


def test_a_step_that_crashes_hangs_or_fills_the_memory_ends_alone(tmp_path: Path):
    printed = run(STEPS_THAT_END, "--tiny", "--budget=40", f"--to={tmp_path}")
    records = read_records(tmp_path / RESULTS)
    assert {r["step"]: r["outcome"] for r in chosen(records, "ends")} == {
        "abort": "ended by SIGABRT",
        "hang": "out of time",
        "full": "failed",
        "fine": "done",
    }
    numbers = {r["step"]: r["value"] for r in chosen(records, "number")}
    assert numbers == {"abort": 1, "hang": 2, "fine": None}
    (hung,) = chosen(records, "number", step="hang")
    state = Path(f"/proc/{hung['helper']}/stat")
    assert not state.exists() or ") Z " in state.read_text()
    assert (
        "| full | failed | RuntimeError: RESOURCE_EXHAUSTED: no memory / at" in printed
    )


def test_time_that_a_step_leaves_goes_to_the_later_ones(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(device.time, "monotonic", lambda: now[0])
    names, given = list(STEPS), {}
    for name, seconds in device.timetable(names, 540):
        given[name] = seconds
        now[0] += seconds / 2
    shares = [STEPS[name].share for name in names]
    assert given[names[0]] == pytest.approx(540 * shares[0] / sum(shares))
    assert given[names[-1]] > 4 * 540 * shares[-1] / sum(shares)
    now[0] = 0.0
    late = []
    for _, seconds in device.timetable(names[:3], 540):
        now[0] += 300.0
        late.append(seconds > 0)
    assert late == [True, True, False]  # from 600 s on


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--only=ceilings,text,vae", "no step 'vae'; the steps are ceilings, corr"),
        ("--budget=nan", "--budget=nan: expected seconds"),
        ("--budget=0", "--budget=0.0: expected seconds"),
        ("--to=/proc/results", "nothing can be written to the folder /proc/results"),
    ],
)
def test_wrong_options_are_refused_in_a_line(flag: str, message: str):
    with pytest.raises(SystemExit, match=re.escape(message)) as ended:
        device.parse([flag])
    assert "\n" not in str(ended.value)


def test_a_step_that_is_run_again_replaces_its_records(tmp_path: Path):
    for step, value in (("a", 1), ("b", 2), ("a", 3)):
        log = Log(tmp_path, step)
        log("begins", tiny=False)
        log("number", value=value, share=float("inf"))
    records = read_records(tmp_path / RESULTS)
    assert {r["step"]: r["value"] for r in chosen(records, "number")} == {
        "a": 3,
        "b": 2,
    }
    assert chosen(records, "number", step="a", share=None)


WHERE = {"device": "NVIDIA H200", "jax": "1", "python": "3", "date": "today"}


def units(name: str, seconds: float, flops: float) -> dict[str, Any]:
    """The Euler steps of some units of a video on a chip of 1 PFLOP/s."""
    values = {"seconds": seconds, "flops": flops, "peak_gib": 6.25}
    used = {"utilisation": flops / seconds / 1e15}
    return {"what": "units", "preset": "768p_5s", "units": name, **values, **used}


def test_the_report_has_what_is_known_and_no_more():
    begins = [
        {"what": "begins", "tiny": False, "environment": WHERE | {"commit": commit}}
        for commit in ("abc", "abc", "def")
    ]
    later, first = units("later", 15.0, 9e15), units("first", 5.0, 1e15)
    assert heading(begins) == "NVIDIA H200: jax 1, python 3, commit abc, def, today"
    assert not report(begins) and heading([]) == "nothing was run"
    assert summary([*begins, later]) == [
        (
            "Euler steps of a video, 768p, 5 s, later units only",
            "15.0 s for 9.00 PFLOP, 60% of the peak, 6.2 GiB",
        )
    ]
    assert summary([later, first]) == [
        (
            "Euler steps of a video, 768p, 5 s",
            "20.0 s for 10.00 PFLOP, 50% of the peak, 6.2 GiB",
        )
    ]


def test_a_decoder_that_was_cut_off_tells_of_its_pieces():
    about = {"what": "piece", "latents_at_once": 2, "seconds": 9.5}
    first = {**about, "frames": 1, "compiles": True}
    later = {**about, "frames": 16, "compiles": False}
    assert summary([first, later]) == [
        (
            "decoder, first piece, 2 latents at once, with its compilation",
            "9.50 s for 1 frames",
        ),
        ("decoder, later piece, 2 latents at once", "9.50 s for 16 frames"),
    ]


def attention_time(
    case: str, rival: str, rates: list[float] | None
) -> dict[str, object]:
    measured = {"rates": rates, "skipped": None if rates else "not here"}
    return {"what": "time", "case": case, "rival": rival, "measured": measured}


def test_kernels_are_compared_with_libraries_on_the_same_row():
    records = [
        attention_time("a", "pallas_triton", [300.0, 200.0]),
        attention_time("a", "cudnn", [100.0, 160.0]),
        attention_time("a", "pallas_mosaic_gpu", [450.0, 300.0]),
        attention_time("a", "flex", None),
        attention_time("b", "cudnn", [1.0, 1.0]),
    ]
    triton, mosaic = "pallas_triton, a, beside ", "pallas_mosaic_gpu, a, beside "
    dense = "cuDNN with the mask as a matrix"
    assert highlights(records) == [
        (triton + dense, "3.0 times as fast, 1.2 times with gradients"),
        (mosaic + "the Triton kernels", "1.5 times as fast, 1.5 times with gradients"),
        (mosaic + dense, "4.5 times as fast, 1.9 times with gradients"),
    ]


def test_an_error_that_is_no_number_or_too_large_is_wrong():
    about = {"what": "error", "kernel": "k", "case": "c", "dtype": "float32"}
    parts = {"values": 1e-6, "dq": 2e-6, "dk": None, "dv": 1e-6}
    trial = {"what": "trial", "kernel": "k", "failure": "it\ndiffers"}
    records = [trial, {**about, **parts, "right": False}]
    assert summary(records) == [
        ("k: trials passed", "0 of 1"),
        ("k: largest error in float32", "not finite; 0 of 1 rows right"),
    ]
    line = "| k | c | float32 | 1.0e-06 | 2.0e-06 | not finite | 1.0e-06 | **wrong** |"
    assert line in report(records)
