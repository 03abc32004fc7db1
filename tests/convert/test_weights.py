# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are its weights, by which names, and of which numbers."""

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pyramid_jax.checkpoint.tensors import open_safetensors
from pyramid_jax.convert.convert import convert_model
from pyramid_jax.convert.source import ReleasedFolder, open_released
from tests import original_files
from tests.convert.changes import changed, reported

VARIANT = "diffusion_transformer_384p"
FILE = "diffusion_pytorch_model.safetensors"
DIT = f"{VARIANT}/{FILE}"


def apple(folder: Path, tensors: dict) -> None:
    (folder / f"._{FILE}").write_bytes(b"\0\5\x16\7" + bytes(100))


def half_precision(folder: Path, tensors: dict) -> None:
    halves = {name: x.astype(np.float16) for name, x in tensors.items()}
    save_file(halves, folder / "diffusion_pytorch_model.fp16.safetensors")


def lora(folder: Path, tensors: dict) -> None:
    save_file(
        {"x.lora_A.weight": np.zeros(4)}, folder / "pytorch_lora_weights.safetensors"
    )


def parts(folder: Path, tensors: dict) -> list[Path]:
    """The same weights in two files; their index is not written."""
    half = len(tensors) // 2
    names = [
        folder / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]
    for name, own in zip(
        names, (sorted(tensors)[:half], sorted(tensors)[half:]), strict=True
    ):
        save_file({key: tensors[key] for key in own}, name)
    return names


def index(folder: Path, names: list[Path]) -> None:
    listed = {key: name.name for name in names for key in load_file(name)}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": listed}))


def old_whole_file(folder: Path, tensors: dict) -> None:
    index(folder, parts(folder, tensors))
    save_file({"old": np.zeros(3)}, folder / FILE)


def parts_alone(folder: Path, tensors: dict) -> None:
    parts(folder, tensors)
    (folder / FILE).unlink()


@pytest.mark.parametrize(
    "add", [apple, half_precision, lora, old_whole_file, parts_alone]
)
def test_other_files_beside_the_weights_do_not_count(add, mmdit: Path, tmp_path: Path):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    add(theirs / VARIANT, load_file(theirs / DIT))
    assert open_released(ReleasedFolder(theirs, text=False)).problems == []


def test_a_copy_in_half_precision_is_read_where_it_is_alone(mmdit, tmp_path: Path):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    half_precision(theirs / VARIANT, load_file(theirs / DIT))
    (theirs / DIT).unlink()
    released = open_released(ReleasedFolder(theirs, text=False))
    assert released.problems == []
    dtypes = {x.dtype for x in released.networks[VARIANT].tensors.values()}
    assert dtypes == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"weight_map":', "index.json is no index of weights (JSONDecodeError"),
        ("{}", "index.json is no index of weights (KeyError"),
        ("[]", "index.json is no index of weights (TypeError"),
    ],
)
def test_a_damaged_index_is_named(text: str, said: str, mmdit: Path, tmp_path: Path):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    (theirs / VARIANT / f"{FILE}.index.json").write_text(text)
    (problem,) = open_released(ReleasedFolder(theirs, text=False)).problems
    assert said in problem


def test_a_missing_part_is_named(mmdit: Path, tmp_path: Path):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    names = parts(theirs / VARIANT, load_file(theirs / DIT))
    (theirs / DIT).unlink(), names[0].unlink()
    (problem,) = open_released(ReleasedFolder(theirs, text=False)).problems
    assert f"lacks ['{names[0].name}']" in problem


@pytest.mark.parametrize(
    "front", ["module.", "_orig_mod.", "ema.", "dit.", "module.dit."]
)
def test_what_all_names_have_in_front_is_left_out(front, mmdit, ours, tmp_path, caplog):
    def rename(tensors: dict) -> None:
        for key in list(tensors):
            tensors[front + key] = tensors.pop(key)

    changed(mmdit, tmp_path / "theirs", DIT, rename)
    convert_model(ReleasedFolder(tmp_path / "theirs", text=False), tmp_path / "made")
    name = "weights.safetensors"
    assert (tmp_path / "made" / name).read_bytes() == (ours / name).read_bytes()
    assert ("read without their 'module.'" in caplog.text) == ("module." in front)


# ------------------------------------------------------------------ numbers of weights


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_numbers_of_one_byte_become_bfloat16(kind: str, mmdit: Path, tmp_path: Path):
    """As in single files for other programs: matrices narrow, all else bfloat16."""
    narrow = np.dtype(getattr(ml_dtypes, kind))
    wide = np.dtype(ml_dtypes.bfloat16)
    state = {
        key: x.astype(narrow if x.ndim == 2 else wide)
        for key, x in original_files.tensors("mmdit").items()
    }
    save_file(state, tmp_path / "fp8.safetensors")
    file = open_safetensors(tmp_path / "fp8.safetensors")
    assert {x.dtype for x in file.values()} == {wide}
    for key, x in state.items():
        np.testing.assert_array_equal(np.asarray(file[key]), x.astype(wide))
    release = ReleasedFolder(mmdit, dit=tmp_path / "fp8.safetensors", text=False)
    convert_model(release, tmp_path / "made")


@pytest.mark.parametrize("kind", [np.int8, np.bool_])
def test_weights_that_are_whole_or_boolean_are_refused(kind, mmdit, tmp_path: Path):
    def quantise(tensors: dict) -> None:
        for key, x in tensors.items():
            if x.ndim == 2:
                tensors[key] = np.ones(x.shape, kind)

    changed(mmdit, tmp_path / "theirs", DIT, quantise)
    problems = reported(ReleasedFolder(tmp_path / "theirs"), tmp_path / "made")
    name = np.dtype(kind).name
    assert len(problems) == 2
    assert f"weight is of {name}, expected floating-point numbers" in problems[0]
    assert re.search(rf"so are \d+ more of {name}", problems[1])


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite_are_named_and_nothing_is_left(
    value, mmdit, tmp_path
):
    def overflow(tensors: dict) -> None:
        tensors["proj_out.weight"] = tensors["proj_out.weight"].astype(np.float16)
        tensors["proj_out.weight"][0, 0] = value

    changed(mmdit, tmp_path / "theirs", DIT, overflow)
    with pytest.raises(
        ValueError, match=r"1 of \d+ values of proj_out\.weight are inf"
    ):
        convert_model(ReleasedFolder(tmp_path / "theirs"), tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
