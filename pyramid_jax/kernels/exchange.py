# SPDX-License-Identifier: Apache-2.0
"""Attention under a mesh: devices share the tokens between layers, the heads inside.

Rows are divided over data and fsdp, heads over tensor. The context axis divides tokens
outside of attention, and heads inside it, so that every device sees whole rows of a few
heads. The exchange moves 4 arrays of b·l·d / context values per device
and layer; gathering keys and values would move 2 of b·l·d, and leave the last tokens of
a causal row with most of the work (docs/kernels.md has the numbers).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pyramid_jax.kernels.visits import fill
from pyramid_jax.mask import TokenMask
from pyramid_jax.sharding import constrain, place, shares

AttentionFn = Callable[..., Any]  # of q, k, v and the masks of queries and keys


def by_heads(qkv: Float[Array, "b n 3 heads dim"]) -> Float[Array, "b n 3 _ dim"]:
    """Exchanges some tokens of all heads for all tokens of some heads.

    Where devices can't share the heads evenly, heads of zeros are added.
    """
    qkv = fill(qkv, {3: shares("attended")})
    # perf: with both layouts named, XLA exchanges; with one, it gathers the tokens.
    qkv = constrain(qkv, ("batch", "tokens", None, "heads", None))
    return constrain(qkv, ("batch", None, None, "attended", None))


def by_tokens(
    x: Float[Array, "b n _ dim"], heads: int
) -> Float[Array, "b n {heads} dim"]:
    """Goes back to some tokens of all `heads`."""
    x = constrain(x, ("batch", None, "attended", None))
    return constrain(x, ("batch", "tokens", "heads", None))[:, :, :heads]


def over_mesh(
    form: AttentionFn,
    q: Float[Array, "b l heads dim"],
    k: Float[Array, "b l heads dim"],
    v: Float[Array, "b l heads dim"],
    mask: TokenMask,
) -> Float[Array, "b l heads dim"]:
    """`form(q, k, v, query, key)` on each device's rows and heads.

    XLA can't divide a kernel by itself. Where nothing is divided, `form` is called.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if shares("batch") * shares("attended") == 1:
        return form(q, k, v, mask, mask)
    places = place(q.shape, ("batch", None, "attended", None), mesh).spec
    row = P(places[0])
    return jax.shard_map(
        lambda q, k, v, mask: form(q, k, v, mask, mask),
        in_specs=(places, places, places, TokenMask(row, row)),
        out_specs=places,
        check_vma=False,
    )(q, k, v, mask)
