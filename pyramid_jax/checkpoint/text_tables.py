# SPDX-License-Identifier: Apache-2.0
"""The original's text encoders: what config.json says, and the names of tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyramid_jax.checkpoint.dit_tables import (
    Rule,
    Table,
    linear_rules,
    norm_rules,
    weight_rule,
)

WORDS, WORDS_AGAIN = "shared.weight", "encoder.embed_tokens.weight"
COUNTED = "text_model.embeddings.position_ids"  # 0, 1, 2, ... in some older files
LARGEST = 2  # the end token that stands for "the largest id" in CLIP's config files


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `models.clip.CLIPConfig` from the config.json of a CLIP encoder.

    Raises:
        ValueError: an activation that no released encoder uses.
    """
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(
            f"hidden_act is {activation!r} in a CLIP encoder's config.json; only "
            "'quick_gelu' and 'gelu', which the released encoders use, are supported"
        )
    projects = "CLIPTextModelWithProjection" in config.get("architectures", ())
    end = config.get("eos_token_id", LARGEST)
    return {
        "vocabulary": config["vocab_size"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "blocks": config["num_hidden_layers"],
        "positions": config["max_position_embeddings"],
        "quick_gelu": activation == "quick_gelu",
        "end": None if end == LARGEST else end,
        "projection": config["projection_dim"] if projects else None,
        "eps": config.get("layer_norm_eps", 1e-5),
    }


def t5_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `models.t5.T5Config` from the config.json of a T5 encoder.

    Raises:
        ValueError: an MLP that no released encoder uses.
    """
    mlp = config.get("feed_forward_proj", "relu")
    if mlp != "gated-gelu":
        raise ValueError(
            f"feed_forward_proj is {mlp!r} in a T5 encoder's config.json; only "
            "'gated-gelu', that of T5 v1.1, is supported"
        )
    return {
        "vocabulary": config["vocab_size"],
        "width": config["d_model"],
        "heads": config["num_heads"],
        "head_dim": config["d_kv"],
        "mlp_width": config["d_ff"],
        "blocks": config["num_layers"],
        "buckets": config["relative_attention_num_buckets"],
        "farthest": config.get("relative_attention_max_distance", 128),
        "eps": config.get("layer_norm_epsilon", 1e-6),
    }


def clip_table(projects: bool) -> Table:
    """The table of a CLIP text encoder of any size.

    Args:
        projects: its vectors pass through a last linear map.
    """
    layer, embeddings = "text_model.encoder.layers.{i}", "text_model.embeddings"
    rules = [
        weight_rule(f"{embeddings}.token_embedding", "words", "table"),
        weight_rule(f"{embeddings}.position_embedding", "positions", "table"),
        *norm_rules("text_model.final_layer_norm", "norm"),
        *norm_rules(f"{layer}.layer_norm1", "blocks/attention_norm"),
        *norm_rules(f"{layer}.layer_norm2", "blocks/mlp_norm"),
        _qkv(f"{layer}.self_attn.{{part}}_proj.weight", "kernel", "qkv"),
        _qkv(f"{layer}.self_attn.{{part}}_proj.bias", "bias", "qkv_vector"),
        *linear_rules(f"{layer}.self_attn.out_proj", "blocks/out", "from_heads"),
        *linear_rules(f"{layer}.mlp.fc1", "blocks/mlp_in"),
        *linear_rules(f"{layer}.mlp.fc2", "blocks/mlp_out"),
    ]
    if projects:
        rules.append(weight_rule("text_projection", "project/kernel", "linear"))
    return Table(tuple(rules))


def t5_table() -> Table:
    """The table of a T5 encoder of any size."""
    layer = "encoder.block.{i}.layer"
    distances = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    attention, mlp = f"{layer}.0.SelfAttention", f"{layer}.1.DenseReluDense"
    rules = (
        weight_rule("shared", "words", "table"),
        weight_rule(distances, "distances", "table"),
        weight_rule("encoder.final_layer_norm", "norm/weight"),
        weight_rule(f"{layer}.0.layer_norm", "blocks/attention_norm/weight"),
        weight_rule(f"{layer}.1.layer_norm", "blocks/mlp_norm/weight"),
        _qkv(f"{attention}.{{part}}.weight", "kernel", "qkv"),
        weight_rule(f"{attention}.o", "blocks/out/kernel", "from_heads"),
        weight_rule(f"{mlp}.wi_0", "blocks/gate/kernel", "linear"),
        weight_rule(f"{mlp}.wi_1", "blocks/mlp_in/kernel", "linear"),
        weight_rule(f"{mlp}.wo", "blocks/mlp_out/kernel", "linear"),
    )
    return Table(rules)


def unique_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without those that some files hold a second time, or need not hold.

    Raises:
        ValueError: the table of words is there twice, but differs.
    """
    tables = [tensors[key] for key in (WORDS, WORDS_AGAIN) if key in tensors]
    if len(tables) == 2 and not np.array_equal(*tables):
        raise ValueError(
            f"{WORDS} and {WORDS_AGAIN} differ, but are one table in T5; give the "
            "files of a released encoder"
        )
    return without_copies(tensors)


def without_copies(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`unique_tensors` by names alone: values are not compared."""
    unique = {k: x for k, x in tensors.items() if k not in (WORDS_AGAIN, COUNTED)}
    if WORDS_AGAIN in tensors:
        unique.setdefault(WORDS, tensors[WORDS_AGAIN])
    return unique


def _qkv(theirs: str, ours: str, transform: str) -> Rule:
    """`theirs` names the tensor with {part} for q, k and v."""
    parts = tuple(theirs.replace("{part}", part) for part in "qkv")
    return Rule(parts, (f"blocks/qkv/{ours}",), transform)
