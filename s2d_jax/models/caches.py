"""What a decoder has read so far: keys and values, a row's side by side or in pages.

Letters as in `decoder.py`; S are slots of a row, or of a page.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import sharding


class KV(NamedTuple):
  """One layer's keys and values of what was read so far: slot s of a row is its position s.

  Keys lie with their slots last, as a query reads them. Kept in int8 there is a scale for each slot
  and key head, the largest of its numbers by 127; else none.
  """
  k_BKHS: jax.Array
  v_BKSH: jax.Array
  k_scale_BKS: jax.Array | None = None
  v_scale_BKS: jax.Array | None = None


class Pages(NamedTuple):
  """One layer's keys and values in N pages of S tokens, as the kernels that read them want them."""
  k_KNSH: jax.Array
  v_KNSH: jax.Array


class Paged(NamedTuple):
  """A cache in pages: a row holds those that its table names, and nobody else reads what is there.

  The pages of a mesh's device are its own rows', and are counted on it from 0.
  """
  layers: tuple        # of Pages
  table_Bn: jax.Array  # int32; page 0 is nobody's, for rows that have ended
  room_B: jax.Array    # int32 tokens that a row's pages hold


def empty_pages(config, batch, count, size, width, dtype):
  """A Paged of `count` pages of `size` tokens, in tables of `width` pages a row."""
  def pages():
    shape = (config.kv_heads, count, size, config.head_width)
    return sharding.constrain(jnp.zeros(shape, dtype), "kv_heads", "pages", "cache", "head")
  return Paged(tuple(Pages(pages(), pages()) for _ in range(config.layers)),
               jnp.zeros((batch, width), jnp.int32), jnp.zeros(batch, jnp.int32))


def room(cache):
  """Tokens that the cache holds of each row, [B]."""
  if isinstance(cache, Paged):
    return cache.room_B
  return jnp.full(cache[0].v_BKSH.shape[0], cache[0].v_BKSH.shape[2], jnp.int32)


SLOT_AXES = (3, 2, 2, 2)  # which axis of each of a KV's arrays are the slots


def empty_cache(config, batch, slots, dtype=jnp.float32):
  """A KV for each layer: `slots` slots for each of `batch` rows, of float or int8 numbers."""
  B, K, H, S = batch, config.kv_heads, config.head_width, slots
  def layer():
    scales = ()
    if dtype == jnp.int8:
      scales = tuple(_slots(jnp.zeros((B, K, S), jnp.float32), "cache") for _ in "kv")
    return KV(_slots(jnp.zeros((B, K, H, S), dtype), "head", "cache"),
              _slots(jnp.zeros((B, K, S, H), dtype), "cache", "head"), *scales)
  return tuple(layer() for _ in range(config.layers))


def _slots(x, *names):
  return sharding.constrain(x, "batch", "kv_heads", *names)


def written(kv, k_BTKH, v_BTKH, at_B):
  """The KV with T slots of each row, from at_B on, filled."""
  k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
  scales = ()
  if kv.k_scale_BKS is not None:
    k_BKHT, k_scale_BKT = _rounded(k_BKHT, 2)
    v_BKTH, v_scale_BKT = _rounded(v_BKTH, 3)
    scales = (_put(kv.k_scale_BKS, k_scale_BKT, at_B, 1),
              _put(kv.v_scale_BKS, v_scale_BKT, at_B, 1))
  return KV(_put(kv.k_BKHS, k_BKHT, at_B, 2), _put(kv.v_BKSH, v_BKTH, at_B, 1), *scales)


def _rounded(x, axis):
  """(int8 numbers, float32 scales): x is about numbers · scale, 127 being the largest."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
  return (jnp.round(x / jnp.maximum(scale, 1e-30)).astype(jnp.int8), jnp.squeeze(scale, axis))


def _put(old, new, at_B, axis):
  def row(old, new, at):
    places = [0] * old.ndim
    places[axis] = at
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), places)
  return jax.vmap(row)(old, new, at_B)
