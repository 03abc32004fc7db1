# SPDX-License-Identifier: Apache-2.0
"""From a pyramid of latents to tokens: which frames at which stage, and where they are.

A *unit* is one autoregressive step: the first frame alone, then `frames_per_unit`
frames each. When a unit is denoised at some stage, it sees its past through the
temporal pyramid: the previous unit at the same stage, the one before at the next
coarser stage and so on, everything older at stage 0. `HISTORIES` names the
alternatives. The same functions serve training rows (numpy, in the data workers) and
sampling (jax, with a traced unit inside a scan).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int

from pyramid_jax import pyramid
from pyramid_jax.shapes import AnyTokens, Array, Tokens

# What a unit sees of its past: the temporal pyramid; all frames at the resolution of
# its own stage; or nothing, because all frames of a video are one unit.
HISTORIES = PYRAMID, FULL, NONE = "pyramid", "full", "none"


@dataclass(frozen=True)
class Layout:
    """How a model cuts latents into tokens and numbers their positions.

    Args:
        patch: side of the square of latent cells that makes one token.
        frames_per_unit: latent frames generated together after the first.
        position_table: side of the model's position table in cells; positions are then
            centred in it. None counts from the top left corner.
        interpolate: coarser history lies on the target stage's grid; False gives every
            clip the cells of its own, coarser grid (centred), as an ablation.
        history: one of `HISTORIES`; all but the first are ablations. "full" has full
            resolution at the finest stage, "none" is full-sequence diffusion.
    """

    patch: int = 2
    frames_per_unit: int = 1
    position_table: int | None = None
    interpolate: bool = True
    history: str = PYRAMID

    def __post_init__(self):
        for name in ("patch", "frames_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        if self.history not in HISTORIES:
            raise ValueError(f"history {self.history!r} must be one of {HISTORIES}")

    def units(self, frames: int) -> int:
        """How many units a video of `frames` latent frames has; raises as `units`."""
        return 1 if self.history == NONE else units(frames, self.frames_per_unit)

    def longest(self, frames: int) -> int:
        """The most frames, of so many, that are whole units."""
        if self.history == NONE:
            return frames
        return 1 + (frames - 1) // self.frames_per_unit * self.frames_per_unit

    def unit_size(self, first: bool, frames: int) -> int:
        """How many frames the first unit of a video of `frames` has, or a later one."""
        if first:
            return frames if self.history == NONE else 1
        return self.frames_per_unit

    def largest_unit(self, frames: int) -> int:
        """How many frames the largest unit of a video of `frames` has."""
        return max(self.unit_size(first, frames) for first in (True, False))


class Clip(NamedTuple):
    """Frames kept at one stage: `frame` holds their indices, -1 for an empty slot."""

    stage: int
    frame: Int[Array, "_"]


# ---------------------------------------------------------------------- units and clips


def units(frames: int, frames_per_unit: int = 1) -> int:
    """How many units a video of `frames` latent frames has."""
    if frames < 1 or (frames - 1) % frames_per_unit:
        fits = 1 + max(0, frames - 1) // frames_per_unit * frames_per_unit
        raise ValueError(
            f"{frames} latent frames are not 1 + a multiple of {frames_per_unit} "
            f"(frames per unit); use {fits} or {fits + frames_per_unit}"
        )
    return 1 + (frames - 1) // frames_per_unit


def unit_frames(unit: int | Array, frames_per_unit: int = 1) -> Int[Array, "t"]:
    """The frames of a unit, in slots that are empty before frame 0."""
    slot = np.arange(frames_per_unit, dtype=np.int32)
    frame = (unit - 1) * frames_per_unit + 1 + slot
    return _present(frame, frame >= 0)


def clips(
    stage: int,
    unit: int | Array,
    slots: int,
    frames_per_unit: int = 1,
    history: str = PYRAMID,
) -> tuple[Clip, ...]:
    """The history of `unit` as `stage` sees it, oldest first, then the unit itself.

    Args:
        unit: 0 is the first frame alone; may be traced.
        slots: units that fit, the denoised one included; the sizes of the clips depend
            on it alone. `unit < slots`.
        history: `PYRAMID` or `FULL`; where there is none, see `first_clip`.

    Source: paper section 3.3; the reference's selection in `generate` and in training.
    """
    steps = stage if history == PYRAMID else 0  # up from the oldest clip's stage
    old = max(0, slots - 1 - steps)
    frame = np.arange(1 + (old - 1) * frames_per_unit if old else 0, dtype=np.int32)
    newest_old = (unit - steps - 1) * frames_per_unit
    past = [Clip(stage - steps, _present(frame, frame <= newest_old))] if old else []
    for s in range(1, steps + 1):
        back = steps - s + 1
        if back < slots:
            past.append(Clip(s, unit_frames(unit - back, frames_per_unit)))
    return (*past, Clip(stage, unit_frames(unit, frames_per_unit)))


def first_clip(stage: int, frames: int) -> Clip:
    """The first frames of a video, as a unit without history: one, or a sequence."""
    return Clip(stage, np.arange(frames, dtype=np.int32))


def recent_clips(
    stage: int, unit: int | Array, frames_per_unit: int = 1
) -> tuple[Clip, ...]:
    """Those of `clips` that unit `stage + 1` or a later one adds to what it has seen.

    The unit before it has seen the rest at stage 0. The sizes are the same for all.
    """
    back = range(stage + 1, 0, -1)
    past = [unit_frames(unit - n, frames_per_unit) for n in back]
    own = Clip(stage, unit_frames(unit, frames_per_unit))
    return (*map(Clip, range(stage + 1), past), own)


def compact(all_clips: Sequence[Clip]) -> tuple[Clip, ...]:
    """The clips without their empty slots (unit known, on the host)."""
    full = [
        Clip(c.stage, np.asarray(c.frame)[np.asarray(c.frame) >= 0]) for c in all_clips
    ]
    return tuple(c for c in full if len(c.frame))


def balanced_units(turn: int, count: int, available: int) -> tuple[int, int]:
    """The (finest, coarser) stages' units for training turn `turn`, of `count` in all.

    Successive turns sweep the finest stage through every unit while the coarser stages
    train the complement, so that a long fine segment meets short coarse ones. A clip
    with fewer units than that (`available`) trains its last one.

    Source: paper section 3.4; the reference's `sample_stage_length`, as 0-based units.
    """
    fine = turn % count
    last = available - 1
    return min(fine, last), min(count - 1 - fine, last)


def _present(frame: Int[Array, "t"], condition: Bool[Array, "t"]) -> Int[Array, "t"]:
    # where(condition, frame, -1), numpy or traced
    return (frame + 1) * condition.astype(np.int32) - 1


# ----------------------------------------------------------------------------- tokens


def patchify(x: Float[Array, "*b t h w c"], patch: int) -> Float[Array, "*b n p"]:
    """Square patches of frames, tokens in (t, y, x), values in (y, x, c) order."""
    return rearrange(x, "... t (h i) (w j) c -> ... (t h w) (i j c)", i=patch, j=patch)


def unpatchify(
    tokens: Float[Array, "*b n p"], grid: tuple[int, int], patch: int
) -> Float[Array, "*b t h w c"]:
    """The inverse of `patchify` for frames of `grid` = (height, width) tokens."""
    h, w = grid
    pattern = "... (t h w) (i j c) -> ... t (h i) (w j) c"
    return rearrange(tokens, pattern, h=h, w=w, i=patch, j=patch)


def grid(latent: Float[Array, "*b t h w c"], patch: int) -> tuple[int, int]:
    """Height and width of a latent in tokens."""
    return latent.shape[-3] // patch, latent.shape[-2] // patch


def positions(
    frame: Int[Array, "t"],
    own: tuple[int, int],
    target: tuple[int, int],
    layout: Layout,
) -> Float[Array, "n 3"]:
    """(frame, y, x) of the tokens of a clip with grid `own` beside a `target` grid.

    A clip k stages coarser has cells at (i + 1/2)·2^k - 1/2 of the target grid, the
    centres of the squares that they cover.

    Source: paper section 3.4 (extrapolate over stages, interpolate over history); the
    reference's position handling in both of its transformers.

    Raises:
        ValueError: the target grid is larger than the model's position table.
    """
    if layout.position_table is not None and max(target) > layout.position_table:
        raise ValueError(
            f"{max(target)} tokens on a side exceed the model's position table of "
            f"{layout.position_table} cells; choose a smaller size"
        )

    def axis(cells: int, of: int) -> np.ndarray:
        if not layout.interpolate:
            of = cells
        offset = (
            0 if layout.position_table is None else (layout.position_table - of) // 2
        )
        return (np.arange(cells) + 0.5) * (of / cells) - 0.5 + offset

    y, x = (axis(cells, of) for cells, of in zip(own, target, strict=True))
    sizes = {"t": len(frame), "h": own[0], "w": own[1]}
    return rearrange(
        [
            repeat(frame, "t -> (t h w)", **sizes).astype(np.float32),
            repeat(y, "h -> (t h w)", **sizes).astype(np.float32),
            repeat(x, "w -> (t h w)", **sizes).astype(np.float32),
        ],
        "three n -> n three",
    )


def tokens(
    x: Float[Array, "b t h w c"],
    frame: Int[Array, "t"],
    target: tuple[int, int],
    layout: Layout,
) -> Tokens:
    """The tokens of the clip `x` whose frames have indices `frame` (-1: padding)."""
    values = patchify(x, layout.patch)
    own = grid(x, layout.patch)
    order = repeat(frame, "t -> b (t h w)", b=x.shape[0], h=own[0], w=own[1])
    position = positions(frame, own, target, layout)
    return Tokens(
        values=values,
        position=repeat(position, "n three -> b n three", b=x.shape[0]),
        segment=(order >= 0).astype(np.int32) - 1,  # 0 where there is a frame, else -1
        frame=order,
    )


def history_tokens(
    levels: Sequence[Float[Array, "b t _ _ c"]],
    past: Sequence[Clip],
    stage: int,
    layout: Layout,
) -> list[AnyTokens]:
    """The tokens of each history clip, cut from the `levels` of the clean frames."""
    target = grid(levels[stage], layout.patch)
    return [
        tokens(levels[clip.stage][:, clip.frame.clip(0)], clip.frame, target, layout)
        for clip in past
    ]


def join(parts: Sequence[AnyTokens]) -> Tokens:
    """Tokens one after the other in one row."""
    xp = parts[-1][0].__array_namespace__()
    return Tokens(*(xp.concat(field, axis=1) for field in zip(*parts, strict=True)))


# -------------------------------------------------------------------- training segments


class Segment(NamedTuple):
    """A training example before packing: a unit at a stage and its history, clean."""

    clean: Float[np.ndarray, "n p"]
    coarser: Float[np.ndarray, "n p"]
    position: Float[np.ndarray, "n 3"]
    frame: Int[np.ndarray, "n"]
    current: Bool[np.ndarray, "n"]


def segment(
    levels: Sequence[Float[np.ndarray, "t _ _ c"]],
    chosen: Sequence[Clip],
    layout: Layout,
) -> Segment:
    """The clean tokens of `chosen` clips, the last of which is to be denoised.

    `compact(clips(stage, unit, ...))` chooses one unit and its past; a single clip of
    all frames trains the whole sequence at once (spatial pyramid only), or an image.

    Args:
        levels: the pyramid of one clean latent, coarsest first.
    """
    grids = [grid(level, layout.patch) for level in levels]
    return Segment(
        *segment_values(levels, chosen, layout.patch),
        *segment_places(grids, chosen, layout),
    )


def segment_values(
    levels: Sequence[Float[np.ndarray, "t _ _ c"]], chosen: Sequence[Clip], patch: int
) -> tuple[Float[np.ndarray, "n p"], Float[np.ndarray, "n p"]]:
    """What a segment's tokens hold: `clean` and `coarser` of `Segment`."""
    current = chosen[-1]
    parts = [patchify(levels[clip.stage][clip.frame], patch) for clip in chosen]
    clean = np.concatenate(parts)
    coarser = np.zeros_like(clean)
    if current.stage:
        below = pyramid.up(levels[current.stage - 1][current.frame])
        coarser[-len(parts[-1]) :] = patchify(below, patch)
    return clean, coarser


def segment_places(
    grids: Sequence[tuple[int, int]], chosen: Sequence[Clip], layout: Layout
) -> tuple[Float[np.ndarray, "n 3"], Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Where a segment's tokens are: `position`, `frame` and `current` of `Segment`.

    The same for all latents of one size. `grids` are those of the levels, in tokens.
    """
    target = grids[chosen[-1].stage]
    parts = [positions(c.frame, grids[c.stage], target, layout) for c in chosen]
    position = np.concatenate(parts)
    current = np.arange(len(position)) >= len(position) - len(parts[-1])
    return position, position[:, 0].astype(np.int32), current
