# SPDX-License-Identifier: Apache-2.0
"""How far bfloat16 and products of eight bits lead from float32.

python -m benchmarks.precision --to benchmarks/results/precision.json

Random weights: the latents after an Euler step at every stage, for blocks of released
width; the embedded model: its videos, from the same noise. Errors are root mean squares
as shares of those of the float32 result; frames are compared by PSNR, too.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ours import stepping
from benchmarks.timing import environment
from benchmarks.workload import Workload
from launch.demo import PROMPTS
from pyramid_jax.model import ModelConfig
from pyramid_jax.pipeline.folder import DTYPES, PAIRS
from pyramid_jax.pipeline.video import load

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
RELEASED = Workload(depth=4, width=1536, heads=24, cells=(16, 24), sampled=2, steps=1)
SMALL = replace(RELEASED, depth=1, width=64, heads=1, cells=(8, 8), caption=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the errors, and writes them where `--to` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="narrow blocks, a prompt")
    options = parser.parse_args(argv)
    work, prompts = (SMALL, PROMPTS[:1]) if options.small else (RELEASED, PROMPTS)
    result = {
        "environment": environment(PACKAGES),
        "random": random_weights(work),
        "embedded": embedded(prompts),
    }
    for name, errors in result.items():
        print(name, json.dumps(errors))
    if options.to:
        options.to.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def random_weights(work: Workload) -> dict[str, float]:
    """The error of sampled latents, by dtype."""
    latents = {}
    for dtype in DTYPES:
        *_, last = stepping(work, rounded(work.model, dtype), spread=0.02)()
        latents[dtype] = np.asarray(last, np.float32)
    exact = latents.pop("float32")
    return {dtype: error(x, exact) for dtype, x in latents.items()}


def embedded(prompts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Error and PSNR of the frames of the embedded model, by dtype."""
    frames = {}
    for dtype in DTYPES:
        pipeline = load(PAIRS, dtype=dtype)
        frames[dtype] = pipeline(list(prompts), seed=0, output="float32").frames
    exact = frames.pop("float32")
    return {
        dtype: {"error": error(x, exact), "psnr": -10 * float(np.log10(mean(x, exact)))}
        for dtype, x in frames.items()
    }


def rounded(model: ModelConfig, dtype: str) -> ModelConfig:
    """The model with the products that `load` selects by this name."""
    if dtype in ("float32", "bfloat16"):
        return replace(model, dit=replace(model.dit, dtype=dtype))
    dit = replace(model.dit, dtype="bfloat16", products=dtype)
    return replace(model, dit=dit)


def error(x: np.ndarray, exact: np.ndarray) -> float:
    """The root mean square of the difference, as a share of the exact values'."""
    return float(np.sqrt(mean(x, exact) / mean(exact, np.zeros_like(exact))))


def mean(x: Any, y: Any) -> float:
    """The mean square of the difference."""
    return float(np.mean(np.square(np.asarray(x, np.float64) - y)))


if __name__ == "__main__":
    main()
