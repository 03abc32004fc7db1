# SPDX-License-Identifier: Apache-2.0
"""A training step, its parts, and a sampled video, by the package's own functions."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.workload import Workload
from pyramid_jax import sampler, sharding
from pyramid_jax.flops import Product
from pyramid_jax.guidance import Guidance
from pyramid_jax.kernels.attention import attention
from pyramid_jax.model import (
    ModelConfig,
    initialise,
    training_loss,
    velocity_network,
)
from pyramid_jax.noise import KeyedNoise
from pyramid_jax.pipeline.denoise import denoise
from pyramid_jax.shapes import Text
from pyramid_jax.training import state, step
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.units import SamplerPlan

Run = Callable[[], Any]


def training(work: Workload, model: ModelConfig | None = None) -> Run:
    """Runs a whole training step: loss, gradient, clipping, AdamW.

    Args:
        model: in place of the workload's, e.g. in another dtype.
    """
    model = model or work.model
    init, rates = partial(initialise, model), OptimizerConfig()
    update, mesh = optimizer(rates), _mesh()
    take = step.train_step(
        partial(training_loss, model),
        update,
        learning_rate(rates),
        step.StepConfig(ema_every=100),  # as the original does
        state.abstract_state(init, update, mesh),
    )
    rows, key = jax.tree.map(jnp.asarray, work.rows), jax.random.key(1)
    current = [state.create_state(jax.random.key(0), init, update, mesh)]

    def run() -> jax.Array:
        current[0], report = take(current[0], rows, key)
        return report.loss

    return run


def gradient(work: Workload) -> Run:
    """Runs the part of a training step that ends with the gradient."""
    params = _weights(work)
    rows, key = jax.tree.map(jnp.asarray, work.rows), jax.random.key(1)
    compute = jax.jit(partial(step.gradients, partial(training_loss, work.model)))
    return lambda: compute(params, rows, key)


def products(work: Workload) -> dict[Product, Run]:
    """Runs every matrix product with weights that a step contains, forward and back."""
    return {product: _product(product) for product in work.products()}


def attentions(work: Workload) -> Run:
    """Runs the attention of one block, forward and back, on the training row."""
    shape = (1, sum(work.tokens), work.heads, work.model.dit.head_dim)
    inputs = [jax.random.normal(jax.random.key(i), shape) for i in range(4)]

    @jax.jit
    def compute(q: jax.Array, k: jax.Array, v: jax.Array, back: jax.Array, seen: Any):
        backend = work.model.dit.attention
        out, pull = jax.vjp(lambda *x: attention(*x, seen, backend), q, k, v)
        return out, pull(back)

    return partial(compute, *inputs, jax.tree.map(jnp.asarray, work.mask))


def sampling(work: Workload, scans: int = 1) -> Run:
    """Runs the sampling of one video with guidance, from its noise to its latents.

    Args:
        scans: see `SamplerPlan`; `work.sampled - 1` gives every unit its own scan.
    """
    inputs = _sampled(work, scans)

    @jax.jit
    def compute(params: Any, text: Text, noise: KeyedNoise) -> jax.Array:
        velocity, options = (
            velocity_network(work.model, params),
            {"scales": inputs.scales},
        )
        return sampler.sample(
            velocity, text, inputs.shape, noise, inputs.plan, **options
        )

    return partial(compute, _weights(work), inputs.text, inputs.noise)


def stepping(
    work: Workload, model: ModelConfig | None = None, spread: float = 0
) -> Run:
    """Runs the same as `sampling`, every step as a call of a compiled function.

    Args:
        model: in place of the workload's, e.g. in another dtype.
        spread: of noise added to the weights, some of which are zeros otherwise.
    """
    inputs, params = _sampled(work, scans=1), _weights(work, spread)
    text, shape, noise, plan, scales = inputs
    return lambda: list(
        denoise(model or work.model, params, text, shape, noise, plan, scales=scales)
    )


def noise(work: Workload) -> Run:
    """Runs the drawing of all noise of one video."""
    drawn = _sampled(work, scans=1).noise
    draw = jax.jit(lambda unit: drawn(unit, 1))
    return lambda: [draw(unit) for unit in range(work.sampled)]


def multiply(side: int) -> Run:
    """Runs one product of square matrices, the best rate that a step could have."""
    x = jax.random.normal(jax.random.key(0), (side, side))
    return partial(jax.jit(jnp.matmul), x, x)


class Sampled(NamedTuple):
    """What a video is sampled from, in the order of `denoise`'s arguments."""

    text: Text
    shape: tuple[int, int, int, int]
    noise: KeyedNoise
    plan: SamplerPlan
    scales: np.ndarray


def _sampled(work: Workload, scans: int) -> Sampled:
    steps = (work.steps,) * len(work.model.stages)
    plan = SamplerPlan(work.model.stages, work.model.layout, steps, steps, scans=scans)
    shape = (work.sampled, *work.cells, work.model.latent.channels)
    scales = np.asarray(Guidance().scales(work.sampled), np.float32)
    text = jax.tree.map(jnp.asarray, work.prompts)
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 1))
    noise = KeyedNoise(keys, shape[1:], len(work.model.stages))
    return Sampled(text, shape, noise, plan, scales)


def _product(product: Product) -> Run:
    shapes = (
        (product.tokens, product.inputs),
        (product.inputs, product.outputs),
        (product.tokens, product.outputs),
    )
    x, w, back = (jax.random.normal(jax.random.key(0), shape) for shape in shapes)

    @jax.jit
    def compute(x: jax.Array, w: jax.Array, back: jax.Array):
        out, pull = jax.vjp(jnp.matmul, x, w)
        return out, pull(back)

    return partial(compute, x, w, back)


def _weights(work: Workload, spread: float = 0) -> Any:
    @jax.jit
    def drawn(key: jax.Array) -> Any:  # a constant would be drawn by the compiler
        fresh, pull = ravel_pytree(sharding.unbox(initialise(work.model, key)))
        return pull(fresh + spread * jax.random.normal(key, fresh.shape))

    return drawn(jax.random.key(0))


def _mesh() -> jax.sharding.Mesh:
    return sharding.device_mesh(data=1, devices=jax.devices()[:1])
