# SPDX-License-Identifier: Apache-2.0
"""Layouts change where numbers are, never what they are."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pyramid_jax import layout, objective, pyramid, sharding
from pyramid_jax.kernels import exchange
from pyramid_jax.models.dit import DiT, DiTConfig
from pyramid_jax.shapes import Rows, Text, Tokens
from pyramid_jax.training.metrics import Means
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.state import abstract_state, create_state
from pyramid_jax.training.step import StepConfig, gradients, train_step

KEY, DEVICES = jax.random.key(0), jax.devices()
STAGES = pyramid.stages((0.0, 0.5, 1.0))
MODEL = DiTConfig(
    width=32,
    heads=4,
    double_blocks=1,
    single_blocks=1,
    patch_values=16,
    text_width=8,
    pooled_width=8,
    rope_axes=(8,),
    position_table=4,
    position_table_base=4,
    text_ends_early=False,
    remat="products",
)
# perf: compiling is most of these tests' time, running is nothing.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 1, "tensor": 4, "devices": DEVICES[:4]},
    # Neither the tokens nor the heads are a multiple of 3.
    "data-context": {"data": 2, "context": 3, "devices": DEVICES[:6]},
    "fsdp-tensor": {"data": 1, "fsdp": 4, "tensor": 2},
    # Long rows are exchanged in groups of heads.
    "data-groups": {"data": 2, "context": 2, "devices": DEVICES[:4]},
}


def rows(count: int = 8) -> Rows:
    """Rows of two segments: the second unit of a clip at stage 1, and at stage 0."""
    random = np.random.default_rng(0)

    def row() -> list[np.ndarray]:
        latent = random.normal(size=(2, 8, 8, 4)).astype(np.float32)
        levels = pyramid.levels(latent, 2)
        chosen = [layout.compact(layout.clips(stage, 1, slots=2)) for stage in (1, 0)]
        parts = [
            layout.segment(levels, clips, layout.Layout(position_table=4))
            for clips in chosen
        ]
        joined = [np.concatenate(field) for field in zip(*parts, strict=True)]
        clean, coarser, position, frame, current = joined
        segment = np.repeat([0, 1], [len(part.frame) for part in parts])
        words = random.normal(size=(8, 8)).astype(np.float32)
        pooled = random.normal(size=(2, 8)).astype(np.float32)
        return [
            *(clean, coarser, position, segment.astype(np.int32), frame, current),
            *(np.int32([1, 0]), words, np.repeat(np.int32([0, 1]), 4), pooled),
        ]

    return Rows(
        *(np.stack(field) for field in zip(*(row() for _ in range(count)), strict=True))
    )


def init(key: jax.Array) -> Any:
    """Weights of a tiny DiT, none of them zero, so that all have gradients."""
    zeros, none = jnp.zeros, jnp.zeros((1, 2), jnp.int32)
    tokens = Tokens(zeros((1, 2, 16)), zeros((1, 2, 3)), none, none)
    text = Text(zeros((1, 2, 8)), none, zeros((1, 2, 8)))
    boxed = DiT(MODEL).init(key, tokens, zeros((1, 2)), text)["params"]
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), boxed)


def loss(params: Any, batch: Rows, key: jax.Array) -> tuple[jax.Array, Any]:
    def velocity(tokens: Tokens, time: jax.Array, text: Text) -> jax.Array:
        return DiT(MODEL).apply({"params": params}, tokens, time, text)

    text = Text(batch.text, batch.text_segment, batch.pooled)
    draws = objective.draw(key, batch)
    losses = objective.loss(velocity, batch, text, draws, STAGES)
    return losses.loss, losses


@jax.jit(compiler_options=FAST)
def loss_and_gradients(params: Any, batch: Rows) -> tuple[jax.Array, Any, Any]:
    return gradients(loss, params, batch, KEY)


@pytest.fixture(scope="module")
def weights() -> Any:
    """Boxed weights on the host."""
    return jax.device_get(jax.jit(init, compiler_options=FAST)(KEY))


@pytest.fixture(scope="module")
def on_one_device(weights) -> Any:
    return jax.device_get(loss_and_gradients(sharding.unbox(weights), rows()))


def test_the_batch_holds_two_segments_per_row():
    batch = rows()
    assert batch.clean.shape == (8, 40, 16)
    assert batch.current.sum(axis=1).tolist() == [20] * 8


@pytest.mark.parametrize(
    "name",
    [
        name if "-" in name else pytest.param(name, marks=pytest.mark.slow)
        for name in MESHES
    ],
)
def test_many_devices_compute_what_one_computes(
    name, weights, on_one_device, monkeypatch
):
    if "groups" in name:
        monkeypatch.setattr(exchange, "LONG", 0)
    mesh = sharding.device_mesh(**MESHES[name])
    params = jax.device_put(sharding.unbox(weights), sharding.shardings(weights, mesh))
    batch = jax.device_put(rows(), sharding.batch_shardings(rows(), mesh))
    assert len(batch.clean.sharding.device_set) > 1
    with jax.set_mesh(mesh):
        value, losses, gradient = loss_and_gradients(params, batch)

    one_value, one_losses, one_gradient = on_one_device
    np.testing.assert_allclose(value, one_value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5), losses, one_losses
    )
    for (path, many), one in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(one_gradient),
        strict=True,
    ):
        largest = np.abs(one).max()
        assert largest > 0, path
        # float32 sums in another order
        np.testing.assert_allclose(
            many, one, rtol=1e-3, atol=1e-4 * largest, err_msg=path
        )


# ------------------------------------------------------------------------ what travels


def traffic(weights: Any, **sizes: Any) -> dict[str, list[int]]:
    """Values in the result of every collective of a compiled forward pass, by kind."""
    mesh = sharding.device_mesh(data=1, **sizes)
    params = jax.device_put(sharding.unbox(weights), sharding.shardings(weights, mesh))
    with jax.set_mesh(mesh):
        program = jax.jit(loss, compiler_options=FAST).lower(params, rows(2), KEY)
        text = program.compile().as_text()
    found: dict[str, list[int]] = {}
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    for result, kind in re.findall(rf"= (.*?) ({kinds})\(", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        values = sum(math.prod(map(int, x.split(","))) if x else 1 for x in shapes)
        found.setdefault(kind, []).append(values)
    return found


def test_devices_that_share_rows_exchange_heads_and_gather_no_tokens(weights):
    """Queries, keys and values go, what was attended to comes back: 4 times the share
    of a device, in the double and in the single block. Between those, the text and the
    video become one sequence."""
    count, batch = 4, rows(2)
    found = traffic(weights, context=count, devices=DEVICES[:count])
    tokens = batch.text.shape[1] + batch.clean.shape[1]
    share = 2 * tokens * MODEL.width // count
    once = 3 * share
    assert sum(found["all-to-all"]) <= 2 * 4 * share + once
    others = [n for kind, sizes in found.items() if kind != "all-to-all" for n in sizes]
    assert max(others) < share


def test_devices_that_share_heads_add_up_twice_in_a_block(weights):
    """After attention and after the MLP; the single block has one of both."""
    found = traffic(weights, tensor=2, devices=DEVICES[:2])
    batch = rows(2)
    stream = 2 * batch.clean.shape[1] * MODEL.width
    assert sum(n >= stream for n in found["all-reduce"]) <= 3
    assert not [n for n in found.get("all-gather", []) if n >= stream]


# --------------------------------------------------------------------- training state


def linear(key: jax.Array) -> Any:
    """Weights whose dimensions eight devices can divide."""
    kernel = sharding.named(jax.nn.initializers.normal(), ("embed", "mlp"))
    bias = sharding.named(jax.nn.initializers.zeros, ("mlp",))
    return {"kernel": kernel(key, (16, 8)), "bias": bias(key, (8,))}


def test_moments_and_average_of_every_weight_lie_where_the_weight_lies():
    mesh = sharding.device_mesh(data=1, fsdp=4, tensor=2)
    state = abstract_state(init, optimizer(OptimizerConfig()), mesh)
    adam = state.optimizer[1][0]
    where = [
        jax.tree.map(lambda x: x.sharding, tree)
        for tree in (state.params, state.ema, adam.mu, adam.nu)
    ]
    assert all(tree == where[0] for tree in where)
    kernel = where[0]["double"]["video"]["mlp_in"]["kernel"]
    assert kernel.spec == P(None, "fsdp", "tensor")


def test_a_new_state_is_in_parts_on_the_devices_and_stays_so():
    mesh, cfg = sharding.device_mesh(data=2, fsdp=2, tensor=2), OptimizerConfig()
    like = abstract_state(linear, optimizer(cfg), mesh)
    state = create_state(KEY, linear, optimizer(cfg), mesh)

    def error(
        params: Any, batch: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Any]:
        squares = jnp.square(batch @ params["kernel"] + params["bias"][None])
        return squares.mean(), Means({}, jnp.float32(1))

    step = train_step(
        error, optimizer(cfg), learning_rate(cfg), StepConfig(accumulate=2), like
    )
    for _ in range(2):
        for kernel in (state.params["kernel"], state.optimizer[1][0].nu["kernel"]):
            assert kernel.addressable_shards[0].data.shape == (8, 4)
        same = jax.tree.map(
            lambda x, y: (
                (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
            ),
            state,
            like,
        )
        assert jax.tree.all(same)
        with jax.set_mesh(mesh):
            state, _ = step(state, np.ones((8, 16), np.float32), KEY)


def test_states_do_not_depend_on_the_mesh():
    states = [
        create_state(
            KEY, linear, optimizer(OptimizerConfig()), sharding.device_mesh(**sizes)
        )
        for sizes in ({"data": 8}, {"data": 1, "fsdp": 4, "tensor": 2})
    ]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))


def test_a_step_consumes_its_state():
    mesh, cfg = (
        sharding.device_mesh(data=1, devices=jax.devices()[:1]),
        OptimizerConfig(),
    )
    state = create_state(KEY, linear, optimizer(cfg), mesh)
    first, average = state.params["kernel"], state.ema["kernel"]
    step = train_step(
        lambda params, batch, key, step: (params["kernel"].sum(), ()),
        optimizer(cfg),
        learning_rate(cfg),
        StepConfig(),
        state,
    )
    step(state, np.ones((2, 1), np.float32), KEY)
    assert first.is_deleted() and average.is_deleted()


# ------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "needs 3 devices, there are 8; set one size to -1"),
        ({"data": -1, "fsdp": 3}, "needs 6 devices"),
        ({"data": -1, "fsdp": -1}, "at most once"),
        ({"data": 8, "tensor": 0}, "positive"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.device_mesh(**sizes)


def test_a_mesh_has_all_axes_and_gives_the_rest_to_the_open_one():
    mesh = sharding.device_mesh(fsdp=-1, data=1, tensor=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}


def test_axes_become_mesh_axes():
    assert sharding.spec(("batch", None, "heads")) == P(
        ("data", "fsdp"), None, "tensor"
    )


def test_axes_that_are_not_in_the_rules_are_refused():
    with pytest.raises(ValueError, match=r"unknown axes \['colour'\]"):
        sharding.spec(("embed", "colour"))


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("batch", "embed")])
def test_two_dimensions_can_not_share_a_mesh_axis(axes):
    with pytest.raises(ValueError, match="one mesh axis to two dimensions"):
        sharding.spec(axes)
    with pytest.raises(ValueError, match="one mesh axis to two dimensions"):
        sharding.place((8, 8), axes, sharding.device_mesh())


def test_a_dimension_that_can_not_be_divided_stays_whole():
    mesh = sharding.device_mesh(data=1, fsdp=4, tensor=2)
    assert sharding.place((6, 4), ("embed", "mlp"), mesh).spec == P(None, "tensor")
    with pytest.raises(ValueError):
        sharding.place((6, 4), ("embed",), mesh)


def test_a_batch_is_divided_by_its_rows_alone():
    mesh = sharding.device_mesh(data=2, fsdp=2, tensor=2)
    placed = sharding.batch_shardings({"x": np.zeros((8, 4)), "y": np.zeros(8)}, mesh)
    assert [where.spec for where in placed.values()] == [
        P(("data", "fsdp"), None),
        P(("data", "fsdp")),
    ]
    assert sharding.parts("batch", mesh) == 4


def test_names_of_axes_are_no_constraints_where_a_mesh_is_set():
    box = sharding.named(jax.nn.initializers.ones, ("embed", "mlp"))(KEY, (4, 4))
    with jax.set_mesh(sharding.device_mesh()):
        np.testing.assert_array_equal(sharding.unbox({"w": box})["w"], 1)


def test_activations_are_pinned_only_where_a_mesh_is_set():
    x = jnp.ones((8, 4, 2))
    assert sharding.constrain(x, ("batch", "tokens", None)) is x
    mesh = sharding.device_mesh(data=4, context=2)
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: sharding.constrain(x, ("batch", "tokens", None)))(x)
    assert pinned.addressable_shards[0].data.shape == (2, 2, 2)
