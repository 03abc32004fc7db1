# SPDX-License-Identifier: Apache-2.0
"""A folder of files with captions in text files becomes a manifest."""

from pathlib import Path

import pytest

from launch.prepare.captioned import list_folder
from pyramid_jax.data.manifest import Record, read_manifest


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A clip, an image in a folder inside, and files that don't count."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    (folder / ".trash").mkdir()
    for name in ("a b.mp4", "more/c.JPG", "._a b.mp4", ".trash/d.mp4", "a b.json"):
        (folder / name).touch()
    (folder / "a b.txt").write_text('waves "roll"\n in \n', encoding="utf-8")
    (folder / "more" / "c.txt").write_bytes("\ufeffein Hügel".encode())
    return folder


def test_videos_and_images_get_their_captions(clips: Path, tmp_path: Path):
    expected = (
        Record(clips / "a b.mp4", "video", 'waves "roll" in'),
        Record(clips / "more" / "c.JPG", "image", "ein Hügel"),
    )
    assert read_manifest(list_folder(clips, tmp_path / "mine")) == expected
    inside = list_folder(clips, clips)
    assert read_manifest(inside) == read_manifest(list_folder(clips, clips)) == expected
    assert str(tmp_path) not in inside.read_text()  # so that the folder can be moved


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_a_file_without_a_caption_is_named(clips: Path, caption: str | None):
    (clips / "e.webm").touch()
    if caption is not None:
        (clips / "e.txt").write_text(caption)
    with pytest.raises(ValueError, match=r"1 files without a caption: .*e.webm; write"):
        list_folder(clips, clips)
    assert not (clips / "manifest.jsonl").exists()


def test_a_folder_with_nothing_or_none_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="has no file; write"):
        list_folder(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="missing is no folder"):
        list_folder(tmp_path / "missing", tmp_path)
