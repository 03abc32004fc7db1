# SPDX-License-Identifier: Apache-2.0
"""The released models with shapes in place of weights, to plan for them."""

from dataclasses import replace
from typing import Any

import jax

from pyramid_jax import config, offload
from pyramid_jax.config import ModelConfig
from pyramid_jax.convert import networks as blueprints
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.models.clip import ClipConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline.memory import Networks
from pyramid_jax.pipeline.prompts import Network, abstract
from pyramid_jax.sharding import unbox
from pyramid_jax.vae.autoencoder import Autoencoder

CLIP_G = ClipConfig(
    width=1280, heads=20, mlp_width=5120, blocks=32, quick_gelu=False, projection=1280
)
CLIPS = {"mmdit": (ClipConfig(projection=768), CLIP_G), "miniflux": (ClipConfig(),)}


def networks(variant: str, dtype: str = "bfloat16", parked: bool = False) -> Networks:
    """A released model: its transformer, VAE and text encoders.

    Args:
        variant: one of `config.VARIANTS`.
        dtype: of weights and products.
        parked: weights wait on the host, as with `generate.load(offload=True)`.
    """
    dit = replace(config.VARIANTS[variant], dtype=dtype)
    cfg = ModelConfig(dit, Layout(table=dit.table), LatentConfig())
    coder = VAEConfig(dtype=dtype)
    kind = offload.HOST if parked else offload.DEVICE
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)

    def placed(boxed: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where), unbox(boxed)
        )

    readers = (
        T5Config(dtype=dtype),
        *(replace(c, dtype=dtype) for c in CLIPS[variant]),
    )
    return Networks(
        cfg,
        {"dit": placed(blueprints.dit(dit).shapes)},
        Autoencoder(coder, cfg.latent, placed(blueprints.vae(coder).shapes)),
        tuple(Network(c, placed(abstract(c))) for c in readers),
    )
