# SPDX-License-Identifier: Apache-2.0
"""Linear maps with named axes, exact or rounded, and adapters beside them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from pyramid_jax import lora
from pyramid_jax.kernels.quantised import rounded_product
from pyramid_jax.models.products import cast_inputs, summed_product
from pyramid_jax.shapes import Array
from pyramid_jax.sharding import Axes, named, sums_in_float32

Features = int | tuple[int, ...]


class DenseGeneral(nn.DenseGeneral):
    """A linear map, with the path of adapters where these are beside its kernel.

    It is called as flax's is, which decides the names of weights.
    """

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."]) -> Float[jax.Array, "..."]:
        out = super().__call__(inputs)
        if not self.has_variable("params", lora.DOWN):
            return out
        pair = (self.get_variable("params", name) for name in (lora.DOWN, lora.UP))
        x, down, up = (jnp.asarray(y, out.dtype) for y in (inputs, *pair))
        contract = 1 if isinstance(self.axis, int) else len(self.axis)
        return out + lora.low_rank(x, down, up, contract)


def dense(
    features: Features,
    axes: Axes,
    dtype: str,
    *,
    contract: int = 1,
    init: nn.initializers.Initializer | None = None,
    bias: bool = True,
    products: str = "exact",
) -> DenseGeneral:
    """A linear map of the last `contract` axes to `features`, with named `axes`.

    The bias is laid out like the output. Weights are float32, products in `dtype` or,
    unless "exact", those of `kernels.quantised`.
    Default initialisation: Xavier uniform, of each part alone where several are fused
    (3, heads, dim).
    """
    shape = (features,) if isinstance(features, int) else tuple(features)
    fused = shape[0] if len(shape) == 3 else 1
    init = init or nn.initializers.variance_scaling(
        (1 + fused) / 2, "fan_avg", "uniform"
    )
    options: dict[str, Any] = {"dot_general": rounded_product(products)}
    if products == "exact" and sums_in_float32():
        options = {"promote_dtype": cast_inputs, "dot_general": summed_product}
    return DenseGeneral(
        shape,
        axis=tuple(range(-contract, 0)),
        dtype=jnp.dtype(dtype),
        use_bias=bias,
        kernel_init=named(init, axes),
        bias_init=named(nn.initializers.zeros, axes[contract:]),
        **options,
    )


def fused_qkv(
    heads: int,
    head_dim: int,
    dtype: str,
    *,
    bias: bool = True,
    products: str = "exact",
) -> DenseGeneral:
    """A linear map to queries, keys and values, `3 heads dim`."""
    axes = ("embed", None, "heads", None)
    return dense((3, heads, head_dim), axes, dtype, bias=bias, products=products)


class FusedQKV(nn.Module):
    """A map to queries, keys and values, `3 heads dim`, whose bias is added later.

    Its weights are those of `fused_qkv`.
    """

    heads: int
    head_dim: int
    dtype: str
    products: str = "exact"

    def setup(self):
        shape = (3, self.heads, self.head_dim)
        zeros = named(nn.initializers.zeros, (None, "heads", None))
        self.bias = self.param("bias", zeros, shape, jnp.float32)
        self.product = fused_qkv(
            self.heads,
            self.head_dim,
            self.dtype,
            bias=False,
            products=self.products,
        )
        nn.share_scope(self, self.product)

    def __call__(self, x: Float[jax.Array, "b n d"]) -> Float[jax.Array, "b n 3 _ _"]:
        return self.product(x)
