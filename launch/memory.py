# SPDX-License-Identifier: Apache-2.0
"""Says what memory the released models take, without weights and without a device.

    python -m launch.memory --height=768 --width=1280 --frames=241
    python -m launch.memory --variant=miniflux --offload --limit=16

prints bytes on a device phase by phase, and fails if they are more than the limit. For
a model in a folder, ask the model: `print(model.plan(size))`.
"""

import jax
from absl import app, flags

from pyramid_jax import config, variants
from pyramid_jax.config import SampleConfig
from pyramid_jax.pipeline import memory
from pyramid_jax.pipeline.memory import GIB, Work

VARIANT = flags.DEFINE_enum("variant", "mmdit", list(config.VARIANTS), "of the DiT")
HEIGHT = flags.DEFINE_integer("height", 384, "in pixels", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 640, "in pixels", lower_bound=1)
FRAMES = flags.DEFINE_integer("frames", 121, "of a video", lower_bound=1)
VIDEOS = flags.DEFINE_integer("videos", 1, "made at once", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of weights")
OFFLOAD = flags.DEFINE_bool("offload", False, "parts take turns on the device")
STREAMED = flags.DEFINE_bool("streamed", False, "units are decoded as they are made")
IMAGE = flags.DEFINE_bool("image", False, "the first frame is given")
LIMIT = flags.DEFINE_float("limit", None, "GiB of the device; fail if it has too few")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; see --help")
    jax.config.update("jax_platforms", "cpu")
    networks = variants.networks(VARIANT.value, DTYPE.value, OFFLOAD.value)
    cfg, most = networks.cfg, None if LIMIT.value is None else LIMIT.value * GIB
    stages = len(cfg.stages)
    grid = cfg.latent.grid(HEIGHT.value, WIDTH.value, cfg.layout.patch, stages)
    shape = (cfg.latent.frames(FRAMES.value), *grid, cfg.latent.channels)
    work = Work(
        shape,
        VIDEOS.value,
        SampleConfig(),
        image=IMAGE.value,
        streamed=STREAMED.value,
    )
    pieces = memory.pieces(networks, work, None, most)
    found = memory.plan(networks, work._replace(pieces=pieces))
    print(found)
    try:
        found.check(most)
    except ValueError as refused:
        raise SystemExit(str(refused).splitlines()[0]) from None


if __name__ == "__main__":
    app.run(main)
