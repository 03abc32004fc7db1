# SPDX-License-Identifier: Apache-2.0
"""What processes that share a mesh train, to be compared with one that trains alone."""

import itertools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store
from pyramid_jax.training.loop import LoopConfig, train_loop
from pyramid_jax.training.metrics import Means, Metrics
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.state import Init, TrainState, abstract_state, create_state
from pyramid_jax.training.step import StepConfig, train_step

KEY = jax.random.key(0)
RATE = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, steps=10)


class Network(NamedTuple):
    """What is trained, and two batches of all processes."""

    init: Init
    loss: Callable[..., Any]
    batches: list[Any]


def small() -> Network:
    """Two layers whose weights and tokens every axis of the mesh divides."""

    def init(key: jax.Array) -> Any:
        normal = jax.nn.initializers.normal()
        up, down = (
            sharding.named(normal, x) for x in (("embed", "mlp"), ("mlp", None))
        )
        return {"kernel": up(key, (8, 16)), "table": down(key, (16, 8))}

    def loss(params: Any, x: jax.Array, key: jax.Array, step: Any) -> Any:
        x = sharding.constrain(x, ("batch", "tokens", None))
        noisy = x + jax.random.normal(key, x.shape)
        hidden = jnp.tanh(noisy @ params["kernel"])
        hidden = sharding.constrain(hidden, ("batch", "tokens", "mlp"))
        y = hidden @ params["table"]
        error = jnp.square(y - x.mean(axis=1, keepdims=True)).mean()
        return error, Means({}, jnp.float32(len(x)))

    random = np.random.default_rng(0)
    rows = random.normal(size=(2, 8, 4, 8)).astype(np.float32)
    return Network(init, loss, list(rows))


def transformer() -> Network:
    """The tiny DiT of the tests of layouts."""
    from tests import test_sharding as dit

    def loss(params: Any, rows: Any, key: jax.Array, step: Any) -> Any:
        return dit.loss(params, rows, key)

    batch = dit.rows()
    return Network(dit.init, loss, [batch, jax.tree.map(lambda x: x[::-1], batch)])


def meshes(names: Collection[str] = ()) -> Iterator[tuple[str, Mesh]]:
    """Every axis, and every pair of axes, over four devices of two or four processes.

    The devices of two processes cross over, so that both axes of a pair span them.

    Args:
        names: such as "data-context"; empty: all.
    """
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    assert len(devices) == 4 and jax.process_count() in (2, 4)
    if jax.process_count() == 2:
        devices = [devices[i] for i in (0, 2, 3, 1)]
    sizes = [{axis: 4} for axis in sharding.MESH_AXES]
    sizes += [
        dict.fromkeys(x, 2) for x in itertools.combinations(sharding.MESH_AXES, 2)
    ]
    for size in sizes:
        if names and "-".join(size) not in names:
            continue
        mesh = sharding.device_mesh(**{"data": 1} | size, devices=devices)
        owner = np.vectorize(lambda device: device.process_index)(mesh.devices)
        for axis in size:  # it does span them
            first = owner.take([0], sharding.MESH_AXES.index(axis))
            assert (owner != first).any()
        yield "-".join(size), mesh


def two_steps(network: Network, mesh: Mesh) -> tuple[TrainState, list[float]]:
    """The state on the host, and losses and norms; every process feeds its own rows."""
    rule = optimizer(RATE)
    like = abstract_state(network.init, rule, mesh)
    state = create_state(KEY, network.init, rule, mesh)
    cfg, losses = StepConfig(ema_decay=0.5), []
    step = train_step(network.loss, rule, learning_rate(RATE), cfg, like)
    with jax.set_mesh(mesh):
        for batch in network.batches:
            rows = sharding.own_rows(len(jax.tree.leaves(batch)[0]), mesh)
            own = jax.tree.map(lambda x, rows=rows: x[rows], batch)
            state, report = step(state, sharding.global_batch(own, mesh), KEY)
            losses += [float(report.loss), float(report.gradient_norm)]
    return sharding.to_host(state), losses


class Numbered(Iterator[np.ndarray]):
    """This process's rows of random batches, which depend on their number alone.

    Args:
        at: called with the number of each batch before it is made.
    """

    def __init__(self, mesh: Mesh, at: Callable[[int], None]):
        self.number, self._at = 0, at
        self._rows = sharding.own_rows(8, mesh)

    def __next__(self) -> np.ndarray:
        self.number += 1
        self._at(self.number)
        random = np.random.default_rng(self.number)
        return random.normal(size=(8, 4, 8)).astype(np.float32)[self._rows]

    def get_state(self) -> dict[str, int]:
        return {str(row): self.number for row in self._rows}

    def set_state(self, state: dict[str, int]) -> None:
        (self.number,) = {state[str(row)] for row in self._rows}


class NoMetrics(Metrics):
    """Metrics that nobody reads."""

    def __init__(self):
        pass

    def write(self, step: int, values: Any) -> None:
        pass


def trained(
    folder: str | Path, steps: int, at: Callable[[int], None] = lambda number: None
) -> TrainState:
    """Begins or continues a run on all devices, saved every 5 steps, never logged."""
    network, rule, key = small(), optimizer(RATE), jax.random.key(1)
    mesh = sharding.device_mesh(data=1, tensor=-1)
    like = abstract_state(network.init, rule, mesh)
    step = train_step(network.loss, rule, learning_rate(RATE), StepConfig(), like)
    cfg = LoopConfig(steps=steps, log_every=1000, save_every=5)
    rows = Numbered(mesh, at)
    with Store(folder, {"seed": 0}) as store:
        if store.latest() is None:
            state = create_state(KEY, network.init, rule, mesh)
        else:
            state = store.restore(like, rows)
        print("begins at", int(state.step), flush=True)
        state = train_loop(
            cfg, step, state, rows, key, store=store, metrics=NoMetrics()
        )
        print("ends at", int(state.step), flush=True)
        return state
