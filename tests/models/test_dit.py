# SPDX-License-Identifier: Apache-2.0
"""Laws of the transformer, for tiny versions of both variants."""

import dataclasses
import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.kernels.attention import attention_plan
from pyramid_jax.mask import joint
from pyramid_jax.model import VARIANTS, unrolled
from pyramid_jax.models.cache import empty_cache
from pyramid_jax.models.dit import BLOCKS, DiT, DiTConfig, DoubleBlock, initialise_dit
from pyramid_jax.models.dit_blocks import TokenPlaces
from pyramid_jax.models.rotary import turns
from pyramid_jax.shapes import Text, Tokens
from pyramid_jax.sharding import unbox

KEY = jax.random.key(0)
SIZES = {"patch_values": 4, "text_width": 6, "pooled_width": 5, "double_blocks": 2}
TINY = {
    "mmdit": DiTConfig(
        width=16,
        heads=2,
        rope_axes=(8,),
        position_table=16,
        position_table_base=4,
        **SIZES,
    ),
    "miniflux": DiTConfig(
        width=32,
        heads=2,
        rope_axes=(4, 6, 6),
        position_table=None,
        single_blocks=2,
        text_ends_early=False,
        **SIZES,
    ),
}
# perf: compiling is most of these tests' time, running is nothing.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = partial(jax.jit, compiler_options=FAST)
variants = pytest.mark.parametrize("name", TINY)

# One row: segments of 3, 2 and 1 frames, of 4, 2 and 3 tokens each, then padding; all
# texts come first, with padding before and between.
TEXT_SEGMENT = np.array([[-1, 0, 0, 1, 1, 1, -1, 2]])
SEGMENT = np.array([[0] * 12 + [1] * 4 + [2] * 3 + [-1] * 2])
FRAME = np.array([[0] * 4 + [1] * 4 + [2] * 4 + [0, 0, 1, 1, 0, 0, 0, 0, 1]])
TIME = jnp.array([[900.0, 500.0, 3.0]])


def normal(seed: int, *shape: int) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def row() -> tuple[Tokens, jax.Array, Text]:
    n, m = SEGMENT.shape[1], TEXT_SEGMENT.shape[1]
    place = np.random.default_rng(0).uniform(0, 12, size=(1, n, 2))
    position = jnp.asarray(np.concatenate([FRAME[..., None], place], 2), jnp.float32)
    tokens = Tokens(normal(1, 1, n, 4), position, jnp.array(SEGMENT), jnp.array(FRAME))
    text = Text(normal(2, 1, m, 6), jnp.array(TEXT_SEGMENT), normal(3, 1, 3, 5))
    return tokens, TIME, text


@cache
def fresh(name: str) -> Any:
    return unbox(jit(DiT(TINY[name]).init)(KEY, *row()))["params"]


@cache
def weights(name: str) -> Any:
    """Weights none of which is zero."""
    leaves, tree = jax.tree.flatten(jax.device_get(fresh(name)))
    random = np.random.default_rng(0)
    shaken = [x + 0.2 * random.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, shaken)


@partial(jit, static_argnums=0)
def run(cfg: DiTConfig, params: Any, tokens: Tokens, time: jax.Array, text: Text):
    return DiT(cfg).apply({"params": params}, tokens, time, text)


# -------------------------------------------------------------------------------- fresh


@variants
def test_a_fresh_model_answers_zero(name):
    np.testing.assert_array_equal(run(TINY[name], fresh(name), *row()), 0.0)


@variants
def test_fresh_blocks_are_the_identity(name):
    """With a random head, nothing that is inside of the blocks can be seen outside."""
    params = fresh(name) | {"head": weights(name)["head"]}

    def other(path: tuple, x: jax.Array) -> jax.Array:
        keys = [entry.key for entry in path]
        block = keys[0] in BLOCKS
        return x + 1 if block and "modulation" not in keys else x

    changed = jax.tree_util.tree_map_with_path(other, params)
    out, same = (run(TINY[name], p, *row()) for p in (params, changed))
    assert jnp.abs(out).min() > 0
    np.testing.assert_array_equal(out, same)


# ------------------------------------------------------------------------ who sees whom


def influence(cfg: DiTConfig, params: Any) -> jax.Array:
    """How much the output of each token changes with the input of each other."""
    tokens, time, text = row()

    def values(x: jax.Array) -> jax.Array:
        inputs = tokens._replace(values=x), time, text
        return DiT(cfg).apply({"params": params}, *inputs)[0].sum(-1)

    return jnp.abs(jit(jax.jacrev(values))(tokens.values)[:, 0]).max(axis=-1)


@variants
def test_a_token_depends_exactly_on_what_its_segment_has_seen(name):
    """Not on later frames, not through the text either; nor on others' or padding.

    Frames before and the token's own frame all matter.
    """
    query, key = np.meshgrid(np.arange(21), np.arange(21), indexing="ij")
    segment, frame = SEGMENT[0], FRAME[0]
    sees = (segment[query] == segment[key]) & (frame[key] <= frame[query])
    sees &= segment[query] >= 0
    gradient = influence(TINY[name], weights(name))
    np.testing.assert_array_equal(gradient > 0, sees | (query == key))


def test_without_causality_a_token_depends_on_its_whole_segment():
    cfg = dataclasses.replace(TINY["mmdit"], causal=False)
    gradient = influence(cfg, weights("mmdit"))[:19, :19]
    segment = SEGMENT[0, :19]
    np.testing.assert_array_equal(gradient > 0, segment[:, None] == segment[None])


def test_text_depends_on_the_first_frame_and_on_no_other():
    cfg = TINY["miniflux"]
    block = DoubleBlock(cfg)
    words, video, cond = normal(0, 1, 3, 32), normal(1, 1, 4, 32), normal(2, 1, 1, 32)
    frame = jnp.array([[0, 0, 1, 2]])
    mask = joint(jnp.zeros((1, 3), jnp.int32), jnp.zeros_like(frame), frame)
    plan = attention_plan(mask, mask, 16, "float32")
    one_block = jax.tree.map(lambda x: x[0], weights("miniflux")["double"])

    def text_after(video: jax.Array) -> jax.Array:
        at = TokenPlaces(turns(normal(3, 1, 7, 8)), mask.segment)
        args = (cond, words, video, at, plan)
        return block.apply({"params": one_block}, *args, method="conditioned")[0].sum()

    gradient = jnp.abs(jit(jax.grad(text_after))(video)).max(axis=-1)
    np.testing.assert_array_equal(gradient[0] > 0, [True, True, False, False])


@variants
def test_packed_segments_are_answered_as_if_they_were_alone(name):
    """With times, texts and places of their own."""
    tokens, time, text = row()
    packed = run(TINY[name], weights(name), tokens, time, text)
    for s in range(3):
        here, words = SEGMENT[0] == s, TEXT_SEGMENT[0] == s
        alone = Tokens(*(part[:, here] for part in tokens))
        alone = alone._replace(segment=jnp.zeros_like(alone.segment))
        said = text.features[:, words]
        order = jnp.zeros(said.shape[:2], jnp.int32)
        prompt = Text(said, order, text.pooled[:, s : s + 1])
        out = run(TINY[name], weights(name), alone, time[:, s : s + 1], prompt)
        np.testing.assert_allclose(packed[:, here], out, rtol=0, atol=1e-5)


@variants
def test_padding_changes_nothing(name):
    tokens, time, text = row()
    real, words = (SEGMENT >= 0)[..., None], (TEXT_SEGMENT >= 0)[..., None]
    values = jnp.where(real, tokens.values, 1e3)
    features = jnp.where(words, text.features, 1e3)
    params = weights(name)
    out = run(TINY[name], params, tokens, time, text)
    other = run(
        TINY[name],
        params,
        tokens._replace(values=values),
        time,
        text._replace(features=features),
    )
    np.testing.assert_array_equal(out[0, real[0, :, 0]], other[0, real[0, :, 0]])


# ------------------------------------------------------ what sampling asks of a network


@variants
@pytest.mark.parametrize("last", [2, 9])
def test_the_last_tokens_are_answered_as_among_all(name, last):
    cfg, params = TINY[name], {"params": weights(name)}
    few = jit(DiT(cfg).apply, static_argnums=4)(params, *row(), last)
    everything = run(cfg, weights(name), *row())
    assert few.shape == (1, last, 4)
    np.testing.assert_allclose(few, everything[:, -last:], rtol=0, atol=1e-5)


@variants
def test_modulations_that_are_known_are_used_instead_of_time_and_pooled_text(name):
    (tokens, time, text), params = row(), {"params": weights(name)}
    made = DiT(TINY[name]).apply(params, time, text.pooled, method="modulations")
    other = text._replace(pooled=text.pooled + 1)
    how = partial(DiT(TINY[name]).apply, modulations=made)
    found = jit(how)(params, tokens, 0 * time, other)
    expected = run(TINY[name], weights(name), *row())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@variants
def test_a_tree_of_weights_for_every_block_changes_nothing(name):
    (trees,) = unrolled({"dit": weights(name)}).values()
    assert isinstance(trees["double"], tuple)
    found = run(TINY[name], trees, *row())
    expected = run(TINY[name], weights(name), *row())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


FRAMES, WORDS, CELLS = 4, 5, 3  # a row of sampling: frames of so many tokens


def sampled(frames: slice, seed: int = 4) -> Tokens:
    """Some frames of a row with one segment, and another one that is guided by it."""
    place = np.random.default_rng(seed).uniform(0, 12, (2, FRAMES, CELLS, 2))
    order = np.tile(np.arange(FRAMES)[None, :, None], (2, 1, CELLS))
    position = jnp.asarray(np.concatenate([order[..., None], place], -1), jnp.float32)
    parts = normal(seed, 2, FRAMES, CELLS, 4), position, jnp.zeros_like(order), order
    rows = (jnp.asarray(part[:, frames]) for part in parts)
    return Tokens(*(part.reshape(2, -1, *part.shape[3:]) for part in rows))


def said() -> Text:
    """Two prompts, the first one shorter."""
    segment = jnp.array([[-1, -1, 0, 0, 0], [0] * WORDS])
    return Text(normal(5, 2, WORDS, 6), segment, normal(6, 2, 1, 5))


def no_words(text: Text) -> Text:
    return text._replace(features=text.features[:, :0], segment=text.segment[:, :0])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mmdit", {}), ("miniflux", {}), ("miniflux", {"context": 2, "tensor": 2})],
)
def test_rows_that_go_on_from_a_cache_are_answered_as_whole_ones(name, sizes):
    """Frame after frame, with words in the first row and slots for a frame to spare."""
    cfg, params, text = TINY[name], {"params": weights(name)}, said()
    time = jnp.full((2, 1), 300.0)

    @partial(jit, static_argnums=0)
    def whole(last: int) -> jax.Array:
        row = sampled(slice(0, last))
        return DiT(cfg).apply(params, row, time, text, CELLS)

    @jit
    def on(tokens: Tokens, text: Text, cache: Any) -> Any:
        how = partial(DiT(cfg).apply, params, method="continued", first=CELLS)
        return how(tokens, time, text, CELLS, cache)

    expected = [whole(last) for last in range(2, FRAMES + 1)]
    used = jax.devices()[: math.prod(sizes.values())]
    with jax.set_mesh(sharding.device_mesh(**{"data": 1} | sizes, devices=used)):
        cache = jit(lambda: empty_cache(cfg, 2, WORDS + FRAMES * CELLS))()
        answer, cache = on(sampled(slice(0, 2)), text, cache)
        answers = [answer]
        for frame in range(1, FRAMES - 1):
            new = sampled(slice(frame, frame + 2))
            answer, cache = on(new, no_words(text), cache)
            answers.append(answer)
    assert int(cache.taken) == WORDS + (FRAMES - 1) * CELLS
    for found, exact in zip(answers, expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


def test_what_is_not_causal_has_no_cache():
    cfg = dataclasses.replace(TINY["mmdit"], causal=False)
    with pytest.raises(ValueError, match=r"without causality .* sample without reuse"):
        empty_cache(cfg, 1, 8)


# -------------------------------------------------------------------------- computation


@variants
def test_bfloat16_stays_near_float32(name):
    cfg = dataclasses.replace(TINY[name], dtype="bfloat16")
    exact = run(TINY[name], weights(name), *row())[:, :19]
    near = run(cfg, weights(name), *row())[:, :19]
    assert near.dtype == jnp.float32
    # 8 bits in each of a dozen products in a row, relative to the size of the outputs.
    assert 0 < jnp.abs(near - exact).max() < 0.05 * jnp.abs(exact).max()


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient():
    def loss(params: Any, remat: str) -> jax.Array:
        cfg = dataclasses.replace(TINY["miniflux"], remat=remat)
        return jnp.square(DiT(cfg).apply({"params": params}, *row())).sum()

    gradient = jit(jax.grad(loss), static_argnums=1)
    stored, again = (
        gradient(weights("miniflux"), remat) for remat in ("products", "nothing")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        stored,
        again,
    )


# ------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("name", "count"), [("mmdit", 2_028_334_144), ("miniflux", 1_972_059_200)]
)
def test_released_variants_have_their_published_number_of_weights(name, count):
    shapes = jax.eval_shape(partial(initialise_dit, VARIANTS[name]), KEY)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    "wrong", [{"width": 1537}, {"rope_axes": (16, 24)}, {"heads": 12}]
)
def test_heads_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="must equal the sum of rope_axes"):
        DiTConfig(**wrong)
