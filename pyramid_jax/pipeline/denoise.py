# SPDX-License-Identifier: Apache-2.0
"""Sampling one Euler step at a time, driven from the host.

The algorithm is that of `sampler.sample`, and so are its pieces. Here each step is the
call of a compiled function: a caller sees how far it is, gets every unit as soon as it
exists, may stop at any step, and learns at which step a number went bad. Neither the
numbers of steps nor guidance are compiled in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float, Int, Key

from pyramid_jax import layout, model, sampler
from pyramid_jax.model import ModelConfig
from pyramid_jax.sampler import SamplerConfig, Turn, View
from pyramid_jax.shapes import Array, Text
from pyramid_jax.sharding import batch_shardings


class Progress(NamedTuple):
    """An Euler step that has ended; units, stages and steps count from 0.

    `done` is the share of all work that is behind, in tokens that the network reads.
    """

    unit: int
    units: int
    stage: int
    stages: int
    step: int
    steps: int
    done: float

    def __str__(self):
        return (
            f"unit {self.unit + 1}/{self.units}, stage {self.stage + 1}/{self.stages}, "
            f"step {self.step + 1}/{self.steps}"
        )


Watch = Callable[[Progress], None]


class Inputs(NamedTuple):
    """What videos are made from; see `sampler.sample` and `sampler.Canvas`.

    `keys` holds the key of each video's noise; `scales` is None without guidance.
    """

    scales: Float[np.ndarray, "units"] | None
    text: Text
    keys: Key[jax.Array, "videos"]
    first: Float[Array, "videos 1 h w c"] | None


@dataclass(frozen=True)
class Stepper:
    """Samples videos of one size.

    Attributes:
        how: numbers of steps and scans.
        shape: (t, h, w, c) of the latents.
        mesh: devices that divide the videos among them; None: those of the weights.
        watch: is told of every Euler step that has ended.
    """

    cfg: ModelConfig
    how: SamplerConfig
    shape: tuple[int, int, int, int]
    mesh: Mesh | None = None
    watch: Watch | None = None

    def __call__(
        self, params: Any, inputs: Inputs
    ) -> Iterator[Float[jax.Array, "videos _ h w c"]]:
        """The latents of unit after unit, beginning with the first frame, given or not.

        Raises:
            FloatingPointError: a step made numbers that are not finite.
        """
        scales, inputs = inputs.scales, inputs._replace(scales=None)
        turns = self._turns(inputs.first is not None)
        ahead = self._shares(turns)
        video = jnp.zeros((len(inputs.keys), *self.shape), jnp.float32)
        mesh = self.mesh or _devices(params)
        if mesh is not None:
            # Devices of other processes take the numbers of keys, not keys.
            given = (inputs._replace(keys=jax.random.key_data(inputs.keys)), video)
            inputs, video = jax.device_put(given, batch_shardings(given, mesh))
            inputs = inputs._replace(keys=jax.random.wrap_key_data(inputs.keys))
        if inputs.first is not None:
            video = _put(video, jnp.asarray(inputs.first, jnp.float32), np.int32(0))
            yield jnp.asarray(inputs.first)
        for turn in turns:
            scale = None if scales is None else np.float32(scales[turn.unit])
            new = self._unit(_Call(params, inputs, video, turn, scale, mesh), ahead)
            video = _put(video, new, np.int32(turn.unit))
            yield new

    def _unit(self, call: "_Call", ahead: Iterator[float]) -> jax.Array:
        """The frames of one unit."""
        turn, keys, last = call.turn, call.inputs.keys, None
        unit, units = int(turn.unit), self._units
        about = _About(self.cfg, self.shape[1:], turn.slots, call.mesh)
        x = call.video
        for k in range(len(self.how.stages)):
            x, view = _enter(about, k, x, call.video, np.int32(unit), keys)
            times = self.how.times(k, turn)
            for i, at in enumerate(times):
                given = (call.params, call.inputs.text, call.scale)
                x, fine = _step(about, k, given, x, view, at)
                if last is not None:  # perf: the device has the next step already
                    self._ended(call, *last)
                count = (unit, units, k, len(self.how.stages), i, len(times))
                last = fine, Progress(*count, next(ahead))
        assert last is not None  # there is a stage, and it has a step
        self._ended(call, *last)
        return x

    def _ended(self, call: "_Call", fine: Bool[jax.Array, ""], at: Progress) -> None:
        """Waits for a step, and tells of it."""
        if not bool(fine):
            why = _cause(call.params, call.inputs.text, self.cfg.dit.dtype)
            raise FloatingPointError(f"{at}: the video is no longer finite; {why}")
        if self.watch is not None:
            self.watch(at)

    @property
    def _units(self) -> int:
        return layout.units(self.shape[0], self.cfg.layout.frames_per_unit)

    def _turns(self, given: bool) -> list[Turn]:
        """What is to be sampled, unit 0 only if the first frame is not given."""
        spans = sampler.spans(self._units, self.how.scans)
        later = [Turn(u, end) for begin, end in spans for u in range(begin, end)]
        return later if given else [Turn(0, 1), *later]

    def _shares(self, turns: list[Turn]) -> Iterator[float]:
        """For every Euler step to come, the share of all work that ends with it."""
        work = [
            sum(len(clip.frame) * 4**clip.stage for clip in self.how.clips(k, turn))
            for turn in turns
            for k in range(len(self.how.stages))
            for _ in self.how.times(k, turn)
        ]
        return iter((np.cumsum(work) / max(sum(work), 1)).tolist())


class _Call(NamedTuple):
    """What a unit is made from."""

    params: Any
    inputs: Inputs
    video: jax.Array
    turn: Turn
    scale: np.float32 | None
    mesh: Mesh | None


class _About(NamedTuple):
    """What a compiled step is made for."""

    cfg: ModelConfig
    frame: tuple[int, int, int]
    slots: int
    mesh: Mesh | None

    @property
    def how(self) -> SamplerConfig:
        """Without the numbers of steps, which compiled functions do not know."""
        any_steps = (1,) * len(self.cfg.stages)
        return SamplerConfig(
            self.cfg.stages, self.cfg.layout, any_steps, any_steps, self.cfg.gamma
        )

    def rows(self, tree: Any) -> Any:
        """Values whose rows the devices divide, if there is a mesh."""
        if self.mesh is None:
            return tree
        wanted = batch_shardings(tree, self.mesh)
        return jax.lax.with_sharding_constraint(tree, wanted)


@partial(jax.jit, static_argnums=(0, 1))
def _enter(
    about: _About,
    k: int,
    x: Float[jax.Array, "b _ _ _ c"],
    video: Float[jax.Array, "b t h w c"],
    unit: Int[Array, ""],
    keys: Key[jax.Array, "b"],
) -> tuple[jax.Array, View]:
    frames = 1 if about.slots == 1 else about.cfg.layout.frames_per_unit
    noise = sampler.draw(keys, unit, (frames, *about.frame), about.how)
    x, view = sampler.enter(k, x, video, Turn(unit, about.slots), noise, about.how)
    return about.rows(x), view._replace(seen=about.rows(view.seen))


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    about: _About,
    k: int,
    given: tuple[Any, Text, Float[Array, ""] | None],
    x: Float[jax.Array, "_ t h w c"],
    view: View,
    at: Float[Array, "2"],
) -> tuple[Float[jax.Array, "_ t h w c"], Bool[jax.Array, ""]]:
    """One Euler step of stage k, and whether all of it is finite."""
    params, text, scale = given
    climb = sampler.Climb(model.velocity(about.cfg, params), text, about.how)
    x = about.rows(climb.step(k, x, view, at, scale))
    return x, jnp.isfinite(x).all()


_put = jax.jit(sampler.put)


def _devices(params: Any) -> Mesh | None:
    """The mesh that the weights are on, None if that is one device."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(where, NamedSharding) or where.mesh.size == 1:
        return None
    return cast(Mesh, where.mesh)


def _cause(params: Any, text: Text, dtype: str) -> str:
    """Where numbers that are not finite probably come from, and what to do."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"the weights {name} are not finite: convert or train them again"
    if not all(jnp.isfinite(x).all() for x in (text.features, text.pooled)):
        return "the features of a prompt are not finite: load text encoders in float32"
    return (
        f"weights and prompts are, so the network overflows in {dtype}: load the model "
        "in float32, or use less guidance"
    )
