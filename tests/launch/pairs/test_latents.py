# SPDX-License-Identifier: Apache-2.0
"""Latents of pairs are those of their pixels, whole, and kept by a second run."""

import jax.numpy as jnp
import numpy as np
import pytest

from launch.pairs.dataset import pair
from launch.pairs.latents import write_pair_latents
from launch.pairs.scene import Settings
from pyramid_jax.data.manifest import read_manifest
from pyramid_jax.data.pixels import to_model
from pyramid_jax.data.stored import check_latents, read_record_latent
from pyramid_jax.models import vae
from pyramid_jax.pipeline.folder import PAIRS
from pyramid_jax.vae.autoencoder import load_autoencoder

SHORT = Settings(frames=5)


@pytest.mark.slow
def test_latents_are_those_of_the_pixels_and_are_kept(tmp_path):
    coder = load_autoencoder(PAIRS)
    records = read_manifest(write_pair_latents(tmp_path, 5, coder, SHORT, batch=2))
    check_latents(records, fps=8.0, vae=coder.digest)
    assert [record.kind for record in records] == ["video"] * 4 + ["image"]
    for number, record in ((0, records[0]), (4, records[4])):
        drawn, latent = pair(number, settings=SHORT), read_record_latent(record)
        assert record.text == drawn.text
        pixels = jnp.asarray(to_model(drawn.pixels[None]))
        raw, _ = vae.encode(coder.cfg, coder.params, pixels)
        mean = np.asarray(vae.moments(raw).mean[0])
        assert latent.shape == mean.shape
        assert np.abs(latent - mean).mean() < 0.2 * mean.std()  # drawn, in float16

    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    next(iter(written)).unlink()
    again = read_manifest(write_pair_latents(tmp_path, 5, coder, SHORT, batch=2))
    assert again == records
    new = {path for path, at in written.items() if path.stat().st_mtime_ns != at}
    assert new == {next(iter(written))}
    with pytest.raises(ValueError, match="made with frames"):
        write_pair_latents(tmp_path, 5, coder, Settings(frames=1))
