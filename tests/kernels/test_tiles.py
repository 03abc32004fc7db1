# SPDX-License-Identifier: Apache-2.0
"""Block sizes: which entry of the table is taken, and how a config replaces it."""

import json
from dataclasses import asdict

import jax
import jax.numpy as jnp
import pytest

from pyramid_jax.config import build
from pyramid_jax.kernels import attention, tiles
from pyramid_jax.kernels.tiles import Entry, Tile, Tiles, tiles_for
from pyramid_jax.mask import TokenMask
from pyramid_jax.models.dit import DiTConfig


def line(size: int, device="", dim=128, length=None, dtype="bfloat16") -> Entry:
    """An entry that is recognised by its size."""
    return Entry("pallas_triton", device, dtype, dim, length, of(size), "a test")


def of(size: int) -> Tiles:
    return Tiles.of([(size, size)])


def found(dim: int, length: int, device: str, dtype: str = "bfloat16") -> int:
    return tiles_for("pallas_triton", dim, dtype, length, device).forward.query


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table with entries for all devices and for one, in no order."""
    path = tmp_path / "table.json"
    lines = [
        line(1024, "NVIDIA H200", 64, 4096),
        line(16),
        line(32, dim=64),
        line(512, "NVIDIA H200", 64),
        line(64, "NVIDIA", 64),
        line(128, dim=64, dtype="float32"),
    ]
    path.write_text(json.dumps([asdict(entry) for entry in lines]))
    monkeypatch.setattr(tiles, "TABLE", path)
    return path


def test_the_entry_for_the_least_is_taken(table):
    """By device first, then by width, then by length."""
    assert found(128, 99, "TPU v6") == 16
    assert found(65, 99, "NVIDIA H200") == 16
    assert found(64, 99, "TPU v6") == found(8, 99, "TPU v6") == 32
    assert found(64, 99, "NVIDIA A100-SXM4-80GB") == 64
    assert found(64, 4097, "NVIDIA H200") == 512
    assert found(64, 4096, "NVIDIA H200") == 1024
    assert found(64, 4096, "NVIDIA H200", "float32") == 128
    assert found(64, 4096, "NVIDIA H200", "float16") == 1024


def test_a_call_that_the_table_does_not_serve_is_refused(table):
    with pytest.raises(
        ValueError, match="no attention tiles for pallas_triton, float32"
    ):
        found(128, 9, "TPU v6", "float32")
    with pytest.raises(ValueError, match="no attention tiles for pallas_tpu"):
        tiles_for("pallas_tpu", 64, "bfloat16", 9, "TPU v6")


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_package_has_tiles_for_every_head_of_every_device(backend, dtype):
    for dim in (8, 64, attention.WIDEST):
        chosen = tiles_for(backend, dim, dtype, 10**6)
        assert chosen == Tiles.of(chosen)


def test_one_tile_serves_all_kernels_and_three_serve_one_each():
    assert Tiles.of([[64, 32]]) == (Tile(64, 32), Tile(64, 32), Tile(64, 32))
    three = Tiles.of([(64, 32), (32, 64, 8), (16, 16, 2, 3)])
    assert three == (Tile(64, 32), Tile(32, 64, 8), Tile(16, 16, 2, 3))
    assert Tiles.of(three) == three


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ([(64, 64)] * 2, "one tile or three"),
        ([(64,)], "one tile or three"),
        ([(64, 48)], r"tile \(64, 48\) must have blocks"),
        ([(8, 64)], "must have blocks of 16"),
        ([(64, 64, 3)], "1, 2, 4 or 8 warps"),
        ([(64, 64, 4, 0)], "a stage or more"),
        ([(64, 64, 4, 2, 12)], "12 keys by polynomial must be 0, 8, 16"),
        ([(64, 64, 4, 2, 64)], "fewer than the 64 keys"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(sizes, reason):
    with pytest.raises(ValueError, match=reason):
        Tiles.of(sizes)


ROW = jax.ShapeDtypeStruct((1, 40, 2, 16), jnp.float32)
MASK = TokenMask(*[jax.ShapeDtypeStruct((1, 40), jnp.int32)] * 2)


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_triton"])
def test_tiles_of_a_config_reach_the_kernel(backend, monkeypatch):
    """Read from JSON, as a saved model's, with the lists that JSON has."""
    dit = {"width": 32, "heads": 2, "rope_axes": [16], "attention": backend}
    section = json.loads(json.dumps(dit | {"attention_tiles": [[32, 32, 2, 3]]}))
    cfg = build(DiTConfig, section)
    assert hash(cfg) == hash(build(DiTConfig, section))
    given = []

    def kernel(*arrays, tiles, cut=None, interpret=False):
        given.append(tiles)
        return arrays[0] if cut is None else (arrays[0],)

    for name in ("attention_tpu", "attention_triton"):
        monkeypatch.setattr(attention, name, kernel)

    def call(q, mask):
        return attention.attention(q, q, q, mask, cfg.attention, cfg.attention_tiles)

    jax.eval_shape(call, ROW, MASK)
    assert set(given) == {Tiles.of([(32, 32, 2, 3)])}


@pytest.mark.parametrize("backend", [None, "xla", "blocks"])
def test_tiles_without_a_backend_that_takes_them_are_refused(backend):
    def call(q, mask):
        return attention.attention(q, q, q, mask, backend, [(64, 64)])

    with pytest.raises(ValueError, match=f"the backend {backend!r} takes none"):
        jax.eval_shape(call, ROW, MASK)


def test_a_tpu_takes_one_tile_for_all_kernels():
    def call(q, mask):
        several = [(64, 64), (64, 64), (128, 64)]
        return attention.attention(q, q, q, mask, "pallas_tpu", several)

    with pytest.raises(ValueError, match="pallas_tpu takes one tile"):
        jax.eval_shape(call, ROW, MASK)
