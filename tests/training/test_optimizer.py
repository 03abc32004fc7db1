# SPDX-License-Identifier: Apache-2.0
"""The learning rate's values, and which weights the optimizer changes how."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from pyramid_jax import sharding
from pyramid_jax.models.dit import DiTConfig, initialise_dit
from pyramid_jax.models.vae import VAEConfig, initialise_vae
from pyramid_jax.training.optimizer import (
    OptimizerConfig,
    decays,
    learning_rate,
    matrices,
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
        ({"kind": "sgd"}, "must be one of"),
        ({"schedule": "linear"}, "must be one of"),
        ({"learning_rate": 0.0}, "positive"),
        ({"clip": -1.0}, "None does not clip"),
        ({"warmup_steps": 11, "steps": 10}, "shorten the warm-up"),
    ],
)
def test_an_impossible_optimizer_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**wrong)


def _boxed_dit():
    """Weights of a small transformer, in boxes that name their axes."""
    cfg = DiTConfig(
        width=16, heads=2, double_blocks=2, single_blocks=2, patch_values=4,
        text_width=8, pooled_width=8, rope_axes=(8,),
        position_table=4, position_table_base=4,
    )  # fmt: skip
    return jax.eval_shape(partial(initialise_dit, cfg), jax.random.key(0))


def test_weights_decay_if_one_layer_has_two_axes_or_more_and_they_are_no_bias():
    boxed = _boxed_dit()
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


def test_muon_knows_the_matrices_of_every_kernel():
    """By what the networks say of their axes: a stack's is named "layers"."""
    vae = VAEConfig(
        3, 2, (4, 8), (4, 8), (1, 1), (1, 1), (True, False), (True, False), 2
    )
    shapes = jax.eval_shape(partial(initialise_vae, vae), jax.random.key(0))
    boxes = _boxed_dit() | shapes
    flat = flatten_dict(matrices(sharding.unbox(boxes)))
    names = flatten_dict(boxes, is_leaf=lambda _, x: isinstance(x, sharding.Named))
    for path, box in names.items():
        if path[-1] != "kernel" or (*path[:-1], "bias") not in names:
            assert flat[path] is None
            continue
        bias = names[*path[:-1], "bias"]
        stacked = int(box.names[0] == "layers")
        inputs = box.value.ndim - bias.value.ndim
        assert flat[path].reduction_axis == tuple(range(stacked, stacked + inputs))
        outputs = tuple(range(stacked + inputs, box.value.ndim))
        assert flat[path].output_axis == outputs


def test_muon_makes_updates_orthogonal_and_leaves_biases_to_adamw():
    random = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(random.normal(size=(3, 8, 4)), jnp.float32),  # a stack
        "bias": jnp.zeros((3, 4)),
    }
    slope = jax.tree.map(lambda x: random.normal(size=x.shape).astype("f4"), params)
    cfg = OptimizerConfig("muon", 0.1, warmup_steps=0, weight_decay=0.0, clip=None)
    rule = optimizer(cfg, params)
    with jax.numpy_dtype_promotion("standard"):
        change, _ = rule.update(slope, rule.init(params), params)
    for matrix in np.asarray(change["kernel"]):
        values = np.linalg.svd(matrix)[1] / (0.1 * 0.2 * np.sqrt(8))
        assert 0.6 < values.min() < values.max() < 1.3
    # AdamW's first step is as long for any gradient; Nesterov's momentum lengthens it.
    ahead = 0.9 * (1 - 0.9) / (1 - 0.9**2) + 1.0
    np.testing.assert_allclose(abs(change["bias"]), 0.1 * ahead, rtol=1e-3)
    np.testing.assert_array_equal(np.sign(change["bias"]), -np.sign(slope["bias"]))


def test_muon_has_to_know_the_weights():
    with pytest.raises(ValueError, match='"muon" trains the DiT only; use "adamw"'):
        optimizer(OptimizerConfig("muon"))
