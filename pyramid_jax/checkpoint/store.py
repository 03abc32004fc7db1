# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: written in the background, restored onto any mesh.

Weights, average, optimizer, counters, position in the data and config are separate
items of a checkpoint, so that sampling reads the average alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from grain.checkpoint import CheckpointRestore, CheckpointSave
from jax.sharding import SingleDeviceSharding

State = TypeVar("State")  # a NamedTuple of arrays and trees of arrays

COUNTERS, DATA, CONFIG = "counters", "data", "config"


class Resumable(Protocol):
    """An iterator whose position can be read and set, as JSON (as grain's can)."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Store:
    """The newest `keep` checkpoints of one run, in `folder`.

    Args:
        config: JSON values that a checkpoint must have been made with to be continued.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], keep: int = 3):
        self.folder = Path(folder).absolute()
        self.config = json.loads(json.dumps(dict(config)))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True
        )
        if jax.process_count() == 1:
            # perf: Orbax would cut replicated arrays into a piece per device, and
            # compile every cut, for one process to write them.
            whole = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
            ocp.type_handlers.register_type_handler(jax.Array, whole, override=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until all checkpoints are written."""
        self._manager.close()

    def latest(self) -> int | None:
        """The newest checkpoint's step, None if there is no checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Resumable | None = None) -> None:
        """Starts to write a checkpoint; returns once `state` may be overwritten."""
        items: dict[str, Any] = {
            name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()
        }
        if data is not None:
            items[DATA] = CheckpointSave(_Position(data))
        items[CONFIG] = ocp.args.JsonSave(self.config)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(
        self, like: State, data: Resumable | None = None, step: int | None = None
    ) -> State:
        """The state of a checkpoint (default: the newest), laid out as `like`.

        Args:
            like: a state, or its `jax.ShapeDtypeStruct`s with shardings, of any mesh.
            data: the iterator that is set to where it was when the checkpoint was made.

        Raises:
            ValueError: there is no such checkpoint, or it is of another config.
        """
        self._manager.wait_until_finished()
        path = _checkpoint(self.folder, step)
        stored = restore_config(self.folder, int(path.name))
        if differing := _differences(stored, self.config):
            raise ValueError(
                f"checkpoint {path} is of another config: {'; '.join(differing)}. "
                "Continue with the checkpoint's values, or train in another folder"
            )
        items: dict[str, Any] = {
            name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree))
            for name, tree in _items(like).items()
        }
        if data is not None:
            items[DATA] = CheckpointRestore(_Position(data))
        restored = self._manager.restore(
            int(path.name), args=ocp.args.Composite(**items)
        )
        trees = {name: restored[name] for name in items if name != DATA}
        named: Any = like
        return named._replace(**trees.pop(COUNTERS), **trees)


def restore_config(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """The config that a checkpoint (default: the newest) was made with.

    Raises:
        ValueError: there is no such checkpoint.
    """
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(_checkpoint(folder, step) / CONFIG)


def restore_params(
    folder: str | Path, like: Any = None, item: str = "ema", step: int | None = None
) -> Any:
    """One item of a checkpoint (default: the average of the newest), for sampling.

    Args:
        like: the item's shapes with shardings; None: on this host's first device.

    Raises:
        ValueError: there is no such checkpoint.
    """
    path: Any = _checkpoint(folder, step) / item
    if like is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            ocp.StandardCheckpointHandler().metadata(path).tree,
        )
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(path, jax.tree.map(_abstract, like))


class _Position:
    """A data iterator as grain's checkpoint handler wants it: its state as bytes."""

    def __init__(self, data: Resumable):
        self._data = data

    def get_state(self) -> bytes:
        return json.dumps(self._data.get_state()).encode()

    def set_state(self, state: bytes) -> None:
        self._data.set_state(json.loads(state))

    def start_prefetch(self) -> None:
        """Nothing to do: reading starts with the next batch."""


def _items(state: Any) -> dict[str, Any]:
    """A state's trees by field name, its single arrays together as counters."""
    fields = state._asdict()
    single = {n: x for n, x in fields.items() if jax.tree_util.all_leaves([x])}
    trees = {name: tree for name, tree in fields.items() if name not in single}
    return {**trees, COUNTERS: single}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _checkpoint(folder: str | Path, step: int | None) -> Path:
    """The folder of one checkpoint among those in `folder`."""
    folder = Path(folder).absolute()
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps:
        raise ValueError(
            f"{folder} holds no checkpoint; train first, or give the folder that a "
            "training run wrote its checkpoints to"
        )
    if step is not None and step not in steps:
        raise ValueError(f"{folder} holds no checkpoint of step {step}; it has {steps}")
    return folder / str(steps[-1] if step is None else step)


def _differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Sentences like "model.width is 64 there, 128 here"."""
    old, new = flatten_dict(stored, sep="."), flatten_dict(own, sep=".")
    return [
        f"{key} is {old.get(key, 'missing')!r} there, {new.get(key, 'missing')!r} here"
        for key in sorted(old.keys() | new.keys())
        if (key in old, old.get(key)) != (key in new, new.get(key))
    ]
