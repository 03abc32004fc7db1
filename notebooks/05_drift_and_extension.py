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
# # Drift and extension
#
# A video grows frame by frame, so it need not end: `extend` continues one, also with another
# prompt. But errors are inherited, too. This notebook makes videos longer than the model was
# made for, and measures what changes on the way.

# %%
# SPDX-License-Identifier: Apache-2.0
import os
import warnings

# Libraries would miss PyTorch and Jupyter's widgets, which nothing here needs.
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
warnings.filterwarnings("ignore", message="IProgress")

import jax
import matplotlib.pyplot as plt
import numpy as np

import pyramid_jax

# With models as small as these, compiling takes longer than running.
jax.config.update("jax_disable_most_optimizations", True)
plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.titlesize": 9})
model = pyramid_jax.load(pyramid_jax.PAIRS)

# %% [markdown]
# ## There and back
#
# The model was made for 33 frames. The second call goes on where the first one ended; its
# prompt asks for another motion.

# %%
pairs = "a red circle and a blue seven", "a green ring and a yellow star"
lengths = 33, 49
videos = model([f"{pair} both move sideways" for pair in pairs], num_frames=lengths[0], seed=2)
prompts = [f"{pair} both move up and down" for pair in pairs]
videos = model.extend(videos, prompts, num_frames=lengths[1], seed=2)
print("frames:", videos.frames.shape[1])

shown = np.linspace(0, lengths[-1] - 1, 12).round().astype(int)
figure, axes = plt.subplots(len(prompts), len(shown), figsize=(9, 1.9), layout="constrained")
for line, video in zip(axes, videos.frames, strict=True):
    for axis, index in zip(line, shown, strict=True):
        axis.imshow(video[index], interpolation="nearest")
        axis.axis("off")
for axis, index in zip(axes[0], shown, strict=True):
    axis.set_title(f"{index}")
plt.show()

# %% [markdown]
# ## What drifts
#
# Contrast and sharpness of every frame. In a real clip both stay about level. Right of
# the dotted line is what the second call made, beyond the length that the model was made for.

# %%
def contrast(frames):
    """Deviation of brightness inside each frame, in values of 255."""
    return frames.mean(-1).std((-2, -1))


def sharpness(frames):
    """Mean step of brightness from pixel to pixel."""
    grey = frames.mean(-1)
    return np.abs(np.diff(grey, axis=-1)).mean((-2, -1)) + np.abs(np.diff(grey, axis=-2)).mean((-2, -1))


figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for axis, measure in zip(axes, (contrast, sharpness), strict=True):
    for video, pair in zip(videos.frames, pairs, strict=True):
        axis.plot(measure(video.astype(float)), label=pair)
    for length in lengths[:-1]:
        axis.axvline(length - 0.5, color="grey", linestyle=":")
    axis.set(title=measure.__name__, xlabel="frame", ylim=(0, None))
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## What helps
#
# - The past is given a little noise in training (`corrupt` of the config), so that a model
#   learns not to trust it entirely; `docs/ablations.md` compares how much.
# - Guidance of later frames: more moves more and hides blur, less is calmer.
# - `window` bounds what a unit sees, so that a long video costs no more per second.
#
# `pyramid-jax evaluate --videos=FOLDER` measures the drift of any clips
# (`docs/evaluation.md`), `docs/limits.md` says what remains.
