# SPDX-License-Identifier: Apache-2.0
"""How well a model learns does not depend on the devices that train it.

The embedded model is tuned to read its history once per stage, from shards of latents,
and its videos are judged: before, none has the colours of its caption.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyramid_jax
from configs import clean_history
from launch.evaluate.adherence import adherence
from launch.evaluate.judges import JUDGES
from launch.moving_shapes import wilson
from launch.pairs.dataset import write_pairs
from launch.pairs.scene import Settings
from pyramid_jax.train import train
from tests import hosts
from tests.conftest import ROOT

FRAMES, CAPTIONS, STEPS, CLIPS = 9, 24, 60, 96
TUNE = """
import json
from tests import test_learning

test_learning.tune(arguments[0], arguments[1], **json.loads(arguments[2]))
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of latents and captions."""
    folder = tmp_path_factory.mktemp("records")
    clips = write_pairs(folder / "pairs", CLIPS, settings=Settings(FRAMES))
    for shard in ("0/2", "1/2"):
        command = f"""-m pyramid_jax prepare --latents --model={pyramid_jax.PAIRS}
            --manifest={clips} --to={folder / "shards"} --shard={shard}
            --sizes=64x64,64x96 --frames={FRAMES} --fps=8"""
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    return folder / "shards"


def tune(records: str, folder: str, steps: int = STEPS, **mesh: int) -> None:
    """Trains on all devices of all processes, divided like this."""
    cfg = clean_history.get_config("pairs")
    cfg.data.update(manifest=records, frames=FRAMES)
    cfg.mesh.update(mesh)
    cfg.optimizer.update(steps=steps, warmup_steps=min(10, steps))
    cfg.step.ema_decay = 0.95
    cfg.loop.update(steps=steps, log_every=1, save_every=steps, sample_every=0)
    cfg.prompts = ()
    train(cfg, folder, start=pyramid_jax.PAIRS)


def right(folder: Path) -> int:
    """In how many videos both objects have the colours that were asked for."""
    judge = JUDGES["pairs"]
    asked = judge.ask(CAPTIONS, 0, FRAMES, False)
    texts = [each.text for each in asked]
    videos = pyramid_jax.load(folder)(
        texts,
        num_frames=FRAMES,
        seed=1,
        num_inference_steps=5,
        video_num_inference_steps=3,
    )
    return adherence(judge, list(videos.frames), asked)["colours"]


@pytest.mark.slow
def test_a_model_learns_as_well_on_many_devices_as_on_one(
    records: Path, tmp_path: Path
):
    found = {}
    for name, count, mesh in (
        ("before", 1, {"steps": 1}),
        ("one device", 1, {}),
        ("eight devices", 1, {"data": 2, "fsdp": 2, "tensor": 2}),
        ("two processes of four", 2, {"data": 2, "fsdp": 4}),
    ):
        devices = 1 if name in ("before", "one device") else 8 // count
        arguments = records, tmp_path / name, json.dumps(mesh)
        hosts.run(TUNE, count, *arguments, devices=devices, flags="")
        found[name] = right(tmp_path / name / "model")
    before = wilson(found.pop("before"), CAPTIONS)
    low, high = wilson(found["one device"], CAPTIONS)
    assert low > before[1], found
    assert all(low <= count / CAPTIONS <= high for count in found.values()), found
