# SPDX-License-Identifier: Apache-2.0
"""Every command of docs/evaluation.md runs, with few captions and faked videos."""

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags

from launch.compare.answers import Answer
from launch.compare.study import QUESTIONS
from launch.evaluate import __main__
from launch.sample import __main__ as sample
from launch.sample import choices
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.video import VideoPipeline
from tests.house.documents import CONVERTED, commands, program, words

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "evaluation.md"


@pytest.fixture
def fake(model: VideoPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Videos are noise of their seed, in an empty folder."""

    def noise(self, request, callback_on_step_end=None):
        size, prompts = request.size, request.prompts
        shape = (len(prompts), size.frames, size.height, size.width, 3)
        rng = np.random.default_rng(request.seed)
        frames = rng.integers(90, 160, shape, np.uint8)
        return VideoOutput(frames, prompts, request.seed, self.defaults.fps)

    monkeypatch.setattr(VideoPipeline, "run", noise)
    monkeypatch.setattr(choices, "load", lambda *_, **__: model)
    monkeypatch.chdir(tmp_path)


def rate(page: Any, host: str, port: int) -> None:
    """Anna prefers the first model, wherever it is."""
    for turn in page.study.turns("anna"):
        told = dict.fromkeys(QUESTIONS, ("left", "right")[turn.left])
        page.answers.add(Answer("anna", *turn, told))


@pytest.mark.slow  # the judge looks at hundreds of clips
def test_every_command_runs(fake, tmp_path: Path, capsys, monkeypatch):
    pytest.importorskip("cv2")
    pytest.importorskip("gradio")
    from launch.compare import __main__ as compare

    monkeypatch.setattr(compare, "serve", rate)
    few = re.compile(r"--captions=\d+")
    lines = [x for x in commands(DOCUMENT) if CONVERTED not in x]
    programs = {
        "launch.evaluate": (__main__.define, __main__.evaluate),
        "launch.sample": (sample.define, sample.sample),
        "launch.compare": (compare.define, compare.compare),
    }
    for line in lines:
        if not program(line):
            subprocess.run(["bash", "-e", "-c", line], check=True)
            continue
        name, *arguments = words(few.sub("--captions=4", line))
        define, main = programs[name]
        values = flags.FlagValues()
        define(values)
        values([name, *arguments])
        main(values)
    assert len(lines) >= 21
    out = capsys.readouterr().out
    assert "| **total** | **81.72** |" in out
    assert "PSNR infinite, SSIM 1.0000" in out
    assert "| aesthetic quality | 50 | 0 | 0 | 100.0% (" in out
    assert "| aesthetic quality | 2 | 0 | 0 | 100.0% (" in out
    assert (
        len(list((tmp_path / "runs" / "few" / "temporal_flickering").iterdir())) == 25
    )
