# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tokens and masks
#
# A video is made one *unit* at a time (here: one latent frame), and each unit climbs
# the pyramid of stages of `01_the_pyramid`. While it climbs, it looks back at the
# frames before it. Keeping all of those at full resolution would be far too expensive,
# so the past is kept in a second pyramid, over time: the older a frame, the coarser it
# is kept.
#
# This notebook draws that: which frames are seen at which resolution, how they become
# one row of tokens, where the tokens are, and who may attend to whom. The files to read
# beside it are `pyramid_jax/layout.py` and `pyramid_jax/mask.py`.

# %%
# SPDX-License-Identifier: Apache-2.0
import logging
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from pyramid_jax import layout, mask, pyramid
from launch import moving_shapes
from pyramid_jax.data.examples import DataConfig
from pyramid_jax.data.loader import batches
from pyramid_jax.data.pixels import to_model
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout

COLOURS = "#3b6fb6", "#d9822b", "#3a9a5c"  # of the stages
STAGES = 3
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.titlesize": 9})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## What a unit sees of its past
#
# `clips(stage, unit, slots)` answers with *clips*: runs of frames that are kept at one
# stage. The rule fits in a sentence: the previous unit is kept at the stage that is
# being denoised, the one before at the next coarser stage and so on, and everything
# older at stage 0. (`slots` fixes the array sizes so that `unit` may be traced;
# `compact` drops empty slots.)

# %%
UNIT = 6


def clips(stage, unit):
    return layout.compact(layout.clips(stage, unit, slots=unit + 1))


for stage in range(STAGES):
    kept = [f"{clip.frame.tolist()} at {clip.stage}" for clip in clips(stage, UNIT)]
    print(f"stage {stage}: frames", ", ".join(kept))

# %% [markdown]
# The same, drawn to scale with a clip of the embedded data set. The frame in a coloured
# border is the one being denoised (drawn clean here).

# %%
caption = moving_shapes.parse("a cyan ring moves left")
video = to_model(
    moving_shapes.small(moving_shapes.render(caption, np.random.default_rng(5)))
)
levels = pyramid.levels(video, STAGES)

figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
for stage, bottom in enumerate((84, 48, 0)):
    x = 0
    for clip in clips(stage, UNIT):
        for frame in clip.frame:
            picture = (levels[clip.stage][frame] + 1) / 2
            side = picture.shape[0]
            place = (x, x + side, bottom, bottom + side)
            axis.imshow(picture, extent=place, interpolation="nearest")
            axis.text(x + side / 2, bottom - 5, frame, ha="center", fontsize=7)
            if frame == UNIT:
                box = plt.Rectangle((x, bottom), side, side, fill=False)
                box.set(edgecolor=COLOURS[stage], linewidth=3)
                axis.add_patch(box)
            x += side + 3
    axis.text(x + 4, bottom + side / 2, f"stage {stage}", va="center", fontsize=11)
axis.set(xlim=(-1, 170), ylim=(-6, 94))
axis.axis("off")
plt.show()

# %% [markdown]
# Nothing in this list depends on the noisy frame itself, so history is known before a
# stage begins and stays the same during its Euler steps.
#
# ## How many tokens that saves
#
# A token is a square of 2 x 2 latent cells (8 x 8 pixels each) in the released models.
# At 384 x 640 a full-resolution frame has 960 tokens, at 768 x 1280 it has 3,840, and
# each stage down has a quarter of that. Below, all tokens of a unit and its history at
# each stage, against a history kept at full resolution.

# %%
SIZES = {"384p, 5 s": (384, 640, 121), "768p, 10 s": (768, 1280, 241)}
latent, patch = LatentConfig(), 2


def counts(height, width, pixel_frames):
    """Tokens of each (stage, unit), and those of one frame at full resolution."""
    h, w = latent.grid(height, width, patch, STAGES)
    full = h * w // patch**2
    of_stage = [full // 4 ** (STAGES - 1 - k) for k in range(STAGES)]
    units = layout.units(latent.frames(pixel_frames))

    def count(stage, unit):
        return sum(len(c.frame) * of_stage[c.stage] for c in clips(stage, unit))

    return np.array([[count(k, u) for u in range(units)] for k in range(STAGES)]), full


figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.2), layout="constrained")
for axis, (name, size) in zip(axes, SIZES.items(), strict=True):
    tokens, full = counts(*size)
    units = np.arange(tokens.shape[1])
    everything = (units + 1) * full
    axis.plot(units, everything, color="0.6", label="all at full resolution")
    for k in reversed(range(STAGES)):
        axis.plot(units, tokens[k], color=COLOURS[k], label=f"stage {k}", linewidth=2)
    axis.set(title=name, xlabel="unit", yscale="log", ylabel="tokens")
    axis.set_xticks(units[::5])
    last = ", ".join(f"{n:,}" for n in tokens[:, -1])
    print(f"{name}: the last unit has {last} tokens at stages 0, 1, 2;", end=" ")
    print(f"{everything[-1]:,} with a history at full resolution")
axes[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The last numbers for 768p, 15,360 against 119,040, are the ones in the paper's
# introduction.
#
# ## Where a token is
#
# Every token has a position (frame, y, x), with y and x in cells of the grid that is
# being denoised. A token of a coarser clip covers a square of several cells; its
# position is the middle of that square, so that the same place of the picture has about
# the same position in every clip. For a clip $k$ stages coarser, cell $i$ is at
#
# $$ \left(i + \tfrac12\right) 2^k - \tfrac12 . $$

# %%
cut = Layout(patch=4)
grids = [layout.grid(level, cut.patch) for level in levels]
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.7), layout="constrained")
for stage, axis in enumerate(axes):
    rows, columns = grids[stage]
    for k in range(stage, -1, -1):
        _, y, x = layout.positions(np.zeros(1), grids[k], grids[stage], cut).T
        size = 26 * (stage - k + 1) ** 1.6
        axis.scatter(x, y, s=size, color=COLOURS[k], alpha=0.75, linewidth=0, label=k)
    axis.set(xticks=np.arange(columns + 1) - 0.5, yticks=np.arange(rows + 1) - 0.5)
    axis.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), aspect="equal")
    axis.set(xticklabels=[], yticklabels=[], title=f"denoising stage {stage}")
    axis.grid(color="0.85")
    axis.set_axisbelow(True)
handles, names = axes[-1].get_legend_handles_labels()
figure.legend(handles, names, title="stage of the clip", loc="outside right center")
plt.show()

# %% [markdown]
# Across stages, positions grow with the grid (cell 7 exists only at the finest stage);
# across history, they are interpolated (paper, section 3.4). Models with a learned
# position table (`Layout(position_table=...)`) count from the middle of the table instead of
# from the corner.
#
# ## The mask: two integers per token
#
# All tokens of a unit and its history, after those of the text, are one sequence. The
# mask says which keys a query sees. It is not stored as a matrix but as two integers
# per token, its *segment* (the example it belongs to, -1 for padding) and its *frame*:
#
# > a token sees the keys of its own segment that are not later than itself.
#
# `mask.dense_mask` writes the matrix out, which is how we look at it. First one segment,
# unit 3 at stage 2 of a video of 16 x 16 pixels, small enough to count squares.

# %%
TEXT, UNIT = 4, 3
tiny = pyramid.levels(pyramid.down(video), STAGES)
one = layout.segment(tiny, clips(2, UNIT), cut)
sees = mask.joint(
    np.zeros((1, TEXT), np.int32), np.zeros_like(one.frame)[None], one.frame[None]
)
matrix = np.asarray(mask.dense_mask(sees)[0])

frame_of = np.concatenate([np.full(TEXT, -1), one.frame])
borders = np.flatnonzero(np.diff(frame_of)) + 1
edges = np.concatenate([[0], borders, [len(frame_of)]])
names = ["text", *(f"frame {f}" for f in np.unique(one.frame))]
figure, axis = plt.subplots(figsize=(5, 4.6), layout="constrained")
axis.imshow(matrix, cmap=ListedColormap(["#f3f3f3", COLOURS[0]]))
for edge in borders:
    axis.axhline(edge - 0.5, color="white", linewidth=1)
    axis.axvline(edge - 0.5, color="white", linewidth=1)
middle = (edges[:-1] + edges[1:] - 1) / 2
axis.set_xticks(middle, names, rotation=45, ha="right")
axis.set_yticks(middle, names)
axis.set(xlabel="keys", ylabel="queries", title=f"unit {UNIT} at stage 2")
plt.show()

# %% [markdown]
# - Inside a frame everything sees everything: nothing is causal within a picture.
# - A frame never sees a later one. So the states of history do not depend on the frame
#   that is being made.
# - **Text sees itself and frame 0, and nothing later.** Text counts as frame 0; the
#   released models were trained like this. Every frame sees the text.
#
# ## A packed training row
#
# In training, a row is filled with several segments: different clips, units and stages.
# The segments do not see each other. Here are rows as the data workers make them for
# the embedded model, from a few mp4 files written on the spot; we look at the one with
# the most stages. The text of all segments comes first.

# %%
logging.getLogger("absl").setLevel(logging.ERROR)


def word_lengths(text):
    """A stand-in for the tokenizer: a token per word, and one for the end."""
    return [*map(len, text.split()), 0]


with tempfile.TemporaryDirectory() as folder:
    manifest = moving_shapes.write_dataset(Path(folder) / "shapes", clips=12, seed=0)
    data = DataConfig(
        manifest=manifest,
        height=32,
        width=32,
        frames=8,
        fps=8.0,
        batch=4,
        tokens=168,
        text_tokens=28,
        segments=8,
        stage_shares=(2, 2, 1),
        layout=cut,
    )
    source = batches(data, word_lengths, folder)
    rows = next(source)
    source.close()

most = max(range(data.batch), key=lambda i: len(np.unique(rows.stage[i])))
row = type(rows)(*(field[most] for field in rows))
members = range(row.segment.max() + 1)
for number in members:
    mine = row.segment == number
    unit, words = row.frame[mine].max(), (row.text_segment == number).sum()
    print(f"segment {number}: unit {unit} at stage {row.stage[number]},", end=" ")
    print(f"{mine.sum()} tokens and {words} of text")
print(f"{(row.segment < 0).sum()} of {len(row.segment)} places are padding")

# %%
packed = mask.joint(row.text_segment[None], row.segment[None], row.frame[None])
segment, matrix = packed.segment[0], np.asarray(mask.dense_mask(packed)[0])
hidden = len(members)
painted = np.where(matrix, np.asarray(segment)[:, None], hidden)
palette = [*plt.get_cmap("tab10").colors[:hidden], (0.96, 0.96, 0.96)]
figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
axis.imshow(painted, cmap=ListedColormap(palette), vmin=-0.5, vmax=hidden + 0.5)
words = len(row.text_segment)
axis.axhline(words - 0.5, color="0.4", linewidth=0.8)
axis.axvline(words - 0.5, color="0.4", linewidth=0.8)
axis.set(xlabel="keys: text | video", ylabel="queries", title="a colour per segment")
plt.show()

# %% [markdown]
# Rows and columns of padding stay empty. The small squares in the upper left are the
# texts, each with itself; to their right, the few places where text sees frame 0.
#
# A query sees at most two runs of neighbouring keys: its segment's text, and its
# segment's video up to its own frame. That is what makes it possible to compute
# attention from intervals, without any matrix.
#
# ## What the mask costs, and what it could save
#
# The plain form of attention computes all pairs and hides some. The fraction that is
# visible says how much of that work counts, and so what a kernel that skips hidden
# blocks can gain.


# %%
def visible(which):
    """The fraction of all pairs that the mask lets through."""
    return float(mask.dense_mask(which).mean())


def single(stage, unit, grids, words):
    """The mask of one segment with `words` of text."""
    _, frame, _ = layout.segment_places(grids, clips(stage, unit), Layout())
    nothing = np.zeros_like(frame)
    return mask.joint(np.zeros((1, words), np.int32), nothing[None], frame[None])


h, w = latent.grid(384, 640, patch, STAGES)
grids = [(h // patch // 2**k, w // patch // 2**k) for k in (2, 1, 0)]
units = range(0, 16, 3)
figure, axis = plt.subplots(figsize=(6, 2.9), layout="constrained")
for k in range(STAGES):
    fractions = [visible(single(k, unit, grids, 128)) for unit in units]
    axis.plot(units, fractions, ".-", color=COLOURS[k], label=f"stage {k}")
axis.set(xlabel="unit, 384p with 128 text tokens", ylabel="visible pairs", ylim=(0, 1))
axis.legend(frameon=False)
plt.show()
print(f"the packed row above: {visible(packed):.0%} of all pairs are visible")

# %% [markdown]
# One segment alone is more than half visible, a lower triangle whose last blocks are
# the largest. In a packed row most pairs belong to different segments, so there the
# mask hides most of the matrix.
#
# ## Where to go on
#
# - `pyramid_jax/models/dit.py` takes these tokens, and `pyramid_jax/objective.py` puts
#   the noise on a packed row.
# - `docs/architecture.md` follows a training example and a prompt through the package.
