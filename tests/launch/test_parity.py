# SPDX-License-Identifier: Apache-2.0
"""What was recorded from the original implementation is what this package computes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch.parity.__main__ import main
from launch.parity.arguments import not_replayed
from launch.parity.cases import (
    NO_WEIGHTS,
    Answer,
    Case,
    Line,
    Scenario,
    compare,
    find,
    read_case,
    read_scenario,
    scenario_files,
)
from launch.parity.run import KINDS, replay_scenario
from launch.parity.vae_losses import loss_weights

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = {name: read_case(folder, name) for name, folder in find(GOLDEN).items()}
RECORDED = [
    (case.name, path.stem) for case in CASES.values() for path in scenario_files(case)
]

# Many sizes to compile; `make parity` replays them.
LONG = {"tiled_image", "temporal_chunk17"}


def recorded(case: str, scenario: str) -> Scenario:
    """A scenario of the committed cases."""
    return read_scenario(CASES[case], CASES[case].folder / f"{scenario}.safetensors")


def copied(case: str, folder: Path) -> Path:
    """A copy of a case that may be damaged."""
    return Path(shutil.copytree(CASES[case].folder, folder / case))


def compared(value: object, recorded: object, **how: object) -> Line:
    """The line of one answer to one recorded tensor."""
    scenario = Scenario("s", {}, {"out.x": np.asarray(recorded)})
    answer = Answer("out.x", value, 0.1, **how)
    (line,) = compare(Case("c", Path(), {}), scenario, [answer])
    return line


@pytest.mark.parity
@pytest.mark.parametrize(
    ("case", "scenario"),
    [
        pytest.param(*one, marks=pytest.mark.slow) if one[1] in LONG else one
        for one in RECORDED
    ],
)
def test_every_recorded_result_is_answered_within_its_tolerance(case, scenario):
    lines = list(replay_scenario(CASES[case], recorded(case, scenario)))
    assert any(line.verdict == "ok" for line in lines)
    wrong = [
        str(line) for line in lines if line.verdict != "ok" and line.note != NO_WEIGHTS
    ]
    assert not wrong


@pytest.mark.parametrize(("case", "scenario"), RECORDED)
def test_every_scenario_is_of_exactly_one_kind(case, scenario):
    assert sum(kind.fits(recorded(case, scenario)) for kind in KINDS) == 1


@pytest.mark.parametrize(
    ("value", "recorded", "verdict"),
    [
        ([1.0, 2.05], [1.0, 2.0], "ok"),
        ([1.0, 2.2], [1.0, 2.0], "FAIL"),
        ([1.0, np.nan], [1.0, 2.0], "FAIL"),
        ([1.0, np.nan], [1.0, np.nan], "FAIL"),
        ([1.0, np.inf], [1.0, np.inf], "FAIL"),
        ([[1.0, 2.0]], [1.0, 2.0], "FAIL"),
    ],
)
def test_a_verdict_needs_equal_shapes_and_finite_close_values(value, recorded, verdict):
    assert compared(value, recorded).verdict == verdict


def test_a_relative_error_is_measured_against_the_largest_recorded_value():
    assert compared([95.0], [100.0], relative=True).error == pytest.approx(0.05)


def test_values_that_mean_nothing_are_left_out():
    where = np.array([True, False])
    assert compared([1.0, 5.0], [1.0, 2.0], where=where).verdict == "ok"
    assert compared([5.0, 1.0], [2.0, 1.0], where=where).verdict == "FAIL"


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        ("out.frames_uint8", NO_WEIGHTS),
        ("out.x", "a scenario of an unknown kind"),
    ],
)
def test_what_is_not_computed_is_skipped_with_a_reason(tensor, why):
    scenario = Scenario("s", {}, {"in.x": np.zeros(1), tensor: np.zeros(1)})
    (line,) = replay_scenario(Case("c", Path(), {}), scenario)
    assert (line.tensor, line.verdict, line.note) == (tensor, "skipped", why)


def test_the_command_succeeds_on_recorded_values(tmp_path, capsys):
    copied("scheduler/two_stage_shift2", tmp_path)
    assert main(["--cases", str(tmp_path), "--to", str(tmp_path / "to.json")]) == 0
    *lines, totals = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "to.json").read_text())
    assert result["cases"] == ["scheduler/two_stage_shift2"]
    assert result["verdicts"] == {"ok": len(lines), "FAIL": 0, "skipped": 0}
    assert totals.startswith(f"{len(lines)} ok, 0 FAIL")


def test_the_command_fails_on_one_wrong_value(tmp_path, capsys):
    file = copied("scheduler/two_stage_shift2", tmp_path) / "tables.safetensors"
    tensors = load_file(file)
    tensors["start_sigmas"][1] += 1e-4
    save_file(tensors, file)
    assert main(["--cases", str(tmp_path), "--only", "scheduler/*"]) == 1
    out = capsys.readouterr().out
    assert " 1 FAIL" in out.splitlines()[-1]
    failed = [line.split()[2] for line in out.splitlines()[:-1] if "FAIL" in line]
    assert failed == ["start_sigmas"]


def test_what_cannot_be_read_fails_and_the_others_go_on(tmp_path, capsys):
    copied("scheduler/two_stage_shift2", tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    file = copied("scheduler/default_3stage", tmp_path) / "tables.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert main(["--cases", str(tmp_path)]) == 1
    *lines, totals = capsys.readouterr().out.splitlines()
    failed = {tuple(line.split()[:2]) for line in lines if "FAIL" in line}
    broken = {("broken", "config.json"), ("scheduler/default_3stage", "tables")}
    assert failed == broken and " 2 FAIL" in totals
    assert any("two_stage" in line and line.endswith("ok") for line in lines)
    assert all("can't be replayed: " in line for line in lines if "FAIL" in line)


def test_other_schedules_than_those_of_released_models_are_skipped(tmp_path, capsys):
    config = copied("scheduler/two_stage_shift2", tmp_path) / "config.json"
    config.write_text(config.read_text().replace("1000", "500", 1))
    assert main(["--cases", str(tmp_path)]) == 0
    *lines, totals = capsys.readouterr().out.splitlines()
    why = "skipped: recorded with num_train_timesteps=500, which is not replayed"
    assert lines and all(line.endswith(why) for line in lines)
    assert totals.startswith("0 ok, 0 FAIL")


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"constructor": {"use_temporal_causal": False}}, []),
        ({"constructor": {"patch_size": 4}}, ["patch_size=4"]),
        ({"constructor": {"axes_dims_rope": [4], "mlp": 3}}, ["mlp=3"]),
        (
            {"constructor": {}, "constructor_overrides": {"qk_norm": None}},
            ["qk_norm=None"],
        ),
        ({"loss_constructor": {"disc_factor": 0.5}}, []),
        ({"loss_constructor": {"disc_conditional": True}}, ["disc_conditional=True"]),
        (
            {"vae_constructor": {"decoder_up_block_types": ["A"]}},
            ["decoder_up_block_types=['A']"],
        ),
        ({"configs": {"t5": {"d_model": 4, "scale": 1}}}, ["scale=1"]),
        ({"call": {"temp": 2, "use_sde": True}}, ["use_sde=True"]),
    ],
)
def test_arguments_that_would_be_ignored_are_named(settings, ignored):
    assert not_replayed(settings) == ignored


def test_an_image_may_be_recorded_without_time():
    image = np.arange(24.0).reshape(1, 2, 3, 4)
    scenario = Scenario("s", {}, {"a": image, "b": image[:, :, None]})
    np.testing.assert_array_equal(scenario.latent("a"), scenario.latent("b"))


def test_weights_of_losses_are_found_beside_those_of_the_vae():
    shapes = {
        "weights.safetensors": {"encoder.conv_in.conv.bias": [8]},
        "loss.safetensors": {"logvar": [], "discriminator.main.0.bias": [8]},
    }
    assert loss_weights({"state_dict_shapes": shapes}) == "loss.safetensors"


def test_a_pattern_that_matches_no_case_is_an_error():
    with pytest.raises(ValueError, match="no case"):
        find(GOLDEN, "none*")
    with pytest.raises(SystemExit, match=r"^pyramid-jax parity: no case"):
        main(["--cases", str(GOLDEN), "--only", "none*"])
