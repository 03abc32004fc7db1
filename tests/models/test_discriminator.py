# SPDX-License-Identifier: Apache-2.0
"""The judges of single frames and of clips."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pyramid_jax.checkpoint import loss_tables, rename, tensors
from pyramid_jax.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    initialise_discriminator,
)
from pyramid_jax.models.layers import layer_norm
from pyramid_jax.sharding import unbox
from tests.released import tensor_shapes

SMALL = {
    kind: DiscriminatorConfig(kind=kind, width=4, layers=2) for kind in ("2d", "3d")
}
VIDEO = jax.random.normal(jax.random.key(1), (2, 10, 16, 24, 3))


def judged(cfg: DiscriminatorConfig, params: Any, video: jax.Array) -> jax.Array:
    return Discriminator(cfg).apply({"params": params}, video)


@lru_cache
def weights(cfg: DiscriminatorConfig) -> Any:
    """Weights whose differences can be seen in the logits."""
    params = unbox(
        jax.jit(lambda key: initialise_discriminator(cfg, key))(jax.random.key(0))
    )
    return jax.tree.map(lambda x: 10 * x + 0.1, params)


def test_a_2d_discriminator_judges_every_frame_alone():
    params = weights(SMALL["2d"])
    run = jax.jit(lambda video: judged(SMALL["2d"], params, video))
    logits = run(VIDEO)
    assert logits.shape == (2, 10, 2, 4)
    other = run(VIDEO.at[:, 3].multiply(-1))
    changed = np.abs(logits - other).max(axis=(0, 2, 3)) > 1e-6
    assert changed.tolist() == [frame == 3 for frame in range(10)]


def test_a_3d_discriminator_sees_the_order_of_frames():
    params = weights(SMALL["3d"])
    run = jax.jit(lambda video: judged(SMALL["3d"], params, video))
    logits = run(VIDEO)
    assert logits.shape == (2, 2, 2, 4)
    assert np.abs(logits - run(VIDEO[:, ::-1])[:, ::-1]).max() > 1e-3


@pytest.mark.parametrize("shape", [(2, 5, 6, 3), (2, 4, 5, 6, 3)])
def test_instance_norm_makes_every_channel_of_every_example_standard(shape):
    """Up to the eps in the root, which unit variance shows as 5e-6."""
    x = 3 * jax.random.normal(jax.random.key(2), shape) + 1
    axes = tuple(range(1, len(shape) - 1))
    y = layer_norm(x, 1e-5, axes)
    np.testing.assert_allclose(y.mean(axis=axes), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(axis=axes), 1, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "parameters", "some"),
    [
        ("2d", 6_959_553, {"main.11.weight": (512, 512, 4, 4)}),
        ("3d", 27_833_793, {"main.14.weight": (1, 512, 4, 4, 4)}),
    ],
)
def test_the_full_discriminator_has_the_originals_tensors(kind, parameters, some):
    cfg = DiscriminatorConfig(kind=kind)
    abstract = jax.eval_shape(
        lambda key: initialise_discriminator(cfg, key), jax.random.key(0)
    )
    table = loss_tables.discriminator_table(len(cfg.strides), kind)
    shapes = tensor_shapes(table, abstract)
    assert sum(map(np.prod, shapes.values())) == parameters
    numbers = [int(key.split(".")[1]) for key in shapes if key.endswith("weight")]
    assert numbers == [0, 2, 5, 8, 11, 14]
    assert {key: shapes[key] for key in some} == some


@pytest.mark.parametrize("kind", SMALL)
def test_converting_and_exporting_gives_back_every_bit(tmp_path, kind):
    params = weights(SMALL[kind])
    table = loss_tables.discriminator_table(len(SMALL[kind].strides), kind)
    save_file(
        dict(rename.export_tensors(params, table)), tmp_path / "weights.safetensors"
    )
    back = rename.convert_tensors(tensors.read_tensors(tmp_path), table, params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("kind", SMALL)
def test_the_smallest_video_gives_one_logit_per_frame_or_clip(kind):
    cfg = SMALL[kind]
    video = jax.ShapeDtypeStruct((1, *cfg.smallest, 3), jnp.float32)
    params = jax.eval_shape(
        lambda key: unbox(initialise_discriminator(cfg, key)), jax.random.key(0)
    )
    logits = jax.eval_shape(lambda p, x: judged(cfg, p, x), params, video)
    assert logits.shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "shape", "problem"),
    [
        ("3d", (1, 1, 16, 16, 3), "1 frames are too few .* at least 8, or a '2d' one"),
        ("2d", (1, 1, 16, 8, 3), "8 columns are too few .* at least 12"),
        ("2d", (1, 1, 16, 16, 4), "4 channels, .* takes 3"),
    ],
)
def test_a_video_that_does_not_fit_is_refused(kind, shape, problem):
    with pytest.raises(ValueError, match=problem):
        judged(SMALL[kind], {}, jnp.zeros(shape))


@pytest.mark.parametrize("changed", [{"kind": "4d"}, {"layers": 0}])
def test_a_setting_out_of_range_is_named(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        DiscriminatorConfig(**changed)
