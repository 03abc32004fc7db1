# SPDX-License-Identifier: Apache-2.0
"""What sampling takes of every device's memory, known before anything is compiled.

Sampling has phases, one after the other: text, the given image, Euler steps, decoding;
or, streaming, steps and decoding in turns. Weights, videos and what a VAE remembers are
counted from shapes. What a compiled step holds besides is estimated, with factors
measured with XLA's compiler for an A100 (docs/memory.md); of activations, only the rows
of a batch and the parts of decoded videos count as divided among devices.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from pyramid_jax import layout, sampler, sharding
from pyramid_jax.model import ModelConfig, SampleConfig
from pyramid_jax.pipeline import footprint
from pyramid_jax.pipeline.footprint import Shape
from pyramid_jax.pipeline.prompts import LIMIT, Network
from pyramid_jax.sampler import Unit
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import Pieces

GIB = 2**30
# Latent frames, and sides of tiles in latent cells, in the order of their speed.
WINDOWS, TILES = (2, 1), (64, 32, 16)


class ModelParts(NamedTuple):
    """The networks of a model, with weights, or with shapes in their place.

    `encoders` are T5 and CLIP, () where the model reads its prompts itself.
    """

    cfg: ModelConfig
    params: Any
    vae: Autoencoder | None = None
    encoders: tuple[Network, ...] = ()


class Work(NamedTuple):
    """What is to be made: `videos` with latents of `shape` = (t, h, w, c).

    Attributes:
        pieces: how the VAE decodes; None: latents are all that is wanted.
        image: the VAE encodes a first frame.
        streamed: every unit is decoded as soon as it exists.
    """

    shape: tuple[int, int, int, int]
    videos: int
    options: SampleConfig
    pieces: Pieces | None = None
    image: bool = False
    streamed: bool = False

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


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of some work, in bytes on every device.

    Attributes:
        wide: there are float32 weights.
        videos: that are made at once.
    """

    phases: tuple[Phase, ...]
    wide: bool
    videos: int

    @property
    def largest(self) -> Phase:
        """The phase that decides whether the work fits."""
        return max(self.phases, key=lambda phase: phase.total)

    def check(self, limit: float | None) -> None:
        """Refuses work that does not fit.

        Args:
            limit: bytes of a device; None is not known, and refuses nothing.

        Raises:
            ValueError: a phase needs more; says what to change.
        """
        most = self.largest
        if limit is None or most.total <= limit:
            return
        raise ValueError(
            f"{most.name} needs {most.total / GIB:.1f} GiB on a device, which lends "
            f"{limit / GIB:.1f}; {', or '.join(self._changes())}\n{self}"
        )

    def _changes(self) -> Iterator[str]:
        most = self.largest
        if most.waiting:
            yield f"load with offload=True ({most.waiting / GIB:.1f} GiB less)"
        if self.wide:
            yield "load with dtype='bfloat16' (about half)"
        if most.name in (DECODING, STREAMING):
            yield "decode smaller pieces (VideoPipeline.pieces, with a tile)"
        if self.videos > 1:
            yield f"make fewer videos at once than {self.videos}"
        yield "divide weights among more devices (fsdp or tensor of the mesh)"
        if most.name != TEXT:
            yield "choose a smaller size or fewer frames"

    def __str__(self):
        columns = Phase._fields[1:]
        head = "".join(f"{name:>9}" for name in (*columns, "total"))
        large = self.largest.total >= GIB
        unit, name = (GIB, "GiB") if large else (2**20, "MiB")
        lines = [f"{f'{name} of a device':16}{head}"]
        for phase in self.phases:
            sizes = (*phase[1:], phase.total)
            numbers = "".join(f"{size / unit:9.2f}" for size in sizes)
            lines.append(f"{phase.name:16}{numbers}")
        return "\n".join(lines)


TEXT, IMAGE, SAMPLING = "reading text", "reading an image", "sampling"
DECODING, STREAMING = "decoding", "streaming"


class _Need(NamedTuple):
    """A phase by the parts whose weights it uses."""

    name: str
    uses: tuple[str, ...]
    state: int
    working: int


def plan(
    networks: ModelParts, work: Work, mesh: Mesh | AbstractMesh | None = None
) -> MemoryPlan:
    """The bytes that every phase takes on every device, with weights where they are.

    Args:
        mesh: the devices that divide the work; None: there is one.
    """
    cfg, params, vae, encoders = networks
    coder = {} if vae is None else vae.params
    parts = {
        TEXT: [network.params for network in encoders] or params.get("text"),
        IMAGE: coder.get("encoder"),
        SAMPLING: params["dit"],
        DECODING: coder.get("decoder"),
    }
    readers = [network.cfg for network in encoders] or [cfg.text]
    each = [footprint.text(c, work.rows, LIMIT) for c in readers if c is not None]
    needs = [_Need(TEXT, (TEXT,), 0, max(each, default=0))]
    if vae is not None and work.image:
        once = footprint.encoder(vae.cfg, (1, *_pixels(work, cfg)))
        needs.append(_Need(IMAGE, (IMAGE,), 0, once))
    needs.append(_sampling(cfg, params["dit"], work, mesh))
    if vae is not None and work.pieces is not None:
        if work.streamed:
            unit = cfg.layout.frames_per_unit * vae.latent.temporal
            work = work._replace(pieces=replace(work.pieces, frames=unit))
        needs.append(_decoding(vae, work, mesh))
    if work.streamed:
        *needs, steps, decoding = needs
        more = steps.state + decoding.state, max(steps.working, decoding.working)
        needs.append(_Need(STREAMING, (SAMPLING, DECODING), *more))
    wide = any(x.dtype == jnp.float32 for x in jax.tree.leaves(parts))
    return MemoryPlan(tuple(_phase(need, parts) for need in needs), wide, work.videos)


def pieces(
    networks: ModelParts, work: Work, mesh: Mesh | None, most: float | None
) -> Pieces:
    """The largest pieces to decode in that a device of `most` bytes has room for.

    Latent frames go two at a time, else one; tiles, which change colours a little, are
    the last choice. Two latent frames where nothing is known, or nothing fits.
    """
    latent = networks.cfg.latent
    tiles = [None, *(side for side in TILES if side < max(work.shape[1:3]))]
    choices = [
        Pieces(window * latent.temporal, tile and tile * latent.spatial)
        for tile in tiles
        for window in WINDOWS
    ]
    if most is None:
        return choices[0]
    for choice in choices:
        found = plan(networks, work._replace(pieces=choice), mesh)
        if found.phases[-1].total <= most:
            return choice
    return choices[0]


def limit(mesh: Mesh | None = None) -> int | None:
    """The bytes that a device lends this process, the least of all; None: unknown.

    Of a GPU, this is the share that JAX was given: XLA_PYTHON_CLIENT_MEM_FRACTION.
    """
    mine = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    known = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mine]
    least = min(sharding.to_host(np.array([min(known)])))  # of all processes
    return int(least) or None


def weights(tree: Any) -> int:
    """The bytes that the arrays of a tree take on each of their devices."""
    return sum(_bytes(x) for x in jax.tree.leaves(tree))


def _bytes(x: Any) -> int:
    where = getattr(x, "sharding", None)
    shape = x.shape if where is None else where.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def _phase(need: _Need, parts: dict[str, Any]) -> Phase:
    used = sum(weights(parts[name]) for name in need.uses)
    others = [parts[name] for name in parts if name not in need.uses]
    kept = [x for x in jax.tree.leaves(others) if not sharding.is_parked(x)]
    return Phase(need.name, used, weights(kept), need.state, need.working)


def _sampling(
    cfg: ModelConfig, params: Any, work: Work, mesh: Mesh | AbstractMesh | None
) -> _Need:
    """Euler steps: the video before and after a unit, tokens, and the network."""
    videos, rows = (_share(n, "batch", mesh) for n in (work.videos, work.rows))
    tokens, values = most_tokens(cfg, work), cfg.dit.patch_values
    inside = footprint.transformer(cfg.dit, rows, tokens, LIMIT)
    inside += 4 * tokens * values * (2 * videos + 3 * rows)
    text = 4 * rows * LIMIT * cfg.dit.text_width
    state = 2 * 4 * videos * math.prod(work.shape) + text
    return _Need(SAMPLING, (SAMPLING,), state, inside + _gathered(params))


def most_tokens(cfg: ModelConfig, work: Work) -> int:
    """Of the longest row that the network reads for one video."""
    t, h, w, _ = work.shape
    last = len(cfg.stages) - 1
    units = layout.units(t, cfg.layout.frames_per_unit)
    ends = [1, *(end for _, end in sampler.spans(units, work.options.scans))]
    return max(
        sum(
            len(clip.frame) * (h >> last - clip.stage) * (w >> last - clip.stage)
            for clip in Unit(end - 1, end).clips(k, cfg.layout.frames_per_unit)
        )
        for k in range(last + 1)
        for end in ends
    ) // (cfg.layout.patch**2)


def _gathered(params: Any) -> int:
    """The weights of one block, which devices that divide them gather to use them."""
    layers = [x for name in ("double", "single") for x in _leaves(params, name)]
    return max(
        sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in layers if _divided(x)),
        0,
    )


def _leaves(params: Any, name: str) -> list[Any]:
    return jax.tree.leaves(params.get(name))


def _divided(x: Any) -> bool:
    where = getattr(x, "sharding", None)
    return where is not None and where.shard_shape(x.shape) != tuple(x.shape)


def _decoding(vae: Autoencoder, work: Work, mesh: Mesh | AbstractMesh | None) -> _Need:
    """Steps of the decoder; tiles of whole videos are decoded one after the other."""
    assert work.pieces is not None
    (t, h, w, _), latent, tile = work.shape, vae.latent, work.pieces.tile
    window = t if work.pieces.frames is None else work.pieces.frames // latent.temporal
    videos = _share(work.videos, "batch", mesh)
    side = max(h, w) if tile is None else tile // latent.spatial
    h, w = min(h, side), min(w, side)
    rows, frames = _share(h, "height", mesh), max(1, _share(window, "frames", mesh))
    one: Shape = (videos, min(frames, t), rows, w)
    past = footprint.past(vae.cfg) * videos * rows * w
    state, inside = past, footprint.decoder(vae.cfg, one)
    whole = math.prod(work.shape[:3]) * latent.spatial**2 * latent.temporal
    if tile is not None and work.streamed:
        step = side * (1 - work.pieces.overlap)
        state *= math.prod(math.ceil(n / step) for n in work.shape[1:3])
    elif tile is not None:
        state += 2 * 3 * 4 * videos * whole
    return _Need(DECODING, (DECODING,), state, inside)


def _pixels(work: Work, cfg: ModelConfig) -> tuple[int, int, int]:
    """Frames, height and width of a given image."""
    _, h, w, _ = work.shape
    return 1, h * cfg.latent.spatial, w * cfg.latent.spatial


def _share(size: int, axis: str, mesh: Mesh | AbstractMesh | None) -> int:
    """What a device has of an axis of arrays: all, if it can't be divided evenly."""
    parts = 1 if mesh is None else sharding.parts(axis, mesh)
    return size if size % parts else size // parts
