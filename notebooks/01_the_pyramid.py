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
# # The pyramid
#
# A diffusion model turns noise into data along a path. Most of that path is so noisy
# that a small picture would carry as much information as a large one. Pyramid Flow
# ([arXiv:2410.05954](https://arxiv.org/abs/2410.05954)) therefore walks the first part
# of the path at a quarter of the resolution, the middle at half, and only the end at
# full resolution, with one network for all of it.
#
# This notebook draws that path: the stages, what happens inside one, the jump between
# two, and the sampler that walks all of it. Everything is computed by functions of the
# package; `pyramid_jax/pyramid.py` is the file to read beside it.

# %%
# SPDX-License-Identifier: Apache-2.0
import jax
import matplotlib.pyplot as plt
import numpy as np
from einops import rearrange

from pyramid_jax import layout, pyramid, sampler
from launch import moving_shapes
from pyramid_jax.data.pixels import to_model
from pyramid_jax.layout import Clip, Layout
from pyramid_jax.noise import KeyedNoise
from pyramid_jax.shapes import Text

COLOURS = "#3b6fb6", "#d9822b", "#3a9a5c"  # of the stages
plt.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.titlesize": 9})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
stages = pyramid.stages()
rng = np.random.default_rng(0)

# %% [markdown]
# ## Three stages, four numbers each
#
# On the path, a latent is `signal · clean + (1 - signal) · noise`. A stage says at
# which signal fraction it starts and ends, and which part of the network's clock (1000
# = noise, 0 = clean) belongs to it. Stage 0 is the coarsest.

# %%
print("stage   resolution   signal             clock")
for k, stage in enumerate(stages):
    resolution = f"1/{2 ** (len(stages) - 1 - k)}"
    signal = f"{stage.start:.3f} to {stage.end:.3f}"
    print(f"{k:5}   {resolution:10}   {signal:16}   {stage.time_start:.0f}", end="")
    print(f" to {stage.time_end:.0f}")

# %% [markdown]
# The stages end at a third, two thirds and all of the signal (0.333 and 0.666, because
# the released models were trained with boundaries cut to whole thousandths). They do
# **not** start where the previous one ended: going up in resolution costs some signal.
# If a stage ends at $e$, the next one starts at
#
# $$ s = \frac{e}{2 - e} \qquad (1/3 \to 1/5,\quad 2/3 \to 1/2). $$
#
# The section on the jump shows why. The clock is shared out in proportion to the noise
# that each stage removes and its parts do not overlap, so the time alone tells the
# network which stage it is in.

# %%
figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(7.5, 4.4), sharex=True, height_ratios=(3, 1), layout="constrained"
)
share = [4.0 ** (k + 1 - len(stages)) for k in range(len(stages))]
for k, (stage, colour) in enumerate(zip(stages, COLOURS, strict=True)):
    clock, noise = (stage.time_start, stage.time_end), (1 - stage.start, 1 - stage.end)
    top.plot(clock, noise, color=colour, linewidth=3, label=f"stage {k}")
    bottom.fill_between(clock, share[k], color=colour, alpha=0.85, linewidth=0)
    if k:
        before = 1 - stages[k - 1].end
        arrow = {"arrowstyle": "->", "linestyle": ":", "color": "0.3"}
        top.annotate("", (clock[0], noise[0]), (clock[0], before), arrowprops=arrow)
        top.text(clock[0], before - 0.03, "jump", ha="center", va="top")
top.set(ylabel="noise fraction", ylim=(0, 1.05), xlim=(1000, 0))
top.legend(frameon=False)
bottom.set(xlabel="the network's clock", ylabel="tokens,\n1 = full", ylim=(0, 1.05))
figure.suptitle("Most of the way is walked at low resolution", fontsize=11)
plt.show()
print(
    f"with equal steps per stage: {np.mean(share):.0%} of the full resolution's tokens"
)

# %% [markdown]
# ## Down the pyramid
#
# Our data is a clip of the embedded data set: 32 x 32 pixels, no VAE, so a "latent" is
# just pixels in [-1, 1]. `levels` halves height and width by 2 x 2 means, coarsest
# first.

# %%
caption = moving_shapes.parse("a yellow star moves right")
video = to_model(
    moving_shapes.small(moving_shapes.render(caption, np.random.default_rng(3)))
)
levels = pyramid.levels(video, len(stages))


def show(axis, x, title=""):
    axis.imshow(np.clip((np.asarray(x) + 1) / 2, 0, 1), interpolation="nearest")
    axis.set_title(title)
    axis.axis("off")


figure, axes = plt.subplots(1, 3, figsize=(6, 2.3), layout="constrained")
for k, (axis, level) in enumerate(zip(axes, levels, strict=True)):
    show(axis, level[0], f"stage {k}: {level.shape[1]} x {level.shape[2]}")
plt.show()

# %% [markdown]
# ## Inside a stage: a straight line
#
# Stage $k$ walks from a *pixelated and noisier* start to a *sharper and cleaner* end.
# Both use the same noise $z$, which makes the path straight (paper, eq. 9 and 10):
#
# $$ \text{start} = s\,\mathrm{Up}(\mathrm{Down}(x)) + (1 - s)\,z, \qquad
#    \text{end} = e\,x + (1 - e)\,z, $$
#
# $$ x_\sigma = \sigma\,\text{start} + (1 - \sigma)\,\text{end}, \qquad
#    v = \frac{dx_\sigma}{d\sigma} = \text{start} - \text{end}. $$
#
# So a stage does two things at once: it removes noise and it adds the detail that the
# coarser level did not have. The network learns $v$.

# %%
positions = (1, 0.75, 0.5, 0.25, 0)
figure, axes = plt.subplots(3, 5, figsize=(7.5, 4.9), layout="constrained")
for k, (stage, row) in enumerate(zip(stages, axes, strict=True)):
    clean = levels[k][:1]
    coarser = pyramid.up(levels[k - 1][:1]) if k else np.zeros_like(clean)
    z = rng.standard_normal(clean.shape).astype(np.float32)
    start, end = pyramid.endpoints(clean, coarser, z, stage.start, stage.end)
    for axis, sigma in zip(row, positions, strict=True):
        time = pyramid.time(np.array(sigma), stage)
        title = rf"stage {k}, $\sigma$ = {sigma:g}, time {time:.0f}"
        show(axis, pyramid.interpolate(start, end, sigma)[0], title)
        axis.title.set_fontsize(7)
plt.show()

# %% [markdown]
# ## Up the pyramid: the sampler with an exact velocity
#
# Sampling is Euler steps along $v$ inside a stage and a jump (`renoise`) between
# stages, unit after unit: first frame 0, then one frame at a time with the earlier ones
# in view. `sampler.sample` takes the network as a function. Here we put in a function
# that *knows the answer*: from the point $x_\sigma$ it is shown, it works out which
# noise $z$ the path through that point has, and returns the velocity of that path.
#
# Under `jax.disable_jit()` the sampler's scans run step by step, so the function can
# also write down what it was shown.

# %%
PATCH, STEPS = 4, (4, 4, 4)
plan = sampler.SamplerPlan(layout=Layout(PATCH), first_steps=STEPS, video_steps=STEPS)
grids = [layout.grid(level, PATCH) for level in levels]
seen = []  # (frame, stage, picture, its noise) of every call


def exact(tokens, time, text, last):
    now = float(time[0, 0])
    k = next(k for k, stage in enumerate(stages) if now > stage.time_end)
    s, e, late, early = stages[k]
    sigma = (now - early) / (late - early)
    frame = np.asarray(tokens.frame[0, -1:])
    clean, coarser = layout.segment_values(levels, [Clip(k, frame)], PATCH)
    x = np.asarray(tokens.values[0, -len(clean) :])  # the frame that is being made

    ends = pyramid.endpoints(clean, coarser, np.zeros_like(x), s, e)
    signal = pyramid.interpolate(*ends, sigma)
    noise = pyramid.interpolate(1 - s, 1 - e, sigma)
    z = (x - signal) / noise
    pictures = (layout.unpatchify(values, grids[k], PATCH)[0] for values in (x, z))
    seen.append((frame.item(), k, *pictures))
    # Of the `last` tokens alone: history has no velocity.
    return pyramid.velocity(*pyramid.endpoints(clean, coarser, z, s, e))[None]


frames, height, width, channels = shape = (4, *video.shape[1:])
keys = jax.random.split(jax.random.key(1), 1)  # one per video of the batch
noise = KeyedNoise(jax.random.key_data(keys), shape[1:], len(stages))
silence = Text(np.zeros((1, 1, 1)), np.zeros((1, 1), np.int32), np.zeros((1, 1, 1)))
with jax.disable_jit():
    made = np.asarray(sampler.sample(exact, silence, shape, noise, plan))[0]
print(f"{len(seen)} calls of the velocity = {frames} frames x 3 stages x 4 steps")
print(f"largest difference to the video: {abs(made - video[:frames]).max():.1e}")

# %% [markdown]
# Frame 2 on its way, as the sampler handed it to the velocity function. Each row begins
# with the jump: the picture is copied to twice its size and gets new noise.

# %%
FRAME = 2
figure, axes = plt.subplots(3, 4, figsize=(6.4, 4.9), layout="constrained")
for k, row in enumerate(axes):
    steps = [picture for *call, picture, _ in seen if call == [FRAME, k]]
    for i, (axis, picture) in enumerate(zip(row, steps, strict=True)):
        show(axis, picture, f"stage {k}, step {i}")
plt.show()
figure, axes = plt.subplots(1, frames, figsize=(6.4, 1.9), layout="constrained")
for i, axis in enumerate(axes):
    show(axis, made[i], f"frame {i}, done")
plt.show()

# %% [markdown]
# The result is the data to rounding error, without any network: stages, Euler steps,
# order of tokens and of frames are right. It says nothing about the jumps, because
# `exact` accepts whatever noise it finds. So look at that noise: after a right jump it
# is white, of deviation 1 and without correlation between neighbours, like the noise in
# training.

# %%
for k in range(len(stages)):
    z = np.array([noise for _, stage, _, noise in seen[::4] if stage == k])
    neighbours = np.corrcoef(z[:, :, 0::2].ravel(), z[:, :, 1::2].ravel())[0, 1]
    print(f"stage {k}: deviation {z.std():.2f},", end=" ")
    print(f"correlation of the pixels side by side in a block {neighbours:+.2f}")

# %% [markdown]
# Note the last column of the figure above: the last Euler step of a stage is only 0.001
# wide, as in the released sampler, so `step 3` already shows the end of the stage.
# `SamplerPlan(last_step=False)` leaves that step out.
#
# ## The jump
#
# At the end of a stage the picture still holds noise of deviation $1 - e$. Copying
# pixels into 2 x 2 blocks copies the noise too: inside a block it is now *the same*
# number four times. The network has only ever seen white noise. So the jump scales the
# copy down and adds **corrective noise** $n$ which is *anti*-correlated inside each
# block, such that the sum is white again (paper, eq. 15):
#
# $$ x_s = \tfrac{1 + s}{2}\,\mathrm{Up}(x_e) + \tfrac{\sqrt 3}{2}\,(1 - s)\,n,
#    \qquad \mathrm{Cov}(n)_\text{block} = \begin{pmatrix}
#    1 & -\frac13 & -\frac13 & -\frac13 \\
#    -\frac13 & 1 & -\frac13 & -\frac13 \\
#    -\frac13 & -\frac13 & 1 & -\frac13 \\
#    -\frac13 & -\frac13 & -\frac13 & 1 \end{pmatrix} $$
#
# The jump is linear in $x_e$ and $n$ is linear in white noise, so covariances need no
# statistics: they are $J J^\top$ with the Jacobians $J$ of `jump` and `renoise`. Below,
# for two neighbouring blocks (eight pixels, block after block).

# %%
before, s = stages[0].end, stages[1].start  # the jump from stage 0 into stage 1
blocks = "(h i) (w j) c -> (h w i j c)"


def covariance(function, x, deviation):
    jacobian = jax.jacobian(lambda x: rearrange(function(x), blocks, i=2, j=2))(x)
    jacobian = deviation * np.asarray(jacobian).reshape(8, -1)
    return jacobian @ jacobian.T


x, z = np.zeros((1, 2, 1), np.float32), np.zeros((2, 4, 1), np.float32)
copied = covariance(lambda x: pyramid.jump(x, z, s), x, 1 - before)
added = covariance(lambda z: pyramid.renoise(x, z, s), z, 1)
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.6), layout="constrained")
titles = "scaled copy", "+ corrective noise", "= white noise"
parts = zip(axes, titles, (copied, added, copied + added), strict=True)
for axis, title, matrix in parts:
    drawing = axis.imshow(matrix, cmap="RdBu_r", vmin=-0.65, vmax=0.65)
    axis.set(title=title, xticks=[], yticks=[])
figure.colorbar(drawing, ax=axes, shrink=0.8)
plt.show()
error = abs(copied + added - (1 - s) ** 2 * np.eye(8)).max()
print(f"difference to (1 - s)² times the identity: {error:.0e}")

# %% [markdown]
# The diagonal needs $a^2(1-e)^2 + b^2 = (1-s)^2$ and the rest of a block $a^2(1-e)^2 -
# \frac13 b^2 = 0$. Two equations give $b = \frac{\sqrt3}{2}(1 - s)$ and, since the
# signal has to become $s = a\,e$, also the start of the stage, $s = e / (2 - e)$.
# `docs/equations.md` derives it for any correlation.
#
# ### The same, seen as a spectrum
#
# White noise has the same power at every spatial frequency. Below are three ways to get
# noise of the right total variance at twice the resolution. Only the third has a flat
# spectrum.

# %%
SIDE, DRAWS = 32, 2000
coarse = rng.standard_normal((DRAWS, SIDE // 2, SIDE // 2, 1)) * (1 - before)
white = rng.standard_normal((2, DRAWS, SIDE, SIDE, 1))
enlarged = pyramid.jump(coarse, np.zeros_like(white[0]), s)  # the scaled copy alone
missing = np.sqrt((1 - s) ** 2 - enlarged.var())
ways = {
    "copy only, scaled up": enlarged * (1 - s) / enlarged.std(),
    "copy + ordinary noise": enlarged + missing * white[0],
    "renoise": pyramid.renoise(coarse, white[1], s),
}


def power(noise):
    """The mean power at every frequency, 1 for white noise of deviation 1 - s."""
    power = (abs(np.fft.fft2(noise[..., 0])) ** 2).mean(axis=0) / SIDE**2
    return np.fft.fftshift(power) / (1 - s) ** 2


powers = {name: power(noise) for name, noise in ways.items()}
ticks = -0.5, 0, 0.5
figure, axes = plt.subplots(2, 3, figsize=(7.5, 4.6), layout="constrained")
for column, (name, x) in zip(axes.T, ways.items(), strict=True):
    column[0].imshow(x[0, ..., 0], cmap="gray", vmin=-2, vmax=2)
    drawing = column[1].imshow(powers[name], vmin=0, vmax=4, extent=(-0.5, 0.5) * 2)
    column[0].set(title=name, xticks=[], yticks=[])
    column[1].set(xticks=ticks, yticks=ticks, xlabel="cycles per pixel")
figure.colorbar(drawing, ax=axes[1], label="power, 1 = white", shrink=0.9)
plt.show()

# %%
frequency = np.fft.fftshift(np.fft.fftfreq(SIDE))
figure, axis = plt.subplots(figsize=(6.5, 2.9), layout="constrained")
for name, colour in zip(powers, ("#b03a3a", "#888888", "#3a9a5c"), strict=True):
    along = powers[name][SIDE // 2]  # no vertical frequency
    axis.plot(frequency, along, "o-", color=colour, markersize=3, label=name)
law = 4 * np.cos(np.pi * frequency) ** 2
axis.plot(frequency, law, "k:", linewidth=1, label=r"$4\cos^2(\pi f)$, a copied pixel")
axis.set(xlabel="horizontal frequency, cycles per pixel", ylabel="power, 1 = white")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The copy has too much power at low frequencies and none at the highest one: the blocks
# that the eye sees. A network trained on white noise would take them for part of the
# picture. After `renoise` nothing tells the fine noise from that of a stage that
# started at this resolution.
#
# Finally the whole jump on a picture: the end of stage 0, the plain copy, the copy
# after `renoise`, and a start of stage 1 as training makes it. The last two are alike
# in law.

# %%
clean = levels[0][:1]
noise = rng.standard_normal(clean.shape).astype(np.float32)
_, end = pyramid.endpoints(clean, np.zeros_like(clean), noise, stages[0].start, before)
fine = rng.standard_normal((2, 1, 16, 16, 3)).astype(np.float32)
sharper, e = levels[1][:1], stages[1].end
trained, _ = pyramid.endpoints(sharper, pyramid.up(clean), fine[1], s, e)
pictures = {
    "end of stage 0": end,
    "copied up": pyramid.up(end),
    "renoised": pyramid.renoise(end, fine[0], s),
    "a start in training": trained,
}
figure, axes = plt.subplots(1, 4, figsize=(7.5, 2.2), layout="constrained")
for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
    show(axis, picture[0], name)
plt.show()

# %% [markdown]
# ## Where to go on
#
# - `02_tokens_and_masks` shows how pictures of several sizes become one row of tokens.
# - `docs/equations.md` lists every equation with its function and its test.
# - `pyramid_jax/pyramid.py` and `pyramid_jax/sampler.py` are what you have just run.
