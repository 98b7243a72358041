"""Caches of the keys and values that a decoder has computed: one array per layer, or pages.

Letters as in `decoder.py`; S are slots of a row, or of a page.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import sharding
from s2d_jax.models.config import Config


class KV(NamedTuple):
  """One layer's keys and values of the tokens so far; slot s of a row is its position s.

  The slots are the last axis of the keys, as a query reads them. An int8 cache has a scale for each
  slot and key head: its largest absolute number divided by 127.
  """
  k_BKHS: jax.Array
  v_BKSH: jax.Array
  k_scale_BKS: jax.Array | None = None
  v_scale_BKS: jax.Array | None = None


class Pages(NamedTuple):
  """One layer's keys and values in N pages of S tokens, laid out as the kernels read them."""
  k_KNSH: jax.Array
  v_KNSH: jax.Array


class Paged(NamedTuple):
  """A cache in pages: each row's tokens are in the pages that its table lists.

  On a mesh the pages of a device belong to its own rows, and are numbered from 0 on each device.
  """
  layers: tuple[Pages, ...]
  table_Bn: jax.Array  # int32; page 0 belongs to no row, and finished rows write to it
  capacity_B: jax.Array    # int32 number of tokens that a row's pages hold


Cache = tuple[KV, ...] | Paged
SLOT_AXES = (3, 2, 2, 2)  # the axis of each array of a KV that is its slots


def empty_pages(config: Config, batch: int, count: int, size: int, width: int,
                dtype: jax.typing.DTypeLike) -> Paged:
  """A Paged of `count` pages of `size` tokens, for `batch` rows of at most `width` pages each."""
  def pages() -> jax.Array:
    shape = (config.kv_heads, count, size, config.head_width)
    return sharding.constrain(jnp.zeros(shape, dtype), "kv_heads", "pages", "cache", "head")
  # Page 0 belongs to no row, so a table of zeros is one in which no row has a page yet.
  return Paged(tuple(Pages(pages(), pages()) for _ in range(config.layers)),
               jnp.zeros((batch, width), jnp.int32), jnp.zeros(batch, jnp.int32))


def capacity(cache: Cache) -> jax.Array:
  """Number of tokens that the cache can hold of each row, int32 [B]."""
  if isinstance(cache, Paged):
    return cache.capacity_B
  return jnp.full(cache[0].v_BKSH.shape[0], cache[0].v_BKSH.shape[2], jnp.int32)


def empty_cache(config: Config, batch: int, slots: int,
                dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[KV, ...]:
  """A KV for each layer, with `slots` slots for each of `batch` rows; `dtype` is float or int8."""
  B, K, H, S = batch, config.kv_heads, config.head_width, slots
  # Slots of a row are on one device, since each new token reads all of them.
  def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *names: str) -> jax.Array:
    return sharding.constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", *names)
  def layer() -> KV:
    kv = KV(zeros((B, K, H, S), dtype, "head", "cache"),
            zeros((B, K, S, H), dtype, "cache", "head"))
    if dtype != jnp.int8:
      return kv
    return kv._replace(k_scale_BKS=zeros((B, K, S), jnp.float32, "cache"),
                       v_scale_BKS=zeros((B, K, S), jnp.float32, "cache"))
  return tuple(layer() for _ in range(config.layers))


def written(kv: KV, k_BTKH: jax.Array, v_BTKH: jax.Array, position_B: jax.Array) -> KV:
  """The KV with T tokens written to each row, from slot position_B on."""
  # The few new tokens are transposed here, so that no step transposes the whole cache.
  k_BKHT = k_BTKH.transpose(0, 2, 3, 1)
  v_BKTH = v_BTKH.swapaxes(1, 2)
  if kv.k_scale_BKS is not None:
    k_BKHT, k_scale_BKT = _quantized(k_BKHT, 2)
    v_BKTH, v_scale_BKT = _quantized(v_BKTH, 3)
    kv = kv._replace(k_scale_BKS=_put(kv.k_scale_BKS, k_scale_BKT, position_B, 1),
                     v_scale_BKS=_put(kv.v_scale_BKS, v_scale_BKT, position_B, 1))
  return kv._replace(k_BKHS=_put(kv.k_BKHS, k_BKHT, position_B, 2),
                     v_BKSH=_put(kv.v_BKSH, v_BKTH, position_B, 1))


def _quantized(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """(int8 numbers, float32 scales) whose product is about x; the largest number is 127."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
  # A slot of zeros has scale 0; the floor avoids 0 / 0 there.
  return (jnp.round(x / jnp.maximum(scale, 1e-30)).astype(jnp.int8), jnp.squeeze(scale, axis))


def _put(old: jax.Array, new: jax.Array, position_B: jax.Array, axis: int) -> jax.Array:
  """`old` with each row of `new` written from its position on; `axis` is that of a row's slots."""
  # Rows differ in length, so each is written from a position of its own. A scatter of the slots
  # could say as much, but this update writes one contiguous range of a row.
  def row(old: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    starts = [0] * old.ndim
    starts[axis] = position
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), starts)
  return jax.vmap(row)(old, new, position_B)
