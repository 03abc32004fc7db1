# SPDX-License-Identifier: Apache-2.0
"""Equal blocks as one scan over their stacked weights."""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Float


def stacked(key: jax.Array, block: nn.Module, count: int, *inputs: Any) -> Any:
    """Fresh weights of `count` equal blocks, along a leading axis called "layers".

    Args:
        inputs: what a block is called with, of any size.
    """

    def one(key: jax.Array) -> Any:
        return block.init(key, *inputs)["params"]

    weights = jax.vmap(one)(jax.random.split(key, count))
    return nn.meta.add_axis(weights, 0, {nn.PARTITION_NAME: "layers"})


def scan(
    block: nn.Module, weights: Any, x: Float[jax.Array, "b m d"], *constants: Any
) -> Float[jax.Array, "b m d"]:
    """`x` after one block after another, each called as block(x, *constants).

    perf: compiling takes the time of one block, whatever the depth.
    """

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        out: Any = block.apply({"params": layer}, x, *constants)
        return out, None

    return jax.lax.scan(step, x, weights)[0]
