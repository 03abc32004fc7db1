# SPDX-License-Identifier: Apache-2.0
"""Which clips are compared, and who sees which of them on which side."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from launch import moving_shapes
from launch.compare.__main__ import PROMPTS as FILE
from launch.compare.study import Pair, Study, paired, rater_name
from launch.evaluate.judges import ask_shapes
from launch.sample import outputs
from launch.sample.lists import read_lines
from tests.launch.compare.conftest import BRIGHT, PROMPTS, write_clips


def study(pairs: int, seed: int = 0) -> Study:
    clips = Path("old.mp4"), Path("new.mp4")
    return Study(("old", "new"), tuple(Pair(str(i), clips) for i in range(pairs)), seed)


def test_the_50_prompts_are_captions_that_the_embedded_models_know():
    texts = [line.prompt for line in read_lines(FILE)]
    assert texts == [asked.text for asked in ask_shapes(50, 2410, 8, False)]
    words = {word for text in texts for word in text.split()}
    known = *moving_shapes.SHAPES, *moving_shapes.COLOURS, *moving_shapes.DIRECTIONS
    assert len({*texts}) == 50 and words >= {*known}


def test_a_rater_sees_every_pair_once_and_each_clip_as_often_on_either_side():
    for rater in ("anna", "bo", "zoë"):
        turns = study(50).turns(rater)
        assert sorted(turn.pair for turn in turns) == [*range(50)]
        assert Counter(turn.left for turn in turns) == {0: 25, 1: 25}


def test_sides_and_order_depend_on_rater_and_seed_alone():
    turns = study(50).turns("anna")
    assert turns == study(50).turns("anna")
    for others in (study(50).turns("annb"), study(50, seed=1).turns("anna")):
        assert [turn.pair for turn in turns] != [turn.pair for turn in others]
        mine, theirs = (dict(each) for each in (turns, others))
        assert 5 < sum(mine[pair] != theirs[pair] for pair in mine) < 45


def test_no_pair_is_shown_more_often_on_one_side():
    """Over 2,000 raters, where half is 1,000 with a deviation of 22."""
    sides = np.zeros(3)
    for rater in range(2000):
        for turn in study(3).turns(str(rater)):
            sides[turn.pair] += turn.left
    assert (abs(sides - 1000) < 100).all()


def test_clips_of_one_prompt_are_paired(folders: tuple[Path, Path], tmp_path: Path):
    second = write_clips(tmp_path / "turned", BRIGHT, PROMPTS[::-1])
    for pair in paired(folders[0], second):
        assert [outputs.read(clip).recipe.prompt for clip in pair.clips] == [
            pair.prompt
        ] * 2
        assert [clip.parent for clip in pair.clips] == [folders[0], second]


def test_several_clips_of_a_prompt_are_paired_by_their_seeds(tmp_path: Path):
    first = write_clips(tmp_path / "first", 60, PROMPTS[:1] * 2)
    second = write_clips(tmp_path / "second", 90, PROMPTS[:1] * 2)
    pairs = paired(first, second)
    seeds = [[outputs.read(clip).recipe.seed for clip in p.clips] for p in pairs]
    assert seeds == [[60, 90], [61, 91]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPTS[:2], "has 1 clips of 'a blue ring moves down', .* has 0; sample both"),
        ((*PROMPTS, "a"), "has 0 clips of 'a', .* has 1; sample both folders from one"),
        ((*PROMPTS, PROMPTS[0]), "has 1 clips of 'a red circle moves left', .* has 2;"),
    ],
)
def test_other_prompts_are_refused_in_one_line(
    folders: tuple[Path, Path], tmp_path: Path, prompts: list[str], message: str
):
    other = write_clips(tmp_path / "other", BRIGHT, prompts)
    with pytest.raises(ValueError, match=message) as error:
        paired(folders[0], other)
    assert "\n" not in str(error.value)


def test_what_is_no_folder_of_clips_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
):
    with pytest.raises(ValueError, match="is compared with itself; give two folders"):
        paired(folders[0], folders[0] / ".." / "elder")
    with pytest.raises(ValueError, match="missing is not a folder; correct the path"):
        paired(folders[0], tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no mp4 files; give a folder that"):
        paired(folders[0], tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="does not say what it was made from"):
        paired(folders[0], tmp_path)


def test_a_rater_has_one_name_however_it_is_written():
    assert rater_name("  Anna  Lee ") == rater_name("anna lee") == "anna lee"
    for name in ("", "  ", "x" * 41, "a\x00b", None, 7):
        with pytest.raises(ValueError, match="is no name; give one of 1 to 40 letters"):
            rater_name(name)
