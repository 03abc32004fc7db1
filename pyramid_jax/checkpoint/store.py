# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: written in the background, restored onto any mesh.

Weights, average, optimizer, counters, position in the data and config are separate
items of a checkpoint.
"""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

logger = logging.getLogger(__name__)

State = TypeVar("State")  # a NamedTuple of arrays and trees of arrays

COUNTERS, POSITION, CONFIG = "counters", "position", "config"
DAMAGED = ".damaged"


class Resumable(Protocol):
    """An iterator whose position can be read and set, as JSON (as grain's can).

    Of several processes each knows the position of some parts, by name, and finds its
    parts in a state that has those of all.
    """

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Store:
    """The newest `keep` checkpoints of one run, and the best one, in `folder`.

    Args:
        config: JSON values that a checkpoint must have been made with to be continued.
        may_change: entries, or sections, that may differ, e.g. "data.workers".
        best: what is measured for a checkpoint, and is lowest for the best.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        keep: int = 3,
        *,
        may_change: Collection[str] = (),
        best: str = "validation_loss",
    ):
        self.folder = Path(folder).absolute()
        self.config = json.loads(json.dumps(dict(config)))
        self._may_change = may_change

        def metric(values: Any) -> float:
            return values.get(best, float("inf"))

        best_one = BestN(
            get_metric_fn=metric,
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=metric,
            best_mode="min",
            preservation_policy=AnyPreservationPolicy([LatestN(n=keep), best_one]),
            enable_async_checkpointing=True,
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

    def best(self) -> int | None:
        """The best checkpoint's step, None if nothing was measured for any."""
        return self._manager.best_step()

    def save(
        self,
        step: int,
        state: Any,
        data: Resumable | None = None,
        measured: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Starts to write a checkpoint; returns once `state` may be overwritten.

        Args:
            data: the iterator whose position is written, with those of all processes.

        Raises:
            ValueError: the one before could not be written, e.g. to a full disk.
        """
        self._wait()
        items: dict[str, Any] = {
            name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()
        }
        if data is not None:
            items[POSITION] = ocp.args.JsonSave(_of_all_processes(data.get_state()))
        items[CONFIG] = ocp.args.JsonSave(self.config)
        arguments = ocp.args.Composite(**items)
        self._manager.save(step, args=arguments, metrics=dict(measured) or None)

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
            read, problem = None, None
            try:
                read = self._read(step, like, data is not None)
            except Exception as error:  # Orbax has no class for damage
                problem = error
            whole = _everywhere(read is not None)
            if read is None or not whole:
                problem = problem or ValueError("another process can't read it")
                damaged[self.folder / str(step)] = problem
                continue
            config, position, state = read
            if differing := _differences(config, self.config, self._may_change):
                raise ValueError(
                    f"checkpoint {self.folder / str(step)} is of another config: "
                    f"{'; '.join(differing)}. Continue with the checkpoint's values, "
                    "or train in another folder"
                )
            self._set_aside(damaged)
            if data is not None:
                data.set_state(position)
            return state
        reasons = [f"{path.name} is damaged ({why})" for path, why in damaged.items()]
        raise ValueError(
            f"{self.folder} holds no checkpoint that is whole "
            f"{'; '.join(reasons)}; copy one there, or train in another folder"
        )

    def average(self, step: int, like: Any) -> Any:
        """The moving average in the checkpoint of a step, laid out as `like`."""
        average = ocp.args.StandardRestore(jax.tree.map(_abstract, like))
        return self._manager.restore(step, args=ocp.args.Composite(ema=average))["ema"]

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
        self, step: int, like: Any, position: bool
    ) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """The config, the position in the data, and the state of one checkpoint."""
        items: dict[str, Any] = {
            name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree))
            for name, tree in _items(like).items()
        }
        if position:
            items[POSITION] = ocp.args.JsonRestore()
        items[CONFIG] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        read = {name: restored[name] for name in items}
        config, place = read.pop(CONFIG), read.pop(POSITION, {})
        return config, place, like._replace(**read.pop(COUNTERS), **read)

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


def _everywhere(here: bool) -> bool:
    """Whether something is so in all processes; all of them must call it."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).all())


def _of_all_processes(position: Mapping[str, Any]) -> dict[str, Any]:
    """The positions of all processes in one; all of them must call it."""
    if jax.process_count() == 1:
        return dict(position)
    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, lengths.max() - len(text)))
    texts = zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    parts = [json.loads(text[:length].tobytes()) for text, length in texts]
    return {name: part[name] for part in parts for name in part}


def _items(state: Any) -> dict[str, Any]:
    """A state's trees by field name, its single arrays together as counters."""
    fields = state._asdict()
    single = {n: x for n, x in fields.items() if jax.tree_util.all_leaves([x])}
    trees = {n: x for n, x in fields.items() if n not in single and x is not None}
    return {**trees, COUNTERS: single}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _differences(
    stored: Mapping[str, Any], own: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """Sentences like "model.width is 64 there, 128 here"."""
    old, new = flatten_dict(stored, sep="."), flatten_dict(own, sep=".")
    free = tuple(f"{name}." for name in may_change)
    return [
        f"{key} is {old.get(key, 'missing')!r} there, {new.get(key, 'missing')!r} here"
        for key in sorted(old.keys() | new.keys())
        if (key in old, old.get(key)) != (key in new, new.get(key))
        and not f"{key}.".startswith(free)
    ]
