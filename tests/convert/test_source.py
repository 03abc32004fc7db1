# SPDX-License-Identifier: Apache-2.0
"""The released networks have exactly the tensors that the original documents."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from pyramid_jax.checkpoint.tensors import open_safetensors
from pyramid_jax.convert import configs
from pyramid_jax.convert.source import abstract_weights, tensor_table
from pyramid_jax.models.dit import DiTConfig
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline.prompts import encoder_config
from pyramid_jax.sharding import unbox
from tests import original_files
from tests.released import tensor_shapes

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CLIP = {"architectures": ["CLIPTextModelWithProjection"], "vocab_size": 49408}
CLIP |= {"max_position_embeddings": 77, "eos_token_id": 2}
CLIP_L = CLIP | dict(hidden_size=768, intermediate_size=3072, projection_dim=768)
CLIP_L |= dict(num_attention_heads=12, num_hidden_layers=12, hidden_act="quick_gelu")
CLIP_G = CLIP | dict(hidden_size=1280, intermediate_size=5120, projection_dim=1280)
CLIP_G |= dict(num_attention_heads=20, num_hidden_layers=32, hidden_act="gelu")
T5 = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24)
T5 |= dict(num_heads=64, relative_attention_num_buckets=32)
T5["feed_forward_proj"] = "gated-gelu"


def dit(config: dict) -> DiTConfig:
    return DiTConfig(**configs.dit_config(config).dit)


def vae(config: dict) -> VAEConfig:
    return VAEConfig(**configs.vae_config(config))


# What is released: how it is described, its documented tensors, how many, parameters.
RELEASED = {
    "mmdit": (dit, original_files.MMDIT, original_files.mmdit, 779, 2_028_334_144),
    "miniflux": (
        *(dit, original_files.MINIFLUX, original_files.miniflux),
        *(496, 1_972_059_200),
    ),
    "vae": (vae, original_files.VAE, original_files.vae, 260, 335_402_067),
    "clip_l": (
        *(encoder_config, CLIP_L),
        *(lambda _: original_files.clip(12, 768, 3072), 197, 123_650_304),
    ),
    "clip_g": (
        *(encoder_config, CLIP_G),
        *(lambda _: original_files.clip(32, 1280, 5120), 517, 694_659_840),
    ),
    "t5": (
        *(encoder_config, T5),
        *(lambda _: original_files.t5(), 219, 4_762_310_656),
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_network_has_exactly_the_documented_tensors(name: str):
    describe, config, documented, tensors, parameters = RELEASED[name]
    cfg, expected = describe(config), documented(config)
    abstract = unbox(abstract_weights(cfg))
    assert tensor_shapes(tensor_table(cfg), abstract) == expected
    sizes = [np.prod(x.shape) for x in jax.tree.leaves(abstract)]
    assert (len(expected), int(sum(map(int, sizes)))) == (tensors, parameters)


@pytest.mark.parametrize(
    ("case", "documented"),
    [("sd3_dit", original_files.mmdit), ("flux_dit", original_files.miniflux)],
)
def test_the_documented_tensors_are_those_of_the_original(case: str, documented):
    """Its own files, of small models, prove the lists that are used here."""
    config = json.loads((GOLDEN / case / "config.json").read_text())
    stored = open_safetensors(GOLDEN / case / "weights.safetensors")
    shapes = {key: tensor.shape for key, tensor in stored.items()}
    assert documented(config["constructor"]) == shapes


@pytest.mark.parametrize("kind", ["mmdit", "miniflux"])
def test_config_files_are_written_as_they_are_read(kind: str):
    arguments = configs.dit_config(original_files.SMALL[kind])
    cfg = DiTConfig(**arguments.dit)
    written = configs.dit_fields(vars(cfg), {"interpolate": True} | arguments.layout)
    assert configs.dit_config(written) == arguments
    again = configs.vae_fields(vars(VAEConfig()))
    assert configs.vae_config(again) == configs.vae_config(original_files.VAE)


def test_transformers_that_the_original_does_not_have_are_not_described():
    cfg = DiTConfig(single_blocks=2)
    with pytest.raises(
        ValueError, match="single_blocks is 2, where the original has 0"
    ):
        configs.dit_fields(
            vars(cfg), {"patch": 2, "position_table": 192, "interpolate": True}
        )
