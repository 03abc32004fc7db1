# SPDX-License-Identifier: Apache-2.0
"""Which tensor of the original's VAE is which parameter here. Data only."""

from collections.abc import Iterator
from typing import Any

from pyramid_jax.checkpoint.dit_tables import Rule, Table, linear_rules, norm_rules


def vae_table(cfg: Any) -> Table:
    """The table of a causal video VAE.

    Args:
        cfg: its `models.vae.VAEConfig`; nothing in this folder imports networks.
    """
    rules = [
        *_convolution("encoder.conv_in.conv", "encoder/entry"),
        *_middle("encoder"),
        *_activated("encoder.conv_norm_out", "encoder.conv_out.conv", "encoder/head"),
        *linear_rules("quant_conv.conv", "encoder/mix", "pointwise"),
        *linear_rules("post_quant_conv.conv", "decoder/mix", "pointwise"),
        *_convolution("decoder.conv_in.conv", "decoder/entry"),
        *_middle("decoder"),
        *_activated("decoder.conv_norm_out", "decoder.conv_out.conv", "decoder/head"),
        *_levels("encoder", cfg.encoder_widths, cfg.encoder_layers),
        *_levels("decoder", cfg.decoder_widths[::-1], cfg.decoder_layers),
    ]
    for i, (space, time) in enumerate(zip(cfg.spatial, cfg.temporal, strict=True)):
        rules += _resampling(i, "space") if space else ()
        rules += _resampling(i, "time") if time else ()
    return Table(tuple(rules))


def _levels(
    part: str, widths: tuple[int, ...], layers: tuple[int, ...]
) -> Iterator[Rule]:
    """The residual blocks; one that changes the width has a shortcut."""
    before = widths[0]
    for i, (width, count) in enumerate(zip(widths, layers, strict=True)):
        blocks = {"encoder": "down_blocks", "decoder": "up_blocks"}[part]
        for j in range(count):
            theirs = f"{part}.{blocks}.{i}.resnets.{j}"
            ours = f"{part}/levels_{i}/residuals_{j}"
            yield from _residual(theirs, ours)
            if before != width:
                shortcut = f"{theirs}.conv_shortcut.conv"
                yield from linear_rules(shortcut, f"{ours}/shortcut", "pointwise")
            before = width


def _resampling(level: int, axis: str) -> Iterator[Rule]:
    """One step between resolutions of both networks."""
    prefix = {"space": "", "time": "temporal_"}[axis]
    down = f"encoder.down_blocks.{level}.{prefix}downsamplers.0.conv.conv"
    up = f"decoder.up_blocks.{level}.{prefix}upsamplers.0.conv.conv"
    ours = f"levels_{level}/resampled_{axis}"
    yield from _convolution(down, f"encoder/{ours}")
    ours = f"decoder/{ours}/convolution"
    yield from linear_rules(up, ours, f"conv3d_{axis}", f"vector_{axis}")


def _middle(part: str) -> Iterator[Rule]:
    theirs, ours = f"{part}.mid_block", f"{part}/middle"
    yield from _residual(f"{theirs}.resnets.0", f"{ours}/first")
    yield from _residual(f"{theirs}.resnets.1", f"{ours}/second")
    attention = f"{theirs}.attentions.0"
    yield from norm_rules(f"{attention}.group_norm", f"{ours}/attention/norm")
    for name in ("query", "key", "value"):
        to = f"{attention}.to_{name[0]}"
        yield from linear_rules(to, f"{ours}/attention/{name}", "linear")
    yield from linear_rules(f"{attention}.to_out.0", f"{ours}/attention/out", "linear")


def _residual(theirs: str, ours: str) -> Iterator[Rule]:
    for number, name in ((1, "first"), (2, "second")):
        norm, convolution = f"{theirs}.norm{number}", f"{theirs}.conv{number}.conv"
        yield from _activated(norm, convolution, f"{ours}/{name}")


def _activated(norm: str, convolution: str, ours: str) -> Iterator[Rule]:
    yield from norm_rules(norm, f"{ours}/norm")
    yield from _convolution(convolution, f"{ours}/convolution")


def _convolution(theirs: str, ours: str) -> Iterator[Rule]:
    yield from linear_rules(theirs, ours, "conv3d")
