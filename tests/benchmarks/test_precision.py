# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from benchmarks import precision


@pytest.mark.slow  # compiles sampling in four dtypes, twice
def test_errors_grow_as_bits_go(tmp_path):
    path = tmp_path / "precision.json"
    precision.main(["--small", f"--to={path}"])
    result = json.loads(path.read_text())
    embedded = result["embedded"]
    for errors in (result["random"], {k: v["error"] for k, v in embedded.items()}):
        assert 0 < errors["bfloat16"] < errors["int8"] < 0.5
        assert errors["bfloat16"] < errors["fp8"] < 0.5
    assert embedded["bfloat16"]["psnr"] > embedded["int8"]["psnr"] > 15
