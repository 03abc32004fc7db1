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
