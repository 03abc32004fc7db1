# SPDX-License-Identifier: Apache-2.0
"""Compiles attention, both passes, and the VAE's decoder for chips that are not here.

    python -m launch.compile [--chips a100,v5e] [--only PATTERN]

The chips' own compilers run (XLA, Triton and ptxas; Mosaic and libtpu), the programs do
not. One line is printed per kernel, or step of the decoder, and size: what it takes on
the chip. The exit code is 1 if a compiler refuses one. `make test-compile` installs the
compilers and runs it.
"""

import argparse
import fnmatch
import os
import sys

# Libtpu would otherwise look for the machine that it runs on, and want it for itself.
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
    from launch.compile import kernels, vae
    from launch.compile.chips import CHIPS

    parser = argparse.ArgumentParser(
        prog="python -m launch.compile", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--chips", default=",".join(CHIPS), help=f"of {list(CHIPS)}")
    parser.add_argument("--only", default="*", help="pattern of sizes, e.g. '768p*'")
    given = parser.parse_args(arguments)
    failed = 0
    for name in given.chips.split(","):
        if name not in CHIPS:
            parser.error(f"no chip {name!r}; the chips are {list(CHIPS)}")
        for part in (kernels, vae):
            for work in part.WORKS:
                if not fnmatch.fnmatch(work.name, given.only):
                    continue
                for line in part.compiled(CHIPS[name], work):
                    print(line, flush=True)
                    failed += line.refused is not None
    print(f"{failed} refused")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
