# SPDX-License-Identifier: Apache-2.0
"""The command that compares: what it samples, what it shows, what it refuses."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from absl import flags

pytest.importorskip("gradio")

from launch.compare import __main__ as command
from launch.compare.answers import Answer
from launch.compare.study import QUESTIONS
from launch.sample import choices, outputs
from tests.painter import painter


def compare(*arguments: str) -> None:
    values = flags.FlagValues()
    command.define(values)
    values(["compare", *arguments])
    command.compare(values)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pages that were shown; on each, Anna prefers all that is on the right."""
    pages: list[Any] = []

    def serve(page: Any, host: str, port: int) -> None:
        pages.append(page)
        for turn in page.study.turns("anna"):
            told = dict.fromkeys(QUESTIONS, "right")
            page.answers.add(Answer("anna", *turn, told))

    monkeypatch.setattr(command, "serve", serve)
    return pages


def test_folders_are_compared_and_results_written(
    shown: list[Any], folders: tuple[Path, Path], tmp_path: Path, capsys
):
    given = f"--videos={folders[0]}", f"--against={folders[1]}", f"--to={tmp_path}"
    compare(*given)
    compare(*given)  # goes on
    assert [page.study.names for page in shown] == [tuple(map(str, folders))] * 2
    compare("--results", f"--to={tmp_path}")
    out = capsys.readouterr().out
    assert f"3 answers are in {tmp_path}/answers.jsonl; --results adds them up" in out
    assert f"| 3 pairs | {folders[0]} wins | ties | {folders[1]} wins |" in out
    report = json.loads((tmp_path / "results.json").read_text())
    wins = sum(turn.left for turn in shown[0].study.turns("anna"))
    assert {x["wins"] for x in report["questions"].values()} == {wins}
    assert report["raters"] == {"anna": 3}


def test_two_models_are_sampled_with_the_same_prompts_and_seeds(
    shown: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded: list[str] = []

    def load(name: str, *_: Any, **__: Any) -> Any:
        loaded.append(name)
        return painter()

    monkeypatch.setattr(choices, "load", load)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a\n{"prompt": "b", "seed": 40}\nc\n')
    given = "--model=one", "--against=other", f"--prompts={prompts}", "--seed=7"
    given += (f"--to={tmp_path / 'study'}", "--frames=3")
    compare(*given)
    compare(*given)  # makes nothing again
    assert loaded == ["one", "other"] * 2
    assert shown[0].study.names == ("one", "other")
    for pair, seed in zip(shown[0].study.pairs, (7, 40, 9), strict=True):
        recipes = [outputs.read(path).recipe for path in pair.clips]
        assert [(x.prompt, x.seed, x.frames) for x in recipes] == [
            (pair.prompt, seed, 3)
        ] * 2
        assert recipes[0].scale == 8


def test_another_study_in_the_folder_is_refused(
    shown: list[Any], folders: tuple[Path, Path], tmp_path: Path
):
    given = f"--videos={folders[0]}", f"--against={folders[1]}", f"--to={tmp_path}"
    compare(*given)
    for other in (
        ("--seed=1",),
        (f"--videos={folders[1]}", f"--against={folders[0]}"),
    ):
        with pytest.raises(ValueError, match="is that of another suite, model or"):
            compare(*given, *other)


def test_what_is_missing_is_said(folders: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="--against is missing; give the folder"):
        compare(f"--videos={folders[0]}", f"--to={tmp_path}")
    with pytest.raises(ValueError, match="has no study; give the --to of one that was"):
        compare("--results", f"--to={tmp_path}")
    (tmp_path / "manifest.json").write_text('{"names": ["a", "b"], "pairs": []}')
    (tmp_path / "answers.jsonl").touch()
    with pytest.raises(ValueError, match="nobody has rated a pair yet; start the page"):
        compare("--results", f"--to={tmp_path}")


def test_a_port_that_is_taken_is_refused(folders: tuple[Path, Path], tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        given = f"--videos={folders[0]}", f"--against={folders[1]}", f"--port={port}"
        with pytest.raises(ValueError, match=f"port {port}: .*; give another --host"):
            compare(*given, f"--to={tmp_path}")
