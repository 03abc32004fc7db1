# SPDX-License-Identifier: Apache-2.0
"""Manifests are read as written, and their mistakes are all told at once."""

import json
import shutil
from pathlib import Path

import pytest

from pyramid_jax.data.manifest import Record, read_manifest, write_manifest

GOOD = '{"video": "a.mp4", "text": "waves"}'


@pytest.fixture
def manifest(tmp_path):
    """Writes lines to a manifest and returns its path."""

    def write(*lines: str) -> Path:
        path = tmp_path / "manifest.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def test_records_are_read_as_written(tmp_path):
    records = (
        Record(tmp_path / "clips" / "a.mp4", "video", "a red circle"),
        Record(tmp_path / "b.png", "image", 'Wörter, "quoted",\nand \u2028 more'),
        Record(Path("/elsewhere/c.mp4"), "video", "far away"),
        Record(tmp_path / "d.mp4", "video", "waves", features=tmp_path / "d.features"),
    )
    write_manifest(tmp_path / "deep" / "manifest.jsonl", records)
    assert read_manifest(tmp_path / "deep" / "manifest.jsonl") == records


def test_a_folder_can_be_moved_with_its_manifest(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    write_manifest(old / "m.jsonl", [Record(old / "clips" / "a.mp4", "video", "x")])
    shutil.move(old, new)
    assert read_manifest(new / "m.jsonl")[0].path == new / "clips" / "a.mp4"


def test_fields_are_those_of_the_original(tmp_path):
    write_manifest(tmp_path / "m.jsonl", [Record(tmp_path / "a.png", "image", "x")])
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line) == {"image": "a.png", "text": "x"}


def test_blank_lines_and_other_keys_are_ignored(manifest):
    path = manifest(
        GOOD, "", '{"image": "b.png", "text": "sea", "latent": "b.pt"}', "  "
    )
    assert [record.kind for record in read_manifest(path)] == ["video", "image"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"video": "a.mp4"', "not JSON"),
        ('["a.mp4", "waves"]', "expected an object"),
        ('{"text": "waves"}', 'has neither of "video" and "image"'),
        (
            '{"video": "a", "image": "b", "text": "c"}',
            'has both of "video" and "image"',
        ),
        ('{"video": "a.mp4"}', '"text" is null'),
        ('{"video": "a.mp4", "text": " "}', '"text" is " "'),
        ('{"video": 3, "text": "waves"}', '"video" is 3'),
    ],
)
def test_a_bad_line_is_named_with_its_number(manifest, line, complaint):
    with pytest.raises(ValueError, match=r"has 1 bad line\(s\)") as error:
        read_manifest(manifest(GOOD, "", line))
    assert f"line 3: {complaint}" in str(error.value)


def test_all_problems_are_counted_and_the_first_ten_listed(manifest):
    with pytest.raises(ValueError, match=r"14 bad line\(s\)") as error:
        read_manifest(manifest(GOOD, *["{}"] * 14))
    listed = str(error.value).splitlines()[1:-1]
    assert [line.split(":")[0] for line in listed[:-1]] == [
        f"  line {n}" for n in range(2, 12)
    ]
    assert listed[-1] == "  and 4 more"


def test_exactly_ten_problems_leave_nothing_unsaid(manifest):
    with pytest.raises(ValueError, match=r"10 bad line\(s\)") as error:
        read_manifest(manifest(*["{}"] * 10))
    assert "more" not in str(error.value)


def test_an_empty_manifest_is_refused(manifest):
    with pytest.raises(ValueError, match="is empty; write lines"):
        read_manifest(manifest("", " "))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl can't be read .*No such file"):
        read_manifest(tmp_path / "none.jsonl")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_have_a_byte_order_mark_and_lines_of_windows(tmp_path, encoding):
    lines = [
        '{"video": "ü.mp4", "text": "a\u2028b"}',
        '{"image": "b.png", "text": "c"}',
    ]
    text = "\r\n".join(lines) + "\r\n"
    (tmp_path / "m.jsonl").write_bytes(text.encode(encoding))
    first, second = read_manifest(tmp_path / "m.jsonl")
    assert (first.path.name, first.text, second.text) == ("ü.mp4", "a\u2028b", "c")


def test_text_without_a_mark_in_two_bytes_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_bytes('{"text": "a"}'.encode("utf-16-le"))
    with pytest.raises(ValueError, match="is no text, or in UTF-16 or 32; convert it"):
        read_manifest(tmp_path / "m.jsonl")


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_bytes('{"text": "Wörter"}'.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"m\.jsonl can't be read as text in UTF-8 .*iconv -f LATIN1"
    ):
        read_manifest(tmp_path / "m.jsonl")
