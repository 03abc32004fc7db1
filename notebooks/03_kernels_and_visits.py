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
# # Kernels and visits
#
# Attention is where the tokens meet. A token sees the keys of its own segment whose frame
# is not later than its own, so much of the square of queries times keys is empty. A kernel
# that skips whole blocks of it does less work, and this notebook draws what is skipped.
# `pyramid_jax/kernels/visits.py` is the file to read beside it.

# %%
# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from launch.compile.cases import case
from pyramid_jax.kernels.visits import ALL, NONE, SOME, kinds, visits

plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.titlesize": 9})
COLOURS = ListedColormap(["#f3f4f6", "#f2b134", "#3b6fb6"])  # NONE, SOME, ALL

# %% [markdown]
# ## Two integers per token
#
# A row of sampling is text, past frames (the older, the fewer tokens) and the frame that is
# being denoised. A row of training packs several examples, of any stage. Both are told by a
# segment and a frame for each token; the mask follows, and is never stored.

# %%
rows = {
    "sampling, 384p, the finest stage, frame 8": case("384p stage 2 unit 8", 0.25),
    "a packed row of training": case("packed", 0.25),
}
figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for axis, (name, mask) in zip(axes, rows.items(), strict=True):
    segment, frame = (np.asarray(x)[0] for x in mask)
    sees = (segment[:, None] == segment[None]) & (frame[:, None] >= frame[None])
    sees &= (segment >= 0)[:, None]
    axis.imshow(sees, cmap="Blues", interpolation="nearest")
    axis.set(title=f"{name}\n{sees.mean():.0%} of the pairs", xlabel="key", ylabel="query")
plt.show()

# %% [markdown]
# ## Three kinds of blocks
#
# The kernels walk over blocks of 128 queries and 64 keys. In some pairs of blocks no query
# sees any key: they are not even loaded. In some every query sees every key: no mask is
# applied. Only the rest needs the mask. The kinds are found from the earliest and the latest
# frame of each segment in a block; no two tokens are compared.

# %%
names = "768p stage 2 unit 8", "packed", "packed tightly"
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for axis, name in zip(axes, names, strict=True):
    mask = tuple(jnp.asarray(x, jnp.int32) for x in case(name))
    kind = np.asarray(kinds(mask, mask, 128, 64))[0]
    axis.imshow(kind, cmap=COLOURS, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    shares = [(kind == each).mean() for each in (ALL, SOME, NONE)]
    title = "{:.0%} whole, {:.0%} in part, {:.0%} skipped".format(*shares)
    axis.set(title=f"{name}\n{title}", xlabel="block of keys", ylabel="block of queries")
plt.show()

# %% [markdown]
# ## The list of a block
#
# Each block of queries gets the list of the blocks of keys that it visits: first those that
# are wholly visible, then those with a mask. The length of the list is known on the device
# only, so a kernel loops as often as it says.

# %%
mask = tuple(jnp.asarray(x, jnp.int32) for x in case("packed tightly"))
lists = visits(kinds(mask, mask, 128, 64))
for block in range(0, lists.count.shape[1], 3):
    whole, count = int(lists.whole[0, block]), int(lists.count[0, block])
    walked = lists.block[0, block, :count].tolist()
    print(f"queries {block:2}: whole {walked[:whole]}, with a mask {walked[whole:]}")

# %% [markdown]
# ## What it is worth
#
# Times of the same row by this kernel and by other libraries, which get the mask as a matrix
# or, FlexAttention, by blocks. The file is what `python -m benchmarks.device` wrote on the
# device; the device's name is in it.

# %%
results = Path("../benchmarks/results/device_h200.jsonl").read_text().splitlines()
records = [json.loads(line) for line in results]
device = next(r["environment"]["device"] for r in records if r["what"] == "begins")
times = [r for r in records if r["what"] == "time" and not r["measured"]["skipped"]]
labels = [record["rival"] for record in times]
figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
for offset, way in ((-0.2, "forward"), (0.2, "both")):
    medians = [record["measured"][way]["median"] for record in times]
    places = np.arange(len(times)) + offset
    axis.barh(places, medians, 0.38, label=way.replace("both", "forward and backward"))
axis.set_yticks(range(len(times)), labels)
axis.invert_yaxis()
axis.set(xlabel="milliseconds", title=f"{times[0]['case']}, {device}")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Where to go on
#
# - `docs/kernels.md` has the arithmetic, block sizes and what compilers say.
# - `python -m benchmarks.attention` times rows of your choice on your device.
