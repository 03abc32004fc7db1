# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every kind are read, or refused by name; nothing else happens.

`make fuzz` runs many more examples, other ones each time.
"""

import io
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from launch.sample import lists
from pyramid_jax.checkpoint import files
from pyramid_jax.checkpoint.tensors import open_safetensors
from pyramid_jax.data import pictures, video_io
from pyramid_jax.data.manifest import read_manifest
from pyramid_jax.data.tokenizer import load_tokenizer
from pyramid_jax.pipeline.folder import TINY

SIZE = (16, 24)
SECONDS = 60  # that no file may take
LINES = [{"video": "ä.mp4", "text": "a red circle"}, {"image": "b.png", "text": "獅子"}]


def picture(kind: str) -> bytes:
    """A small image file."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()


def video(kind: str, codec: str) -> bytes:
    """A small video file."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3), np.uint8)
    with io.BytesIO() as file:
        with av.open(file, "w", format=kind) as container:
            stream = container.add_stream(codec, rate=8)
            stream.height, stream.width = SIZE
            for frame in pixels:
                container.mux(stream.encode(VideoFrame.from_ndarray(frame)))
            container.mux(stream.encode(None))
        return file.getvalue()


def read_tensors(path: Path) -> None:
    """All values of a file of tensors, as its header describes them."""
    for tensor in open_safetensors(path).values():
        values = np.asarray(tensor)
        assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)


def read_frames(path: Path) -> None:
    """The size of a video, and some of its frames."""
    assert min(video_io.video_info(path)[:3]) > 0
    assert video_io.read_video(path, SIZE, 2, 8).shape == (2, *SIZE, 3)


def texts(value: Any) -> Iterator[str]:
    """Every text in nested containers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts(one)


def read_texts(read: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Reads a file of texts, none of whose characters may have been replaced."""

    def check(path: Path) -> None:
        found = read(path)
        told = b"\xef\xbf\xbd" in path.read_bytes()
        assert told or not any("\ufffd" in text for text in texts(found))

    return check


def records(path: Path) -> list[str]:
    return [text for r in read_manifest(path) for text in (str(r.path), r.text)]


def prompts(path: Path) -> list[str]:
    return [line.prompt for line in lists.read_lines(path)]


# Name of a file -> its whole bytes, and how it is read.
KINDS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    "a.png": (picture("png"), lambda path: pictures.read_picture(path, SIZE)),
    "a.jpg": (picture("jpeg"), lambda path: pictures.read_picture(path, SIZE)),
    "a.webp": (picture("webp"), lambda path: pictures.read_picture(path, SIZE)),
    "a.gif": (picture("gif"), lambda path: pictures.read_picture(path, SIZE)),
    "a.tiff": (picture("tiff"), lambda path: pictures.read_picture(path, SIZE)),
    "a.avif": (picture("avif"), lambda path: pictures.read_picture(path, SIZE)),
    "a.mp4": (video("mp4", "libx264"), read_frames),
    "a.webm": (video("webm", "libvpx-vp9"), read_frames),
    "a.avi": (video("avi", "mpeg4"), read_frames),
    "a.safetensors": (
        save({"a": np.arange(6.0), "b": np.zeros((2, 3), np.float16)}),
        read_tensors,
    ),
    "config.json": (
        json.dumps({"model": {"name": "Löwe", "width": 8}}).encode(),
        read_texts(lambda path: files.read_config(path.parent, "a model", "model")),
    ),
    "manifest.jsonl": (
        "\n".join(json.dumps(line, ensure_ascii=False) for line in LINES).encode(),
        read_texts(records),
    ),
    "prompts.txt": (
        'a star\n{"prompt": "獅子", "seed": 3}\n# Löwe\nein Löwe'.encode(),
        read_texts(prompts),
    ),
    "tokenizer.json": (
        (TINY / "tokenizer.json").read_bytes(),
        lambda path: load_tokenizer(path)("a red circle"),
    ),
}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file that was cut off, has other bits or bytes, or was never one."""
    how = draw(st.sampled_from(["cut", "bits", "bytes", "noise"]))
    if how == "noise":
        return draw(st.binary(max_size=64))
    data = bytearray(whole)
    place = st.integers(0, len(data) - 1)
    if how == "cut":
        return bytes(data[: draw(place)])
    for at in draw(st.lists(place, min_size=1, max_size=8)):
        if how == "bits":
            data[at] ^= 1 << draw(st.integers(0, 7))
        else:
            data[at : at + 4] = draw(st.binary(max_size=6))
    return bytes(data)


@contextmanager
def time_limit() -> Iterator[None]:
    """A TimeoutError after `SECONDS`."""

    def stop(*_: object) -> None:
        raise TimeoutError("a damaged file was read for too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_by_name(name: str, tmp_path: Path):
    whole, read = KINDS[name]
    path, refused = tmp_path / name, set[bool]()
    path.write_bytes(whole)
    read(path)

    @given(damaged(whole))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        with time_limit():
            try:
                read(path)
                refused.add(False)
            except ValueError as error:
                assert name in str(error), error
                refused.add(True)

    check()
    assert True in refused
