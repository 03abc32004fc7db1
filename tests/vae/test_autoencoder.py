# SPDX-License-Identifier: Apache-2.0
"""A small VAE as a codec: in pieces, on many devices, in a folder, on a real file."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from av.video.frame import VideoFrame

from configs import tiny
from launch import moving_shapes, reconstruct
from pyramid_jax import sharding
from pyramid_jax.data.pictures import read_picture
from pyramid_jax.data.pixels import to_model, to_uint8
from pyramid_jax.data.video_io import video_info, write_video
from pyramid_jax.latents import LatentConfig
from pyramid_jax.models import vae
from pyramid_jax.models.vae import VAEConfig
from pyramid_jax.train import train
from pyramid_jax.vae import autoencoder
from pyramid_jax.vae.autoencoder import Autoencoder
from pyramid_jax.vae.codec import Codec, Pieces

CFG = VAEConfig(
    latent=2,
    encoder_widths=(4,),
    decoder_widths=(4,),
    encoder_layers=(1,),
    decoder_layers=(1,),
    spatial=(True,),
    temporal=(True,),
    groups=2,
)
LATENT = LatentConfig(2, 2, 2, 0.1, 2.0, -0.2, 3.0)


@pytest.fixture(scope="module")
def small() -> Autoencoder:
    """Weights large enough that everything matters."""
    init = jax.jit(partial(vae.initialise_vae, CFG))
    params = sharding.to_host(sharding.unbox(init(jax.random.key(0))))
    random = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), params
    )
    return Autoencoder(CFG, LATENT, moved)


@pytest.fixture(scope="module")
def codec(small: Autoencoder) -> Codec:
    return autoencoder.vae_codec(small)


@pytest.mark.slow  # a device of its own compiles everything again
def test_threads_encode_on_devices_of_their_own(small: Autoencoder):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 9, 12, 16, 3), np.uint8)
    numbers = np.arange(3, dtype=np.uint32)[:, None]
    one, free = autoencoder.raw_encoder(small), autoencoder.free_encoder(small)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(free, pixels, numbers))
    for mine, video, number in zip(found, pixels, numbers, strict=True):
        np.testing.assert_allclose(mine, one(video, number), rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[0], found[1])


@pytest.mark.slow  # compiles a VAE and a step
def test_a_model_is_trained_on_files_that_its_autoencoder_encodes(
    small: Autoencoder, tmp_path: Path
):
    autoencoder.save_autoencoder(tmp_path / "vae", small)
    manifest = moving_shapes.write_dataset(tmp_path / "shapes", 16, seed=1)
    cfg = tiny.get_config("smoke")
    cfg.model.latent.update(channels=2, spatial=2, temporal=2)
    cfg.model.dit.patch_values = 32
    cfg.autoencoder = str(tmp_path / "vae")
    cfg.data.update(manifest=str(manifest), encode=True, workers=2, held_out=4)
    cfg.prompts = ()
    train(cfg, tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("loss", 0.0) for line in lines]
    assert len(losses) == 2 and np.isfinite(losses).all() and min(losses) > 0
    assert "latent" not in manifest.read_text()


# perf: all tests use one size, because compiling is most of their time.
PIXELS = np.random.default_rng(0).uniform(-1, 1, (1, 9, 12, 16, 3)).astype(np.float32)
PIECES = Pieces(frames=4)
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def test_pieces_in_time_change_neither_latents_nor_pixels(codec: Codec):
    z = codec.encode(PIXELS)
    y = codec.decode(z)
    assert z.shape == (1, 5, 6, 8, 2) and y.shape == PIXELS.shape
    close(codec.encode(PIXELS, pieces=PIECES), z)
    close(codec.decode(z, PIECES), y)


def test_a_stream_of_latents_is_the_decoded_video(codec: Codec):
    z = jax.random.normal(jax.random.key(0), (1, 5, 6, 8, 2))
    parts = list(codec.stream((z[:, :1], z[:, 1:3], z[:, 3:])))
    assert [part.shape[1] for part in parts] == [1, 4, 4]
    close(jnp.concatenate(parts, axis=1), codec.decode(z))


@pytest.mark.slow
def test_many_devices_code_like_one(small: Autoencoder, codec: Codec):
    """Each has one of the four later latent frames, and three of six rows of cells."""
    many = autoencoder.vae_codec(
        small, sharding.device_mesh(data=1, context=4, tensor=2)
    )
    z = codec.encode(PIXELS)
    close(many.encode(PIXELS), z)
    close(many.decode(z), codec.decode(z))


def test_frames_that_devices_can_not_divide_are_filled_up(small: Autoencoder, codec):
    mesh = sharding.device_mesh(data=1, context=3, devices=jax.devices()[:3])
    z = codec.encode(PIXELS)
    close(autoencoder.vae_codec(small, mesh).decode(z), codec.decode(z))


def test_raw_latents_are_drawn_as_seed_and_number_of_a_video_say(small, codec):
    pixels = to_uint8(PIXELS)
    first, again, other = (
        autoencoder.raw_encoder(small, seed)(pixels, np.array([number]))
        for seed, number in ((3, 7), (3, 7), (3, 8))
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    mean = LATENT.denormalise(codec.encode(to_model(pixels), None, PIECES))
    assert np.abs(first - mean).mean() < 3 * np.abs(first - other).mean()


def test_a_saved_vae_is_read_back(small: Autoencoder, tmp_path: Path):
    autoencoder.save_autoencoder(tmp_path / "model" / autoencoder.INSIDE, small)
    for folder in (tmp_path / "model", tmp_path / "model" / autoencoder.INSIDE):
        again = autoencoder.load_autoencoder(folder)
        assert (again.cfg, again.latent) == (small.cfg, small.latent)
        jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    with pytest.raises(ValueError, match=r"no config\.json of a VAE"):
        autoencoder.load_autoencoder(tmp_path)


# ---------------------------------------------------------------------- real files


def test_a_reconstruction_of_a_file_is_written_and_judged(small, tmp_path):
    caption = moving_shapes.parse("a red circle moves left")
    clip = moving_shapes.small(moving_shapes.render(caption, np.random.default_rng(0)))
    clip = np.ascontiguousarray(clip[:, 10:22, 8:24])
    write_video(tmp_path / "in.mp4", clip, 8)
    pixels, fps = reconstruct.read(tmp_path / "in.mp4", LATENT)
    assert pixels.shape == (7, 12, 16, 3) and fps == 8
    result = reconstruct.reconstruct(small, pixels, PIECES)
    assert len(result.psnr) == len(result.ssim) == 7
    mean = ((result.original / 255.0 - result.decoded / 255.0) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(result.psnr, -10 * np.log10(mean), rtol=1e-3)
    reconstruct.write(tmp_path / "out.mp4", result, fps)
    assert video_info(tmp_path / "out.mp4") == (12, 48, 7, 8.0)
    assert "mean" in reconstruct.table(result).splitlines()[-1]
    assert json.dumps(result.psnr)


def test_a_reconstruction_takes_the_frames_that_there_are(tmp_path: Path):
    clip = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    with av.open(str(tmp_path / "in.avi"), "w") as container:  # counts fields
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 16
        for picture in clip:
            container.mux(stream.encode(VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    for wanted, count in ((None, 9), (20, 9), (4, 3)):
        pixels, fps = reconstruct.read(tmp_path / "in.avi", LATENT, wanted)
        assert len(pixels) == LATENT.longest(count) and fps == 8


def test_a_reconstruction_of_a_picture_shows_its_difference(tmp_path: Path):
    one = np.full((1, 4, 6, 3), 100, np.uint8)
    result = reconstruct.Reconstruction(one, one + 10, [28.1], [0.9])
    reconstruct.write(tmp_path / "a" / "out.png", result, 1)
    picture = read_picture(tmp_path / "a" / "out.png", (4, 18))
    np.testing.assert_array_equal(picture[0, ::6, 0], [100, 110, 40])
    original, _ = reconstruct.read(tmp_path / "a" / "out.png", LATENT)
    assert original.shape == (1, 4, 18, 3)


def test_a_picture_smaller_than_a_latent_cell_is_refused(tmp_path: Path):
    one = np.full((1, 4, 2, 3), 100, np.uint8)
    result = reconstruct.Reconstruction(one, one, [0.0], [0.0])
    reconstruct.write(tmp_path / "out.png", result, 1)
    wide = LatentConfig(2, 8, 2)
    with pytest.raises(ValueError, match="shows 4x6 pixels, expected at least 8x8"):
        reconstruct.read(tmp_path / "out.png", wide)
