# SPDX-License-Identifier: Apache-2.0
"""The PyTorch original's VAE, run from a checkout that the user names."""

import contextlib
import io
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float

from benchmarks.reference import replace_by_empty
from pyramid_jax.models.vae import VAEConfig

NEEDED = ("torch", "diffusers", "IPython")
# Imported by the original, but not used by what is measured.
UNUSED = ("torchvision", "timm", "timm.models", "timm.models.hub", "timm.models.layers")


class OriginalVAE:
    """The original's VAE with fresh weights, of the sizes of a config.

    `network` is its module.

    Args:
        path: a checkout of the original.
        tile: height and width of tiles in pixels.
        frames: pixel frames that chunks have after the first.

    Raises:
        ValueError: there is no checkout, a package is missing, or the two VAEs have
            different numbers of weights.
    """

    def __init__(
        self, path: Path, cfg: VAEConfig, parameters: int, tile: int, frames: int
    ):
        self.network = _built(_imported(path), cfg)
        count = sum(weight.numel() for weight in self.network.parameters())
        if count != parameters:
            raise ValueError(
                f"the original has {count} weights, this project {parameters}; choose "
                "widths that both can have, multiples of 32"
            )
        every = cfg.temporal_factor
        self._tile, self._windows = tile, {"encode": frames, "decode": frames // every}

    def run(self, what: str, how: str, x: Float[np.ndarray, "b _ _ _ c"]) -> Callable:
        """Runs "encode" or "decode" of x, "whole", "chunked" or "tiled"."""
        import torch

        tensor = torch.from_numpy(
            np.ascontiguousarray(rearrange(x, "b f h w c -> b c f h w"))
        )
        call = getattr(self.network, what)
        options = {"temporal_chunk": how != "whole", "window_size": self._windows[what]}

        def once() -> Any:
            self.network.enable_tiling(how == "tiled")
            with torch.no_grad():
                return call(tensor, tile_sample_min_size=self._tile, **options)

        return once


def _imported(path: Path) -> Any:
    """The original's class of VAEs."""
    if not (path / "video_vae").is_dir():
        raise ValueError(
            f"{path} has no folder video_vae; give the path of a checkout of "
            "https://github.com/jy0205/Pyramid-Flow"
        )
    try:
        for real in ("diffusers.models.attention_processor", "diffusers.models.lora"):
            import_module(real)  # both find out which of the packages below are there
        import torch

        replace_by_empty(UNUSED)
        sys.modules["timm.models.layers"].trunc_normal_ = torch.nn.init.trunc_normal_
        sys.path.insert(0, str(path))
        with contextlib.redirect_stdout(io.StringIO()):
            return import_module("video_vae").CausalVideoVAE
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the original needs the package {error.name}; install {', '.join(NEEDED)}"
        ) from error


def _built(cls: Any, cfg: VAEConfig) -> Any:
    levels, options = len(cfg.spatial), {}
    for part, way, ends in (
        ("encoder", "down", (cfg.pixels, cfg.latent)),
        ("decoder", "up", (cfg.latent, cfg.pixels)),
    ):
        kind = f"{way.capitalize()}{part.capitalize()}BlockCausal3D"
        options |= {
            f"{part}_in_channels": ends[0],
            f"{part}_out_channels": ends[1],
            f"{part}_layers_per_block": getattr(cfg, f"{part}_layers"),
            f"{part}_block_out_channels": getattr(cfg, f"{part}_widths"),
            f"{part}_{way}_block_types": (kind,) * levels,
            f"{part}_spatial_{way}_sample": cfg.spatial,
            f"{part}_temporal_{way}_sample": cfg.temporal,
            f"{part}_block_dropout": (0.0,) * levels,
            f"{part}_norm_num_groups": cfg.groups,
        }
    with contextlib.redirect_stdout(io.StringIO()):
        return cls(**options, downsample_scale=cfg.spatial_factor).eval()
