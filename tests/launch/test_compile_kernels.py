# SPDX-License-Identifier: Apache-2.0
"""What the compiler of Mosaic GPU kernels says, read from its output."""

import os

import pytest

from launch.compile import kernels as module
from launch.compile.chips import H200
from launch.compile.kernels import SIZES, compiled

KERNEL = """ptxas info    : Compiling entry function '{}_groups_mosaic_gpu_kernel'
    0 bytes stack frame, {} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


@pytest.fixture
def told(monkeypatch):
    """Has a compiler say something instead of compiling."""

    def say(text: str, *lines: module.Line) -> list[module.Line]:
        def compiler(chip, size, backend):
            if backend == "pallas_mosaic_gpu":
                os.write(1, text.encode())
                yield from lines

        monkeypatch.setattr(module, "_compiled", compiler)
        monkeypatch.setattr(module, "check_hopper", lambda *what: None)
        return list(compiled(H200, SIZES[0]))

    return say


def test_registers_spills_and_memory_of_each_kernel_are_read(told):
    memory = "".join(
        f"Resources(smem_scratch_bytes={n << 10}, x=0)\n" for n in (3, 4, 5)
    )
    kernels = [KERNEL.format(*each) for each in (("key", 0), ("forward", 0))]
    forward, query, key = told(memory + "".join(kernels) + KERNEL.format("query", 12))
    used = "168 registers, {} bytes spilled, {} KiB shared memory"
    assert (forward.kernel, forward.used) == ("forward (Mosaic)", used.format(0, 3))
    assert (key.used, key.refusal) == (used.format(0, 5), None)
    assert query.refusal == "it spills: " + used.format(12, 4)


def test_a_refusal_is_passed_on(told):
    line = module.Line("H200", "384p", refusal="no such instruction")
    assert told("something", line) == [line]
    assert os.write(1, b"") == 0  # standard output is what it was


def test_a_jax_too_old_for_the_kernels_leaves_them_out(monkeypatch):
    def check(dtype, tiles):
        raise ValueError("too old")

    monkeypatch.setattr(module, "_compiled", lambda *what: iter(()))
    monkeypatch.setattr(module, "check_hopper", check)
    (line,) = compiled(H200, SIZES[0])
    assert line.used == "left out: too old" and line.refusal is None
