# SPDX-License-Identifier: Apache-2.0
"""A clean history: read at time 0, so that nothing made of it depends on the step."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.models.cache import empty_cache
from pyramid_jax.models.dit import DiT
from pyramid_jax.shapes import Tokens
from tests.models.test_dit import (
    CELLS,
    FRAME,
    FRAMES,
    SEGMENT,
    TINY,
    WORDS,
    jit,
    no_words,
    row,
    run,
    said,
    sampled,
    weights,
)

VARIANTS = [pytest.param("mmdit", marks=pytest.mark.slow), "miniflux"]
EARLY, LATE = (jnp.full((2, 1), time) for time in (20.0, 300.0))


@pytest.mark.parametrize("name", VARIANTS)
def test_history_is_the_same_at_every_step_and_is_read_once(name):
    """Also in the next unit, which adds a frame and forgets the rest of the history."""
    cfg = dataclasses.replace(TINY[name], clean_history=True)
    params, text = {"params": weights(name)}, said()
    whole = jit(partial(DiT(cfg).apply, params, last=CELLS))

    @partial(jit, static_argnums=4)
    def on(tokens: Tokens, time: Any, text: Any, cache: Any, first: int) -> Any:
        how = partial(DiT(cfg).apply, params, method="continued", first=first)
        return how(tokens, time, text, CELLS, cache)

    tokens, empty = sampled(slice(0, 3)), empty_cache(cfg, 2, WORDS + FRAMES * CELLS)
    current = Tokens(*(part[:, -CELLS:] for part in tokens))
    late, cache = on(tokens, LATE, text, empty, CELLS)
    other = tokens._replace(values=tokens.values.at[:, -CELLS:].add(1.0))
    _, same = on(other, EARLY, text, empty, CELLS)
    jax.tree.map(np.testing.assert_array_equal, same, cache)
    early, same = on(current, EARLY, no_words(text), cache, 0)
    jax.tree.map(np.testing.assert_array_equal, same, cache)
    np.testing.assert_allclose(late, whole(tokens, LATE, text), rtol=0, atol=1e-5)
    np.testing.assert_allclose(early, whole(tokens, EARLY, text), rtol=0, atol=1e-5)

    assert int(cache.taken) == WORDS + CELLS  # the second frame is read again
    answer, cache = on(sampled(slice(1, 4)), LATE, no_words(text), cache, CELLS)
    exact = whole(sampled(slice(0, 4)), LATE, text)
    np.testing.assert_allclose(answer, exact, rtol=0, atol=1e-5)
    assert int(cache.taken) == WORDS + 2 * CELLS


@pytest.mark.slow
def test_without_it_the_history_depends_on_the_step():
    """So that the law above is one of the switch."""
    cfg, params = TINY["miniflux"], {"params": weights("miniflux")}
    rest = sampled(slice(0, 3)), said(), empty_cache(cfg, 2, WORDS + FRAMES * CELLS)

    @jit
    def on(time: jax.Array) -> jax.Array:
        tokens, text, cache = rest
        how = partial(DiT(cfg).apply, params, method="continued", first=CELLS)
        return how(tokens, time, text, CELLS, cache)[1].blocks["single"].keys

    assert jnp.abs(on(LATE) - on(EARLY)).max() > 1e-3


def test_packed_rows_say_which_tokens_are_current():
    """Those of the last frame of each segment, answered as in a row of their own."""
    cfg = dataclasses.replace(TINY["miniflux"], clean_history=True)
    tokens, time, text = row()
    newest = np.array([2, 1, 0, -1])[SEGMENT]  # by the segment, -1 last
    current = jnp.asarray(newest == FRAME)
    params = {"params": weights("miniflux")}
    packed = jit(DiT(cfg).apply)(params, tokens, time, text, current=current)
    mine = SEGMENT[0] == 0
    alone = Tokens(*(part[:, mine] for part in tokens))
    prompt = text._replace(
        segment=jnp.where(text.segment == 0, 0, -1), pooled=text.pooled[:, :1]
    )
    found = jit(partial(DiT(cfg).apply, last=4))(params, alone, time[:, :1], prompt)
    np.testing.assert_allclose(packed[:, 8:12], found, rtol=0, atol=1e-5)


def test_who_is_current_must_be_known_and_the_future_hidden():
    cfg = dataclasses.replace(TINY["miniflux"], clean_history=True)
    with pytest.raises(ValueError, match="clean_history has to know"):
        run(cfg, weights("miniflux"), *row())
    with pytest.raises(ValueError, match="clean_history needs causal"):
        dataclasses.replace(cfg, causal=False)
