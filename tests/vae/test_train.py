# SPDX-License-Identifier: Apache-2.0
"""VAE training: whose gradient is whose, and whole runs from mp4 files."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import pairs_vae, vae
from launch.moving_shapes import write_dataset
from pyramid_jax import sharding
from pyramid_jax.data.pixels import to_model
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import vae as models
from pyramid_jax.models.discriminator import DiscriminatorConfig
from pyramid_jax.models.lpips import LPIPSConfig
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.training.optimizer import OptimizerConfig
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae import networks as vae_task
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.clips import Footage, VAEDataConfig
from pyramid_jax.vae.networks import VAENetworks
from pyramid_jax.vae.objective import ObjectiveConfig
from pyramid_jax.vae.train import build_networks, first_clips, statistics, train_vae

TINY = VAEConfig(
    latent=2,
    encoder_widths=(4,),
    decoder_widths=(4,),
    encoder_layers=(1,),
    decoder_layers=(1,),
    spatial=(True,),
    temporal=(True,),
    groups=2,
)
NETWORKS = VAENetworks(
    TINY,
    ObjectiveConfig(perceptual=0.0, kl=1e-3, discriminator="2d", discriminator_start=5),
    DiscriminatorConfig(width=2, layers=1),
    LPIPSConfig(widths=(2, 2, 2, 2, 2)),
    image_share=0.25,
)
RATES = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, steps=10)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params() -> Any:
    """Weights of both networks."""
    init = jax.jit(partial(vae_task.initialise_networks, NETWORKS))
    return sharding.unbox(init(KEY))


def footage() -> Footage:
    draw = np.random.default_rng(0).integers
    video = draw(0, 256, (2, 5, 16, 16, 3), np.uint8)
    return Footage(video, draw(0, 256, (2, 1, 16, 16, 3), np.uint8))


@jax.jit
def gradient(params: Any, batch: Footage, step: Any) -> Any:
    differentiate = jax.value_and_grad(vae_task.vae_loss, argnums=1, has_aux=True)
    return differentiate(NETWORKS, params, batch, KEY, step)


@pytest.fixture(scope="module")
def early(params: Any) -> Any:
    """Loss, means and gradient of the last step without discriminator."""
    return gradient(params, footage(), jnp.int32(4))


@pytest.fixture(scope="module")
def late(params: Any) -> Any:
    """The same for the first step with it."""
    return gradient(params, footage(), jnp.int32(5))


def norm(tree: Any) -> float:
    return float(optax.tree.norm(tree))


# ----------------------------------------------------------------------- one gradient


def test_without_discriminator_the_loss_is_that_of_clips_and_of_pictures(early):
    (loss, means), _ = early
    sums = means.sums
    of_clips = 10 * sums["loss_pixel"] + 1e-3 * sums["kl"]
    of_pictures = 10 * sums["image_loss_pixel"] + 1e-3 * sums["image_kl"]
    np.testing.assert_allclose(loss, 0.75 * of_clips + 0.25 * of_pictures, rtol=1e-5)


def test_the_discriminator_neither_learns_nor_counts_before_its_start(early, late):
    (_, means), slopes = early
    assert norm(slopes["discriminator"]) == 0 == means.sums["loss_discriminator"]
    (_, means), begun = late
    assert norm(begun["discriminator"]) > 0 < means.sums["loss_discriminator"]
    difference = jax.tree.map(jnp.subtract, begun["vae"], slopes["vae"])
    assert norm(difference) > 1e-3 * norm(slopes["vae"])


@pytest.mark.slow
def test_devices_that_share_the_frames_compute_what_one_device_computes(params, late):
    (loss, _), slopes = late
    mesh = sharding.device_mesh(data=2, context=2, devices=jax.devices()[:4])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        batch = jax.device_put(footage(), where)
        both = gradient(jax.device_put(params, where), batch, jnp.int32(5))
    (shared, _), shared_slopes = jax.device_get(both)
    np.testing.assert_allclose(shared, loss, rtol=1e-5)
    for one, two in zip(
        jax.tree.leaves(slopes["vae"]),
        jax.tree.leaves(shared_slopes["vae"]),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, atol=1e-4 * norm(slopes["vae"]))


def test_a_discriminator_of_clips_does_not_judge_pictures():
    networks = replace(
        NETWORKS,
        objective=replace(NETWORKS.objective, discriminator="3d"),
        discriminator=DiscriminatorConfig("3d", width=2, layers=1),
    )
    shapes = jax.eval_shape(partial(vae_task.initialise_networks, networks), KEY)
    video = np.zeros((2, 7, 16, 16, 3), np.uint8)
    batch = Footage(video, footage().image)
    loss = partial(vae_task.vae_loss, networks)
    _, means = jax.eval_shape(loss, sharding.unbox(shapes), batch, KEY, jnp.int32(9))
    assert "loss_discriminator" in means.sums
    assert "image_loss_discriminator" not in means.sums


def updated(networks: VAENetworks, params: Any) -> Any:
    """How the weights change where all gradients are one."""
    both = vae_task.optimizers(networks, RATES, replace(RATES, learning_rate=1e-3))
    ones = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):
        change, _ = jax.jit(both.update)(ones, both.init(params), params)
    return change


def test_each_network_has_its_own_rate_and_lpips_never_changes(params):
    networks = replace(NETWORKS, objective=replace(NETWORKS.objective, perceptual=1.0))
    change = updated(networks, params | {"perceptual": {"kernel": jnp.ones((2, 2))}})
    kernel = vae_task.last_kernel(change["vae"]["decoder"])
    np.testing.assert_allclose(kernel, -1e-2, rtol=1e-2)
    judge = change["discriminator"]["layer_0"]["kernel"]
    np.testing.assert_allclose(judge, -1e-3, rtol=1e-2)
    assert norm(change["perceptual"]) == 0


def test_a_frozen_encoder_does_not_even_decay(params):
    change = updated(replace(NETWORKS, freeze_encoder=True), params)["vae"]
    assert norm(change["encoder"]) == 0 < norm(change["decoder"])


def test_networks_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"image_share 1.0 must be in \[0, 1\)"):
        replace(NETWORKS, image_share=1.0)
    with pytest.raises(ValueError, match=r"asks for a '2d' discriminator.* is '3d'"):
        replace(NETWORKS, discriminator=DiscriminatorConfig("3d"))


# -------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "shapes", 24, seed=2)


def config(manifest: Path, **loop: int) -> Any:
    """The smallest run with both networks: one level, 16x16 pixels, 3 frames."""
    cfg = vae.get_config("smoke")
    with cfg.unlocked():
        cfg.vae.update(
            {
                name: getattr(TINY, name)
                for name in vars(TINY)
                if name not in ("dtype", "remat")
            }
        )
    cfg.discriminator.update(width=2, layers=1)
    cfg.data.update(manifest=str(manifest), height=16, width=16, frames=3)
    cfg.optimizer.update(learning_rate=1e-2, warmup_steps=0)
    cfg.loop.update(**{"steps": 3, "save_every": 3, "sample_every": 3} | loop)
    return cfg


def metrics(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished run of three steps on eight devices."""
    workdir = tmp_path_factory.mktemp("run")
    train_vae(config(manifest), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_leaves_losses_quality_reconstructions_and_a_model(run: Path):
    first, *_, last = [line for line in metrics(run) if "loss" in line]
    expected = {"loss_pixel", "kl", "image_loss_pixel", "loss_discriminator"}
    assert expected <= set(last)
    assert first["adversarial_weight"] == 0 < last["adversarial_weight"]
    assert 5 < last["psnr"] < 60 and -1 < last["ssim"] < 1
    assert (run / "samples/0000003/contact_sheet.png").stat().st_size > 1000
    assert (run / "samples/0000003/0.mp4").stat().st_size > 0
    trained_vae = autoencoder.load_autoencoder(run / "model")
    assert (
        trained_vae.cfg == TINY
        and trained_vae.latent.spatial == trained_vae.latent.temporal == 2
    )


@pytest.mark.slow
def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(
    run, manifest, tmp_path
):
    for steps in (1, 3):
        train_vae(config(manifest, steps=steps, sample_every=0), tmp_path)
    one, two = (
        autoencoder.load_autoencoder(folder / "model") for folder in (run, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert one.latent == two.latent


@pytest.mark.slow
def test_a_run_can_start_from_a_vae_and_train_its_decoder_alone(
    run, manifest, tmp_path
):
    cfg = config(manifest, steps=1, sample_every=0)
    cfg.freeze_encoder = True
    start = run / "model"
    after = autoencoder.load_autoencoder(train_vae(cfg, tmp_path, start)).params
    before = autoencoder.load_autoencoder(start).params
    jax.tree.map(np.testing.assert_array_equal, after["encoder"], before["encoder"])
    kernel, old = (vae_task.last_kernel(x["decoder"]) for x in (after, before))
    assert np.abs(kernel - old).max() > 1e-4

    cfg.vae.groups = 4
    with pytest.raises(ValueError, match="is of another config than this run's"):
        train_vae(cfg, tmp_path / "other", start)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"frames": 4}, "4 frames are not 1 . a multiple of 2.* use 3 or 5"),
        ("data", {"height": 15}, "height 15 is not a multiple of 2; use 14 or 16"),
        ("objective", {"discriminator_start": 10**6}, "it would never train"),
        pytest.param(
            "objective",
            {"perceptual": 1.0},
            "needs the weights of LPIPS",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_can_not_work_is_refused(manifest, tmp_path, section, changes, message):
    cfg = config(manifest)
    cfg[section].update(changes)
    with pytest.raises(ValueError, match=message):
        train_vae(cfg, tmp_path)


@pytest.mark.slow
def test_statistics_make_the_latents_standard(manifest, tmp_path):
    data = VAEDataConfig(manifest, 16, 16, frames=5, fps=8, batch=8)
    key, noise = jax.random.split(KEY)
    mesh = sharding.device_mesh(devices=jax.devices()[:1])
    params = sharding.unbox(jax.jit(partial(models.initialise_vae, TINY))(key))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(params, where)
    latent = statistics(TINY, params, data, tmp_path, clips=8)

    ((_, video),) = first_clips(params, data, tmp_path, "training", 8)
    raw, _ = models.encode(TINY, params, to_model(video))
    posterior = models.moments(raw)
    draws = jax.random.normal(noise, (40, *posterior.mean.shape))
    drawn = jax.vmap(posterior.sample)(draws)
    z = latent.normalise(np.asarray(drawn)).reshape(-1, 3, 8, 8, 2)
    for frames in (z[:, :1], z[:, 1:]):
        np.testing.assert_allclose([frames.mean(), frames.std()], [0, 1], atol=0.03)


# ----------------------------------------------------------------------------- configs


def test_a_vae_is_read_back_as_it_was_saved(tmp_path):
    params = sharding.unbox(jax.jit(partial(models.initialise_vae, TINY))(KEY))
    data = LatentConfig(channels=2, image_shift=0.5)
    autoencoder.save_autoencoder(
        tmp_path, Autoencoder(TINY, data, jax.device_get(params))
    )
    back = autoencoder.load_autoencoder(tmp_path)
    assert (back.cfg, back.latent) == (TINY, data)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    with pytest.raises(ValueError, match=r"has no config.json of a VAE"):
        autoencoder.load_autoencoder(tmp_path / "nowhere")


def parameters(cfg: Any) -> int:
    shapes = jax.eval_shape(
        partial(vae_task.initialise_networks, build_networks(cfg)), KEY
    )
    return sum(x.size for x in jax.tree.leaves(sharding.unbox(shapes)["vae"]))


def test_the_configs_have_the_sizes_they_speak_of():
    assert parameters(vae.get_config()) == 335_402_067
    assert parameters(vae.get_config("long")) == 335_402_067
    assert parameters(pairs_vae.get_config()) < 2.6e6  # 5 MB in float16


def test_an_unknown_mode_is_refused():
    for module in (vae, pairs_vae):
        with pytest.raises(ValueError, match="unknown mode 'fast'; use 'full', 'long'"):
            module.get_config("fast")
