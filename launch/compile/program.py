# SPDX-License-Identifier: Apache-2.0
"""What a compiled program does, read from its text, with loops weighed by their trips.

XLA's own cost analysis counts the body of a loop once, however often it runs.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from launch.compile.convolutions import convolution_flops

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8}
_ARRAYS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
COLLECTIVES = (*_ARRAYS, "collective-permute")
# What neither computes nor moves anything.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "while"),
    *("conditional", "call", "add-dependency"),
}
SLICES = ("dynamic-slice", "slice", "gather")
# Slices of their results are slices of what they read.
RESHAPED = ("bitcast", "copy", "reshape", "transpose")
CALLS = ("while", "fusion", "call")
BRANCHES = ("branch_computations", "true_computation", "false_computation")
# Their results are what goes in, then what comes out.
TWOFOLD = ("all-gather-start", "reduce-scatter-start", "all-to-all-start")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*?\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")


class Operation(NamedTuple):
    """An instruction: what it is called, makes, does, reads, and is told besides."""

    name: str
    result: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def called(self, *keys: str) -> list[str]:
        """The computations that it names by these attributes."""
        named = rf"(?:{'|'.join(keys)})=\{{?((?:%[\w.\-]+(?:, )?)+)"
        return [x for y in re.findall(named, self.rest) for x in _NAME.findall(y)]

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate of a TPU's cycles, where it says one."""
        said = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(said[1]) if said and int(said[1]) < 2**62 else None

    @property
    def origin(self) -> str:
        """Where it comes from in the program that was compiled."""
        said = re.search(r'op_name="([^"]*)"', self.rest)
        return said[1] if said else ""


class Collective(NamedTuple):
    """An exchange between devices, once: bytes of the whole array, devices of a group.

    `dtypes` are those of what is exchanged; `hidden` says that the program goes on
    meanwhile.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    hidden: bool
    dtypes: frozenset[str]


@dataclass(frozen=True)
class Program:
    """A compiled program's computations, by name."""

    entry: str
    computations: dict[str, dict[str, Operation]]

    @classmethod
    def read(cls, text: str) -> "Program":
        """The program in the text that `jax.stages.Compiled.as_text` returns.

        Raises:
            ValueError: no computation in it is the first to run.
        """
        entry, computations, inside = "", {}, {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                inside = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
            elif (found := _LINE.match(line)) and (one := _operation(*found.groups())):
                parts = (x for x in one.operands if "#" in x)
                inside |= {x: _part(x, inside) for x in parts} | {one.name: one}
        if not entry:
            raise ValueError("no computation is the ENTRY: this is no compiled program")
        return cls(entry, computations)

    @cached_property
    def times(self) -> Counter[str]:
        """How often each computation runs in a step, those inside fusions included.

        Of the branches of a choice only the longest one runs.
        """
        times: Counter[str] = Counter()

        def run(name: str, often: int) -> None:
            times[name] += often
            for one in self.computations[name].values():
                inner = often * (self.trips(one) if one.kind == "while" else 1)
                branches = one.called(*BRANCHES)
                if branches:
                    run(max(branches, key=lambda n: len(self.computations[n])), often)
                elif one.kind in CALLS or one.kind.endswith("-start"):
                    for other in one.called("body", "calls", *self._applied(one)):
                        run(other, inner)

        run(self.entry, 1)
        return times

    @cached_property
    def meanwhile(self) -> set[str]:
        """Computations that run beside others, from a start to its end."""
        found = set[str]()

        def follow(name: str) -> None:
            found.add(name)
            for one in self.computations[name].values():
                if one.kind in CALLS:
                    for other in one.called("calls", *self._applied(one)):
                        follow(other)

        for operations in self.computations.values():
            for one in operations.values():
                if one.kind.endswith("-start"):
                    for other in one.called("calls", *self._applied(one)):
                        follow(other)
        return found

    @cached_property
    def fused(self) -> set[str]:
        """Computations that run inside of one operation, or beside others."""
        return self.meanwhile | {
            other
            for operations in self.computations.values()
            for one in operations.values()
            if one.kind == "fusion"
            for other in one.called("calls")
        }

    def _applied(self, one: Operation) -> tuple[str, ...]:
        """Where a call names what it runs; sums name there what they add with."""
        return ("to_apply",) if one.kind in ("call", "call-start") else ()

    def trips(self, loop: Operation) -> int:
        """How often the body of a loop runs, which begins to count at 0.

        Raises:
            ValueError: its condition compares with nothing that is known.
        """
        if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(said[1])
        inside = self.computations[loop.called("condition")[0]]
        numbers = [
            int(one.rest.split(")")[0])
            for one in inside.values()
            if one.kind == "constant" and one.result.startswith("s32[]")
        ]
        if len(numbers) != 1:
            raise ValueError(f"the condition of {loop.name} does not tell its trips")
        return numbers[0]

    def running(self) -> Iterator[tuple[str, Operation, int]]:
        """What computes on the device by itself, where, and how often; no exchanges."""
        for name, often in self.times.items():
            if name not in self.fused:
                for one in self.computations[name].values():
                    begins = one.kind.endswith(("-start", "-update", "-done"))
                    if not (begins or one.kind in FREE or self._exchanges(one)):
                        yield name, one, often

    def flops(self) -> float:
        """Additions and multiplications of all products of matrices in a step.

        Convolutions count, kernels don't.
        """
        return sum(
            often * product_flops(one, self.computations[name])
            for name, often in self.times.items()
            for one in self.computations[name].values()
        )

    def work(self, name: str, one: Operation) -> float:
        """Those of one operation in a computation, with what is fused in it."""
        fused = one.called("calls") if one.kind == "fusion" else []
        return product_flops(one, self.computations[name]) + sum(
            self.work(other, inner)
            for other in fused
            for inner in self.computations[other].values()
        )

    def _exchanges(self, one: Operation) -> bool:
        """Whether an operation is an exchange, or a fusion of one."""
        inside = one.called("calls") if one.kind == "fusion" else []
        return one.kind in COLLECTIVES or any(
            other.kind in COLLECTIVES
            for name in inside
            for other in self.computations[name].values()
        )

    def moved(self, name: str, one: Operation) -> float:
        """Bytes that an operation reads and writes; of slices only those that count."""
        inside, cut = self.computations[name], one.kind in SLICES
        if cut or one.kind == "dynamic-update-slice":
            return 2 * size(one.result if cut else inside[one.operands[1]].result)
        if one.kind != "fusion":
            read = set(one.operands) & set(inside)  # some are given twice
            return size(one.result) + sum(size(inside[x].result) for x in read)
        body = self.computations[one.called("calls")[0]]
        total, written = 0.0, size(one.result)
        for other in body.values():
            if other.kind == "dynamic-update-slice":  # the array is changed in place
                whole, part = size(other.result), size(body[other.operands[1]].result)
                written -= whole - part if written >= whole else 0
            if other.kind == "parameter":
                total += _read(other, body)
        return total + written


def product_flops(one: Operation, inside: dict[str, Operation]) -> float:
    """Additions and multiplications of a matrix product or a convolution, else 0."""
    cublas = 'custom_call_target="__cublas' in one.rest
    if one.kind == "dot" or (one.kind == "custom-call" and cublas):
        left = dimensions(inside[one.operands[0]].result)
        said = re.search(r'lhs_contracting_dim\w+"?[=:][\[{]([^\]}]*)', one.rest)
        axes = re.findall(r"\d+", said[1]) if said else []
        return (
            2
            * math.prod(dimensions(one.result))
            * math.prod(left[int(axis)] for axis in axes)
        )
    if one.kind == "convolution" or 'custom_call_target="__cudnn$conv' in one.rest:
        arrays = [*(inside[x].result for x in one.operands[:2]), one.result]
        return convolution_flops(one.rest, [dimensions(x) for x in arrays])
    return 0


def size(result: str) -> float:
    """Bytes of an array, or of several."""
    return sum(map(_bytes, _ARRAY.findall(_LAYOUT.sub("", result))))


def dimensions(result: str) -> tuple[int, ...]:
    """The shape of an array, or of the first of several."""
    first = _ARRAY.search(result)
    return tuple(int(n) for n in first[2].split(",") if n) if first else ()


def collectives(program: Program) -> Iterator[tuple[Collective, int]]:
    """Every exchange of a step, and how often it takes place.

    A TPU's compiler writes a sum of which each device keeps a part as an all-reduce in
    a fusion of that name.
    """
    for name, often in program.times.items():
        for one in program.computations[name].values():
            if (found := collective(program, name, one)) is not None:
                yield found, often


def collective(program: Program, name: str, one: Operation) -> Collective | None:
    """The exchange that an operation of a computation begins; None: it is none."""
    kind = one.kind.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    arrays = _ARRAY.findall(_LAYOUT.sub("", one.result))
    if one.kind in TWOFOLD:
        arrays = arrays[len(arrays) // 2 :]
    total, group = sum(map(_bytes, arrays)), _group(one.rest)
    if kind == "reduce-scatter":
        total *= len(group)
    if kind == "all-reduce" and "scatter" in name:
        kind = "reduce-scatter"
    hidden = kind != one.kind and one.kind.endswith("-start")
    hidden = (hidden or name in program.meanwhile) and '"is_sync":true' not in one.rest
    dtypes = frozenset(dtype for dtype, _ in arrays)
    return Collective(kind, total, group, hidden, dtypes)


def _operation(root: str | None, name: str, text: str) -> Operation | None:
    end = _close(text, " ")  # a result may be a tuple of tuples
    found = re.match(r"([\w\-]+)\(", text[end + 1 :])
    if found is None:
        return None
    inner = text[end + 1 + found.end() :]
    operands = tuple(_NAME.findall(inner[: _close(inner, ")")]))
    result = re.sub(r"/\*.*?\*/", "", text[:end])
    return Operation(name, result, found[1], operands, inner, bool(root))


def _part(operand: str, inside: dict[str, Operation]) -> Operation:
    """The part `name#3` of a tuple, as what takes it out."""
    name, *indices = operand.split("#")
    result = inside[name].result
    for index in map(int, indices):
        result = result[1:-1]
        for _ in range(index):
            result = result[_close(result, ",") + 2 :]
        result = result[: _close(result, ",")]
    return Operation(operand, result, "get-tuple-element", (name,), "", False)


def _close(text: str, letter: str) -> int:
    """Where a letter first stands outside of all brackets that are opened."""
    depth = 0
    for at, each in enumerate(text):
        if each == letter and depth == 0:
            return at
        depth += (each in "({[") - (each in ")}]")
    return len(text)


def _read(argument: Operation, body: dict[str, Operation]) -> float:
    """Bytes of a fusion's argument that it reads: all, unless it takes slices only."""
    if argument.root:
        return size(argument.result)
    total = 0.0
    for one in (x for x in body.values() if argument.name in x.operands):
        if one.kind in SLICES:
            total += size(one.result)
        elif one.kind in RESHAPED:
            total += _read(one, body)
        elif one.kind != "dynamic-update-slice" or one.operands[0] != argument.name:
            return size(argument.result)
    return min(total, size(argument.result))


def _group(rest: str) -> tuple[int, ...]:
    """The first group of devices that an exchange is among, by number."""
    if said := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        axes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", said[1])}
        grid = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        among = re.findall(r"'(\w+)'", said[2])
        index = tuple(slice(None) if name in among else 0 for name in axes)
        return tuple(int(n) for n in grid[index].ravel())
    if said := re.search(_GROUPS, rest):
        shape, source = (tuple(map(int, said[i].split(","))) for i in (1, 2))
        grid = np.arange(math.prod(source)).reshape(source)
        if said[4]:
            grid = grid.transpose(tuple(map(int, said[4].split(","))))
        return tuple(int(n) for n in grid.reshape(shape)[0])
    if said := re.search(r"(?:replica_groups|_target_pairs)=\{\{([\d,]+)\}", rest):
        return tuple(int(n) for n in said[1].split(","))
    return ()


def _bytes(array: tuple[str, str]) -> float:
    """Of an array, by its type and its shape."""
    dtype, shape = array
    bits = re.search(r"\d+", dtype)
    each = BYTES.get(dtype, int(bits[0]) / 8 if bits else 0)
    return each * math.prod(int(n) for n in shape.split(",") if n)
