"""Caches of the keys and values that a decoder has computed: one array per layer, or pages.

Letters as in `decoder.py`; S are slots of a row, or of a page.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import sharding
from s2d_jax.models.config import Config


class KV(NamedTuple):
  """One layer's keys and values of the tokens so far; slot s of a row is its position s.

  The order of the arrays' axes depends on the backend: see `axes`. An int8 cache has a scale for
  each slot and key head: its largest absolute number divided by 127.
  """
  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None


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
Layer = KV | Pages
# The axes of a KV's arrays, by the backend. On a TPU and a GPU a token's keys are written as one
# piece by a scatter without a loop, and cuDNN reads this order without a copy. On a CPU a query
# reads keys whose last axis is the slots in half the time.
_AXES = {"cpu": ("BKHS", "BKSH", "BKS", "BKS"), "other": ("BSKH", "BSKH", "BKS", "BKS")}
_NAMES = {"B": "batch", "K": "kv_heads", "S": "cache", "H": "head"}


def axes() -> tuple[str, str, str, str]:
  """The axes of each array of a KV on the current backend, a letter each."""
  return _AXES.get(sharding.platform(), _AXES["other"])


def arranged(x: jax.Array, axes: str, order: str) -> jax.Array:
  """An array whose axes are called `axes`, transposed to `order`."""
  return x.transpose([axes.index(letter) for letter in order])


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
  return jnp.full(cache[0].v.shape[0], slots(cache), jnp.int32)


def slots(cache: tuple[KV, ...]) -> int:
  """Number of slots of each row."""
  return cache[0].v.shape[axes()[1].index("S")]


def layers(cache: Cache) -> tuple[Layer, ...]:
  """The part of each layer."""
  return cache.layers if isinstance(cache, Paged) else cache


def with_layers(cache: Cache, layers: Sequence[Layer]) -> Cache:
  """The cache with other layers."""
  return cache._replace(layers=tuple(layers)) if isinstance(cache, Paged) else tuple(layers)


def axis_names(cache: Cache) -> Cache:
  """The cache with the logical names of an array's axes in place of each array."""
  if isinstance(cache, Paged):
    pages = ("kv_heads", "pages", "cache", "head")
    return Paged(tuple(Pages(pages, pages) for _ in cache.layers), ("batch", "cache"), ("batch",))
  names = [tuple(_NAMES[letter] for letter in letters) for letters in axes()]
  return tuple(KV(*(None if x is None else n for x, n in zip(kv, names, strict=True)))
               for kv in cache)


def empty_cache(config: Config, batch: int, slots: int,
                dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[KV, ...]:
  """A KV for each layer, with `slots` slots for each of `batch` rows; `dtype` is float or int8."""
  sizes = {"B": batch, "K": config.kv_heads, "S": slots, "H": config.head_width}
  scale = jnp.float32 if dtype == jnp.int8 else None
  # Slots of a row are on one device, since each new token reads all of them.
  def zeros(letters: str, dtype: jax.typing.DTypeLike | None) -> jax.Array | None:
    if dtype is None:
      return None
    return sharding.constrain(jnp.zeros([sizes[letter] for letter in letters], dtype),
                              *(_NAMES[letter] for letter in letters))
  return tuple(KV(*map(zeros, axes(), (dtype, dtype, scale, scale))) for _ in range(config.layers))


def written(kv: KV, k_BTKH: jax.Array, v_BTKH: jax.Array, position_B: jax.Array) -> KV:
  """The KV with T tokens written to each row, from slot position_B on.

  With one position instead of B, all rows are written from that slot on.
  """
  new = [k_BTKH, v_BTKH]
  if kv.k_scale is not None:
    numbers, scales = zip(_quantized(k_BTKH), _quantized(v_BTKH), strict=True)
    new = [*numbers, *scales]
  return KV(*(_put(old, x, position_B, letters)
              for old, x, letters in zip(kv, new, axes(), strict=False)))


def _quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(int8 numbers, float32 scales) whose product is about x; the largest of a head is 127."""
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
  # A slot of zeros has scale 0; the floor avoids 0 / 0 there.
  return jnp.round(x / jnp.maximum(scale, 1e-30)).astype(jnp.int8), jnp.squeeze(scale, -1)


def _put(old: jax.Array, new: jax.Array, position_B: jax.Array, letters: str) -> jax.Array:
  """`old` with each row of `new` written from its position on; `letters` are the axes of `old`.

  `new` has the axes [B, T, K, H] or [B, T, K].
  """
  # The few new tokens are transposed here, so that no step transposes the whole cache.
  new = arranged(new.astype(old.dtype), "BSKH"[:new.ndim], letters)
  slot = letters.index("S")
  def update(old: jax.Array, new: jax.Array, position: jax.Array, slot: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new, position, slot)
  # A prompt's chunk begins at one slot in all rows.
  if len(position_B) == 1:
    return update(old, new, position_B[0], slot)
  # Rows differ in length, so each is written from a position of its own: a contiguous range of it.
  if sharding.platform() == "cpu":
    return jax.vmap(lambda *row: update(*row, slot - 1))(old, new, position_B)
  # A TPU would run that as a loop over rows. It writes a scatter at once if no index comes twice,
  # all are in order and none is outside, as the slot of a row that has ended may be.
  T = new.shape[slot]
  shape = (*old.shape[:slot], T)
  at = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(slot + 1)]
  start_B = jnp.clip(position_B, 0, old.shape[slot] - T)
  at[slot] += start_B.reshape(-1, *(1,) * slot)
  return old.at[tuple(at)].set(new, unique_indices=True, indices_are_sorted=True,
                               mode="promise_in_bounds")
