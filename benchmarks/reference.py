# SPDX-License-Identifier: Apache-2.0
"""The same work by the PyTorch original, run from a checkout that the user names.

Its pipeline class trains and samples; only its VAE and text encoders are left out. What
it imports for those, and for its data loading, is replaced by empty modules.
"""

import contextlib
import io
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from benchmarks.workload import COLUMNS, Workload
from pyramid_jax.guidance import Guidance
from pyramid_jax.training.optimizer import OptimizerConfig

Run = Callable[[], Any]

PIPELINE = "pyramid_dit.pyramid_dit_for_video_gen_pipeline"
NEEDED = ("torch", "diffusers", "transformers", "IPython")
# Imported by the original, but not used by what is measured.
UNUSED = ("video_vae", "video_vae.modeling_causal_vae", "torchvision", "accelerate")
# These look for the packages above while they are imported, so they come first.
EARLY = ("models.modeling_utils", "models.embeddings", "schedulers.scheduling_utils")


class Empty(types.ModuleType):
    """A module in which every public name is an empty class."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__, self.__spec__ = [], ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _OneProcess:
    """What the original's training asks of its `Accelerator`."""

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Original:
    """The original's pipeline around a fresh transformer of the workload's sizes.

    Raises:
        ValueError: from `load`: there is no checkout, a package is missing, or the two
            transformers differ in their number of weights.
    """

    work: Workload
    pipeline: Any

    @classmethod
    def load(cls, path: Path, work: Workload) -> "Original":
        """Imports the checkout at `path` and builds the pipeline."""
        modules = _imported(path)
        dit = _transformer(work)
        count = sum(weight.numel() for weight in dit.parameters())
        if count != work.parameters:
            raise ValueError(
                f"the original has {count} weights, this project {work.parameters}; "
                "choose sizes that both can have, e.g. a width of 64 x heads"
            )
        modules.build_pyramid_dit = lambda *args, **kwargs: dit
        modules.tqdm = lambda units: units
        return cls(work, _pipeline(modules, work))

    def training(self) -> Run:
        """Runs a training step as its trainer does: loss, gradient, clipping, AdamW."""
        import torch

        pipeline, dit = self.pipeline, self.pipeline.dit
        video = _tensor(rearrange(self.work.videos, "s t h w c -> s c t h w"))
        text = self._captions(len(COLUMNS))
        optimizer = _optimizer(dit)
        one = _OneProcess()

        def run() -> float:
            dit.train()
            pipeline.accumulate_steps = self.work.units[0] - 1  # chooses the units
            loss, _ = pipeline(video.clone(), dict(text), ["video"], accelerator=one)
            value = loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(dit.parameters(), OptimizerConfig().clip)
            optimizer.step()
            optimizer.zero_grad()
            return value

        return run

    def sampling(self) -> Run:
        """Runs the sampling of one video with guidance, from noise to latents."""
        captions = {
            name: [value[i : i + 1] for i in range(2)]
            for name, value in self._captions(2).items()
        }

        def encode(prompt: str | list[str], device: Any) -> tuple[Any, ...]:
            row = int(isinstance(prompt, list))  # the prompt comes in a list
            return tuple(value[row] for value in captions.values())

        pipeline, work, scale = self.pipeline, self.work, Guidance()
        pipeline.text_encoder = encode
        height, width = (side * work.model.latent.spatial for side in work.cells)

        def run() -> Any:
            pipeline.dit.eval()
            return pipeline.generate(
                prompt=["a prompt"],
                height=height,
                width=width,
                temp=work.sampled,
                num_inference_steps=work.steps,
                video_num_inference_steps=work.steps,
                guidance_scale=scale.first,
                video_guidance_scale=scale.video,
                output_type="latent",
            )

        return run

    def jump_noise(self) -> Run:
        """Runs what `sampling` spends on the noise of the jumps between stages."""
        (height, width), stages = self.work.cells, max(COLUMNS)
        channels = self.work.model.latent.channels
        draw = partial(self.pipeline.sample_block_noise, 1, channels, 1)

        def run() -> None:
            for _ in range(self.work.sampled):
                for stage in range(1, stages + 1):
                    draw(height >> stages - stage, width >> stages - stage)

        return run

    def _captions(self, count: int) -> dict[str, Any]:
        captions = self.work.captions(count)
        return {
            "prompt_embeds": _tensor(captions.tokens),
            "prompt_attention_mask": _tensor(
                np.ones((count, self.work.caption), np.int64)
            ),
            "pooled_prompt_embeds": _tensor(captions.pooled),
        }


def check(path: Path, folder: str) -> None:
    """Raises ValueError if `path` is no checkout of the original with this folder."""
    if not (path / folder).is_dir():
        raise ValueError(
            f"{path} has no folder {folder}; give the path of a checkout of "
            "https://github.com/jy0205/Pyramid-Flow"
        )


def before_empty_modules() -> None:
    """Imports what looks for the packages that empty modules replace."""
    for name in EARLY:
        import_module(f"diffusers.{name}")


def replace_by_empty(names: Sequence[str]) -> None:
    """Puts empty modules in place of packages and, after them, of their modules."""
    for name in names:
        sys.modules[name] = Empty(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def _imported(path: Path) -> Any:
    """The original's pipeline module."""
    check(path, "pyramid_dit")
    try:
        before_empty_modules()
        replace_by_empty(UNUSED)
        sys.path.insert(0, str(path))
        with contextlib.redirect_stdout(io.StringIO()):
            return import_module(PIPELINE)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the original needs the package {error.name}; install {', '.join(NEEDED)}"
        ) from error


def _pipeline(modules: Any, work: Workload) -> Any:
    """The original's pipeline, without VAE and text encoders."""
    flux = work.variant == "miniflux"
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline = modules.PyramidDiTForVideoGeneration(
            model_path="",
            model_dtype="fp32",
            model_name="pyramid_flux" if flux else "pyramid_mmdit",
            max_temporal_length=work.frames,
            sample_ratios=[COLUMNS.count(stage) for stage in sorted(set(COLUMNS))],
            video_sync_group=1,
            # At 1/3 the covariance of its block noise is singular; torch refuses it.
            scheduler_gamma=1 / 3 - 1e-5,
            load_text_encoder=False,
            load_vae=False,
        )
    pipeline.cfg_rate = -1  # drop no caption
    return pipeline


def _transformer(work: Workload) -> Any:
    """The original's transformer with the options of its released models."""
    dit = work.model.dit
    options = {
        "num_layers": work.double_blocks,
        "attention_head_dim": dit.head_dim,
        "num_attention_heads": dit.heads,
        "joint_attention_dim": dit.text_width,
        "pooled_projection_dim": dit.pooled_width,
        "use_flash_attn": False,
        "use_temporal_causal": True,
        "interp_condition_pos": True,
        "use_gradient_checkpointing": dit.remat == "nothing",
        "gradient_checkpointing_ratio": 0.0,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        if work.variant == "miniflux":
            return import_module("pyramid_dit.flux_modules").PyramidFluxTransformer(
                patch_size=1,
                in_channels=dit.patch_values,
                num_single_layers=dit.single_blocks,
                axes_dims_rope=list(dit.rope_axes),
                **options,
            )
        return import_module("pyramid_dit.mmdit_modules").PyramidDiffusionMMDiT(
            sample_size=128,
            caption_projection_dim=dit.width,
            pos_embed_type="sincos",
            temp_pos_embed_type="rope",
            add_temp_pos_embed=True,
            use_t5_mask=True,
            **options,
        )


def _optimizer(dit: Any) -> Any:
    """The original's AdamW with the rates of this project's."""
    rates = OptimizerConfig()
    settings = types.SimpleNamespace(
        opt="adamw",
        lr=rates.warmup_from,
        weight_decay=rates.weight_decay,
        opt_eps=rates.eps,
        opt_beta1=rates.b1,
        opt_beta2=rates.b2,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return import_module("trainer_misc").create_optimizer(settings, dit)


def _tensor(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x))
