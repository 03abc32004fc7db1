# SPDX-License-Identifier: Apache-2.0
"""The randomness of sampling: a start for every unit, block noise for its jumps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pyramid_jax import pyramid
from pyramid_jax.shapes import Array


class Noise(NamedTuple):
    """The randomness of one unit: its start at stage 0, block noise for every jump."""

    start: Float[Array, "b _ _ _ c"]
    jumps: tuple[Float[Array, "b _ _ _ c"], ...]


# (unit, which may be traced; number of its frames) -> its noise
UnitNoise = Callable[[int | jax.Array, int], Noise]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys"],
    meta_fields=["frame", "stages", "gamma", "renoising"],
)
@dataclass(frozen=True)
class KeyedNoise:
    """Draws the noise of any unit from a key for each video.

    Each (unit, stage) has its own part of a video's key: neither the batch, nor the
    number of units, nor that of devices changes a video. A pytree, whose keys are plain
    numbers (`jax.random.key_data`), so that devices of other processes can hold them.

    Args:
        frame: (h, w, c) of a latent frame at the finest stage.
        stages, gamma: the number of stages, and their block noise's, see `pyramid`.
        renoising: what is added at a jump, see `pyramid.jump_noise`.
    """

    keys: Any  # `videos _`; in trees of shardings, the sharding of such an array
    frame: tuple[int, int, int]
    stages: int
    gamma: float = 1 / 3
    renoising: str = pyramid.CORRECTIVE

    def __call__(self, unit: int | Int[jax.Array, ""], frames: int) -> Noise:
        """The noise of one unit of so many frames."""
        keys = jax.random.wrap_key_data(jnp.asarray(self.keys))
        (h, w, c), last = self.frame, self.stages - 1

        def one(key: jax.Array, stage: int) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, unit), stage)
            shape = frames, h >> last - stage, w >> last - stage, c
            return jax.random.normal(key, shape, jnp.float32)

        white = [jax.vmap(partial(one, stage=k))(keys) for k in range(self.stages)]
        added = partial(pyramid.jump_noise, gamma=self.gamma, renoising=self.renoising)
        return Noise(white[0], tuple(added(z) for z in white[1:]))
