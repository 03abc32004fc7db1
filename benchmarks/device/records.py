# SPDX-License-Identifier: Apache-2.0
"""The file of results: a line of JSON for every number, on disk as soon as it is known.

A line names the step that wrote it, what it tells, and how many seconds after the
step's beginning. A step that is run again writes new lines, which count.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import plain

RESULTS, OUTPUT = "results.jsonl", "steps.log"

Record = dict[str, Any]


class Log:
    """Appends the records of one step to the results in a folder."""

    def __init__(self, folder: Path, step: str):
        self.folder, self.step = folder, step
        self._began = time.monotonic()

    def __call__(self, what: str, **values: Any) -> None:
        """Writes one record, and prints it; numbers that are not finite become null."""
        at = round(time.monotonic() - self._began, 2)
        record = {"step": self.step, "what": what, "at": at, **values}
        line = json.dumps(_finite(plain(record)))
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


def read_records(path: Path) -> list[Record]:
    """The records of a file, without those of steps that were run again."""
    lines = path.read_text(encoding="utf-8").splitlines()
    runs: dict[str, list[Record]] = {}
    for record in map(json.loads, lines):
        if record["what"] == "begins":
            runs[record["step"]] = []
        runs.setdefault(record["step"], []).append(record)
    return [record for run in runs.values() for record in run]


def chosen(records: Sequence[Record], what: str, **values: Any) -> list[Record]:
    """The records that tell this and have these values."""
    wanted = {"what": what, **values}.items()
    return [record for record in records if wanted <= record.items()]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
