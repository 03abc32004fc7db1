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
# # Train a tiny model in ten minutes
#
# A video model from nothing, on two CPU cores: clips are drawn, a transformer of one
# million weights learns from them, and samples before and after show what it has learned.
# These are the functions that train the released sizes; only the config is smaller.

# %%
# SPDX-License-Identifier: Apache-2.0
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path

# Libraries would miss PyTorch and Jupyter's widgets, which nothing here needs; and a run
# would warn that one step is few.
logging.disable(logging.WARNING)
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore", message="IProgress")

import jax
import matplotlib.pyplot as plt
import numpy as np

import pyramid_jax
from configs import tiny
from launch.moving_shapes import captions, judge, parse, write_dataset
from pyramid_jax.train import train
from pyramid_jax.training.metrics import read_metrics, smooth

plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "axes.titlesize": 9})
STEPS = int(os.environ.get("STEPS", 300))  # of the optimizer
began, used = time.monotonic(), time.process_time()
folder = Path(tempfile.mkdtemp())
# The second half of the run, and the second samples, compile nothing again.
jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))

# %% [markdown]
# ## Clips
#
# mp4 files of one shape on a dark ground, each with a caption: 6 colours x 6 shapes x 4
# directions. A folder of your own clips is prepared by `pyramid-jax prepare` instead; what
# training reads is its `manifest.jsonl`.

# %%
manifest = write_dataset(folder / "shapes", clips=576, seed=0)
print(manifest.read_text().splitlines()[0][:99])

# %% [markdown]
# ## The config
#
# `configs/tiny.py` describes the model that ships as `pyramid_jax.TINY`: frames of 32x32
# pixels, three stages of 8, 16 and 32, no autoencoder. Its runs take 105 minutes. Here are
# fewer steps, with an optimizer that needs fewer of them (Muon), a shorter average, and a
# cosine that ends where the run does.

# %%
cfg = tiny.get_config()
cfg.data.update(manifest=str(manifest))
cfg.optimizer.update(
    kind="muon", learning_rate=3e-3, warmup_steps=min(20, STEPS), steps=STEPS
)
cfg.step.ema_decay = 0.98
cfg.loop.update(log_every=5, save_every=50, sample_every=0)

# %% [markdown]
# ## Before, and after
#
# A run lives in a folder. The first call takes one step; the second continues the same run
# until its end. Both leave the model in `model`, which `load` reads like any other.

# %%
prompts = [caption.text for caption in captions()[::9]]


def sample():
    """Videos of the prompts by the model as it is now."""
    return pyramid_jax.load(folder / "run" / "model")(prompts, seed=1).frames


cfg.loop.steps = 1
train(cfg, folder / "run")
before = sample()

# %%
cfg.loop.steps = STEPS
train(cfg, folder / "run")
after = sample()

# %% [markdown]
# ## The loss
#
# The error of the velocity, in all and for each stage. Stage 0 starts from pure noise and has
# to guess; later stages start from the end of the one before, and have less to say.

# %%
lines = [
    line for line in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in line
]
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name in ("loss", "loss_stage_0", "loss_stage_1", "loss_stage_2"):
    steps, values = np.array(
        [(line["step"], line[name]) for line in lines if name in line]
    ).T
    label = name.removeprefix("loss_").replace("_", " ")
    axis.plot(steps, smooth(values), label=label, linewidth=2 if name == "loss" else 1)
axis.set(xlabel="step", ylabel="squared error", yscale="log")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Samples
#
# The rows of each pair are the untrained and the trained model, from the same noise.

# %%
shown = range(0, len(prompts), 5)
figure, axes = plt.subplots(2 * len(shown), 8, figsize=(6, 7.5), layout="constrained")
pairs = [videos[i] for i in shown for videos in (before, after)]
for line, video in zip(axes, pairs, strict=True):
    for axis, frame in zip(line, video, strict=True):
        axis.imshow(frame, interpolation="nearest")
        axis.axis("off")
for line, i in zip(axes[::2], shown, strict=True):
    line[0].set_title(prompts[i], loc="left").set_in_layout(False)
plt.show()

# %% [markdown]
# The judge of this data set says what a clip shows, and needs one clear object for that:

# %%
for name, videos in (("before", before), ("after", after)):
    verdicts = [judge(video) for video in videos]
    for part in ("colour", "shape", "direction"):
        right = sum(
            getattr(verdict, part) == getattr(parse(text), part)
            for verdict, text in zip(verdicts, prompts, strict=True)
        )
        print(f"{name}: {part} right in {right} of {len(prompts)} clips")

# %%
print(
    f"{jax.devices()[0].platform}, {os.cpu_count()} cores: {STEPS} steps and everything",
    end=" ",
)
print(f"else took {time.process_time() - used:.0f} s of processor time")

# %% [markdown]
# ## Where to go on
#
# - Colours and motions come first, outlines last: `make train-demo` takes more steps from
#   the command line, and the three runs at the head of `configs/tiny.py` all of them.
# - `pyramid-jax train --config=tiny --workdir=runs/mine` is the same run with your own
#   manifest; `docs/own_models.md` goes on to latents and the released sizes.
