# SPDX-License-Identifier: Apache-2.0
"""Processes that share a mesh, as hosts do, compute what one of them computes alone."""

import pickle
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store
from pyramid_jax.training.state import TrainState
from tests import hosts, spread

EVERY_MESH = """
import pickle
from pathlib import Path
from tests import spread

network, to, *names = arguments
network = getattr(spread, network)()
for name, mesh in spread.meshes(names):
    result = spread.two_steps(network, mesh)
    Path(to, f"{name}.{rank}").write_bytes(pickle.dumps(result))
"""


@pytest.mark.parametrize(
    ("network", "count", "names"),
    [
        ("small", 2, ("data-context", "fsdp-tensor")),
        pytest.param("small", 2, (), marks=pytest.mark.slow),
        pytest.param("small", 4, (), marks=pytest.mark.slow),
        pytest.param("transformer", 2, (), marks=pytest.mark.slow),
        pytest.param("transformer", 4, (), marks=pytest.mark.slow),
    ],
)
def test_processes_compute_what_one_computes_whatever_spans_them(
    tmp_path: Path, network: str, count: int, names: tuple[str, ...]
):
    """Losses, gradients (Adam's moments), weights and average after two steps."""
    hosts.run(EVERY_MESH, count, network, tmp_path, *names, devices=4 // count)
    alone = sharding.device_mesh(devices=jax.devices()[:1])
    state, losses = spread.two_steps(getattr(spread, network)(), alone)
    files = sorted(tmp_path.iterdir())
    assert len(files) == (len(names) or 10) * count
    for file in files:
        their_state, their_losses = pickle.loads(file.read_bytes())
        np.testing.assert_allclose(their_losses, losses, rtol=1e-5, err_msg=file.name)
        assert_same_but_for_sums(their_state, state)


def assert_same_but_for_sums(found: TrainState, expected: TrainState) -> None:
    """Gradients are the same to 1e-4 of the largest of their array.

    Adam divides by a gradient's own size, and so gives one near zero any direction:
    weights are the same to a hundredth of a step.
    """

    def close(a: Any, b: Any) -> None:
        most = 1e-12 + 1e-4 * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=most)

    jax.tree.map(close, found.optimizer, expected.optimizer)
    step = spread.RATE.learning_rate
    near = partial(np.testing.assert_allclose, rtol=0, atol=step / 100)
    jax.tree.map(near, found[:4], expected[:4])  # numbers, weights, average


# ------------------------------------------------------------------------------- faults

TRAIN = """
import os, signal, time
from pathlib import Path
from tests import spread

folder, steps, fault, when = arguments

def at(number):
    if number != int(when):
        return
    while number > 5 and not Path(folder, "5").is_dir():
        time.sleep(0.01)  # until the checkpoint before is complete
    if fault == "end" and rank == count - 1:
        signal.raise_signal(signal.SIGTERM)
    if fault == "die" and rank == count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "die while saving":
        # The checkpoint is complete when it gets its name.
        os.rename = os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

spread.trained(folder, int(steps), at)
"""


def weights(folder: Path) -> Any:
    """Weights, moments and average after 12 steps, continued by this process alone."""
    return jax.device_get(spread.trained(folder, 12))[2:]


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), a, b
    )


def test_a_signal_to_one_process_ends_all_within_two_steps(tmp_path: Path):
    """And one process continues what two began, whatever the log's interval."""
    said = hosts.run(TRAIN, 2, tmp_path, 1000, "end", 4)
    assert all("ends at 5" in text for text in said)
    assert Store(tmp_path, {}).latest() == 5
    assert_close(weights(tmp_path), weights(tmp_path.parent / "alone"))


@pytest.mark.slow
def test_a_process_that_dies_ends_all_and_the_run_goes_on(tmp_path: Path):
    """Within a minute with the heartbeats of these tests, which time out after 10 s."""
    processes = hosts.started(TRAIN, 2, tmp_path, 12, "die", 8)
    processes[1].wait(300)
    died = time.monotonic()
    (first, said), (second, _) = hosts.ended(processes)
    assert time.monotonic() - died < 60, said
    assert first and second == -signal.SIGKILL
    assert Store(tmp_path, {}).latest() == 5
    assert_close(weights(tmp_path), weights(tmp_path.parent / "alone"))


@pytest.mark.slow
def test_a_process_that_dies_while_it_saves_leaves_the_checkpoint_before(
    tmp_path: Path,
):
    ((code, _),) = hosts.ended(
        hosts.started(TRAIN, 1, tmp_path, 12, "die while saving", 8)
    )
    assert code == -signal.SIGKILL
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[1] == "5" and names[0].startswith("10.") and len(names) == 2
    assert_close(weights(tmp_path), weights(tmp_path.parent / "alone"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "12", "5"]


@pytest.mark.slow
def test_processes_agree_on_the_newest_checkpoint_that_is_whole(tmp_path: Path):
    hosts.run(TRAIN, 2, tmp_path, 10, "", 0)
    for file in (tmp_path / "10").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = hosts.run(TRAIN, 2, tmp_path, 12, "", 0)
    assert all("begins at 5" in text and "ends at 12" in text for text in said)
    assert (tmp_path / "10.damaged").is_dir()
    assert_close(weights(tmp_path), weights(tmp_path.parent / "alone"))


@pytest.mark.slow
def test_one_two_four_and_one_process_train_what_one_trains(tmp_path: Path):
    for count, steps in ((1, 3), (2, 6), (4, 9)):
        hosts.run(TRAIN, count, tmp_path, steps, "", 0)
    assert_close(weights(tmp_path), weights(tmp_path.parent / "alone"))


# -------------------------------------------------------------------------------- rates

RATES = """
import time
from types import SimpleNamespace
import jax.numpy as jnp
import numpy as np
from pyramid_jax import sharding
from pyramid_jax.shapes import Rows
from pyramid_jax.training import metrics
from pyramid_jax.training.step import Report

now = [0.0]
metrics.time = SimpleNamespace(monotonic=lambda: now[0])
mesh = sharding.device_mesh()
values, order = np.zeros((4, 3, 1), np.float32), np.zeros((4, 3), np.int32)
segment = np.full((4, 3), rank - 1, np.int32)  # the first process has padding only
batch = Rows(values, values, values, segment, *[order] * 5, values)
work = metrics.RowWork(np.full(4, 1e12), np.full(4, 1.0 + 2 * rank))
counted = metrics.Arithmetic(lambda rows: work, peak=1e12)
window = metrics.MetricsWindow(mesh, arithmetic=counted)
one = jnp.float32(1)
for _ in range(3):
    window.add(Report(one, one, one, jnp.int32(0), metrics.Means({}, one)), batch)
    now[0] += 1
names = ("tokens_per_second", "token_utilisation", "utilisation", "imbalance")
found = window.close()
print(*(found[name] for name in names))
"""


@pytest.mark.slow
def test_rates_are_those_of_all_processes():
    """Two steps in three seconds, less the one that was compiled, of four rows each."""
    said = hosts.run(RATES, 2, devices=2)
    for text in said:
        *_, tokens, used, share, uneven = map(float, text.split()[-4:])
        assert (tokens, used) == (2 * 12 / 3, 0.5)
        # Eight rows, a TFLOP each, by four devices; two compute 2, the other two 6.
        np.testing.assert_allclose((share, uneven), (2 * 8 / 3 / 4, 6 / 4 - 1))
