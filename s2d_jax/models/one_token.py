"""One token of every row with a cache, on a GPU: the layers of `decoder.py` in fewer kernels.

XLA makes 14 kernels of a layer, most of which move little and take the two microseconds of a
launch. Two kernels here, in Pallas, do what stands between the products:

  heads          the norms of query and key heads, their rotation, and the writes into the cache
  residual_norm  the end of a product, the residual and the norm that follows

The numbers are those of `decoder.Block`: norms and rotation in float32, in its order, rounded to
the activations' type where it rounds. Sums of float32 may be added in another order. Letters as in
`decoder.py`; P are the parts of a product, which are added up in float32.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from s2d_jax import sharding
from s2d_jax.models import attention, caches, kernels
from s2d_jax.models.config import Config
from s2d_jax.sharding import Params

# XLA, too, splits the sum of these products, so that 132 processors have a tile each: with one
# part, 64 rows by 2,048 outputs would be 32 tiles.
_TILES = 256
_TILE = 64 * 64
_LEAST_WIDTH = 128  # of a block of a row that is read at once
_MOST_WIDTH = 2048


def applies(config: Config, tokens: int, cache: caches.Cache) -> bool:
  """Whether `features` computes `tokens` tokens of every row with this cache on this backend."""
  if (not kernels.available() or sharding.platform() != "gpu" or sharding.splits_heads()
      or tokens != 1 or config.lora is not None or isinstance(cache, caches.Paged)):
    return False
  implementation = attention.choose(config.attention, config.dtype, config.head_width)
  # Blocks of a kernel are powers of two.
  return (attention.cudnn_reads(implementation, cache[0].k.dtype, config.dtype)
          and math.log2(config.head_width).is_integer()
          and config.width % _LEAST_WIDTH == config.mlp % _LEAST_WIDTH == 0)


def features(config: Config, params: Params, x_BD: jax.Array, y_BD: jax.Array,
             angle_BH2: jax.Array, position_B: jax.Array, cache: tuple[caches.KV, ...],
             interpret: bool = False) -> tuple[jax.Array, tuple[caches.KV, ...]]:
  """(the features after the final norm [B, D], the cache with the tokens in it).

  Args:
    config: of a model that `applies` is true of.
    params: the parameters, with the layers as a tuple.
    x_BD: the tokens' vectors.
    y_BD: the same after the first layer's norm.
    angle_BH2: RoPE's angles.
    position_B: the tokens' positions, which are their slots.
    cache: of each layer.
    interpret: for tests, on a device that is not a GPU.
  """
  c = config
  implementation = attention.choose(c.attention, c.dtype, c.head_width)
  layers = params["layers"]
  scales = [layer["attn_norm"] for layer in layers[1:]] + [params["norm"]]
  # Of all layers once.
  cos_BH2, sin_BH2 = jnp.cos(angle_BH2), jnp.sin(angle_BH2)
  mask_B1S = jnp.arange(caches.slots(cache))[None, None] <= position_B[:, None, None]
  written = []
  for layer, kv, scale_D in zip(layers, cache, scales, strict=True):
    attn, mlp = layer["attn"], layer["mlp"]
    qkv_PBM = product(y_BD, attn["q"], attn["k"], attn["v"])
    q_BNH, k, v = heads(
        qkv_PBM, attn.get("q_norm"), attn.get("k_norm"), cos_BH2, sin_BH2, position_B, kv.k, kv.v,
        c.norm_eps, interpret)
    out_B1NH = attention.cached(implementation, q_BNH[:, None], k, v, None, None,
                                caches.axes()[:2], mask_B1S, position_B + 1)
    out_PBD = product(out_B1NH.reshape(len(x_BD), -1), attn["o"].reshape(-1, c.width))
    x_BD, y_BD = residual_norm(x_BD, out_PBD, layer["mlp_norm"], c.norm_eps, interpret)
    gate_DF, up_DF = (mlp[name].astype(y_BD.dtype) for name in ("gate", "up"))
    hidden_BF = nn.silu(y_BD @ gate_DF) * (y_BD @ up_DF)
    out_PBD = product(sharding.constrain(hidden_BF, "batch", "mlp"), mlp["down"])
    x_BD, y_BD = residual_norm(x_BD, out_PBD, scale_D, c.norm_eps, interpret)
    written.append(caches.KV(k, v))
  return y_BD, tuple(written)


def product(x_BD: jax.Array, *weights: jax.Array) -> jax.Array:
  """x · the weights [D, …] side by side, as float32 parts whose sum it is: [P, B, outputs]."""
  B, D = x_BD.shape
  w_DM = jnp.concatenate([w.reshape(D, -1).astype(x_BD.dtype) for w in weights], axis=1)
  parts = _parts(B, D, w_DM.shape[1])
  return jnp.einsum("BPD,PDM->PBM", x_BD.reshape(B, parts, -1), w_DM.reshape(parts, D // parts, -1),
                    preferred_element_type=jnp.float32)


def _parts(rows: int, width: int, outputs: int) -> int:
  """The number of parts of a product: a power of two, with tiles for all of a card's processors."""
  parts = 1
  # A part of at least 256, because a shorter one is mostly the writing of its result.
  while rows * outputs * parts < _TILES * _TILE and width % (512 * parts) == 0 and parts < 8:
    parts *= 2
  return parts


def heads(qkv_PBM: jax.Array, q_norm_H: jax.Array | None, k_norm_H: jax.Array | None,
          cos_BH2: jax.Array, sin_BH2: jax.Array, position_B: jax.Array, k_BSKH: jax.Array,
          v_BSKH: jax.Array, eps: float,
          interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(queries after norm and rotation [B, N, H], the two caches with the tokens in them).

  Args:
    qkv_PBM: parts of the N query heads, K key heads and K value heads side by side.
    q_norm_H, k_norm_H: scales of the heads' norms, None without them.
    cos_BH2, sin_BH2: of RoPE's angles.
    position_B: the slot that a row is written to.
    k_BSKH, v_BSKH: a layer's cache, which is written in place.
    eps: of the norms.
    interpret: as `features`.
  """
  K, H = k_BSKH.shape[2:]
  P, _, M = qkv_PBM.shape
  N = M // H - 2 * K
  norms = () if q_norm_H is None else (q_norm_H, k_norm_H)

  def local(qkv_PBM, cos_BH2, sin_BH2, position_B, k_BSKH, v_BSKH, *norms):
    B = len(position_B)
    args = (qkv_PBM.reshape(P, B, N + 2 * K, H), cos_BH2, sin_BH2, position_B, *norms, k_BSKH,
            v_BSKH)
    return kernels.call(
        functools.partial(_heads, N, eps, bool(norms)), (B, K), args,
        (jax.ShapeDtypeStruct((B, N, H), k_BSKH.dtype), k_BSKH, v_BSKH), "decode_heads", warps=1,
        in_place={len(args) - 2: 1, len(args) - 1: 2}, interpret=interpret)

  rows = ("batch",)
  cache = ("batch", "cache", "kv_heads", "head")
  return sharding.per_shard(
      local, (qkv_PBM, cos_BH2, sin_BH2, position_B, k_BSKH, v_BSKH, *norms),
      (("layer", "batch", "head"), ("batch", "head"), ("batch", "head"), rows, cache, cache,
       *(("head",) for _ in norms)), (3, 4, 5))


def _heads(N: int, eps: float, normed: bool, qkv_PBXH, cos_BH2, sin_BH2, position_B, *refs) -> None:
  """The kernel of one key head of a row, with the query heads that read it."""
  norms, (q_BNH, k_BSKH, v_BSKH) = refs[:2 * normed], refs[-3:]
  S, K, H = k_BSKH.shape[1:]
  b, h = pl.program_id(0), pl.program_id(1)
  halves = (pl.ds(0, H // 2), pl.ds(H // 2, H // 2))
  # A row that has ended may be beyond its cache, where a write would be into another row.
  position = jnp.clip(position_B[b], 0, S - 1)
  cos, sin = cos_BH2[b, :], sin_BH2[b, :]
  dtype = q_BNH.dtype

  def read(x: int) -> list[jax.Array]:
    """The two halves of a head of the product, in the activations' type."""
    return [_sum(qkv_PBXH, b, x, half).astype(dtype) for half in halves]

  def turned(pair: list[jax.Array], norm) -> list[jax.Array]:
    first, second = (x.astype(jnp.float32) for x in pair)
    if norm is not None:
      scale = jax.lax.rsqrt((jnp.sum(first * first) + jnp.sum(second * second)) / H + eps)
      first, second = ((x * scale * norm[half]).astype(dtype).astype(jnp.float32)
                       for x, half in zip((first, second), halves, strict=True))
    return [(first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)]

  q_norm, k_norm = norms or (None, None)
  R = N // K
  for r in range(R):
    for half, x in zip(halves, turned(read(h * R + r), q_norm), strict=True):
      q_BNH[b, h * R + r, half] = x
  for half, k, v in zip(halves, turned(read(N + h), k_norm), read(N + K + h), strict=True):
    k_BSKH[b, position, h, half] = k
    v_BSKH[b, position, h, half] = v


def residual_norm(x_BD: jax.Array, out_PBD: jax.Array, scale_D: jax.Array, eps: float,
                  interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """(x plus the sum of a product's parts, that after a norm with these scales), both [B, D].

  Args:
    interpret: as `features`.
  """
  def local(x_BD, out_PBD, scale_D):
    return kernels.call(functools.partial(_residual_norm, eps), (len(x_BD),),
                        (x_BD, out_PBD, scale_D), (x_BD, x_BD), "decode_norm", warps=8,
                        interpret=interpret)

  return sharding.per_shard(
      local, (x_BD, out_PBD, scale_D),
      (("batch", "embed"), ("layer", "batch", "embed"), ("embed",)), (0, 0))


def _residual_norm(eps: float, x_BD, out_PBD, scale_D, new_BD, y_BD) -> None:
  """The kernel of one row."""
  D = x_BD.shape[1]
  b = pl.program_id(0)
  size = min(D & -D, _MOST_WIDTH)
  blocks = [pl.ds(start, size) for start in range(0, D, size)]
  xs = []
  for block in blocks:
    out = _sum(out_PBD, b, block).astype(x_BD.dtype)
    x = (x_BD[b, block].astype(jnp.float32) + out.astype(jnp.float32)).astype(x_BD.dtype)
    new_BD[b, block] = x
    xs.append(x.astype(jnp.float32))
  scale = jax.lax.rsqrt(sum(jnp.sum(x * x) for x in xs) / D + eps)
  for block, x in zip(blocks, xs, strict=True):
    y_BD[b, block] = (x * scale * scale_D[block]).astype(y_BD.dtype)


def _sum(parts, *index) -> jax.Array:
  """The sum over the first axis of a Ref at an index of the others, one part after the other."""
  return sum((parts[p, *index] for p in range(1, parts.shape[0])), start=parts[0, *index])
