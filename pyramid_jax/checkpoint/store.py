# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: written in the background, restored onto any mesh.

Weights, average, optimizer, counters, position in the data and config are separate
items of a checkpoint.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from grain.checkpoint import CheckpointRestore, CheckpointSave
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

State = TypeVar("State")  # a NamedTuple of arrays and trees of arrays

COUNTERS, DATA, CONFIG = "counters", "data", "config"
DAMAGED = ".damaged"


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
        """Waits until all checkpoints are written; raises as `save`."""
        self._wait()
        self._manager.close()

    def latest(self) -> int | None:
        """The newest checkpoint's step, None if there is no checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Resumable | None = None) -> None:
        """Starts to write a checkpoint; returns once `state` may be overwritten.

        Raises:
            ValueError: the one before could not be written, e.g. to a full disk.
        """
        self._wait()
        items: dict[str, Any] = {
            name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()
        }
        if data is not None:
            items[DATA] = CheckpointSave(_Position(data))
        items[CONFIG] = ocp.args.JsonSave(self.config)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: State, data: Resumable | None = None) -> State:
        """The state of the newest checkpoint that is whole, laid out as `like`.

        Newer ones that are damaged get the suffix `DAMAGED`; a warning names them.

        Args:
            like: a state, or its `jax.ShapeDtypeStruct`s with shardings, of any mesh.
            data: the iterator that is set to where it was when the checkpoint was made.

        Raises:
            ValueError: no checkpoint is whole, or that one is of another config.
        """
        self._wait()
        damaged: dict[Path, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                config, state = self._read(step, like, data)
            except Exception as error:  # Orbax has no class for damage
                damaged[self.folder / str(step)] = error
                continue
            if differing := _differences(config, self.config):
                raise ValueError(
                    f"checkpoint {self.folder / str(step)} is of another config: "
                    f"{'; '.join(differing)}. Continue with the checkpoint's values, "
                    "or train in another folder"
                )
            self._set_aside(damaged)
            return state
        reasons = [f"{path.name} is damaged ({why})" for path, why in damaged.items()]
        raise ValueError(
            f"{self.folder} holds no checkpoint that is whole "
            f"{'; '.join(reasons)}; copy one there, or train in another folder"
        )

    def _wait(self) -> None:
        """Waits until the checkpoint that was started is written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # of the file system, in the words of any library
            raise ValueError(
                f"a checkpoint could not be written to {self.folder} ({error}); the "
                f"newest whole one is of step {self.latest()}: make room there, and "
                "start the same command again"
            ) from error

    def _read(
        self, step: int, like: Any, data: Resumable | None
    ) -> tuple[dict[str, Any], Any]:
        """The config and the state of one checkpoint."""
        items: dict[str, Any] = {
            name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree))
            for name, tree in _items(like).items()
        }
        if data is not None:
            items[DATA] = CheckpointRestore(_Position(data))
        items[CONFIG] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        trees = {n: restored[n] for n in items if n not in (DATA, CONFIG)}
        return restored[CONFIG], like._replace(**trees.pop(COUNTERS), **trees)

    def _set_aside(self, damaged: Mapping[Path, Exception]) -> None:
        """Renames checkpoints, whose steps will be written again."""
        for path, error in damaged.items():
            aside = path.with_name(path.name + DAMAGED)
            logger.warning("checkpoint %s is damaged (%s): see %s", path, error, aside)
            if jax.process_index() == 0:
                path.rename(aside)
        if damaged:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()


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
    trees = {n: x for n, x in fields.items() if n not in single and x is not None}
    return {**trees, COUNTERS: single}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Sentences like "model.width is 64 there, 128 here"."""
    old, new = flatten_dict(stored, sep="."), flatten_dict(own, sep=".")
    return [
        f"{key} is {old.get(key, 'missing')!r} there, {new.get(key, 'missing')!r} here"
        for key in sorted(old.keys() | new.keys())
        if (key in old, old.get(key)) != (key in new, new.get(key))
    ]
