# SPDX-License-Identifier: Apache-2.0
"""VBench's prompts are all there, and its totals are those of its own code."""

import json
from collections import Counter
from pathlib import Path

import pytest

from launch.evaluate import __main__, vbench

PUBLISHED = Path(__file__).parent / "published_eval_results.json"
COUNTS = {  # prompts of each dimension; two prompts are listed twice
    "subject_consistency": 72,
    "background_consistency": 86,
    "temporal_flickering": 75,
    "motion_smoothness": 72,
    "dynamic_degree": 72,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "object_class": 79,
    "multiple_objects": 82,
    "human_action": 100,
    "color": 85,
    "spatial_relationship": 84,
    "scene": 86,
    "appearance_style": 90,
    "temporal_style": 100,
    "overall_consistency": 93,
}


def test_the_list_has_the_prompts_of_every_dimension():
    prompts = vbench.read_prompts()
    assert len(prompts) == 944
    assert Counter(name for names in prompts.values() for name in names) == COUNTS
    assert COUNTS.keys() == vbench.QUALITY.keys() | vbench.SEMANTIC.keys()


def test_totals_of_the_published_row_are_those_of_vbench():
    """The SD3 variant at 768p, as its own cal_final_score.py adds it up."""
    total, quality, semantic = vbench.totals(vbench.read_scores(PUBLISHED))
    assert quality == pytest.approx(0.847460, abs=1e-6)
    assert semantic == pytest.approx(0.696191, abs=1e-6)
    assert total == pytest.approx(0.817206, abs=1e-6)


def test_the_command_prints_and_writes_totals(given, tmp_path: Path, capsys):
    to = tmp_path / "new" / "totals.json"
    __main__.evaluate(given(f"--results={PUBLISHED}", f"--to={to}"))
    out = capsys.readouterr().out
    assert "| **quality** | **84.75** |" in out and "| scene | 43.20 |" in out
    report = json.loads(to.read_text())
    assert report["total"] == pytest.approx(0.817206, abs=1e-6)
    assert report["dimensions"]["scene"] == 0.432


def test_bounds_become_0_and_1():
    bounds = vbench.QUALITY | vbench.SEMANTIC
    assert vbench.totals({k: x.low for k, x in bounds.items()}) == (0, 0, 0)
    high = vbench.totals({k: x.high for k, x in bounds.items()})
    assert high == pytest.approx((1, 1, 1))


def test_results_of_a_folder_are_joined_and_other_files_ignored(tmp_path: Path):
    scores = json.loads(PUBLISHED.read_text())
    for name, score in scores.items():
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({name: score}))
        (tmp_path / f"{name}_full_info.json").write_text("[]")
    assert vbench.read_scores(tmp_path) == vbench.read_scores(PUBLISHED)


@pytest.mark.parametrize("missing", ["scene", "temporal_flickering"])
def test_a_missing_dimension_is_refused_by_name(missing: str):
    scores = vbench.read_scores(PUBLISHED)
    del scores[missing]
    with pytest.raises(ValueError, match=f"dimensions missing: {missing};"):
        vbench.totals(scores)


def test_unknown_dimensions_and_percentages_are_refused():
    scores = vbench.read_scores(PUBLISHED)
    with pytest.raises(ValueError, match="unknown: beauty"):
        vbench.totals(scores | {"beauty": 0.5})
    with pytest.raises(ValueError, match=r"'scene': 43\.2.*expected 0 to 1"):
        vbench.totals(scores | {"scene": 43.2})


def test_results_that_contradict_each_other_are_refused(tmp_path: Path):
    for run, score in enumerate((0.5, 0.6)):
        path = tmp_path / f"{run}_eval_results.json"
        path.write_text(json.dumps({"scene": [score, []]}))
    with pytest.raises(ValueError, match=r"scene is 0\.6, another .* is 0\.5"):
        vbench.read_scores(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"scene": 0.4}', '{"scene": []}'])
def test_broken_results_are_named(text: str, tmp_path: Path):
    path = tmp_path / "a_eval_results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a_eval_results\.json is no file of results"):
        vbench.read_scores(tmp_path)


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no file that ends with _eval_results"):
        vbench.read_scores(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"prompt": "a"}]', "[1]"])
def test_other_lists_of_prompts_are_refused(text: str, tmp_path: Path):
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="VBench_full_info"):
        vbench.read_prompts(path)
