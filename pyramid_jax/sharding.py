# SPDX-License-Identifier: Apache-2.0
"""Where arrays are: divided among the devices of a mesh, or waiting on the host.

A table leads from the axes of arrays to the axes of the mesh. Weights name their axes
where they are declared; batches and activations name theirs where they enter. Nothing
outside this file (and the kernels) names a mesh axis. A parked array keeps its
sharding, in another kind of memory: it knows where it belongs.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "context", "tensor")
HOST, DEVICE = "pinned_host", "device"  # JAX's names of kinds of memory

# Axis of an array -> mesh axis (or axes) that splits it.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "tokens": "context",
    "frames": "context",
    "height": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "attended": ("tensor", "context"),  # heads, while whole rows are attended to
    "mlp": "tensor",
    "layers": None,
}

_float32_sums = ContextVar("float32_sums", default=False)

Axes = tuple[str | None, ...]
Initializer = nn.initializers.Initializer


class Named(nn.Partitioned):
    """A weight with the names of its axes.

    Flax would take the names for mesh axes wherever a mesh is set; here `RULES`
    translates them, once, when a state is made.
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def named(init: Initializer, axes: Axes) -> Initializer:
    """An initializer whose weights carry the names of their axes."""
    return lambda *args: Named(init(*args), axes)


def device_mesh(
    data: int = -1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Any = None,
) -> Mesh:
    """A mesh with all four axes over `devices` (default: all); a size of -1: the rest.

    Neighbours on an axis are neighbours in the network of a TPU; where devices are in
    several slices, `data` leads from slice to slice, and the others stay in one.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or `data` is not
            a multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, context, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh sizes {sizes}: give positive sizes, and -1 at most once"
        )
    product = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // product if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        axes = dict(zip(MESH_AXES, sizes, strict=True))
        raise ValueError(
            f"mesh {axes} needs {math.prod(sizes)} devices, there are {len(devices)}; "
            "set one size to -1 to use the rest"
        )
    grid = arranged(list(devices), sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arranged(devices: list[Any], sizes: Sequence[int]) -> np.ndarray:
    """The devices as an array of these sizes, near ones beside each other.

    Raises:
        ValueError: the first size is not a multiple of the number of slices.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        tpu = device.platform == "tpu"  # a slice of GPUs is no more than a host
        index = getattr(device, "slice_index", None) if tpu else None
        slices.setdefault(index or 0, []).append(device)
    first, *others = sizes
    if first % len(slices):
        raise ValueError(
            f"the devices are in {len(slices)} slices, over which only {MESH_AXES[0]} "
            f"can lead; it is {first}, make it a multiple of {len(slices)}"
        )
    inner = [first // len(slices), *others]
    parts = [_near(slices[index], inner) for index in sorted(slices)]
    return np.concatenate(parts, axis=0)


def spec(axes: Axes, rules: Mapping[str, Any] = RULES) -> P:
    """Translates the axes of an array, e.g. ("embed", "mlp"), to P("fsdp", "tensor").

    Raises:
        ValueError: an axis has no rule, or two dimensions get the same mesh axis.
    """
    unknown = [a for a in axes if a is not None and a not in rules]
    if unknown:
        raise ValueError(f"unknown axes {unknown}; the rules have {sorted(rules)}")
    mesh_axes = [None if a is None else rules[a] for a in axes]
    used = [m for entry in mesh_axes for m in _names(entry)]
    if len(set(used)) < len(used):
        raise ValueError(f"{axes} maps one mesh axis to two dimensions: {mesh_axes}")
    return P(*mesh_axes)


def place(
    shape: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """The sharding of an array; a dimension that its axis can't divide is whole."""
    entries = []
    for size, entry in zip(shape, spec(axes), strict=True):
        parts = math.prod(mesh.shape[name] for name in _names(entry))
        entries.append(entry if size % parts == 0 else None)
    return NamedSharding(mesh, P(*entries))


def shardings(abstract: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of `abstract`, whose weights are in boxes with axes.

    Optimizer moments and averages made from such weights carry the same boxes, so one
    call places a whole training state. Leaves without axes are replicated, and a box
    whose weight an optimizer leaves to another one holds nothing to place.
    """

    def one(leaf: Any) -> Any:
        if _is_box(leaf):
            if not jax.tree.leaves(leaf):
                return leaf.value
            return place(leaf.value.shape, leaf.names, mesh)
        return NamedSharding(mesh, P())

    return jax.tree.map(one, abstract, is_leaf=_is_box)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The sharding of a batch: first axis "batch", the others whole."""
    return jax.tree.map(
        lambda x: place(x.shape, ("batch", *[None] * (x.ndim - 1)), mesh), batch
    )


def parts(axis: str, mesh: Mesh | AbstractMesh) -> int:
    """How many devices divide an axis of arrays among them."""
    return math.prod(mesh.shape[name] for name in _names(spec((axis,))[0]))


def own_parts(axis: str, mesh: Mesh) -> list[int]:
    """Which parts of an axis this process's devices hold; others may hold them, too."""
    whole = (parts(axis, mesh),)
    held = place(whole, (axis,), mesh).addressable_devices_indices_map(whole)
    return sorted({index[0].start or 0 for index in held.values() if index})


def own_rows(rows: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch of all processes this process's devices need.

    Processes whose devices share rows get the same ones.

    Raises:
        ValueError: the rows can't be divided over the devices that share a batch.
    """
    count = parts("batch", mesh)
    if rows % count:
        raise ValueError(
            f"a batch of {rows} rows can't be divided over {count} devices; "
            f"use a multiple of {count} rows"
        )
    size = rows // count
    own = own_parts("batch", mesh)
    return [part * size + row for part in own for row in range(size)]


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch of all processes on the mesh, from this process's `own_rows`.

    Raises:
        ValueError: the rows can't be divided over the devices that share a batch.
    """
    count, own = parts("batch", mesh), len(own_parts("batch", mesh))

    def joined(x: np.ndarray) -> jax.Array:
        rows = own_rows(len(x) * count // own, mesh)
        at = {row: i for i, row in enumerate(rows)}
        shape = (len(x) * count // own, *x.shape[1:])
        placement = place(shape, ("batch", *[None] * (x.ndim - 1)), mesh)

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            return x[at[first] : at[last - 1] + 1]

        return jax.make_array_from_callback(shape, placement, part)

    return jax.tree.map(joined, batch)


def shares(axis: str) -> int:
    """Into how many parts the mesh that is set divides an axis; 1 without one."""
    current = jax.sharding.get_abstract_mesh()
    return 1 if current.empty else parts(axis, current)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pins the layout of an activation; nothing happens where no mesh is set."""
    current = jax.sharding.get_abstract_mesh()
    if current.empty or math.prod(current.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, place(x.shape, axes, current).spec)


@contextmanager
def float32_sums(wanted: bool = True) -> Iterator[None]:
    """Traces models whose weight gradients are summed over devices in float32."""
    before = _float32_sums.set(wanted)
    try:
        yield
    finally:
        _float32_sums.reset(before)


def sums_in_float32() -> bool:
    """Whether `float32_sums` is in effect."""
    return _float32_sums.get()


def unbox(tree: Any) -> Any:
    """The plain arrays of a tree whose weights carry their axes."""
    return nn.unbox(tree)


def to_host(tree: Any) -> Any:
    """The whole arrays in numpy, on every process; all processes must call it.

    What a process has to itself, such as an array of numpy, stays as it is.
    """

    def whole(x: Any) -> Any:
        if getattr(x, "is_fully_addressable", True):
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def parked(tree: Any) -> Any:
    """The arrays of a tree in the host's memory; they remember their devices.

    Shapes are those of arrays there.
    """
    return _moved(tree, HOST)


def on_devices(tree: Any) -> Any:
    """The arrays of a tree, or their shapes, on their devices."""
    return _moved(tree, DEVICE)


def is_parked(x: Any) -> bool:
    """Whether an array, or the shape of one, waits on the host for its devices."""
    return getattr(getattr(x, "sharding", None), "memory_kind", None) == HOST


@contextmanager
def present(tree: Any) -> Iterator[Any]:
    """The arrays of a tree on their devices.

    Those that were parked are moved once, and leave the devices at the end.
    """
    moved = jax.tree.map(lambda x: _moved(x, DEVICE) if is_parked(x) else x, tree)
    try:
        yield moved
    finally:
        pairs = zip(jax.tree.leaves(moved), jax.tree.leaves(tree), strict=True)
        for x, original in pairs:
            if is_parked(original):
                x.delete()


def _near(devices: list[Any], sizes: Sequence[int]) -> np.ndarray:
    """Devices of a slice as an array; in their order where no network is known."""
    if len(devices) == 1:
        return np.asarray(devices).reshape(sizes)
    try:
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    except (AssertionError, NotImplementedError, ValueError) as error:
        logger.warning("the mesh does not follow the network of the devices: %s", error)
        return np.asarray(devices).reshape(sizes)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, Named)


def _moved(tree: Any, kind: str) -> Any:
    def one(x: Any) -> Any:
        where = x.sharding.with_memory_kind(kind)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return jax.device_put(x, where)

    return jax.tree.map(one, tree)
