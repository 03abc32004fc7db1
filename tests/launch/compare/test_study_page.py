# SPDX-License-Identifier: Apache-2.0
"""What the page of a study tells a rater's browser, and what it takes from it."""

import errno
import io
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import pytest

from launch.compare.answers import AnswerFile, kept, read_answers
from launch.compare.study import QUESTIONS, Study, paired
from pyramid_jax.data import video_io
from tests.launch.compare.conftest import BRIGHT, GREY

pytestmark = pytest.mark.skipif(
    find_spec("gradio") is None, reason="needs the extra `web`"
)
CHOICES = dict.fromkeys(QUESTIONS, "left")
HOST = "http://127.0.0.1:7861"


@pytest.fixture
def study(folders: tuple[Path, Path]) -> Study:
    return Study(("elder model", "younger model"), paired(*folders), 0)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[AnswerFile]:
    with kept(tmp_path / "answers.jsonl", 3) as file:
        yield file


@pytest.fixture
def client(study: Study, file: AnswerFile) -> Iterator[Any]:
    from starlette.testclient import TestClient

    from launch.compare.page import StudyPage

    application = StudyPage(study, file).application(["127.0.0.1"])
    with TestClient(application, HOST, raise_server_exceptions=False) as client:
        yield client


def clip(client: Any, turn: Any, side: str, rater: str = "anna") -> Any:
    return client.get("/clip", params={"rater": rater, "turn": turn, "side": side})


def brightness(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        frames = [x.to_ndarray(format="gray8") for x in container.decode(video=0)]
    assert len(frames) == 3
    return int(frames[0].mean())


def test_nothing_that_a_browser_gets_names_a_model_or_a_folder(
    client: Any, study: Study
):
    words = [*study.names, "elder", "younger", "painter", "pyramid-jax", "first_steps"]
    words += [str(path.parent) for pair in study.pairs for path in pair.clips]
    words += [path.name for pair in study.pairs for path in pair.clips]
    got = [client.get("/"), client.get("/turn", params={"rater": "anna"})]
    got += [clip(client, turn, side) for turn in range(3) for side in ("left", "right")]
    for answer in got:
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        told = answer.content.decode("latin-1") + str(answer.headers.raw)
        assert not [word for word in words if word in told]
    headers = [{**answer.headers, "content-length": ""} for answer in got[2:]]
    assert all(each == headers[0] for each in headers)
    assert b"painter" in study.pairs[0].clips[0].read_bytes()  # it was there


@pytest.mark.parametrize("rater", ["anna", "bo"])
def test_clips_are_on_the_sides_of_the_raters_turns(
    client: Any, study: Study, rater: str
):
    for number, turn in enumerate(study.turns(rater)):
        seen = [
            brightness(clip(client, number, side, rater).content)
            for side in ("left", "right")
        ]
        expected = [GREY + turn.pair, BRIGHT + turn.pair]
        assert abs(seen[turn.left] - expected[0]) < 25
        assert abs(seen[1 - turn.left] - expected[1]) < 25


def test_a_clip_is_the_file_without_its_comment(
    client: Any, study: Study, tmp_path: Path
):
    shown, turn = tmp_path / "shown.mp4", study.turns("anna")[0]
    shown.write_bytes(clip(client, 0, "left").content)
    real = study.pairs[turn.pair].clips[turn.left]
    assert video_io.video_info(shown) == video_io.video_info(real)
    pixels = [video_io.read_video(path, (128, 128), 3, 8.0) for path in (shown, real)]
    assert (pixels[0] == pixels[1]).all()
    assert video_io.read_video_comment(real)
    assert not video_io.read_video_comment(shown)


def test_answers_lead_to_the_next_turn_and_to_the_end(
    client: Any, study: Study, file: AnswerFile
):
    turn = client.get("/turn", params={"rater": " Anna"}).json()
    assert (turn["turn"], turn["answered"], turn["turns"]) == (0, 0, 3)
    assert turn["questions"] == dict(QUESTIONS)
    for number in range(3):
        sent = {"rater": "anna", "turn": number, "choices": CHOICES}
        turn = client.post("/answer", json=sent).json()
        assert turn.get("turn") == (number + 1 if number < 2 else None)
    assert turn == {"answered": 3, "turns": 3}
    assert client.get("/turn", params={"rater": "bo"}).json()["answered"] == 0
    kept_answers = read_answers(file.path, 3)
    assert [(x.pair, x.left) for x in kept_answers] == study.turns("anna")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rater": ""}, "'' is no name"),
        ({"turn": 3}, "turn '3' is none of the 3"),
        ({"turn": -1}, "turn '-1' is none"),
        ({"turn": "9" * 30}, "is none of the 3"),
        ({"choices": {}}, "the answers {} are not one of left, same, right"),
    ],
)
def test_wrong_answers_are_refused_in_words(
    client: Any, file: AnswerFile, change: dict[str, Any], message: str
):
    sent = {"rater": "anna", "turn": 0, "choices": CHOICES} | change
    answer = client.post("/answer", json=sent)
    assert answer.status_code == 400 and message in answer.text
    assert len(file) == 0


def test_what_is_no_turn_has_no_clip(client: Any):
    for turn, side in ((None, "left"), ("", "left"), (3, "left"), (0, "../elder")):
        assert clip(client, turn, side).status_code == 400


def test_a_clip_that_is_gone_names_no_folder(
    client: Any, study: Study, tmp_path: Path, caplog
):
    path = study.pairs[study.turns("anna")[0].pair].clips[0]
    shutil.move(path, tmp_path / "gone.mp4")
    try:
        texts = [clip(client, 0, side).text for side in ("left", "right")]
    finally:
        shutil.move(tmp_path / "gone.mp4", path)
    assert texts.count("this clip can't be read; the log says why") == 1
    assert str(path) in caplog.text


def test_a_full_disk_is_told(client: Any, file: AnswerFile, monkeypatch):
    def full(answer: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file, "add", full)
    sent = {"rater": "anna", "turn": 0, "choices": CHOICES}
    answer = client.post("/answer", json=sent)
    assert answer.status_code == 507
    assert "the answer was not kept: No space left on device; make room" in answer.text


def test_other_sites_and_other_addresses_are_refused(client: Any, file: AnswerFile):
    sent = {"rater": "anna", "turn": 0, "choices": CHOICES}
    foreign = {"Origin": "https://example.org"}
    assert client.post("/answer", json=sent, headers=foreign).status_code == 403
    assert client.get("/", headers={"Host": "example.org"}).status_code == 400
    assert client.post("/answer", content=b" " * 2**19).status_code == 413
    assert client.post("/answer", content=b"[]").status_code == 400
    assert client.post("/answer", content=b"{").status_code == 400
    for path in ("/answers.jsonl", "/clip/../../elder", "/gradio_api/info", "/docs"):
        assert client.get(path).status_code == 404
    assert len(file) == 0
