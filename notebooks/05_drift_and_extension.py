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
# prompt. But errors are inherited, too. This notebook makes videos four times as long as the
# model has seen, and measures what changes on the way.

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
model = pyramid_jax.load(pyramid_jax.TINY_LATENT)

# %% [markdown]
# ## There and back
#
# The model was trained on 7 frames. Each call goes on where the last one ended; its prompt
# turns the motion round.

# %%
ways = "left", "right", "left", "right"
prompts = [f"a {kind} moves {ways[0]}" for kind in ("red circle", "green square", "cyan ring")]
videos = model(prompts, seed=2)
lengths = [videos.frames.shape[1]]
for way in ways[1:]:
    prompts = [prompt.rsplit(" ", 1)[0] + f" {way}" for prompt in prompts]
    videos = model.extend(videos, prompts, seed=2)
    lengths.append(videos.frames.shape[1])
print("frames after each call:", lengths)

shown = np.linspace(0, lengths[-1] - 1, 12).round().astype(int)
figure, axes = plt.subplots(len(prompts), len(shown), figsize=(9, 2.6), layout="constrained")
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
# Contrast and sharpness of every frame. In a real clip of a shape that is wholly in view both stay level.
# Dotted lines are the ends of calls; right of the first one, no frame was seen in training.

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
    for video, prompt in zip(videos.frames, prompts, strict=True):
        axis.plot(measure(video.astype(float)), label=prompt.split(" moves")[0])
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
