# SPDX-License-Identifier: Apache-2.0
"""The leaderboard: the clock, the goal, and that entries can be trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import leaderboard
from launch.evaluate.judges import Asked
from launch.evaluate.metrics import Clip
from pyramid_jax.data.loader import longest
from pyramid_jax.model import model_config
from pyramid_jax.train import data_config


@pytest.mark.parametrize("entry", leaderboard.ENTRIES)
def test_the_longest_segment_of_an_entry_fits_its_rows(entry: str):
    cfg = leaderboard.ENTRIES[entry]()
    model = model_config(cfg.model.to_dict())
    data = data_config(cfg, model)
    assert longest(data).tokens <= data.tokens
    assert data.latent_frames == leaderboard.RATE.frames


@pytest.fixture
def learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A method that makes grey videos at first, and real ones in the third interval."""
    trained = []

    def sample(_: object, asked: Sequence[Asked], seed: int) -> list[Clip]:
        good = len(trained) >= 3
        return [each.real if good else np.full_like(each.real, 90) for each in asked]

    clock = iter(range(0, 10**6, 50))
    monkeypatch.setattr(leaderboard, "train", lambda cfg, _: trained.append(cfg))
    monkeypatch.setattr(leaderboard, "sampled", sample)
    monkeypatch.setattr(leaderboard, "CAPTIONS", 10)
    monkeypatch.setattr(leaderboard, "SCENES", 2)
    monkeypatch.setattr(leaderboard.video, "load", lambda _: None)
    ticking = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(leaderboard, "time", ticking)
    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path / "results.json")
    return tmp_path


def test_an_entry_trains_until_its_videos_are_right(learner: Path):
    record = leaderboard.race("pyramid", learner, every=60, limit=1000)
    assert [point["seconds"] for point in record["points"]] == [50, 100, 150]
    assert [point["all"] >= 8 for point in record["points"]] == [False, False, True]
    assert leaderboard.arrived(record) == 150
    leaderboard.publish(record)
    row = leaderboard.leaderboard().splitlines()[-1]
    assert row.startswith("| pyramidal flow | 2 | 10 % (")
    assert "| 10 % | 10 % | 10 % |" in row


def test_an_entry_ends_at_its_limit_and_goes_on_from_there(learner: Path):
    record = leaderboard.race("plain", learner, every=60, limit=100)
    assert leaderboard.arrived(record) is None and len(record["points"]) == 2
    leaderboard.publish(record)
    assert "| not in 2 |" in leaderboard.leaderboard()
    assert leaderboard.arrived(leaderboard.race("plain", learner, 60, 1000)) == 150
    assert json.loads((learner / "record.json").read_text())["finished"]


def test_without_entries_the_table_says_so(learner: Path):
    assert leaderboard.leaderboard() == leaderboard.NONE
