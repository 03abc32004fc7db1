# SPDX-License-Identifier: Apache-2.0
"""Reports of numbers as JSON files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Writes a report into a JSON file, and makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
