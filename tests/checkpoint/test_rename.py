# SPDX-License-Identifier: Apache-2.0
"""Conversion of weights is complete, one-to-one, exact, and names everything wrong."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pyramid_jax.checkpoint import dit_tables, rename
from pyramid_jax.checkpoint.tensors import StoredTensors, read_tensors
from pyramid_jax.convert import configs
from pyramid_jax.convert.source import abstract_weights, tensor_table
from pyramid_jax.layout import Layout
from pyramid_jax.model import MINIFLUX, MMDIT
from pyramid_jax.models.dit import DiTConfig
from tests import original_files
from tests.released import tensor_shapes

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SMALL = ("sd3_dit", "flux_dit", "flux_dit_headdim64")
# Config, tensors in the file, parameters, and some of the tensors.
RELEASED = {
    "mmdit": (
        MMDIT,
        779,
        2_028_334_144,
        {
            "pos_embed.pos_embed": (1, 36864, 1536),
            "pos_embed.proj.weight": (1536, 16, 2, 2),
            "transformer_blocks.22.attn.to_add_out.weight": (1536, 1536),
            "transformer_blocks.23.norm1_context.linear.weight": (3072, 1536),
            "transformer_blocks.23.attn.norm_add_q.weight": (64,),
            "transformer_blocks.23.ff.net.0.proj.weight": (6144, 1536),
            "proj_out.weight": (64, 1536),
        },
    ),
    "miniflux": (
        MINIFLUX,
        496,
        1_972_059_200,
        {
            "x_embedder.weight": (1920, 64),
            "time_text_embed.text_embedder.linear_1.weight": (1920, 768),
            "transformer_blocks.7.attn.norm_added_k.weight": (64,),
            "transformer_blocks.7.ff_context.net.2.weight": (1920, 7680),
            "single_transformer_blocks.15.proj_out.weight": (1920, 9600),
            "norm_out.linear.bias": (3840,),
        },
    ),
}
JSON = {"mmdit": original_files.MMDIT, "miniflux": original_files.MINIFLUX}


def small(case: str) -> tuple[DiTConfig, StoredTensors]:
    """The config and the original's tensors of a small recorded transformer."""
    config = json.loads((GOLDEN / case / "config.json").read_text())["constructor"]
    cfg = DiTConfig(**configs.dit_config(config).dit)
    return cfg, read_tensors(GOLDEN / case / "weights.safetensors")


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_transformer_has_all_its_tensors_in_the_right_shapes(name):
    cfg, count, parameters, some = RELEASED[name]
    table = tensor_table(cfg)
    shapes = tensor_shapes(table, abstract_weights(cfg))
    sizes = [
        np.prod(shape) for key, shape in shapes.items() if key not in table.constants
    ]
    assert (len(shapes), sum(map(int, sizes))) == (count, parameters)
    assert {key: shapes[key] for key in some} == some
    abstract = abstract_weights(cfg)
    specs = rename.tensor_specs(abstract, table)
    assert rename.shape_problems(specs, table, abstract) == []


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_file_gives_the_config_of_the_variant(name):
    arguments = configs.dit_config(JSON[name])
    cfg = RELEASED[name][0]
    assert DiTConfig(**arguments.dit) == cfg
    assert Layout(**arguments.layout) == Layout(
        patch=2, position_table=cfg.position_table
    )


@pytest.mark.parametrize("case", SMALL)
def test_converting_and_exporting_gives_back_every_bit(case):
    cfg, tensors = small(case)
    table = tensor_table(cfg)
    params = rename.convert_tensors(tensors, table, abstract_weights(cfg))
    back = dict(rename.export_tensors(params, table))
    assert back.keys() == tensors.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, np.asarray(tensors[key]), err_msg=key)


def test_converted_parameters_have_the_structure_of_the_model():
    cfg, tensors = small("flux_dit")
    expected = abstract_weights(cfg)
    params = rename.convert_tensors(tensors, tensor_table(cfg), expected)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), params)
    plain = rename.unbox(expected)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype.name), plain)


def test_weights_of_lower_precision_are_widened_exactly(tmp_path):
    cfg, tensors = small("flux_dit_headdim64")
    half = {key: np.asarray(x).astype(jax.numpy.bfloat16) for key, x in tensors.items()}
    save_file(half, tmp_path / "weights.safetensors")
    table = tensor_table(cfg)
    params = rename.convert_tensors(
        read_tensors(tmp_path), table, abstract_weights(cfg)
    )
    for key, value in dict(rename.export_tensors(params, table)).items():
        np.testing.assert_array_equal(value, half[key].astype(np.float32))


def test_every_parameter_is_placed_once_as_soon_as_it_is_made():
    cfg, tensors = small("sd3_dit")
    placed = []
    params = rename.convert_tensors(
        tensors,
        tensor_table(cfg),
        abstract_weights(cfg),
        lambda path, x: placed.append(path),
    )
    assert sorted(placed) == sorted(set(placed))
    assert len(placed) == len(jax.tree.leaves(abstract_weights(cfg)))
    assert jax.tree.leaves(params) == []


def test_all_damage_is_reported_together():
    cfg, stored = small("sd3_dit")
    tensors = {key: np.asarray(x) for key, x in stored.items()}
    del tensors["proj_out.bias"]
    tensors["proj_in.bias"] = np.zeros(3, np.float32)
    tensors["context_embedder.weight"] = tensors["context_embedder.weight"].T
    tensors["pos_embed.pos_embed"] = tensors["pos_embed.pos_embed"] + 1e-3
    with pytest.raises(ValueError) as raised:
        rename.convert_tensors(tensors, tensor_table(cfg), abstract_weights(cfg))
    _, *problems = str(raised.value).splitlines()
    assert [problem.strip() for problem in problems] == [
        "proj_out.bias is missing",
        "proj_in.bias is left over",
        "context_embedder.weight has shape (48, 64), expected (64, 48)",
        "pos_embed.pos_embed differs by 0.001 from what this model computes",
    ]


def test_weights_of_another_depth_do_not_fit():
    cfg, tensors = small("flux_dit")
    deeper = DiTConfig(**{**vars(cfg), "single_blocks": cfg.single_blocks + 1})
    with pytest.raises(ValueError, match=r"single_transformer_blocks\.3.* is missing"):
        rename.convert_tensors(tensors, tensor_table(deeper), abstract_weights(deeper))


def test_a_table_that_uses_or_makes_something_twice_is_refused():
    cfg, tensors = small("flux_dit")
    table = tensor_table(cfg)
    head = next(rule for rule in table.rules if rule.ours == ("head/bias",))
    twice = table._replace(rules=(*table.rules, head))
    with pytest.raises(ValueError) as raised:
        rename.convert_tensors(tensors, twice, abstract_weights(cfg))
    assert "parameter head/bias is made 2 times" in str(raised.value)
    assert "proj_out.bias is used 2 times" in str(raised.value)


def test_parameters_that_no_rule_knows_cannot_be_exported():
    table = dit_tables.Table((dit_tables.Rule(("a.weight",), ("a/kernel",), "linear"),))
    params = {"b": {"kernel": np.ones((2, 3), np.float32)}}
    with pytest.raises(ValueError) as raised:
        dict(rename.export_tensors(params, table))
    assert "parameter b/kernel is in no rule" in str(raised.value)
    assert "the model has no parameter a/kernel" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "Other"}, "PyramidDiffusionMMDiT"),
        ({"_class_name": None, "pos_embed_max_size": None}, "none of"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"patch_size": 4}, "patch_size 4"),
        ({"caption_projection_dim": 1152}, "caption_projection_dim 1152"),
    ],
)
def test_other_transformers_are_refused(change, message):
    config = {k: v for k, v in (JSON["mmdit"] | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        configs.dit_config(config)


def test_a_folder_of_several_files_is_read_as_one(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.zeros((3, 1), np.float32)}, tmp_path / "2.safetensors")
    tensors = read_tensors(tmp_path)
    assert {key: x.shape for key, x in tensors.items()} == {"a": (2,), "b": (3, 1)}
    np.testing.assert_array_equal(np.asarray(tensors["a"]), [1, 1])


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in "12":
        save_file({"a": np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="repeats"):
        read_tensors(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        read_tensors(tmp_path)
