# SPDX-License-Identifier: Apache-2.0
"""Which tensor of the original's checkpoints is which parameter here. Data only.

A table is rules plus constants; `rename` reads it in both directions. In a key of
theirs `{i}` is the layer: such a parameter of ours has all layers stacked along its
first axis.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Transform(NamedTuple):
    """How the axes of their tensors become those of ours, as einops patterns.

    Several tensors of theirs are stacked along a new first axis before the pattern
    applies. Several patterns make several parameters from one tensor of theirs, cut
    along its last axis. `swap` exchanges the halves of the last axis of ours.
    """

    patterns: tuple[str, ...]
    sizes: Mapping[str, int] = {}
    swap: bool = False


class Rule(NamedTuple):
    """Tensors `theirs`, by a named transform, are parameters `ours` (paths with /)."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: str


class Constant(NamedTuple):
    """A tensor of theirs that is computed, not learned."""

    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]


class Table(NamedTuple):
    """All rules of a model, and the constants that its files hold beside weights."""

    rules: tuple[Rule, ...]
    constants: Mapping[str, Constant] = {}


TRANSFORMS: Mapping[str, Transform] = {
    "vector": Transform(("o -> o",)),
    "table": Transform(("rows d -> rows d",)),
    "linear": Transform(("o i -> i o",)),
    "from_heads": Transform(("o (heads dim) -> heads dim o",)),
    "qkv": Transform(("three (heads dim) i -> i three heads dim",)),
    "qkv_vector": Transform(("three (heads dim) -> three heads dim",)),
    "patch_conv": Transform(("o c y x -> (y x c) o",), {"y": 2, "x": 2}),
    "conv2d": Transform(("o i y x -> y x i o",)),
    "conv3d": Transform(("o i t y x -> t y x i o",)),
    "channel_weights": Transform(("1 i 1 1 -> i",)),
    "pointwise": Transform(("o i 1 1 1 -> i o",)),
    # Their channels spread out over the cells, or frames, that each one becomes; ours
    # have the channels of each such cell together.
    "conv3d_space": Transform(
        ("(o y x) i t h w -> t h w i (y x o)",), {"y": 2, "x": 2}
    ),
    "vector_space": Transform(("(o y x) -> (y x o)",), {"y": 2, "x": 2}),
    "conv3d_time": Transform(("(o two) i t h w -> t h w i (two o)",), {"two": 2}),
    "vector_time": Transform(("(o two) -> (two o)",), {"two": 2}),
    # Theirs are scale, shift; ours are shift, scale, as in every other modulation.
    "scale_shift": Transform(("o i -> i o",), swap=True),
    "scale_shift_vector": Transform(("o -> o",), swap=True),
    "from_heads_and_mlp": Transform(("o (heads dim) -> heads dim o", "o i -> i o")),
}
# Parts of the video's attention; the text's depend on the transformer.
VIDEO = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0", "norm": "norm_"}


def mmdit_table(blocks: int, axis_table: Float[np.ndarray, "cells half"]) -> Table:
    """The table of the SD3-style transformer with `blocks` double blocks.

    Args:
        axis_table: the position table of one axis; the original stores that of both.
    """
    text = _text_attention("norm_add_")
    last = f"transformer_blocks.{blocks - 1}"
    rules = [
        *linear_rules("pos_embed.proj", "video_in", "patch_conv"),
        *_shared(text),
        *_stream(last, "last_double/video", "", VIDEO),
        *_attention(last, "last_double/text", text),
        *_scale_shift(
            f"{last}.norm1_context.linear", "last_double/text/modulation/linear"
        ),
    ]
    cells, half = axis_table.shape
    both = Constant((1, cells**2, 2 * half), lambda: _both_axes(axis_table))
    return Table(tuple(rules), {"pos_embed.pos_embed": both})


def flux_table(blocks: int) -> Table:
    """The table of the miniFLUX transformer with so many single blocks."""
    single = "single_transformer_blocks"
    rules = [
        *linear_rules("x_embedder", "video_in"),
        *_shared(_text_attention("norm_added_")),
        *_single(f"{single}.{{i}}", "single"),
        *(_single(f"{single}.{blocks - 1}", "last_single") if blocks else ()),
    ]
    return Table(tuple(rules))


def weight_rule(theirs: str, ours: str, transform: str = "vector") -> Rule:
    """The rule of a layer that has a weight and nothing else."""
    return Rule((f"{theirs}.weight",), (ours,), transform)


def linear_rules(
    theirs: str, ours: str, kernel: str = "linear", bias: str = "vector"
) -> list[Rule]:
    """The rules of a linear map or convolution, by the transforms of its two parts."""
    return [
        Rule((f"{theirs}.weight",), (f"{ours}/kernel",), kernel),
        Rule((f"{theirs}.bias",), (f"{ours}/bias",), bias),
    ]


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """The rules of a norm with weight and bias."""
    return [
        Rule((f"{theirs}.{name}",), (f"{ours}/{name}",), "vector")
        for name in ("weight", "bias")
    ]


def _scale_shift(theirs: str, ours: str) -> list[Rule]:
    return linear_rules(theirs, ours, "scale_shift", "scale_shift_vector")


def _text_attention(norm: str) -> dict[str, str]:
    names = {part: f"add_{part}_proj" for part in "qkv"}
    return {**names, "out": "to_add_out", "norm": norm}


def _shared(text: Mapping[str, str]) -> list[Rule]:
    """What both transformers have; `text` names parts of the text's attention."""
    embed = "time_text_embed"
    return [
        *linear_rules("context_embedder", "text_in"),
        *linear_rules(f"{embed}.timestep_embedder.linear_1", "time/hidden"),
        *linear_rules(f"{embed}.timestep_embedder.linear_2", "time/out"),
        *linear_rules(f"{embed}.text_embedder.linear_1", "pooled/hidden"),
        *linear_rules(f"{embed}.text_embedder.linear_2", "pooled/out"),
        *_scale_shift("norm_out.linear", "head_modulation/linear"),
        *linear_rules("proj_out", "head"),
        *_stream("transformer_blocks.{i}", "double/video", "", VIDEO),
        *_stream("transformer_blocks.{i}", "double/text", "_context", text),
    ]


def _attention(theirs: str, ours: str, names: Mapping[str, str]) -> list[Rule]:
    """Fused queries, keys and values, and the two norms."""
    weights = tuple(f"{theirs}.attn.{names[part]}.weight" for part in "qkv")
    biases = tuple(f"{theirs}.attn.{names[part]}.bias" for part in "qkv")
    norm = f"{theirs}.attn.{names['norm']}"
    return [
        Rule(weights, (f"{ours}/qkv/kernel",), "qkv"),
        Rule(biases, (f"{ours}/qkv/bias",), "qkv_vector"),
        weight_rule(f"{norm}q", f"{ours}/q_norm/weight"),
        weight_rule(f"{norm}k", f"{ours}/k_norm/weight"),
    ]


def _single(theirs: str, ours: str) -> list[Rule]:
    """A single block, whose two last maps are one of theirs."""
    merged = (f"{ours}/out/kernel", f"{ours}/mlp_out/kernel")
    return [
        *_attention(theirs, ours, VIDEO),
        *linear_rules(f"{theirs}.norm.linear", f"{ours}/modulation/linear"),
        *linear_rules(f"{theirs}.proj_mlp", f"{ours}/mlp_in"),
        Rule((f"{theirs}.proj_out.weight",), merged, "from_heads_and_mlp"),
        Rule((f"{theirs}.proj_out.bias",), (f"{ours}/out/bias",), "vector"),
    ]


def _stream(
    theirs: str, ours: str, suffix: str, names: Mapping[str, str]
) -> list[Rule]:
    """One modality of a double block; `suffix` marks its tensors outside attention."""
    feed = f"{theirs}.ff{suffix}.net"
    return [
        *_attention(theirs, ours, names),
        *linear_rules(f"{theirs}.attn.{names['out']}", f"{ours}/out", "from_heads"),
        *linear_rules(f"{theirs}.norm1{suffix}.linear", f"{ours}/modulation/linear"),
        *linear_rules(f"{feed}.0.proj", f"{ours}/mlp_in"),
        *linear_rules(f"{feed}.2", f"{ours}/mlp_out"),
    ]


def _both_axes(table: Float[np.ndarray, "cells half"]) -> Float[np.ndarray, "1 n d"]:
    """The table of every cell, x in the first half of the width, row after row."""
    cells, half = table.shape
    x = np.broadcast_to(table[None], (cells, cells, half))
    y = np.broadcast_to(table[:, None], (cells, cells, half))
    return np.concatenate([x, y], axis=-1).reshape(1, cells * cells, 2 * half)
