# SPDX-License-Identifier: Apache-2.0
"""Weights that wait on the host: where they are before, while and after their use."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.training.metrics import Means
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.state import abstract_state, create_state, with_moments
from pyramid_jax.training.step import StepConfig, train_step

KEY = jax.random.key(0)


def on_devices(x: jax.Array) -> bool:
    return x.sharding.memory_kind == sharding.DEVICE


@pytest.fixture
def tree() -> dict:
    """A weight that two devices share, and one that is on the first device."""
    mesh = sharding.device_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    shared = sharding.place((4, 3), ("embed", None), mesh)
    return {
        "shared": jax.device_put(np.arange(12.0).reshape(4, 3), shared),
        "whole": jnp.ones(5, jnp.bfloat16),
    }


def test_parked_weights_are_the_same_and_know_their_devices(tree: dict):
    parked = sharding.parked(tree)
    for before, after in zip(tree.values(), parked.values(), strict=True):
        assert sharding.is_parked(after) and not sharding.is_parked(before)
        assert after.sharding.device_set == before.sharding.device_set
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def test_they_are_on_their_devices_as_long_as_they_are_used(tree: dict):
    parked = sharding.parked(tree)
    with sharding.present(parked) as there:
        assert all(map(on_devices, there.values()))
        assert there["shared"].sharding == tree["shared"].sharding
        assert there["whole"].dtype == jnp.bfloat16
        made = jax.jit(lambda x: x["shared"].sum())(there)
    assert made == 66
    assert all(x.is_deleted() for x in there.values())
    assert not any(x.is_deleted() for x in parked.values())


def test_they_leave_the_devices_when_their_use_fails(tree: dict):
    with (
        pytest.raises(ZeroDivisionError),
        sharding.present(sharding.parked(tree)) as there,
    ):
        raise ZeroDivisionError
    assert all(x.is_deleted() for x in there.values())


def test_weights_that_are_on_devices_stay_there(tree: dict):
    with sharding.present(tree) as there:
        assert there["shared"] is tree["shared"]
    assert not any(x.is_deleted() for x in tree.values())


def test_steps_whose_moments_wait_on_the_host_are_the_same():
    mesh, key = sharding.device_mesh(data=1, fsdp=2, devices=jax.devices()[:2]), KEY
    rates = OptimizerConfig(warmup_steps=0)

    def init(key: jax.Array) -> Any:
        kernel = sharding.named(jax.nn.initializers.normal(), ("embed", None))
        return {"kernel": kernel(key, (4, 3))}

    def loss(params: Any, batch: jax.Array, key: jax.Array, step: Any) -> Any:
        return jnp.square(batch @ params["kernel"]).sum(), Means({}, jnp.float32(1))

    def trained(place: str) -> Any:
        rule = optimizer(rates)
        like = with_moments(abstract_state(init, rule, mesh), place)
        how = StepConfig(moments=place)
        step = train_step(loss, rule, learning_rate(rates), how, like)
        state = with_moments(create_state(key, init, rule, mesh), place)
        for _ in range(2):
            waiting = sharding.is_parked(state.optimizer[1][0].nu["kernel"])
            assert waiting == (place == "host")
            with jax.set_mesh(mesh):
                state, _ = step(state, np.ones((2, 4), np.float32), key)
        return state

    states = [trained(place) for place in ("device", "host")]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))
