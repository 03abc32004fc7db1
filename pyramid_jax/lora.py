# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: a second, narrow path beside the frozen kernels of blocks.

    y = x W + alpha / rank · (x A) B

A and B lie beside the kernel W in the tree of weights; a layer that finds them there
adds their path. Of fused maps, such as queries, keys and values, each has its own pair.

Source: LoRA (arXiv:2106.09685).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from pyramid_jax.config import check_entries
from pyramid_jax.sharding import Named

DOWN, UP = "lora_down", "lora_up"  # A and B, beside "kernel"
# Layers of blocks: how many axes of their kernel are inputs, and how many behind these
# number the maps that it fuses.
TARGETS: Mapping[str, tuple[int, int]] = {
    "qkv": (1, 1),
    "out": (2, 0),
    "mlp_in": (1, 0),
    "mlp_out": (1, 0),
    "modulation": (1, 0),
}


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers of the blocks get adapters, and how large these are.

    Args:
        rank: inner width of an adapter.
        alpha: the adapters' path is multiplied by alpha / rank.
        targets: some of `TARGETS`.
        base: number type of the frozen weights.

    Raises:
        ValueError: a value is out of range, or there is no such layer.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv", "out")
    base: str = "bfloat16"

    def __post_init__(self):
        check_entries(self, lambda n: n >= 1, "1 or more", "rank")
        check_entries(self, lambda x: x > 0, "over 0", "alpha")
        types = ("bfloat16", "float32")
        check_entries(self, types.__contains__, f"one of {types}", "base")
        layers = f"some of {(*TARGETS,)}"
        check_entries(self, lambda x: x and {*x} <= {*TARGETS}, layers, "targets")

    @property
    def scale(self) -> float:
        """What the adapters' path is multiplied by."""
        return self.alpha / self.rank


def fresh_adapters(cfg: LoRAConfig, blocks: Any, key: jax.Array) -> Any:
    """Adapters that change nothing yet, in boxes, as a tree like that of the blocks.

    Args:
        blocks: weights, or their shapes, in boxes that name their axes.
    """
    flat = {}
    for path, kernel in sorted(flatten_dict(blocks).items()):
        layer = next((name for name in path if name in cfg.targets), None)
        if path[-1] == "kernel" and layer is not None:
            key, own = jax.random.split(key)
            pair = _pair(own, kernel, layer, cfg.rank)
            flat[*path[:-1], DOWN], flat[*path[:-1], UP] = pair
    return unflatten_dict(flat)


def adapted(weights: Any, adapters: Any, scale: float) -> Any:
    """The weights with adapters beside their kernels, B multiplied by the scale."""
    flat: dict[Any, Any] = flatten_dict(adapters)
    scaled = {path: x * scale if path[-1] == UP else x for path, x in flat.items()}
    return unflatten_dict(flatten_dict(weights) | scaled)


def low_rank(
    x: Float[jax.Array, "..."],
    down: Float[jax.Array, "..."],
    up: Float[jax.Array, "..."],
    inputs: int,
) -> Float[jax.Array, "..."]:
    """The adapters' path (x A) B of tokens, whose last `inputs` axes are the inputs."""
    axes = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    hidden = jnp.tensordot(x, down, axes)
    if down.ndim > inputs + 1:
        return jnp.einsum("...mr,mrhd->...mhd", hidden, up)
    return jnp.tensordot(hidden, up, 1)


def _pair(key: jax.Array, kernel: Named, layer: str, rank: int) -> tuple[Named, Named]:
    """A, drawn like the inputs of a linear map, and B, which is zero."""
    inputs, fused = TARGETS[layer]
    axes = list(zip(kernel.value.shape, kernel.names, strict=True))
    first = int(kernel.names[0] == "layers")
    stack, axes = axes[:first], axes[first:]
    into, axes = axes[:inputs], axes[inputs:]
    maps, out = axes[:fused], axes[fused:]
    bound = math.prod(size for size, _ in into) ** -0.5
    shape, names = zip(*stack, *into, *maps, (rank, None), strict=True)
    down = Named(jax.random.uniform(key, shape, jnp.float32, -bound, bound), names)
    shape, names = zip(*stack, *maps, (rank, None), *out, strict=True)
    return down, Named(jnp.zeros(shape, jnp.float32), names)
