# SPDX-License-Identifier: Apache-2.0
"""Videos of unlike lengths in one run: short ones are trained as long as they are."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyramid_jax.data.examples import latent_loader, stored_latent
from pyramid_jax.data.manifest import Record
from pyramid_jax.data.video_io import write_video
from pyramid_jax.latents import LatentConfig
from tests.packed import LAYOUT, SEQUENCES, SIZE, config, taken_parts

LENGTHS = {"10": 9, "11": 6, "12": 5, "13": 4, "14": 12}  # frames by caption
LONGEST, SHORTEST = 9, 5


@pytest.fixture
def clips(tmp_path: Path) -> list[Record]:
    records = []
    for text, frames in LENGTHS.items():
        path = tmp_path / f"{text}.mp4"
        write_video(path, np.full((frames, *SIZE, 3), 90, np.uint8), 8)
        records.append(Record(path, "video", text))
    return records


@pytest.mark.parametrize("per_unit", [1, 2])
def test_units_are_those_of_the_shorter_video(clips, tmp_path: Path, per_unit: int):
    """And none where whole units leave too little, or where a file is too short."""
    cut = replace(LAYOUT, frames_per_unit=per_unit)
    cfg = config(tmp_path, clips, frames=LONGEST, layout=cut, tokens=2000, max_bad=0.5)
    cfg = replace(cfg, least_frames=SHORTEST)
    last: dict[str, int] = defaultdict(int)
    for part in taken_parts(6, cfg, tmp_path, load=None):
        text = str(part.text[1])
        last[text] = max(last[text], int(part.tokens.frame.max()))
    whole = {"10": 8, "11": 5 if per_unit == 1 else 4, "12": 4, "14": 8}
    assert last == whole  # of the longer ones the first frames
    skipped = (tmp_path / "skipped.jsonl").read_text()
    assert "has 4 frames at 8 frames per second, expected at least 5" in skipped


def test_whole_sequences_may_be_short(clips, tmp_path: Path):
    cfg = config(tmp_path, clips[1:2], frames=LONGEST, layout=SEQUENCES, tokens=2000)
    for part in taken_parts(1, replace(cfg, least_frames=5), tmp_path, load=None):
        assert set(part.tokens.frame) == set(range(6))


def test_stored_latents_may_be_short(tmp_path: Path, monkeypatch):
    raw = np.ones((3, 2, 2, 4), np.float32)
    monkeypatch.setattr(
        "pyramid_jax.data.examples.read_record_latent", lambda record: raw
    )
    latent = LatentConfig(4, 8, 4, 0.0, 1.0, 0.0, 1.0)
    record = Record(tmp_path / "a.mp4", "video", "1")
    cfg = config(tmp_path, [record], frames=17, latent=latent, least_frames=9)
    assert latent_loader(cfg)(record, (SIZE,)).shape == raw.shape
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2, 4\), expected \(4, 2, 2"):
        stored_latent(latent, 5, record, (SIZE,), least=4)
    with pytest.raises(ValueError, match=r"expected \(5, 2, 2, 4\)"):
        latent_loader(replace(cfg, least_frames=0))(record, (SIZE,))


def test_the_shortest_is_no_longer_than_the_longest(tmp_path: Path):
    with pytest.raises(ValueError, match=r"least_frames 10 must be 0 to 9 \(frames\)"):
        config(tmp_path, frames=9, least_frames=10)
