# SPDX-License-Identifier: Apache-2.0
"""What the original's config.json says, as arguments of this package's configs."""

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
PATCH = 2  # of both; miniFLUX writes 1 into its file because its channels hold patches


class DiTArguments(NamedTuple):
    """Arguments of `models.dit.DiTConfig` and of `layout.Layout`."""

    dit: Arguments
    layout: Arguments


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
        "table": None,
        "qk_eps": 1e-6,
        "text_ends_early": False,
    }
    return DiTArguments(dit, {"patch": PATCH, "table": None})


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
        "table": table,
        "table_base": given["sample_size"] // PATCH,
        "qk_eps": 1e-5,
        "text_ends_early": True,
    }
    interpolate = given.get("interp_condition_pos", True)
    layout = {"patch": PATCH, "table": table, "interpolate": interpolate}
    return DiTArguments(dit, layout)


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
