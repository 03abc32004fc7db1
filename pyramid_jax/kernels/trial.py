# SPDX-License-Identifier: Apache-2.0
"""A kernel proves on the device at hand that it computes the plain form.

Compilers, drivers and chips differ more than tests can foresee. So before a Pallas
kernel becomes the default, something small goes through it, forward and backward.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

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
    shape = (*trial_mask().segment.shape, HEADS, dim)
    shapes = dict.fromkeys("qkv", jax.ShapeDtypeStruct(shape, dtype))

    def of_row(form: AttentionForm) -> Callable[..., Array]:
        return lambda q, k, v: form(q, k, v, TokenMask(*map(jnp.asarray, trial_mask())))

    return difference(of_row(kernel), of_row(plain), shapes)


def difference(
    kernel: Callable[..., Any], plain: Callable[..., Any], shapes: dict[str, Any]
) -> str | None:
    """What is wrong with a kernel's values and gradients at random arguments, if any.

    Args:
        plain: what it should compute, which gets the same numbers as float32.
        shapes: of the arguments by name, each an array or a tree of arrays.
    """
    # In a thread of its own, because the caller may be tracing, under a mesh.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_difference, kernel, plain, shapes).result()


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


def _difference(
    kernel: Callable[..., Any], plain: Callable[..., Any], shapes: dict[str, Any]
) -> str | None:
    draw = np.random.default_rng(0)

    def drawn(x: Any) -> Array:
        return jnp.asarray(draw.standard_normal(x.shape), x.dtype)

    arrays = jax.tree.map(drawn, shapes)
    back = jax.tree.map(drawn, jax.eval_shape(lambda: plain(**arrays)))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, back))
    exact = jax.jit(partial(_both_ways, plain))(*wide)
    try:
        computed = jax.jit(partial(_both_ways, kernel))(arrays, back)
        errors = {
            name: max(map(_error, *map(jax.tree.leaves, (computed[name], exact[name]))))
            for name in exact
        }
    except Exception as error:  # every compiler has its own kinds
        return f"{type(error).__name__}: {error}"
    narrow = min(x.dtype.itemsize for x in jax.tree.leaves(arrays))
    if max(errors.values()) <= ALLOWED[narrow]:
        return None
    wrong = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"it differs from the plain form, as a share of the largest value: {wrong}"


def _both_ways(form: Callable[..., Any], inputs: Any, back: Any) -> dict[str, Any]:
    """The values, and the gradients of every argument, by name."""
    out, pull = jax.vjp(lambda x: form(**x), inputs)
    (gradients,) = pull(back)
    return {"values": out} | {f"gradients of {k}": x for k, x in gradients.items()}


def _error(computed: Array, exact: Array) -> float:
    """The largest difference over the largest value; infinite if anything is NaN."""
    values, reference = (np.asarray(x, np.float64) for x in (computed, exact))
    error = np.abs(values - reference).max() / np.abs(reference).max()
    return float(error) if np.isfinite(error) else float("inf")
