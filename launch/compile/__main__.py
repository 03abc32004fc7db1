# SPDX-License-Identifier: Apache-2.0
"""Compiles for chips that are not here: a training step, or parts of sampling.

    pyramid-jax compile --config=mmdit_768p [--topology=v6e:16x16] [--json=plan.json]
    pyramid-jax compile [--chips a100,v5e] [--parts attention] [--only PATTERN]

With a config, its training step is compiled for the machine that the config names, or
for another one: v5p:4x4x4, 2*v5p:4x4x4 (two slices), v6e:16x16, a100x8, h200x8, cpu.
The compiler is left as soon as it has settled operations, order and memory, except with
--whole: a TPU's instructions take it ten times as long, and tell a plan nothing.
Entries of the config are set as in training, e.g. --config.mesh.fsdp=8. It says what a
device holds, computes and exchanges, and predicts how long a step takes; the exit code
is 1 if the step does not fit. Without one:

The chips' own compilers run (XLA, Triton and ptxas; Mosaic and libtpu), but not the
programs. One line is printed for each size of each kernel (attention has two passes),
of the Euler step (for GPUs), or of the decoder's step: what it takes on the chip; and
for the Euler step of four GPUs, how efficient it is predicted to be. The exit code is 1
if a compiler refuses one, or if an Euler step does what it need not or waits too long.
`make test-compile` installs the compilers and runs the command for attention and for
Euler steps, which takes minutes; libtpu needs more than ten for each step of the
decoder.
"""

import argparse
import ast
import fnmatch
import itertools
import json
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from launch.usage import OneLineParser

# Otherwise libtpu would look for the machine that it runs on, and claim it.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    os.environ.update(ENVIRONMENT)
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.startswith("--config") for argument in arguments):
        return plan_step(arguments)
    from launch.compile import kernels, sampling, step, vae
    from launch.compile.chips import CHIPS

    parser = OneLineParser(prog="pyramid-jax compile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--chips", default=",".join(CHIPS), help=f"Some of {list(CHIPS)}."
    )
    parts = {"attention": kernels, "step": step, "decoder": vae, "sampling": sampling}
    parser.add_argument(
        "--parts", default=",".join(parts), help=f"Some of {list(parts)}."
    )
    parser.add_argument("--only", default="*", help="Pattern of sizes, e.g. '768p*'.")
    options = parser.parse_args(arguments)
    chip_names, part_names = options.chips.split(","), options.parts.split(",")
    for kind, names, table in (
        ("chip", chip_names, CHIPS),
        ("part", part_names, parts),
    ):
        for name in names:
            if name not in table:
                parser.error(f"no {kind} {name!r}; the {kind}s are {list(table)}")
    try:
        for name in chip_names:
            CHIPS[name].device()
    except ValueError as error:
        parser.error(str(error))
    refusals = 0
    for chip, part in itertools.product(chip_names, part_names):
        for size in parts[part].SIZES:
            if not fnmatch.fnmatch(size.name, options.only):
                continue
            for line in parts[part].compiled(CHIPS[chip], size):
                print(line, flush=True)
                refusals += line.refusal is not None
    print(f"{refusals} refused")
    return int(refusals > 0)


def plan_step(arguments: list[str]) -> int:
    """Compiles and tells the training step of a config; returns the exit code."""
    from launch.compile.dump import settled
    from launch.compile.machines import machine
    from launch.compile.plan import compiled, plan, report
    from launch.config_flag import ConfigParser

    parser = OneLineParser(prog="pyramid-jax compile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="Its name, or a file.")
    parser.add_argument("--topology", help="Another machine than the config's.")
    parser.add_argument("--json", type=Path, help="Also writes the numbers here.")
    parser.add_argument(
        "--whole", action="store_true", help="Wait for the machine's instructions, too."
    )
    entries = [each for each in arguments if each.startswith("--config.")]
    options = parser.parse_args([each for each in arguments if each not in entries])
    try:
        cfg = ConfigParser("config").parse(options.config)
        cfg.update_from_flattened_dict(dict(map(_entry, entries)))
        there = machine(options.topology or cfg.machine)
        with tempfile.TemporaryDirectory() as folder:
            early = partial(settled, arguments, Path(folder))
            step = compiled(cfg, there, None if options.whole else early)
        made = plan(options.config, step, there)
    except (KeyError, TypeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    print(report(made))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(made.record(), indent=1) + "\n")
    return int(not made.fits)


def _entry(argument: str) -> tuple[str, Any]:
    """The name of a config's entry and its value, from --config.NAME=VALUE.

    Raises:
        ValueError: it is something else.
    """
    found = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument)
    if found is None:
        raise ValueError(f"unknown argument {argument}")
    try:
        return found[1], ast.literal_eval(found[2])
    except (SyntaxError, ValueError):  # text
        return found[1], found[2]


if __name__ == "__main__":
    sys.exit(main())
