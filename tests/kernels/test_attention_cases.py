# SPDX-License-Identifier: Apache-2.0
"""Every backend on every case, values and gradients, against the formula in float64.

Pallas kernels are interpreted, in blocks of 16 tokens, so that rows of 90 have many. On
a GPU or TPU the tests marked for it run the compiled kernels at their own block sizes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from launch.compile.cases import batch, case, case_names
from pyramid_jax import sharding
from pyramid_jax.kernels.attention import (
    BACKENDS,
    attend,
    attention,
    attention_plan,
    default,
)
from pyramid_jax.kernels.attention_blocks import blocks
from pyramid_jax.kernels.attention_tpu import attention_tpu, tpu_lists
from pyramid_jax.kernels.attention_triton import attention_triton
from pyramid_jax.kernels.tiles import Tiles
from pyramid_jax.kernels.visits import visit_lists
from pyramid_jax.mask import TokenMask, dense_mask

SCALE, LENGTH, HEADS, DIM = 1 / 16, 90, 2, 16
EVEN = Tiles.of(((16, 16),))
# Other sizes for the kernels that walk keys and for the one that walks queries.
UNEVEN = Tiles.of(((32, 16), (16, 32), (32, 16)))


def with_tpu(q, k, v, mask, tiles=EVEN, interpret=True):
    lists = tpu_lists(mask, mask, tiles)
    return attention_tpu(q, k, v, (mask, mask), lists, tiles, interpret=interpret)


def with_triton(q, k, v, mask, tiles=EVEN, cut=0):
    lists, how = visit_lists(mask, mask, tiles), {"cut": cut, "interpret": True}
    out = attention_triton(q, k, v, (mask, mask), lists, tiles, **how)
    return jnp.concatenate(out, axis=1)


FORMS = {
    "xla": lambda *x: attention(*x, "xla"),
    "blocks": lambda q, k, v, mask: blocks(q, k, v, mask, mask, 16),
    "pallas_tpu": with_tpu,
    "pallas_triton": with_triton,
}
PALLAS = ["pallas_tpu", "pallas_triton"]


def inputs(
    rows: int = 1, dim: int = DIM, dtype: str = "float32", length: int = LENGTH
) -> list[jax.Array]:
    """Queries, keys, values and what comes back; large logits, so that rows differ."""
    draw = np.random.default_rng(0)
    shape = (rows, length, HEADS, dim)
    q, *others = (draw.standard_normal(shape, np.float32) for _ in range(4))
    return [jnp.asarray(x, dtype) for x in (2 * q, *others)]


def row(name: str, length: int = LENGTH) -> TokenMask:
    """One case as arrays on the device."""
    return TokenMask(*map(jnp.asarray, batch([name], length, SCALE)))


def both_ways(form, *args) -> list[jax.Array]:
    """The output of `form(q, k, v, mask)` and the gradients of q, k and v."""
    *arrays, back, mask = args
    out, pull = jax.vjp(lambda *x: form(*x, mask), *arrays)
    return [out, *pull(back)]


@functools.cache
def compiled(backend: str):
    """`both_ways` in one program for all cases, which have one shape."""
    return jax.jit(functools.partial(both_ways, FORMS[backend]))


def by_the_formula(q, k, v, back, mask: TokenMask) -> list[np.ndarray]:
    """Output and gradients of softmax(q kᵀ / sqrt(dim)) v in float64 numpy."""
    q, k, v, back = (np.asarray(x, np.float64) for x in (q, k, v, back))
    scale = q.shape[-1] ** -0.5
    seen = np.asarray(dense_mask(mask))[:, None]
    logits = np.where(seen, np.einsum("bqhd,bkhd->bhqk", q, k) * scale, -1e9)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * seen
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    change = np.einsum("bqhd,bkhd->bhqk", back, v)
    change = weights * (change - (change * weights).sum(-1, keepdims=True)) * scale
    return [
        out,
        np.einsum("bhqk,bkhd->bqhd", change, k),
        np.einsum("bhqk,bqhd->bkhd", change, q),
        np.einsum("bhqk,bqhd->bkhd", weights, back),
    ]


def assert_close(found, expected, share: float) -> None:
    """Each array to `share` of its largest value."""
    for ours, exact in zip(found, expected, strict=True):
        ours = np.asarray(ours, np.float64)
        atol = share * np.abs(exact).max()
        np.testing.assert_allclose(ours, exact, rtol=0, atol=atol)


@pytest.mark.parametrize("name", case_names())
@pytest.mark.parametrize("backend", FORMS)
def test_values_and_gradients_are_those_of_the_formula(backend, name):
    """Rounding of float32 products over 90 keys: a few 1e-6 of the largest value."""
    mask, arrays = row(name), inputs()
    found = compiled(backend)(*arrays, mask)
    assert_close(found, by_the_formula(*arrays, mask), 1e-5)
    padded = np.asarray(mask.segment) < 0
    for values in found:
        np.testing.assert_array_equal(np.asarray(values)[padded], 0.0)


def test_every_backend_is_tested():
    """That for Hopper, whose blocks are larger, in `test_attention_mosaic`."""
    assert {*FORMS, "pallas_mosaic_gpu"} == set(BACKENDS)


@pytest.mark.parametrize(
    ("form", "dim"),
    [
        (functools.partial(with_tpu, tiles=Tiles.of(((32, 16),))), 24),
        (functools.partial(with_triton, tiles=UNEVEN), 24),
    ],
    ids=PALLAS,
)
def test_blocks_of_any_size_serve_heads_of_any_width_in_rows_of_a_batch(form, dim):
    names = ["768p stage 2 unit 30", "packed", "scattered"]
    mask = TokenMask(*map(jnp.asarray, batch(names, 77, SCALE)))
    arrays = inputs(len(names), dim, length=77)
    found = jax.jit(functools.partial(both_ways, form))(*arrays, mask)
    assert_close(found, by_the_formula(*arrays, mask), 1e-5)


@pytest.mark.parametrize("backend", PALLAS)
def test_bfloat16_is_as_close_as_its_rounding(backend):
    """Weights, their slopes and results are rounded to 8 bits."""
    arrays, mask = inputs(dtype="bfloat16"), row("packed")
    found = compiled(backend)(*arrays, mask)
    assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
    assert_close(found, by_the_formula(*arrays, mask), 0.02)


@pytest.mark.parametrize("backend", FORMS)
def test_a_row_of_padding_gives_zeros_and_no_nan(backend):
    mask = row("packed")
    mask = TokenMask(jnp.full_like(mask.segment, -1), mask.frame)
    for values in compiled(backend)(*inputs(), mask):
        np.testing.assert_array_equal(values, 0.0)


def test_the_memory_of_a_tpu_is_read_after_it_was_written(capfd):
    """Emulated with its spaces and copies: what nobody has written is not a number."""
    memory = pltpu.InterpretParams(detect_races=True)

    form = functools.partial(with_tpu, interpret=memory)
    arrays, mask = inputs(), row("packed")
    found = jax.jit(functools.partial(both_ways, form))(*arrays, mask)
    assert_close(found, by_the_formula(*arrays, mask), 1e-5)
    assert "RACE" not in "".join(capfd.readouterr()).upper()


@pytest.mark.parametrize("cut", [16, 40, 64])
def test_results_in_two_arrays_are_the_same(cut):
    """Cut between blocks, which the kernel does, or inside one."""
    arrays, mask = inputs(), row("384p stage 2 unit 8")
    cutting = functools.partial(both_ways, functools.partial(with_triton, cut=cut))
    found = jax.jit(cutting)(*arrays, mask)
    for a, b in zip(found, compiled("pallas_triton")(*arrays, mask), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", FORMS)
def test_the_last_queries_alone_get_what_they_get_among_all(backend):
    (q, k, v, back), mask = inputs(), row("packed")
    last = 37

    def form(q, k, v, queries):
        return attend(q, k, v, attention_plan(queries, mask, DIM, "float32", backend))

    few = functools.partial(both_ways, form)
    found = jax.jit(few)(q[:, -last:], k, v, back[:, -last:], mask.last(last))
    alone = back.at[:, :-last].set(0.0)
    out, *gradients = by_the_formula(q, k, v, alone, mask)
    expected = [out[:, -last:], gradients[0][:, -last:], *gradients[1:]]
    assert_close(found, expected, 1e-5)


def remembered() -> tuple[TokenMask, TokenMask, np.ndarray]:
    """Queries and keys of a row whose past is known, and the keys that are there.

    Of the slots for text and older frames some at the beginning and the last are empty.
    """
    mask, new = case("768p stage 2 unit 8", SCALE), 35
    length = mask.segment.shape[1]
    place = np.arange(length)
    there = (mask.segment[0] >= 0) & ((place < 13) | (place >= length - new))
    segment = np.where(there, mask.segment, -1)
    key = TokenMask(*map(jnp.asarray, (segment, mask.frame)))
    return key.last(new), key, there


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("backend", FORMS)
def test_new_tokens_see_what_is_remembered_in_slots_some_of_which_are_empty(
    backend, divided
):
    """Fewer queries than keys, each with a mask of its own; on four devices, too."""
    query, key, there = remembered()
    count, length = query.segment.shape[1], key.segment.shape[1]
    q, k, v, back = inputs(length=length)
    assert count < there.sum() < length

    def form(q, k, v, query):
        return attend(q, k, v, attention_plan(query, key, DIM, "float32", backend))

    few = jax.jit(functools.partial(both_ways, form))
    arrays = q[:, -count:], k, v, back[:, -count:], query
    if divided:
        with jax.set_mesh(sharding.device_mesh(context=2)):
            found = few(*arrays)
    else:
        found = few(*arrays)
    alone = back.at[:, :-count].set(0.0)
    out, *gradients = by_the_formula(q, k, v, alone, key)
    assert_close(
        found, [out[:, -count:], gradients[0][:, -count:], *gradients[1:]], 1e-5
    )
    for of_keys in found[2:]:
        np.testing.assert_array_equal(of_keys[:, ~there], 0.0)


@pytest.mark.parametrize("backend", FORMS)
def test_a_cut_before_all_queries_leaves_an_empty_array(backend):
    (q, k, v, _), mask = inputs(), row("packed")
    plan = attention_plan(mask, mask, DIM, "float32", backend)
    none, every = jax.jit(functools.partial(attend, plan=plan, cut=0))(q, k, v)
    assert none.shape == (1, 0, HEADS, DIM)
    np.testing.assert_array_equal(every, jax.jit(attend)(q, k, v, plan))


@pytest.mark.parametrize("backend", PALLAS)
def test_logits_may_be_large(backend):
    q, k, v, back = inputs()
    for values in compiled(backend)(1e4 * q, 1e4 * k, v, back, row("packed")):
        assert jnp.isfinite(values).all()


@pytest.mark.parametrize("backend", PALLAS)
def test_recomputing_in_the_backward_pass_changes_nothing(backend):
    arrays, mask = inputs(), row("packed")
    again = functools.partial(both_ways, jax.checkpoint(FORMS[backend]))
    plain = compiled(backend)(*arrays, mask)
    for a, b in zip(plain, jax.jit(again)(*arrays, mask), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", PALLAS)
def test_mapping_over_a_new_axis_equals_a_loop(backend):
    """With gradients; the mask is shared, as between samples of one layout."""
    q, k, v, back = inputs()
    mask, several = row("384p stage 2 unit 8"), jnp.stack([q, -q])
    each = functools.partial(both_ways, FORMS[backend])
    mesh = jax.vmap(each, in_axes=(0, None, None, None, None))
    mapped = jax.jit(mesh)(several, k, v, back, mask)
    looped = [compiled(backend)(q, k, v, back, mask) for q in several]
    for found, *single in zip(mapped, *looped, strict=True):
        np.testing.assert_allclose(found, np.stack(single), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", PALLAS)
def test_a_mesh_divides_rows_heads_and_queries_and_changes_nothing(backend):
    """Two devices for each of batch, context and heads; block sizes of the device."""
    mask = TokenMask(*map(jnp.asarray, batch(["packed", "scattered"], 64, SCALE)))
    arrays = inputs(rows=2, length=64)
    both = functools.partial(both_ways, lambda *x: attention(*x, backend))
    with jax.set_mesh(sharding.device_mesh(data=2, context=2, tensor=2)):
        found = jax.jit(both)(*arrays, mask)
    assert_close(found, by_the_formula(*arrays, mask), 1e-5)


def test_heads_too_wide_for_a_kernel_are_refused():
    q, k, v, _ = inputs(dim=144)
    with pytest.raises(ValueError, match="width 144 are too wide for pallas_triton"):
        attention(q, k, v, row("packed"), "pallas_triton")


def on_this_device(backend: str | None, dtype: str, share: float) -> None:
    """A backend at a real size, against the formula, on the device."""
    names, length = ["384p stage 1 unit 15", "packed tightly"], 1500
    mask = TokenMask(*map(jnp.asarray, batch(names, length, 1.0)))
    arrays = inputs(len(names), 64, dtype, length)
    both = functools.partial(both_ways, lambda *x: attention(*x, backend))
    found = jax.jit(both)(*arrays, mask)
    assert_close(found, by_the_formula(*arrays, mask), share)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "pallas_triton"])
@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.02), ("float32", 2e-5)])
def test_a_gpu_computes_the_formula(backend, dtype, share):
    on_this_device(backend, dtype, share)


@pytest.mark.tpu
@pytest.mark.parametrize("backend", [None, "pallas_tpu"])
@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.02), ("float32", 2e-5)])
def test_a_tpu_computes_the_formula(backend, dtype, share):
    on_this_device(backend, dtype, share)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_is_the_default_of_a_gpu(dtype):
    assert default(1500, 64, dtype) == "pallas_triton"


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_is_the_default_of_a_tpu(dtype):
    assert default(1500, 64, dtype) == "pallas_tpu"
