# SPDX-License-Identifier: Apache-2.0
"""Attention under a `TokenMask`: the entry, the plain form, the choice of backend."""

import functools
import logging

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from pyramid_jax import programs
from pyramid_jax.kernels.attention_blocks import blocks
from pyramid_jax.kernels.attention_tpu import attention_tpu
from pyramid_jax.kernels.attention_triton import attention_triton
from pyramid_jax.kernels.exchange import AttentionFn, over_mesh
from pyramid_jax.kernels.flash import FLOOR
from pyramid_jax.kernels.tiles import TILED, Sizes, Tiles
from pyramid_jax.kernels.trial import failure
from pyramid_jax.mask import TokenMask, dense_mask

logger = logging.getLogger(__name__)

BACKENDS = ("xla", "blocks", "pallas_tpu", "pallas_triton")
# perf: in shorter rows the loop over blocks costs more than it saves.
SHORT = 512
WIDEST = 128  # of the heads that the kernels' tiles are made for


def attention(
    q: Float[jax.Array, "b l heads dim"],
    k: Float[jax.Array, "b l heads dim"],
    v: Float[jax.Array, "b l heads dim"],
    mask: TokenMask,
    backend: str | None = None,
    tiles: Sizes | None = None,
) -> Float[jax.Array, "b l heads dim"]:
    """softmax(q kᵀ / sqrt(dim)) v over the keys that `mask` lets each query see.

    A query that sees no key (padding) gets zeros, also in the gradient.

    Args:
        backend: one of BACKENDS; None takes the kernel of the device if it
            passes a trial there, else "xla" or "blocks". Pallas kernels run on their
            device only; compiled for a CPU they are interpreted, exactly and slowly.
            All follow the mesh that is set.
        tiles: block sizes of a Pallas backend, see `Tiles.of`; None: the table's.

    Raises:
        ValueError: the backend is unknown or not available here, the heads are too wide
            for it, or it does not take the tiles.
    """
    length, dim = q.shape[1], q.shape[3]
    if tiles is not None and backend not in TILED:
        raise ValueError(
            f"attention tiles {tiles} are given, but the backend {backend!r} takes "
            f"none; name one of {TILED}, or leave the tiles out"
        )
    if backend is None:
        backend = default(length, dim, q.dtype.name)
        logger.info("attention over rows of %d tokens: %s", length, backend)
    return over_mesh(_form(backend, dim, tiles), q, k, v, mask)


def _form(backend: str, dim: int, tiles: Sizes | None) -> AttentionFn:
    """A backend as a function of each device's part of the arrays."""
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {backend!r}; use one of {BACKENDS}, or None"
        )
    if backend in ("xla", "blocks"):
        plain = _xla if backend == "xla" else blocks
        return lambda q, k, v, query, key: plain(q, k, v, query)
    if dim > WIDEST:
        raise ValueError(
            f"heads of width {dim} are too wide for {backend}, which takes up to "
            f"{WIDEST}; use the backend 'xla'"
        )
    kernel = attention_tpu if backend == "pallas_tpu" else attention_triton
    sizes = None if tiles is None else Tiles.of(tiles)
    return _interpreted_on_cpu(functools.partial(kernel, tiles=sizes))


def default(length: int, dim: int, dtype: str) -> str:
    """The backend that None stands for, in rows of `length` tokens on this device.

    Args:
        dim: width of a head.
        dtype: of queries, keys and values.
    """
    if length < SHORT:
        return "xla"
    kernel = {"gpu": "pallas_triton", "tpu": "pallas_tpu"}.get(jax.default_backend())
    if kernel is None or dim > WIDEST or not _works(kernel, dim, dtype):
        return "blocks"
    return kernel


@functools.cache
def _works(backend: str, dim: int, dtype: str) -> bool:
    """Whether a kernel computes the plain form on this device; logs why not."""
    kernel, plain = (_form(name, dim, None) for name in (backend, "xla"))
    why = failure(kernel, plain, dim, dtype)
    if why is not None:
        programs.keep(None)  # the next process may pass, and none should remember
        logger.warning(
            "attention goes without %s, which failed its trial on this device (%s)",
            backend,
            why,
        )
    return why is None


def _interpreted_on_cpu(kernel: AttentionFn) -> AttentionFn:
    """The kernel, interpreted where it is compiled for a CPU, which is decided then."""
    slow = functools.partial(kernel, interpret=True)
    return functools.partial(jax.lax.platform_dependent, cpu=slow, default=kernel)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: TokenMask) -> jax.Array:
    """The definition: a dense mask, softmax in float32, on any device."""
    heads, dim = q.shape[2:]
    # perf: batched matrix products over (b heads); on CPU the einsum over a separate
    # heads axis is three times slower (benchmarks/cpu_vs_reference.py).
    q, k, v = (rearrange(x, "b l heads dim -> (b heads) l dim") for x in (q, k, v))
    visible = jnp.repeat(dense_mask(mask), heads, axis=0)
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
