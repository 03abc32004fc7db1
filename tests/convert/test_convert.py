# SPDX-License-Identifier: Apache-2.0
"""Released models become ours and the original's again; all damage is reported at once.

The small models have the original's exact layout, from lists of names that do not come
from the package (tests/original_files.py).
"""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import convert
from pyramid_jax.checkpoint.tensors import StoredTensor, open_safetensors
from pyramid_jax.convert.convert import convert_model, export_model
from pyramid_jax.convert.source import ReleasedFolder, open_released
from pyramid_jax.pipeline.folder import TINY
from tests import original_files
from tests.convert.changes import changed, reported

ROOT = Path(__file__).resolve().parents[2]
VARIANT, VAE = "diffusion_transformer_384p", "causal_video_vae"
FILE = "diffusion_pytorch_model.safetensors"


# -------------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", ["mmdit", "miniflux"])
def test_a_model_comes_back_with_equal_bytes(kind: str, tmp_path: Path, request):
    theirs = request.getfixturevalue(kind)
    convert_model(ReleasedFolder(theirs), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    names = sorted(x.relative_to(theirs) for x in theirs.rglob("*") if x.is_file())
    back = tmp_path / "back"
    assert names == sorted(x.relative_to(back) for x in back.rglob("*") if x.is_file())
    for name in names:
        if name.suffix == ".safetensors":
            assert_same_tensors(theirs / name, back / name)
        else:
            assert (theirs / name).read_bytes() == (back / name).read_bytes(), name


def assert_same_tensors(one: Path, two: Path) -> None:
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype and tensor.shape == two[key].shape, key
        assert tensor.tobytes() == two[key].tobytes(), key


def test_weights_keep_their_precision(ours: Path):
    tensors = open_safetensors(ours / "weights.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {"bfloat16"}


def test_what_is_written_is_an_ordinary_model_folder(ours: Path):
    sections = json.loads((ours / "config.json").read_text())
    assert sections["model"]["latent"]["image_shift"] == 0.1490
    assert sections["sample"]["guidance"]["first"] == 7.0
    assert sections["sample"]["sizes"] == [[384, 640, 121]]
    assert sections["sample"]["image_guidance"] == 4.0
    assert sections["original"] == VARIANT


def test_miniflux_has_its_own_statistics_of_first_frames(miniflux: Path):
    model = open_released(ReleasedFolder(miniflux, text=False))
    assert model.model is not None
    assert model.model.latent.image_shift == -0.04
    assert model.model.latent.image_scale == 1 / 1.8726


def test_a_model_that_was_trained_here_gets_config_files(ours: Path, tmp_path: Path):
    mine = Path(shutil.copytree(ours, tmp_path / "mine"))
    shutil.rmtree(mine / "original")
    sections = json.loads((mine / "config.json").read_text())
    del sections["original"]
    (mine / "config.json").write_text(json.dumps(sections))
    export_model(mine, tmp_path / "theirs")
    model = open_released(ReleasedFolder(tmp_path / "theirs", "diffusion_transformer"))
    assert model.problems == []


def test_nothing_is_written_over(mmdit: Path, ours: Path):
    with pytest.raises(ValueError, match="holds something already"):
        convert_model(ReleasedFolder(mmdit), ours)


# ------------------------------------------------------------------------ other files


class Tensor(SimpleNamespace):
    """Stands in for a tensor of torch."""

    def view(self, dtype: str) -> SimpleNamespace:
        return SimpleNamespace(numpy=lambda: self.values.view(dtype))

    def numpy(self) -> np.ndarray:
        return self.values


def torch_that_loads(contents: dict[Path, dict]) -> SimpleNamespace:
    def load(path: Path, **how: object) -> dict:
        assert how == {"map_location": "cpu", "weights_only": True, "mmap": False}
        return {
            key: Tensor(shape=x.shape, dtype=f"torch.{x.dtype}", values=x)
            if isinstance(x, np.ndarray)
            else x
            for key, x in contents[path].items()
        }

    serialization = SimpleNamespace(safe_globals=nullcontext)
    return SimpleNamespace(load=load, int16="int16", serialization=serialization)


def test_files_of_torch_and_checkpoints_of_training_are_read(
    mmdit: Path, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a stand-in for torch; the real one is not needed to run the tests."""
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    (theirs / VARIANT / FILE).unlink()
    pickled, trained = theirs / VARIANT / "pytorch_model.bin", tmp_path / "last.pth"
    pickled.touch(), trained.touch()
    state = {f"vae.{key}": x for key, x in original_files.tensors("vae").items()}
    state["loss.logvar"] = np.zeros((), np.float32)
    dit_state = {f"dit.{key}": x for key, x in original_files.tensors("mmdit").items()}
    torch = torch_that_loads({pickled: dit_state, trained: state})
    monkeypatch.setitem(sys.modules, "torch", torch)
    convert_model(ReleasedFolder(theirs, vae=trained), tmp_path / "ours")
    for name in ("weights.safetensors", "vae/weights.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (ours / name).read_bytes()


def test_several_files_with_an_index_are_one(mmdit: Path, tmp_path: Path):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    tensors = load_file(theirs / VARIANT / FILE)
    (theirs / VARIANT / FILE).unlink()
    names = ["model-1.safetensors", "model-2.safetensors"]
    map_of = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        own = {key: x for key, x in tensors.items() if map_of[key] == name}
        save_file(own, theirs / VARIANT / name)
    index = theirs / VARIANT / f"{FILE}.index.json"
    index.write_text(json.dumps({"weight_map": map_of}))
    assert open_released(ReleasedFolder(theirs, text=False)).problems == []
    (theirs / VARIANT / names[1]).unlink()
    (problem,) = open_released(ReleasedFolder(theirs, text=False)).problems
    assert "lacks ['model-2.safetensors']" in problem


# ----------------------------------------------------------------------------- damage


def test_looking_reads_headers_only(mmdit: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("values were read")

    monkeypatch.setattr(StoredTensor, "__array__", refuse)
    model = open_released(ReleasedFolder(mmdit))
    assert model.problems == []
    report = convert.report(model)
    assert report.endswith("all fits") and len(report.splitlines()) == 6
    assert "causal_video_vae" in report and "bfloat16" in report


def test_all_damage_is_in_one_error(mmdit: Path, tmp_path: Path):
    theirs, file = tmp_path / "theirs", f"{VARIANT}/{FILE}"

    def damage(x: dict) -> None:
        del x["proj_out.bias"]
        x["proj_in.bias"] = np.zeros(3, ml_dtypes.bfloat16)
        x["context_embedder.weight"] = x["context_embedder.weight"].T.copy()
        x["pos_embed.pos_embed"] = x["pos_embed.pos_embed"] + x[
            "proj_in.bias"
        ].dtype.type(1)

    changed(mmdit, theirs, file, damage)
    clip = theirs / "text_encoder" / "model.safetensors"
    clip.write_bytes(clip.read_bytes()[:-2])
    config = theirs / VAE / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"relu"', 1))
    (theirs / "text_encoder_2" / "config.json").unlink()
    (theirs / "tokenizer_3" / "tokenizer.json").unlink()
    problems = reported(ReleasedFolder(theirs), tmp_path / "ours")
    expected = [
        f"{VARIANT}: proj_out.bias is missing",
        f"{VARIANT}: proj_in.bias is left over",
        f"{VARIANT}: context_embedder.weight has shape (16, 64), expected (64, 16)",
        f"{VARIANT}: pos_embed.pos_embed differs by 1 from",
        f"{VAE}: decoder_act_fn is 'relu'",
        "text_encoder: ",
        "text_encoder_2: ",
        "tokenizer_3: ",
    ]
    assert len(problems) == len(expected)
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, start


def test_unknown_variants_and_missing_folders_are_named(mmdit: Path, tmp_path: Path):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    shutil.rmtree(theirs / VAE)
    source = ReleasedFolder(theirs, "diffusion_transformer_768p", text=False)
    variant, missing = reported(source, tmp_path / "ours")
    assert f"['{VARIANT}']" in variant and "diffusion_transformer_768p" in variant
    assert missing == f"{VAE}: this folder is missing"


def test_the_only_variant_needs_no_name_but_two_do(mmdit: Path, tmp_path: Path):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    assert open_released(ReleasedFolder(theirs, text=False)).problems == []
    shutil.copytree(theirs / VARIANT, theirs / "diffusion_transformer_768p")
    (problem,) = open_released(ReleasedFolder(theirs, text=False)).problems
    assert "choose one of them" in problem


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            VARIANT,
            {"num_layers": 3},
            "transformer_blocks.2.norm1.linear.weight is miss",
        ),
        (VARIANT, {"joint_attention_dim": None}, "lacks or misstates 'joint_attention"),
        (VARIANT, {"_class_name": "Other"}, "is none of"),
        (VARIANT, {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        (VAE, {"encoder_out_channels": None}, "lacks ['encoder_out_channels']"),
        (VAE, {"interpolate": True}, "interpolate is True"),
    ],
)
def test_a_wrong_config_file_is_reported(mmdit, tmp_path, file, change, message):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    path = theirs / file / "config.json"
    fields = json.loads(path.read_text()) | change
    fields = {key: value for key, value in fields.items() if value is not None}
    path.write_text(json.dumps(fields))
    problems = open_released(ReleasedFolder(theirs, text=False)).problems
    assert any(message in problem for problem in problems), problems


def test_text_encoders_of_another_model_are_refused(mmdit, miniflux, tmp_path):
    theirs = Path(shutil.copytree(mmdit, tmp_path / "theirs"))
    for name in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(theirs / name)
        shutil.copytree(theirs / name.replace("_2", ""), theirs / name)
    (problem,) = open_released(ReleasedFolder(theirs)).problems
    assert "CLIP vectors of [6, 6]" in problem and "vectors of 16" in problem


def test_the_command_reports_damage_and_fails(mmdit: Path, tmp_path: Path):
    changed(mmdit, tmp_path / "theirs", f"{VAE}/{FILE}", lambda x: x.popitem())
    command = [sys.executable, "-m", "launch.convert", "--check"]
    command += [f"--from={tmp_path / 'theirs'}", "--notext"]
    root = ROOT
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "1 problems:" in run.stdout and "is missing" in run.stdout


def test_models_that_the_original_does_not_have_are_not_exported(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        export_model(tmp_path, tmp_path / "to")
    shutil.copytree(TINY, tmp_path / "t")
    with pytest.raises(ValueError, match="text encoder of its own"):
        export_model(tmp_path / "t", tmp_path / "to")
