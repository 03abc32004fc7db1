# SPDX-License-Identifier: Apache-2.0
"""JAX's 64-bit mode, which other code in a notebook may have set, changes nothing."""

import re
from functools import partial

import jax
import numpy as np
import pytest

import pyramid_jax
from configs import tiny
from pyramid_jax import model, sharding
from pyramid_jax.pipeline.video import load
from pyramid_jax.shapes import Rows
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.state import abstract_state
from pyramid_jax.training.step import StepConfig, train_step

IMAGE = np.full((64, 64, 3), (200, 30, 40), np.uint8)


@pytest.mark.slow  # compiles every program of sampling twice
@pytest.mark.parametrize("image", [IMAGE, None])
def test_videos_are_the_same(image: np.ndarray | None):
    pipeline = load(pyramid_jax.PAIRS)
    choices = {"num_inference_steps": 2, "video_num_inference_steps": 2, "seed": 3}
    make = partial(pipeline, "a red circle", image=image, num_frames=5, **choices)
    narrow = make()
    with jax.enable_x64(True):
        wide = make()
    np.testing.assert_array_equal(narrow.frames, wide.frames)


def test_a_training_step_has_no_wide_numbers():
    cfg = model.model_config(tiny.get_config("smoke").model.to_dict())
    rates = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, steps=2)
    mesh = sharding.device_mesh(devices=jax.devices()[:1])
    b, n, p, s, m = 2, 8, cfg.dit.patch_values, 2, 4
    whole, real = partial(jax.ShapeDtypeStruct, dtype=np.int32), np.float32
    rows = Rows(
        clean=jax.ShapeDtypeStruct((b, n, p), real),
        coarser=jax.ShapeDtypeStruct((b, n, p), real),
        position=jax.ShapeDtypeStruct((b, n, 3), real),
        segment=whole((b, n)),
        frame=whole((b, n)),
        current=jax.ShapeDtypeStruct((b, n), np.bool_),
        stage=whole((b, s)),
        text=whole((b, m)),
        text_segment=whole((b, m)),
        pooled=jax.ShapeDtypeStruct((b, s, 0), real),
    )
    with jax.enable_x64(True), jax.set_mesh(mesh):
        method = optimizer(rates)
        like = abstract_state(partial(model.initialise, cfg), method, mesh)
        loss = partial(model.training_loss, cfg)
        step = StepConfig(accumulate=2)
        step = train_step(loss, method, learning_rate(rates), step, like)
        program = str(jax.make_jaxpr(step)(like, rows, jax.random.key(0)))
    assert len(program) > 10_000
    assert not re.findall(r"f64\[\d[^\]]*\]", program)  # scalars of Python are
