# SPDX-License-Identifier: Apache-2.0
"""The VAE is causal, chunks change nothing, and the released one has its shapes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.checkpoint import rename
from pyramid_jax.checkpoint.tensors import StoredTensors, read_tensors
from pyramid_jax.checkpoint.vae_tables import vae_table
from pyramid_jax.convert import configs
from pyramid_jax.kernels.halo import Halo
from pyramid_jax.models import vae, vae_layers
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.models.vae_layers import Level, Norm, Setting
from pyramid_jax.sharding import Named, unbox
from tests.released import tensor_shapes

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "causal_vae_small"
# Compiling is most of the time that these tests take.
FAST = {"xla_backend_optimization_level": 0}
CFG = VAEConfig(
    latent=2,
    encoder_widths=(2, 4),
    decoder_widths=(2, 4),
    encoder_layers=(1, 1),
    decoder_layers=(1, 1),
    spatial=(True, False),
    temporal=(True, True),
    groups=2,
)
PLAIN = Setting(groups=2, dtype="float32", remat=False, halo=Halo())
ENCODER = jax.jit(partial(vae.encode, CFG), compiler_options=FAST)
DECODER = jax.jit(partial(vae.decode, CFG), compiler_options=FAST)


def abstract(cfg: VAEConfig) -> Any:
    """The boxed shapes of a VAE's weights."""
    return jax.eval_shape(partial(vae.initialise_vae, cfg), jax.random.key(0))


def random(like: Any, scale: float = 0.3) -> Any:
    """Normal noise in the shapes of a tree."""
    leaves, tree = jax.tree.flatten(unbox(like))
    source = np.random.default_rng(0)
    return tree.unflatten(
        [scale * source.standard_normal(x.shape, np.float32) for x in leaves]
    )


@pytest.fixture(scope="module")
def weights() -> Any:
    return random(abstract(CFG))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return random(jnp.zeros((1, 9, 4, 4, 3)), 1.0)


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    return random(jnp.zeros((1, 3, 2, 2, 2)), 1.0)


# ------------------------------------------------------------------------------ laws


def chunked(f: Any, weights: Any, x: np.ndarray, ends: list[int]) -> np.ndarray:
    """Pieces of a video, each with the past that the one before it left."""
    past, pieces = None, []
    for piece in np.split(x, ends, axis=1):
        y, past = f(weights, piece, past)
        pieces.append(y)
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("ends", [[1, 5], [5]])
def test_encoding_in_chunks_is_encoding_the_whole(ends, weights, pixels):
    whole, _ = ENCODER(weights, pixels)
    assert whole.shape == (1, 3, 2, 2, 4)
    np.testing.assert_allclose(
        chunked(ENCODER, weights, pixels, ends), whole, atol=1e-5
    )


@pytest.mark.parametrize("ends", [[1, 2], [2]])
def test_decoding_latents_one_by_one_is_decoding_the_whole(ends, weights, latents):
    whole, _ = DECODER(weights, latents)
    assert whole.shape == (1, CFG.frames(3), 4, 4, 3)
    pieces = chunked(DECODER, weights, latents, ends)
    np.testing.assert_allclose(pieces, whole, atol=1e-5)


@pytest.mark.parametrize("frame", [1, 4, 5, 8])
def test_a_frame_changes_no_earlier_latent(frame, weights, pixels):
    changed = pixels.copy()
    changed[:, frame] += 1.0
    before, after = (ENCODER(weights, x)[0] for x in (pixels, changed))
    first = -(-frame // CFG.temporal_factor)
    np.testing.assert_array_equal(after[:, :first], before[:, :first])
    assert np.abs(after[:, first] - before[:, first]).max() > 1e-4


@pytest.mark.parametrize("latent", [1, 2])
def test_a_latent_changes_no_earlier_frame(latent, weights, latents):
    changed = latents.copy()
    changed[:, latent] += 1.0
    before, after = (DECODER(weights, z)[0] for z in (latents, changed))
    first = CFG.frames(latent)
    np.testing.assert_array_equal(after[:, :first], before[:, :first])
    assert np.abs(after[:, first] - before[:, first]).max() > 1e-4


def test_the_past_begins_a_chunk_wherever_the_chunk_before_ended(weights, pixels):
    _, one = ENCODER(weights, pixels)
    _, first = ENCODER(weights, pixels[:, :5])
    _, two = ENCODER(weights, pixels[:, 5:], first)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_lower_precision_stays_inside():
    cfg = VAEConfig(**{**vars(CFG), "dtype": "bfloat16"})
    params, x = unbox(abstract(cfg)), jnp.zeros((1, 5, 4, 4, 3))
    raw, past = jax.eval_shape(partial(vae.encode, cfg), params, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert raw.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(past)} == {"bfloat16"}


# ----------------------------------------------------------------------------- layers


def test_each_group_of_each_frame_is_normalised_alone():
    x = random(jnp.zeros((2, 3, 4, 4, 4)), 1.0)
    x = x * np.arange(1, 4, dtype=np.float32)[None, :, None, None, None] + 5
    params = {"weight": jnp.ones(4), "bias": jnp.zeros(4)}
    y = Norm(PLAIN).apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.float32
    groups = np.asarray(y).reshape(2, 3, 16, 2, 2)
    np.testing.assert_allclose(groups.mean(axis=(2, 4)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std(axis=(2, 4)), 1, atol=1e-4)


def test_frames_that_attend_in_turns_see_the_same(monkeypatch):
    q, k, v = (random(jnp.zeros((2, 3, 4, 2)), s) for s in (1.0, 2.0, 3.0))
    logits = np.einsum("btqc,btkc->btqk", q, k) / np.sqrt(2)
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = np.einsum("btqk,btkc->btqc", shares, v)
    for at_once in (2**20, 40, 1):
        monkeypatch.setattr(vae_layers, "LOGITS", at_once)
        np.testing.assert_allclose(
            vae_layers._attend(*map(jnp.asarray, (q, k, v))), expected, atol=1e-5
        )


def test_recomputing_blocks_changes_no_gradient():
    x = jnp.asarray(random(jnp.zeros((1, 2, 2, 2, 2)), 1.0))

    def gradient(remat: bool) -> Any:
        setting = Setting(2, "float32", remat, Halo())
        level = Level(setting, up=False, width=2, layers=1, space=False, time=False)
        params = random(jax.eval_shape(level.init, jax.random.key(0), x))

        def loss(params: Any) -> jax.Array:
            return jnp.sin(level.apply(params, x)[0]).sum()

        run = jax.make_jaxpr(jax.grad(loss))(params)
        assert ("remat" in str(run) or "checkpoint" in str(run)) == remat
        return jax.jit(jax.grad(loss), compiler_options=FAST)(params)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        *(gradient(remat) for remat in (True, False)),
    )


# ---------------------------------------------------------------------------- moments


def test_moments_are_means_and_clamped_log_variances():
    raw = jnp.stack([jnp.full((1, 1, 1, 1), v) for v in (2.0, 90.0)], axis=-1)
    posterior = vae.moments(raw)
    assert (posterior.mean.item(), posterior.log_variance.item()) == (2.0, 20.0)
    assert vae.moments(-raw).log_variance.item() == -30.0


def test_samples_have_the_mean_and_deviation_of_the_moments():
    mean, log_variance = jnp.full((1, 1, 1, 1, 1), 3.0), jnp.log(jnp.full(5 * (1,), 4))
    posterior = vae.Moments(mean, log_variance)
    for noise, expected in ((0.0, 3.0), (1.0, 5.0), (-2.0, -1.0)):
        value = posterior.sample(jnp.full((1, 1, 1, 1, 1), noise)).item()
        assert value == pytest.approx(expected)


def test_the_divergence_is_the_integral_that_defines_it():
    raw = random(jnp.zeros((2, 2, 1, 3, 4)), 1.0)
    posterior = vae.moments(jnp.asarray(raw))
    x = np.linspace(-30, 30, 20001)
    expected = np.zeros((2, 2))
    for at in np.ndindex(posterior.mean.shape):
        mean = float(posterior.mean[at])
        deviation = float(posterior.deviation[at])
        z = (x - mean) / deviation
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) / deviation
        excess = density * (x**2 / 2 - z**2 / 2 - np.log(deviation))
        expected[at[0], at[-1]] += excess.sum() * (x[1] - x[0])
    np.testing.assert_allclose(posterior.kl(), expected, rtol=1e-4)


# ---------------------------------------------------------------------------- weights


def test_the_released_vae_has_all_its_tensors_in_the_right_shapes():
    cfg = VAEConfig()
    shapes = tensor_shapes(vae_table(cfg), abstract(cfg))
    assert len(shapes) == 260
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 335_402_067
    specs = rename.tensor_specs(abstract(cfg), vae_table(cfg))
    assert rename.shape_problems(specs, vae_table(cfg), abstract(cfg)) == []
    some = {
        "encoder.conv_in.conv.weight": (128, 3, 3, 3, 3),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.conv.weight": (
            256,
            128,
            1,
            1,
            1,
        ),
        "encoder.down_blocks.2.temporal_downsamplers.0.conv.conv.bias": (512,),
        "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "encoder.conv_out.conv.weight": (32, 512, 3, 3, 3),
        "quant_conv.conv.weight": (32, 32, 1, 1, 1),
        "post_quant_conv.conv.weight": (16, 16, 1, 1, 1),
        "decoder.up_blocks.2.upsamplers.0.conv.conv.weight": (1024, 256, 3, 3, 3),
        "decoder.up_blocks.2.temporal_upsamplers.0.conv.conv.weight": (
            (512, 256, 3, 3, 3)
        ),
        "decoder.up_blocks.3.resnets.0.conv_shortcut.conv.weight": (128, 256, 1, 1, 1),
        "decoder.conv_norm_out.weight": (128,),
    }
    assert {key: shapes[key] for key in some} == some


def test_kernels_name_the_axis_that_devices_may_divide():
    leaves = jax.tree_util.tree_leaves_with_path(
        abstract(CFG), is_leaf=lambda x: isinstance(x, Named)
    )
    for path, leaf in leaves:
        is_kernel = path[-1].key == "kernel"
        assert ("embed" in leaf.names) == is_kernel, path
        assert len(leaf.names) == leaf.value.ndim


def recorded() -> tuple[VAEConfig, StoredTensors]:
    """A small VAE with the original's names."""
    constructor = json.loads((GOLDEN / "config.json").read_text())["constructor"]
    return VAEConfig(**configs.vae_config(constructor)), read_tensors(
        GOLDEN / "weights.safetensors"
    )


def test_converting_and_exporting_the_vae_gives_back_every_bit():
    cfg, tensors = recorded()
    params = rename.convert_tensors(tensors, vae_table(cfg), abstract(cfg))
    back = dict(rename.export_tensors(params, vae_table(cfg)))
    assert back.keys() == tensors.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, np.asarray(tensors[key]), err_msg=key)


def test_all_damage_to_a_vae_is_reported_together():
    cfg, stored = recorded()
    tensors = {key: np.asarray(x) for key, x in stored.items()}
    del tensors["quant_conv.conv.bias"]
    tensors["encoder.conv_in.conv.weight"] = np.zeros((4, 3, 3, 3), np.float32)
    tensors["loss.logvar"] = np.zeros(1, np.float32)
    with pytest.raises(ValueError) as raised:
        rename.convert_tensors(tensors, vae_table(cfg), abstract(cfg))
    _, *problems = str(raised.value).splitlines()
    assert [problem.strip() for problem in problems] == [
        "quant_conv.conv.bias is missing",
        "loss.logvar is left over",
        "encoder.conv_in.conv.weight has shape (4, 3, 3, 3), expected (4, 3, 3, 3, 3)",
    ]


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("shape", "past", "message"),
    [
        (
            (1, 8, 16, 16, 3),
            None,
            r"8 frames are not 1 \+ a multiple of 8; use 1 or 9",
        ),
        ((1, 16, 16, 16, 3), None, "use 9 or 17"),
        ((1, 0, 16, 16, 3), None, "0 frames .* use 1"),
        ((1, 9, 16, 16, 3), (), "9 frames are not a multiple of 8; use 8 or 16"),
        ((1, 1, 20, 16, 3), None, "height 20 is not a multiple of 8; use 16 or 24"),
        ((1, 1, 16, 4, 3), None, "width 4 is not a multiple of 8; use 8"),
        ((1, 1, 16, 16, 4), None, "4 channels, this VAE takes 3"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(shape, past, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(VAEConfig(), None, jnp.zeros(shape), past)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 4), (1, 0, 4, 4, 16)])
def test_latents_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="16 channels"):
        vae.decode(VAEConfig(), None, jnp.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_layers": (2, 2)}, "different numbers of levels"),
        ({"temporal": (True,)}, "different numbers of levels"),
        (
            {"encoder_widths": (128, 250, 512, 512)},
            r"\[250\] are not multiples of groups",
        ),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_configs_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_temporal_up_sample": [True, False, True, False]}, "must agree"),
        ({"decoder_in_channels": 8}, "must agree"),
        ({"interpolate": True}, "interpolate is True"),
        ({"encoder_act_fn": "gelu"}, "only 'silu'"),
        ({"encoder_norm_num_groups": None}, "lacks .'encoder_norm_num_groups'"),
    ],
)
def test_config_files_of_other_vaes_are_refused(change, message):
    constructor = json.loads((GOLDEN / "config.json").read_text())["constructor"]
    constructor = {k: v for k, v in (constructor | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        configs.vae_config(constructor)


def test_sizes_follow_from_the_levels():
    cfg = VAEConfig()
    assert (cfg.spatial_factor, cfg.temporal_factor) == (8, 8)
    assert [cfg.frames(n) for n in (1, 2, 16)] == [1, 9, 121]
    assert (CFG.spatial_factor, CFG.temporal_factor, CFG.frames(3)) == (2, 4, 9)
