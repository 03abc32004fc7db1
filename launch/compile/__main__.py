# SPDX-License-Identifier: Apache-2.0
"""Compiles attention, both passes, and the VAE's decoder for chips that are not here.

    python -m launch.compile [--chips a100,v5e] [--parts attention] [--only PATTERN]

The chips' own compilers run (XLA, Triton and ptxas; Mosaic and libtpu), the programs do
not. One line is printed per kernel, or step of the decoder, and size: what it takes on
the chip. The exit code is 1 if a compiler refuses one. `make test-compile` installs the
compilers and runs it for attention, which takes minutes; libtpu needs more than ten for
each step of the decoder.
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
    parts = {"attention": kernels, "decoder": vae}
    parser.add_argument("--parts", default=",".join(parts), help=f"of {list(parts)}")
    parser.add_argument("--only", default="*", help="pattern of sizes, e.g. '768p*'")
    given = parser.parse_args(arguments)
    chips, chosen = given.chips.split(","), given.parts.split(",")
    for what, names, known in (("chip", chips, CHIPS), ("part", chosen, parts)):
        for name in names:
            if name not in known:
                parser.error(f"no {what} {name!r}; the {what}s are {list(known)}")
    failed = 0
    for name in chips:
        for part in chosen:
            for work in parts[part].WORKS:
                if not fnmatch.fnmatch(work.name, given.only):
                    continue
                for line in parts[part].compiled(CHIPS[name], work):
                    print(line, flush=True)
                    failed += line.refused is not None
    print(f"{failed} refused")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
