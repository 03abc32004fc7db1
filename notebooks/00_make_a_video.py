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
# # Make a video
#
# This notebook samples videos and images with a small model that ships with the
# project, on any CPU. It has 5 million weights and knows bouncing pairs: two shapes or
# handwritten digits over a moving texture. The last section says what to change for the
# released models.

# %%
# SPDX-License-Identifier: Apache-2.0
import os
import time
import warnings

# Libraries would miss PyTorch and Jupyter's widgets, which nothing here needs.
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
warnings.filterwarnings("ignore", message="IProgress")

import jax
import matplotlib.pyplot as plt
import numpy as np

import pyramid_jax
from launch.pairs.dataset import pair

# With models as small as these, compiling takes longer than running.
jax.config.update("jax_disable_most_optimizations", True)
plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.titlesize": 9})


def sheet(rows, names, titles=()):
    """Draws rows of pictures, each with its name above the first one."""
    columns = max(map(len, rows))
    size = (max(1.1 * columns, 5), 1.3 * len(rows))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=size, squeeze=False, layout="constrained"
    )
    for line, pictures, name in zip(axes, rows, names, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture, interpolation="nearest")
        line[0].set_title(" ", loc="left")  # room for a name that may be wider
        text = line[0].text(0, 1.05, name, transform=line[0].transAxes)
        text.set_in_layout(False)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title)
    plt.show()


# %% [markdown]
# ## Text to video
#
# `load` takes a folder. A model is called with prompts; height, width and length are
# those that it was made for, unless a call says otherwise. The result has `frames`, 8-bit
# RGB, one video for every prompt. The first call compiles one function per stage of the
# pyramid; later calls of the same size do not.

# %%
model = pyramid_jax.load(pyramid_jax.PAIRS)
print(model)
prompts = [
    "a red circle moves sideways and a blue seven goes up and down",
    "a yellow star and a green zero both bounce diagonally",
]
began = time.monotonic()
videos = model(prompts, num_frames=9, seed=1)
print(
    videos.frames.shape,
    videos.frames.dtype,
    f"{time.monotonic() - began:.1f} s with compiling",
)
sheet(videos.frames, prompts)

# %% [markdown]
# ## Image to video
#
# The first frame is given, as pixels here, or as a file or a PIL image; the prompt says
# what happens next: one drawn picture, and two motions.

# %%
image = pair(10, split="held out").pixels[0]
ways = ("sideways", "up and down")
wishes = [f"a green seven and a cyan ring both move {way}" for way in ways]
sheet(model(wishes, image=image, num_frames=9, seed=1).frames, wishes)

# %% [markdown]
# ## Text to image
#
# An image is a video of one frame: only the first unit is sampled.

# %%
images = model.text_to_image(prompts, seed=1).frames[:, 0]
sheet(images[:, None], prompts)

# %% [markdown]
# ## Frame by frame
#
# A video grows in *units*: the first frame, then one latent frame at a time, which is
# four pixel frames here and eight in the released models. `stream` hands over the frames
# of each unit when they are done, and does not need the later ones. The callback is
# called after every Euler step. The video is the same.

# %%
steps = []
arrived = []
choices = {"num_frames": 9, "seed": 1}
for frames in model.stream(prompts, callback_on_step_end=steps.append, **choices):
    arrived.append(frames)
    print(f"{frames.shape[1]} frames; the last step was {steps[-1]}", end=" ")
    print(f"({steps[-1].done:.0%} of the work)")
difference = np.abs(np.concatenate(arrived, axis=1).astype(int) - videos.frames).max()
print("largest difference of a pixel value:", difference)

# %% [markdown]
# ## What the seed and guidance do
#
# The seed draws the noise from which a video starts: other shapes, sizes and places for
# the same words. Video *i* of a batch is the video of its prompt alone with `seed + i`.
#
# Classifier-free guidance runs the network twice, with the prompt and with the negative
# prompt (empty by default), and goes further in the direction of their difference:
#
# $$ v = v_{\mathrm{negative}} + \mathrm{scale}\,(v_{\mathrm{prompt}} -
# v_{\mathrm{negative}}) . $$
#
# At 1 that is the prompt's velocity alone. More obeys the prompt better; too much
# oversteers. Rows below are scales, columns are seeds 3 to 6. Neither guidance nor the numbers
# of steps are compiled in.

# %%
prompt = "a blue triangle and a magenta eight"
scales = (1.0, 4.5, 12.0)


def four_seeds(scale):
    """The same four seeds with another guidance."""
    images = model.text_to_image(
        prompt, num_videos_per_prompt=4, seed=3, guidance_scale=scale
    )
    return images.frames[:, 0]


sheet([four_seeds(scale) for scale in scales], [f"guidance {s:g}" for s in scales])

# %% [markdown]
# ## Files
#
# `save` writes an mp4, gif or png file for every video. In a notebook, `videos` alone in
# the last line of a cell shows them:
#
# ```python
# videos.save("shapes.mp4")  # shapes_0.mp4, shapes_1.mp4, ...
# ```
#
# The command does the same for one prompt or a list of them; `--help` tells the rest:
#
# ```sh
# python -m launch.sample --prompt="a red circle and a blue seven both move sideways"
# ```
#
# ## The released models
#
# They are used by the same calls. First convert one, once, from the hub or from a
# folder that you have downloaded:
#
# ```sh
# python -m launch.convert --from=rain1011/pyramid-flow-miniflux \
#     --variant=diffusion_transformer_384p --to=models/miniflux_384p
# ```
#
# Then load it in bfloat16, on a machine with a GPU or TPU:
#
# ```python
# model = pyramid_jax.load("models/miniflux_384p", dtype="bfloat16")
# model("a lighthouse at dusk", seconds=5, seed=0).save("lighthouse.mp4")
# ```
#
# | variant | height x width | frames at 24 a second |
# |---|---|---|
# | `diffusion_transformer_384p` | 384 x 640 | up to 121 (5 s) |
# | `diffusion_transformer_768p` | 768 x 1280 | up to 241 (10 s) |
# | `diffusion_transformer_image` (miniFLUX) | 1024 x 1024 | 1: use `text_to_image` |
#
# Height and width are multiples of 64 = 8 (VAE) x 2 (patch) x 4 (pyramid), frames are 1
# plus a multiple of 8; other values are refused with the nearest ones that fit. The
# first frame takes 20 Euler steps per stage, each later unit 10, with guidance 7 and 5:
# all of that is in the model's `defaults`, which `num_inference_steps`, `guidance_scale`
# and their `video_` twins change for a call.
#
# ## Where to go on
#
# - `01_the_pyramid` draws what a stage is, `02_tokens_and_masks` what a unit sees of
#   its past.
# - `pyramid_jax/pipeline/video.py` has all calls of this notebook.
