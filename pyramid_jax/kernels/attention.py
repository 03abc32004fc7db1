# SPDX-License-Identifier: Apache-2.0
"""Attention under a `TokenMask`: the entry, the XLA form, the choice of backend."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from pyramid_jax.kernels.attention_blocks import FLOOR, blocks
from pyramid_jax.mask import TokenMask, dense

BACKENDS = ("xla", "blocks")
# perf: in shorter rows the loop over blocks costs more than it saves.
SHORT = 512


def attention(
    q: Float[jax.Array, "b l heads dim"],
    k: Float[jax.Array, "b l heads dim"],
    v: Float[jax.Array, "b l heads dim"],
    mask: TokenMask,
    backend: str | None = None,
) -> Float[jax.Array, "b l heads dim"]:
    """softmax(q kᵀ / sqrt(dim)) v over the keys that `mask` lets each query see.

    A query that sees no key (padding) gets zeros, also in the gradient.

    Args:
        backend: one of BACKENDS; None picks the best one for the device.

    Raises:
        ValueError: unknown backend.
    """
    backend = backend or _best(q.shape[1])
    if backend == "xla":
        return _xla(q, k, v, mask)
    if backend == "blocks":
        return blocks(q, k, v, mask)
    raise ValueError(
        f"unknown attention backend {backend!r}; use one of {BACKENDS} or None"
    )


def _best(length: int) -> str:
    """The backend that is fastest on this device for rows of `length` tokens."""
    on_cpu = jax.default_backend() == "cpu"
    return "blocks" if on_cpu and length >= SHORT else "xla"


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: TokenMask) -> jax.Array:
    """The definition: a dense mask, softmax in float32, on any device."""
    heads, dim = q.shape[2:]
    # perf: batched matrix products over (b heads); on CPU the einsum over a separate
    # heads axis is three times slower (benchmarks/cpu_vs_reference.py).
    q, k, v = (rearrange(x, "b l heads dim -> (b heads) l dim") for x in (q, k, v))
    visible = jnp.repeat(dense(mask), heads, axis=0)
    logits = jnp.matmul(q * dim**-0.5, k.mT, preferred_element_type=jnp.float32)
    logits = jnp.where(visible, logits, FLOOR)
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(logits - peak), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.maximum(total, 1e-30)
    return rearrange(
        out.astype(v.dtype), "(b heads) l dim -> b l heads dim", heads=heads
    )
