# SPDX-License-Identifier: Apache-2.0
"""Kernels under a mesh: XLA can not divide them, so each device is given its part.

Rows are divided over data and fsdp, heads over tensor, queries over context. Keys and
values are gathered over context, and their gradients are summed and scattered back: at
24k tokens of 24 heads of width 64 this moves 150 MB per layer in bfloat16. Tokens are
divided in order, so with causal masks the last devices of context have the most to do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pyramid_jax.mask import TokenMask
from pyramid_jax.sharding import place

Form = Callable[..., Any]  # of q, k, v and the masks of queries and keys


def over_mesh(
    form: Form,
    q: Float[Array, "b l heads dim"],
    k: Float[Array, "b l heads dim"],
    v: Float[Array, "b l heads dim"],
    mask: TokenMask,
) -> Float[Array, "b l heads dim"]:
    """`form(q, k, v, query, key)` on each device's part; plain where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return form(q, k, v, mask, mask)
    places = place(q.shape, ("batch", "tokens", "heads", None), mesh).spec
    context = places[1]

    def local(q: Array, k: Array, v: Array, mask: TokenMask) -> Array:
        whole = (k, v, mask)
        if context is not None:
            whole = jax.lax.all_gather(whole, context, axis=1, tiled=True)
        return form(q, *whole[:2], mask, whole[2])

    row = P(*places[:2])
    return jax.shard_map(
        local,
        in_specs=(places, places, places, TokenMask(row, row)),
        out_specs=places,
        check_vma=False,
    )(q, k, v, mask)
