# SPDX-License-Identifier: Apache-2.0
"""Programs in files: found by what they depend on, made again if anything is wrong."""

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pyramid_jax import programs, sharding
from pyramid_jax.programs import ProgramFolder

ROOT = Path(__file__).resolve().parent.parent
COMPILING = "/jax/core/compile/backend_compile_duration"
TRACED: list[float] = []  # the factors with which `scaled` was traced
COMPILED: list[str] = []

monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event == COMPILING else None
)


def scaled(factor: float, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    TRACED.append(factor)
    return {"sum": factor * x + y.sum(), "product": factor * x @ x.T}


def divided(mesh: Mesh, x: jax.Array) -> dict[str, jax.Array]:
    TRACED.append(mesh.size)
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return {"sum": jax.lax.with_sharding_constraint(2 * x, place)}


def process(function: Any = scaled, **choices: Any) -> Any:
    """The function as the next process has it: neither we nor JAX know it yet."""
    copy = FunctionType(
        function.__code__, function.__globals__, closure=function.__closure__
    )
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    return programs.kept(copy, **({"static": 1} | choices))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    programs.keep(tmp_path / "kept")
    TRACED.clear()
    COMPILED.clear()
    yield tmp_path / "kept"
    programs.keep(None)


X = np.arange(12, dtype=np.float32).reshape(3, 4)
Y = np.ones(5, np.float32)


def same(got: dict[str, jax.Array], factor: float = 2.0) -> bool:
    wanted = {"sum": factor * X + 5, "product": factor * X @ X.T}
    return all(np.array_equal(got[name], wanted[name]) for name in wanted)


def test_the_next_process_neither_traces_nor_compiles(folder: Path):
    assert same(process()(2.0, X, Y)) and TRACED == [2.0] and COMPILED
    COMPILED.clear()
    assert same(process()(2.0, X, Y))
    assert TRACED == [2.0] and not COMPILED


def test_a_program_is_looked_for_once(folder: Path):
    function = process()
    function(2.0, X, Y)
    for file in folder.iterdir():
        file.unlink()
    assert same(function(2.0, X, Y)) and TRACED == [2.0]


def test_without_a_folder_nothing_is_kept(tmp_path: Path):
    programs.keep(None)
    assert same(process()(2.0, X, Y)) and same(process()(2.0, X, Y))
    assert len(TRACED) == 2 and not list(tmp_path.iterdir())


def test_other_arguments_are_other_programs():
    first = process()
    for factor in (2.0, 3.0):
        assert same(first(factor, X, Y), factor) and same(first(factor, X, Y), factor)
    assert TRACED == [2.0, 3.0]
    second = process()
    assert second(2.0, X[:2], Y)["product"].shape == (2, 2)
    assert second(2.0, X.astype(np.float16), Y.astype(np.float16))["sum"].dtype == "f2"
    assert second(2.0, jnp.asarray(X), Y)["sum"].dtype == "f4"
    assert same(second(2.0, X, Y)) and TRACED == [2.0, 3.0, 2.0, 2.0, 2.0]


def test_another_source_is_traced_but_what_stays_the_same_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
):
    process()(2.0, X, Y)
    COMPILED.clear()
    monkeypatch.setattr(programs, "_source", lambda: "another")
    assert same(process()(2.0, X, Y)) and len(TRACED) == 2 and not COMPILED
    assert same(process()(2.0, X, Y)) and len(TRACED) == 2


def test_a_changed_function_is_another_program(monkeypatch: pytest.MonkeyPatch):
    process()(2.0, X, Y)
    monkeypatch.setattr(programs, "_source", lambda: "another")

    def changed(factor: float, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        return {"sum": x, "product": factor * x}

    changed.__qualname__, changed.__name__ = scaled.__qualname__, scaled.__name__
    assert np.array_equal(process(changed)(2.0, X, Y)["sum"], X)


@pytest.mark.parametrize("what", ["flags", "setting", "compiler", "machine"])
def test_other_options_and_machines_have_programs_of_their_own(
    monkeypatch: pytest.MonkeyPatch, what: str
):
    process()(2.0, X, Y)
    COMPILED.clear()
    choices = {}
    if what == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    elif what == "setting":
        jax.config.update("jax_default_matmul_precision", "highest")
    elif what == "compiler":
        choices["options"] = {"xla_cpu_enable_fast_math": True}
    else:
        monkeypatch.setattr(programs, "_machine", lambda: "another")
    try:
        assert same(process(**choices)(2.0, X, Y))
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert len(TRACED) == 2 and len(COMPILED) == 1


def cut(stored: bytes) -> bytes:
    return stored[: len(stored) // 2]


def flipped(stored: bytes) -> bytes:
    middle = len(stored) // 2
    return stored[:middle] + bytes([stored[middle] ^ 1]) + stored[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped, lambda stored: b""])
def test_damaged_files_are_made_again(
    damage: Any, folder: Path, caplog: pytest.LogCaptureFixture
):
    process()(2.0, X, Y)
    files = sorted(folder.iterdir())
    assert len(files) == 2
    for file in files:
        intact = file.read_bytes()
        file.write_bytes(damage(intact))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert same(process()(2.0, X, Y))
        assert [f"{file} is damaged" in text for text in caplog.messages] == [True]
        traced = len(TRACED)
        assert same(process()(2.0, X, Y)) and len(TRACED) == traced


def test_files_that_a_runtime_refuses_are_made_again(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    process()(2.0, X, Y)
    largest = max(folder.iterdir(), key=lambda file: file.stat().st_size).name
    for data in (b"no pickle", pickle.dumps((b"no program", None, None))):
        ProgramFolder(folder).write(largest, data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert same(process()(2.0, X, Y))
        assert [f"{largest} can't be used" in x for x in caplog.messages] == [True]
        traced = len(TRACED)
        assert same(process()(2.0, X, Y)) and len(TRACED) == traced


def test_a_folder_that_takes_no_files_costs_only_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder", Path("/proc/none")):
        programs.keep(path)
        with caplog.at_level(logging.WARNING):
            assert same(process()(2.0, X, Y))
    assert not caplog.messages and len(TRACED) == 3


def test_programs_are_read_from_a_folder_that_takes_no_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    process()(2.0, X, Y)

    def refused(*_: Any, **__: Any):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.utime", refused)
    monkeypatch.setattr(Path, "write_bytes", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert same(process()(2.0, X, Y)) and len(TRACED) == 1
    assert same(process()(3.0, X, Y), 3.0)


def test_what_lies_unused_makes_room(tmp_path: Path):
    small = ProgramFolder(tmp_path / "small", limit=2600)
    noise = {name: np.random.default_rng(i).bytes(1000) for i, name in enumerate("abc")}
    for name in "ab":
        small.write(name, noise[name])
        os.utime(small.path / name, (1, 1))
    assert small.read("a") == noise["a"]
    small.write("c", noise["c"])
    assert [small.read(name) for name in "abc"] == [noise["a"], None, noise["c"]]


def test_functions_without_a_name_are_compiled_and_not_kept(folder: Path):
    function = process(lambda factor, x: factor * x)
    assert np.array_equal(function(2.0, X), 2 * X)
    assert not folder.exists()


def test_inside_another_function_it_is_a_part_of_that(folder: Path):
    inner = process()
    outer = jax.jit(lambda x, y: inner(2.0, x, y))
    assert same(outer(X, Y)) and not folder.exists()


def test_arguments_can_be_donated():
    for _ in range(2):
        x = jnp.asarray(X)
        assert same(process(donate=(1,))(2.0, x, Y))
        assert x.is_deleted()
    assert len(TRACED) == 1


def test_programs_of_many_devices_are_kept_by_their_order():
    mesh = sharding.device_mesh(data=2, fsdp=2, tensor=2)
    other = Mesh(mesh.devices[::-1], mesh.axis_names, axis_types=mesh.axis_types)
    results = []
    for mesh_of_process in (mesh, mesh, other, other):
        place = NamedSharding(mesh_of_process, PartitionSpec(None, ("data", "fsdp")))
        got = process()(2.0, jax.device_put(X, place), Y)
        assert same(got)
        results.append((got["sum"].sharding, len(TRACED)))
    assert [traced for _, traced in results] == [1, 1, 2, 2]
    assert results[0][0] == results[1][0] and results[2][0] == results[3][0]
    last = process()(2.0, jax.device_put(X, jax.devices()[5]), Y)
    again = process()(2.0, jax.device_put(X, jax.devices()[5]), Y)
    assert same(last) and same(again) and len(TRACED) == 3
    assert again["sum"].devices() == {jax.devices()[5]}


@pytest.mark.parametrize("order", [1, -1])
def test_a_program_may_have_more_devices_than_its_arguments(order: int):
    mesh = Mesh(jax.devices()[::order], ("data",))
    x = np.arange(8, dtype=np.float32)
    first, again = (process(divided)(mesh, x)["sum"] for _ in range(2))
    assert np.array_equal(again, 2 * x) and first.sharding == again.sharding
    assert TRACED == [8]
