# SPDX-License-Identifier: Apache-2.0
"""The PyTorch original from token ids to frames, run from a checkout the user names.

Its own `generate` runs its own text encoders, transformer and VAE, all with fresh
weights of a case's sizes; only tokenizers are replaced by fixed tokens.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.reference import Original
from benchmarks.reference_vae import OriginalVAE
from benchmarks.video import Case, Words
from pyramid_jax.guidance import Guidance
from pyramid_jax.models.clip import CLIPConfig
from pyramid_jax.models.t5 import T5Config
from pyramid_jax.pipeline.prompts import LIMIT

Run = Callable[[], Any]
TILE = 512  # pixels; the original decodes like this where memory is not short
TEXT_CLASSES = {
    "mmdit": ("mmdit_modules", "SD3TextEncoderWithMask"),
    "miniflux": ("flux_modules", "FluxTextEncoderWithMask"),
}


class OriginalVideo:
    """The original's whole pipeline for a case.

    Raises:
        ValueError: there is no checkout, a package is missing, or networks differ in
            their numbers of weights.
    """

    def __init__(self, path: Path, case: Case):
        frames = 2 * case.vae.temporal_factor
        vae = OriginalVAE(path, case.vae, case.parameters["VAE"], TILE, frames)
        self._original = Original.load(path, case.work)
        self._pipeline = self._original.pipeline
        self._pipeline.vae = vae.network
        self._pipeline.text_encoder = _text_encoder(case)
        self._case = case

    def video(self) -> Run:
        """Runs the sampling of one video with guidance, frames included."""
        return partial(self._generate, "pil")

    def text(self) -> Run:
        """Runs the text encoders on a prompt and on a negative prompt, one by one."""
        encode = self._pipeline.text_encoder
        return lambda: [encode(text, "cpu") for text in ("a prompt", "another")]

    def decoding(self) -> Run:
        """Runs the decoder, from latents to frames."""
        latents, decode = self._generate("latent"), self._pipeline.decode_latent
        return lambda: decode(latents.clone(), save_memory=False)

    def noise(self) -> Run:
        """Runs what a video spends on the noise of the jumps between stages."""
        return self._original.jump_noise()

    def _generate(self, kind: str) -> Any:
        case, scale = self._case, Guidance()
        self._pipeline.dit.eval()
        return self._pipeline.generate(
            prompt=["a prompt"],
            height=case.size.height,
            width=case.size.width,
            temp=case.work.sampled,
            num_inference_steps=case.first_steps,
            video_num_inference_steps=case.video_steps,
            guidance_scale=scale.first,
            video_guidance_scale=scale.video,
            output_type=kind,
            save_memory=False,
        )


class _Tokens(Words):
    """Fixed tokens for every text of a list, in the form of transformers."""

    def __call__(self, texts: list[str], **options: Any) -> Any:
        import torch

        ids = torch.tensor([self.ids] * len(texts))
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def _text_encoder(case: Case) -> Any:
    """The original's module of text encoders, filled without files."""
    import torch

    folder, name = TEXT_CLASSES[case.work.variant]
    cls = getattr(import_module(f"pyramid_dit.{folder}.modeling_text_encoder"), name)
    pipeline = cls.__new__(cls)
    torch.nn.Module.__init__(pipeline)
    cfgs = (*case.clips, case.t5)
    for end, cfg in zip(("", "_2", "_3"), cfgs, strict=False):
        is_t5 = isinstance(cfg, T5Config)
        network = _t5(cfg) if is_t5 else _clip(cfg)
        setattr(pipeline, f"text_encoder{end}", network)
        limit = LIMIT if is_t5 else cfg.positions
        setattr(pipeline, f"tokenizer{end}", _Tokens(limit))
    pipeline.tokenizer_max_length = case.clips[0].positions
    count = sum(weight.numel() for weight in pipeline.parameters())
    if count != case.parameters["text encoders"]:
        raise ValueError(
            f"the original's text encoders have {count} weights, those of this "
            f"project {case.parameters['text encoders']}; choose sizes both can have"
        )
    return pipeline.eval()


def _t5(cfg: T5Config) -> Any:
    import transformers

    config = transformers.T5Config(
        vocab_size=cfg.vocabulary,
        d_model=cfg.width,
        d_kv=cfg.head_dim,
        d_ff=cfg.mlp_width,
        num_layers=cfg.blocks,
        num_heads=cfg.heads,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def _clip(cfg: CLIPConfig) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=cfg.vocabulary,
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.blocks,
        num_attention_heads=cfg.heads,
        max_position_embeddings=cfg.positions,
        hidden_act="quick_gelu" if cfg.quick_gelu else "gelu",
        projection_dim=cfg.projection or cfg.width,
        bos_token_id=0,
        eos_token_id=2,  # the vector is taken at the largest id
    )
    projected = cfg.projection is not None
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(transformers, name)(config)
