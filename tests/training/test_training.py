# SPDX-License-Identifier: Apache-2.0
"""Training on a linear model: laws of the step, promises of the loop, resumption."""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.checkpoint.store import Store
from pyramid_jax.objective import Losses
from pyramid_jax.training import loop
from pyramid_jax.training.metrics import Means, Metrics, read_metrics
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.run import best_average
from pyramid_jax.training.state import TrainState, abstract_state, create_state
from pyramid_jax.training.step import StepConfig, gradients, train_step

RATE = OptimizerConfig(learning_rate=1e-2, warmup_steps=3, steps=20)
KEY = jax.random.key(1)


class Batches:
    """Random rows that depend on their number alone; `at` is called before each."""

    def __init__(self, at: Callable[[int], None] = lambda number: None):
        self.number, self._at = 0, at

    def __iter__(self):
        return self

    def __next__(self) -> np.ndarray:
        self.number += 1
        self._at(self.number)
        random = np.random.default_rng(self.number)
        return random.normal(size=(8, 4)).astype(np.float32)

    def get_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class MetricsList(Metrics):
    """Metrics in a list."""

    def __init__(self):
        self.lines: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.append((step, dict(values)))


def init(key: jax.Array) -> Any:
    kernel = sharding.named(jax.nn.initializers.normal(), ("embed", None))
    bias = sharding.named(jax.nn.initializers.zeros, (None,))
    return {"kernel": kernel(key, (4, 2)), "bias": bias(key, (2,))}


def loss(
    params: Any, batch: jax.Array, key: jax.Array, step: jax.Array
) -> tuple[jax.Array, Any]:
    noise = jax.random.normal(key, batch.shape)
    error = jnp.square((batch + noise) @ params["kernel"] + params["bias"][None] - 1.0)
    count = jnp.float32(batch.shape[0])
    sums = jnp.stack([error.sum(), 0 * count]), jnp.stack([count, 0 * count])
    return error.mean(), Losses(error.mean(), *sums)


def plain(params: Any, batch: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    """A loss without noise."""
    error = jnp.square(batch @ params["kernel"] - 1.0).mean()
    return error, Means({}, jnp.float32(len(batch)))


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return sharding.device_mesh(data=2, devices=jax.devices()[:2])


def fresh(mesh: jax.sharding.Mesh) -> TrainState:
    return create_state(jax.random.key(0), init, optimizer(RATE), mesh)


def stepper(state: TrainState, cfg: StepConfig, loss: Any = loss) -> Any:
    return train_step(loss, optimizer(RATE), learning_rate(RATE), cfg, state)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# --------------------------------------------------------------------------------- step


@pytest.mark.parametrize(
    "wrong", [{"accumulate": 0}, {"ema_decay": 1.0}, {"ema_every": 0}]
)
def test_an_impossible_step_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StepConfig(**wrong)


def test_microbatches_have_the_gradient_of_the_whole_batch():
    params = sharding.unbox(init(KEY))
    batch = jnp.asarray(next(Batches()))
    whole = gradients(plain, params, batch, KEY)
    parts = gradients(plain, params, batch, KEY, parts=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)


def test_microbatches_have_noise_of_their_own():
    def noise(params: Any, _: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        drawn = {"noise": jax.random.normal(key, (1,))}
        return params["kernel"].sum(), Means(drawn, jnp.float32(1))

    _, means, _ = gradients(
        noise,
        sharding.unbox(init(KEY)),
        jnp.zeros((4, 4)),
        KEY,
        parts=2,
    )
    expected = [jax.random.normal(jax.random.fold_in(KEY, i), (1,)) for i in range(2)]
    np.testing.assert_allclose(means.sums["noise"], sum(expected), rtol=1e-6)
    assert expected[0] != expected[1]


def test_rows_that_are_no_multiple_of_the_microbatches_are_refused():
    with pytest.raises(ValueError, match="8 rows can't be cut into 3 microbatches"):
        gradients(plain, sharding.unbox(init(KEY)), jnp.zeros((8, 4)), KEY, parts=3)


@pytest.mark.parametrize(
    ("warm_up", "decays"), [(True, [0.1, 2 / 11]), (False, [0.9] * 2)]
)
def test_the_average_follows_the_weights(mesh, warm_up, decays):
    state = fresh(mesh)
    step = stepper(state, StepConfig(ema_decay=0.9, ema_warmup=warm_up))
    expected = jax.device_get(state.params["kernel"])
    for decay in decays:
        state, _ = step(state, next(Batches()), KEY)
        new = jax.device_get(state.params["kernel"])
        expected = decay * expected + (1 - decay) * new
        np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-6)


def test_the_average_is_updated_every_so_many_updates(mesh):
    state = fresh(mesh)
    step = stepper(state, StepConfig(ema_decay=0.9, ema_warmup=False, ema_every=2))
    average = jax.device_get(state.ema["kernel"])
    for update in range(4):
        state, _ = step(state, next(Batches()), KEY)
        if update % 2 == 0:
            average = 0.9 * average + 0.1 * jax.device_get(state.params["kernel"])
        np.testing.assert_allclose(state.ema["kernel"], average, rtol=1e-6)


@pytest.mark.parametrize(
    ("cfg", "bad"), [(StepConfig(skip_above=50.0), 1e3), (StepConfig(), np.nan)]
)
def test_a_bad_step_is_counted_and_changes_nothing_else(mesh, cfg, bad):
    state = fresh(mesh)
    step = stepper(state, cfg)
    batch = next(Batches())
    state, _ = step(state, batch, KEY)
    before = jax.device_get(state)
    state, report = step(state, bad * batch, KEY)
    assert (int(report.skipped), int(state.skipped), int(state.step)) == (1, 1, 2)
    assert_equal(state[2:], before[2:])
    state, report = step(state, batch, KEY)
    assert int(report.skipped) == 1 and int(state.step) == 3
    np.testing.assert_allclose(report.learning_rate, learning_rate(RATE)(1))
    assert not np.array_equal(state.params["kernel"], before.params["kernel"])


def test_noise_differs_from_update_to_update(mesh):
    def noise(params: Any, _: Any, key: Any, step: Any) -> tuple[jax.Array, Any]:
        weight = 0 * params["kernel"].sum()
        return jax.random.normal(key) + weight, Means({}, jnp.float32(1))

    state, batch = fresh(mesh), next(Batches())
    step = stepper(state, StepConfig(), noise)
    state, first = step(state, batch, KEY)
    state, second = step(state, batch, KEY)
    assert float(first.loss) != float(second.loss)


# --------------------------------------------------------------------------------- loop


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1, "log_every": 0},
        {"steps": 1, "sample_every": -1},
        {"steps": 1, "profile": (1, 2)},
    ],
)
def test_an_impossible_loop_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        loop.LoopConfig(**wrong)


def trained(
    folder: Path, mesh: jax.sharding.Mesh, cfg: loop.LoopConfig, **options: Any
) -> TrainState:
    """Runs, or continues, training in `folder`."""
    step_cfg = StepConfig(accumulate=2, ema_decay=0.9)
    batches = options.get("batches", Batches())
    like = abstract_state(init, optimizer(RATE), mesh)
    with Store(folder, {"seed": 0}) as store:
        new = store.latest() is None
        state = fresh(mesh) if new else store.restore(like, batches)
        step = stepper(like, step_cfg, options.get("loss", loss))
        return loop.train_loop(
            cfg,
            step,
            state,
            batches,
            KEY,
            store=store,
            metrics=options.get("metrics", MetricsList()),
            sample=options.get("sample"),
            validate=options.get("validate"),
        )


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path, mesh):
    whole = trained(tmp_path / "whole", mesh, loop.LoopConfig(steps=6))
    trained(tmp_path / "parts", mesh, loop.LoopConfig(steps=2))
    trained(tmp_path / "parts", mesh, loop.LoopConfig(steps=5))
    parts = trained(tmp_path / "parts", mesh, loop.LoopConfig(steps=6))
    assert_equal(whole, parts)
    assert int(whole.step) == 6
    assert not np.array_equal(whole.params["kernel"], whole.ema["kernel"])


def test_a_finished_run_does_nothing_when_it_is_started_again(tmp_path, mesh):
    first = trained(tmp_path, mesh, loop.LoopConfig(steps=2))
    lines = MetricsList()
    again = trained(tmp_path, mesh, loop.LoopConfig(steps=2), metrics=lines)
    assert_equal(first, again)
    assert not lines.lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(tmp_path, mesh, number):
    batches = Batches(lambda n: signal.raise_signal(number) if n == 3 else None)
    before = signal.getsignal(number)
    state = trained(tmp_path, mesh, loop.LoopConfig(steps=100), batches=batches)
    assert int(state.step) == 3
    assert Store(tmp_path, {}).latest() == 3
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_run_at_once(tmp_path, mesh):
    def interrupt(batch: int) -> None:
        if batch == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        cfg = loop.LoopConfig(steps=100)
        trained(tmp_path, mesh, cfg, batches=Batches(interrupt))


def test_a_time_limit_saves_and_ends_the_run(tmp_path, mesh):
    cfg = loop.LoopConfig(steps=100, max_seconds=1e-6)
    assert int(trained(tmp_path, mesh, cfg).step) == 1
    assert Store(tmp_path, {}).latest() == 1


def test_some_steps_are_traced_and_waiting_for_data_is_measured(tmp_path, mesh):
    cfg = loop.LoopConfig(steps=5, profile=(3, 4))
    slow = Batches(lambda number: time.sleep(0.1))
    with closing(Metrics(tmp_path)) as metrics:
        trained(tmp_path / "run", mesh, cfg, batches=slow, metrics=metrics)
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 < line["data_wait"] <= 1


class Poisoned(Batches):
    """The same rows, with batches of NaN put before the third one, `count` of them."""

    def __init__(self, count: int):
        super().__init__()
        self._count = count

    def __next__(self) -> np.ndarray:
        if self.number == 2 and self._count:
            self._count -= 1
            return np.full((8, 4), np.nan, np.float32)
        return super().__next__()


def test_a_run_with_a_bad_batch_ends_like_one_without(tmp_path, mesh):
    sound, poisoned = MetricsList(), MetricsList()
    clean = trained(tmp_path / "a", mesh, loop.LoopConfig(4, 4), metrics=sound)
    cfg = loop.LoopConfig(steps=5, log_every=5)
    batches = Poisoned(1)
    state = trained(tmp_path / "b", mesh, cfg, batches=batches, metrics=poisoned)
    assert (int(state.step), int(state.skipped)) == (5, 1)
    assert_equal(clean[2:], state[2:])
    (_, without), (_, values) = *sound.lines, *poisoned.lines
    assert values["skipped"] == 1 and values["loss"] == without["loss"]


def test_bad_steps_in_a_row_end_the_run_and_its_state_is_kept(tmp_path, mesh):
    clean = trained(tmp_path / "a", mesh, loop.LoopConfig(steps=4))
    batches, lines = Poisoned(9), MetricsList()
    cfg = loop.LoopConfig(steps=10, log_every=1, bad_steps=3)
    with pytest.raises(FloatingPointError, match="the last 3 steps or more were skip"):
        trained(tmp_path / "b", mesh, cfg, batches=batches, metrics=lines)
    # Counters are read two steps later, when no device waits for it.
    bad = [step for step, values in lines.lines if "loss" not in values]
    assert bad == [3, 4, 5, 6, 7]
    assert Store(tmp_path / "b", {"seed": 0}).latest() == 7
    again = trained(tmp_path / "b", mesh, cfg, batches=Poisoned(1))
    assert (int(again.step), int(again.skipped)) == (10, 6)
    assert_equal(clean[2:], again[2:])


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, mesh):
    losses, averages = [3.0, 1.0, 2.0, 4.0, 5.0, 6.0], []

    def validate(step: int, average: Any) -> dict[str, float]:
        averages.append(jax.device_get(average))
        return {"validation_loss": losses[step - 1]}

    lines, cfg = MetricsList(), loop.LoopConfig(steps=6, save_every=1)
    folder = tmp_path / "checkpoints"
    last = trained(folder, mesh, cfg, validate=validate, metrics=lines)
    assert [values["validation_loss"] for _, values in lines.lines] == losses
    with Store(folder, {"seed": 0}) as store:
        assert store.best() == 2 and store.latest() == 6
    assert {path.name for path in folder.iterdir()} == {"2", "4", "5", "6"}
    assert_equal(best_average(tmp_path, last), averages[1])


def test_samples_are_taken_from_the_average_at_the_right_steps(tmp_path, mesh):
    seen = []
    trained(
        tmp_path / "a",
        mesh,
        loop.LoopConfig(steps=5, sample_every=2),
        sample=lambda step, ema: seen.append((step, jax.device_get(ema))),
    )
    assert [step for step, _ in seen] == [2, 4]
    shorter = trained(tmp_path / "b", mesh, loop.LoopConfig(steps=4))
    assert_equal(seen[1][1], shorter.ema)


def test_rows_that_do_not_fit_the_mesh_are_refused(mesh):
    with pytest.raises(ValueError, match="5 rows can't be divided over 2 devices"):
        sharding.global_batch(np.zeros((5, 4), np.float32), mesh)


# ------------------------------------------------------------------------------ metrics


def test_a_line_is_the_mean_since_the_last_line(tmp_path, mesh):
    every, rare = MetricsList(), MetricsList()
    trained(tmp_path / "a", mesh, loop.LoopConfig(5, log_every=1), metrics=every)
    trained(tmp_path / "b", mesh, loop.LoopConfig(5, log_every=4), metrics=rare)
    losses = [values["loss"] for _, values in every.lines]
    assert [step for step, _ in rare.lines] == [4, 5]
    assert len(losses) == 5
    np.testing.assert_allclose(rare.lines[0][1]["loss"], np.mean(losses[:4]), rtol=1e-6)
    np.testing.assert_allclose(rare.lines[1][1]["loss"], losses[4], rtol=1e-6)


def test_each_stage_that_was_trained_has_a_loss(tmp_path, mesh):
    metrics = MetricsList()
    trained(tmp_path, mesh, loop.LoopConfig(2), metrics=metrics)
    values = metrics.lines[-1][1]
    np.testing.assert_allclose(values["loss_stage_0"], 2 * values["loss"], rtol=1e-6)
    assert "loss_stage_1" not in values
    assert values["steps_per_second"] > 0
