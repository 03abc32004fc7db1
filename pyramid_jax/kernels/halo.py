# SPDX-License-Identifier: Apache-2.0
"""What a device's part of a video needs from its neighbours.

Inside `jax.shard_map` each device holds some frames and some rows. A `Halo` names the
mesh axes that divide them and fetches frames, rows and sums from the other devices;
without names it only puts zeros around the picture. Gradients take the same ways back.

All devices have the first frame of a video, which begins it; the frames after it are
divided evenly and come with a past, which precedes the frames of the first device.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float

Frames = Float[jax.Array, "b _ _ _ c"]


@dataclass(frozen=True)
class Halo:
    """The mesh axes that divide the frames and the rows; None: the device has all."""

    time: str | None = None
    height: str | None = None

    def frames(
        self, x: Frames, past: Frames | None, kernel: int, stride: int
    ) -> tuple[Frames, Frames]:
        """The frames after those that a causal convolution needs; and the next past.

        A video begins with kernel - 1 frames of zeros. Later frames need the last
        kernel - stride before them, which is what the past holds. All devices get the
        past that the last of them leaves.
        """
        keep = kernel - stride
        if past is None:
            x = jnp.pad(x, ((0, 0), (kernel - 1, 0), (0, 0), (0, 0), (0, 0)))
            return x, x[:, -keep:]
        # perf: where all of it is one result, a GPU computes x into its place; if the
        # last frames were taken of x, it would be written before it is joined.
        x = jnp.concatenate([self._before(x, past), x], axis=1)
        x = jax.lax.optimization_barrier(x)
        return x, self._last(x[:, -keep:])

    def rows(self, x: Frames) -> Frames:
        """The rows with one more above and below, zero at the borders of the picture.

        Undivided rows stay as they are: the convolution pads them.
        """
        if self.height is None:
            return x
        above = _shift(x[:, :, -1:], self.height, 1)
        below = _shift(x[:, :, :1], self.height, -1)
        return jnp.concatenate([above, x, below], axis=2)

    @property
    def padding(self) -> tuple[int, int]:
        """The zero rows above and below that `rows` leaves to the convolution."""
        return (1, 1) if self.height is None else (0, 0)

    def mean(self, x: Float[jax.Array, "*s"]) -> Float[jax.Array, "*s"]:
        """The mean over the devices that share the rows."""
        return x if self.height is None else jax.lax.pmean(x, self.height)

    def all_rows(self, x: Float[jax.Array, "b t n c"]) -> Float[jax.Array, "b t _ c"]:
        """The cells of all rows of a frame, from those of the local rows."""
        if self.height is None:
            return x
        return jax.lax.all_gather(x, self.height, axis=2, tiled=True)

    def _before(self, x: Frames, past: Frames) -> Frames:
        """The frames before the local ones, as many as the past has."""
        if self.time is None:
            return past
        before, first = past, jax.lax.axis_index(self.time) == 0
        # A device with fewer frames than are needed passes on those of its neighbour.
        for _ in range(-(-past.shape[1] // x.shape[1])):
            end = jnp.concatenate([before, x], axis=1)[:, -past.shape[1] :]
            before = jnp.where(first, past, _shift(end, self.time, 1))
        return before

    def _last(self, x: Frames) -> Frames:
        """What the device with the last frames has, on all devices."""
        if self.time is None:
            return x
        count = jax.lax.axis_size(self.time)
        last = jax.lax.axis_index(self.time) == count - 1
        return jax.lax.psum(jnp.where(last, x, jnp.zeros_like(x)), self.time)


def _shift(x: Frames, axis: str, by: int) -> Frames:
    """What the device `by` places earlier has; zeros where there is none."""
    count = jax.lax.axis_size(axis)
    pairs = [(i, i + by) for i in range(count) if 0 <= i + by < count]
    return jax.lax.ppermute(x, axis, pairs)
