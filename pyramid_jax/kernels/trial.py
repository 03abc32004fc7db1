# SPDX-License-Identifier: Apache-2.0
"""A kernel proves on the device at hand that it computes the plain form.

Compilers, drivers and chips differ more than tests can foresee. So before a Pallas
kernel becomes the default, one small row goes through it, forward and backward.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pyramid_jax.mask import TokenMask, joint

AttentionForm = Callable[..., Array]

# A row of training at a quarter of 384p, a few blocks long, with blocks of every kind:
# the video tokens of each frame of five segments, each segment's text, the padding.
FRAMES = ((4,) * 13 + (15, 60, 60), (15,), (4,), (60,), (4,) * 7 + (15, 15))
TEXT, PADDING, HEADS = 32, 20, 2
# Largest difference as a share of the largest value: weights of bfloat16 have 8 bits,
# products of float32 may be rounded to 11 by the plain form.
ALLOWED = {2: 0.03, 4: 2e-3}


def failure(
    kernel: AttentionForm, plain: AttentionForm, dim: int, dtype: str
) -> str | None:
    """The reason why the kernel can't be used here; None if it can.

    Args:
        kernel, plain: functions of q, k, v and the mask.
        dim: width of a head.
    """
    # In a thread of its own, because the caller may be tracing, under a mesh.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_failure, kernel, plain, dim, dtype).result()


def trial_mask() -> TokenMask:
    """The row that goes through a kernel: all texts, all videos, padding."""
    segments = np.arange(len(FRAMES), dtype=np.int32)
    video = np.repeat(segments, [sum(counts) for counts in FRAMES])
    frames = [np.repeat(np.arange(len(counts)), counts) for counts in FRAMES]
    return joint(
        np.repeat(segments, TEXT)[None],
        np.pad(video, (0, PADDING), constant_values=-1)[None],
        np.pad(np.concatenate(frames, dtype=np.int32), (0, PADDING))[None],
    )


def _failure(
    kernel: AttentionForm, plain: AttentionForm, dim: int, dtype: str
) -> str | None:
    mask = trial_mask()
    draw = np.random.default_rng(0)
    shape = (*mask.segment.shape, HEADS, dim)
    arrays = [jnp.asarray(draw.standard_normal(shape), dtype) for _ in range(4)]
    wide = [x.astype(jnp.float32) for x in arrays]
    exact = jax.jit(partial(_both_ways, plain))(mask, *wide)
    try:
        computed = jax.jit(partial(_both_ways, kernel))(mask, *arrays)
        errors = [_error(*pair) for pair in zip(computed, exact, strict=True)]
    except Exception as error:  # every compiler has its own kinds
        return f"{type(error).__name__}: {error}"
    if max(errors) <= ALLOWED[arrays[0].dtype.itemsize]:
        return None
    names = ("values", "gradients of q", "of k", "of v")
    wrong = ", ".join(f"{n} {e:.1e}" for n, e in zip(names, errors, strict=True))
    return f"it differs from the plain form, as a share of the largest value: {wrong}"


def _both_ways(
    form: AttentionForm, mask: TokenMask, q: Array, k: Array, v: Array, back: Array
) -> list[Array]:
    """The output, and the gradients of q, k and v."""
    out, pull = jax.vjp(lambda *x: form(*x, mask), q, k, v)
    return [out, *pull(back)]


def _error(computed: Array, exact: Array) -> float:
    """The largest difference over the largest value; infinite if anything is NaN."""
    values, reference = (np.asarray(x, np.float64) for x in (computed, exact))
    error = np.abs(values - reference).max() / np.abs(reference).max()
    return float(error) if np.isfinite(error) else float("inf")
