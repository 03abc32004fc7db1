# SPDX-License-Identifier: Apache-2.0
"""Text encoders in the layout of a released model: tiny, with real tokenizers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pyramid_jax.checkpoint import rename, text_tables
from pyramid_jax.models.clip import CLIPConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.pipeline.prompts import abstract_encoder
from pyramid_jax.sharding import unbox

WORDS = ("a", "red", "blue", "circle", "moves", "left")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,"
T5 = T5Config(width=16, heads=4, head_dim=4, mlp_width=24, blocks=2)
CLIP_L = CLIPConfig(width=8, heads=2, mlp_width=12, blocks=2)
CLIP_G = CLIPConfig(width=12, heads=3, mlp_width=16, blocks=1, quick_gelu=False)


def write_mmdit(folder: Path) -> Path:
    """The text encoders of an SD3-style model: two CLIP with projection, and T5."""
    _write_clip(folder, "", replace(CLIP_L, projection=6))
    _write_clip(folder, "_2", replace(CLIP_G, projection=10))
    return _write_t5(folder, "_3")


def write_miniflux(folder: Path) -> Path:
    """The text encoders of a miniFLUX model: one CLIP without projection, and T5."""
    _write_clip(folder, "", CLIP_L)
    return _write_t5(folder, "_2")


def tensor_shapes(table: Any, abstract: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original's tensors for parameters like `abstract`."""
    specs = rename.tensor_specs(abstract, table)
    return {key: spec.shape for key, spec in specs.items()}


def _write_t5(folder: Path, end: str) -> Path:
    """Pieces with scores, `</s>` behind every text, as in T5's tokenizer.json."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS if len(word) > 1]
    pieces += [(letter, -5.0) for letter in LETTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    beside = folder / f"tokenizer{end}"
    beside.mkdir(parents=True)
    tokenizer.save(str(beside / "tokenizer.json"))
    cfg = replace(T5, vocabulary=len(pieces))
    config = {
        "architectures": ["T5EncoderModel"],
        "vocab_size": cfg.vocabulary,
        "d_model": cfg.width,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.mlp_width,
        "num_layers": cfg.blocks,
        "num_heads": cfg.heads,
        "relative_attention_num_buckets": cfg.buckets,
        "relative_attention_max_distance": cfg.farthest,
        "feed_forward_proj": "gated-gelu",
    }
    _write(folder / f"text_encoder{end}", config, cfg, text_tables.t5_table())
    return folder


def _write_clip(folder: Path, end: str, cfg: CLIPConfig) -> None:
    """Byte pairs whose words end with `</w>`, between two ends, as in CLIP's files."""
    vocabulary = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "re", "red</w>"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    cfg = replace(cfg, vocabulary=len(vocabulary))
    beside = folder / f"tokenizer{end}"
    beside.mkdir(parents=True)
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    (beside / "vocab.json").write_text(json.dumps(numbers))
    (beside / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer_config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": cfg.positions,
    }
    (beside / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    projects = cfg.projection is not None
    config = {
        "architectures": ["CLIPTextModel" + "WithProjection" * projects],
        "vocab_size": cfg.vocabulary,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.blocks,
        "num_attention_heads": cfg.heads,
        "max_position_embeddings": cfg.positions,
        "hidden_act": "quick_gelu" if cfg.quick_gelu else "gelu",
        "projection_dim": cfg.projection,
        "eos_token_id": 2,
    }
    _write(folder / f"text_encoder{end}", config, cfg, text_tables.clip_table(projects))


def _write(folder: Path, config: dict[str, Any], cfg: Any, table: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(cfg.width)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32),
        unbox(abstract_encoder(cfg)),
    )
    save_file(dict(rename.export_tensors(params, table)), folder / "model.safetensors")
