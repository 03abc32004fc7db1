# SPDX-License-Identifier: Apache-2.0
"""Both forms of the convolution are the sum that defines it, with its gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.kernels.convolution import conv3d, conv_images, conv_video

SETTINGS = {
    "plain": ((1, 1, 1), ((1, 1), (1, 1))),
    "half the frames": ((2, 1, 1), ((0, 0), (1, 1))),
    "half the rows and columns": ((1, 2, 2), ((1, 1), (1, 1))),
    "one side": ((1, 2, 1), ((1, 0), (0, 2))),
}
FORMS = {"chosen": conv3d, "images": conv_images, "video": conv_video}


def arrays() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(keys[0], (2, 5, 6, 4, 3)),
        jax.random.normal(keys[1], (3, 3, 3, 3, 2)) / 9,
    )


def defined(x, kernel, strides, padding):
    """One output value after the other, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
    sizes = [(n - 3) // step + 1 for n, step in zip(x.shape[1:4], strides, strict=True)]
    y = np.empty((len(x), *sizes, kernel.shape[-1]))
    for at in np.ndindex(*sizes):
        t, h, w = (i * step for i, step in zip(at, strides, strict=True))
        seen = x[:, t : t + 3, h : h + 3, w : w + 3]
        y[(slice(None), *at)] = np.einsum("bthwi,thwio->bo", seen, kernel)
    return y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_form_is_the_sum_over_the_kernel(form, setting):
    how = dict(zip(("strides", "padding"), SETTINGS[setting], strict=True))
    y = jax.jit(partial(FORMS[form], **how))(*arrays())
    np.testing.assert_allclose(y, defined(*arrays(), **how), atol=2e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_forms_have_the_same_gradients(setting):
    how = dict(zip(("strides", "padding"), SETTINGS[setting], strict=True))

    def gradients(form):
        def loss(x, kernel):
            return jnp.sin(FORMS[form](x, kernel, **how)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(*arrays())

    for one, other in zip(gradients("chosen"), gradients("video"), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(one, other, atol=2e-5)
