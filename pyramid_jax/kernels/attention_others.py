# SPDX-License-Identifier: Apache-2.0
"""Attention by the libraries of others: cuDNN, splash attention, tokamax.

Baselines, and something to fall back to. None of them knows segments and frames, so
each is given the mask as a matrix of queries times keys: at 15k tokens 240 MB per row
as bytes, twice that where it is added to the logits. What each does with it:

    cudnn    adds it to the logits; every pair of tokens is multiplied
    splash   skips blocks without a visible pair; heads are filled to width 128
    tokamax  asks it in its own kernels; every pair of tokens is multiplied

A query that sees no key is shown the first one, so that nothing is divided by zero, and
its output is replaced by zeros; so are its gradients.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from pyramid_jax.kernels.flash import seen
from pyramid_jax.kernels.visits import Mask

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
        ValueError: no NVIDIA GPU, no cuDNN, float32, or a width that it does not take.
    """
    given = f"{q.dtype}, heads of width {q.shape[3]} on {jax.default_backend()}"
    wanted = (
        "the backend 'cudnn' needs an NVIDIA GPU with cuDNN, bfloat16 or float16, and "
        f"heads whose width 8 divides, up to 128; given are {given}"
    )
    two_bytes = q.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() != "gpu" or not two_bytes or q.shape[3] % 8:
        raise ValueError(wanted)
    sees, blind = _matrix(query, key, EVEN)
    filled = (_filled(x, EVEN) for x in (q, k, v))
    try:
        out = product_of_cudnn(*filled, mask=sees[:, None], implementation="cudnn")
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{wanted}; JAX says: {error}") from error
    return _seeing(out, blind, q)


def splash(
    q: Queries, k: Keys, v: Keys, query: Mask, key: Mask, interpret: bool = False
) -> Queries:
    """`kernels.attention.attention` by the splash attention that comes with JAX.

    Rows are computed one after the other. `interpret` runs it anywhere, slowly.

    Raises:
        ValueError: this JAX has it no more.
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
        x = jnp.pad(_filled(x, size), ((0, 0), (0, 0), (0, 0), (0, -dim % LANES)))
        return rearrange(x, "b l heads dim -> b heads l dim")

    def one(row: tuple[Array, Array, Array, Array]) -> Array:
        *arrays, sees = row
        kernel = library.make_splash_mha(
            sees[None],
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        # JAX has made an array of a flag, which under jit it can not ask.
        flagged = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
        kernel.fwd_mask_info = flagged
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
    filled = (_filled(x, EVEN) for x in (q, k, v))
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
    """Who sees whom, filled to multiples of the sizes, and which queries see nobody.

    These, and what was filled, see the first key.
    """
    rows = (jnp.asarray(x)[:, :, None] for x in query)
    columns = (jnp.asarray(x)[:, None] for x in key)
    sees = jax.vmap(seen)(*rows, *columns)
    blind = ~sees.any(axis=2)
    _, queries, keys = sees.shape
    more = (0, -queries % size), (0, -keys % (key_size or size))
    sees = jnp.pad(sees, ((0, 0), *more))
    first = jnp.arange(sees.shape[2])[None, None] == 0
    return sees | (~sees.any(axis=2, keepdims=True) & first), blind


def _filled(x: Float[Array, "b l heads dim"], size: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))


def _seeing(out: Array, blind: Bool[Array, "b lq"], q: Queries) -> Queries:
    """The part of `out` that belongs to `q`, zeros for queries that see nobody."""
    out = out[:, : q.shape[1], :, : q.shape[3]]
    return jnp.where(blind[:, :, None, None], 0, out).astype(q.dtype)
