"""Products with weights, and the adapters that may stand on them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from s2d_jax import sharding
from s2d_jax.models.config import PRODUCT


def normal(fan_in: int) -> Callable[..., jax.Array]:
  """An initializer with standard deviation 1/√fan_in, which keeps the scale of its inputs."""
  return nn.initializers.normal(fan_in**-0.5)


def project(x_BTD: jax.Array, weight: jax.Array) -> jax.Array:
  """x · weight over the width, in the dtype of x: [B, T, D], [D, …] -> [B, T, …].

  The gradient of the weight is at least float32, and is added up over devices in that dtype.
  """
  B, T, D = x_BTD.shape
  # Rows and times are one axis, and so are the outputs. With its axes apart, the gradient of the
  # einsum spends as much time copying transposes as multiplying on a CPU. Where devices may split
  # the times they stay apart, or XLA would add up the outputs whole on each device.
  x = x_BTD if sharding.shards("context", T) > 1 else x_BTD.reshape(-1, D)
  y = _product(x, weight.reshape(D, -1))
  return checkpoint_name(y.reshape(B, T, *weight.shape[1:]), PRODUCT)


@jax.custom_vjp
def _product(x_ND: jax.Array, w_DM: jax.Array) -> jax.Array:
  """x · w; N may be several axes."""
  return x_ND @ w_DM.astype(x_ND.dtype)


def _product_fwd(x_ND: jax.Array, w_DM: jax.Array) -> tuple[jax.Array, tuple]:
  return _product(x_ND, w_DM), (x_ND, w_DM)


def _product_bwd(saved: tuple, dy_NM: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_ND, w_DM = saved
  # JAX's own gradient would be rounded to the activations' dtype before devices add it up.
  axes = tuple(range(x_ND.ndim - 1))
  dw_DM = jnp.tensordot(x_ND, dy_NM, (axes, axes), preferred_element_type=jnp.float32)
  return dy_NM @ w_DM.astype(x_ND.dtype).T, dw_DM.astype(w_DM.dtype)


_product.defvjp(_product_fwd, _product_bwd)


class Linear(NamedTuple):
  """x -> xW + scale·(xA)B, with matrices folded to [inputs, outputs...]; A and B are an adapter."""
  weight: jax.Array
  a: jax.Array | None = None
  b: jax.Array | None = None
  scale: float = 0.0

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, outputs...]."""
    y = project(x_BTD, self.weight)
    if self.a is None:
      return y
    # (xA)B and not x(AB): the rank is small, and AB is as large as the weight.
    return y + self.scale * project(project(x_BTD, self.a), self.b)


def make(module: nn.Module, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...],
         fan_in: int) -> Linear:
  """The Linear of a module's parameter `name`, with an adapter if config.lora has one for it.

  Args:
    module: has the Config as `config`.
    name: of W, whose shape is inputs + outputs. A is `name`_a of shape inputs + (r,), and B is
      `name`_b of shape (r,) + outputs.
    inputs: the axes that the product sums over.
    outputs: the axes of the result.
    fan_in: 1 over the variance of W's initial values.
  """
  D = math.prod(inputs)
  lora = module.config.lora
  w = module.param(name, normal(fan_in), inputs + outputs).reshape(D, *outputs)
  if lora is None or name not in lora.targets:
    return Linear(w)
  r = lora.rank
  a = module.param(f"{name}_a", normal(D), (*inputs, r)).reshape(D, r)
  # B starts at zero, so a new adapter changes nothing that the model computes.
  b = module.param(f"{name}_b", nn.initializers.zeros, (r, *outputs))
  return Linear(w, a, b, lora.alpha / r)
