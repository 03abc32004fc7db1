# SPDX-License-Identifier: Apache-2.0
"""Attention under a mask: its plan, the plain form, the choice of backend."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from pyramid_jax import programs
from pyramid_jax.kernels.attention_blocks import blocks
from pyramid_jax.kernels.attention_mosaic import (
    attention_mosaic,
    check_hopper,
    hopper_lists,
)
from pyramid_jax.kernels.attention_tpu import attention_tpu, tpu_lists
from pyramid_jax.kernels.attention_triton import attention_triton
from pyramid_jax.kernels.exchange import over_mesh, over_rows
from pyramid_jax.kernels.flash import FLOOR
from pyramid_jax.kernels.tiles import TILED, Sizes, Tiles, tiles_for
from pyramid_jax.kernels.trial import failure
from pyramid_jax.kernels.visits import Mask, visit_lists
from pyramid_jax.mask import TokenMask, visible

logger = logging.getLogger(__name__)

BACKENDS = ("xla", "blocks", "pallas_tpu", "pallas_triton", "pallas_mosaic_gpu")
# Whose kernel a device takes: its kind for JAX, the beginning of its name, and the type
# of queries, keys and values, "" for any. The first line that fits holds.
# perf: on Hopper, Triton's is measured, and the other one is not (docs/kernels.md).
CHOICE = (
    ("gpu", "NVIDIA H", "bfloat16", "pallas_triton"),
    ("gpu", "", "", "pallas_triton"),
    ("tpu", "", "", "pallas_tpu"),
)
# perf: in shorter rows the loop over blocks costs more than it saves.
SHORT = 512
WIDEST = 128  # of the heads that the kernels' tiles are made for


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query", "key", "lists"],
    meta_fields=["backend", "tiles"],
)
@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom, as a backend needs it; made once, it serves all layers.

    `lists` are what a Pallas kernel visits; the other backends have none.
    """

    query: Mask
    key: Mask
    lists: Any
    backend: str
    tiles: Tiles | None

    @property
    def asking(self) -> int:
        """How many tokens of a row have queries."""
        return self.query[0].shape[1]


def attention_plan(
    query: Mask,
    key: Mask,
    dim: int,
    dtype: str,
    backend: str | None = None,
    tiles: Sizes | None = None,
) -> AttentionPlan:
    """Prepares attention of such queries to such keys, in heads of width `dim`.

    Args:
        dtype: of queries, keys and values.
        backend: one of BACKENDS; None takes the kernel of the device if it
            passes a trial there, else "xla" or "blocks". Pallas kernels run on their
            device only; compiled for a CPU they are interpreted, exactly and slowly.
            All follow the mesh that is set.
        tiles: block sizes of a Pallas backend, see `Tiles.of`; None: the table's.

    Raises:
        ValueError: the backend is unknown or not available here, the heads are too wide
            for it, or it does not take the tiles.
    """
    length = key[0].shape[1]
    if tiles is not None and backend not in TILED:
        raise ValueError(
            f"attention tiles {tiles} are given, but the backend {backend!r} takes "
            f"none; name one of {TILED}, or leave the tiles out"
        )
    if backend is None:
        backend = default(length, dim, dtype)
        logger.info("attention over rows of %d tokens: %s", length, backend)
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {backend!r}; use one of {BACKENDS}, or None"
        )
    if backend not in TILED:
        return AttentionPlan(query, key, None, backend, None)
    if dim > WIDEST:
        raise ValueError(
            f"heads of width {dim} are too wide for {backend}, which takes up to "
            f"{WIDEST}; use the backend 'xla'"
        )
    sizes = Tiles.of(tiles) if tiles else tiles_for(backend, dim, dtype, length)
    if backend == "pallas_mosaic_gpu":
        check_hopper(dtype, sizes)
    make = _LISTS[backend]
    lists = over_rows(functools.partial(make, tiles=sizes), query, key)
    return AttentionPlan(query, key, lists, backend, sizes)


def attend(
    q: Float[jax.Array, "b lq heads dim"],
    k: Float[jax.Array, "b lk heads dim"],
    v: Float[jax.Array, "b lk heads dim"],
    plan: AttentionPlan,
    cut: int | None = None,
) -> Any:
    """softmax(q kᵀ / sqrt(dim)) v over the keys that each query sees.

    A query that sees no key (padding) gets zeros, also in the gradient.

    Args:
        cut: if given, the results of so many first queries are an array of their own,
            which may be empty.

    Returns:
        An array like q, or two of them, the second with the results after the cut.
    """
    rows = (plan.query, plan.key), plan.lists
    form = functools.partial(_FORMS[plan.backend], plan.tiles, cut or 0)
    out = over_mesh(form, q, k, v, rows)
    return (out[:, :0], out) if cut == 0 else out


def attention(
    q: Float[jax.Array, "b l heads dim"],
    k: Float[jax.Array, "b l heads dim"],
    v: Float[jax.Array, "b l heads dim"],
    mask: TokenMask,
    backend: str | None = None,
    tiles: Sizes | None = None,
) -> Float[jax.Array, "b l heads dim"]:
    """`attend` under a mask, prepared for this one call as in `attention_plan`."""
    dim, dtype = q.shape[3], q.dtype.name
    return attend(q, k, v, attention_plan(mask, mask, dim, dtype, backend, tiles))


def default(length: int, dim: int, dtype: str) -> str:
    """The backend that None stands for, in rows of `length` tokens on this device.

    Args:
        dim: width of a head.
        dtype: of queries, keys and values.
    """
    if length < SHORT:
        return "xla"
    here, name = jax.default_backend(), jax.devices()[0].device_kind
    fitting = (
        kernel
        for kind, device, of, kernel in CHOICE
        if kind == here and name.startswith(device) and of in ("", dtype)
    )
    kernel = next(fitting, None)
    if kernel is None or dim > WIDEST or not _works(kernel, dim, dtype):
        return "blocks"
    return kernel


@functools.cache
def _works(backend: str, dim: int, dtype: str) -> bool:
    """Whether a kernel computes the plain form on this device; logs why not."""
    kernel, plain = (functools.partial(attention, backend=b) for b in (backend, "xla"))
    why = failure(kernel, plain, dim, dtype)
    if why is not None:
        programs.keep(None)  # the next process may pass, and none should remember
        logger.warning(
            "attention goes without %s, which failed its trial on this device (%s)",
            backend,
            why,
        )
    return why is None


# ------------------------------- backends, as functions of each device's rows and heads


def _plain(tiles: None, cut: int, q: Any, k: Any, v: Any, rows: Any) -> Any:
    return _cut(_xla(q, k, v, *rows[0]), cut)


def _in_blocks(tiles: None, cut: int, q: Any, k: Any, v: Any, rows: Any) -> Any:
    return _cut(blocks(q, k, v, *rows[0]), cut)


def _on_tpu(tiles: Tiles, cut: int, q: Any, k: Any, v: Any, rows: Any) -> Any:
    kernel = functools.partial(attention_tpu, tiles=tiles)
    return _cut(_interpreted_on_cpu(kernel)(q, k, v, *rows), cut)


def _on_gpu(tiles: Tiles, cut: int, q: Any, k: Any, v: Any, rows: Any) -> Any:
    kernel = functools.partial(attention_triton, tiles=tiles, cut=cut)
    out = _interpreted_on_cpu(kernel)(q, k, v, *rows)
    return out if cut else out[0]


def _on_hopper(tiles: Tiles, cut: int, q: Any, k: Any, v: Any, rows: Any) -> Any:
    """Not interpreted here: a choice by platform can't hold its interpreter."""
    out = attention_mosaic(q, k, v, rows[1], tiles, cut=cut)
    return out if cut else out[0]


_FORMS = {
    "xla": _plain,
    "blocks": _in_blocks,
    "pallas_tpu": _on_tpu,
    "pallas_triton": _on_gpu,
    "pallas_mosaic_gpu": _on_hopper,
}
_LISTS = {
    "pallas_tpu": tpu_lists,
    "pallas_triton": visit_lists,
    "pallas_mosaic_gpu": hopper_lists,
}


def _cut(x: jax.Array, cut: int) -> Any:
    return tuple(jnp.split(x, [cut], axis=1)) if cut else x


def _interpreted_on_cpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, interpreted where it is compiled for a CPU, which is decided then."""
    slow = functools.partial(kernel, interpret=True)
    return functools.partial(jax.lax.platform_dependent, cpu=slow, default=kernel)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, query: Mask, key: Mask) -> jax.Array:
    """The definition: a dense mask, softmax in float32, on any device."""
    heads, dim = q.shape[2:]
    # perf: batched matrix products over (b heads); on CPU the einsum over a separate
    # heads axis is three times slower (benchmarks/cpu_vs_reference.py).
    q, k, v = (rearrange(x, "b l heads dim -> (b heads) l dim") for x in (q, k, v))
    seen = visible([x[:, :, None] for x in query], [x[:, None] for x in key])
    seen = jnp.repeat(seen, heads, axis=0)
    logits = jnp.matmul(q * dim**-0.5, k.mT, preferred_element_type=jnp.float32)
    logits = jnp.where(seen, logits, FLOOR)
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - peak), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.maximum(total, 1e-30)
    return rearrange(
        out.astype(v.dtype), "(b heads) l dim -> b l heads dim", heads=heads
    )
