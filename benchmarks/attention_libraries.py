# SPDX-License-Identifier: Apache-2.0
"""Attention by other libraries for JAX: cuDNN, splash attention, tokamax.

None of them knows segments and frames, so each gets the mask as a matrix of queries
times keys: at 15k tokens 240 MB per row as bytes, twice that where it is added to the
logits. What each does with it:

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

Values = Float[Array, "b l heads dim"]


def cudnn(q: Values, k: Values, v: Values, mask: Mask) -> Values:
    """`kernels.attention.attention` by cuDNN, through JAX.

    Raises:
        ValueError: there is no NVIDIA GPU or no cuDNN, or it does not take the type or
            the width of the heads.
    """
    refusal = (
        "needs an NVIDIA GPU with cuDNN, bfloat16 or float16, and heads whose width 8 "
        f"divides, up to 128; given are {q.dtype}, heads of width {q.shape[3]} on "
        f"{jax.default_backend()}"
    )
    two_bytes = q.dtype in (jnp.bfloat16, jnp.float16)
    if jax.default_backend() != "gpu" or not two_bytes or q.shape[3] % 8:
        raise ValueError(refusal)
    sees, blind = _matrix(mask, EVEN)
    filled = (fill(x, {1: EVEN}) for x in (q, k, v))
    try:
        out = product_of_cudnn(*filled, mask=sees[:, None], implementation="cudnn")
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{refusal}; JAX says: {error}") from error
    return _seeing(out, blind, q)


def splash(
    q: Values, k: Values, v: Values, mask: Mask, interpret: bool = False
) -> Values:
    """`kernels.attention.attention` by the splash attention that comes with JAX.

    Rows are computed one after the other. `interpret` runs it anywhere, slowly.

    Raises:
        ValueError: this version of JAX does not have it.
    """
    try:
        library: Any = importlib.import_module(SPLASH)
    except ImportError as error:
        raise ValueError(
            f"needs {SPLASH}, which jax {jax.__version__} does not have"
        ) from error
    length, dim = q.shape[1], q.shape[3]
    block = min(BLOCK, length + -length % LANES)
    sees, blind = _matrix(mask, block)
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def wide(x: Array) -> Array:
        x = fill(x, {1: block, 3: LANES})
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
    out = jax.lax.map(one, (wide(q * slope), wide(k), wide(v), sees))
    return _seeing(rearrange(out, "b heads l dim -> b l heads dim"), blind, q)


def tokamax(q: Values, k: Values, v: Values, mask: Mask) -> Values:
    """`kernels.attention.attention` by the kernels of tokamax for this device.

    Raises:
        ValueError: tokamax is not installed, or none of its kernels takes these arrays.
    """
    try:
        library = importlib.import_module("tokamax")
    except ImportError as error:
        raise ValueError("needs the package tokamax") from error
    kernels = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",), "cpu": ("xla",)}
    device = jax.default_backend()
    sees, blind = _matrix(mask, EVEN)
    filled = (fill(x, {1: EVEN}) for x in (q, k, v))
    try:
        out = library.dot_product_attention(
            *filled, mask=sees[:, None], implementation=kernels[device]
        )
    except (NotImplementedError, ExceptionGroup) as error:
        raise ValueError(
            f"tokamax has no kernel on {device} for {q.dtype} and heads of width "
            f"{q.shape[3]}: {error}"
        ) from error
    return _seeing(out, blind, q)


LIBRARIES = {"cudnn": cudnn, "splash": splash, "tokamax": tokamax}


def _matrix(mask: Mask, size: int) -> tuple[Bool[Array, "b _ _"], Bool[Array, "b l"]]:
    """Which query sees which key, filled to whole blocks, and which queries see none.

    Those that see none, and the added ones, are shown the first key.
    """
    rows = [jnp.asarray(x)[:, :, None] for x in mask]
    columns = [jnp.asarray(x)[:, None] for x in mask]
    sees = visible(rows, columns)
    blind = ~sees.any(axis=2)
    sees = fill(sees, {1: size, 2: size})
    first = jnp.arange(sees.shape[2], dtype=jnp.int32)[None, None] == 0
    return sees | (~sees.any(axis=2, keepdims=True) & first), blind


def _seeing(out: Array, blind: Bool[Array, "b l"], q: Values) -> Values:
    """The part of `out` that belongs to `q`, with zeros for queries that see no key."""
    out = out[:, : q.shape[1], :, : q.shape[3]]
    return jnp.where(blind[:, :, None, None], 0, out).astype(q.dtype)
