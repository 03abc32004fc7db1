# SPDX-License-Identifier: Apache-2.0
"""Pyramidal flow: stages of resolution, the path inside a stage, the jump between two.

A clean latent `x1` is reached through K stages, coarsest first. Inside stage k the
latent moves on a straight line from `start` (signal fraction s_k) to `end` (e_k) at one
resolution; between stages it jumps to twice the resolution by renoising. Two
conventions differ from the sources: the paper counts stages from the finest, this
package from the coarsest (stage 0); the PyTorch reference stores noise fractions, this
package signal fractions (1 = clean).

`sigma` is the position inside a stage: 1 at its start, 0 at its end.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from einops import reduce, repeat
from jaxtyping import Float

from pyramid_jax.shapes import Array

TIME_SCALE = 1000  # the network's clock runs from 1000 (noise) to 0 (clean)
MOST_STEPS = 10_000  # of a stage; the trained clock has 1000
THIRDS = (0.0, 1 / 3, 2 / 3, 1.0)
# Noise that is added at a jump: only the first makes the total noise white again.
RENOISING = CORRECTIVE, WHITE, NO_NOISE = "corrective", "white", "none"


class Stage(NamedTuple):
    """Signal fractions and network times at both ends of one pyramid stage."""

    start: float
    end: float
    time_start: float
    time_end: float


def stages(
    edges: Sequence[float] = THIRDS, shift: float = 1.0, gamma: float = 1 / 3
) -> tuple[Stage, ...]:
    """The stages whose ends divide the flow at `edges` (0 = noise, 1 = clean).

    A stage starts where renoising the previous stage's end lands (see `renoise`):

        s = e / (e + sqrt(1 + 1/gamma) · (1 - e)),     e = end of the previous stage,

    so stages overlap. The network's clock is divided among the stages in proportion to
    the noise each one removes, so that a time tells its stage.

    Args:
        edges: increasing, from 0 to 1; one stage per interval.
        shift: warps the noise level, n -> shift·n / (1 + (shift - 1)·n).
        gamma: minus the noise correlation inside a 2x2 block after a jump, in (0, 1/3].

    Source: paper section 3.2 and appendix A; the reference's flow-matching scheduler.

    Raises:
        ValueError: edges that don't rise from 0 to 1, or impossible shift or gamma.
    """
    _check(edges, shift, gamma)
    # parity: edges are cut to whole thousandths.
    noise = [_noise(int(edge * TIME_SCALE), shift) for edge in edges]
    ends = [1 - n for n in noise[1:]]
    starts = [0.0] + [e / (e + math.sqrt(1 + 1 / gamma) * (1 - e)) for e in ends[:-1]]

    removed = [e - s for s, e in zip(starts, ends, strict=True)]
    bounds = np.concatenate([[0.0], np.cumsum(removed) / sum(removed)])
    last = TIME_SCALE - 1
    times = [_noise(min(int(b * TIME_SCALE), last), shift) * TIME_SCALE for b in bounds]
    rows = zip(starts, ends, pairwise(times), strict=True)
    return tuple(Stage(start, end, *clock) for start, end, clock in rows)


def _noise(index: int, shift: float) -> float:
    """Noise fraction at entry `index` of the reference's table of 1000."""
    n = (TIME_SCALE - index) / TIME_SCALE
    return shift * n / (1 + (shift - 1) * n)


def _check(edges: Sequence[float], shift: float, gamma: float) -> None:
    rising = all(a < b for a, b in pairwise(edges))
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not rising:
        raise ValueError(f"stage edges {tuple(edges)} must increase from 0 to 1")
    if not shift > 0:
        raise ValueError(f"shift {shift} must be positive; 1 changes nothing")
    if not 0 < gamma <= 1 / 3:
        raise ValueError(
            f"gamma {gamma} must be in (0, 1/3]; the released models use 1/3"
        )


# -------------------------------------------------------------------------- resolution


def down(x: Float[Array, "*b h w c"]) -> Float[Array, "*b h//2 w//2 c"]:
    """Halves height and width: the mean of every 2x2 block (= bilinear resizing)."""
    return reduce(x, "... (h i) (w j) c -> ... h w c", "mean", i=2, j=2)


def up(x: Float[Array, "*b h w c"]) -> Float[Array, "*b 2*h 2*w c"]:
    """Doubles height and width: every value is copied into a 2x2 block."""
    return repeat(x, "... h w c -> ... (h i) (w j) c", i=2, j=2)


def levels(x: Float[Array, "*b h w c"], count: int) -> list[Float[Array, "*b _ _ c"]]:
    """The spatial pyramid of a clean latent, coarsest level first, `x` itself last."""
    pyramid = [x]
    for _ in range(count - 1):
        pyramid.append(down(pyramid[-1]))
    return pyramid[::-1]


def noise_levels(
    z: Float[Array, "*b h w c"], count: int
) -> list[Float[Array, "*b _ _ c"]]:
    """The pyramid of white noise `z`, white at every level: halving scales by 2."""
    pyramid = [z]
    for _ in range(count - 1):
        pyramid.append(2 * down(pyramid[-1]))
    return pyramid[::-1]


# -------------------------------------------------------------- the path inside a stage


def endpoints(
    clean: Float[Array, "*n"],
    coarser: Float[Array, "*n"],
    z: Float[Array, "*n"],
    s: float | Float[Array, "*#n"],
    e: float | Float[Array, "*#n"],
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Where the path of a stage starts and ends.

        start = s · Up(Down(x)) + (1 - s) · z
        end   = e · x           + (1 - e) · z

    Args:
        clean: x, the clean latent at this stage's resolution.
        coarser: Up(Down(x)), the next coarser level copied up (unused where s = 0).
        z: standard normal noise, the same at both ends, which makes the path straight.

    Source: paper eq. 9 and 10. Elementwise, so latents and tokens serve alike.
    """
    return s * coarser + (1 - s) * z, e * clean + (1 - e) * z


def interpolate(
    start: Float[Array, "*n"],
    end: Float[Array, "*n"],
    sigma: float | Float[Array, "*#n"],
) -> Float[Array, "*n"]:
    """The point of the path at `sigma`: sigma·start + (1 - sigma)·end."""
    return sigma * start + (1 - sigma) * end


def velocity(start: Float[Array, "*n"], end: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The training target, d(interpolate)/d(sigma) = start - end (paper eq. 11)."""
    return start - end


def time(sigma: Float[Array, "*n"], stage: Stage) -> Float[Array, "*n"]:
    """The network's clock, in 0..1000, at `sigma` of a stage."""
    return stage.time_end + sigma * (stage.time_start - stage.time_end)


def sigmas(steps: int, last_step: bool = True) -> np.ndarray:
    """The `steps + 1` positions that an Euler solver of `steps` steps visits, 1 to 0.

    parity: the last step always covers 0.001 only. `last_step=False` leaves it out, one
    network evaluation less for an error of that order.
    """
    if not (1 if last_step else 2) <= steps <= MOST_STEPS:
        raise ValueError(
            f"{steps} steps per stage: give 1 or more (2 without the last step), at "
            f"most {MOST_STEPS}"
        )
    visited = np.linspace(1.0, 0.001, steps)
    return np.append(visited if last_step else visited[:-1], 0.0)


def euler(
    x: Float[Array, "*n"],
    v: Float[Array, "*n"],
    sigma: float | Float[Array, ""],
    following: float | Float[Array, ""],
) -> Float[Array, "*n"]:
    """One Euler step from `sigma` to the `following` one along the velocity v."""
    return x + (following - sigma) * v


# ---------------------------------------------------------- the jump between two stages


def block_noise(
    z: Float[Array, "*b h w c"], gamma: float = 1 / 3
) -> Float[Array, "*b h w c"]:
    """Unit noise with correlation -gamma inside every 2x2 block, from white noise `z`.

        n = sqrt(1 + gamma) · (z - m) + sqrt(1 - 3·gamma) · m,

    m being the mean of z in the block.
    """
    mean = up(down(z))
    return math.sqrt(1 + gamma) * (z - mean) + math.sqrt(max(0.0, 1 - 3 * gamma)) * mean


def jump_noise(
    z: Float[Array, "*b h w c"], gamma: float = 1 / 3, renoising: str = CORRECTIVE
) -> Float[Array, "*b h w c"]:
    """What a jump adds, from white noise `z`: block noise, or for an ablation less.

    With `WHITE` noise the total has the right deviation, but correlation
    gamma / (1 + gamma) is left inside blocks. With `NO_NOISE` every block has one
    value, and the deviation is too small by sqrt(gamma / (1 + gamma)).

    Source: paper appendix C.2 and Fig. 10, which leaves the noise out.
    """
    if renoising == CORRECTIVE:
        return block_noise(z, gamma)
    return z if renoising == WHITE else 0 * z


def jump(
    x: Float[Array, "*b h w c"],
    n: Float[Array, "*b 2*h 2*w c"],
    s: float,
    gamma: float = 1 / 3,
) -> Float[Array, "*b 2*h 2*w c"]:
    """Moves the end of a stage to the start, s, of the next finer one by block noise n.

        x_s = (s + (1 - s)·sqrt(gamma / (1 + gamma))) · Up(x_e)
            + (1 - s) / sqrt(1 + gamma) · n

    With the released gamma = 1/3: (1 + s)/2 · Up(x_e) + sqrt(3)/2 · (1 - s) · n.
    Up copies each noise value into a 2x2 block; n, anti-correlated inside the block,
    makes the total noise white again, of deviation 1 - s, while the signal fraction
    becomes s.

    Source: paper eq. 15 (appendix A, eq. 26); docs/equations.md has the derivation.
    """
    gain = s + (1 - s) * math.sqrt(gamma / (1 + gamma))
    return gain * up(x) + (1 - s) / math.sqrt(1 + gamma) * n


def renoise(
    x: Float[Array, "*b h w c"],
    z: Float[Array, "*b 2*h 2*w c"],
    s: float,
    gamma: float = 1 / 3,
) -> Float[Array, "*b 2*h 2*w c"]:
    """`jump` with block noise made from white noise `z` at the finer resolution."""
    return jump(x, block_noise(z, gamma), s, gamma)
