# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back bit for bit, on any mesh, and only for their own config."""

import resource
import shutil
import signal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store

CONFIG = {"model": {"width": 8, "axes": (4, 4)}, "seed": 0}


class State(NamedTuple):
    """A stand-in for the training state: counters and trees."""

    step: Any
    params: Any
    ema: Any
    optimizer: Any


class Count:
    """A data iterator: 0, 1, 2, ..."""

    def __init__(self):
        self.at = 0

    def __next__(self) -> int:
        self.at += 1
        return self.at - 1

    def get_state(self) -> dict[str, Any]:
        return {"at": self.at}

    def set_state(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def state(key: int, fsdp: int = 4, tensor: int = 2) -> State:
    """A state with random arrays, Adam moments included, spread over eight devices."""
    mesh = sharding.device_mesh(fsdp=fsdp, tensor=tensor)
    init = sharding.named(jax.nn.initializers.normal(), ("embed", "mlp"))

    def build(key: jax.Array) -> State:
        params = {"a": {"kernel": init(key, (16, 8), jnp.float32)}}
        optimizer = optax.adamw(
            1e-3, mask=lambda tree: jax.tree.map(lambda _: True, tree)
        )
        moments = jax.tree.map(lambda x: x + 1, optimizer.init(params))
        return State(jnp.int32(7), params, jax.tree.map(jnp.square, params), moments)

    placement = sharding.shardings(jax.eval_shape(build, jax.random.key(0)), mesh)
    make = jax.jit(lambda key: sharding.unbox(build(key)), out_shardings=placement)
    return make(jax.random.key(key))


def large_state(key: int) -> State:
    """A state of a megabyte that can't be compressed."""
    params = {"a": jax.random.normal(jax.random.key(key), (512, 512))}
    return State(jnp.int32(key), params, params, {"b": jnp.zeros(3)})


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_state_saved_on_one_mesh_is_restored_bit_for_bit_on_another(tmp_path):
    saved, like = state(0), state(1, fsdp=2, tensor=4)
    with Store(tmp_path, CONFIG) as store:
        store.save(7, saved)
    with Store(tmp_path, CONFIG) as store:
        restored = store.restore(like)
    assert_equal(saved, restored)
    assert jax.tree.all(
        jax.tree.map(lambda x, y: x.sharding == y.sharding, like, restored)
    )
    kernel = restored.optimizer[0].mu["a"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 2)


def test_the_data_goes_on_where_it_was(tmp_path):
    data, fresh = Count(), Count()
    for _ in range(3):
        next(data)
    with Store(tmp_path, CONFIG) as store:
        store.save(3, state(0), data)
        next(data)
        store.restore(state(1), fresh)
    assert next(fresh) == 3


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with Store(tmp_path, CONFIG, keep=2) as store:
        assert store.latest() is None
        for step in (1, 2, 3):
            store.save(step, state(step))
        assert store.latest() == 3
    with Store(tmp_path, CONFIG) as store:
        assert_equal(store.restore(state(0)), state(3))
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def test_a_checkpoint_of_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    with Store(tmp_path, CONFIG) as store:
        store.save(1, state(0))
    other = {"model": {"width": 16, "axes": [4, 4]}, "seed": 0, "new": None}
    refused = pytest.raises(ValueError, match="another folder")
    with Store(tmp_path, other) as store, refused as raised:
        store.restore(state(0))
    message = str(raised.value)
    assert "model.width is 8 there, 16 here" in message
    assert "new is 'missing' there, None here" in message
    assert "axes" not in message and "seed" not in message


def test_a_damaged_checkpoint_is_set_aside_for_the_newest_whole_one(tmp_path, caplog):
    with Store(tmp_path, CONFIG, keep=4) as store:
        for step in (1, 2, 3, 4):
            store.save(step, state(step))
    shutil.rmtree(tmp_path / "4" / "params")
    for file in (tmp_path / "3").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:9])
    data = Count()
    with Store(tmp_path, CONFIG, keep=4) as store:
        assert_equal(store.restore(state(0)), state(2))
        assert store.latest() == 2
        store.save(3, state(5), data)
    assert "4 is damaged" in caplog.text and "3 is damaged" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {
        *("1", "2", "3", "3.damaged", "4.damaged")
    }
    with Store(tmp_path, CONFIG, keep=4) as store:
        assert_equal(store.restore(state(0), data), state(5))


def test_a_failing_save_is_told_and_earlier_checkpoints_stay(tmp_path):
    """Files may not grow beyond some bytes, as on a full disk."""
    limit, unlimited = resource.RLIMIT_FSIZE, resource.RLIM_INFINITY
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Store(tmp_path, CONFIG) as store:
        store.save(1, large_state(1))
        store.save(2, large_state(2))
    refused = pytest.raises(ValueError, match=r"could not be written.* is of step 2")
    try:
        resource.setrlimit(limit, (30_000, unlimited))
        with refused, Store(tmp_path, CONFIG) as store:
            store.save(3, large_state(3))
    finally:
        resource.setrlimit(limit, (unlimited, unlimited))
        signal.signal(signal.SIGXFSZ, before)
    with Store(tmp_path, CONFIG) as store:
        assert store.latest() == 2
        store.save(4, large_state(4))
        assert_equal(store.restore(large_state(0)), large_state(4))


def test_without_a_whole_checkpoint_nothing_is_renamed(tmp_path):
    with Store(tmp_path, CONFIG) as store:
        store.save(1, state(0))
    shutil.rmtree(tmp_path / "1" / "ema")
    with Store(tmp_path, CONFIG) as store:
        with pytest.raises(ValueError, match=r"no checkpoint that is whole.*1 is dam"):
            store.restore(state(0))
        assert store.latest() == 1


def test_a_folder_without_checkpoints_says_so(tmp_path):
    refused = pytest.raises(ValueError, match="holds no checkpoint that is whole")
    with Store(tmp_path, CONFIG) as store, refused:
        store.restore(state(0))
