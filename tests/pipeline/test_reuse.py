# SPDX-License-Identifier: Apache-2.0
"""The memory of reuse: what stages remember is counted, and fits."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from pyramid_jax import sharding
from pyramid_jax.model import empty_memory
from pyramid_jax.pipeline import memory
from pyramid_jax.pipeline.memory import SAMPLING
from pyramid_jax.pipeline.prompts import LIMIT
from pyramid_jax.shapes import Text
from pyramid_jax.units import Unit
from tests.pipeline.test_memory import CFG, OPTIONS, WORK, networks, phase, size


def test_what_stages_remember_is_counted_as_it_is_made():
    """Keys and values of all blocks and steps; masks are small."""
    stages = range(len(CFG.stages))
    room = [OPTIONS.plan(CFG, tuple(stages)).room(WORK.shape, k) for k in stages]
    text = Text(
        jnp.zeros((1, LIMIT, CFG.dit.text_width)),
        jnp.zeros((1, LIMIT), jnp.int32),
        jnp.zeros((1, 1, CFG.dit.pooled_width)),
    )
    for k in stages:
        made = jax.eval_shape(lambda k=k: empty_memory(CFG, text, room[k]).blocks)
        steps = len(OPTIONS.plan(CFG).sigmas(k, Unit(1, 2)))
        assert memory.remembered(CFG, WORK, k) == steps * size(made) > 0
    before, after = phase(SAMPLING), phase(SAMPLING, reuse=(0, 1))
    kept = sum(memory.remembered(CFG, WORK, k) for k in (0, 1))
    assert after.state - before.state == WORK.rows * kept


def test_devices_divide_what_stages_remember_by_heads():
    mesh = sharding.device_mesh(data=1, context=2, devices=jax.devices()[:2])
    alone, shared = (memory.remembered(CFG, WORK, 0, m) for m in (None, mesh))
    heads = CFG.dit.heads
    assert shared * heads == alone * -(-heads // 2)


def test_stages_whose_keys_and_values_do_not_fit_are_left_out(monkeypatch):
    """First the finest; a short video has nothing to reuse at some stages."""
    chosen = partial(memory.reusing_stages, networks(), WORK, None)
    every = tuple(range(len(CFG.stages)))
    assert chosen(math.inf) == every
    total = phase(SAMPLING, reuse=every[:-1]).total
    assert chosen(total) == every[:-1]
    assert chosen(phase(SAMPLING).total) == ()
    monkeypatch.setattr(memory, "host_memory", lambda: 2 * total)
    assert chosen(None) == every[:-1]  # on a CPU
    without = WORK._replace(options=replace(OPTIONS, reuse=False))
    assert memory.reusing_stages(networks(), without, None, math.inf) == ()
    short = WORK._replace(shape=(3, *WORK.shape[1:]))
    assert [memory.remembered(CFG, short, k) > 0 for k in (0, 1)] == [True, False]


def test_a_sequence_has_no_later_steps():
    """All its frames are the first unit, whose steps are few here."""
    layout = replace(CFG.layout, history="none")
    alone = networks()._replace(cfg=replace(CFG, layout=layout))
    plans = (memory.memory_plan(parts, WORK) for parts in (networks(), alone))
    of_steps = [p.state for plan in plans for p in plan.phases if p.name == SAMPLING]
    later = sum(OPTIONS.video_steps) * WORK.rows * memory.modulation(CFG.dit)
    assert of_steps[0] - of_steps[1] == later
