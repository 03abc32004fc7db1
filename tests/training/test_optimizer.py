# SPDX-License-Identifier: Apache-2.0
"""The learning rate's values, and which weights the optimizer changes how."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pyramid_jax import sharding
from pyramid_jax.models.dit import DiT, DiTConfig
from pyramid_jax.shapes import Text, Tokens
from pyramid_jax.training.optimizer import (
    OptimizerConfig,
    decays,
    learning_rate,
    optimizer,
)


def test_the_warm_up_rises_from_its_start_to_the_rate_both_included():
    cfg = OptimizerConfig(learning_rate=1e-4, warmup_steps=4)
    rates = [float(learning_rate(cfg)(n)) for n in range(6)]
    np.testing.assert_allclose(rates, [1e-6, 3.4e-5, 6.7e-5, 1e-4, 1e-4, 1e-4], 1e-6)


def test_the_cosine_goes_from_the_rate_to_the_final_rate():
    cfg = OptimizerConfig(
        learning_rate=1e-3, schedule="cosine", warmup_steps=2, steps=12, final_rate=1e-4
    )
    rates = [float(learning_rate(cfg)(n)) for n in (2, 7, 12, 20)]
    np.testing.assert_allclose(rates, [1e-3, 5.5e-4, 1e-4, 1e-4], rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "linear"}, "must be one of"),
        ({"learning_rate": 0.0}, "positive"),
        ({"clip": -1.0}, "None does not clip"),
        ({"warmup_steps": 11, "steps": 10}, "shorten the warm-up"),
    ],
)
def test_an_impossible_optimizer_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**wrong)


def test_weights_decay_if_one_layer_has_two_axes_or_more_and_they_are_no_bias():
    cfg = DiTConfig(
        width=16, heads=2, double_blocks=2, single_blocks=1, patch_values=4,
        text_width=8, pooled_width=8, rope_axes=(8,),
        position_table=4, position_table_base=4,
    )  # fmt: skip
    z, i = jnp.zeros, jnp.zeros((1, 1), jnp.int32)
    inputs = (
        Tokens(z((1, 1, 4)), z((1, 1, 3)), i, i),
        z((1, 1)),
        Text(z((1, 1, 8)), i, z((1, 1, 8))),
    )
    boxed = jax.eval_shape(DiT(cfg).init, jax.random.key(0), *inputs)["params"]
    axes = jax.tree.map(
        lambda box: len([n for n in box.names if n != "layers"]),
        boxed,
        is_leaf=lambda x: isinstance(x, sharding.Named),
    )
    leaves = jax.tree_util.tree_leaves_with_path(axes)
    expected = [count > 1 and path[-1].key != "bias" for path, count in leaves]
    assert 0 < sum(expected) < len(expected)
    assert jax.tree.leaves(decays(sharding.unbox(boxed))) == expected
    assert jax.tree.leaves(decays(boxed)) == expected


def test_without_gradient_only_matrices_shrink():
    cfg = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    params = jax.tree.map(jnp.asarray, params)
    rule = optimizer(cfg)
    with jax.numpy_dtype_promotion("standard"):
        zero = jax.tree.map(jnp.zeros_like, params)
        change, _ = rule.update(zero, rule.init(params), params)
    np.testing.assert_allclose(change["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(change["bias"], 0)


def test_the_gradient_is_clipped_by_its_global_norm():
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    big = jax.tree.map(lambda x: jnp.full_like(x, 100.0), params)
    rule = optimizer(OptimizerConfig(clip=1.0))
    with jax.numpy_dtype_promotion("standard"):
        _, moments = rule.update(big, rule.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(moments[1][0].mu), 0.1, rtol=1e-5)
