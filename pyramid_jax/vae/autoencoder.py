# SPDX-License-Identifier: Apache-2.0
"""A VAE in a folder: its config, the statistics of its latents, and its weights.

`vae_codec` makes functions of it: from pixels to normalised latents, and back.
"""

import dataclasses
import hashlib
import queue
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from pyramid_jax import programs, sharding
from pyramid_jax.checkpoint import files
from pyramid_jax.config import asset_path, build
from pyramid_jax.data.pixels import to_model
from pyramid_jax.latents import LatentConfig, RawEncoder
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.vae import codec
from pyramid_jax.vae.codec import Codec, Pieces

INSIDE = "vae"  # the folder of a model's VAE inside the model's
PIECE = 2  # latent frames that `raw_encoder` makes at once


class Autoencoder(NamedTuple):
    """A VAE with its weights {"encoder": ..., "decoder": ...}.

    `latent` says how its latents are normalised.
    """

    cfg: VAEConfig
    latent: LatentConfig
    params: Any

    @property
    def digest(self) -> str:
        """A hash of the weights, by which latents tell the VAE that made them."""
        hashed = hashlib.blake2b(digest_size=8)
        for x in jax.tree.leaves(self.params):
            hashed.update(np.asarray(sharding.to_host(x)).tobytes())
        return hashed.hexdigest()


def save_autoencoder(folder: str | Path, autoencoder: Autoencoder) -> None:
    """Writes config.json and weights.safetensors; the weights are host arrays."""
    folder = Path(folder)
    files.write_config(folder, vae_sections(autoencoder.cfg, autoencoder.latent))
    files.write_weights(folder, autoencoder.params)


def vae_sections(cfg: VAEConfig, latent: LatentConfig) -> dict[str, Any]:
    """The contents of a VAE's config.json."""
    return {"vae": dataclasses.asdict(cfg), "latent": dataclasses.asdict(latent)}


def load_autoencoder(
    folder: str | Path, dtype: str | None = None, mesh: Mesh | None = None
) -> Autoencoder:
    """The VAE in a folder, which is its own or that of a model with a VAE.

    Args:
        dtype: of weights and convolutions; None: as they are stored, and as its
            config says.
        mesh: devices that get all weights each; None: the first one.

    Raises:
        ValueError: a file is missing or does not fit the others.
    """
    folder = asset_path(folder)
    folder = folder / INSIDE if (folder / INSIDE).is_dir() else folder
    kind = (
        f"a VAE, such as the `model` folder of a training run or {INSIDE}/ of a model"
    )
    sections = files.read_config(folder, kind, "vae", "latent")
    cfg = build(VAEConfig, sections["vae"])
    cfg = cfg if dtype is None else dataclasses.replace(cfg, dtype=dtype)
    abstract = sharding.unbox(
        jax.eval_shape(partial(vae.initialise_vae, cfg), jax.random.key(0))
    )
    params = files.read_weights(folder, abstract, files.placing(abstract, mesh, dtype))
    return Autoencoder(cfg, build(LatentConfig, sections["latent"]), params)


def vae_codec(autoencoder: Autoencoder, mesh: Mesh | None = None) -> Codec:
    """The VAE as compiled functions.

    Args:
        mesh: devices that share every video, see `codec.sharded`; None: one device.
    """
    encode, decode = (
        partial(_step, f, autoencoder.cfg, mesh, autoencoder.params)
        for f in (vae.encode, vae.decode)
    )
    ranks = 1 if mesh is None else sharding.parts("frames", mesh)
    return Codec(autoencoder.latent, encode, _posterior, decode, ranks)


def raw_encoder(
    autoencoder: Autoencoder, seed: int = 0, mesh: Mesh | None = None
) -> RawEncoder:
    """A function from 8-bit pixels `b f h w 3` and numbers to raw latents `b t h w c`.

    Latents are drawn from the posterior, with noise that depends on the seed and the
    number of a video.
    """
    statistics = ("image_shift", "image_scale", "video_shift", "video_scale")
    raw = dataclasses.replace(
        autoencoder.latent, **dict(zip(statistics, (0.0, 1.0) * 2, strict=True))
    )
    coder = vae_codec(autoencoder._replace(latent=raw), mesh)
    pieces, key = Pieces(frames=PIECE * raw.temporal), jax.random.key(seed)

    def encode(pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        _, frames, height, width, _ = pixels.shape
        side = raw.spatial
        shape = (raw.frames(frames), height // side, width // side, raw.channels)
        noise = _noise(key, jnp.asarray(numbers), shape)
        return sharding.to_host(coder.encode(to_model(pixels), noise, pieces))

    return encode


def free_encoder(autoencoder: Autoencoder, seed: int = 0) -> RawEncoder:
    """As `raw_encoder`, for several threads: each gets a device that no other uses.

    Every device of this process has the encoder's weights. None waits for another one,
    so that the order of what they do among other programs does not matter.
    """
    free: queue.SimpleQueue[RawEncoder] = queue.SimpleQueue()
    for device in jax.local_devices():
        there = jax.device_put({"encoder": autoencoder.params["encoder"]}, device)
        free.put(raw_encoder(autoencoder._replace(params=there), seed))

    def encode(pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        encoder = free.get()
        try:
            return encoder(pixels, numbers)
        finally:
            free.put(encoder)

    return encode


@partial(jax.jit, static_argnames="shape")
def _noise(
    key: jax.Array, numbers: jax.Array, shape: tuple[int, ...]
) -> Float[jax.Array, "b t h w c"]:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


@partial(programs.kept, static=3, donate=(5,))
def _step(
    f: Any, cfg: VAEConfig, mesh: Mesh | None, params: Any, x: Any, past: Any
) -> tuple[jax.Array, Any]:
    return codec.vae_step(f, cfg, params, mesh)(x, past)


@programs.kept
def _posterior(
    raw: Float[jax.Array, "b t h w _"], noise: Float[jax.Array, "b t h w c"] | None
) -> Float[jax.Array, "b t h w c"]:
    moments = vae.moments(raw)
    return moments.mean if noise is None else moments.sample(noise)
