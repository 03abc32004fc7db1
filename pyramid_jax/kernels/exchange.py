# SPDX-License-Identifier: Apache-2.0
"""Attention under a mesh: devices share the tokens between layers, the heads inside.

Rows are divided over data and fsdp, heads over tensor. The context axis divides tokens
outside of attention, and heads inside it, so that every device sees whole rows of a few
heads. The exchange moves 4 arrays of b·l·d / context values per device
and layer; gathering keys and values would move 2 of b·l·d, and leave the last tokens of
a causal row with most of the work (docs/kernels.md has the numbers).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from einops import rearrange
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pyramid_jax.kernels.visits import fill
from pyramid_jax.sharding import constrain, place, shares

# perf: in rows of so many tokens a group of heads is exchanged while another one
# attends, and half of the exchanges costs nothing (launch/compile/sampling.py).
LONG, GROUPS = 4096, 2

AttentionFn = Callable[..., Any]  # of q, k, v and what is known of rows


def groups(tokens: int, heads: int) -> int:
    """How many groups of heads such rows are exchanged in; 1 where nothing is."""
    even = heads % (GROUPS * shares("attended")) == 0
    return GROUPS if shares("tokens") > 1 and even and tokens >= LONG else 1


def divides_evenly(tokens: int, heads: int) -> bool:
    """Whether several devices share such rows so that each gets equal parts of both."""
    parts = shares("tokens")
    return parts > 1 and tokens % parts == 0 and heads % shares("attended") == 0


def in_groups(
    x: Float[Array, "*rest heads dim"], count: int
) -> list[Float[Array, "*rest _ dim"]]:
    """The heads in so many groups, to each of which every device adds as many."""
    if count == 1:
        return [x]
    how, parts = "... (s g k) d -> g ... (s k) d", shares("attended")
    return list(rearrange(x, how, s=parts, g=count))


def of_groups(
    parts: Sequence[Float[Array, "*rest _ dim"]],
) -> Float[Array, "*rest heads dim"]:
    """All heads again."""
    if len(parts) == 1:
        return parts[0]
    count = shares("attended")
    return rearrange(list(parts), "g ... (s k) d -> ... (s g k) d", s=count)


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
    k: Float[Array, "b m heads dim"],
    v: Float[Array, "b m heads dim"],
    of_rows: Any,
) -> Any:
    """`form(q, k, v, of_rows)` on each device's rows and heads.

    XLA can't divide a kernel by itself. Where nothing is divided, `form` is called.

    Args:
        of_rows: a tree of arrays that are divided like the rows, and not by heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if shares("batch") * shares("attended") == 1:
        return form(q, k, v, of_rows)
    places = place(q.shape, ("batch", None, "attended", None), mesh).spec
    return jax.shard_map(
        form,
        in_specs=(places, places, places, P(places[0])),
        out_specs=places,
        check_vma=False,
    )(q, k, v, of_rows)


def over_rows(make: Callable[..., Any], *of_rows: Any) -> Any:
    """`make(*of_rows)` on each device's rows, for trees with rows along first axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if shares("batch") == 1:
        return make(*of_rows)
    first = jax.tree.leaves(of_rows)[0]
    row = P(place(first.shape, ("batch", None), mesh).spec[0])
    return jax.shard_map(make, in_specs=row, out_specs=row, check_vma=False)(*of_rows)
