# SPDX-License-Identifier: Apache-2.0
"""The files of a network: config.json with its messages, weights piece by piece."""

from pathlib import Path

import numpy as np
import pytest

from pyramid_jax.checkpoint import files


def test_a_tree_is_read_one_parameter_at_a_time(tmp_path: Path):
    tree = {"a": {"b": np.ones((3, 4), np.float32)}, "c": np.arange(3)}
    files.write_weights(tmp_path, tree)
    seen = []
    sums = files.read_weights(
        tmp_path, tree, lambda path, x: seen.append(path) or x.sum()
    )
    assert sorted(seen) == ["a/b", "c"]
    assert sums["c"] == 3


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path):
    files.write_weights(tmp_path, {"a": np.ones(3), "b": np.ones(2)})
    with pytest.raises(ValueError) as raised:
        files.open_weights(tmp_path, {"a": np.ones(4), "c": np.ones(2)})
    _, *problems = str(raised.value).splitlines()
    assert [problem.strip() for problem in problems] == [
        "a has shape (3,), expected (4,)",
        "b is unknown",
        "c is missing",
    ]


@pytest.mark.parametrize("count", [1, 3])
def test_a_last_layer_that_was_saved_in_its_stack_is_read(count: int, tmp_path: Path):
    stack = np.arange(count * 4.0).reshape(count, 2, 2)
    files.write_weights(tmp_path, {"net": {"block": {"w": stack}}})
    expected = {"net": {"last_block": {"w": stack[-1]}}}
    if count > 1:
        expected["net"]["block"] = {"w": stack[:-1]}
    read = files.read_weights(tmp_path, expected, lambda _, x: x)
    assert set(read["net"]) == set(expected["net"])
    for name, weights in expected["net"].items():
        np.testing.assert_array_equal(read["net"][name]["w"], weights["w"])


def test_a_stack_of_another_depth_is_refused(tmp_path: Path):
    files.write_weights(tmp_path, {"net": {"block": {"w": np.ones((4, 2))}}})
    expected = {"block": {"w": np.ones((2, 2))}, "last_block": {"w": np.ones(2)}}
    with pytest.raises(ValueError, match=r"block/w has shape \(4, 2\), expected"):
        files.read_weights(tmp_path, {"net": expected}, lambda _, x: x)


def test_a_config_is_read_as_it_was_written(tmp_path: Path):
    config = {"model": {"width": 8}, "sample": {}}
    files.write_config(tmp_path / "new", config)
    assert files.read_config(tmp_path / "new", "a model", "model") == config


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_may_have_a_byte_order_mark(encoding: str, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"name": "Löwe"}', encoding=encoding)
    assert files.read_config(tmp_path, "a model") == {"name": "Löwe"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no config\.json of a model; copy this file, too"),
        ("{", r"config\.json is no JSON"),
        ("[1]", r"config\.json is no JSON \(it is a list, not an object\)"),
        ("[" * 100_000, r"config\.json is no JSON"),
        ('{"sample": 1}', r"is no config\.json of a model, it lacks \['model'\]"),
    ],
)
def test_a_config_that_is_missing_or_another_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        files.read_config(tmp_path, "a model", "model")
