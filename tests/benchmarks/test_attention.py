# SPDX-License-Identifier: Apache-2.0
"""The benchmark of attention and the choice of block sizes, at toy size."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention as benchmark
from benchmarks import attention_rivals as rivals
from benchmarks import tune_attention as tune
from launch.compile.cases import batch, case
from pyramid_jax.kernels import tiles
from pyramid_jax.kernels.tiles import Entry, Tile, Tiles, tiles_for
from pyramid_jax.mask import TokenMask, dense_mask

SMALL = "384p stage 2 unit 8"


@pytest.mark.slow
def test_the_command_times_what_runs_here_and_says_why_the_rest_does_not(
    tmp_path, capsys, monkeypatch
):
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(rivals, "importlib", SimpleNamespace(import_module=absent))
    path = tmp_path / "results" / "toy.json"
    names = ["xla", "blocks", "cudnn", "sdpa"]
    arguments = ["--reduced", "--cases", SMALL, "--repeats=1", f"--to={path}"]
    arguments += ["--rivals", *names]
    benchmark.main(arguments)
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    (row,) = result["rows"]
    assert list(row["measured"]) == names
    assert row["case"] == SMALL and row["heads"] == 2 and SMALL in printed
    for name in ("xla", "blocks"):
        one = row["measured"][name]
        assert one["error"] < 1e-5 and one["skipped"] is None
        assert min(one["forward"]["median"], one["both"]["median"], *one["rates"]) > 0
    for name, reason in {"cudnn": "needs a GPU", "sdpa": "needs the package"}.items():
        assert reason in row["measured"][name]["skipped"]
        assert f"{name:14}skipped: {reason}" in printed


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    monkeypatch.setattr(rivals, "attention", lambda q, k, v, mask, name: 1.5 * v)
    work = replace(benchmark.REDUCED, rivals=("xla",))
    found = benchmark.measure(work, SMALL, 1).measured["xla"]
    assert found.forward is None and found.error > 0.1
    assert found.skipped.endswith("of the largest value")


def test_a_pattern_without_a_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--cases", "1024p*"])
    assert "no case matches ['1024p*']" in capsys.readouterr().err


@pytest.mark.parametrize("name", [SMALL, "packed 8192", "scattered"])
def test_visible_pairs_are_those_of_the_dense_mask(name):
    mask = case(name, 1 / 16)
    assert benchmark.all_pairs(mask) == dense_mask(mask).sum()


def test_a_packed_row_has_about_as_many_tokens_as_its_name_says():
    for tokens in (4096, 24576):
        valid = (case(f"packed {tokens}").segment >= 0).sum()
        assert 0.8 * tokens < valid <= tokens


def test_jax_s_own_kernel_is_given_whole_blocks_and_all_frames(monkeypatch):
    """It knows segments alone, and is compared with the mask that it knows."""
    given = benchmark.problem(benchmark.REDUCED, SMALL, 1)
    seen = []

    def mha(q, k, v, segment, sm_scale):
        seen.append((q.shape[1], k.shape[1], v.shape[1], *segment.shape))
        return v

    monkeypatch.setitem(rivals.NEEDS, "jax_pallas", "cpu")
    library = SimpleNamespace(import_module=lambda _: SimpleNamespace(mha=mha))
    monkeypatch.setattr(rivals, "importlib", library)
    one = rivals.rival("jax_pallas", given)
    out = one.forward(*map(one.put, given[:3]))
    assert seen == [(128, 128, 128, 1, 128)]
    np.testing.assert_array_equal(one.take(out), given.v)
    assert (one.mask.segment == given.mask.segment).all() and not one.mask.frame.any()


class Tensor(np.ndarray):
    """What a benchmark needs of a tensor of PyTorch before it runs."""

    def to(self, *_) -> "Tensor":
        return self


def test_flexattention_is_asked_for_its_kernels_by_name(monkeypatch):
    """Its own for "flex", FlashAttention-4's for "flex_flash" where installed."""
    given = benchmark.problem(benchmark.REDUCED, SMALL, 1)
    asked, blocks = [], object()

    def attention(q, k, v, block_mask, kernel_options):
        assert block_mask is blocks
        asked.append(kernel_options)
        return v

    library = SimpleNamespace(
        create_block_mask=lambda *_, **__: blocks, flex_attention=attention
    )
    modules = {
        "torch": SimpleNamespace(
            compile=lambda form, dynamic: form,
            from_numpy=lambda x: x.view(Tensor),
            float32="float32",
        ),
        "torch.nn.attention.flex_attention": library,
        rivals.FLASH: None,
    }

    def imported(name: str):
        if name not in modules:
            raise ImportError(name)
        return modules[name]

    monkeypatch.setattr(rivals, "importlib", SimpleNamespace(import_module=imported))
    for name in rivals.FLEX:
        monkeypatch.setitem(rivals.NEEDS, name, "cpu")
        one = rivals.rival(name, given)
        out = one.forward(*map(one.put, given[:3]))
        np.testing.assert_array_equal(np.moveaxis(out, 1, 2), given.v)
    assert asked == [None, {"BACKEND": "FLASH"}]
    del modules[rivals.FLASH]
    rivals.rival("flex", given)
    with pytest.raises(ValueError, match="needs the package flash-attn-4"):
        rivals.rival("flex_flash", given)


A, B, C, D = (Tile(size, size) for size in (16, 32, 64, 128))


def test_the_fastest_tile_is_chosen_for_every_kernel():
    """Seconds that sum over the kernels; forward, only its own counts."""
    costs = {A: 4.0, B: 2.0, C: 1.0, D: 3.0}
    asked = []

    def clock(several: list[Tiles], only_forward: bool) -> dict[Tiles, float]:
        asked.append((len(several), only_forward))
        return {
            tiles: sum(costs[tile] for tile in tiles[: 1 if only_forward else 3])
            for tiles in several
            if tiles.query != C  # does not compile
        }

    found = tune.tuned(Tiles(A, A, A), tune.PARTS["pallas_triton"], [B, C, D], clock)
    assert found == (Tiles(C, B, C), 12.0, 4.0)
    assert asked == [(4, True), (4, False), (4, False), (2, False)]
    found = tune.tuned(Tiles(A, A, A), tune.PARTS["pallas_tpu"], [B, D], clock)
    assert found == (Tiles(B, B, B), 12.0, 6.0)


def test_tiles_that_fail_or_compute_something_else_are_left_out(monkeypatch):
    def kernel(q, k, v, mask, backend, tiles):
        if C in tiles:
            raise RuntimeError("out of shared memory")
        return (1.5 if B in tiles else 1.0) * q

    monkeypatch.setattr(tune, "attention", kernel)
    mask = TokenMask(*map(jnp.asarray, batch([SMALL], 32, 1 / 16)))
    setting = tune.Setting("pallas_triton", mask, 8, 1, "float32", 1)
    several = [Tiles(tile, tile, tile) for tile in (A, B, C, D)]
    assert list(tune.agreeing(setting, several, True)) == [several[0], several[3]]
    assert all(t > 0 for t in tune.milliseconds(setting, several[:1], False).values())
    with pytest.raises(ValueError, match=r"present tiles.* fail: out of shared"):
        tune.agreeing(setting, several[2:], True)


def line(size: int, device: str = "") -> Entry:
    """An entry that is recognised by its size."""
    square = Tiles.of([(size, size)])
    return Entry("pallas_triton", device, "bfloat16", 64, None, square, "a test")


def test_writing_replaces_the_entry_for_the_same_use_and_keeps_the_others(
    tmp_path, monkeypatch
):
    def query(device: str) -> int:
        return tiles_for("pallas_triton", 64, "bfloat16", 9, device).forward.query

    table = tmp_path / "new" / "table.json"
    monkeypatch.setattr(tiles, "TABLE", table)
    tune.write_tiles(table, [line(512, "NVIDIA H200"), line(32), line(64, "NVIDIA")])
    before = tiles.read_tiles(table)
    tune.write_tiles(table, [line(256, "NVIDIA"), line(2048, "NVIDIA B200")])
    assert query("NVIDIA A100-SXM4-80GB") == 256
    assert query("NVIDIA B200") == 2048
    after = tiles.read_tiles(table)
    assert len(after) == len(before) + 1
    assert set(map(tune.use, before)) < set(map(tune.use, after))


def test_a_cpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main([])
    assert "timed on a GPU or a TPU; JAX sees only cpu" in capsys.readouterr().err


def test_candidates_are_tiles_that_kernels_take():
    for backend in tune.CANDIDATES:
        found = tune.candidates(backend)
        assert len(set(found)) == len(found) > 3
        assert all(Tiles.of([tile]).forward == tile for tile in found)
    assert np.max([tile.query for tile in tune.candidates("pallas_triton")]) <= 128
