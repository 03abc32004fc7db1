# SPDX-License-Identifier: Apache-2.0
"""What a step of the released VAE's decoder moves on an H200, by its compiler.

    .venv-compile/bin/python -m benchmarks.decoder --to benchmarks/results/decoder.json

A later latent frame of 384 x 640 pixels; nothing runs. `make test-compile` installs the
compilers. Channels last is the order that tensor cores want: XLA takes it for images
only, unless it is told to (xla_gpu_force_conv_nhwc), which no GPU has tried here.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.device.report import table
from benchmarks.timing import environment
from launch.compile.__main__ import ENVIRONMENT

RESULT = Path(__file__).resolve().parent / "results" / "decoder.json"
CHANNELS_LAST = {"xla_gpu_force_conv_nhwc": True}
# Titles of ways, their places in `launch.compile.vae.SIZES`, options of the compiler.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "one device": ("384p decode 1", {}),
    "one device, channels last": ("384p decode 1", CHANNELS_LAST),
    "one of four that divide rows": ("384p decode 1 on 4", {}),
}
PACKAGES = ("jax", "jaxlib")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what every way moves, and writes it where `--to` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")  # has no GPU, and looks for none
    ways = {name: compiled(*way) for name, way in WAYS.items()}
    for name, found in ways.items():
        print(name, json.dumps(found))
    if options.to:
        if options.to.is_file():  # what the code of then made stays
            known = json.loads(options.to.read_text(encoding="utf-8"))["ways"]
            ways = {k: x for k, x in known.items() if k not in WAYS} | ways
        result = {"environment": environment(PACKAGES), "ways": ways}
        text = json.dumps(result, indent=2) + "\n"
        options.to.write_text(text, encoding="utf-8")


def compiled(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a step takes: FLOP, bytes reserved, bytes moved and kernels by kind."""
    from launch.compile import vae
    from launch.compile.chips import H200

    size = next(size for size in vae.SIZES if size.name == name)
    step = vae.program(H200, size, options)
    return {
        "flops": step.program.flops(),
        "reserved": step.memory.temp_size_in_bytes,
        "moved": {k: x._asdict() for k, x in vae.traffic(step.program).items()},
    }


def decoder_table() -> str:
    """GB that a step moves by kind, and how many kernels do."""
    ways = json.loads(RESULT.read_text(encoding="utf-8"))["ways"]
    kinds = list(dict.fromkeys(kind for way in ways.values() for kind in way["moved"]))

    def cell(way: dict[str, Any], kind: str) -> str:
        if kind not in way["moved"]:
            return "-"
        one = way["moved"][kind]
        return f"{one['bytes'] / 1e9:.1f} in {one['kernels']}"

    rows = [[kind, *(cell(way, kind) for way in ways.values())] for kind in kinds]
    others = [
        ["TFLOP", *(f"{way['flops'] / 1e12:.1f}" for way in ways.values())],
        ["GiB reserved", *(f"{way['reserved'] / 2**30:.1f}" for way in ways.values())],
    ]
    return table(("GB moved, kernels", *ways), rows + others)


if __name__ == "__main__":
    main()
