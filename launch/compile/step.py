# SPDX-License-Identifier: Apache-2.0
"""An Euler step of the released widths, through a GPU's compiler: what a block takes.

Nothing runs, but the compiled program shows waste that a step must not have: lists of
visible blocks sorted in every layer, modulations computed again, copies of weights,
GELU in a pass of its own, and more kernels than a block needs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from launch.compile.chips import GPU, TPU
from launch.compile.kernels import Line
from pyramid_jax import programs, sharding
from pyramid_jax.kernels.tiles import tiles_for
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.model import VARIANTS, ModelConfig, initialise, unrolled
from pyramid_jax.models.dit import STACKED
from pyramid_jax.noise import KeyedNoise
from pyramid_jax.pipeline import denoise
from pyramid_jax.shapes import Text

CELLS, CHANNELS, WORDS, SLOTS = (96, 160), 16, 128, 31  # 768x1280 pixels, 10 seconds
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1}
LARGE = 5e6  # bytes of weights that may be copied
# Instructions that the device does not run.
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while"}


class EulerStep(NamedTuple):
    """A step at the finest stage, with guidance, in a network of fewer blocks."""

    name: str
    variant: str
    unrolled: bool
    most: int  # kernels of a block
    blocks: tuple[int, int]  # double, single
    products: str = "exact"

    def suits(self, chip: GPU) -> bool:
        """Whether the chip computes such products: float8 from Hopper on."""
        return self.products != "fp8" or chip.name == "h200"


SIZES = (
    EulerStep("mmdit step", "mmdit", False, 42, (5, 0)),
    EulerStep("mmdit unrolled", "mmdit", True, 18, (5, 0)),
    EulerStep("miniflux unrolled", "miniflux", True, 14, (2, 3)),
    EulerStep("mmdit fp8", "mmdit", False, 105, (5, 0), "fp8"),
)


class Instruction(NamedTuple):
    """What the device runs: the computation that it is in, result, kind, origin."""

    inside: str
    result: str
    kind: str
    origin: str


def compiled(chip: GPU | TPU, size: EulerStep) -> Iterator[Line]:
    """Compiles the step; a line with the kernels of a block, or with what is wrong."""
    if not isinstance(chip, GPU) or not size.suits(chip):
        return
    try:
        text, weights = program(chip, size)
    except Exception as error:  # each compiler has its own kinds
        yield Line(chip.name, size.name, refusal=str(error).split("\n")[0][:300])
        return
    faults = list(waste(text, size, weights))
    used = f"{kernels(text, size):.0f} kernels per block"
    yield Line(chip.name, size.name, "step", used, "; ".join(faults) or None)


def program(chip: GPU, size: EulerStep) -> tuple[str, set[tuple[int, ...]]]:
    """The compiled step, and the shapes of the large weights of its blocks."""
    one = sharding.device_mesh(devices=[chip.device()])
    model = _model(chip, size)
    params: Any = jax.eval_shape(
        lambda: sharding.unbox(initialise(model, jax.random.key(0)))
    )
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    stacks = [params["dit"][name] for name in STACKED if name in params["dit"]]
    shapes = [x.shape[1:] for x in jax.tree.leaves(stacks)]
    weights = {_plain(shape) for shape in shapes if 2 * math.prod(shape) > LARGE}
    params = jax.eval_shape(unrolled, params) if size.unrolled else params
    here = NamedSharding(one, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        _arguments(model, params),
    )
    stage = len(model.stages) - 1
    which = denoise._Program(model, None, stage, SLOTS)
    # Triton asks the mesh for the device that it lowers for.
    with jax.sharding.use_abstract_mesh(one.abstract_mesh):
        traced = denoise._euler_step.jitted.trace(which, *arguments, None)
    lowered = traced.lower(lowering_platforms=(chip.platform,))
    options = dict(programs.OPTIONS["gpu"])
    return lowered.compile(compiler_options=options).as_text(), weights


def waste(text: str, size: EulerStep, weights: set[tuple[int, ...]]) -> Iterator[str]:
    """What the compiled step does without need."""
    found, loops = instructions(text), set(re.findall(r"body=%?([\w.\-]+)", text))
    if any(x.inside in loops and "/sort" in x.origin for x in found):
        yield "a list is sorted in every layer"
    if any("modulation" in x.origin and "dot_general" in x.origin for x in found):
        yield "modulations are computed in the step"
    if any("query_key_value" in x.origin or "k_norm" in x.origin for x in found):
        yield "queries and keys are joined in several passes"
    fused, blocks = text.count('"epilogue":"BIAS_GELU"'), sum(size.blocks)
    expected = 3 if not size.unrolled else 2 * size.blocks[0] + size.blocks[1] - 1
    if fused < expected:
        yield f"{fused} products compute GELU, expected {expected} in {blocks} blocks"
    float8, linear = text.count("cublas$lt$matmul$f8"), 8  # of a block, in a loop
    if size.products == "fp8" and float8 < linear:
        yield f"{float8} products are of float8, expected {linear}"
    copies = {x.result for x in found if _plain(_shape(x.result)) in weights}
    if size.unrolled and copies:
        yield f"weights are copied: {sorted(copies)[:3]}"
    if kernels(text, size) > size.most:
        yield f"{kernels(text, size):.0f} kernels per block, expected {size.most}"


def kernels(text: str, size: EulerStep) -> float:
    """How many kernels a block takes; in a loop, which has only equal ones."""
    found, loops = instructions(text), set(re.findall(r"body=%?([\w.\-]+)", text))
    if not size.unrolled:
        return sum(x.inside in loops for x in found)
    return sum("/DiT._run/" in x.origin for x in found) / sum(size.blocks)


def instructions(text: str) -> list[Instruction]:
    """What runs on the device, without the insides of fused kernels."""
    whole = set(re.findall(r"(?:^ENTRY |body=)%?([\w.\-]+)", text, re.MULTILINE))
    found, inside = [], ""
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = start[1]
        one = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
        if one is None or inside not in whole:
            continue
        if one[2] not in FREE and not one[2].endswith("-done"):
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Instruction(inside, one[1], one[2], origin[1] if origin else "")
            )
    return found


def _model(chip: GPU, size: EulerStep) -> ModelConfig:
    base, kind = VARIANTS[size.variant], chip.device().device_kind
    tiles = tiles_for(chip.backend, base.head_dim, "bfloat16", 15_488, kind)
    dit = dataclasses.replace(
        base,
        dtype="bfloat16",
        products=size.products,
        double_blocks=size.blocks[0],
        single_blocks=size.blocks[1],
        attention=chip.backend,
        attention_tiles=tuple(tuple(tile) for tile in tiles),
    )
    layout = Layout(position_table=dit.position_table)
    return ModelConfig(dit, layout, LatentConfig(channels=CHANNELS))


def _arguments(model: ModelConfig, params: Any) -> tuple[Any, ...]:
    """Shapes of what a step is called with, beside the static `_Program`."""
    shape, cfg, stage = jax.ShapeDtypeStruct, model.dit, len(model.stages) - 1
    number, (height, width) = shape((), jnp.float32), CELLS
    text = Text(
        shape((2, WORDS, cfg.text_width), jnp.float32),
        shape((2, WORDS), jnp.int32),
        shape((2, 1, cfg.pooled_width), jnp.float32),
    )
    keys = shape((1, 2), jnp.uint32)
    noise = KeyedNoise(keys, (*CELLS, CHANNELS), len(model.stages))
    which = denoise._Program(model, None, stage, SLOTS)
    start, made = denoise._start_stage.jitted, denoise._modulations.jitted
    x, past = jax.eval_shape(
        lambda *arrays: start(which, *arrays),
        shape((1, 1, height // 2, width // 2, CHANNELS), jnp.float32),
        shape((1, SLOTS, *CELLS, CHANNELS), jnp.float32),
        noise,
        shape((), jnp.int32),
    )
    vectors = jax.eval_shape(
        lambda *arrays: made(model, stage, *arrays),
        *(params, text.pooled, number),
    )
    conditions = params, text, number, vectors
    return conditions, x, past, shape((2,), jnp.float32)


def _shape(result: str) -> tuple[int, ...]:
    """The dimensions of an array in a program's text; () for several arrays."""
    one = re.match(r"\w+\[([\d,]*)\]", result)
    return tuple(int(n) for n in one[1].split(",") if n) if one else ()


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without ones, whose heads are one dimension with what is beside them."""
    rows, *columns = [n for n in shape if n > 1] or [1]
    return (rows, math.prod(columns))
