# SPDX-License-Identifier: Apache-2.0
"""Clips of suites have the names that evaluators look for, however they are made."""

import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from launch.evaluate import __main__, suites, vbench
from launch.sample import choices, outputs
from pyramid_jax.pipeline.output import VideoOutput
from pyramid_jax.pipeline.video import VideoPipeline

PROMPTS = [
    {"prompt_en": "a red circle moves left", "dimension": ["color", "object_class"]},
    {
        "prompt_en": "In a still frame, a stop sign",
        "dimension": ["temporal_flickering"],
    },
]
CLIPS = 2 * 5 + 20


@pytest.fixture(autouse=True)
def loaded(model: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "load", lambda *_, **__: model)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Videos show their seed from here on; seed and size of every batch are kept."""
    batches: list[tuple[int, int]] = []

    def seeds(self, request, callback_on_step_end):
        size, prompts = request.size, request.prompts
        batches.append((request.seed, len(prompts)))
        seed = request.seed + np.arange(len(prompts))[:, None, None, None, None]
        shape = (len(prompts), size.frames, size.height, size.width, 3)
        frames = np.broadcast_to(10 + 6 * seed, shape).astype(np.uint8)
        return VideoOutput(frames, prompts, request.seed, self.defaults.fps)

    monkeypatch.setattr(VideoPipeline, "run", seeds)
    return batches


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return f"--prompts={path}"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, tuple[bytes, outputs.Recipe]]:
    """The pictures and the recipe of every clip below a folder."""
    found = {}
    for path in sorted(folder.glob("*/*.mp4")):
        pixels = outputs.video_io.read_video(path, (64, 64), 33, 8.0).tobytes()
        found[f"{path.parent.name}/{path.name}"] = pixels, outputs.read(path).recipe
    return found


# ----------------------------------------------------------------------- the whole list


def prompt_of(name: str) -> str:
    """The prompt of a file, as VBench's documents say: up to the last hyphen."""
    stem, suffix = os.path.splitext(name)
    prompt, number = stem.rsplit("-", 1)
    assert suffix == ".mp4" and number.isdecimal()
    return prompt


def test_vbench_finds_every_clip_of_the_whole_list(given, tmp_path: Path, capsys):
    """Its rules, on empty files with the names that a dry run lists.

    It takes the suffix of the first entry that a folder lists, looks for five files
    `PROMPT-NUMBER.mp4` of every prompt, 25 in the folder for flickering, and counts
    4,720 files.
    """
    __main__.evaluate(given("--suite=vbench", "--dry_run"))
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    for file, _ in lines:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.touch(exist_ok=False)
    folder, flickering = tmp_path / "videos", tmp_path / "temporal_flickering"
    assert names(tmp_path) == {"videos", "temporal_flickering"}

    entries = json.loads(vbench.PROMPTS.read_text())
    listed = os.listdir(folder)
    assert len([name for name in listed if name.lower().endswith(".mp4")]) == 4720
    assert Path(listed[0]).suffix == Path(os.listdir(flickering)[0]).suffix == ".mp4"
    found = set(listed)
    for entry in entries:
        wanted = {f"{entry['prompt_en']}-{i}.mp4" for i in range(5)}
        assert wanted <= found
    assert Counter(map(prompt_of, listed)) == dict.fromkeys(
        {entry["prompt_en"] for entry in entries}, 5
    )
    of_flickering = [
        entry["prompt_en"]
        for entry in entries
        if "temporal_flickering" in entry["dimension"]
    ]
    assert len(os.listdir(flickering)) == 1875 == 25 * len(of_flickering)
    assert names(flickering) == {
        f"{prompt}-{i}.mp4" for prompt in of_flickering for i in range(25)
    }
    assert max(len(os.fsencode(name)) for name in found) <= 255


def test_every_sampled_clip_has_its_own_seed():
    clips = suites.suite_clips("vbench", None, 3)
    assert [clip.seed for clip in clips] == list(range(3, 3 + 4720 + 1500))
    files = [file for clip in clips for file in clip.files]
    assert len(set(files)) == len(files) == 4720 + 1875
    shared = [clip for clip in clips if len(clip.files) == 2]
    assert len(shared) == 375
    assert all(len({Path(file).name for file in clip.files}) == 1 for clip in shared)


def test_shards_of_a_dry_run_are_the_whole(given, prompts, capsys):
    def listed(*arguments: str) -> list[str]:
        __main__.evaluate(given("--suite=vbench", "--dry_run", prompts, *arguments))
        return capsys.readouterr().out.splitlines()

    parts = [listed("--batch=4", f"--shard={k}/3") for k in (1, 2, 3)]
    assert min(map(len, parts)) > 0
    assert sorted(itertools.chain(*parts)) == sorted(listed("--batch=4"))


# ------------------------------------------------------------------------------- files


def test_clips_stand_alone_and_recipes_and_manifest_elsewhere(
    given, prompts, tmp_path: Path, sampled, capsys
):
    to = tmp_path / "made"
    __main__.evaluate(given("--suite=vbench", prompts, f"--to={to}", "--seed=2"))
    assert names(to) == {"videos", "temporal_flickering", "recipes", "manifest.json"}
    for folder, count in (("videos", 10), ("temporal_flickering", 25)):
        clips = names(to / folder)
        assert len(clips) == count and {Path(x).suffix for x in clips} == {".mp4"}
        assert names(to / "recipes" / folder) == {f"{name}.json" for name in clips}
    assert "10 + 25 files, VBench has 4,720 + 1,875" in capsys.readouterr().out

    text = (to / "manifest.json").read_text()
    manifest = json.loads(text)
    protocol = manifest["protocol"]
    assert (protocol["height"], protocol["frames"], protocol["fps"]) == (64, 33, 8.0)
    assert protocol["negative"] == "" and protocol["options"]["guidance"]["video"] > 0
    assert len(manifest["clips"]) == CLIPS
    for clip in manifest["clips"]:
        for file in clip["files"]:
            recipe = outputs.read(to / file, to / "recipes" / Path(file).parent).recipe
            assert (recipe.prompt, recipe.seed) == (clip["prompt"], clip["seed"])


def test_parts_and_pieces_are_the_whole(given, prompts, tmp_path: Path, sampled):
    """Three processes, one of which is interrupted, make what one process makes."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--suite=vbench", prompts, "--batch=4"]
    __main__.evaluate(given(*arguments, f"--to={whole}"))
    expected = sorted(sampled)
    assert [count for _, count in expected] == [4] * 7 + [2]

    del sampled[:]
    for shard in (3, 1, 2):
        __main__.evaluate(given(*arguments, f"--to={parts}", f"--shard={shard}/3"))
    assert sorted(sampled) == expected

    del sampled[:]
    lost = json.loads((parts / "manifest.json").read_text())["clips"][9]
    for file in lost["files"]:
        (parts / file).unlink()
    for shard in (1, 2, 3):
        __main__.evaluate(given(*arguments, f"--to={parts}", f"--shard={shard}/3"))
    assert sampled == [(8, 4)]  # the batch that it is part of, so that it is the same
    assert (parts / "manifest.json").read_bytes() == (
        whole / "manifest.json"
    ).read_bytes()
    assert contents(whole) == contents(parts)
    assert len(contents(parts)) == 35


@pytest.mark.slow
def test_real_clips_do_not_depend_on_shards(given, prompts, tmp_path: Path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--suite=vbench", prompts, "--batch=4", "--steps=2", "--video_steps=2"]
    __main__.evaluate(given(*arguments, f"--to={whole}"))
    for shard in (1, 2):
        __main__.evaluate(given(*arguments, f"--to={parts}", f"--shard={shard}/2"))
    assert contents(whole) == contents(parts)


def test_evalcrafter_numbers_the_clips_of_its_prompts(
    given, tmp_path: Path, sampled, capsys
):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for i, prompt in enumerate(("a red circle", "a blue star\n", "a ring")):
        (folder / f"{i:04}.txt").write_text(prompt)
    (folder / "README.txt").write_text("other files are no prompts")
    arguments = ["--suite=evalcrafter", f"--to={tmp_path / 'made'}"]
    __main__.evaluate(given(*arguments, f"--prompts={folder}"))
    made = tmp_path / "made" / "videos"
    assert names(made) == {"0000.mp4", "0001.mp4", "0002.mp4"}
    recipe = outputs.read(made / "0001.mp4").recipe
    assert (recipe.prompt, recipe.seed) == ("a blue star", 1)
    assert "3 files, EvalCrafter has 700" in capsys.readouterr().out

    lines = tmp_path / "lines.txt"
    lines.write_text("a red circle\na blue star\n\na ring\n")
    assert suites.suite_clips("evalcrafter", str(lines), 0) == suites.suite_clips(
        "evalcrafter", str(folder), 0
    )


# -------------------------------------------------------------------------- is refused


def test_files_that_an_evaluator_would_take_for_clips_are_refused(
    given, prompts, tmp_path: Path, sampled
):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "notes.json").touch()
    with pytest.raises(ValueError, match=r"holds videos/notes\.json, which the eval"):
        __main__.evaluate(given("--suite=vbench", prompts, f"--to={tmp_path}"))
    assert not sampled


def test_another_choice_does_not_mix_with_what_is_there(
    given, prompts, tmp_path: Path, sampled
):
    arguments = ["--suite=vbench", prompts, f"--to={tmp_path / 'made'}"]
    __main__.evaluate(given(*arguments))
    del sampled[:]
    with pytest.raises(ValueError, match=r"manifest\.json is that of another suite"):
        __main__.evaluate(given(*arguments, "--guidance=3.5"))
    (tmp_path / "made" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"made from something else"):
        __main__.evaluate(given(*arguments, "--guidance=3.5"))
    assert not sampled


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2"])
def test_impossible_shards_are_refused(text: str):
    with pytest.raises(ValueError, match=r"is not K/N with 1 <= K <= N"):
        suites.parse_shard(text)


@pytest.mark.parametrize("prompt", ["this/that", "long " * 60])
def test_prompts_that_are_no_names_are_refused(prompt: str, tmp_path: Path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["scene"]}]))
    with pytest.raises(ValueError, match="can't be the name of a file"):
        suites.suite_clips("vbench", str(path), 0)


def test_evalcrafter_needs_its_prompts(tmp_path: Path):
    with pytest.raises(ValueError, match="--prompts=EvalCrafter/prompts"):
        suites.suite_clips("evalcrafter", None, 0)
    with pytest.raises(ValueError, match=r"holds no prompt; give a folder with 0000"):
        suites.suite_clips("evalcrafter", str(tmp_path), 0)
