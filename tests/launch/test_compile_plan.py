# SPDX-License-Identifier: Apache-2.0
"""What `launch.compile --config` reads from compiled programs, and says of a step."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.compile.__main__ import main
from launch.compile.chips import compilers
from launch.compile.dump import allocated
from launch.compile.machines import machine
from launch.compile.plan import LINKS, MEMORY, Plan, report
from launch.compile.program import Collective, Program, collectives, product_flops
from launch.compile.sampling import taken
from tests.conftest import ROOT

BLOCKS, ROWS, WIDTH = 5, 64, 96


def step(weights: jax.Array, x: jax.Array, unroll: bool = False) -> jax.Array:
    """The gradient of blocks of two products each."""

    def block(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w[0]) @ w[1], None

    def loss(weights: jax.Array) -> jax.Array:
        last, _ = jax.lax.scan(block, x, weights, unroll=BLOCKS if unroll else 1)
        return jnp.square(last).sum()

    return jax.grad(loss)(weights)


@cache
def over_eight() -> Program:
    """The step with weights and rows divided over eight devices."""
    mesh = Mesh(jax.devices(), ("fsdp",))
    weights = jax.ShapeDtypeStruct(
        (BLOCKS, 2, WIDTH, WIDTH),
        jnp.float32,
        sharding=NamedSharding(mesh, P(None, None, "fsdp")),
    )
    x = jax.ShapeDtypeStruct(
        (8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    made = jax.jit(step, out_shardings=weights.sharding).lower(weights, x).compile()
    return Program.read(made.as_text())


def test_loops_are_weighed_by_their_trips():
    shapes = jnp.zeros((BLOCKS, 2, WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
    rolled, unrolled = (
        jax.jit(step, static_argnums=2).lower(*shapes, unroll).compile()
        for unroll in (False, True)
    )
    once = rolled.cost_analysis()["flops"]
    expected = unrolled.cost_analysis()["flops"]  # has no loop
    counted = Program.read(rolled.as_text()).flops()
    assert once < 0.5 * expected
    assert counted == pytest.approx(expected, rel=0.05)
    # Two products in a forward pass, and twice as many backward.
    assert counted == 2 * (6 * BLOCKS) * ROWS * WIDTH**2


def test_exchanges_are_counted_by_kind_and_bytes():
    program = over_eight()
    kinds = {one.kind for one, _ in collectives(program)}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    found = [pair for pair in collectives(program) if pair[0].kind == "all-gather"]
    assert {len(one.group) for one, _ in found} == {8}
    assert sum(often * one.bytes for one, often in found) % (4 * WIDTH**2) == 0
    assert sum(often for _, often in found) >= BLOCKS


TPU = """HloModule step, is_scheduled=true

%gathering (p: bf16[384,64]) -> bf16[1536,64] {
  %p = bf16[384,64]{1,0} parameter(0)
  ROOT %g = bf16[1536,64]{1,0} all-gather(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}
%all-reduce-scatter (input: bf16[1536,64]) -> bf16[384,64] {
  %input = bf16[1536,64]{1,0} parameter(0)
  %r = bf16[1536,64]{1,0} all-reduce(%input), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, to_apply=%add
  ROOT %s = bf16[384,64]{1,0} dynamic-slice(%r, %r), dynamic_slice_sizes={384,64}
}
%until (p.1: (s32[], bf16[384,64])) -> pred[] {
  %p.1 = (s32[], bf16[384,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %most = s32[]{:T(128)} constant(23)
  ROOT %lt = pred[]{:T(512)} compare(%i, %most), direction=LT
}
%body (p.2: (s32[], bf16[384,64])) -> (s32[], bf16[384,64]) {
  %p.2 = (s32[], bf16[384,64]{1,0}) parameter(0)
  %w = bf16[384,64]{1,0} get-tuple-element(%p.2), index=1
  %begin = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%gathering
  %end = bf16[1536,64]{1,0} call-done(%begin)
  %back = bf16[384,64]{1,0} fusion(%end), kind=kCustom, calls=%all-reduce-scatter
  %n = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %t = (s32[], bf16[384,64]{1,0}) tuple(%n, %back)
}
ENTRY %main (x: (s32[], bf16[384,64])) -> (s32[], bf16[384,64]) {
  %x = (s32[], bf16[384,64]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[384,64]{1,0}) while(%x), condition=%until, body=%body
}
"""  # noqa: E501


def test_exchanges_of_a_tpu_are_told_apart():
    program, half = Program.read(TPU), frozenset({"bf16"})
    assert sorted(collectives(program), key=str) == [
        (Collective("all-gather", 2 * 1536 * 64, (0, 2, 4, 6), True, half), 23),
        (Collective("reduce-scatter", 2 * 1536 * 64, (0, 1, 2, 3), False, half), 23),
    ]
    assert list(program.running()) == []
    with pytest.raises(ValueError, match="no computation is the ENTRY"):
        Program.read("a page")


SLICED = """%sliced (x: f32[6,4], y: f32[6,4]) -> f32[4,3] {
  %x = f32[6,4]{1,0} parameter(0)
  %y = f32[6,4]{1,0} parameter(1)
  %turned = f32[4,6]{1,0} transpose(%x), dimensions={1,0}
  %part = f32[4,3]{1,0} slice(%turned), slice={[0:4], [0:3]}
  %other = f32[4,6]{1,0} bitcast(%y)
  %more = f32[4,3]{1,0} slice(%other), slice={[0:4], [3:6]}
  %sum = f32[4,3]{1,0} add(%part, %more)
  %all = f32[4]{0} reduce(%other), dimensions={1}
  ROOT %out = f32[4,3]{1,0} add(%sum, %all)
}
ENTRY %main (x: f32[6,4], y: f32[6,4]) -> f32[4,3] {
  %x = f32[6,4]{1,0} parameter(0)
  %y = f32[6,4]{1,0} parameter(1)
  ROOT %f = f32[4,3]{1,0} fusion(%x, %y), kind=kLoop, calls=%sliced
}
"""


def test_of_an_array_only_slices_are_read_whatever_its_shape_is_meanwhile():
    """Of x a half; of y, which is also summed, everything."""
    program = Program.read(SLICED)
    moved = [program.moved(x, one) for x, one, _ in program.running()]
    assert moved == [4 * (12 + 24 + 12)]


EXCHANGES = """ENTRY %main (x: bf16[1000,1000]) -> bf16[1000,1000] {
  %x = bf16[1000,1000]{1,0} parameter(0)
  %begin = (bf16[1000,1000]{1,0}, bf16[1000,1000]{1,0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %beside = bf16[1000,1000]{1,0} add(%x, %x)
  %end = bf16[1000,1000]{1,0} all-gather-done(%begin)
  %sync = bf16[1000,1000]{1,0} all-gather(%end), replica_groups={{0,1}}, dimensions={0}
  ROOT %y = bf16[1000,1000]{1,0} add(%sync, %beside)
}
"""  # noqa: E501


def test_a_part_of_a_tuple_has_its_own_size():
    text = """HloModule step, is_scheduled=true

ENTRY %main (p: (s32[], (f32[3]), bf16[2,4])) -> bf16[2,4] {
  %p = (s32[]{:T(128)S(6)}, (f32[3]{0}), bf16[2,4]{1,0:T(8,128)}) parameter(0)
  %n = f32[3]{0} copy(%p#1#0)
  ROOT %c = bf16[2,4]{1,0} copy(%p#2)
}
"""
    program = Program.read(text)
    moved = {one.name: program.moved(x, one) for x, one, _ in program.running()}
    assert moved == {"n": 2 * 3 * 4, "c": 2 * 8 * 2}


def test_a_step_waits_for_what_no_work_beside_it_hides():
    four, mesh = machine("cpu"), Mesh(np.array(jax.devices()[:2]), ("data",))
    found = taken(Program.read(EXCHANGES), four, mesh, seen=1)
    sent = 2e6 / 2 / four.chip.link / LINKS
    moved = 2e6 / four.chip.bandwidth / MEMORY
    beside = 2 * moved  # reads one array, which it is given twice
    assert found.busy == pytest.approx(beside + 3 * moved)
    assert found.waited == pytest.approx(max(0.0, sent - beside) + sent)
    assert (found.bytes, found.count) == (4e6, 2)


PRODUCTS = """ENTRY %main (x: bf16[2,100,32]) -> f32[8,20] {
  %x = bf16[2,100,32]{2,1,0} parameter(0)
  %w = bf16[32,3,24,64,1]{3,2,1,0,4} parameter(1)
  %y = f32[8,16]{1,0} parameter(2)
  %z = f32[16,20]{1,0} parameter(3)
  %q = bf16[2,100,3,24,64]{1,4,3,2,0} convolution(%x5, %w), window={size=1x3x24 pad=0_0x2_2x23_23 rhs_reversal=0x1x1}, dim_labels=0bf12_i12o0->0b12f
  %x5 = bf16[2,100,32,1,1]{2,1,0,3,4} bitcast(%x)
  %e = bf16[2,100,32]{2,1,0} convolution(%x, %s), window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf
  %s = bf16[2,32,32]{2,1,0} parameter(4)
  ROOT %d = f32[8,20]{1,0} dot(%y, %z), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("d", 2 * 8 * 20 * 16),
        # A TPU's product with three groups of 24 heads, each a place of a window that
        # meets the one cell there is.
        ("q", 2 * 2 * 100 * 32 * 3 * 24 * 64),
        # Two products at once: every second cell of the dilated axis is empty.
        ("e", 2 * 2 * 100 * 32 * 32),
    ],
)
def test_products_are_counted_without_padding(name, expected):
    inside = Program.read(PRODUCTS).computations["main"]
    assert product_flops(inside[name], inside) == expected


GRADIENTS = """ENTRY %main (x: bf16[2,9,8,32]) -> bf16[2,4,4,64] {
  %x = bf16[2,9,8,32]{3,2,1,0} parameter(0)
  %w = bf16[64,3,3,32]{3,2,1,0} parameter(1)
  %dy = bf16[2,5,4,64]{3,2,1,0} parameter(2)
  %dx = (bf16[2,9,8,32]{3,2,1,0}, u8[0]{0}) custom-call(%dy, %w), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %dw = (bf16[64,3,3,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %dy), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %y = (bf16[2,5,4,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
}"""  # noqa: E501


@pytest.mark.parametrize("name", ["y", "dx", "dw"])
def test_gradients_of_a_convolution_take_what_it_takes(name):
    """Of 9 rows 5 are reached, in 13 of 15 places; of 8 columns 4, in 11 of 12."""
    inside = Program.read(GRADIENTS).computations["main"]
    assert product_flops(inside[name], inside) == 2 * 2 * 64 * 32 * 13 * 11


def plan(**changes) -> Plan:
    numbers = {
        "config": "mine",
        "machine": "v5p:4x4x4",
        "devices": 64,
        "mesh": {"data": 4, "fsdp": 16},
        "hops": {"data": 1.0, "fsdp": 1.25},
        "rows": 128,
        "memory": {"arguments": 4e9, "temporary": 9e9, "results": 0, "total": 13e9},
        "capacity": 95 * 2**30,
        "flops": {"peak": 4e14, "products": 2e14, "attention": 1e14, "needed": 2e14},
        "exchanges": [
            dict(kind="all-gather", devices=16, hidden=False, dtype="bf16")
            | dict(count=3, bytes=2**30, seconds=0.1)
        ],
        "seconds": {"products": 0.8, "exchanges": 0.2, "step": 1.0},
        "compiler": "JAX",
    }
    return Plan(**numbers | changes)


def test_a_plan_says_whether_it_fits_and_what_limits_it():
    good = plan()
    assert good.fits and (good.utilisation, good.busy) == (0.5, 0.75)
    assert "it fits" in report(good) and "WAITED FOR" in report(good)
    assert good.record()["fits"]
    tight = plan(memory=dict(good.memory) | {"total": 94 * 2**30})
    assert not tight.fits and "DOES NOT FIT" in report(tight)


def test_a_prediction_faster_than_the_devices_is_an_error():
    with pytest.raises(ValueError, match="wrong: it is busy to 150%"):
        plan(seconds={"step": 0.5})


def test_bytes_are_told_by_what_they_are_for():
    text = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <1 add @0> (size=512,offset=0): f32[]
allocation 1: size 400, page 0, parameter 2, shape |f32[10,10]| at ShapeIndex {}:
allocation 2: size 30, color 5, page 0, parameter 3, shape |f32[7]| at ShapeIndex {}:
allocation 3: size 8, page 0, output shape is |(f32[], f32[])|, maybe-live-out:
allocation 4: size 7, color 1, page 0, preallocated-temp:
allocation 5: size 90, page 0, preallocated-temp:
allocation 6: size 5, page 0, constant:
"""
    sizes = {"arguments": 400, "temporary": 95, "results": 8}
    assert allocated(text) == sizes | {"total": 503, "host": 30}


@pytest.mark.slow  # two processes, each of which compiles a training step
def test_a_plan_needs_no_instructions(tmp_path: Path):
    command = [sys.executable, "-m", "launch.compile", "--config=tiny:smoke"]
    found = []
    for option in ("--topology=cpu", "--whole"):
        file = tmp_path / f"{option}.json"
        subprocess.run([*command, option, f"--json={file}"], check=True, cwd=ROOT)
        found.append(json.loads(file.read_text()))
    early, whole = found
    assert early["flops"] == whole["flops"] and early["exchanges"] == whole["exchanges"]
    assert early["seconds"] == pytest.approx(whole["seconds"])
    for name in ("arguments", "total"):
        assert early["memory"][name] == pytest.approx(whole["memory"][name], rel=0.02)


def test_machines_have_names():
    assert machine("cpu").devices == tuple(jax.devices())
    with pytest.raises(ValueError, match="no machine 'h900x2'; name a TPU slice"):
        machine("h900x2")
    with pytest.raises(SystemExit, match="no machine 'h900x2'"):
        main(["--config=tiny", "--topology=h900x2"])
    with pytest.raises(SystemExit, match="unrecognized arguments: --fast"):
        main(["--config=tiny", "--fast"])


@pytest.mark.parametrize("topology", ["v5p:3x7x5", "v5p:16x16", "v6e:4x4x4", "v5e:0x4"])
def test_a_slice_that_there_is_not_is_refused_before_its_compiler_is_asked(
    monkeypatch, topology: str
):
    monkeypatch.setattr(topologies, "get_topology_desc", None)
    with pytest.raises(ValueError, match=r"no slice of v.. is .*; give [23] sides"):
        machine(topology)


@pytest.mark.parametrize(
    "arguments",
    [["--config=tiny", "--topology=v5e:2x2"], ["--chips=v5e"], ["--chips=a100"]],
)
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, arguments):
    def missing(platform: str, **_: str):
        raise (RuntimeError if platform == "tpu" else NotImplementedError)("not here")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(SystemExit, match=r"\(not here\); run pip install '.*compile]'"):
        main(arguments)


def test_what_a_compiler_refuses_is_its_own_error():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="no such topology"),
        compilers(),
    ):
        raise jax.errors.JaxRuntimeError("no such topology")
