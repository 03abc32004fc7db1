# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning with adapters takes of a GPU: the real step, compiled without one.

    python -m benchmarks.lora_memory --config=mmdit_384p --limit=24

A prediction: XLA compiles the step of one row for an A100, whose attention kernels are
those of smaller cards, and says what it will hold. It ends with 1 if that exceeds the
limit. State is counted by its bytes: the frozen weights must be without moments.
"""

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import lora as configs
from launch.compile.chips import A100
from pyramid_jax import model as models
from pyramid_jax import programs, sharding
from pyramid_jax.config import build
from pyramid_jax.finetune import adapter_loss, initialise_adapters
from pyramid_jax.lora import LoRAConfig
from pyramid_jax.model import ModelConfig
from pyramid_jax.shapes import Rows
from pyramid_jax.training.optimizer import OptimizerConfig, learning_rate, optimizer
from pyramid_jax.training.state import TrainState, abstract_state
from pyramid_jax.training.step import StepConfig, train_step

GIB = 2**30


def abstract(cfg: Any, mesh: Mesh) -> tuple[ModelConfig, LoRAConfig, TrainState, Any]:
    """The model, its adapters, the state of a run, and the optimizer."""
    model = models.model_config(cfg.model.to_dict())
    lora = build(LoRAConfig, cfg.lora.to_dict())
    rule = optimizer(build(OptimizerConfig, cfg.optimizer.to_dict()))
    like = abstract_state(partial(initialise_adapters, model, lora), rule, mesh)
    boxes = jax.eval_shape(partial(models.initialise, model), jax.random.key(0))
    frozen = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, lora.base, sharding=where),
        sharding.unbox(boxes),
        sharding.shardings(boxes, mesh),
    )
    return model, lora, like._replace(frozen=frozen), rule


def state_bytes(state: TrainState) -> dict[str, int]:
    """The bytes of every part of a state."""
    return {
        name: sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(part))
        for name, part in state._asdict().items()
    }


def abstract_rows(cfg: Any, model: ModelConfig, rows: int, mesh: Mesh) -> Rows:
    """The shapes of a batch of rows with stored features of captions."""
    b, n, m, s = rows, cfg.data.tokens, cfg.data.text_tokens, cfg.data.segments
    p, shape = model.dit.patch_values, jax.ShapeDtypeStruct
    real, whole = jnp.float32, jnp.int32
    batch = Rows(
        clean=shape((b, n, p), real),
        coarser=shape((b, n, p), real),
        position=shape((b, n, 3), real),
        frame=shape((b, n), whole),
        segment=shape((b, n), whole),
        current=shape((b, n), jnp.bool_),
        stage=shape((b, s), whole),
        text=shape((b, m, model.dit.text_width), real),
        text_segment=shape((b, m), whole),
        pooled=shape((b, s, model.dit.pooled_width), real),
    )
    places = sharding.batch_shardings(batch, mesh)
    return jax.tree.map(
        lambda x, where: shape(x.shape, x.dtype, sharding=where), batch, places
    )


def compiled(cfg: Any, rows: int, mesh: Mesh) -> dict[str, float]:
    """The bytes that the compiled step holds, by kind."""
    model, lora, like, rule = abstract(cfg, mesh)
    rates = build(OptimizerConfig, cfg.optimizer.to_dict())
    loss = partial(adapter_loss, model, lora)
    setting = build(StepConfig, cfg.step.to_dict())
    step = train_step(loss, rule, learning_rate(rates), setting, like)
    key = jax.eval_shape(lambda: jax.random.key(0))
    here = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=here)
    batch = abstract_rows(cfg, model, rows, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced: Any = step.trace(like, batch, key)  # pyright: ignore
    lowered = traced.lower(lowering_platforms=("cuda",))
    memory = lowered.compile(compiler_options=programs.OPTIONS["gpu"]).memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "not_shared_with_arguments": memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def main(_: object) -> None:
    options, began = flags.FLAGS, time.process_time()
    jax.config.update("jax_platforms", "cpu")
    cfg = configs.get_config(options.config)
    cfg.model.dit.attention = A100.backend
    devices = [A100.device()] if options.compile else jax.devices()[:1]
    mesh = sharding.device_mesh(devices=devices)
    parts = state_bytes(abstract(cfg, mesh)[2])
    assert parts["optimizer"] <= 2 * parts["params"] + 64, "the base has moments"
    found = {
        "config": options.config,
        "rows": options.rows,
        "tokens_of_a_row": cfg.data.tokens,
        "adapters": cfg.lora.to_dict(),
        "state_bytes": parts,
        "jax": jax.__version__,
    }
    total = sum(parts.values())
    if options.compile:
        found["step_bytes"] = compiled(cfg, options.rows, mesh)
        total = sum(found["step_bytes"].values())
        found["compile_cpu_seconds"] = round(time.process_time() - began)
    found |= {"predicted_gb": round(total / 1e9, 2), "limit_gb": options.limit}
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if options.to:
        Path(options.to).write_text(text, encoding="utf-8")
    if not math.isfinite(total) or total > options.limit * 1e9:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_string("config", "mmdit_384p", "Config of the model.")
    flags.DEFINE_integer("rows", 1, "Rows of a step.", lower_bound=1)
    flags.DEFINE_float("limit", 24.0, "GB of the GPU that it must fit.", lower_bound=0)
    flags.DEFINE_bool(
        "compile", True, "Compile the step; otherwise count the state only."
    )
    flags.DEFINE_string("to", None, "File to write the result to, as JSON.")
    app.run(main)
