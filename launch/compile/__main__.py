# SPDX-License-Identifier: Apache-2.0
"""Compiles attention, the Euler step and the decoder for chips that are not here.

    pyramid-jax compile [--chips a100,v5e] [--parts attention] [--only PATTERN]

The chips' own compilers run (XLA, Triton and ptxas; Mosaic and libtpu), but not the
programs. One line is printed for each size of each kernel (attention has two passes),
of the Euler step (for GPUs), or of the decoder's step: what it takes on the chip. The
exit code is 1 if a compiler refuses one, or if the Euler step does what it need not.
`make test-compile` installs the compilers and runs the command for attention and for
the Euler step, which takes minutes; libtpu needs more than ten for each step of the
decoder.
"""

import argparse
import fnmatch
import itertools
import os
import sys

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
    from launch.compile import kernels, step, vae
    from launch.compile.chips import CHIPS

    parser = OneLineParser(prog="pyramid-jax compile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--chips", default=",".join(CHIPS), help=f"Some of {list(CHIPS)}."
    )
    parts = {"attention": kernels, "step": step, "decoder": vae}
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


if __name__ == "__main__":
    sys.exit(main())
