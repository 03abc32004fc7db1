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
# # What is left out
#
# The paper shows why a part is there by taking it away. `make ablations` does so at a size
# that CPUs can train, and writes `benchmarks/results/ablations.json`. This notebook draws
# what is in that file, and what can be shown without any training: why a jump needs noise.

# %%
# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from pyramid_jax import pyramid

plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.titlesize": 9})
found = json.loads(Path("../benchmarks/results/ablations.json").read_text())
print("scale:", found["scale"], "  runs so far:", ", ".join(found["runs"]))

# %% [markdown]
# ## The jump, without any network
#
# At the end of stage 0 a latent is a third signal and two thirds white noise. Copied up, each
# noise value fills a block of 2x2 cells: noise that no training has seen. The jump adds noise
# with the opposite correlation inside blocks, just enough to make the total white again. With
# plain white noise the deviation is right but some correlation stays; with none, blocks stay.

# %%
rng = np.random.default_rng(0)
stage, following = pyramid.stages()[:2]
coarse = (1 - stage.end) * rng.standard_normal((1, 64, 64, 1))
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.9), layout="constrained")
for axis, kind in zip(axes, pyramid.RENOISING, strict=True):
    z = rng.standard_normal((1, 128, 128, 1))
    noise = pyramid.jump(coarse, pyramid.jump_noise(z, renoising=kind), following.start)
    left, right = noise[0, :, 0::2, 0], noise[0, :, 1::2, 0]
    correlation = np.corrcoef(left.ravel(), right.ravel())[0, 1]
    axis.imshow(noise[0, :48, :48, 0], cmap="gray", interpolation="nearest")
    deviation = noise.std() / (1 - following.start)
    axis.set(title=f"{kind}: deviation {deviation:.2f},\ncorrelation in a block {correlation:.2f}")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## The same in images of a trained model
#
# One model, sampled three times. *Blockiness* compares steps of brightness between 2x2 blocks
# with those inside them: 1 is none. The spectrum is the mean power of an image at each
# frequency; too much at the right end is blocks and noise.

# %%
for name, report in found["renoising"].items():
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for kind, row in report["rows"].items():
        left.plot(row["spectrum"], label=kind, color="black" if kind == "real" else None)
    left.set(xlabel="frequency", ylabel="power, dB", title=f"{name}, {report['captions']} captions")
    left.legend(frameon=False)
    values = [row["blockiness"] for row in report["rows"].values()]
    right.barh(list(report["rows"]), values)
    right.axvline(1, color="black", linewidth=1)
    right.invert_yaxis()
    right.set(xlabel="blockiness")
    plt.show()

# %% [markdown]
# ## Learning curves
#
# Distance to real images over training, in arithmetic rather than steps, so that arms with
# other rows can be compared. Runs that are missing here have not been run to their end; the
# same cell draws them once they have. One short run says nothing about a claim of the paper.

# %%
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, run in found["runs"].items():
    flop = [point["flop"] / 1e12 for point in run["points"]]
    axis.plot(flop, [p["measures"]["frechet"] for p in run["points"]], "o-", label=name)
axis.axhline(found["real"]["images"]["frechet"], color="grey", label="real images")
axis.set(xlabel="training, TFLOP", ylabel="Fréchet distance", ylim=(0, None))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Where to go on
#
# - `docs/ablations.md` has the rules, fixed beforehand, and a verdict for every question.
# - `make ablations` runs all arms; the same command continues what was interrupted.
