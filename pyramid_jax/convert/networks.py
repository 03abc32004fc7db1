# SPDX-License-Identifier: Apache-2.0
"""The networks of the original without weights: shapes here, names of tensors there."""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pyramid_jax.checkpoint import dit_tables, vae_tables
from pyramid_jax.checkpoint.dit_tables import Table
from pyramid_jax.models import vae as vaes
from pyramid_jax.models.dit import DiT, DiTConfig
from pyramid_jax.models.layers import position_table
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline import prompts
from pyramid_jax.pipeline.prompts import EncoderConfig
from pyramid_jax.shapes import Text, Tokens


class Blueprint(NamedTuple):
    """A network's config, and what its weights are called and shaped.

    `shapes` are its parameters here, in boxes that name their axes; `table` says which
    tensors of the original they are.
    """

    cfg: DiTConfig | VAEConfig | EncoderConfig
    table: Table
    shapes: Any


@lru_cache
def dit(cfg: DiTConfig) -> Blueprint:
    """The blueprint of a transformer."""
    return Blueprint(cfg, dit_table(cfg), dit_shapes(cfg))


@lru_cache
def vae(cfg: VAEConfig) -> Blueprint:
    """The blueprint of a VAE."""
    shapes = jax.eval_shape(partial(vaes.initialise_vae, cfg), jax.random.key(0))
    return Blueprint(cfg, vae_tables.vae(cfg), shapes)


def text_encoder(given: Mapping[str, Any]) -> Blueprint:
    """The blueprint of the text encoder that a config.json describes.

    Raises:
        ValueError: neither a T5 nor a CLIP encoder, or one that no released model has.
    """
    cfg, table = prompts.described(given)
    return Blueprint(cfg, table, _encoder_shapes(cfg))


_encoder_shapes = lru_cache(prompts.abstract)


def dit_table(cfg: DiTConfig) -> Table:
    """The names that the original gives to the weights of a transformer like `cfg`."""
    if cfg.position_table is None:
        return dit_tables.flux()
    axis = position_table(cfg.position_table, cfg.position_table_base, cfg.width)
    return dit_tables.mmdit(cfg.double_blocks, axis)


def dit_shapes(cfg: DiTConfig) -> Any:
    """The shapes of a transformer's parameters."""
    order, time = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1))
    tokens = Tokens(
        jnp.zeros((1, 1, cfg.patch_values)), jnp.zeros((1, 1, 3)), order, order
    )
    text = Text(
        jnp.zeros((1, 1, cfg.text_width)), order, jnp.zeros((1, 1, cfg.pooled_width))
    )
    init = DiT(cfg).init
    return jax.eval_shape(init, jax.random.key(0), tokens, time, text)["params"]
