# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: those of the safetensors library, made and read piece by piece."""

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pyramid_jax.checkpoint.tensors import open_safetensors, write_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "b/kernel": RNG.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
    "a/kernel": RNG.normal(size=(2, 1, 5)).astype(np.float32),
    "a/ü": RNG.normal(size=()).astype(np.float32),
    "count": np.arange(3, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float16),
}


def write(path: Path) -> Path:
    write_tensors(path, TENSORS, TENSORS.items())
    return path


def assert_same(tensors) -> None:
    assert set(tensors) == set(TENSORS)
    for name, values in TENSORS.items():
        read = np.asarray(tensors[name])
        assert read.dtype == values.dtype and read.shape == values.shape
        assert read.tobytes() == values.tobytes()


def test_the_library_reads_what_is_written_here(tmp_path: Path):
    assert_same(load_file(write(tmp_path / "x.safetensors")))


def test_the_bytes_are_those_that_the_library_writes(tmp_path: Path):
    path = tmp_path / "theirs.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    assert write(tmp_path / "ours.safetensors").read_bytes() == path.read_bytes()


def test_what_the_library_writes_is_read_here(tmp_path: Path):
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    assert_same(open_safetensors(tmp_path / "theirs.safetensors"))


@pytest.mark.parametrize("length", [0, 3, 20, 300, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, length: int):
    path = write(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"can't be read.*copy the file again"):
        open_safetensors(path)


def test_a_file_of_another_format_is_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="can't be read"):
        open_safetensors(path)


def test_an_interrupted_file_leaves_nothing_behind(tmp_path: Path):
    def interrupted() -> Iterator[tuple[str, np.ndarray]]:
        yield "count", TENSORS["count"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "x.safetensors", TENSORS, interrupted())
    assert list(tmp_path.iterdir()) == []


def test_forgotten_and_unknown_tensors_and_other_types_are_mistakes(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(AssertionError, match="forgotten"):
        write_tensors(path, TENSORS, [("count", TENSORS["count"])])
    with pytest.raises(AssertionError, match="unknown"):
        write_tensors(path, TENSORS, [("c", TENSORS["count"])])
    with pytest.raises(AssertionError, match="count"):
        write_tensors(path, TENSORS, [("count", TENSORS["count"].astype(np.int32))])


def test_types_without_a_name_in_the_format_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="complex64"):
        write_tensors(tmp_path / "x", {"a": np.zeros(1, "c8")}, [])
