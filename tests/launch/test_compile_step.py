# SPDX-License-Identifier: Apache-2.0
"""What `launch.compile` calls waste in a compiled Euler step, in small programs."""

from dataclasses import dataclass

import pytest

from launch.compile.step import EulerStep, instructions, kernels, waste

GELU = 'custom-call(%x), backend_config={"epilogue":"BIAS_GELU"}'
ROLLED = EulerStep("rolled", "mmdit", False, 3, (2, 0))
UNROLLED = EulerStep("unrolled", "mmdit", True, 3, (1, 0))
WEIGHTS = {(1536, 6144)}


@dataclass
class Program:
    """A program with a loop, of these instructions."""

    body: tuple[str, ...] = ()
    entry: tuple[str, ...] = ()

    def text(self) -> str:
        lines = ["HloModule step", "%body (p: f32[2]) -> f32[2] {"]
        lines += [f"  %b{i} = {line}" for i, line in enumerate(self.body)]
        lines += ["}", "%inside (p: f32[2]) -> f32[2] {", "  %c = f32[2]{0} add(%p)"]
        lines += ["}", "ENTRY %main (p: f32[2]) -> f32[2] {"]
        lines += [f"  %e{i} = {line}" for i, line in enumerate(self.entry)]
        lines += ["  ROOT %w = f32[2]{0} while(%p), condition=%c, body=%body", "}"]
        return "\n".join(lines)


def named(result: str, kind: str, origin: str) -> str:
    return f'{result} {kind}(%x), metadata={{op_name="jit(step)/{origin}"}}'


CLEAN = Program(
    body=(f"f32[2]{{0}} {GELU}",) * 3,
    entry=(f"f32[2]{{0}} {GELU}", "f32[2]{0} parameter(0)"),
)


def test_a_step_without_waste():
    assert list(waste(CLEAN.text(), ROLLED, WEIGHTS)) == []
    assert kernels(CLEAN.text(), ROLLED) == 3
    assert {x.inside for x in instructions(CLEAN.text())} == {"body", "main"}


@pytest.mark.parametrize(
    ("body", "entry", "fault"),
    [
        (named("s32[8]{0}", "fusion", "argsort/sort"), "", "sorted in every layer"),
        ("", named("f32[8]{0}", "fusion", "modulation/linear/dot_general"), "computed"),
        (named("f32[8]{0}", "fusion", "add"), "", "4 kernels per block, expected 3"),
    ],
)
def test_waste_is_told(body, entry, fault):
    body = (*CLEAN.body, body) if body else CLEAN.body
    program = Program(body, (*CLEAN.entry, entry) if entry else CLEAN.entry)
    faults = list(waste(program.text(), ROLLED, WEIGHTS))
    assert any(fault in each for each in faults)


def test_gelu_of_its_own_is_told():
    (fault,) = waste(Program(("f32[2]{0} add(%x)",)).text(), ROLLED, WEIGHTS)
    assert "0 products compute GELU, expected 3" in fault


def test_copies_of_weights_are_told_where_no_loop_needs_them():
    copy = named("bf16[1,1536,6144]{2,1,0}", "copy", "DiT/DiT._run/slice")
    program = Program(entry=(f"f32[2]{{0}} {GELU}", copy))
    (fault,) = waste(program.text(), UNROLLED, WEIGHTS)
    assert "weights are copied: ['bf16[1,1536,6144]" in fault


@pytest.mark.parametrize(("count", "faults"), [(8, 0), (7, 1)])
def test_a_step_of_float8_multiplies_nothing_else(count, faults):
    rounded = ('f32[2]{0} custom-call(%x), target="__cublas$lt$matmul$f8"',)
    program = Program(CLEAN.body, (*CLEAN.entry, *rounded * count))
    size = ROLLED._replace(products="fp8")
    assert len(list(waste(program.text(), size, WEIGHTS))) == faults
