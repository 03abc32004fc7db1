# SPDX-License-Identifier: Apache-2.0
"""The second process that samples the same compiles nothing, and makes the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.start import CACHES

ROOT = Path(__file__).resolve().parents[2]
PROCESS = """
import collections, hashlib, json
from jax import monitoring

counts = collections.Counter()
monitoring.register_event_listener(lambda event, **_: counts.update([event]))
monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: counts.update([event])
)
from launch import start
from pyramid_jax.pipeline import video
from pyramid_jax.pipeline.folder import PAIRS

start.enable_compile_cache()
model = video.load(PAIRS)
counts.clear()
out = model(
    "a red circle moves left", num_frames=1, num_inference_steps=2,
    video_num_inference_steps=2, seed=0,
)
compile = "/jax/compilation_cache/"
print(json.dumps({
    "frames": hashlib.sha256(out.frames.tobytes()).hexdigest(),
    "asked": counts[compile + "compile_requests_use_cache"],
    "hits": counts[compile + "cache_hits"],
    "compiled": counts["/jax/core/compile/backend_compile_duration"],
    "traced": counts["/jax/core/compile/jaxpr_trace_duration"],
}))
"""


def started(caches: Path) -> subprocess.Popen:
    """A process that samples an image, with its caches in a folder."""
    # Matplotlib would complain of a folder that takes no files.
    variables = {CACHES: str(caches), "MPLCONFIGDIR": str(caches.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(*processes: subprocess.Popen) -> list[dict[str, Any]]:
    """What processes counted; they must have said nothing else."""
    try:
        said = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err
        assert not any(word in err for word in ("cache", "kept", "again")), err
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_the_second_process_compiles_nothing(tmp_path: Path):
    caches = tmp_path / "caches"
    # Two write at the same time.
    first, beside = finished(started(caches), started(caches))
    (second,) = finished(started(caches))
    assert first["frames"] == beside["frames"] == second["frames"]
    # Either may find what the other has just kept.
    cold = max(first, beside, key=lambda counted: counted["compiled"])
    assert cold["compiled"] > cold["asked"]
    # What is left are small functions, which JAX's own cache answers.
    assert second["compiled"] == second["asked"] == second["hits"]
    assert second["traced"] == second["asked"] < cold["traced"]


def test_commands_run_where_nothing_can_be_kept(tmp_path: Path):
    (tmp_path / "file").touch()
    (counted,) = finished(started(tmp_path / "file"))
    assert counted["compiled"] > counted["hits"] == 0
