# SPDX-License-Identifier: Apache-2.0
"""The memory of reuse: what stages remember is counted, and fits."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from pyramid_jax import sharding
from pyramid_jax.model import empty_memory
from pyramid_jax.pipeline import memory
from pyramid_jax.pipeline.memory import SAMPLING
from pyramid_jax.pipeline.prompts import LIMIT
from pyramid_jax.sampler import Unit
from pyramid_jax.shapes import Text
from tests.pipeline.test_memory import CFG, NETWORKS, OPTIONS, WORK, phase, size

REUSING = replace(OPTIONS, reuse=True)


def test_what_stages_remember_is_counted_as_it_is_made():
    """Keys and values of all blocks and steps; masks are small."""
    work, stages = WORK._replace(options=REUSING), range(len(CFG.stages))
    room = [REUSING.plan(CFG, tuple(stages)).room(work.shape, k) for k in stages]
    text = Text(
        jnp.zeros((1, LIMIT, CFG.dit.text_width)),
        jnp.zeros((1, LIMIT), jnp.int32),
        jnp.zeros((1, 1, CFG.dit.pooled_width)),
    )
    for k in stages:
        made = jax.eval_shape(lambda k=k: empty_memory(CFG, text, room[k]).blocks)
        steps = len(REUSING.plan(CFG).sigmas(k, Unit(1, 2)))
        assert memory.remembered(CFG, work, k) == steps * size(made) > 0
    before, after = phase(SAMPLING), phase(SAMPLING, options=REUSING, reuse=(0, 1))
    kept = sum(memory.remembered(CFG, work, k) for k in (0, 1))
    assert after.state - before.state == work.rows * kept


def test_devices_divide_what_stages_remember_by_heads():
    mesh = sharding.device_mesh(data=1, context=2, devices=jax.devices()[:2])
    work = WORK._replace(options=REUSING)
    alone, shared = (memory.remembered(CFG, work, 0, m) for m in (None, mesh))
    heads = CFG.dit.heads
    assert shared * heads == alone * -(-heads // 2)


def test_stages_whose_keys_and_values_do_not_fit_are_left_out():
    """First the finest; a short video has nothing to reuse at some stages."""
    work = WORK._replace(options=REUSING)
    chosen = partial(memory.reusing_stages, NETWORKS, work, None)
    every = tuple(range(len(CFG.stages)))
    assert chosen(None) == every
    total = phase(SAMPLING, options=REUSING, reuse=every[:-1]).total
    assert chosen(total) == every[:-1]
    assert chosen(phase(SAMPLING).total) == ()
    assert memory.reusing_stages(NETWORKS, WORK, None, None) == ()
    short = work._replace(shape=(3, *work.shape[1:]))
    assert [memory.remembered(CFG, short, k) > 0 for k in (0, 1)] == [True, False]
