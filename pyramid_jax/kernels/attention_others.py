# SPDX-License-Identifier: Apache-2.0
"""Attention by other libraries: cuDNN, splash attention, tokamax.

These are baselines and fallbacks. None of them knows segments and frames, so each gets
the mask as a matrix of queries times keys: at 15k tokens 240 MB per row as bytes, twice
that where it is added to the logits. What each does with it:

    cudnn    adds it to the logits; every pair of tokens is multiplied
    splash   skips blocks without a visible pair; heads are filled to width 128
    tokamax  applies it in its own kernels; every pair of tokens is multiplied

A query that sees no key is shown the first one, so that nothing is divided by zero, and
its output and its gradients are replaced by zeros.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pyramid_jax.kernels.visits import Mask, fill
from pyramid_jax.mask import visible

EVEN = 8  # tokens; cuDNN takes no odd number, and reads masks in vectors
SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel"
LANES = 128  # of a TPU: what splash attention wants blocks and heads to be multiples of
BLOCK = 512  # tokens in a block of splash attention
product_of_cudnn = jax.nn.dot_product_attention

Queries = Float[Array, "b lq heads dim"]
Keys = Float[Array, "b lk heads dim"]


def cudnn(q: Queries, k: Keys, v: Keys, query: Mask, key: Mask) -> Queries:
    """`kernels.attention.attention` by cuDNN, through JAX.

    Raises:
        ValueError: there is no NVIDIA GPU or no cuDNN, or it does not take the type or
            the width of the heads.
    """
    refusal = (
        "the backend 'cudnn' needs an NVIDIA GPU with cuDNN, bfloat16 or float16, and "
        f"heads whose width 8 divides, up to 128; given are {q.dtype}, heads of width "
        f"{q.shape[3]} on {jax.default_backend()}"
    )
    two_bytes = q.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() != "gpu" or not two_bytes or q.shape[3] % 8:
        raise ValueError(refusal)
    sees, blind = _matrix(query, key, EVEN)
    filled = (fill(x, {1: EVEN}) for x in (q, k, v))
    try:
        out = product_of_cudnn(*filled, mask=sees[:, None], implementation="cudnn")
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{refusal}; JAX says: {error}") from error
    return _seeing(out, blind, q)


def splash(
    q: Queries, k: Keys, v: Keys, query: Mask, key: Mask, interpret: bool = False
) -> Queries:
    """`kernels.attention.attention` by the splash attention that comes with JAX.

    Rows are computed one after the other. `interpret` runs it anywhere, slowly.

    Raises:
        ValueError: this version of JAX does not have it.
    """
    try:
        library: Any = importlib.import_module(SPLASH)
    except ImportError as error:
        raise ValueError(
            f"the backend 'splash' needs {SPLASH}, which jax {jax.__version__} does "
            "not have; use another backend"
        ) from error
    dim = q.shape[3]
    queries, keys = (min(BLOCK, x.shape[1] + -x.shape[1] % LANES) for x in (q, k))
    sees, blind = _matrix(query, key, queries, keys)
    sizes = library.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )

    def wide(x: Array, size: int) -> Array:
        x = fill(x, {1: size, 3: LANES})
        return rearrange(x, "b l heads dim -> b heads l dim")

    def one(row: tuple[Array, Array, Array, Array]) -> Array:
        *arrays, sees = row
        kernel = library.make_splash_mha_single_device(
            sees[None], block_sizes=sizes, interpret=interpret
        )
        # JAX has turned a flag into an array, which it can't read under jit.
        kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        return kernel(*arrays)

    slope = jnp.asarray(dim**-0.5, q.dtype)
    arrays = wide(q * slope, queries), wide(k, keys), wide(v, keys)
    out = jax.lax.map(one, (*arrays, sees))
    return _seeing(rearrange(out, "b heads l dim -> b l heads dim"), blind, q)


def tokamax(q: Queries, k: Keys, v: Keys, query: Mask, key: Mask) -> Queries:
    """`kernels.attention.attention` by the kernels of tokamax for this device.

    Raises:
        ValueError: tokamax is not installed, or none of its kernels takes these arrays.
    """
    try:
        library = importlib.import_module("tokamax")
    except ImportError as error:
        raise ValueError(
            "the backend 'tokamax' needs the package tokamax; pip install tokamax, or "
            "use another backend"
        ) from error
    kernels = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",), "cpu": ("xla",)}
    device = jax.default_backend()
    sees, blind = _matrix(query, key, EVEN)
    filled = (fill(x, {1: EVEN}) for x in (q, k, v))
    try:
        out = library.dot_product_attention(
            *filled, mask=sees[:, None], implementation=kernels[device]
        )
    except (NotImplementedError, ExceptionGroup) as error:
        raise ValueError(
            f"tokamax has no kernel on {device} for {q.dtype} and heads of width "
            f"{q.shape[3]}: {error}; use another backend"
        ) from error
    return _seeing(out, blind, q)


def _matrix(
    query: Mask, key: Mask, size: int, key_size: int | None = None
) -> tuple[Bool[Array, "b _ _"], Bool[Array, "b lq"]]:
    """Which query sees which key, filled to whole blocks, and which queries see none.

    Those that see none, and the added ones, are shown the first key.
    """
    rows = [jnp.asarray(x)[:, :, None] for x in query]
    columns = [jnp.asarray(x)[:, None] for x in key]
    sees = visible(rows, columns)
    blind = ~sees.any(axis=2)
    sees = fill(sees, {1: size, 2: key_size or size})
    first = jnp.arange(sees.shape[2])[None, None] == 0
    return sees | (~sees.any(axis=2, keepdims=True) & first), blind


def _seeing(out: Array, blind: Bool[Array, "b lq"], q: Queries) -> Queries:
    """The part of `out` that belongs to `q`, with zeros for queries that see no key."""
    out = out[:, : q.shape[1], :, : q.shape[3]]
    return jnp.where(blind[:, :, None, None], 0, out).astype(q.dtype)
