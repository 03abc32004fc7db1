# SPDX-License-Identifier: Apache-2.0
"""The perceptual distance: its laws, its formula, and where its weights come from."""

import sys
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pyramid_jax.checkpoint import loss_tables, rename, tensors
from pyramid_jax.models import lpips
from pyramid_jax.models.lpips import LPIPS, LPIPSConfig
from pyramid_jax.sharding import unbox
from tests.released import tensor_shapes

CFG = LPIPSConfig(widths=(4, 6, 8, 8, 8))
TABLE = loss_tables.lpips_table(lpips.SHIFT, lpips.SCALE)
KEYS = jax.random.split(jax.random.key(0), 3)
X, Y = (jax.random.uniform(k, (2, 16, 20, 3), minval=-1) for k in KEYS[:2])


@pytest.fixture(scope="module")
def params() -> Any:
    """Small weights; those of the channels differ."""
    weights = unbox(jax.jit(LPIPS(CFG).init)(KEYS[2], X, Y)["params"])
    heads = {f"head_{i}": jnp.arange(1.0, c + 1) for i, c in enumerate(CFG.widths)}
    return weights | heads


@pytest.fixture(scope="module")
def theirs(params: Any) -> dict[str, np.ndarray]:
    """The same weights by the names of `vgg_lpips.pth`."""
    return dict(rename.export_tensors(params, TABLE))


@jax.jit
def measured(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return LPIPS(CFG).apply({"params": params}, x, y)


def test_an_image_has_no_distance_to_itself_and_some_to_another(params):
    np.testing.assert_allclose(measured(params, X, X), 0, atol=1e-10)
    assert (measured(params, X, Y) > 1e-3).all()
    np.testing.assert_allclose(
        measured(params, X, Y), measured(params, Y, X), rtol=1e-5
    )


def test_the_gradient_is_finite_where_all_features_are_zero(params):
    """Biases of -100 silence every channel."""
    dark = {
        name: {**layer, "bias": layer["bias"] - 100} if "slices" in name else layer
        for name, layer in params.items()
    }
    slope = jax.grad(lambda y: measured(dark, X, y).sum())(Y)
    assert not slope.any()  # which NaN is not


def test_features_do_not_depend_on_their_length_but_on_their_direction():
    x, y, ones = X[..., None, 0], Y[..., None, 0], jnp.ones(1)
    np.testing.assert_allclose(
        lpips.distance(ones, 3 * abs(x) + 1, abs(y) + 1), 0, atol=1e-10
    )
    opposite = lpips.distance(ones, abs(x) + 1, -abs(y) - 1)
    np.testing.assert_allclose(opposite, 4, rtol=1e-6)


def test_the_distance_is_the_sum_over_slices_of_weighted_differences(params):

    @jax.jit
    def features(x: jax.Array) -> list[jax.Array]:
        return LPIPS(CFG).apply({"params": params}, x, method="features")

    total = 0
    for i, pair in enumerate(zip(features(X), features(Y), strict=True)):
        # Where no feature is active, the unit vector is zero.
        a, b = (f / (np.linalg.norm(f, axis=-1, keepdims=True) + 1e-10) for f in pair)
        weighted = np.square(a - b) @ np.asarray(params[f"head_{i}"])
        total = total + weighted.mean(axis=(1, 2))
    np.testing.assert_allclose(measured(params, X, Y), total, rtol=1e-5)


def test_vgg16_has_its_public_tensors():
    shapes = tensor_shapes(TABLE, lpips.lpips_shapes(LPIPSConfig()))
    weights = {k: s for k, s in shapes.items() if "scaling" not in k}
    assert (len(shapes), sum(map(np.prod, weights.values()))) == (33, 14_716_160)
    assert shapes["net.slice3.10.weight"] == (256, 128, 3, 3)
    assert shapes["net.slice5.28.bias"] == (512,)
    assert shapes["lin4.model.1.weight"] == (1, 512, 1, 1)
    assert shapes["scaling_layer.shift"] == (1, 3, 1, 1)


def test_weights_come_back_from_the_file_that_the_original_uses(
    tmp_path, params, theirs
):
    save_file(theirs, tmp_path / "vgg_lpips.safetensors")
    weights = loss_tables.read_lpips(
        tmp_path / "vgg_lpips.safetensors", TABLE, lpips.lpips_shapes(CFG)
    )
    jax.tree.map(np.testing.assert_array_equal, weights, dict(params))


def test_weights_come_back_from_the_two_public_files(tmp_path, params, theirs):
    """VGG16 of torchvision, with its classifier, and the weights of the channels."""
    vgg = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    for key, value in theirs.items():
        if key.startswith("net."):
            vgg["features." + key.split(".", 2)[2]] = value
    save_file(vgg, tmp_path / "vgg16.safetensors")
    heads = {key: value for key, value in theirs.items() if key.startswith("lin")}
    save_file(heads, tmp_path / "vgg.safetensors")
    weights = loss_tables.read_lpips(tmp_path, TABLE, lpips.lpips_shapes(CFG))
    jax.tree.map(np.testing.assert_array_equal, weights, dict(params))


@pytest.mark.parametrize("path", [None, Path("nowhere/vgg_lpips.pth")])
def test_missing_weights_are_an_error_that_says_where_to_get_them(path):
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth.*v0\.1/vgg\.pth.* to 0"):
        loss_tables.read_lpips(path, TABLE, lpips.lpips_shapes(CFG))


def test_other_colours_in_the_file_are_refused(tmp_path, theirs):
    theirs = theirs | {"scaling_layer.scale": np.ones((1, 3, 1, 1), np.float32)}
    save_file(theirs, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"scaling_layer\.scale differs"):
        loss_tables.read_lpips(tmp_path, TABLE, lpips.lpips_shapes(CFG))


def torch_with(load: Callable[..., object]) -> SimpleNamespace:
    """A stand-in for torch; the real one is not needed to run the tests."""
    serialization = SimpleNamespace(safe_globals=nullcontext)
    return SimpleNamespace(load=load, serialization=serialization)


@pytest.mark.parametrize("archive", [True, False])
def test_a_file_of_pytorch_is_read_without_running_its_code(
    tmp_path, monkeypatch, params, theirs, archive
):
    """By a stand-in for torch, which maps only archives: VGG16's file is older."""
    asked = {}

    def load(path: Path, **how: object) -> dict[str, SimpleNamespace]:
        asked.update(how)
        return {
            key: SimpleNamespace(shape=x.shape, dtype="torch.float32", numpy=x.view)
            for key, x in theirs.items()
        }

    monkeypatch.setitem(sys.modules, "torch", torch_with(load))
    path = tmp_path / "vgg_lpips.pth"
    if archive:
        zipfile.ZipFile(path, "w").close()
    else:
        path.touch()
    weights = loss_tables.read_lpips(path, TABLE, lpips.lpips_shapes(CFG))
    jax.tree.map(np.testing.assert_array_equal, weights, dict(params))
    assert asked["weights_only"] is True and asked["mmap"] is archive


def test_a_file_of_pytorch_without_torch_is_an_error_that_says_what_to_do(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "vgg_lpips.pth").touch()
    with pytest.raises(ValueError, match=r"pyramid_jax\[torch\]"):
        tensors.read_tensors(tmp_path)


def test_a_checkpoint_of_a_training_run_is_not_mistaken_for_weights(
    tmp_path, monkeypatch
):
    def load(path: Path, **how: object) -> dict:
        return {"model": {}, "epoch": 3}

    monkeypatch.setitem(sys.modules, "torch", torch_with(load))
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(ValueError, match=r"\['model', 'epoch'\].* no tensors"):
        tensors.read_tensors(tmp_path)


def test_images_that_are_too_small_are_refused(params):
    with pytest.raises(ValueError, match="8 x 20 pixels are too small"):
        measured(params, X[:, :8], Y[:, :8])


def test_another_number_of_slices_is_refused():
    with pytest.raises(ValueError, match="must be 5"):
        LPIPSConfig(widths=(4, 4))
