# SPDX-License-Identifier: Apache-2.0
"""Attention at released sizes, through a chip's compiler: what each kernel takes."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.compile.chips import GPU, TPU
from pyramid_jax import sharding
from pyramid_jax.kernels.attention import attention
from pyramid_jax.kernels.attention_mosaic import check_hopper
from pyramid_jax.kernels.tiles import tiles_for
from pyramid_jax.mask import TokenMask


class AttentionSize(NamedTuple):
    """The sizes of one call of attention."""

    name: str
    rows: int
    tokens: int
    heads: int = 24
    dim: int = 64
    dtype: str = "bfloat16"


# Rows of sampling have a prompt and a negative prompt; miniFLUX has 30 heads.
SIZES = (
    AttentionSize("384p sampling", 2, 3068),
    AttentionSize("768p sampling", 2, 15488),
    AttentionSize("768p training", 1, 24576, heads=30),
    AttentionSize("width 32", 1, 4096, dim=32),
    AttentionSize("width 96", 1, 4096, dim=96),
    AttentionSize("width 128", 1, 4096, dim=128),
    AttentionSize("float32", 1, 4096, dtype="float32"),
    AttentionSize("float32 width 128", 1, 4096, dim=128, dtype="float32"),
)


class Line(NamedTuple):
    """One kernel on one chip: memory in KiB, registers per thread, or the refusal."""

    chip: str
    size: str
    kernel: str = ""
    used: str = ""
    refusal: str | None = None

    def __str__(self) -> str:
        end = self.used if self.refusal is None else f"REFUSED: {self.refusal}"
        return f"{self.chip:5} {self.size:18} {self.kernel:15} {end}"


def compiled(chip: GPU | TPU, size: AttentionSize) -> Iterator[Line]:
    """Compiles both passes by each of the chip's backends; a line for each kernel."""
    for backend in chip.backends:
        if backend != "pallas_mosaic_gpu":
            yield from _compiled(chip, size, backend)
        elif size.dtype == "bfloat16":
            yield from _hopper(chip, size)


def _compiled(chip: GPU | TPU, size: AttentionSize, backend: str) -> Iterator[Line]:
    device = chip.device()
    one = sharding.device_mesh(devices=[device])
    arguments = _arguments(one, size)
    tiles = tiles_for(backend, size.dim, size.dtype, size.tokens, device.device_kind)

    def both(q, k, v, mask, back):
        def form(q, k, v):
            return attention(q, k, v, mask, backend, tiles)

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
            yield Line(chip.name, size.name, refusal=str(error).split("\n")[0][:300])
            return
        if backend == "pallas_mosaic_gpu":
            return
        if isinstance(chip, GPU):
            kernels = list(_of_gpu(chip, Path(folder)))
        elif text := _printed(program):
            kernels = list(_of_tpu(text))
        else:
            yield Line(chip.name, size.name, used="accepted; jaxlib cannot print it")
            return
    for kernel, used in sorted(kernels):
        yield Line(chip.name, size.name, kernel, used)
    if len(kernels) < 3:
        names = [kernel for kernel, _ in kernels]
        yield Line(chip.name, size.name, refusal=f"three kernels expected, got {names}")


def _hopper(chip: GPU | TPU, size: AttentionSize) -> Iterator[Line]:
    """The kernels in Mosaic GPU, which says on standard output what they take."""
    tile = tiles_for("pallas_mosaic_gpu", size.dim, size.dtype, size.tokens, "")
    try:
        check_hopper(size.dtype, tile)
    except ValueError as error:
        yield Line(chip.name, size.name, "in Mosaic GPU", f"left out: {error}")
        return
    refused: list[Line] = []

    def make() -> None:
        refused.extend(_compiled(chip, size, "pallas_mosaic_gpu"))

    told = _told(make, "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES")
    if refused:
        yield from refused
        return
    memory = re.findall(r"smem_scratch_bytes=(\d+)", told)
    used = {
        kernel: f"{registers} registers, {spilled} bytes spilled"
        for kernel, spilled, registers in re.findall(
            r"entry function '(\w+?)_groups\w*'.*?(\d+) bytes spill stores"
            r".*?Used (\d+) registers",
            told,
            re.DOTALL,
        )
    }
    # Mosaic tells the memory of kernels without their names, in the program's order.
    for kernel, size_of in zip(("forward", "query", "key"), memory, strict=True):
        what = f"{used[kernel]}, {int(size_of) / 1024:.0f} KiB shared memory"
        spills = ", 0 bytes spilled" not in what
        refusal = f"it spills: {what}" if spills else None
        yield Line(chip.name, size.name, f"{kernel} (Mosaic)", what, refusal)


def _told(make: Callable[[], None], *switches: str) -> str:
    """What a compiler writes to standard output, with its `switches` on."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.environ.update(dict.fromkeys(switches, "1"))
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 1)
            try:
                make()
                sys.stdout.flush()
            finally:
                os.dup2(kept, 1)
            file.seek(0)
            return file.read().decode()
    finally:
        os.close(kept)
        for switch in switches:
            del os.environ[switch]


def _arguments(one: Mesh, size: AttentionSize) -> tuple:
    here = NamedSharding(one, PartitionSpec())
    shape = (size.rows, size.tokens, size.heads, size.dim)
    x = jax.ShapeDtypeStruct(shape, size.dtype, sharding=here)
    number = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=here)
    return x, x, x, TokenMask(number, number), x


def _printed(program: Any) -> str:
    """The compiled program; empty where libtpu is newer than jaxlib can read."""
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

    XLA writes the assembler code of kernels, and so their registers, up to JAX 0.10.
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
    """What ptxas says about a kernel's registers."""
    command = [_ptxas(), "-v", f"-arch={chip.architecture}", code, "-o", "/dev/null"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert registers and spilled, log
    return f"{registers[1]} registers, {spilled[1]} bytes spilled"


def _ptxas() -> Path:
    """The assembler, from the package that brings it."""
    for file in metadata.files("nvidia-cuda-nvcc") or ():
        if file.name == "ptxas":
            return Path(str(file.locate()))
    raise FileNotFoundError("ptxas is missing; `make test-compile` installs it")
