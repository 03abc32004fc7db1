# SPDX-License-Identifier: Apache-2.0
"""Compares this package with values recorded from the original implementation.

    pyramid-jax parity --cases DIR [--only GLOB] [--to FILE]

prints one line per recorded result: case, scenario, tensor, largest error, tolerance
and `ok`, `FAIL` or `skipped: why`; then totals. The exit code is 1 if anything failed.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import jax

from launch.usage import OneLineParser

VERDICTS = "ok", "FAIL", "skipped"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = OneLineParser(prog="pyramid-jax parity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--cases", type=Path, required=True, help="Folder of the cases."
    )
    parser.add_argument(
        "--only", default="*", help="Pattern of case names, e.g. 'sd3*'."
    )
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="JSON file for the totals."
    )
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")

    from launch.parity.cases import find
    from launch.parity.run import replay

    began, verdicts = time.monotonic(), Counter[str]()
    try:
        cases = find(options.cases, options.only)
    except ValueError as error:
        parser.error(str(error))
    for name, folder in cases.items():
        for line in replay(folder, name):
            print(line, flush=True)
            verdicts[line.verdict] += 1
    if options.to:
        totals = {v: verdicts[v] for v in VERDICTS}
        result = {"cases": [*cases], "verdicts": totals}
        options.to.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    counts = ", ".join(f"{verdicts[v]} {v}" for v in VERDICTS)
    print(f"{counts} in {time.monotonic() - began:.0f} s")
    return int(verdicts["FAIL"] > 0)


if __name__ == "__main__":
    sys.exit(main())
