# SPDX-License-Identifier: Apache-2.0
"""Files of adapters: the original's names and shapes, and what they add to weights."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from pyramid_jax import sharding
from pyramid_jax.checkpoint import rename
from pyramid_jax.checkpoint.adapters import (
    FRONTS,
    METADATA_KEY,
    PAIRS,
    LowRank,
    layer_adapters,
    read_adapters,
    weight_changes,
    write_adapters,
    write_differences,
)
from pyramid_jax.convert import configs
from pyramid_jax.convert.source import abstract_weights, tensor_table
from pyramid_jax.lora import DOWN, TARGETS, UP, LoRAConfig, fresh_adapters
from pyramid_jax.models.dit import BLOCKS, DiTConfig
from tests.original_files import SMALL

CFGS = {
    name: DiTConfig(**configs.dit_config(SMALL[name]).dit)
    for name in ("mmdit", "miniflux")
}
# Products of A and B, by the layer whose kernel has the same axes.
PRODUCTS = {
    "qkv": "...imr,...mrhd->...imhd",
    "out": "...hdr,...ro->...hdo",
    "mlp_in": "...ir,...ro->...io",
    "mlp_out": "...ir,...ro->...io",
    "modulation": "...ir,...ro->...io",
}


def trained(cfg: DiTConfig, **choices: Any) -> Any:
    """Random adapters of a transformer, in numpy."""
    weights = abstract_weights(cfg)
    blocks = {name: weights[name] for name in BLOCKS if name in weights}
    made = partial(fresh_adapters, LoRAConfig(3, **choices), blocks)
    shapes = sharding.unbox(jax.eval_shape(made, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), shapes)


def layers(cfg: DiTConfig, adapters: Any, scale: float = 1.0) -> dict[str, LowRank]:
    at = tensor_table(cfg), abstract_weights(cfg)
    return layer_adapters(adapters, scale, (DOWN, UP), *at)


@pytest.mark.parametrize("name", CFGS)
def test_adapters_in_a_file_add_to_weights_what_they_add_in_training(
    name: str, tmp_path: Path
):
    cfg = CFGS[name]
    adapters = trained(cfg, targets=(*TARGETS,))
    write_adapters(tmp_path / "x.safetensors", layers(cfg, adapters, 0.5), "")
    read = read_adapters(tmp_path / "x.safetensors")
    changes = weight_changes(read, tensor_table(cfg), abstract_weights(cfg))
    flat = flatten_dict(adapters)
    stems = {path[:-1] for path in flat}
    assert {tuple(path.split("/")[:-1]) for path in changes} == stems
    for stem in stems:
        product = next(PRODUCTS[part] for part in stem if part in PRODUCTS)
        expected = 0.5 * np.einsum(product, flat[*stem, DOWN], flat[*stem, UP])
        found = changes["/".join((*stem, "kernel"))]()
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=str(stem))


@pytest.mark.parametrize("name", CFGS)
@pytest.mark.parametrize("front", FRONTS.values())
def test_a_file_names_the_layers_of_the_original(name: str, front: str, tmp_path: Path):
    cfg, path = CFGS[name], tmp_path / "lora.safetensors"
    write_adapters(path, layers(cfg, trained(cfg)), front)
    specs = rename.tensor_specs(abstract_weights(cfg), tensor_table(cfg))
    with safe_open(path, "numpy") as file:
        names = set(file.keys())
        for name_of_a in (name for name in names if name.endswith(".lora_A.weight")):
            layer = name_of_a.removesuffix(".lora_A.weight")
            weight = specs[f"{layer.removeprefix(front)}.weight"].shape
            assert file.get_slice(name_of_a).get_shape() == [3, weight[1]]
            other = file.get_slice(f"{layer}.lora_B.weight").get_shape()
            assert other == [weight[0], 3]
        settings = file.metadata()[METADATA_KEY]
    assert f"{front}transformer_blocks.0.attn.add_k_proj.lora_B.weight" in names
    assert '"transformer.r": 3, "transformer.lora_alpha": 3' in settings


def test_maps_that_the_original_has_in_one_share_a_wider_adapter(tmp_path: Path):
    """Alpha follows the rank there, or PEFT would take half of it."""
    cfg, path = CFGS["miniflux"], tmp_path / "lora.safetensors"
    both = layers(cfg, trained(cfg, targets=("qkv", "out", "mlp_out")))
    write_adapters(path, both, FRONTS["diffusers"])
    last = "single_transformer_blocks.0.proj_out"
    assert both[last].down.shape[0] == 6
    with safe_open(path, "numpy") as file:
        settings = file.metadata()[METADATA_KEY]
    assert f'"transformer.alpha_pattern": {{"{last}": 6' in settings
    read = read_adapters(path)
    found = read[f"{last}.weight"]
    assert isinstance(found, LowRank) and found.scale == 1.0
    np.testing.assert_array_equal(found.up, both[last].up)


@pytest.mark.parametrize("pair", PAIRS)
def test_alpha_beside_a_pair_is_divided_by_its_rank(
    pair: tuple[str, str], tmp_path: Path
):
    path, one = tmp_path / "x.safetensors", np.ones((2, 2), np.float32)
    pairs = {f"dit.layer{end}": one for end in pair}
    save_file(pairs | {"dit.layer.alpha": np.float32(1.0)[None]}, path)
    np.testing.assert_array_equal(read_adapters(path)["layer.weight"], one)


@pytest.mark.parametrize("name", CFGS)
def test_whole_differences_are_those_of_all_weights_within_an_eighth(
    name: str, tmp_path: Path
):
    path, table = tmp_path / "student.safetensors", tensor_table(CFGS[name])
    abstract, rng = abstract_weights(CFGS[name]), np.random.default_rng(0)
    change = jax.tree.map(
        lambda x: rng.normal(0, 0.01, x.shape), sharding.unbox(abstract)
    )
    front = FRONTS["comfyui"]
    write_differences(path, change, table, front, {"what": "a student"})
    with safe_open(path, "numpy") as file:
        assert file.metadata()["what"] == "a student"
        names = {f"{front}proj_out.diff", f"{front}proj_out.diff_b"}
        assert names <= set(file.keys())
    changes = weight_changes(read_adapters(path), table, abstract)
    flat = flatten_dict(change, sep="/")
    assert changes.keys() == flat.keys()
    for key, expected in flat.items():
        np.testing.assert_allclose(changes[key](), expected, 1 / 8, 1e-5, err_msg=key)


WRONG = {
    "holds nothing": {},
    r"holds \['x.dora_scale'\]": {"x.dora_scale": np.ones(2, np.float32)},
    "without x.lora_B.weight": {"x.lora_A.weight": np.ones((1, 2), np.float32)},
}


@pytest.mark.parametrize("message", WRONG)
def test_files_of_anything_else_are_refused(message: str, tmp_path: Path):
    save_file(WRONG[message], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        read_adapters(tmp_path / "x.safetensors")


def test_adapters_of_another_network_are_refused():
    cfg = CFGS["mmdit"]
    one = LowRank(np.zeros((1, 5)), np.zeros((7, 1)))
    wrong = {"transformer_blocks.0.attn.to_q.weight": one, "nowhere.weight": one}
    with pytest.raises(ValueError, match=r"nowhere\.weight is unknown; 2 of 2"):
        weight_changes(wrong, tensor_table(cfg), abstract_weights(cfg))
