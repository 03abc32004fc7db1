# SPDX-License-Identifier: Apache-2.0
"""The losses of autoencoder and discriminator, with functions for networks."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax.vae.objective import (
    ObjectiveConfig,
    Reconstructed,
    autoencoder_loss,
    discriminator_loss,
)

CFG = ObjectiveConfig(kl=1e-2, log_variance=0.3, discriminator_start=10)
ADVERSARIAL = replace(CFG, discriminator="2d")
BEFORE, AFTER = 9, 10
KEYS = jax.random.split(jax.random.key(0), 4)
VIDEO = jax.random.normal(KEYS[0], (2, 3, 4, 4, 3))
# The networks: a decoder of two layers, a judge, and LPIPS, all of one matrix each.
PARAMS = {
    name: 0.5 * jax.random.normal(key, (3, 3))
    for name, key in zip(("early", "last", "judge"), KEYS[1:], strict=True)
}
PARAMS["frozen"] = PARAMS["judge"] + 1


def mixed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.einsum("...i,ij->...j", x, matrix)


def perceptual(matrix: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.square(jnp.tanh(mixed(x, matrix)) - jnp.tanh(mixed(y, matrix))).mean(
        axis=(1, 2, 3)
    )


def judge(matrix: jax.Array, video: jax.Array) -> jax.Array:
    return jnp.sin(mixed(video, matrix)).mean(axis=-1)


def reconstruction(params: dict[str, jax.Array], kernel: jax.Array) -> jax.Array:
    return mixed(jnp.tanh(mixed(VIDEO, params["early"])), kernel)


def kl(params: dict[str, jax.Array]) -> jax.Array:
    return jnp.square(mixed(VIDEO, params["early"])).sum(axis=(1, 2, 3))


def evaluated(
    cfg: ObjectiveConfig, params: dict[str, jax.Array], step: int, **critics: object
) -> Reconstructed:
    """Our loss of the small networks."""
    functions: dict[str, Any] = {
        "perceptual": lambda x, y: perceptual(params["frozen"], x, y),
        "judge": lambda video: judge(params["judge"], video),
    }
    return autoencoder_loss(
        cfg,
        VIDEO,
        step,
        reconstruct=lambda kernel: reconstruction(params, kernel),
        kernel=params["last"],
        kl=kl(params),
        **(functions | critics),
    )


def written_out(
    cfg: ObjectiveConfig, params: dict[str, jax.Array], step: int
) -> jax.Array:
    """The same loss, naively: every gradient is taken through everything."""

    def parts(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = reconstruction(params, kernel)
        per_frame = cfg.pixel * jnp.square(VIDEO - y).mean(axis=(2, 3, 4))
        flat = [x.reshape(-1, *x.shape[2:]) for x in (VIDEO, y)]
        distances = perceptual(params["frozen"], *flat).reshape(per_frame.shape)
        per_frame = per_frame + cfg.perceptual * distances
        nll = per_frame / jnp.exp(cfg.log_variance) + cfg.log_variance
        return nll.mean(), -judge(params["judge"], y).mean()

    slopes = [
        jnp.linalg.norm(jax.grad(lambda k, i=i: parts(k)[i])(params["last"]))
        for i in range(2)
    ]
    weight = cfg.adversarial * jnp.clip(slopes[0] / (slopes[1] + 1e-4), 0, 1e4)
    nll, g = parts(params["last"])
    counts = cfg.discriminator != "none" and step >= cfg.discriminator_start
    weight = jax.lax.stop_gradient(weight) * float(counts)
    return nll + cfg.kl * kl(params).mean() + weight * g


@pytest.mark.parametrize("step", [BEFORE, AFTER])
@pytest.mark.parametrize("cfg", [CFG, ADVERSARIAL], ids=["alone", "adversarial"])
def test_loss_and_gradient_are_those_of_the_formula(cfg, step):
    def ours(params: dict[str, jax.Array]) -> jax.Array:
        return evaluated(cfg, params, step).loss

    def naive(params: dict[str, jax.Array]) -> jax.Array:
        return written_out(cfg, params, step)

    value, gradient = jax.jit(jax.value_and_grad(ours))(PARAMS)
    expected, slope = jax.jit(jax.value_and_grad(naive))(PARAMS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name in ("early", "last"):
        np.testing.assert_allclose(gradient[name], slope[name], rtol=1e-4, atol=1e-6)


def test_the_autoencoder_does_not_teach_its_critics():
    gradient = jax.grad(lambda p: evaluated(ADVERSARIAL, p, AFTER).loss)(PARAMS)
    assert not gradient["judge"].any() and not gradient["frozen"].any()
    assert gradient["last"].any()


def test_the_discriminator_does_not_teach_the_autoencoder():
    def loss(params: dict[str, jax.Array]) -> jax.Array:
        fake = reconstruction(params, params["last"])
        of = discriminator_loss(
            ADVERSARIAL, lambda x: judge(params["judge"], x), VIDEO, fake, AFTER
        )
        return of.loss

    gradient = jax.grad(loss)(PARAMS)
    assert gradient["judge"].any()
    assert not any(gradient[name].any() for name in ("early", "last", "frozen"))


def test_the_adversarial_slope_in_the_last_kernel_is_its_weight_of_the_others():
    """w |dg/dk| = adversarial |dnll/dk|, but for the floor of 1e-4."""
    gradients = [
        jax.grad(lambda p, s=step: evaluated(replace(ADVERSARIAL, kl=0), p, s).loss)
        for step in (BEFORE, AFTER)
    ]
    others, both = (gradient(PARAMS)["last"] for gradient in gradients)
    ratio = jnp.linalg.norm(both - others) / jnp.linalg.norm(others)
    assert 0.99 * CFG.adversarial < ratio < CFG.adversarial


def test_a_judge_without_slope_gets_the_largest_weight_and_stays_finite():
    out = evaluated(ADVERSARIAL, PARAMS, AFTER, judge=lambda x: 0 * x[..., 0])
    assert jnp.isfinite(out.loss) and out.parts.adversarial == 0
    assert out.parts.adversarial_weight <= CFG.adversarial * 1e4


def test_before_the_start_the_discriminator_neither_learns_nor_counts():
    alone = evaluated(CFG, PARAMS, BEFORE).loss
    early = evaluated(ADVERSARIAL, PARAMS, BEFORE)
    assert early.loss == alone and early.parts.adversarial_weight == 0
    judged = discriminator_loss(
        ADVERSARIAL, lambda x: judge(PARAMS["judge"], x), VIDEO, 2 * VIDEO, BEFORE
    )
    assert judged.loss == 0 and judged.real != 0 and judged.fake != 0


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("hinge", (0.5 + 1.25) / 2), ("vanilla", (0.474077 + 0.825939) / 2)],
)
def test_the_discriminator_loss_is_its_formula(kind, loss):
    """Logits 0.5 of the real video and 0.25 of the other."""
    cfg = replace(ADVERSARIAL, adversarial_loss=kind)
    real, fake = jnp.full((1, 1, 1, 1, 1), 0.5), jnp.full((1, 1, 1, 1, 1), 0.25)
    judged = discriminator_loss(cfg, lambda x: x, real, fake, AFTER)
    np.testing.assert_allclose(judged, (loss, 0.5, 0.25), rtol=1e-5)


def test_without_perceptual_weight_its_function_is_not_called():
    cfg = replace(CFG, perceptual=0.0)
    out = evaluated(cfg, PARAMS, BEFORE, perceptual=None, judge=None)
    np.testing.assert_allclose(out.loss, written_out(cfg, PARAMS, BEFORE), rtol=1e-6)
    assert out.parts.perceptual == 0


def test_a_learned_log_variance_ends_at_the_logarithm_of_the_error():
    cfg = replace(CFG, kl=0.0, learn_log_variance=True)

    def loss(log_variance: jax.Array) -> jax.Array:
        return evaluated(cfg, PARAMS, BEFORE, log_variance=log_variance).loss

    parts = evaluated(CFG, PARAMS, BEFORE).parts
    error = cfg.pixel * parts.pixel + cfg.perceptual * parts.perceptual
    assert abs(jax.grad(loss)(jnp.log(error))) < 1e-6
    assert abs(jax.grad(loss)(jnp.float32(0))) > 0.1


@pytest.mark.parametrize(
    ("changed", "absent"),
    [
        ({"perceptual": 1.0}, "perceptual"),
        ({"perceptual": 0.0, "discriminator": "3d"}, "judge"),
        ({"perceptual": 0.0, "learn_log_variance": True}, "log_variance"),
    ],
)
def test_a_missing_critic_is_named(changed, absent):
    with pytest.raises(ValueError, match=rf"needs \['{absent}'\]"):
        evaluated(replace(CFG, **changed), PARAMS, BEFORE, perceptual=None, judge=None)


@pytest.mark.parametrize(
    "changed",
    [{"discriminator": "4d"}, {"adversarial_loss": "wasserstein"}, {"kl": -1.0}],
)
def test_a_setting_out_of_range_is_named(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        ObjectiveConfig(**changed)
