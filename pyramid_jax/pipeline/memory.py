# SPDX-License-Identifier: Apache-2.0
"""The memory that sampling takes on every device, known before anything is compiled.

Sampling has phases, one after the other: text, the given image, Euler steps, decoding;
a stream takes Euler steps and decodes in turns. Weights, videos and what a VAE
remembers are counted from shapes. What a compiled step holds besides is estimated: how
many arrays of the largest size live at once, with factors measured with XLA's compiler
for an A100 (docs/memory.md); its compiler for CPUs keeps up to twice as much. Of
activations, devices divide the rows of a batch and the parts of decoded videos only.
"""

import math
import os
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh

from pyramid_jax import sharding
from pyramid_jax.kernels import attention
from pyramid_jax.model import ModelConfig, SampleConfig
from pyramid_jax.models.dit import STACKED, DiTConfig
from pyramid_jax.models.text_encoder import TextConfig
from pyramid_jax.models.vae import Decoder, VAEConfig
from pyramid_jax.models.vae_layers import LOGITS
from pyramid_jax.pipeline.prompts import LIMIT, EncoderConfig, Network
from pyramid_jax.units import Unit
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import Pieces

AnyMesh = Mesh | AbstractMesh | None  # the devices that divide the work; None: one

MIB, GIB = 2**20, 2**30
TEXT, IMAGE, SAMPLING = "reading text", "reading an image", "sampling"
DECODING, STREAMING = "decoding", "streaming"
# Latent frames, and sides of tiles in latent cells, fastest first.
WINDOWS, TILES = (2, 1), (64, 32, 16)
BLOCK = 10  # arrays of tokens times width inside a transformer's block
READER = 24  # the same in a text encoder, whose MLP is wider, in float32
# Frames that a convolution holds besides: of a video's beginning, and of later pieces.
BEGINNING, LATER = 1, 3


class Work(NamedTuple):
    """What is to be made: `videos` with latents of `shape` = (t, h, w, c).

    Attributes:
        pieces: how the VAE decodes; None: only latents are made.
        image: how many given frames the VAE encodes.
        streamed: every unit is decoded as soon as it exists.
        reuse: the stages that reuse keys and values from unit to unit.
    """

    shape: tuple[int, int, int, int]
    videos: int
    options: SampleConfig
    pieces: Pieces | None = None
    image: int = 0
    streamed: bool = False
    reuse: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """What the network reads at once: prompts, and negative ones with guidance."""
        return self.videos * (1 + bool(self.options.guidance.scales(1)[0] > 0))


class Phase(NamedTuple):
    """Bytes on every device in one phase.

    Attributes:
        weights: in use.
        waiting: weights of other phases, which offloading moves to the host.
        state: what lasts from step to step.
        working: what a compiled step holds besides.
    """

    name: str
    weights: int
    waiting: int
    state: int
    working: int

    @property
    def total(self) -> int:
        return sum(self[1:])


class ModelParts(NamedTuple):
    """The networks of a model, with weights, or with shapes in their place.

    `encoders` are T5 and CLIP, () where the model reads its prompts itself.
    """

    cfg: ModelConfig
    params: Any
    vae: Autoencoder | None = None
    encoders: tuple[Network, ...] = ()


class MemoryPlan(NamedTuple):
    """The phases of some work, in the order in which they come; prints as a table."""

    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        """The phase that decides whether the work fits."""
        return max(self.phases, key=lambda phase: phase.total)

    def check(self, limit: float | None) -> None:
        """Refuses work that does not fit.

        Args:
            limit: bytes of a device; None: unknown, and nothing is refused.

        Raises:
            ValueError: a phase needs more; says what to change.
        """
        if limit is not None and self.largest.total > limit:
            raise ValueError(
                f"{self.largest.name} needs {self.largest.total / GIB:.1f} GiB on a "
                f"device, which lends {limit / GIB:.1f}; load with offload=True if "
                "weights wait, or with dtype='bfloat16' if they are float32; divide "
                "weights among more devices (fsdp or tensor of the mesh); make fewer "
                "videos at once; choose a smaller size or fewer frames; or decode "
                f"smaller pieces (VideoPipeline.pieces, with a tile)\n{self}"
            )

    def __str__(self):
        unit, name = (GIB, "GiB") if self.largest.total >= GIB else (MIB, "MiB")
        head = "".join(f"{column:>9}" for column in (*Phase._fields[1:], "total"))
        lines = [f"{f'{name} of a device':16}{head}"]
        for phase in self.phases:
            sizes = "".join(f"{n / unit:9.2f}" for n in (*phase[1:], phase.total))
            lines.append(f"{phase.name:16}{sizes}")
        return "\n".join(lines)


def memory_plan(parts: ModelParts, work: Work, mesh: AnyMesh = None) -> MemoryPlan:
    """The bytes that every phase takes on every device, with weights where they are."""
    cfg, vae, (_, h, w, _) = parts.cfg, parts.vae, work.shape
    readers = [one.cfg for one in parts.encoders] or [cfg.text]
    text = [text_working(one, work.rows, LIMIT) for one in readers if one is not None]
    phases = [_phase(parts, {TEXT: (0, max(text, default=0))})]
    if vae is not None and work.image:
        pixels = h * cfg.latent.spatial, w * cfg.latent.spatial
        frames = min(work.image, WINDOWS[0] * cfg.latent.temporal)
        encoding = encoder_working(vae.cfg, frames, *pixels)
        phases.append(_phase(parts, {IMAGE: (0, encoding)}))
    if not work.streamed:
        phases.append(_phase(parts, {SAMPLING: _sampling(parts, work, mesh)}))
    if work.streamed or (vae is not None and work.pieces is not None):
        phases.append(_last_phase(parts, work, mesh))
    return MemoryPlan(tuple(phases))


def decoding_pieces(
    parts: ModelParts, work: Work, mesh: AnyMesh, limit: float | None
) -> Pieces:
    """The largest pieces to decode in that a device of `limit` bytes has room for.

    Two latent frames, else one; tiles, which change colours a little, are the last
    choice. Two if the limit is unknown, or nothing fits.
    """
    latent, side = parts.cfg.latent, max(work.shape[1:3])
    tiles = [None, *(tile * latent.spatial for tile in TILES if tile < side)]
    choices = [Pieces(n * latent.temporal, tile) for tile in tiles for n in WINDOWS]

    def fits(pieces: Pieces) -> bool:
        phase = _last_phase(parts, work._replace(pieces=pieces), mesh)
        return limit is None or phase.total <= limit

    return next(filter(fits, choices), choices[0])


def reusing_stages(
    parts: ModelParts, work: Work, mesh: AnyMesh, limit: float | None
) -> tuple[int, ...]:
    """The stages whose keys and values a device of `limit` bytes has room for.

    Each saves about as much time for its bytes; the coarsest come first. A CPU lends
    half of the host's memory.
    """
    limit = host_memory() / 2 if limit is None else limit
    if not (work.options.reuse and parts.cfg.dit.causal):
        return ()
    chosen: tuple[int, ...] = ()
    for stage in range(len(parts.cfg.stages)):
        plan = memory_plan(parts, work._replace(reuse=(*chosen, stage)), mesh)
        names = (SAMPLING, STREAMING)
        if all(p.total <= limit for p in plan.phases if p.name in names):
            chosen = (*chosen, stage)
    return chosen


def device_memory(mesh: Mesh | None = None) -> int | None:
    """The bytes that a device lends this process, the least of all; None: unknown."""
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    return _least(min(x.get("bytes_limit", 0) for x in stats)) or None


def host_memory() -> int:
    """The bytes of a host's memory, the least of all hosts."""
    return _least(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _least(count: int) -> int:
    """The smallest number of bytes of all processes, in whole MiB."""
    counts = multihost_utils.process_allgather(np.int32(count >> 20))  # of 32 bits
    return int(np.min(counts)) << 20


def _last_phase(parts: ModelParts, work: Work, mesh: AnyMesh) -> Phase:
    """Decoding; in a stream, Euler steps and decoding."""
    costs = {DECODING: _decoding(parts, work, mesh)}
    if work.streamed:
        costs[SAMPLING] = _sampling(parts, work, mesh)
    return _phase(parts, costs)


def _phase(parts: ModelParts, costs: dict[str, tuple[int, int]]) -> Phase:
    """A phase of networks that take turns, with the state and working memory of each.

    The weights of the others wait, unless they are parked.
    """
    coder = {} if parts.vae is None else parts.vae.params
    weights = {
        TEXT: [one.params for one in parts.encoders] or parts.params.get("text"),
        IMAGE: coder.get("encoder"),
        SAMPLING: parts.params["dit"],
        DECODING: coder.get("decoder"),
    }
    used = _bytes([weights.pop(name) for name in costs])
    waiting = [x for x in jax.tree.leaves(weights) if not sharding.is_parked(x)]
    state, working = zip(*costs.values(), strict=True)
    name = STREAMING if len(costs) > 1 else next(iter(costs))
    return Phase(name, used, _bytes(waiting), sum(state), max(working))


def _sampling(parts: ModelParts, work: Work, mesh: AnyMesh) -> tuple[int, int]:
    """State and working memory of Euler steps.

    State is the video before and after a unit, the text, what modulates the network
    at every step, and what it remembers. A step holds tokens, what the network does,
    and one block's weights, gathered, where devices divide them.
    """
    cfg, dit = parts.cfg.dit, parts.params["dit"]
    videos, rows = (_share(n, "batch", mesh) for n in (work.videos, work.rows))
    state = 4 * (2 * videos * math.prod(work.shape) + rows * LIMIT * cfg.text_width)
    units = parts.cfg.layout.units(work.shape[0])
    state += rows * _steps(work, units) * modulation(cfg)
    state += rows * sum(remembered(parts.cfg, work, k, mesh) for k in work.reuse)
    tokens = longest_row(parts.cfg, work, len(parts.cfg.stages) - 1)
    working = 4 * tokens * cfg.patch_values * (2 * videos + 3 * rows)
    working += dit_working(cfg, rows, tokens, LIMIT)
    for name in STACKED:
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(dit.get(name)))
        if _bytes(dit.get(name)) < whole:
            blocks = cfg.double_blocks if name == "double" else cfg.single_blocks
            working += whole // blocks
    return state, working


def _decoding(parts: ModelParts, work: Work, mesh: AnyMesh) -> tuple[int, int]:
    """State and working memory of the decoder's steps; nothing without a decoder.

    Each tile of a stream has its own past. Tiles of whole videos are decoded one after
    the other, and all pixels stay until the last one.
    """
    vae, pieces, (t, h, w, _) = parts.vae, work.pieces, work.shape
    if vae is None or pieces is None:
        return 0, 0
    spatial, temporal = vae.latent.spatial, vae.latent.temporal
    side = max(h, w) if pieces.tile is None else pieces.tile // spatial
    window = t if pieces.frames is None else pieces.frames // temporal
    if work.streamed:
        window = parts.cfg.layout.largest_unit(t)
    videos, frames = _share(work.videos, "batch", mesh), _share(window, "frames", mesh)
    rows, columns = _share(min(h, side), "height", mesh), min(w, side)
    state = decoder_past(vae.cfg) * videos * rows * columns
    if pieces.tile is not None and work.streamed:
        step = side * (1 - pieces.overlap)
        state *= math.ceil(h / step) * math.ceil(w / step)
    elif pieces.tile is not None:
        state += 2 * 3 * 4 * videos * t * h * w * spatial**2 * temporal
    return state, decoder_working(vae.cfg, (videos, min(frames, t), rows, columns))


def longest_row(cfg: ModelConfig, work: Work, stage: int) -> int:
    """Tokens of a stage's longest row for one video, which is the last unit's."""
    t, h, w, _ = work.shape
    last, units = len(cfg.stages) - 1, cfg.layout.units(t)
    plan = work.options.plan(cfg)
    clips = plan.unit(units - 1, (units - 1, units), stage, t).clips(stage, cfg.layout)
    cells = sum(len(clip.frame) * h * w // 4 ** (last - clip.stage) for clip in clips)
    return cells // cfg.layout.patch**2


def _steps(work: Work, units: int) -> int:
    """The Euler steps that differ: those of the first unit and of later ones."""
    options = work.options
    first = 0 if work.image else sum(options.first_steps)
    return first + (sum(options.video_steps) if units > 1 else 0)


def _share(size: int, axis: str, mesh: AnyMesh) -> int:
    """What a device has of an axis of arrays: all, if it can't be divided evenly."""
    parts = 1 if mesh is None else sharding.parts(axis, mesh)
    return size if size % parts else size // parts


def _bytes(tree: Any) -> int:
    """What the arrays of a tree, or their shapes, take on each of their devices."""
    total = 0
    for x in jax.tree.leaves(tree):
        place = getattr(x, "sharding", None)
        shape = x.shape if place is None else place.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


# ------------------------------ bytes that networks hold besides weights and their past


def text_working(cfg: EncoderConfig | TextConfig, rows: int, words: int) -> int:
    """A text encoder that reads rows of `words` tokens."""
    return 4 * rows * words * (READER * cfg.width + 3 * cfg.heads * words)


def dit_working(cfg: DiTConfig, rows: int, tokens: int, words: int) -> int:
    """A `DiT` that reads rows of video and text tokens."""
    length, size = tokens + words, jnp.dtype(cfg.dtype).itemsize
    row = BLOCK * size * length * cfg.width
    if (cfg.attention or attention.default(length, cfg.head_dim, cfg.dtype)) == "xla":
        row += (4 + size) * cfg.heads * length**2
    return rows * row


def modulation(cfg: DiTConfig) -> int:
    """The vectors that modulate all blocks and the head of a `DiT` at one time."""
    last = 4 if cfg.text_ends_early else 0  # vectors that text alone does not need
    vectors = 12 * cfg.double_blocks - last + 3 * cfg.single_blocks + 2
    vectors *= 1 + cfg.clean_history
    return vectors * cfg.width * jnp.dtype(cfg.dtype).itemsize


def remembered(cfg: ModelConfig, work: Work, stage: int, mesh: AnyMesh = None) -> int:
    """Keys and values of a row that a stage keeps on each device for all its steps."""
    dit, plan = cfg.dit, work.options.plan(cfg, (stage,))
    room, once = plan.room(work.shape, stage), dit.clean_history
    room = room or once * longest_row(cfg, work, stage)  # for a unit at a time
    parts = 1 if mesh is None else sharding.parts("attended", mesh)
    width = -(-dit.heads // parts) * dit.head_dim
    steps = 1 if once else len(plan.sigmas(stage, Unit(1, 2)))
    values = 2 * (dit.double_blocks + dit.single_blocks) * (LIMIT + room) * width
    return bool(room) * steps * values * jnp.dtype(dit.dtype).itemsize


def encoder_working(cfg: VAEConfig, frames: int, height: int, width: int) -> int:
    """The VAE's encoder: input, norm and output of its first residual blocks."""
    values = 3 * cfg.encoder_widths[0] * (frames + BEGINNING) * height * width
    latents = -(-frames // cfg.temporal_factor)
    return _vae_working(cfg, values, latents, height * width // cfg.spatial_factor**2)


def decoder_working(cfg: VAEConfig, shape: tuple[int, int, int, int]) -> int:
    """The VAE's decoder: its largest residual block, and twice the pixels.

    `shape` is that of the latents, (b, t, h, w).
    """
    videos, frames, height, width = shape
    made, area, before, values = frames, height * width, cfg.decoder_widths[-1], 0
    levels = zip(cfg.decoder_widths[::-1], cfg.spatial, cfg.temporal, strict=True)
    for after, space, time in (*levels, (cfg.decoder_widths[0], False, False)):
        values = max(values, (made + LATER) * area * (2 * before + after))
        made, area, before = made * 2**time, area * 4**space, after
    held = _vae_working(cfg, videos * values, videos * frames, height * width)
    return held + 2 * 4 * videos * made * area * cfg.pixels


def _vae_working(cfg: VAEConfig, values: int, frames: int, cells: int) -> int:
    """The values, or the attention between all cells of a frame."""
    size = jnp.dtype(cfg.dtype).itemsize
    at_once = min(frames, max(1, LOGITS // cells**2))
    return max(size * values, (4 + size) * at_once * cells**2)


@cache
def decoder_past(cfg: VAEConfig) -> int:
    """Bytes that the decoder remembers of a video per latent cell of a frame; exact."""
    cell = jnp.zeros((1, 1, 1, 1, cfg.latent), jnp.float32)
    trace = jax.eval_shape(Decoder(cfg).init_with_output, jax.random.key(0), cell)
    return _bytes(trace[0][1])
