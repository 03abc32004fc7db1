# SPDX-License-Identifier: Apache-2.0
"""Numbers on disk: what is written, what a restart replaces, what is drawn."""

import json
import sys
from contextlib import closing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.shapes import Rows
from pyramid_jax.sharding import device_mesh
from pyramid_jax.training import metrics
from pyramid_jax.training.step import Report

# A batch of four rows, two for each of two devices, of seven tokens in twelve places.
SEGMENT = np.array([[0, 0, -1], [0, 1, 1], [-1] * 3, [0, 0, -1]], np.int32)
WORK = metrics.RowWork(*np.array([[1, 2, 3, 4], [10, 10, 10, 30]], np.float32) * 1e12)


def rates(monkeypatch, arithmetic: metrics.Arithmetic | None) -> dict[str, float]:
    """The numbers of two steps that took four seconds, after one that was compiled."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(metrics, "time", clock)
    mesh = device_mesh(data=2, devices=jax.devices()[:2])
    one, none = jnp.float32(1), jnp.int32(0)
    report = Report(one, one, one, none, metrics.Means({}, one))
    zeros = np.zeros((4, 3, 3), np.float32)
    order = SEGMENT, SEGMENT, SEGMENT >= 0, SEGMENT, SEGMENT, SEGMENT
    batch = Rows(zeros, zeros, zeros, *order, zeros)
    window = metrics.MetricsWindow(mesh, arithmetic=arithmetic)
    for _ in range(3):
        window.add(report, batch)
        now[0] += 2
    now[0] -= 2
    return window.close()


def test_rates_are_those_of_all_rows_beside_the_peak_of_all_devices(monkeypatch):
    found = rates(monkeypatch, metrics.Arithmetic(lambda batch: WORK, peak=4e12))
    assert found["steps_per_second"] == 2 / 4
    assert found["tokens_per_second"] == 2 * 7 / 4
    assert found["token_utilisation"] == pytest.approx(7 / 12)
    assert found["model_tflops_per_second"] == pytest.approx(2 * 10 / 4)
    assert found["utilisation"] == pytest.approx(5 / (2 * 4))
    # The devices compute 20 and 40.
    assert found["imbalance"] == pytest.approx(40 / 30 - 1)


def test_there_is_no_utilisation_without_a_peak_and_no_work_without_a_count(
    monkeypatch,
):
    counted = metrics.Arithmetic(lambda batch: WORK)
    assert "utilisation" not in rates(monkeypatch, counted)
    found = rates(monkeypatch, None)
    assert found["tokens_per_second"] == 2 * 7 / 4
    assert not {"model_tflops_per_second", "imbalance", "utilisation"} & {*found}


def test_imbalance_is_the_mean_over_steps_of_the_most_over_the_mean():
    steps = np.array([[1.0, 3.0], [1.0, 1.0], [2.0, 4.0], [0.0, 0.0]])
    # Rows of a device are beside each other: 2 and 2, then 4 and 4.
    assert metrics.imbalance(steps, 2) == 0
    assert metrics.imbalance(steps, 4) == pytest.approx((2 / 1 + 4 / 2) / 2 - 1)


def test_metrics_are_lines_and_events_on_disk_at_once(tmp_path):
    with closing(metrics.Metrics(tmp_path)) as writer:
        writer.write(10, {"loss": 0.5})
        text = (tmp_path / metrics.JSONL).read_text()
        writer.write(20, {"loss": 0.25})
    assert json.loads(text) == {"step": 10, "loss": 0.5}
    assert len(metrics.read_metrics(tmp_path / metrics.JSONL)) == 2
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_project_gets_the_same_numbers(tmp_path, monkeypatch):
    begun, sent = {}, []
    run = SimpleNamespace(
        log=lambda values, step: sent.append((step, values)), finish=lambda: None
    )
    wandb = SimpleNamespace(init=lambda **options: begun.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with closing(metrics.Metrics(tmp_path, "pyramids")) as writer:
        writer.write(10, {"loss": 0.5})
    assert sent == [(10, {"loss": 0.5})]
    assert begun["project"] == "pyramids" and begun["resume"] == "allow"
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install wandb"):
        metrics.Metrics(tmp_path, "pyramids")


def test_steps_that_a_restart_repeats_replace_the_earlier_ones(tmp_path):
    for steps in ((1, 2, 3), (2, 3, 4)):
        with closing(metrics.Metrics(tmp_path)) as writer:
            for step in steps:
                writer.write(step, {"loss": float(step + steps[0])})
    lines = metrics.read_metrics(tmp_path / metrics.JSONL)
    assert [(x["step"], x["loss"]) for x in lines] == [(1, 2), (2, 4), (3, 5), (4, 6)]


def test_the_loss_is_drawn(tmp_path):
    with closing(metrics.Metrics(tmp_path)) as writer:
        for step in range(1, 50):
            writer.write(step, {"loss": 1 / step, "loss_stage_0": 2 / step})
        writer.write(50, {"loss": 0.02, "loss_stage_1": 0.01})
    metrics.plot_loss(tmp_path / metrics.JSONL, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_losses_can_not_be_drawn(tmp_path):
    with closing(metrics.Metrics(tmp_path)):
        pass
    with pytest.raises(ValueError, match="holds no losses"):
        metrics.plot_loss(tmp_path / metrics.JSONL, tmp_path / "loss.png")


def test_smoothing_keeps_constants_lines_and_the_ends():
    line = np.arange(200.0)
    np.testing.assert_allclose(metrics.smooth(line), line, atol=1e-9)
    noisy = np.random.default_rng(0).normal(size=200)
    assert metrics.smooth(noisy)[0] == noisy[0]
    assert metrics.smooth(noisy)[100:180].std() < 0.7 * noisy[100:180].std()
