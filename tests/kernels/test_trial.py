# SPDX-License-Identifier: Apache-2.0
"""A kernel is the default where it computes the plain form, and nowhere else."""

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.compile.cases import case
from pyramid_jax import sharding
from pyramid_jax.kernels import attention as module
from pyramid_jax.kernels.attention import attention
from pyramid_jax.kernels.trial import failure, trial_mask
from pyramid_jax.mask import TokenMask

LENGTH, DIM = 512, 16
TILES = ((64, 64),)
ROOT = Path(__file__).resolve().parent.parent.parent


def plain(q, k, v, mask):
    return attention(q, k, v, mask, "xla")


def broken(q, k, v, mask):
    """Right values, and gradients of v that are twice too large."""
    return plain(q, k, 2 * v - jax.lax.stop_gradient(v), mask)


def absent(q, k, v, mask, *others):
    raise NotImplementedError("no such chip")


def undefined(q, k, v, mask):
    return plain(q, k, v, mask) * jnp.nan


@pytest.fixture(autouse=True)
def untried():
    """No verdict of one test is another's."""
    module._works.cache_clear()
    yield
    module._works.cache_clear()


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says to `attention` that this is such a device; compilers know better."""
    monkeypatch.setattr(module.jax, "default_backend", lambda: device)


def test_the_row_of_the_trial_is_a_packed_one():
    for ours, expected in zip(trial_mask(), case("packed", 1 / 4), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("backend", ["pallas_triton", "pallas_tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_kernels_pass(backend, dtype):
    assert failure(partial(attention, backend=backend), plain, DIM, dtype) is None


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (broken, "gradients of v 1.0e+00"),
        (absent, "NotImplementedError: no such chip"),
        (undefined, "values inf"),
    ],
)
def test_what_is_wrong_is_told(kernel, why):
    assert why in str(failure(kernel, plain, DIM, "float32"))


@pytest.mark.parametrize(
    ("device", "backend"),
    [("gpu", "pallas_triton"), ("tpu", "pallas_tpu"), ("cpu", "blocks")],
)
def test_every_device_has_its_kernel(device, backend, monkeypatch):
    on(device, monkeypatch)
    assert module.default(LENGTH, DIM, "float32") == backend
    assert module.default(LENGTH, 256, "float32") == "blocks"
    assert module.default(LENGTH - 1, DIM, "float32") == "xla"


def test_a_line_of_a_table_chooses_by_device_and_type(monkeypatch):
    on("gpu", monkeypatch)
    device = SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(module.jax, "devices", lambda: [device])
    monkeypatch.setattr(module, "_works", lambda *what: True)
    line = ("gpu", "NVIDIA H", "bfloat16", "pallas_mosaic_gpu")
    monkeypatch.setattr(module, "CHOICE", (line, *module.CHOICE))
    assert module.default(LENGTH, DIM, "bfloat16") == "pallas_mosaic_gpu"
    assert module.default(LENGTH, DIM, "float32") == "pallas_triton"
    device.device_kind = "NVIDIA A100-SXM4-80GB"
    assert module.default(LENGTH, DIM, "bfloat16") == "pallas_triton"


def lower_for_a_gpu() -> str:
    """A program with the Triton kernel, which needs no GPU before it is compiled."""
    chip = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H200", num_cores=None, platform="gpu"
    )
    x = jax.ShapeDtypeStruct((1, LENGTH, 1, DIM), "bfloat16")
    mask = TokenMask(*(jax.ShapeDtypeStruct((1, LENGTH), "int32"),) * 2)
    axes = sharding.MESH_AXES
    mesh = jax.sharding.AbstractMesh((1,) * len(axes), axes, abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        form = partial(attention, backend="pallas_triton", tiles=TILES)
        traced = jax.jit(form).trace(x, x, x, mask)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_kernel_for_gpus_is_lowered_where_warnings_are_errors():
    """JAX calls its Triton backend deprecated, each time that a kernel is lowered."""
    assert "gpu.triton" in lower_for_a_gpu()
    here = "from tests.kernels.test_trial import lower_for_a_gpu; lower_for_a_gpu()"
    strict = [sys.executable, "-W", "error", "-c", here]
    done = subprocess.run(strict, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_kernel_that_fails_is_nobodys_default(monkeypatch, caplog):
    on("gpu", monkeypatch)
    monkeypatch.setattr(module, "attention_triton", lambda *x, **how: absent(*x))
    with caplog.at_level(logging.WARNING):
        assert module.default(LENGTH, DIM, "float32") == "blocks"
    assert "without pallas_triton" in caplog.text and "no such chip" in caplog.text


def test_the_trial_is_held_while_others_are_traced_under_a_mesh(monkeypatch):
    on("gpu", monkeypatch)
    zeros = jnp.zeros((2, LENGTH), jnp.int32)
    mask = TokenMask(zeros.at[:, -3:].set(-1), zeros)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, LENGTH, 2, DIM))
    with jax.set_mesh(sharding.device_mesh(data=2, tensor=2, context=2)):
        found = jax.jit(attention)(q, k, v, mask)
    assert module._works.cache_info().currsize == 1
    np.testing.assert_allclose(found, plain(q, k, v, mask), rtol=0, atol=1e-5)
