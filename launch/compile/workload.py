# SPDX-License-Identifier: Apache-2.0
"""What a config trains, as shapes on the devices of a machine; no array is made.

The task is the one that a run has. Rows are full of tokens, as packing makes them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from launch.compile.machines import Machine
from launch.compile.program import Program
from launch.kinds import kind
from pyramid_jax import flops, sharding
from pyramid_jax import model as models
from pyramid_jax.config import build
from pyramid_jax.data.examples import DataConfig, segment_clips
from pyramid_jax.distill import Caption, Distillation, reflow_config, student_task
from pyramid_jax.finetune import adapter_task, base_shapes
from pyramid_jax.kernels.tiles import TILED, tiles_for
from pyramid_jax.lora import LoRAConfig
from pyramid_jax.model import ModelConfig
from pyramid_jax.shapes import Rows
from pyramid_jax.train import data_config, dit_task
from pyramid_jax.training.step import gradients
from pyramid_jax.training.task import Task
from pyramid_jax.vae.clips import Footage, VAEDataConfig
from pyramid_jax.vae.train import build_networks, vae_data, vae_task


class Workload(NamedTuple):
    """A training step on a mesh: what it trains, on what, and what the model needs.

    `batch` and `frozen` are shapes with their places; `rows` counts examples of the
    batch, rows of a DiT or clips of a VAE. `needed()` is the FLOP of a step that the
    model needs, on all devices; `seen` are the tokens that a token sees, on mean.
    """

    task: Task
    mesh: Mesh
    batch: Any
    rows: int
    needed: Callable[[], float]
    seen: float = 0.0
    frozen: Any = None


def workload(cfg: Any, machine: Machine) -> Workload:
    """What a config trains on a machine.

    Raises:
        ValueError: that is nothing known, or the rows of its batch can't be divided
            over the mesh.
    """
    trained = kind(cfg)
    mesh = sharding.device_mesh(**cfg.mesh.to_dict(), devices=list(machine.devices))
    if trained == "vae":
        work = _of_vae(cfg, mesh, machine)
    else:
        work = _of_dit(cfg, mesh, machine, trained)
    parts, microbatches = sharding.parts("batch", mesh), cfg.step.accumulate
    for rows in {x.shape[0] for x in jax.tree.leaves(work.batch)}:
        if rows % (parts * microbatches):
            raise ValueError(
                f"a batch of {rows} rows can't be divided over {parts} devices in "
                f"{microbatches} microbatches; set --config.data.batch "
                "(and data.images of a VAE)"
            )
    places = sharding.batch_shardings(work.batch, mesh)
    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        work.batch,
        places,
    )
    return work._replace(batch=placed)


def _of_vae(cfg: Any, mesh: Mesh, machine: Machine) -> Workload:
    """A VAE, with its discriminator and LPIPS where the objective has them."""
    networks = build_networks(cfg)
    data = vae_data(cfg, networks)
    batch = footage_shapes(data)
    stored = dataclasses.replace(
        networks, vae=dataclasses.replace(networks.vae, remat=False)
    )
    needed = partial(written, vae_task(cfg, stored), batch, machine.platform)
    return Workload(vae_task(cfg, networks), mesh, batch, data.batch, needed)


def _of_dit(cfg: Any, mesh: Mesh, machine: Machine, trained: str) -> Workload:
    """A DiT, a student beside its teacher, or adapters of a frozen model."""
    model = models.model_config(cfg.model.to_dict())
    data = data_config(cfg, model)
    model = dataclasses.replace(model, dit=_attending(model, data, machine))
    frozen, passes = None, (3, 3)
    if trained == "teacher":
        reflow = reflow_config(cfg)
        task = student_task(cfg, Distillation(model, reflow, _negative(model, data)))
        every = 3 + 2 * reflow.steps  # the teacher walks with and without the caption
        passes = every, every
    elif trained == "lora":
        lora = build(LoRAConfig, cfg.lora.to_dict())
        task, passes = adapter_task(cfg, model, lora), (2, 3)
        frozen = base_shapes(model, lora.base, mesh)
    else:
        task = dit_task(cfg, model)
    pairs = row_pairs(model, data)
    length = data.tokens + data.text_tokens
    needed = partial(forward, model, data, pairs, passes)
    rows = row_shapes(model, data)
    return Workload(task, mesh, rows, data.batch, needed, pairs / length, frozen)


def footage_shapes(data: VAEDataConfig) -> Footage:
    """Shapes of a batch of clips and pictures."""
    side = (data.height, data.width, 3)
    clips = jax.ShapeDtypeStruct((data.batch, data.frames, *side), jnp.uint8)
    if not data.images:
        return Footage(clips)
    return Footage(clips, jax.ShapeDtypeStruct((data.images, 1, *side), jnp.uint8))


def row_shapes(model: ModelConfig, data: DataConfig) -> Rows:
    """Shapes of a batch of packed rows."""
    b, n, m, s = data.batch, data.tokens, data.text_tokens, data.segments
    p, own = model.dit.patch_values, model.text is not None
    real, whole = jnp.float32, jnp.int32
    return Rows(
        clean=jax.ShapeDtypeStruct((b, n, p), real),
        coarser=jax.ShapeDtypeStruct((b, n, p), real),
        position=jax.ShapeDtypeStruct((b, n, 3), real),
        segment=jax.ShapeDtypeStruct((b, n), whole),
        frame=jax.ShapeDtypeStruct((b, n), whole),
        current=jax.ShapeDtypeStruct((b, n), jnp.bool_),
        stage=jax.ShapeDtypeStruct((b, s), whole),
        text=jax.ShapeDtypeStruct((b, m), whole)
        if own
        else jax.ShapeDtypeStruct((b, m, model.dit.text_width), real),
        text_segment=jax.ShapeDtypeStruct((b, m), whole),
        pooled=jax.ShapeDtypeStruct((b, s, 0 if own else model.dit.pooled_width), real),
    )


def written(task: Task, batch: Any, platform: str) -> float:
    """FLOP of all products in a task's loss and gradient, as they are written.

    They are those of one device that has the whole batch, before a compiler changes
    anything.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = sharding.unbox(jax.eval_shape(task.init, key))

    def gradient(params: Any, batch: Any, key: jax.Array, step: jax.Array) -> Any:
        return gradients(partial(task.loss, step=step), params, batch, key)

    step = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(gradient).trace(params, batch, key, step)
    lowered: Any = traced.lower(lowering_platforms=(platform,)).compiler_ir("hlo")
    return Program.read(lowered.as_hlo_module().to_string()).flops()


def forward(
    model: ModelConfig, data: DataConfig, pairs: float, passes: tuple[int, int]
) -> float:
    """FLOP of so many forward passes of full rows: with weights, and of attention."""
    init = partial(models.initialise, model)
    weights = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
    cost = flops.row_cost(model, {"dit": weights["dit"]})
    products = cost.products(data.text_tokens, data.tokens, data.segments)
    return data.batch * (passes[0] * products + passes[1] * cost.pair * pairs)


def row_pairs(model: ModelConfig, data: DataConfig) -> float:
    """Pairs of tokens that the mask lets through in a full row, on mean.

    The rows hold what packing draws: all units of all stages, equally many of the
    first size.
    """
    grid = data.latent.grid(data.height, data.width, data.layout.patch, 1)
    text = data.text_tokens // data.segments
    tokens = seen = 0
    every_unit = [None] if data.units is None else range(data.units)
    for stage in data.pattern:
        for unit in every_unit:
            clips = segment_clips(data.latent_frames, stage, unit, data.layout)
            frames = flops.of_clips(model, grid, clips)
            tokens += text + sum(frames)
            visible = flops.segment_pairs(text, frames)
            seen += visible if model.dit.causal else (text + sum(frames)) ** 2
    return seen / tokens * (data.tokens + data.text_tokens)


def _negative(model: ModelConfig, data: DataConfig) -> Caption:
    """A caption as long as each of a full row is."""
    words, own = data.text_tokens // data.segments, model.text is not None
    if own:
        return Caption(np.zeros(words, np.int32), np.zeros((1, 0), np.float32))
    features = np.zeros((words, model.dit.text_width), np.float32)
    return Caption(features, np.zeros((1, model.dit.pooled_width), np.float32))


def _attending(model: ModelConfig, data: DataConfig, machine: Machine) -> Any:
    """The network with the attention of the machine, and tiles for it, if any."""
    backend, dit = machine.backend, model.dit
    if backend not in TILED:
        return dataclasses.replace(dit, attention=backend)
    device, length = machine.devices[0].device_kind, data.tokens + data.text_tokens
    tiles = tiles_for(backend, dit.head_dim, dit.dtype, length, device)
    plain = tuple(tuple(tile) for tile in tiles)
    return dataclasses.replace(dit, attention=backend, attention_tiles=plain)
