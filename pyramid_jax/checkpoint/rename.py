# SPDX-License-Identifier: Apache-2.0
"""Turns the original's tensors into parameters and back, strictly, by a table of rules.

Every tensor is used exactly once and every parameter made exactly once, with the shape
that the model expects; otherwise one error lists everything that is wrong, before any
weight is read. Tensors are read one rule at a time, so that host memory stays near the
largest parameter where tensors are lazy (`tensors.read_tensors`) and `place` moves
parameters to devices.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import ShapeDtypeStruct

from pyramid_jax.checkpoint.dit_tables import TRANSFORMS, Rule, Table, Transform
from pyramid_jax.checkpoint.files import Place
from pyramid_jax.checkpoint.tensors import finite_values
from pyramid_jax.sharding import unbox

TOLERANCE = 1e-5  # between a computed constant and one stored in float32
THREADS = 8  # read, check and transpose layers at the same time
ROWS = 16  # of a transposed matrix, copied at once

TensorShape = tuple[int, ...]


class LayerRule(NamedTuple):
    """A rule at one layer: tensors `theirs` are parameters of `shapes` at `index`."""

    index: tuple[int, ...]  # (layer,), or () for a parameter that is not stacked
    theirs: tuple[str, ...]
    shapes: tuple[TensorShape, ...]


def convert_tensors(
    tensors: Mapping[str, Any], table: Table, abstract: Any, place: Place | None = None
) -> Any:
    """The parameters, shaped and typed like `abstract`, from the original's tensors.

    Args:
        tensors: values with a `shape` that numpy can turn into an array, lazily or not.
        abstract: nested dicts of arrays or shapes, e.g. from `jax.eval_shape`.
        place: what to do with each finished parameter, e.g. put it on the devices.

    Raises:
        ValueError: listing all tensors that are missing, left over, of another shape or
            no floating-point numbers; or naming one that is not finite.
    """
    flat = converted_parameters(tensors, table, abstract)
    place = place or (lambda _, x: x)
    return unflatten_dict({path: place(path, x) for path, x in flat}, sep="/")


def converted_parameters(
    tensors: Mapping[str, Any], table: Table, abstract: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters by path, one after the other; otherwise like `convert_tensors`."""
    expected = _flatten(abstract)
    problems = shape_problems(tensors, table, abstract)
    _check_none(problems + constant_problems(tensors, table))
    with ThreadPoolExecutor(THREADS) as threads:
        for rule, layers in _layers(table, expected):
            whole = [np.empty(expected[p].shape, expected[p].dtype) for p in rule.ours]
            fill = partial(_fill, tensors, TRANSFORMS[rule.transform], whole)
            for _ in threads.map(fill, layers):
                pass
            yield from zip(rule.ours, whole, strict=True)


def _fill(
    tensors: Mapping[str, Any],
    transform: Transform,
    whole: list[np.ndarray],
    layer: LayerRule,
) -> None:
    """Writes one layer of the parameters `whole`."""
    theirs = [finite_values(key, tensors[key]) for key in layer.theirs]
    parts = _to_ours(theirs, layer.shapes, transform)
    for parameter, part in zip(whole, parts, strict=True):
        _copy(parameter[(*layer.index, ...)], part)


def _copy(to: np.ndarray, values: np.ndarray) -> None:
    """Copies values, whose axes may have been moved.

    perf: so few rows of what was transposed stay in the processor's cache: five times
    as fast for T5; numbers without a type let other threads run.
    """
    if to.dtype == values.dtype:
        to, values = (x.view(f"u{x.itemsize}") for x in (to, values))
    last = values.strides[-1]
    if last == min(values.strides):
        to[...] = values
        return
    slower = [axis for axis, stride in enumerate(values.strides) if stride > last]
    for index in np.ndindex(*(values.shape[axis] for axis in slower)):
        place = [slice(None)] * values.ndim
        for axis, i in zip(slower, index, strict=True):
            place[axis] = slice(i, i + 1)
        for start in range(0, values.shape[-1], ROWS):
            place[-1] = slice(start, start + ROWS)
            to[tuple(place)] = values[tuple(place)]


def export_tensors(params: Any, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """The original's tensors, constants included, one after the other.

    Args:
        params: our parameters, lazily or not.

    Raises:
        ValueError: listing all parameters that the table does not know, or knows twice.
    """
    flat = _flatten(params)
    specs = tensor_specs(params, table)
    for key, constant in table.constants.items():
        yield key, constant.value().astype(specs[key].dtype)
    for rule, layers in _layers(table, flat):
        whole = [np.asarray(flat[path]) for path in rule.ours]
        for layer in layers:
            parts = [parameter[layer.index] for parameter in whole]
            theirs = _to_theirs(parts, len(layer.theirs), TRANSFORMS[rule.transform])
            for key, tensor in zip(layer.theirs, theirs, strict=True):
                yield key, np.ascontiguousarray(tensor)


def tensor_specs(params: Any, table: Table) -> dict[str, ShapeDtypeStruct]:
    """The types and shapes of the tensors that `export_tensors` gives.

    Constants have the type that all weights have, or float32.

    Raises:
        ValueError: as `export_tensors`.
    """
    flat = _flatten(params)
    _check_none(list(_parameter_problems(table, flat)))
    return dict(_uses(table, flat))


def parameter_specs(
    abstract: Any, table: Table, tensors: Mapping[str, Any]
) -> dict[str, ShapeDtypeStruct]:
    """The parameters of `abstract` by path, with the types of the tensors they're from.

    A parameter whose tensors have several types is float32.
    """
    flat, specs = _flatten(abstract), {}
    for rule, layers in _layers(table, flat):
        dtype = _common(tensors[key].dtype for layer in layers for key in layer.theirs)
        specs |= {p: ShapeDtypeStruct(flat[p].shape, dtype) for p in rule.ours}
    return specs


def shape_problems(
    tensors: Mapping[str, Any], table: Table, abstract: Any
) -> list[str]:
    """What keeps tensors of such names and shapes from being the parameters."""
    flat = _flatten(abstract)
    problems = list(_parameter_problems(table, flat))
    uses = _uses(table, flat)
    counts = Counter(key for key, _ in uses)
    problems += [f"{key} is used {n} times" for key, n in counts.items() if n > 1]
    expected = dict(uses)
    problems += [f"{key} is missing" for key in expected if key not in tensors]
    problems += [f"{key} is left over" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {spec.shape}"
        for key, spec in expected.items()
        if key in tensors and tuple(tensors[key].shape) != spec.shape
    ]
    kinds = Counter[Any]()
    for key in expected.keys() & tensors.keys():
        if not jnp.issubdtype(dtype := tensors[key].dtype, jnp.floating):
            kinds[dtype] += 1
            if kinds[dtype] == 1:
                problems.append(f"{key} is of {dtype}, expected floating-point numbers")
    problems += [f"so are {n - 1} more of {t}" for t, n in kinds.items() if n > 1]
    return problems


def constant_problems(tensors: Mapping[str, Any], table: Table) -> list[str]:
    """Which of the tensors are not the constants that the model computes.

    Constants are the only tensors whose values are looked at.
    """
    problems = []
    for key, constant in table.constants.items():
        if key not in tensors or tuple(tensors[key].shape) != constant.shape:
            continue
        stored = np.asarray(tensors[key])
        tolerance = max(TOLERANCE, float(ml_dtypes.finfo(stored.dtype).eps))
        difference = np.abs(stored.astype(np.float32) - constant.value()).max()
        if not difference <= tolerance:
            problems.append(
                f"{key} differs by {difference:.2g} from what this model computes"
            )
    return problems


def each_layer(table: Table, abstract: Any) -> Iterator[tuple[Rule, LayerRule]]:
    """Every rule whose parameters are in `abstract`, at every layer, one by one."""
    for rule, layers in _layers(table, _flatten(abstract)):
        yield from ((rule, layer) for layer in layers)


def parameter_changes(
    tensors: Mapping[str, Any], table: Table, abstract: Any
) -> dict[str, Callable[[], np.ndarray]]:
    """What to add to parameters, by path, so that `tensors` are added to theirs.

    Only what is called is computed.
    """
    flat, changes = _flatten(abstract), {}
    for rule, layers in _layers(table, flat):
        changed = [x for x in layers if not tensors.keys().isdisjoint(x.theirs)]
        for i, path in enumerate(rule.ours if changed else ()):
            shape = flat[path].shape
            changes[path] = partial(_change, tensors, rule.transform, changed, i, shape)
    return changes


def _change(
    tensors: Mapping[str, Any],
    transform: str,
    layers: list[LayerRule],
    number: int,
    shape: TensorShape,
) -> np.ndarray:
    """What some layers add to parameter `number` of a rule, which has this shape."""
    whole = np.zeros(shape, np.float32)
    for layer in layers:
        shapes = _their_shapes(transform, layer.shapes, len(layer.theirs))
        theirs = [
            np.asarray(tensors[key] if key in tensors else np.zeros(shape), np.float32)
            for key, shape in zip(layer.theirs, shapes, strict=True)
        ]
        parts = _to_ours(theirs, layer.shapes, TRANSFORMS[transform])
        whole[(*layer.index, ...)] = parts[number]
    return whole


def _uses(table: Table, flat: Mapping[str, Any]) -> list[tuple[str, ShapeDtypeStruct]]:
    """Name, type and shape of every tensor that the table uses, as often as it does."""
    uses = []
    for rule, layers in _layers(table, flat):
        dtype = np.dtype(flat[rule.ours[0]].dtype)
        for layer in layers:
            shapes = _their_shapes(rule.transform, layer.shapes, len(layer.theirs))
            specs = [ShapeDtypeStruct(shape, dtype) for shape in shapes]
            uses += zip(layer.theirs, specs, strict=True)
    common = _common(spec.dtype for _, spec in uses)
    constants = table.constants.items()
    return [(k, ShapeDtypeStruct(x.shape, common)) for k, x in constants] + uses


def _flatten(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by path, e.g. {"head/kernel": ...}."""
    return flatten_dict(unbox(tree), sep="/")


def _layers(
    table: Table, flat: Mapping[str, Any]
) -> Iterator[tuple[Rule, list[LayerRule]]]:
    """Every rule whose parameters are in `flat`, at each layer that these have."""
    for rule in table.rules:
        if not all(path in flat for path in rule.ours):
            continue
        shapes = tuple(tuple(flat[path].shape) for path in rule.ours)
        layers = [LayerRule((), rule.theirs, shapes)]
        if _stacked(rule):
            of_one = tuple(shape[1:] for shape in shapes)
            layers = [
                LayerRule((i,), tuple(key.format(i=i) for key in rule.theirs), of_one)
                for i in range(shapes[0][0])
            ]
        yield rule, layers


def _stacked(rule: Rule) -> bool:
    return "{i}" in rule.theirs[0]


def _parameter_problems(table: Table, flat: Mapping[str, Any]) -> Iterator[str]:
    counts = Counter(path for rule in table.rules for path in rule.ours)
    yield from (f"parameter {p} is made {n} times" for p, n in counts.items() if n > 1)
    yield from (f"parameter {p} is in no rule" for p in flat if p not in counts)
    for rule in table.rules:
        exists = [path in flat for path in rule.ours]
        if not all(exists) and (any(exists) or not _stacked(rule)):
            yield f"the model has no parameter {', '.join(rule.ours)}"


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The one type if all are the same, else float32."""
    different = set(dtypes)
    return different.pop() if len(different) == 1 else np.dtype(np.float32)


def _check_none(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            "the tensors do not fit the model; check that its config belongs to them. "
            f"{len(problems)} problems:\n  " + "\n  ".join(problems)
        )


# ---------------------------------------------------------------------------- one layer


def _to_ours(
    theirs: list[np.ndarray], shapes: tuple[TensorShape, ...], transform: Transform
) -> list[np.ndarray]:
    whole = np.stack(theirs) if len(theirs) > 1 else theirs[0]
    # Each piece has all rows of the whole.
    widths = [math.prod(shape) // whole.shape[0] for shape in shapes[:-1]]
    pieces = np.split(whole, np.cumsum(widths), axis=-1) if widths else [whole]
    ours = []
    for piece, pattern, shape in zip(pieces, transform.patterns, shapes, strict=True):
        right = pattern.split("->")[1]
        part = rearrange(piece, pattern, **_sizes(shape, right, transform))
        ours.append(_swapped(part) if transform.swap else part)
    return ours


def _to_theirs(ours: list[Any], count: int, transform: Transform) -> list[Any]:
    pieces = []
    for part, pattern in zip(ours, transform.patterns, strict=True):
        left, right = pattern.split("->")
        part = _swapped(part) if transform.swap else part
        pieces.append(rearrange(part, f"{right} -> {left}", **transform.sizes))
    xp = pieces[0].__array_namespace__()
    whole = xp.concat(pieces, axis=-1) if len(pieces) > 1 else pieces[0]
    return [whole[i] for i in range(count)] if count > 1 else [whole]


def _swapped(x: Any) -> Any:
    """The halves of the last axis in the other order."""
    return x.__array_namespace__().roll(x, x.shape[-1] // 2, axis=-1)


def _sizes(shape: TensorShape, right: str, transform: Transform) -> dict[str, int]:
    """The transform's sizes, and those of axes that stand alone right of the arrow."""
    if "(" in right:
        return dict(transform.sizes)
    return dict(zip(right.split(), shape, strict=True)) | dict(transform.sizes)


@lru_cache(maxsize=1024)
def _their_shapes(
    name: str, shapes: tuple[TensorShape, ...], count: int
) -> list[TensorShape]:
    """The shapes of their `count` tensors for parameters of `shapes` of ours."""
    leaves = [ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    transform = TRANSFORMS[name]
    out = jax.eval_shape(lambda *x: _to_theirs(list(x), count, transform), *leaves)
    return [leaf.shape for leaf in out]
