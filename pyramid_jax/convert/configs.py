# SPDX-License-Identifier: Apache-2.0
"""What the original's config.json says, as arguments of this package's configs.

`dit_config` and `vae_config` read the files, `dit_fields` and `vae_fields` write them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Arguments = dict[str, Any]

# The two transformers: class name, and a field that only its config.json has.
CLASSES = {
    "PyramidDiffusionMMDiT": "pos_embed_max_size",
    "PyramidFluxTransformer": "axes_dims_rope",
}
# Fields of both by the names of our arguments.
DIT_FIELDS = {
    "heads": "num_attention_heads",
    "double_blocks": "num_layers",
    "text_width": "joint_attention_dim",
    "pooled_width": "pooled_projection_dim",
}
# Fields whose other values the original knows but no released model uses.
ONLY = {
    "qk_norm": "rms_norm",
    "pos_embed_type": "sincos",
    "temp_pos_embed_type": "rope",
}
# Fields of the VAE by the names of our arguments. The original lists those of encoder
# and decoder apart, and ignores all others.
VAE_FIELDS = {
    "pixels": ("encoder_in_channels", "decoder_out_channels"),
    "latent": ("encoder_out_channels", "decoder_in_channels"),
    "encoder_widths": ("encoder_block_out_channels",),
    "decoder_widths": ("decoder_block_out_channels",),
    "encoder_layers": ("encoder_layers_per_block",),
    "decoder_layers": ("decoder_layers_per_block",),
    "spatial": ("encoder_spatial_down_sample", "decoder_spatial_up_sample"),
    "temporal": ("encoder_temporal_down_sample", "decoder_temporal_up_sample"),
    "groups": ("encoder_norm_num_groups", "decoder_norm_num_groups"),
}
VAE_ONLY = {"encoder_act_fn": "silu", "decoder_act_fn": "silu", "interpolate": False}
# miniFLUX normalises first frames differently from the SD3-style transformer.
FLUX_LATENT = {"image_shift": -0.04, "image_scale": 1 / 1.8726}
PATCH = 2  # in both; miniFLUX's file says 1 because its channels hold whole patches


class DiTArguments(NamedTuple):
    """Arguments of `models.dit.DiTConfig`, `layout.Layout` and `latents.LatentConfig`.

    Of the latents only the statistics that the transformer was trained with are here;
    the others are the VAE's.
    """

    dit: Arguments
    layout: Arguments
    latent: Arguments


def dit_config(config: Mapping[str, Any]) -> DiTArguments:
    """The transformer that a config.json of the original describes.

    Fields that the released files leave to the original's loader (causality, positions
    of history) get the loader's values.

    Raises:
        ValueError: neither of the two transformers, or a setting that neither has.
    """
    variant = _variant(config)
    _check_fixed(config, ONLY, "transformer")
    head_dim = config["attention_head_dim"]
    dit = {ours: config[theirs] for ours, theirs in DIT_FIELDS.items()}
    dit["width"] = dit["heads"] * head_dim
    dit["causal"] = config.get("use_temporal_causal", True)
    if variant == "PyramidFluxTransformer":
        return _flux(config, dit)
    return _mmdit(config, dit, head_dim)


def _variant(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name")
    classes = [c for c, field in CLASSES.items() if name == c or field in config]
    if (name is not None and name not in CLASSES) or len(classes) != 1:
        raise ValueError(
            f"config.json of class {name!r} with fields {sorted(config)} is none of "
            f"{sorted(CLASSES)}; give the config.json of a released transformer"
        )
    return classes[0]


def _flux(config: Mapping[str, Any], dit: Arguments) -> DiTArguments:
    dit |= {
        "single_blocks": config["num_single_layers"],
        "patch_values": config["in_channels"],
        "rope_axes": tuple(config["axes_dims_rope"]),
        "position_table": None,
        "qk_eps": 1e-6,
        "text_ends_early": False,
    }
    return DiTArguments(
        dit, {"patch": PATCH, "position_table": None}, dict(FLUX_LATENT)
    )


def _mmdit(config: Mapping[str, Any], dit: Arguments, head_dim: int) -> DiTArguments:
    width, patch = config["caption_projection_dim"], config["patch_size"]
    if width != dit["width"] or patch != PATCH:
        raise ValueError(
            f"caption_projection_dim {width} and patch_size {patch} must be the width "
            f"{dit['width']} of all heads and {PATCH}"
        )
    table = config["pos_embed_max_size"]
    dit |= {
        "single_blocks": 0,
        "patch_values": config["in_channels"] * PATCH**2,
        "rope_axes": (head_dim,),
        "position_table": table,
        "position_table_base": config["sample_size"] // PATCH,
        "qk_eps": 1e-5,
        "text_ends_early": True,
    }
    interpolate = config.get("interp_condition_pos", True)
    layout = {"patch": PATCH, "position_table": table, "interpolate": interpolate}
    return DiTArguments(dit, layout, {})


def vae_config(config: Mapping[str, Any]) -> Arguments:
    """Arguments of `models.vae.VAEConfig` from the VAE's config.json.

    Raises:
        ValueError: a field is missing, encoder and decoder do not belong together, or
            a setting is one that no released VAE uses.
    """
    fields = [field for fields in VAE_FIELDS.values() for field in fields]
    if missing := [field for field in fields if field not in config]:
        raise ValueError(
            f"the VAE's config.json lacks {missing}; give the config.json of a "
            "released causal_video_vae folder"
        )
    _check_fixed(config, VAE_ONLY, "VAE")
    arguments = {}
    for name, fields in VAE_FIELDS.items():
        values = [config[field] for field in fields]
        if values[0] != values[-1]:
            raise ValueError(
                f"the VAE's config.json has {fields[0]} {values[0]} and {fields[1]} "
                f"{values[1]}; encoder and decoder must agree on them"
            )
        listed = isinstance(values[0], list | tuple)
        arguments[name] = tuple(values[0]) if listed else values[0]
    return arguments


def dit_fields(dit: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a transformer, from all fields of its config and layout.

    Raises:
        ValueError: the original has no such transformer.
    """
    config = {theirs: dit[ours] for ours, theirs in DIT_FIELDS.items()}
    config["attention_head_dim"] = dit["width"] // dit["heads"]
    config["use_temporal_causal"] = dit["causal"]
    if dit["position_table"] is None:
        config |= {
            "_class_name": "PyramidFluxTransformer",
            "num_single_layers": dit["single_blocks"],
            "patch_size": 1,
            "in_channels": dit["patch_values"],
            "axes_dims_rope": list(dit["rope_axes"]),
        }
    else:
        config |= {
            "_class_name": "PyramidDiffusionMMDiT",
            "caption_projection_dim": dit["width"],
            "patch_size": PATCH,
            "in_channels": dit["patch_values"] // PATCH**2,
            "pos_embed_max_size": dit["position_table"],
            "sample_size": dit["position_table_base"] * PATCH,
            "interp_condition_pos": layout["interpolate"],
            "add_temp_pos_embed": True,
            **ONLY,
        }
    back = dit_config(config)
    _must_agree(back.dit, dit)
    _must_agree(back.layout, layout)
    return config


def vae_fields(vae: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a VAE, from all fields of its config."""
    config: dict[str, Any] = {"_class_name": "CausalVideoVAE", **VAE_ONLY}
    for name, fields in VAE_FIELDS.items():
        value = vae[name]
        listed = list(value) if isinstance(value, tuple | list) else value
        config |= dict.fromkeys(fields, listed)
    levels = len(vae["spatial"])
    return config | {
        "encoder_down_block_types": ["DownEncoderBlockCausal3D"] * levels,
        "decoder_up_block_types": ["UpDecoderBlockCausal3D"] * levels,
    }


def _check_fixed(
    config: Mapping[str, Any], fixed: Mapping[str, Any], network: str
) -> None:
    """Raises ValueError for a setting that no released network has."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{name} is {config[name]!r} in the {network}'s config.json; only "
                f"{value!r}, which all released models use, is supported"
            )


def _must_agree(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises ValueError unless the original reads from its file what we wrote."""
    for name, value in theirs.items():
        if ours[name] != value:
            raise ValueError(
                f"{name} is {ours[name]!r}, where the original has {value!r}; only "
                "models of its two transformers can be exported"
            )
