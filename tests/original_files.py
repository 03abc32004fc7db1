# SPDX-License-Identifier: Apache-2.0
"""What the original's files hold, written from its documentation, and small ones.

Nothing here comes from the tables of the package, which are tested against it.
"""

import json
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests import released

Shapes = dict[str, tuple[int, ...]]

# Fields of the released config.json files; small ones replace some of them.
MMDIT = {
    "_class_name": "PyramidDiffusionMMDiT",
    "_diffusers_version": "0.30.1",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "max_num_frames": 200,
    "num_attention_heads": 24,
    "num_layers": 24,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "pos_embed_type": "sincos",
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
MINIFLUX = {
    "_class_name": "PyramidFluxTransformer",
    "_diffusers_version": "0.30.3",
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 30,
    "num_layers": 8,
    "num_single_layers": 16,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
VAE = {
    "_class_name": "CausalVideoVAE",
    "_diffusers_version": "0.29.2",
    "add_post_quant_conv": True,
    "decoder_act_fn": "silu",
    "decoder_block_out_channels": [128, 256, 512, 512],
    "decoder_in_channels": 16,
    "decoder_layers_per_block": [3, 3, 3, 3],
    "decoder_norm_num_groups": 32,
    "decoder_out_channels": 3,
    "decoder_spatial_up_sample": [True, True, True, False],
    "decoder_temporal_up_sample": [True, True, True, False],
    "downsample_scale": 8,
    "encoder_act_fn": "silu",
    "encoder_block_out_channels": [128, 256, 512, 512],
    "encoder_in_channels": 3,
    "encoder_layers_per_block": [2, 2, 2, 2],
    "encoder_norm_num_groups": 32,
    "encoder_out_channels": 16,
    "encoder_spatial_down_sample": [True, True, True, False],
    "encoder_temporal_down_sample": [True, True, True, False],
    "interpolate": False,
    "sample_size": 256,
    "scaling_factor": 0.13025,
}
SMALL = {  # fits the text encoders of tests/released.py
    "mmdit": MMDIT
    | {"num_attention_heads": 1, "caption_projection_dim": 64, "num_layers": 2}
    | {"joint_attention_dim": 16, "pooled_projection_dim": 16}
    | {"pos_embed_max_size": 12, "sample_size": 8},
    "miniflux": MINIFLUX
    | {"num_attention_heads": 1, "num_layers": 1, "num_single_layers": 2}
    | {"joint_attention_dim": 16, "pooled_projection_dim": 8},
    "vae": VAE
    | {"encoder_block_out_channels": [4, 4, 8, 8], "encoder_norm_num_groups": 4}
    | {"decoder_block_out_channels": [4, 4, 8, 8], "decoder_norm_num_groups": 4}
    | {"encoder_layers_per_block": [1] * 4, "decoder_layers_per_block": [1] * 4},
}


# ------------------------------------------------------------------- names and shapes


def mmdit(c: dict) -> Shapes:
    """The tensors of the SD3-style transformer."""
    d = c["num_attention_heads"] * c["attention_head_dim"]
    last, cells = c["num_layers"] - 1, c["pos_embed_max_size"] ** 2
    shapes: Shapes = {
        "pos_embed.pos_embed": (1, cells, d),
        "pos_embed.proj.weight": (d, c["in_channels"], 2, 2),
        "pos_embed.proj.bias": (d,),
    }
    shapes |= _conditions(c, d) | _linear("proj_out", 4 * c["in_channels"], d)
    for i in range(last + 1):
        block, full = f"transformer_blocks.{i}", i < last
        shapes |= _linear(f"{block}.norm1.linear", 6 * d, d)
        shapes |= _linear(f"{block}.norm1_context.linear", (6 if full else 2) * d, d)
        shapes |= _attention(block, c, ("norm_add_q", "norm_add_k"))
        shapes |= _linear(f"{block}.attn.to_out.0", d, d)
        shapes |= _feed(f"{block}.ff", d)
        if full:
            shapes |= _linear(f"{block}.attn.to_add_out", d, d)
            shapes |= _feed(f"{block}.ff_context", d)
    return shapes


def miniflux(c: dict) -> Shapes:
    """The tensors of the miniFLUX transformer."""
    d, values = c["num_attention_heads"] * c["attention_head_dim"], c["in_channels"]
    shapes = _linear("x_embedder", d, values) | _linear("proj_out", values, d)
    shapes |= _conditions(c, d)
    for i in range(c["num_layers"]):
        block = f"transformer_blocks.{i}"
        for norm in ("norm1", "norm1_context"):
            shapes |= _linear(f"{block}.{norm}.linear", 6 * d, d)
        shapes |= _attention(block, c, ("norm_added_q", "norm_added_k"))
        for out in ("to_out.0", "to_add_out"):
            shapes |= _linear(f"{block}.attn.{out}", d, d)
        shapes |= _feed(f"{block}.ff", d) | _feed(f"{block}.ff_context", d)
    for i in range(c["num_single_layers"]):
        block = f"single_transformer_blocks.{i}"
        shapes |= _linear(f"{block}.norm.linear", 3 * d, d)
        shapes |= _linear(f"{block}.proj_mlp", 4 * d, d)
        shapes |= _linear(f"{block}.proj_out", d, 5 * d)
        for name in "qkv":
            shapes |= _linear(f"{block}.attn.to_{name}", d, d)
        for name in "qk":
            shapes[f"{block}.attn.norm_{name}.weight"] = (c["attention_head_dim"],)
    return shapes


def vae(c: dict) -> Shapes:
    """The tensors of the causal video VAE."""
    latent, pixels = c["encoder_out_channels"], c["encoder_in_channels"]
    down = c["encoder_block_out_channels"]
    up = c["decoder_block_out_channels"][::-1]
    shapes = _conv("encoder.conv_in.conv", down[0], pixels)
    shapes |= _conv("encoder.conv_out.conv", 2 * latent, down[-1])
    shapes |= _conv("quant_conv.conv", 2 * latent, 2 * latent, 1)
    shapes |= _conv("post_quant_conv.conv", latent, latent, 1)
    shapes |= _conv("decoder.conv_in.conv", up[0], latent)
    shapes |= _conv("decoder.conv_out.conv", pixels, up[-1])
    shapes |= _norm("encoder.conv_norm_out", down[-1])
    shapes |= _norm("decoder.conv_norm_out", up[-1])
    for part, d in (("encoder", down[-1]), ("decoder", up[0])):
        middle = f"{part}.mid_block"
        for j in range(2):
            shapes |= _resnet(f"{middle}.resnets.{j}", d, d)
        shapes |= _norm(f"{middle}.attentions.0.group_norm", d)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{middle}.attentions.0.{name}", d, d)
    before = [down[0], *down]
    for i, (d, count) in enumerate(
        zip(down, c["encoder_layers_per_block"], strict=True)
    ):
        block = f"encoder.down_blocks.{i}"
        for j in range(count):
            shapes |= _resnet(f"{block}.resnets.{j}", d, d if j else before[i])
        if c["encoder_spatial_down_sample"][i]:
            shapes |= _conv(f"{block}.downsamplers.0.conv.conv", d, d)
        if c["encoder_temporal_down_sample"][i]:
            shapes |= _conv(f"{block}.temporal_downsamplers.0.conv.conv", d, d)
    before = [up[0], *up]
    for i, (d, count) in enumerate(zip(up, c["decoder_layers_per_block"], strict=True)):
        block = f"decoder.up_blocks.{i}"
        for j in range(count):
            shapes |= _resnet(f"{block}.resnets.{j}", d, d if j else before[i])
        if c["decoder_spatial_up_sample"][i]:
            shapes |= _conv(f"{block}.upsamplers.0.conv.conv", 4 * d, d)
        if c["decoder_temporal_up_sample"][i]:
            shapes |= _conv(f"{block}.temporal_upsamplers.0.conv.conv", 2 * d, d)
    return shapes


def clip(layers: int, d: int, mlp: int, projects: bool = True) -> Shapes:
    """The tensors of a CLIP text encoder."""
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, d),
        "text_model.embeddings.position_embedding.weight": (77, d),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", d, d)
        shapes |= _norm(f"{layer}.layer_norm1", d) | _norm(f"{layer}.layer_norm2", d)
        shapes |= _linear(f"{layer}.mlp.fc1", mlp, d)
        shapes |= _linear(f"{layer}.mlp.fc2", d, mlp)
    shapes |= _norm("text_model.final_layer_norm", d)
    return shapes | ({"text_projection.weight": (d, d)} if projects else {})


def t5() -> Shapes:
    """The tensors of the encoder of T5 v1.1 XXL."""
    d, mlp = 4096, 10240
    shapes: Shapes = {
        "shared.weight": (32128, d),
        "encoder.final_layer_norm.weight": (d,),
    }
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes[first] = (32, 64)
    for i in range(24):
        layer = f"encoder.block.{i}.layer"
        for name in "qkvo":
            shapes[f"{layer}.0.SelfAttention.{name}.weight"] = (d, d)
        for name, shape in (("wi_0", (mlp, d)), ("wi_1", (mlp, d)), ("wo", (d, mlp))):
            shapes[f"{layer}.1.DenseReluDense.{name}.weight"] = shape
        for j in range(2):
            shapes[f"{layer}.{j}.layer_norm.weight"] = (d,)
    return shapes


def _conditions(c: dict, d: int) -> Shapes:
    embed, shapes = "time_text_embed", _linear("norm_out.linear", 2 * d, d)
    inputs = {"timestep": 256, "text": c["pooled_projection_dim"]}
    for name, width in inputs.items():
        shapes |= _linear(f"{embed}.{name}_embedder.linear_1", d, width)
        shapes |= _linear(f"{embed}.{name}_embedder.linear_2", d, d)
    return shapes | _linear("context_embedder", d, c["joint_attention_dim"])


def _attention(block: str, c: dict, text_norms: tuple[str, str]) -> Shapes:
    shapes: Shapes = {}
    d = c["num_attention_heads"] * c["attention_head_dim"]
    for pattern, name in product(("to_{}", "add_{}_proj"), "qkv"):
        shapes |= _linear(f"{block}.attn.{pattern.format(name)}", d, d)
    for name in ("norm_q", "norm_k", *text_norms):
        shapes[f"{block}.attn.{name}.weight"] = (c["attention_head_dim"],)
    return shapes


def _feed(name: str, d: int) -> Shapes:
    return _linear(f"{name}.net.0.proj", 4 * d, d) | _linear(f"{name}.net.2", d, 4 * d)


def _resnet(name: str, out: int, into: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", into) | _conv(f"{name}.conv1.conv", out, into)
    shapes |= _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2.conv", out, out)
    if out != into:
        shapes |= _conv(f"{name}.conv_shortcut.conv", out, into, 1)
    return shapes


def _conv(name: str, out: int, into: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (out, into, side, side, side), f"{name}.bias": (out,)}


def _norm(name: str, d: int) -> Shapes:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def _linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


# ------------------------------------------------------------------------ small models


def positions(c: dict) -> np.ndarray:
    """The position table of the SD3-style transformer, x before y."""
    cells, d = c["pos_embed_max_size"], c["caption_projection_dim"]
    scale = np.float32(cells / (c["sample_size"] // c["patch_size"]))
    place = (np.arange(cells, dtype=np.float32) / scale).astype(np.float64)
    angle = np.outer(place, 10000.0 ** (-np.arange(d // 4) / (d / 4)))
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    y, x = np.mgrid[:cells, :cells].reshape(2, -1)
    return np.concatenate([axis[x], axis[y]], axis=1)[None].astype(np.float32)


def tensors(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for every tensor of a small network, in bfloat16."""
    rng, config = np.random.default_rng(seed), SMALL[kind]
    shapes = {"mmdit": mmdit, "miniflux": miniflux, "vae": vae}[kind](config)
    values = {}
    for key, shape in shapes.items():
        draw = rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))
        draw += "norm" in key.split(".")[-2] and key.endswith("weight")
        values[key] = draw.astype(ml_dtypes.bfloat16)
    if kind == "mmdit":
        table = positions(config)
        values["pos_embed.pos_embed"] = table.astype(ml_dtypes.bfloat16)
    return values


def write(folder: Path, kind: str, variant: str = "diffusion_transformer_384p") -> Path:
    """A small model in the original's layout: `kind` is "mmdit" or "miniflux"."""
    (released.write_mmdit if kind == "mmdit" else released.write_miniflux)(folder)
    for name, network in ((variant, kind), ("causal_video_vae", "vae")):
        place = folder / name
        place.mkdir()
        fields = json.dumps(SMALL[network], indent=2, sort_keys=True) + "\n"
        (place / "config.json").write_text(fields)
        file = place / "diffusion_pytorch_model.safetensors"
        save_file(tensors(network), file, metadata={"format": "pt"})
    return folder
