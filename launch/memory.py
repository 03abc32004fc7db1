# SPDX-License-Identifier: Apache-2.0
"""Prints the memory that released models take, without weights or a device.

    pyramid-jax memory --height=768 --width=1280 --frames=241
    pyramid-jax memory --variant=miniflux --offload --limit=16

prints bytes on a device phase by phase, with as much reuse of keys and values as fits
the limit, and fails if they exceed it. For a model in a folder,
`VideoPipeline.memory_plan` gives the same table.
"""

import math
from dataclasses import replace
from typing import Any

import jax
from absl import flags

from launch import start
from pyramid_jax import sharding
from pyramid_jax.convert.source import abstract_weights
from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.model import VARIANTS, ModelConfig, SampleConfig
from pyramid_jax.models.clip import CLIPConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.pipeline import memory
from pyramid_jax.pipeline.memory import GIB, ModelParts, Work
from pyramid_jax.pipeline.prompts import Network
from pyramid_jax.sharding import unbox
from pyramid_jax.vae.autoencoder import Autoencoder

CLIP_G = CLIPConfig(
    width=1280, heads=20, mlp_width=5120, blocks=32, quick_gelu=False, projection=1280
)
CLIPS = {"mmdit": (CLIPConfig(projection=768), CLIP_G), "miniflux": (CLIPConfig(),)}


def main(options: flags.FlagValues) -> None:
    jax.config.update("jax_platforms", "cpu")
    parts = released_parts(options.variant, options.dtype, options.offload)
    latent = parts.cfg.latent
    limit = None if options.limit is None else options.limit * GIB
    patch, stages = parts.cfg.layout.patch, len(parts.cfg.stages)
    grid = latent.grid(options.height, options.width, patch, stages)
    shape = (latent.frames(options.frames), *grid, latent.channels)
    work = Work(
        shape,
        options.videos,
        SampleConfig(),
        image=options.image,
        streamed=options.streamed,
    )
    pieces = memory.decoding_pieces(parts, work, None, limit)
    most = math.inf if limit is None else limit
    reuse = memory.reusing_stages(parts, work, None, most)
    plan = memory.memory_plan(parts, work._replace(pieces=pieces, reuse=reuse))
    print(plan)
    print(f"stages that reuse keys and values: {', '.join(map(str, reuse)) or 'none'}")
    try:
        plan.check(limit)
    except ValueError as refusal:
        raise SystemExit(str(refusal).splitlines()[0]) from None


def released_parts(
    variant: str, dtype: str = "bfloat16", parked: bool = False
) -> ModelParts:
    """A released model: its transformer, VAE and text encoders, as shapes.

    Args:
        variant: one of `VARIANTS`.
        dtype: of weights and products.
        parked: weights wait on the host, as with `load(offload=True)`.
    """
    dit = replace(VARIANTS[variant], dtype=dtype)
    cfg = ModelConfig(dit, Layout(position_table=dit.position_table), LatentConfig())
    coder = VAEConfig(dtype=dtype)
    encoders = [T5Config(dtype=dtype)]
    encoders += [replace(clip, dtype=dtype) for clip in CLIPS[variant]]
    kind = sharding.HOST if parked else sharding.DEVICE
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)

    def placed(boxed: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), unbox(boxed)
        )

    return ModelParts(
        cfg,
        {"dit": placed(abstract_weights(dit))},
        Autoencoder(coder, cfg.latent, placed(abstract_weights(coder))),
        tuple(Network(x, placed(abstract_weights(x))) for x in encoders),
    )


if __name__ == "__main__":
    flags.DEFINE_enum("variant", "mmdit", list(VARIANTS), "Which released model.")
    flags.DEFINE_enum(
        "dtype", "bfloat16", ["bfloat16", "float32"], "Number type of the weights."
    )
    flags.DEFINE_integer("height", 384, "Height in pixels.", lower_bound=1)
    flags.DEFINE_integer("width", 640, "Width in pixels.", lower_bound=1)
    flags.DEFINE_integer("frames", 121, "Frames of a video.", lower_bound=1)
    flags.DEFINE_integer("videos", 1, "Videos made at once.", lower_bound=1)
    flags.DEFINE_bool("image", False, "The first frame is given.")
    flags.DEFINE_bool("offload", False, "The parts take turns on the device.")
    flags.DEFINE_bool("streamed", False, "Units are decoded as soon as they are made.")
    flags.DEFINE_float("limit", None, "GiB of the device; fail if they are too few.")
    headings = {"variant": "the model", "height": "the videos", "offload": "the device"}
    start.run(main, headings=headings)
