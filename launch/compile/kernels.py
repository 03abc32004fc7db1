# SPDX-License-Identifier: Apache-2.0
"""Attention at released sizes through a chip's compiler, and what each kernel takes."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.compile.chips import GPU, TPU
from pyramid_jax import sharding
from pyramid_jax.kernels.attention import attention
from pyramid_jax.kernels.tiles import tiles_for
from pyramid_jax.mask import TokenMask


class Work(NamedTuple):
    """The sizes of one call of attention."""

    name: str
    rows: int
    tokens: int
    heads: int = 24
    dim: int = 64
    dtype: str = "bfloat16"


# Rows of sampling have a prompt and a negative prompt; miniFLUX has 30 heads.
WORKS = (
    Work("384p sampling", 2, 3068),
    Work("768p sampling", 2, 15488),
    Work("768p training", 1, 24576, heads=30),
    Work("width 32", 1, 4096, dim=32),
    Work("width 96", 1, 4096, dim=96),
    Work("width 128", 1, 4096, dim=128),
    Work("float32", 1, 4096, dtype="float32"),
    Work("float32 width 128", 1, 4096, dim=128, dtype="float32"),
)


class Line(NamedTuple):
    """One kernel on one chip: memory in KiB, registers per thread, or the refusal."""

    chip: str
    work: str
    kernel: str = ""
    used: str = ""
    refused: str | None = None

    def __str__(self) -> str:
        end = self.used if self.refused is None else f"REFUSED: {self.refused}"
        return f"{self.chip:5} {self.work:18} {self.kernel:15} {end}"


def compiled(chip: GPU | TPU, work: Work) -> Iterator[Line]:
    """Compiles the forward and the backward pass; a line for each kernel in them."""
    device = chip.device()
    one = sharding.device_mesh(devices=[device])
    arguments = _arguments(one, work)
    tiles = tiles_for(
        chip.backend, work.dim, work.dtype, work.tokens, device.device_kind
    )

    def both(q, k, v, mask, back):
        def form(q, k, v):
            return attention(q, k, v, mask, chip.backend, tiles)

        out, pull = jax.vjp(form, q, k, v)
        return out, pull(back)

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = (
            {"xla_dump_to": folder} if isinstance(chip, GPU) else {}
        )
        try:
            # Triton asks the mesh for the device that it lowers for.
            with jax.sharding.use_abstract_mesh(one.abstract_mesh):
                traced = jax.jit(both).trace(*arguments)
            lowered = traced.lower(lowering_platforms=(chip.platform,))
            program = lowered.compile(compiler_options=options)
        except Exception as error:  # each compiler has its own kinds
            yield Line(chip.name, work.name, refused=str(error).split("\n")[0][:300])
            return
        if isinstance(chip, GPU):
            found = list(_of_gpu(chip, Path(folder)))
        elif text := _printed(program):
            found = list(_of_tpu(text))
        else:
            yield Line(chip.name, work.name, used="accepted; jaxlib can not print it")
            return
    for kernel, used in sorted(found):
        yield Line(chip.name, work.name, kernel, used)
    if len(found) < 3:
        seen = [kernel for kernel, _ in found]
        yield Line(chip.name, work.name, refused=f"three kernels expected, got {seen}")


def _arguments(one: Mesh, work: Work) -> tuple:
    here = NamedSharding(one, PartitionSpec())
    shape = (work.rows, work.tokens, work.heads, work.dim)
    x = jax.ShapeDtypeStruct(shape, work.dtype, sharding=here)
    number = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=here)
    return x, x, x, TokenMask(number, number), x


def _printed(program: Any) -> str:
    """The compiled program, or nothing where libtpu is newer than what jaxlib reads."""
    try:
        return program.as_text()
    except jax.errors.JaxRuntimeError:
        return ""


def _of_tpu(program: str) -> Iterator[tuple[str, str]]:
    """The scoped memory of each Mosaic kernel, as the compiled program states it."""
    for line in program.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        kernel = re.search(r"(\w+)_kernel\b[^\"]*/pallas_call", line)
        size = re.search(r'"used_scoped_memory_configs":\[\{[^]]*"size":"(\d+)"', line)
        if kernel and size:
            yield kernel[1], f"VMEM {int(size[1]) / 1024:.0f} KiB"


def _of_gpu(chip: GPU, folder: Path) -> Iterator[tuple[str, str]]:
    """Shared memory from XLA's list of launches, registers and spills by ptxas.

    XLA writes the assembler code of kernels only up to jax 0.10.
    """
    launches = "".join(p.read_text() for p in folder.glob("*.thunk_sequence.txt"))
    codes = {}
    for path in folder.glob("*.ptx"):
        if entry := re.search(r"\.entry (\w+)_kernel\(", path.read_text()):
            codes[entry[1]] = path
    sizes = re.findall(r"(\w+)_kernel .*shared_memory: (\d+)", launches)
    for kernel, size in dict(sizes).items():
        used = f"{int(size) / 1024:.0f} KiB shared memory"
        if kernel in codes:
            used = f"{_registers(chip, codes[kernel])}, {used}"
        yield kernel, used


def _registers(chip: GPU, code: Path) -> str:
    """What ptxas says of a kernel's registers."""
    command = [_ptxas(), "-v", f"-arch={chip.architecture}", code, "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    return f"{registers[1]} registers, {spilled[1]} bytes spilled"


def _ptxas() -> Path:
    """The assembler of the package that brings it."""
    for file in metadata.files("nvidia-cuda-nvcc-cu12") or ():
        if file.name == "ptxas":
            return Path(str(file.locate()))
    raise FileNotFoundError("ptxas is missing; `make test-compile` installs it")
