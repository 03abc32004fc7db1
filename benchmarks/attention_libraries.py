# SPDX-License-Identifier: Apache-2.0
"""Attention by other libraries for JAX: cuDNN, splash attention, tokamax.

None of them knows segments and frames. Two get the mask as a matrix of queries times
keys: at 15k tokens 240 MB per row as bytes, twice that where it is added to the logits.
In a row that is ordered by segment and frame, the keys of a query are an interval. What
each does with it:

    cudnn    adds the matrix to the logits; every pair of tokens is multiplied
    splash   skips blocks without a visible pair; heads are filled to width 128
    tokamax  is given intervals; skips blocks outside them, forward if not backward

A query that sees no key is shown the first one, so that nothing is divided by zero, and
its output and its gradients are replaced by zeros.
"""

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int

from pyramid_jax.kernels.visits import Mask, fill
from pyramid_jax.mask import TokenMask, visible
from pyramid_jax.shapes import Array

EVEN = 8  # tokens; cuDNN takes no odd number, and reads masks in vectors
SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel"
LANES = 128  # of a TPU: what splash attention wants blocks and heads to be multiples of
BLOCK = 512  # tokens in a block of splash attention
product_of_cudnn = jax.nn.dot_product_attention

TOKAMAX = "tokamax._src.ops.attention"  # where its kernels are

Values = Float[Array, "b l heads dim"]


class Intervals(NamedTuple):
    """The first key that each query sees, and the one after the last; 0, 0 for none."""

    start: Int[Array, "b l"]
    end: Int[Array, "b l"]


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


def tokamax(q: Values, k: Values, v: Values, keys: Intervals) -> Values:
    """Attention of ordered rows by the kernels of tokamax for this device.

    Its public function takes no intervals, so its kernels are called by name.

    Source: `Mask.k_start` and `k_end` of tokamax 0.0.12 to 0.0.17. On a Hopper GPU the
    forward kernel visits the blocks between the least start and the last end of its
    queries; the backward kernels visit all.

    Raises:
        ValueError: tokamax is not installed, can't be imported, or has no kernel that
            takes these arrays.
    """
    try:
        kernels: Any = importlib.import_module(f"{TOKAMAX}.api").IMPLEMENTATIONS
        library: Any = importlib.import_module(f"{TOKAMAX}.base")
    except ImportError as error:
        raise ValueError("needs the package tokamax") from error
    except SyntaxError as error:  # typeguard's, which takes jaxtyping's shapes for code
        raise ValueError(
            "this tokamax can't be imported beside typeguard 3 or later; "
            "install tokamax 0.0.17 (Python 3.12), or typeguard 2.13.3"
        ) from error
    names = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",), "cpu": ("xla",)}
    device, refusals = jax.default_backend(), []
    filled = [fill(x, {1: EVEN}) for x in (q, k, v)]
    start, end = (fill(jnp.asarray(x), {1: EVEN}) for x in keys)
    blind = start == end
    ends = jnp.where(blind, start + 1, end)
    mask = library.Mask(k_start=start[:, None], k_end=ends[:, None])
    for name in (name for name in names[device] if name in kernels):
        try:
            out = kernels[name](*filled, mask=mask)
            return _seeing(out, blind[:, : q.shape[1]], q)
        except NotImplementedError as error:
            refusals.append(f"{name}: {error}")
    raise ValueError(
        f"tokamax has no kernel on {device} for {q.dtype} and heads of width "
        f"{q.shape[3]} ({'; '.join(refusals)})"
    )


# Which take a mask; tokamax takes `Intervals` instead.
LIBRARIES = {"cudnn": cudnn, "splash": splash}


def ordered(mask: TokenMask) -> Int[np.ndarray, "b l"]:
    """The tokens of every row by segment, then by frame; padding comes first."""
    return np.lexsort((np.asarray(mask.frame), np.asarray(mask.segment)), axis=1)


def intervals(mask: TokenMask) -> Intervals:
    """The keys that each query sees in rows that are `ordered`."""
    segments, frames = (np.asarray(x, np.int64) for x in mask)
    places = segments * (frames.max() + 1) + frames
    rows = zip(segments, places, strict=True)
    both = [
        (np.searchsorted(s, s, "left"), np.searchsorted(p, p, "right")) for s, p in rows
    ]
    start, end = (np.stack(x).astype(np.int32) for x in zip(*both, strict=True))
    visible = segments >= 0
    return Intervals(np.where(visible, start, 0), np.where(visible, end, 0))


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
