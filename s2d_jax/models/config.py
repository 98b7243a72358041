"""The Config of a decoder: its shape, its constants and how it is run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from s2d_jax.errors import InputError
from s2d_jax.models import attention

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PRODUCT = "product"  # the checkpoint name of every result of `project`
STORED = "stored"    # of what the policy "named" stores beside attention's results


def _storing(*names: str) -> Callable[..., bool]:
  """The policy that stores attention's results, and values of these checkpoint names."""
  by_name = jax.checkpoint_policies.save_only_these_names(attention.RESULT, *names)

  def policy(primitive: jax.extend.core.Primitive, *args: Any, **params: Any) -> bool:
    # cuDNN's kernel has no names inside. Both of its results are stored, the output and the
    # softmax's log-sums, or the backward pass would run the kernel a second time.
    return (primitive.name.startswith("dot_product_attention_fwd")
            or by_name(primitive, *args, **params))

  return policy


# Rematerialization: a layer keeps for its backward pass everything, only its input, the results of
# its products with weights, those in the host's memory, its input and attention's results, or these
# with the queries, keys, values, features after attention, gate and up.
POLICIES = {
    "none": None, "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(), names_which_can_be_offloaded=(PRODUCT,),
        offload_src="device", offload_dst="pinned_host"),
    "attention": _storing(), "named": _storing(STORED)}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's scaling of RoPE: long waves get frequencies that are `factor` times lower."""
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")  # the matrices that an adapter may stand on


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters (https://arxiv.org/abs/2106.09685): y = xW + (alpha / rank)·(xA)B."""
  rank: int
  alpha: float
  targets: tuple[str, ...]  # of ADAPTED

  def __post_init__(self) -> None:
    unknown = sorted(set(self.targets) - set(ADAPTED))
    if self.rank < 1 or self.alpha <= 0 or unknown or not self.targets:
      raise InputError(f"lora has rank {self.rank}, alpha {self.alpha} and targets {self.targets}: "
                       "choose a rank of 1 or more, alpha above 0 and targets from "
                       f"{', '.join(ADAPTED)}.")


# Frozen, because `models.build` caches by it, and equal configs must be one compiled model.
@dataclasses.dataclass(frozen=True)
class Config:
  """A decoder's shape and constants, and in its last four fields how it is run."""
  architecture: str  # the family's key in models.FAMILIES
  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  mlp: int
  norm_eps: float
  rope_theta: float
  rope_scaling: RopeScaling | None
  qk_norm: bool  # RMSNorm on every query and key head (Qwen3)
  tied: bool  # the embedding is also the unembedding
  max_positions: int
  dtype: str = "float32"  # of the activations
  remat: str = "none"  # of POLICIES; "auto": a stage chooses for its update, else "block"
  attention: str = "auto"  # of attention.IMPLEMENTATIONS
  lora: Lora | None = None  # adapters in addition to the weights

  def __post_init__(self) -> None:
    # Each key head serves a group of query heads, and all groups have one size.
    if self.heads % self.kv_heads:
      raise InputError(f"{self.heads} query heads do not share {self.kv_heads} key heads evenly: "
                       "num_attention_heads must be a multiple of num_key_value_heads.")
    # 0 where a file without head_dim has more heads than the width.
    if self.head_width % 2 or self.head_width < 2:
      raise InputError(f"head_dim {self.head_width} is {'odd' if self.head_width else 'zero'} and "
                       "RoPE rotates pairs: use an even one.")
    # Checked here, because a misspelt choice would otherwise appear only when the model is traced.
    for key, choices in (("dtype", DTYPES), ("remat", (*POLICIES, "auto")),
                         ("attention", attention.IMPLEMENTATIONS)):
      if getattr(self, key) not in choices:
        raise InputError(f"{key} {getattr(self, key)!r} is unknown: choose it from "
                         f"{', '.join(choices)}.")
