# SPDX-License-Identifier: Apache-2.0
"""Implementations of attention that `benchmarks.attention` compares, each optional.

All of them compute one `Problem`. Those of PyTorch hold arrays as `b heads l dim`;
arrays are brought into this order before a clock starts.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float

from benchmarks.attention_libraries import LIBRARIES, intervals, ordered, tokamax
from pyramid_jax.kernels.attention import BACKENDS, attention
from pyramid_jax.kernels.visits import fill
from pyramid_jax.mask import TokenMask

# The device that each needs; one that is not listed runs anywhere.
NEEDS = {
    "pallas_triton": "gpu",
    "pallas_mosaic_gpu": "gpu",
    "pallas_tpu": "tpu",
    "cudnn": "gpu",
    "splash": "tpu",
    "jax_pallas": "gpu",
    "flex": "gpu",
    "flex_flash": "gpu",
}
# FlexAttention and its options: in Triton, or on the kernels of FlashAttention-4.
FLEX = {"flex": None, "flex_flash": {"BACKEND": "FLASH"}}
FLASH = "flash_attn.cute"  # those kernels, of the package flash-attn-4
OF_TORCH = (*FLEX, "sdpa")
NAMES = (*BACKENDS, *LIBRARIES, "tokamax", "jax_pallas", *OF_TORCH)
BLOCK = 128  # tokens, of JAX's own Pallas kernel

Values = Float[np.ndarray, "b l heads dim"]


class Problem(NamedTuple):
    """One call of attention, the gradient of its output, and the type of products."""

    q: Values
    k: Values
    v: Values
    back: Values
    mask: TokenMask
    dtype: str = "bfloat16"


class Rival(NamedTuple):
    """An implementation on one problem.

    `forward(q, k, v)` gives the output, `both(q, k, v, back)` also the gradients of q,
    k and v. Calls are started, not awaited. `mask` is the mask that it applies.
    """

    put: Callable[[Values], Any]
    forward: Callable[..., Any]
    both: Callable[..., Sequence[Any]]
    wait: Callable[[Any], Any]
    take: Callable[[Any], Values]
    mask: TokenMask


def rival(name: str, problem: Problem) -> Rival:
    """The implementation of that name, one of `NAMES`.

    Raises:
        ValueError: it is not available on this machine; the message says why.
    """
    device = jax.default_backend()
    needs = NEEDS.get(name, device)
    if needs != device:
        raise ValueError(f"needs a {needs.upper()}; the device is a {device.upper()}")
    if name in OF_TORCH:
        return _of_torch(name, problem, device)
    if name == "jax_pallas":
        mask = without_frames(problem)
        return _of_jax(_segments_only, problem, mask)._replace(mask=mask)
    if name == "tokamax":
        return _of_tokamax(problem)
    if name in LIBRARIES:
        return _of_jax(LIBRARIES[name], problem, problem.mask)
    if name not in NAMES:
        raise ValueError(f"no implementation {name!r}; there are {NAMES}")
    return backend(name, problem)


def backend(name: str, problem: Problem) -> Rival:
    """A backend of the package; Pallas kernels are interpreted on a CPU."""
    return _of_jax(lambda *x: attention(*x, name), problem, problem.mask)


def without_frames(problem: Problem) -> TokenMask:
    """A superset of the mask: within a segment, later frames are visible, too."""
    segment, frame = problem.mask
    return TokenMask(segment, np.zeros_like(frame))


def _of_jax(form: Callable[..., Any], problem: Problem, seen: Any) -> Rival:
    """A rival that gets what is seen when it is called: nothing is computed before."""
    arrays = type(seen)(*map(jnp.asarray, seen))

    @jax.jit
    def both(q, k, v, back, seen):
        out, pull = jax.vjp(lambda *x: form(*x, seen), q, k, v)
        return [out, *pull(back)]

    forward = jax.jit(form)
    return Rival(
        put=lambda x: jnp.asarray(x, problem.dtype),
        forward=lambda q, k, v: forward(q, k, v, arrays),
        both=lambda q, k, v, back: both(q, k, v, back, arrays),
        wait=jax.block_until_ready,
        take=lambda x: np.asarray(x, np.float64),
        mask=problem.mask,
    )


def _of_tokamax(problem: Problem) -> Rival:
    """Tokamax on rows that are ordered before a clock starts."""
    order = ordered(problem.mask)
    back = np.argsort(order, axis=1)[:, :, None, None]
    mask = TokenMask(*(np.take_along_axis(x, order, axis=1) for x in problem.mask))
    one = _of_jax(tokamax, problem, intervals(mask))
    order = order[:, :, None, None]
    return one._replace(
        put=lambda x: one.put(np.take_along_axis(x, order, axis=1)),
        take=lambda x: np.take_along_axis(one.take(x), back, axis=1),
    )


def _segments_only(q: Any, k: Any, v: Any, mask: TokenMask) -> jax.Array:
    """JAX's own Pallas kernel for GPUs, which knows segments and no frames."""
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
    length = mask.segment.shape[1]
    segment = fill(mask.segment, {1: BLOCK}, -1)
    blocks = (fill(x, {1: BLOCK}) for x in (q, k, v))
    out = kernel.mha(*blocks, segment, sm_scale=1 / math.sqrt(q.shape[-1]))
    return out[:, :length]


def _of_torch(name: str, problem: Problem, device: str) -> Rival:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ValueError("needs the package torch") from error
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU; install torch with CUDA")
    place = {"gpu": "cuda", "cpu": "cpu"}.get(device)
    if place is None:
        raise ValueError(f"torch has no {device.upper()}")
    mask = TokenMask(*(torch.from_numpy(x.copy()).to(place) for x in problem.mask))
    form = _flex(torch, mask, FLEX[name]) if name in FLEX else _sdpa(torch, mask)

    def put(x: Values) -> Any:
        x = np.ascontiguousarray(rearrange(x, "b l heads dim -> b heads l dim"))
        return torch.from_numpy(x).to(place, getattr(torch, problem.dtype))

    def both(q, k, v, back) -> list[Any]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = form(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, back)]

    def take(x: Any) -> Values:
        x = x.detach().double().cpu().numpy()
        return rearrange(x, "b heads l dim -> b l heads dim")

    def wait(_: Any) -> None:
        if place == "cuda":
            torch.cuda.synchronize()

    return Rival(put, form, both, wait, take, problem.mask)


def _flex(torch: Any, mask: TokenMask, options: Any) -> Callable[..., Any]:
    """FlexAttention, compiled, with a list of blocks of 128 x 128 made from the mask.

    Source: `FlexKernelOptions.BACKEND` of PyTorch 2.13. "FLASH" needs flash-attn-4
    (seen: 4.0.0b9) and a Hopper or Blackwell GPU; where it can't be used, it raises an
    error, and no other kernel takes its place.
    """
    library = importlib.import_module("torch.nn.attention.flex_attention")
    if options:
        try:
            importlib.import_module(FLASH)
        except ImportError as error:
            raise ValueError("needs the package flash-attn-4") from error
    segment, frame = mask
    rows, length = segment.shape

    def sees(b, head, query, key):
        same = (segment[b, query] == segment[b, key]) & (segment[b, query] >= 0)
        return same & (frame[b, key] <= frame[b, query])

    listed = library.create_block_mask(
        sees, rows, None, length, length, device=segment.device
    )
    compiled = torch.compile(library.flex_attention, dynamic=False)
    return lambda *x: compiled(*x, block_mask=listed, kernel_options=options)


def _sdpa(torch: Any, mask: TokenMask) -> Callable[..., Any]:
    """PyTorch's attention, dense mask; a query without keys is shown the first one."""
    query, key = (TokenMask(*(x.unsqueeze(axis) for x in mask)) for axis in (2, 1))
    same = (query.segment == key.segment) & (query.segment >= 0)
    sees = same & (key.frame <= query.frame)
    sees[:, :, 0] |= ~sees.any(2)
    sees = sees.unsqueeze(1)
    product = torch.nn.functional.scaled_dot_product_attention
    return lambda q, k, v: product(q, k, v, attn_mask=sees)
