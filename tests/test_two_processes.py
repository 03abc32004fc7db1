# SPDX-License-Identifier: Apache-2.0
"""Training by two processes that share a mesh, as on two hosts."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from launch.moving_shapes import write_dataset
from pyramid_jax.pipeline import video
from pyramid_jax.train import train

PROCESS = """
import json, sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address, rank, manifest, workdir, steps, mesh = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
assert jax.device_count() == 4 and jax.local_device_count() == 2

from configs import tiny
from pyramid_jax.train import train

cfg = tiny.get_config("smoke")
cfg.data.update(manifest=manifest, batch=8)
cfg.mesh.update(json.loads(mesh))
cfg.loop.steps = int(steps)
cfg.prompts = ("a red circle moves left", "a green ring moves up")
train(cfg, workdir)
"""


def two_processes(manifest: Path, workdir: Path, steps: int, **mesh: int) -> list[str]:
    """Trains to a number of steps; what the processes said that failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    arguments = manifest, workdir, steps, json.dumps(mesh)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, *map(str, (rank, *arguments))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        text[-3000:]
        for process, text in zip(processes, said, strict=True)
        if process.returncode
    ]


@pytest.mark.slow  # two processes compile everything; tests/test_hosts.py is faster
def test_what_two_processes_began_one_continues(tmp_path: Path):
    """The axis `context` spans them, so they make the same rows."""
    manifest = write_dataset(tmp_path / "shapes", 16, seed=1)
    run = tmp_path / "run"
    assert not two_processes(manifest, run, steps=2, data=1, context=2, tensor=2)
    first = video.load(run / "model")
    cfg = tiny.get_config("smoke")
    cfg.data.update(manifest=str(manifest), batch=8)
    cfg.loop.steps = 3
    train(cfg, run)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[1]["imbalance"] == 0 and lines[1]["token_utilisation"] <= 1
    last = video.load(run / "model")
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), first.params, last.params
    )
    assert any(jax.tree.leaves(moved))
