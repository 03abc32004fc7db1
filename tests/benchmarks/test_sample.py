# SPDX-License-Identifier: Apache-2.0
"""The benchmark of sampling counts what it says, and its cases are what they say."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sample, stages, video
from benchmarks.device.networks import TINY
from benchmarks.reference_video import OriginalVideo
from benchmarks.workload import Workload
from pyramid_jax import flops, layout, mask, pyramid
from pyramid_jax.pipeline.denoise import Progress
from pyramid_jax.pipeline.prompts import LIMIT

TOY = replace(TINY, video_steps=1)


@pytest.mark.parametrize("variant", ["mmdit", "miniflux"])
def test_the_arithmetic_of_a_step_is_that_of_its_blocks(variant):
    """By hand: a block's layers are 12 products of width x width for every token; of
    text and history the last block has only 3, the queries, keys and values."""
    work = Workload(variant, depth=3, width=32, heads=2)
    d, m, past, now = 32, 5, [20, 4], 16
    tokens = m + sum(past) + now
    dit, double = work.model.dit, 3 if variant == "mmdit" else 1
    per_token = 2 * tokens * 12 + tokens * 3 + now * 9
    assert dit.double_blocks == double
    ends = (tokens - m + now) * dit.patch_values * d + m * dit.text_width * d
    pairs = 2 * flops.segment_pairs(m, [*past, now]) + now * tokens
    expected = 2 * (per_token * d * d + ends) + 4 * d * pairs
    assert flops.step(work.weights, work.model, m, [*past, now]) == expected


def test_the_arithmetic_of_a_training_step_has_conditions_and_all_answers():
    work = Workload("mmdit", depth=3, width=32, heads=2)
    d, m, n = 32, 5, 20
    dit = work.model.dit
    per_token, conditions = 3 * (m + n) * 12 - 9 * m, 3 * 12 + 2 - 4
    ends = n * 2 * dit.patch_values * d + m * dit.text_width * d
    vectors = (256 + dit.pooled_width) * d + 2 * d * d
    found = flops.products(work.weights, flops.RowLengths(m, n))
    dense = sum(product.flops * count for product, count in found.items())
    assert dense == 2 * ((per_token + conditions) * d * d + ends + vectors)


@pytest.mark.parametrize(
    ("preset", "limit"),
    [
        pytest.param("384p_5s", 1.50, marks=pytest.mark.slow),
        pytest.param("768p_5s", 8.33, marks=pytest.mark.slow),
        pytest.param("768p_10s", 18.15, marks=pytest.mark.slow),
    ],
)
def test_reuse_spares_a_third_of_the_work_or_more(preset, limit):
    case = video.case(preset)
    assert 0.8 * limit < case.flops() / 1e15 <= limit
    assert replace(case, reuse=False).flops() > 1.5 * case.flops()
    new, cells = case.read(case.unit(15, 2), 2), case.work.cells
    assert sum(new) == (1 / 16 + 1 / 4 + 1 + 1) * cells[0] * cells[1] / 4


def test_tokens_that_are_known_are_seen_and_not_multiplied():
    """With 5 known tokens, 3 of an older and 4 of the current frame, in 2 blocks."""
    work = replace(TOY.work, depth=2)
    whole = flops.step(work.weights, work.model, 5, [3, 4])
    rest = flops.step(work.weights, work.model, 0, [3, 4], known=5)
    row, few = flops.RowLengths(5, 7, 0, 4), flops.RowLengths(0, 7, 0, 4)
    dense = [
        sum(p.flops * n for p, n in flops.products(work.weights, each).items())
        for each in (row, few)
    ]
    # Text sees itself and frame 0, in the first of the two blocks.
    assert whole - rest == dense[0] - dense[1] + 4 * 5 * 8 * work.width


@pytest.mark.slow
def test_more_scans_have_fewer_empty_slots():
    case = replace(video.case("384p_5s"), reuse=False)
    one, two = (replace(case, scans=scans).flops() for scans in (1, 2))
    counted = case.flops(slots=False)
    assert counted < two < one < 1.3 * counted
    each = replace(case, scans=case.work.sampled - 1)
    assert each.flops() == counted  # every unit in its own


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frames_and_pairs_are_those_of_the_rows_that_sampling_makes(stage):
    model, cells, unit = TOY.cfg, (16, 8), 3
    latent = np.zeros((unit + 1, *cells, 16), np.float32)
    levels = [np.asarray(x) for x in pyramid.levels(latent, 3)]
    chosen = layout.compact(layout.clips(stage, unit, unit + 1))
    row = layout.segment(levels, chosen, model.layout)
    counts = flops.frames(model, cells, stage, unit)
    np.testing.assert_array_equal(counts, np.bincount(row.frame))
    zeros = np.zeros((1, 6), np.int32), np.zeros_like(row.frame)[None]
    seen = mask.dense_mask(mask.joint(*zeros, row.frame[None]))
    assert flops.segment_pairs(6, counts) == seen.sum()


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_whole_chip_or_unknown(kind, rate):
    assert flops.peak(kind) == rate


def test_utilisation_is_known_only_in_bfloat16_on_a_known_chip(monkeypatch):
    half = replace(TOY, dtype="bfloat16")
    assert stages.utilisation(half, 10**12, 1.0) is None
    monkeypatch.setattr(stages.flops, "peak", lambda kind: 4e12)
    assert stages.utilisation(half, 10**12, 0.5) == 0.5
    assert stages.utilisation(TOY, 10**12, 0.5) is None


def test_every_step_belongs_to_its_stage_and_takes_the_time_since_the_last():
    """The text encoders come before the first step and are not part of it."""
    ends, now = [], 10.0
    for unit, counts in enumerate([(2, 1, 1), (1, 1, 2)]):
        for k, steps in enumerate(counts):
            for i in range(steps):
                now += 1 + k + 10 * unit
                ends.append((Progress(unit, 2, k, 3, i, steps, 0.0, jnp.zeros(1)), now))
    run = stages.Run(began=7.0, steps=ends, ended=99.0)
    found = stages.by_stage(TOY, [run, run], text=3.0)
    assert [s.units for s in found] == ["first"] * 3 + ["later"] * 3
    assert [s.steps for s in found] == [2, 1, 1, 1, 1, 2]
    assert [s.step.median for s in found] == [1, 2, 3, 11, 12, 13]
    assert [s.seconds for s in found] == [2, 2, 3, 11, 12, 26]
    one = flops.step(TOY.work.weights, TOY.cfg, LIMIT, [16, 16])
    assert found[-1].flops == 2 * 2 * one  # two steps, two prompts
    assert found[-1].tokens == (LIMIT + 32,) * 2


def test_the_presets_have_the_released_sizes():
    """T5 v1.1 XXL's encoder has 4,762,310,656 weights, CLIP's 123,650,304 and
    694,659,840 with their projections."""
    given = video.case("768p_10s")
    assert (given.size.height, given.size.width, given.size.frames) == (768, 1280, 241)
    assert given.parameters["transformer"] == 2_028_334_144
    assert (
        given.parameters["text encoders"] == 4_762_310_656 + 123_650_304 + 694_659_840
    )
    assert given.cfg.dit.dtype == "bfloat16" and given.options.first_steps == (20,) * 3
    other = video.case("384p_5s", "miniflux")
    assert (other.size.height, other.size.width, other.size.frames) == (384, 640, 121)
    assert other.work.parameters == 1_972_059_200
    assert [clip.projection for clip in other.clips] == [None]


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="384p_5s"):
        video.case("1080p")


def test_random_weights_have_shapes_and_type_and_differ():
    like = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 2
    one, other = video.random_weights(like, "bfloat16")
    assert one.shape == (64, 64) and one.dtype == jnp.bfloat16
    assert 0.018 < float(one.std()) < 0.022
    assert not (one == other).all()


def test_a_path_without_the_original_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkout"):
        OriginalVideo(tmp_path, TOY)


def test_the_original_runs_only_beside_the_small_preset(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--preset=384p_5s", "--reference=somewhere"])
    assert "leave out --preset" in capsys.readouterr().err


@pytest.mark.slow  # compiles text encoders, every stage, and the decoder
def test_the_command_samples_a_video_and_writes_what_was_measured(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sample, "case", lambda preset, variant: TOY)
    monkeypatch.setattr(sample, "LOOPS", {"toy": replace(TOY.work, steps=1)})
    path = tmp_path / "results" / "toy.json"
    sample.main(["--repeats=2", "--loops", f"--to={path}"])
    printed, result = capsys.readouterr().out, json.loads(path.read_text())
    assert result["size"] == {"height": 64, "width": 64, "frames": 9}
    got = result["measured"]
    assert [stage["steps"] for stage in got["stages"]] == [2, 2, 2, 1, 1, 1]
    parts = sum(got[part]["median"] for part in ("text", "sampling", "decoding"))
    assert parts == pytest.approx(got["video"]["median"], rel=0.2)
    assert got["flops"] == sum(stage["flops"] for stage in got["stages"])
    assert got["weights"] == 4 * sum(result["parameters"].values())
    assert got["utilisation"] is None and result["comparisons"] == {}
    assert result["loops"]["toy"]["calls"]["median"] > 0
    for name in ("video", "decoding", "later", "toy"):
        assert name in printed
