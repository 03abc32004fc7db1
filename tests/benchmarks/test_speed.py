# SPDX-License-Identifier: Apache-2.0
"""The numbers of the presets are those that are counted, wherever they are said."""

import json

import pytest

from benchmarks import speed
from pyramid_jax.model import PRESET_NOTES, PRESETS
from pyramid_jax.pipeline.video import VideoPipeline

FOUND = json.loads(speed.RESULT.read_text(encoding="utf-8"))
PFLOP = FOUND["pflop"]


@pytest.mark.slow  # counts every video of the table
def test_the_result_is_what_is_counted():
    """If not, run `python -m benchmarks.speed`."""
    counted = speed.all_counted("mmdit", ["384p_5s"])
    assert counted == {
        way: {"384p_5s": videos["384p_5s"]} for way, videos in PFLOP["mmdit"].items()
    }


@pytest.mark.parametrize(
    ("video", "most"), [("384p_5s", 1.5), ("768p_5s", 8.33), ("768p_10s", 18.15)]
)
def test_reuse_keeps_to_what_was_planned_and_a_clean_history_halves_it(video, most):
    videos = {way: numbers[video] for way, numbers in PFLOP["mmdit"].items()}
    assert videos["fast"] < videos["faithful"] <= most
    assert videos["clean history"] < 0.6 * videos["fast"]
    assert videos["student 1"] < videos["student 2"] < 0.12 * videos["faithful"]


@pytest.mark.parametrize("preset", PRESETS)
def test_help_and_docstring_say_what_a_preset_costs_and_changes(preset):
    words = " ".join((VideoPipeline.__call__.__doc__ or "").split())
    note = PRESET_NOTES[preset]
    assert f'"{preset}": {note}' in words.replace("; None", "")
    assert f"{PFLOP['mmdit'][preset]['768p_5s']:.2f} PFLOP" in note
    if preset != "faithful":
        assert f"PSNR {FOUND['deviation'][preset]['psnr']:.0f} dB" in note


def test_seconds_are_those_of_a_share_of_the_peak():
    """At 41 % of 989 TFLOP/s, a PFLOP takes 2.47 s, and 121 frames then 49 a second."""
    assert speed._cell(("768p_5s", 1.0)) == "1.00; 2.5, 49"


def test_the_share_is_what_was_measured():
    flop, seconds, _ = map(
        float, speed._measured("768p_5s").replace(",", ";").split(";")
    )
    assert flop * 1e15 / seconds / speed.PEAK == pytest.approx(speed.SHARE, abs=0.005)
    assert flop == pytest.approx(PFLOP["mmdit"]["faithful"]["768p_5s"], abs=0.01)
