# SPDX-License-Identifier: Apache-2.0
"""Entries that all configs share, with the values of the released models."""

import importlib
from dataclasses import asdict
from typing import Any

from ml_collections import ConfigDict

from pyramid_jax.latents import LatentConfig
from pyramid_jax.layout import Layout
from pyramid_jax.model import VARIANTS


def get_config(variant: str = "mmdit") -> Any:
    """A locked ConfigDict: a misspelt key or a wrong type raises where it is set.

    The entries of a section are the fields of the dataclass named beside it, which
    documents them.
    """
    cfg: Any = ConfigDict()  # its entries are set here, so no type knows them
    cfg.model = _model(variant)  # model.ModelConfig
    cfg.data = _data()  # data.examples.DataConfig
    cfg.optimizer = {  # training.optimizer.OptimizerConfig; paper table 4, last column
        "kind": "adamw",
        "learning_rate": 5e-5,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-6,
        "weight_decay": 1e-4,
        "clip": 1.0,
        "schedule": "constant",
        "warmup_steps": 1000,
        "steps": 50_000,
        "final_rate": 1e-5,
    }
    cfg.step = {  # training.step.StepConfig
        "accumulate": 1,
        "ema_decay": 0.9999,
        "float32_sums": False,
        "moments": "device",
    }
    cfg.machine = "cpu"  # for which `launch.compile` compiles the step
    # sharding.device_mesh
    cfg.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
    cfg.sample = {  # model.SampleConfig
        "first_steps": (20, 20, 20),
        "video_steps": (10, 10, 10),
        "guidance": {"first": 7.0, "video": 5.0},
        "last_step": True,
        "image_guidance": 4.0,
    }
    every = {"log_every": 50, "save_every": 1000, "sample_every": 5000}
    cfg.loop = {"steps": 50_000, "wandb": ""} | every  # training.loop.LoopConfig
    cfg.autoencoder = ""  # folder of the VAE that made the latents, for samples
    cfg.seed = 0
    cfg.prompts = ("a lighthouse at dusk, waves against the rocks",)
    return cfg.lock()


def _model(variant: str) -> dict[str, Any]:
    """A released transformer, in bfloat16, without a VAE."""
    dit = VARIANTS[variant]
    fields = asdict(dit) | {"dtype": "bfloat16"}
    del fields["clean_history"]  # which configs/clean_history.py adds
    return {
        "variant": variant,
        "dit": fields,  # models.dit.DiTConfig
        "layout": asdict(Layout(position_table=dit.position_table)),  # layout.Layout
        "latent": asdict(LatentConfig()),  # latents.LatentConfig
        "text": None,  # models.text_encoder.TextConfig
        "edges": (0.0, 1 / 3, 2 / 3, 1.0),
        "corrupt": 1 / 3,
        "first_frame_share": 0.0,
        "tokenizer": "byt5",
    }


def _data() -> dict[str, Any]:
    """Videos of five seconds at 384p, a row for each of eight devices."""
    return {
        "manifest": "",
        "height": 384,
        "width": 640,
        "frames": 121,
        "fps": 24.0,
        "batch": 8,
        "tokens": 4224,
        "text_tokens": 512,
        "segments": 8,
        "open_rows": 32,
        "paired": False,
        "kept": 0,
        "encode": False,
        "stage_shares": (1, 2, 1),
        "dropout": 0.1,
        "sizes": (),
        "least_frames": 0,
        "workers": 4,
        "cache_mib": 512,
        "seed": 0,
        "max_bad": 0.01,
        "held_out": 0,
    }


def named(name: str) -> tuple[Any, str]:
    """The config of a model by its file's name, and its mode.

    "smoke" is the smallest config in that mode.
    """
    mode = "smoke" if name == "smoke" else "full"
    module = "tiny" if name == "smoke" else name
    try:
        return importlib.import_module(f"configs.{module}").get_config(mode), mode
    except ModuleNotFoundError as error:
        raise ValueError(
            f"there is no config {name!r} of a model; use the name of one in configs/, "
            "or 'smoke'"
        ) from error


def beside_images(cfg: Any) -> None:
    """Lets a run on videos name a manifest of images, which get the paper's share."""
    with cfg.unlocked():
        cfg.data.update(images="", image_share=1 / 8)


def fine_tune(cfg: Any, steps: int) -> None:
    """Makes a run short: rates for weights that are trained already, which fall."""
    rate = 6e-4 if cfg.model.dit.width < 512 else 2e-5
    cfg.optimizer.update(learning_rate=rate, final_rate=rate / 20, schedule="cosine")
    cfg.optimizer.update(warmup_steps=50, steps=steps)
    cfg.loop.update(steps=steps, save_every=250)
    cfg.step.ema_decay = 0.995


def choose(cfg: Any, mode: str) -> Any:
    """The config itself for "full"; for "smoke" a version for a laptop and for tests.

    The smoke version keeps the variant and shrinks everything: 32x32 pixels instead of
    latents, 3 frames, 2 blocks, a text encoder of its own.
    """
    if mode == "full":
        return cfg
    if mode != "smoke":
        raise ValueError(f"unknown mode {mode!r}; use 'full' or 'smoke'")
    dit, width = cfg.model.dit, sum(cfg.model.dit.rope_axes)
    values = 3 * cfg.model.layout.patch**2
    dit.update(width=width, heads=1, patch_values=values)
    dit.update(text_width=32, pooled_width=32)
    dit.update(double_blocks=2, single_blocks=min(1, dit.single_blocks))
    dit.dtype = "float32"
    cfg.model.latent.update(channels=3, spatial=1, temporal=1)
    frames = min(3, cfg.data.frames)
    cfg.data.update(height=32, width=32, frames=frames, fps=8.0, batch=8, workers=0)
    cfg.data.update(tokens=600, text_tokens=128, segments=4, open_rows=8, paired=False)
    cfg.optimizer.warmup_steps = 1
    cfg.loop.update(steps=2, log_every=1, save_every=2, sample_every=0)
    steps = (2,) * (len(cfg.model.edges) - 1)
    cfg.sample.update(first_steps=steps, video_steps=steps)
    cfg.autoencoder = ""
    cfg.mesh.update(data=-1, fsdp=1)
    cfg.machine = "cpu"
    with cfg.unlocked():
        cfg.model.text = {"vocabulary": 384, "width": 32, "heads": 1}
        cfg.data.manifest = cfg.data.manifest or "data/shapes/manifest.jsonl"
        cfg.data.update(sizes=(), least_frames=0)
    return cfg
