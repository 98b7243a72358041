"""The decoder-only transformer that Qwen3 and Llama 3 both are.

Shapes live in names, here and everywhere in the package:

  P prompts · G samples per prompt · B = P·G sequences · T tokens · S cache slots · V vocabulary ·
  D width · N query heads · K key/value heads · R = N/K · H head width · F MLP width · L layers

Parameters are a plain nested dict; the layers are stacked on a leading L axis and scanned.
Norms, softmax and RoPE are float32 whatever the type of the activations.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from s2d_jax import sharding
from s2d_jax.models import attention, caches

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What a layer keeps for the way back: everything, its input alone, the results of its products with
# weights, or those in the host's memory.
PRODUCT = "product"  # the name of what `project` gives
POLICIES = {
    "none": None, "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(), names_which_can_be_offloaded=(PRODUCT,),
        offload_src="device", offload_dst="pinned_host")}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretch of RoPE: frequencies `factor` times slower where the wave is long."""
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters (https://arxiv.org/abs/2106.09685): y = xW + (alpha / rank)·(xA)B."""
  rank: int
  alpha: float
  targets: tuple  # of ADAPTED

  def __post_init__(self):
    unknown = sorted(set(self.targets) - set(ADAPTED))
    if self.rank < 1 or self.alpha <= 0 or unknown or not self.targets:
      raise ValueError(f"lora has rank {self.rank}, alpha {self.alpha} and targets {self.targets}: "
                       "choose a rank of 1 or more, alpha above 0 and targets from "
                       f"{', '.join(ADAPTED)}.")


@dataclasses.dataclass(frozen=True)
class Config:
  """A decoder's shape and numbers; the last four say how to run it, not what it is."""
  architecture: str  # "qwen3" or "llama": whose weight table
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
  remat: str = "none"  # of POLICIES
  attention: str = "auto"  # of attention.IMPLEMENTATIONS
  lora: Lora | None = None  # adapters beside the weights

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(f"{self.heads} query heads do not share {self.kv_heads} key heads evenly: "
                       "num_attention_heads must be a multiple of num_key_value_heads.")
    if self.head_width % 2:
      raise ValueError(f"head_dim {self.head_width} is odd and RoPE turns pairs: use an even one.")
    for key, choices in (("dtype", DTYPES), ("remat", POLICIES),
                         ("attention", attention.IMPLEMENTATIONS)):
      if getattr(self, key) not in choices:
        raise ValueError(f"{key} {getattr(self, key)!r} is unknown: choose it from "
                         f"{', '.join(choices)}.")


def rms_norm(x, scale, eps):
  """x / √(mean(x²) + eps) · scale over the last axis (https://arxiv.org/abs/1910.07467)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def rope_frequencies(head_width, theta, scaling):
  """Radians per position of each of the H/2 pairs: theta^(−2i/H), stretched by `scaling`.

  RoPE (https://arxiv.org/abs/2104.09864). Llama 3.1 (https://arxiv.org/abs/2407.21783) divides
  by `factor` the frequencies whose wave is longer than original/low, keeps those whose wave is
  shorter than original/high and blends the ones between.
  """
  frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
  if scaling is None:
    return frequency
  waves = scaling.original_max_positions * frequency / (2 * jnp.pi)  # in the original window
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = jnp.clip((waves - low) / (high - low), 0.0, 1.0)
  return frequency * (kept + (1 - kept) / scaling.factor)


def rope(x_BTNH, angle_BTH2):
  """Turns the pair (x_i, x_{i+H/2}) of each head by the angle of its position, in float32."""
  angle_BTNH2 = jnp.broadcast_to(
      angle_BTH2[:, :, None], x_BTNH.shape[:-1] + angle_BTH2.shape[-1:])
  cos, sin = jnp.cos(angle_BTNH2), jnp.sin(angle_BTNH2)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTNH.dtype)


def normal(fan_in):
  """Draws of standard deviation 1/√fan_in, which keep the size of what they multiply."""
  return nn.initializers.normal(fan_in**-0.5)


def project(x_BTD, weight):
  """x · weight over the width, in the type of x: [B, T, D], [D, …] -> [B, T, …].

  The gradient of the weight is at least float32, and is added up over devices in that.
  """
  B, T, D = x_BTD.shape
  # Rows and times are one axis and so are the outputs: on CPU the gradient of the same einsum with
  # its axes apart spends as long copying transposes as multiplying.
  y = _product(x_BTD.reshape(-1, D), weight.reshape(D, -1))
  return checkpoint_name(y.reshape(B, T, *weight.shape[1:]), PRODUCT)


@jax.custom_vjp
def _product(x_ND, w_DM):
  return x_ND @ w_DM.astype(x_ND.dtype)


def _product_back(saved, dy_NM):
  x_ND, w_DM = saved
  dw_DM = jnp.matmul(x_ND.T, dy_NM, preferred_element_type=jnp.float32)
  return dy_NM @ w_DM.astype(x_ND.dtype).T, dw_DM.astype(w_DM.dtype)


_product.defvjp(lambda x_ND, w_DM: (_product(x_ND, w_DM), (x_ND, w_DM)), _product_back)


class Linear(NamedTuple):
  """x -> xW + scale·(xA)B, its matrices folded to [inputs, outputs...]; no adapter, no A and B."""
  weight: jax.Array
  a: jax.Array | None = None
  b: jax.Array | None = None
  scale: float = 0.0

  def __call__(self, x_BTD):
    y = project(x_BTD, self.weight)
    return y if self.a is None else y + self.scale * project(project(x_BTD, self.a), self.b)


def linear(module, name, inputs, outputs, fan_in):
  """The Linear of a module's parameter `name`, with its adapter where config.lora has one.

  W is of shape inputs + outputs, A and B are `name`_a, inputs + (r,), and `name`_b, (r,) + outputs.
  """
  def weight(name, init, shape, folded):
    return module.param(name, init, shape).reshape(folded)
  D, lora = math.prod(inputs), module.config.lora
  w = weight(name, normal(fan_in), inputs + outputs, (D, *outputs))
  if lora is None or name not in lora.targets:
    return Linear(w)
  r, zeros = lora.rank, nn.initializers.zeros
  return Linear(w, weight(f"{name}_a", normal(D), (*inputs, r), (D, r)),
                weight(f"{name}_b", zeros, (r, *outputs), (r, *outputs)), lora.alpha / r)


class Attention(nn.Module):
  """Grouped-query self-attention, with its layer's part of the cache when there is one."""
  config: Config
  how: str  # which implementation

  @nn.compact
  def __call__(self, x_BTD, angle_BTH2, reads, at_B, kv):
    c = self.config
    D, N, K, H = c.width, c.heads, c.kv_heads, c.head_width
    q = linear(self, "q", (D,), (N, H), D)
    k = linear(self, "k", (D,), (K, H), D)
    v = linear(self, "v", (D,), (K, H), D)
    o = linear(self, "o", (N, H), (D,), N * H * 2 * c.layers)
    q_BTNH, k_BTKH, v_BTKH = q(x_BTD), k(x_BTD), v(x_BTD)
    if c.qk_norm:
      q_BTNH = rms_norm(q_BTNH, self.param("q_norm", nn.initializers.ones, (H,)), c.norm_eps)
      k_BTKH = rms_norm(k_BTKH, self.param("k_norm", nn.initializers.ones, (H,)), c.norm_eps)
    q_BTNH = sharding.constrain(rope(q_BTNH, angle_BTH2), "batch", "time", "heads", "head")
    k_BTKH = sharding.constrain(rope(k_BTKH, angle_BTH2), "batch", "time", "kv_heads", "head")
    v_BTKH = sharding.constrain(v_BTKH, "batch", "time", "kv_heads", "head")

    if kv is None:
      out_BTNH = attention.attention(self.how, q_BTNH, k_BTKH, v_BTKH, reads)
    elif isinstance(kv, caches.Pages):
      out_BTNH, *kv = attention.paged(q_BTNH, k_BTKH, v_BTKH, *kv, reads.table_Bn, at_B)
      kv = caches.Pages(*kv)
    else:
      kv = caches.written(kv, k_BTKH, v_BTKH, at_B)
      out_BTNH = attention.cached(q_BTNH, *kv, reads.mask_BTS)
    out_BTNH = sharding.constrain(out_BTNH, "batch", "time", "heads", "head")
    out_BTM = out_BTNH.reshape(*out_BTNH.shape[:2], N * H)
    return o(out_BTM), kv


class MLP(nn.Module):
  """SwiGLU: down(silu(gate x) · up x) (https://arxiv.org/abs/2002.05202)."""
  config: Config

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    D, F = c.width, c.mlp
    gate = linear(self, "gate", (D,), (F,), D)
    up = linear(self, "up", (D,), (F,), D)
    down = linear(self, "down", (F,), (D,), F * 2 * c.layers)
    hidden_BTF = sharding.constrain(nn.silu(gate(x_BTD)) * up(x_BTD), "batch", "time", "mlp")
    return down(hidden_BTF)


class Block(nn.Module):
  """One layer, residual around attention and around the MLP, with its part of the cache or None."""
  config: Config
  how: str

  @nn.compact
  def __call__(self, x_BTD, angle_BTH2, reads, at_B=None, kv=None):
    c = self.config
    scale_D = self.param("attn_norm", nn.initializers.ones, (c.width,))
    y_BTD, kv = Attention(c, self.how, name="attn")(
        rms_norm(x_BTD, scale_D, c.norm_eps), angle_BTH2, reads, at_B, kv)
    x_BTD = sharding.constrain(x_BTD + y_BTD, "batch", "time", "embed")
    scale_D = self.param("mlp_norm", nn.initializers.ones, (c.width,))
    y_BTD = MLP(c, name="mlp")(rms_norm(x_BTD, scale_D, c.norm_eps))
    x_BTD = sharding.constrain(x_BTD + y_BTD, "batch", "time", "embed")
    return x_BTD, kv


def unstacked(params, config):
  """The parameters with a tree of its own for each layer, as reading with a cache takes them too.
  """
  return params | {"layers": tuple(_layer(params["layers"], i) for i in range(config.layers))}


def _layer(layers, i):
  return layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda w: w[i], layers)


class Decoder(nn.Module):
  """Tokens to the features after the final norm; `unembed` times those are the logits."""
  config: Config

  @nn.compact
  def __call__(self, tokens_BT, positions_BT, segments_BT, cache=None):
    c = self.config
    embed_VD = self.param("embed", normal(c.width), (c.vocab_size, c.width))
    if not c.tied:
      self.param("unembed", normal(c.width), (c.vocab_size, c.width))
    # Whole rows before the look-up, or XLA would replicate its result to split it by rows.
    table_VD = sharding.constrain(embed_VD, "vocab", "embed")
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(DTYPES[c.dtype])
    x_BTD = sharding.constrain(x_BTD, "batch", "time", "embed")

    frequency = rope_frequencies(c.head_width, c.rope_theta, c.rope_scaling)
    # A product, not a dot: matrix units may round their operands.
    angle_BTH2 = positions_BT[..., None].astype(jnp.float32) * frequency[None, None]
    if cache is None:
      how = attention.choose(c.attention, c.dtype, c.head_width)
      reads = attention.reading(how, positions_BT, segments_BT)
      block = Block
      if c.remat != "none":
        block = nn.remat(Block, prevent_cse=False, policy=POLICIES[c.remat])
      layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                       length=c.layers, in_axes=(nn.broadcast, nn.broadcast))
      x_BTD, _ = layers(c, how, name="layers")(x_BTD, angle_BTH2, reads)
    else:
      x_BTD, cache = self._with_cache(x_BTD, positions_BT, angle_BTH2, cache)
    scale_D = self.param("norm", nn.initializers.ones, (c.width,))
    return sharding.constrain(rms_norm(x_BTD, scale_D, c.norm_eps), "batch", "time", "embed"), cache

  def _with_cache(self, x_BTD, positions_BT, angle_BTH2, cache):
    """The same layers, one by one: a loop over them would copy each one's weights and cache."""
    if isinstance(cache, caches.Paged):
      reads, layers = attention.Reading(None, None, cache.table_Bn), cache.layers
    else:
      T, S, layers = positions_BT.shape[1], cache[0].v_BKSH.shape[2], cache
      if T > S:
        raise ValueError(f"{T} tokens do not fit a cache of {S} slots: make it longer.")
      reads = attention.Reading(None, jnp.arange(S)[None, None] <= positions_BT[..., None])
    block, kept = Block(self.config, "cached", parent=None), []
    for layer, kv in enumerate(layers):
      params = _layer(self.variables["params"]["layers"], layer)
      x_BTD, kv = block.apply({"params": params}, x_BTD, angle_BTH2, reads, positions_BT[:, 0], kv)
      kept.append(kv)
    kept = tuple(kept)
    return x_BTD, cache._replace(layers=kept) if isinstance(cache, caches.Paged) else kept
