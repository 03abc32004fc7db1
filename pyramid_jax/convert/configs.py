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
# Fields whose other values the original knows but no released model uses.
ONLY = {
    "qk_norm": "rms_norm",
    "pos_embed_type": "sincos",
    "temp_pos_embed_type": "rope",
}
# The VAE's, by the names of their arguments here; the original gives the resolutions of
# encoder and decoder apart, and ignores the fields that are not listed.
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
# miniFLUX normalises first frames otherwise than the SD3-style transformer.
FLUX_LATENT = {"image_shift": -0.04, "image_scale": 1 / 1.8726}
PATCH = 2  # of both; miniFLUX writes 1 into its file because its channels hold patches


class DiTArguments(NamedTuple):
    """Arguments of `models.dit.DiTConfig`, `layout.Layout` and `latents.LatentConfig`.

    Those of the latents are what the transformer was trained with; the others are the
    VAE's.
    """

    dit: Arguments
    layout: Arguments
    latent: Arguments


def dit_config(given: Mapping[str, Any]) -> DiTArguments:
    """The transformer that a config.json of the original describes.

    Fields that the released files leave to the original's loader (causality, positions
    of history) get the loader's values.

    Raises:
        ValueError: neither of the two transformers, or a setting outside of them.
    """
    variant = _variant(given)
    for name, value in ONLY.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{name} is {given[name]!r} in the transformer's config.json; only "
                f"{value!r}, which all released models use, is supported"
            )
    heads, head_dim = given["num_attention_heads"], given["attention_head_dim"]
    dit = {
        "width": heads * head_dim,
        "heads": heads,
        "double_blocks": given["num_layers"],
        "text_width": given["joint_attention_dim"],
        "pooled_width": given["pooled_projection_dim"],
        "causal": given.get("use_temporal_causal", True),
    }
    if variant == "PyramidFluxTransformer":
        return _flux(given, dit)
    return _mmdit(given, dit, head_dim)


def _variant(given: Mapping[str, Any]) -> str:
    name = given.get("_class_name")
    known = [c for c, field in CLASSES.items() if name == c or field in given]
    if (name is not None and name not in CLASSES) or len(known) != 1:
        raise ValueError(
            f"config.json of class {name!r} with fields {sorted(given)} is none of "
            f"{sorted(CLASSES)}; give the config.json of a released transformer"
        )
    return known[0]


def _flux(given: Mapping[str, Any], dit: Arguments) -> DiTArguments:
    dit |= {
        "single_blocks": given["num_single_layers"],
        "patch_values": given["in_channels"],
        "rope_axes": tuple(given["axes_dims_rope"]),
        "position_table": None,
        "qk_eps": 1e-6,
        "text_ends_early": False,
    }
    return DiTArguments(
        dit, {"patch": PATCH, "position_table": None}, dict(FLUX_LATENT)
    )


def _mmdit(given: Mapping[str, Any], dit: Arguments, head_dim: int) -> DiTArguments:
    width, patch = given["caption_projection_dim"], given["patch_size"]
    if width != dit["width"] or patch != PATCH:
        raise ValueError(
            f"caption_projection_dim {width} and patch_size {patch} must be the width "
            f"{dit['width']} of all heads and {PATCH}"
        )
    table = given["pos_embed_max_size"]
    dit |= {
        "single_blocks": 0,
        "patch_values": given["in_channels"] * PATCH**2,
        "rope_axes": (head_dim,),
        "position_table": table,
        "position_table_base": given["sample_size"] // PATCH,
        "qk_eps": 1e-5,
        "text_ends_early": True,
    }
    interpolate = given.get("interp_condition_pos", True)
    layout = {"patch": PATCH, "position_table": table, "interpolate": interpolate}
    return DiTArguments(dit, layout, {})


def vae_config(given: Mapping[str, Any]) -> Arguments:
    """Arguments of `models.vae.VAEConfig` from the VAE's config.json.

    Raises:
        ValueError: a field is missing, encoder and decoder do not belong together, or a
            setting that no released VAE uses.
    """
    fields = [field for fields in VAE_FIELDS.values() for field in fields]
    if missing := [field for field in fields if field not in given]:
        raise ValueError(
            f"the VAE's config.json lacks {missing}; give the config.json of a "
            "released causal_video_vae folder"
        )
    for name, value in VAE_ONLY.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{name} is {given[name]!r} in the VAE's config.json; only {value!r}, "
                "which the released VAE uses, is supported"
            )
    arguments = {}
    for name, fields in VAE_FIELDS.items():
        values = [given[field] for field in fields]
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
    head_dim = dit["width"] // dit["heads"]
    given = {
        "num_attention_heads": dit["heads"],
        "attention_head_dim": head_dim,
        "num_layers": dit["double_blocks"],
        "joint_attention_dim": dit["text_width"],
        "pooled_projection_dim": dit["pooled_width"],
        "use_temporal_causal": dit["causal"],
    }
    if dit["position_table"] is None:
        given |= {
            "_class_name": "PyramidFluxTransformer",
            "num_single_layers": dit["single_blocks"],
            "patch_size": 1,
            "in_channels": dit["patch_values"],
            "axes_dims_rope": list(dit["rope_axes"]),
        }
    else:
        given |= {
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
    back = dit_config(given)
    _must_agree(back.dit, dit)
    _must_agree(back.layout, layout)
    return given


def vae_fields(vae: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a VAE, from all fields of its config."""
    given: dict[str, Any] = {"_class_name": "CausalVideoVAE", **VAE_ONLY}
    for name, fields in VAE_FIELDS.items():
        value = vae[name]
        listed = list(value) if isinstance(value, tuple | list) else value
        given |= dict.fromkeys(fields, listed)
    levels = len(vae["spatial"])
    return given | {
        "encoder_down_block_types": ["DownEncoderBlockCausal3D"] * levels,
        "decoder_up_block_types": ["UpDecoderBlockCausal3D"] * levels,
    }


def _must_agree(back: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """What the original would make of the written fields is what was to be written."""
    for name, value in back.items():
        if given[name] != value:
            raise ValueError(
                f"{name} is {given[name]!r}, where the original has {value!r}; only "
                "models of its two transformers can be exported"
            )
