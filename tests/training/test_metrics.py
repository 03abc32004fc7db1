# SPDX-License-Identifier: Apache-2.0
"""Numbers on disk: what is written, what a restart replaces, what is drawn."""

import json
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from pyramid_jax.shapes import Rows
from pyramid_jax.training import metrics


def test_tokens_are_counted_without_padding():
    zeros = np.zeros((2, 3, 1), np.float32)
    segment = np.array([[0, 0, -1], [0, 1, 1]], np.int32)
    batch = Rows(zeros, zeros, zeros, segment, *[segment] * 5, zeros)
    assert metrics.token_counts(batch) == (5, 6)


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
