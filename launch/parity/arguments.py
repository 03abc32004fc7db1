# SPDX-License-Identifier: Apache-2.0
"""Which arguments of the original are replayed; with others, a case is skipped.

A name without a value is honoured, or changes nothing that is recorded. One with a
value is replayed with that value only.
"""

from collections.abc import Mapping
from typing import Any

ANY = object()


def _any(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, ANY)


_DIT = {
    **_any("in_channels", "num_layers", "attention_head_dim", "num_attention_heads"),
    **_any("joint_attention_dim", "pooled_projection_dim", "use_temporal_causal"),
    **_any("interp_condition_pos", "use_flash_attn", "use_gradient_checkpointing"),
    **_any("gradient_checkpointing_ratio", "max_num_frames"),
}
MMDIT = _DIT | {
    **_any("sample_size", "caption_projection_dim", "pos_embed_max_size"),
    "patch_size": 2,
    "qk_norm": "rms_norm",
    "pos_embed_type": "sincos",
    "temp_pos_embed_type": "rope",
    "add_temp_pos_embed": True,
    "use_t5_mask": True,
}
FLUX = _DIT | {
    **_any("num_single_layers", "axes_dims_rope"),
    "patch_size": 1,
}
CODER = {
    **_any("in_channels", "out_channels", "layers_per_block", "block_out_channels"),
    **_any("norm_num_groups", "block_dropout"),
    "act_fn": "silu",
    "type": "causal_vae_conv",
}
VAE = {
    **{f"encoder_{name}": value for name, value in CODER.items()},
    **{f"decoder_{name}": value for name, value in CODER.items()},
    **_any("encoder_spatial_down_sample", "encoder_temporal_down_sample"),
    **_any("decoder_spatial_up_sample", "decoder_temporal_up_sample"),
    **_any("sample_size", "scaling_factor"),
    "encoder_down_block_types": {"DownEncoderBlockCausal3D"},
    "decoder_up_block_types": {"UpDecoderBlockCausal3D"},
    "encoder_double_z": True,
    "add_post_quant_conv": True,
    "interpolate": False,
    "downsample_scale": 8,
}
VAE_LOSS = {
    **_any("disc_start", "disc_num_layers", "disc_loss", "using_3d_discriminator"),
    **_any("logvar_init", "kl_weight", "pixelloss_weight", "perceptual_weight"),
    **_any("disc_factor", "disc_weight", "lpips_vgg_widths", "discriminator_ndf"),
    "add_discriminator": True,
    "disc_in_channels": 3,
    "use_actnorm": False,
    "disc_conditional": False,
}
CLIP = {
    **_any("vocab_size", "hidden_size", "intermediate_size", "projection_dim"),
    **_any("num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    **_any("hidden_act", "layer_norm_eps", "attention_dropout"),
    **_any("bos_token_id", "eos_token_id", "pad_token_id", "architectures"),
}
T5 = {
    **_any("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    **_any("relative_attention_num_buckets", "relative_attention_max_distance"),
    **_any("dropout_rate", "layer_norm_epsilon", "initializer_factor", "use_cache"),
    **_any("feed_forward_proj", "pad_token_id", "eos_token_id", "architectures"),
    **_any("tie_word_embeddings", "is_encoder_decoder"),
}
SCHEDULER = {
    **_any("shift", "stage_range", "gamma", "stages"),
    "num_train_timesteps": 1000,  # as all released models have
}
PIPELINE = {
    **_any("stages", "stage_range", "timestep_shift", "scheduler_gamma"),
    **_any("frame_per_unit", "sample_ratios", "corrupt_ratio", "max_temporal_length"),
    **_any("video_sync_group"),
}
CALL = {
    **_any("function", "size_wh", "height", "width", "temp"),
    **_any("num_inference_steps", "video_num_inference_steps"),
    **_any("guidance_scale", "video_guidance_scale"),
    **_any("use_linear_guidance", "alpha", "min_guidance_scale"),
}


def not_replayed(settings: Mapping[str, Any]) -> list[str]:
    """The settings of a scenario, as "name=value", that its replay would ignore."""
    constructor = settings.get("constructor", {})
    changed = constructor | settings.get("constructor_overrides", {})
    groups = [
        (changed, _network(constructor)),
        (settings.get("vae_constructor", {}), VAE),
        (settings.get("loss_constructor", {}), VAE_LOSS),
        (settings.get("scheduler", {}), SCHEDULER),
        (settings.get("pipeline", {}), PIPELINE),
        (settings.get("pipe", {}), PIPELINE),
        (settings.get("call", {}), CALL),
    ]
    encoders = [settings.get("config", {}), *settings.get("configs", {}).values()]
    groups += [(one, T5 if "d_model" in one else CLIP) for one in encoders]
    return [
        f"{name}={value!r}"
        for given, replayed in groups
        for name, value in given.items()
        if not _fits(value, replayed.get(name))
    ]


def _network(constructor: Mapping[str, Any]) -> dict[str, Any]:
    if "encoder_in_channels" in constructor:
        return VAE
    return FLUX if "axes_dims_rope" in constructor else MMDIT


def _fits(value: Any, replayed: Any) -> bool:
    if isinstance(replayed, set):  # of what a list may consist of
        return isinstance(value, list) and set(value) <= replayed
    return replayed is ANY or (replayed is not None and value == replayed)
