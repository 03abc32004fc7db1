# SPDX-License-Identifier: Apache-2.0
"""Text encoders of the original: names, config files, tensors that are there twice."""

from pathlib import Path

import numpy as np
import pytest

from pyramid_jax.checkpoint import rename, text_tables
from pyramid_jax.checkpoint.tensors import read_tensors
from pyramid_jax.models.clip import CLIPConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.pipeline.prompts import abstract_encoder, network
from tests.released import tensor_shapes

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "text_encoder_sd3"
CLIP_G = {
    "architectures": ["CLIPTextModelWithProjection"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "pad_token_id": 1,
    "projection_dim": 1280,
    "vocab_size": 49408,
}
CLIP_L = CLIP_G | {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
T5 = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}


def recorded(name: str) -> dict[str, np.ndarray]:
    """Tensors of one encoder of the recorded model."""
    tensors = read_tensors(GOLDEN / "weights.safetensors")
    start = f"{name}."
    own = [key for key in tensors if key.startswith(start)]
    return {key.removeprefix(start): np.asarray(tensors[key]) for key in own}


def small(config: dict) -> dict:
    """A config file for the recorded CLIP-L, or T5."""
    if "d_model" in config:
        sizes = {"d_ff": 96, "d_kv": 12, "d_model": 48, "num_heads": 4, "num_layers": 2}
        return config | sizes | {"vocab_size": 100}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 16, "num_hidden_layers": 3, "vocab_size": 64}
    return config | sizes | {"projection_dim": 24}


def test_released_config_files_give_the_released_encoders():
    assert T5Config(**text_tables.t5_config(T5)) == T5Config()
    assert CLIPConfig(**text_tables.clip_config(CLIP_L)) == CLIPConfig()
    assert CLIPConfig(**text_tables.clip_config(CLIP_G)) == CLIPConfig(
        width=1280,
        heads=20,
        mlp_width=5120,
        blocks=32,
        quick_gelu=False,
        projection=1280,
    )


def test_only_the_end_two_stands_for_the_largest_id():
    other = text_tables.clip_config(CLIP_L | {"eos_token_id": 49407})
    assert (text_tables.clip_config(CLIP_L)["end"], other["end"]) == (None, 49407)


def test_released_encoders_have_all_their_tensors_in_the_right_shapes():
    shapes = tensor_shapes(text_tables.t5_table(), abstract_encoder(T5Config()))
    assert len(shapes) == 24 * 9 + 3
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert shapes[first] == (32, 64)
    mlp = "encoder.block.23.layer.1.DenseReluDense"
    assert shapes[f"{mlp}.wi_1.weight"] == (10240, 4096)
    assert shapes[f"{mlp}.wo.weight"] == (4096, 10240)
    cfg = CLIPConfig(**text_tables.clip_config(CLIP_G))
    shapes = tensor_shapes(text_tables.clip_table(True), abstract_encoder(cfg))
    assert len(shapes) == 32 * 16 + 5
    assert shapes["text_model.encoder.layers.31.mlp.fc2.weight"] == (1280, 5120)


@pytest.mark.parametrize(
    ("name", "config", "table"),
    [
        ("text_encoder", CLIP_L | {"architectures": CLIP_G["architectures"]}, "clip"),
        ("text_encoder_3", T5, "t5"),
    ],
)
def test_converting_and_exporting_gives_back_every_bit(name, config, table):
    tensors = recorded(name)
    encoder = network(small(config), tensors)
    rules = text_tables.t5_table() if table == "t5" else text_tables.clip_table(True)
    back = dict(rename.export_tensors(encoder.params, rules))
    assert back.keys() == text_tables.unique_tensors(tensors).keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)


def test_the_table_of_words_may_be_there_once_or_twice_under_either_name():
    tensors = recorded("text_encoder_3")
    again = tensors[text_tables.WORDS_AGAIN]
    for left in (text_tables.WORDS, text_tables.WORDS_AGAIN):
        unique = text_tables.unique_tensors(
            {k: x for k, x in tensors.items() if k != left}
        )
        assert unique.keys() == text_tables.unique_tensors(tensors).keys()
        np.testing.assert_array_equal(unique[text_tables.WORDS], again)
    tensors[text_tables.WORDS_AGAIN] = again + 1
    with pytest.raises(ValueError, match="differ, but are one table"):
        network(small(T5), tensors)


def test_counted_positions_of_older_files_are_left_out():
    counted = {text_tables.COUNTED: np.arange(77)[None]}
    assert text_tables.unique_tensors(counted) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CLIP_L | {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (T5 | {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        ({"model_type": "bert"}, "neither a T5 nor a CLIP"),
    ],
)
def test_other_encoders_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        network(config, {})


def test_weights_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"shared\.weight has shape"):
        network(small(T5) | {"vocab_size": 99}, recorded("text_encoder_3"))
