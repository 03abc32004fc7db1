# SPDX-License-Identifier: Apache-2.0
"""Adapters beside kernels: fresh ones do nothing, others act like added weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyramid_jax import sharding
from pyramid_jax.lora import DOWN, UP, LoRAConfig, adapted, fresh_adapters
from pyramid_jax.models.linear import dense, fused_qkv

# A layer by the name that its adapters go by, and the product of A and B.
LAYERS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "qkv": (fused_qkv(2, 5, "float32"), (6,), "imr,mrhd->imhd"),
    "out": (
        dense(6, ("heads", None, "embed"), "float32", contract=2),
        (2, 5),
        "hdr,ro->hdo",
    ),
    "mlp_in": (dense(7, ("embed", "mlp"), "float32"), (6,), "ir,ro->io"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_adapters_is_one_with_their_product_in_its_kernel(name: str):
    layer, inputs, product = LAYERS[name]
    x = np.random.default_rng(0).normal(size=(2, 3, *inputs)).astype(np.float32)
    boxes = {name: layer.init(jax.random.key(0), x)["params"]}
    cfg = LoRAConfig(2, 3.0, targets=(name,))
    adapters = sharding.unbox(fresh_adapters(cfg, boxes, jax.random.key(1)))
    weights = sharding.unbox(boxes)
    plain = layer.apply({"params": weights[name]}, x)
    fresh = adapted(weights, adapters, cfg.scale)
    np.testing.assert_array_equal(layer.apply({"params": fresh[name]}, x), plain)

    up = adapters[name][UP]
    adapters[name][UP] = jax.random.normal(jax.random.key(2), up.shape)
    kernel = weights[name]["kernel"]
    added = jnp.einsum(product, adapters[name][DOWN], adapters[name][UP])
    expected = weights[name] | {"kernel": kernel + 1.5 * added}
    found = adapted(weights, adapters, cfg.scale)
    np.testing.assert_allclose(
        layer.apply({"params": found[name]}, x),
        layer.apply({"params": expected}, x),
        atol=1e-5,
    )


def test_adapters_are_laid_out_like_the_kernels():
    names = ("layers", "embed", None, "heads", None)
    kernel = sharding.Named(np.zeros((4, 6, 3, 2, 5)), names)
    blocks = {"qkv": {"kernel": kernel}, "norm": {"kernel": kernel}}
    made = fresh_adapters(LoRAConfig(rank=2), blocks, jax.random.key(0))
    assert set(made) == {"qkv"}
    down, up = made["qkv"][DOWN], made["qkv"][UP]
    assert (down.value.shape, up.value.shape) == ((4, 6, 3, 2), (4, 3, 2, 2, 5))
    assert down.names == ("layers", "embed", None, None)
    assert up.names == ("layers", None, None, "heads", None)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"alpha": 0.0}, {"targets": ("head",)}, {"base": "int4"}]
)
def test_impossible_adapters_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRAConfig(**wrong)
