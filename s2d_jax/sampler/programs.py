"""Everything a sampler runs on the device, compiled ahead of time for a short list of shapes."""

import functools
import itertools
import math
import os
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax import keys, models, sharding
from s2d_jax.keys import Key
from s2d_jax.models import attention, caches
from s2d_jax.sampler import decode

SIZES = 4  # batches and lengths of the cache that programs are compiled for: halves of the largest
LEAST_BATCH, LEAST_LENGTH = 8, 128
# The same of batches on a CPU, for models of so many weights: a row less is worth a program there.
FINE_SIZES, FINE_LEAST_BATCH, FINE_WEIGHTS = 5, 4, 10_000_000
PROMPTS = 16  # at most so many are read at once on a device
KINDS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


class Room(NamedTuple):
  """How a sampler uses a device; samples depend on it by rounding alone."""
  cache_gib: float = 4.0  # of each device's memory, for the cache: the number of slots follows
  tokens: int = 32        # at most so many of each row in one dispatch
  chunk: int = 256        # tokens of a prompt that are read at a time
  cache: str = "auto"     # its numbers: float32, bfloat16, int8, or those of the activations
  page: int = 0           # tokens of a page, of which rows hold as many as they fill; 0: no pages

  KEYS = {
      "cache_gib": Key(lambda gib: 0 < gib < math.inf, "choose a number above 0", default=4.0),
      "tokens": keys.at_least(1, default=32),
      "chunk": keys.at_least(1, default=256),
      "cache": keys.one_of(("auto", *KINDS), neutral="auto"),
      "page": Key(lambda tokens: tokens >= 0, "choose 0 (no pages) or more", neutral=0)}

  def narrow(self, dtype):
    """Has the cache fewer bits than activations of `dtype`, so that something is lost in it?"""
    kept, given = (jnp.dtype(KINDS[name]).itemsize for name in (
        dtype if self.cache == "auto" else self.cache, dtype))
    return kept < given

  def exact(self):
    """The same with a cache of the activations: for what is not held against the trainer first."""
    return self._replace(cache="auto")


class Programs(NamedTuple):
  """What is compiled for a sampler."""
  shapes: Any
  room: Room
  slots: dict     # (batch, length) -> abstract Slots
  prepare: Any
  empty: Any      # at the largest batch and the shortest length
  prefill: Any
  admit: dict     # length -> program
  decode: dict    # (batch, length) -> program
  grow: dict      # (batch, length) -> program, to the next length
  shorten: dict   # length -> program, of the largest batch to the length before
  shrink: dict    # (batch, length) -> program, to the next batch


def halves(largest, least, multiple, sizes=SIZES):
  """`largest` and its halves down to `least`, at most `sizes`, rounded up to the multiple; falling.
  """
  found = [largest]
  while len(found) < sizes and found[-1] // 2 >= least:
    found.append(_up(-(-found[-1] // 2), multiple))
  return tuple(dict.fromkeys(found))


def batch_sizes(largest, multiple, weights):
  """Rows that decoding is compiled for, falling, of a model of so many weights.

  A step on an accelerator is mostly the reading of weights: halves are enough, and for a small
  model as well. On a CPU a row is arithmetic: a large model has smaller batches too, and three
  quarters of those from 16 on.
  """
  if sharding.platform() != "cpu" or weights < FINE_WEIGHTS:
    return halves(largest, LEAST_BATCH, multiple)
  found = halves(largest, FINE_LEAST_BATCH, multiple, FINE_SIZES)
  between = {_up(-(-3 * B // 4), multiple) for B in found if B >= 16}
  return tuple(sorted(between.union(found), reverse=True))


def _up(count, multiple):
  return -(-count // multiple) * multiple


def cache_type(config, room):
  """The type of the numbers in a cache."""
  return KINDS[config.dtype if room.cache == "auto" else room.cache]


def slot_bytes(config, length, dtype):
  """Bytes of one row's cache on a device that has its part of the key heads."""
  shapes = jax.eval_shape(lambda: caches.empty_cache(config, 1, length, dtype))
  mesh, heads = sharding.current_mesh(), config.kv_heads
  parts = 1 if mesh is None else sharding.shard_count(mesh, "kv_heads", heads)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) // parts


def slots_for(config, room, rows, longest, spent, dtype):
  """How many slots each device has: for its share of the rows, or as many as fit its memory.

  `spent` bytes of it are taken already.

  Raises:
    ValueError: it does not hold one row.
  """
  one = slot_bytes(config, longest, dtype)
  fit = int(room.cache_gib * 2**30 - spent) // one
  if fit < 1:
    raise ValueError(f"one row of {longest} tokens and the reading of a prompt need "
                     f"{(one + spent) / 2**30:.2g} GiB on a device and config.sampler.cache_gib is "
                     f"{room.cache_gib}: raise it, or lower max_tokens.")
  return min(rows, fit)


CROWD = 2  # rows for each that has room to its end: few come to that, and who finds no page waits


def pages_for(config, room, rows, longest, spent, dtype):
  """(slots of each device, its pages, pages of the longest row), as `slots_for`.

  Raises:
    ValueError: pages that a GPU does not read, key heads that `tensor` does not divide, or not one
      row fits.
  """
  mesh = sharding.current_mesh()
  if mesh is not None and mesh.shape["tensor"] != sharding.shard_count(
      mesh, "kv_heads", config.kv_heads):
    raise ValueError(f"config.sampler.page is {room.page}, and the mesh's tensor of "
                     f"{mesh.shape['tensor']} does not divide {config.kv_heads} key heads: set it "
                     "to 0.")
  if sharding.platform() == "gpu" and room.page not in (16, 32, 64):
    raise ValueError(f"config.sampler.page is {room.page} and the GPU's kernel reads pages of 16, "
                     "32 or 64 tokens: choose one of those.")
  most, one = -(-longest // room.page), slot_bytes(config, room.page, dtype)
  count = int(room.cache_gib * 2**30 - spent) // one
  if count <= most:
    raise ValueError(f"one row of {longest} tokens needs {most + 1} pages of {one:,} bytes on a "
                     f"device and config.sampler.cache_gib is {room.cache_gib}: raise it, or lower "
                     "max_tokens.")
  own = min(rows, CROWD * ((count - 1) // most))
  return own, min(count, own * most + 1), most


class Shapes(NamedTuple):
  """What a sampler's programs are compiled for."""
  batches: tuple  # falling
  lengths: tuple  # rising
  width: int      # of a prompt's window
  chunk: int      # divides it
  prompts: int    # that are read at once
  shards: int     # devices that have rows of their own
  count: int      # pages of each, or 0
  table: int      # pages that a row may hold


def shapes(config, sampling, room, rows, width, dtype):
  """The Shapes of a sampler of so many rows on the current mesh.

  Of a device's memory for the cache a quarter may be for prompts that are read: their keys and
  values, and a chunk's scores.
  """
  mesh = sharding.current_mesh()
  shards = 1 if mesh is None else sharding.shard_count(mesh, "batch", None)
  unit = room.page or 1
  chunk = -(-width // -(-width // room.chunk))  # as many chunks as it takes, and no longer
  chunk = _up(chunk, unit)
  window = _up(width, chunk)
  longest = max(window, width + sampling.max_tokens)
  own = -(-rows // shards)
  heads = config.heads // (1 if mesh is None else sharding.shard_count(mesh, "heads", config.heads))
  prompt = slot_bytes(config, window, dtype) + 4 * heads * chunk * window
  prompts = max(1, min(PROMPTS, -(-own // sampling.samples_per_prompt),
                       int(room.cache_gib * 2**30 / 4) // prompt))
  if room.page:
    own, count, most = pages_for(config, room, own, longest, prompts * prompt, dtype)
    batches, lengths = (own * shards,), (longest,)
    table = attention.table_size(most)
  else:
    own, count, table = slots_for(config, room, own, longest, prompts * prompt, dtype), 0, 0
    weights = sum(x.size for x in jax.tree.leaves(models.shapes(config)))
    batches = batch_sizes(own * shards, shards, weights)
    lengths = tuple(x for x in reversed(halves(longest, LEAST_LENGTH, 8)) if x >= window)
  return Shapes(batches, lengths, window, chunk, prompts * shards, shards, count, table)


@functools.cache
def build(model, sampling, room, rows, width, mesh, tree, leaves):
  """The Programs of a sampler of so many rows, compiled ahead of time."""
  config, params = model.config, jax.tree.unflatten(tree, leaves)
  dtype = cache_type(config, room)
  made = shapes(config, sampling, room, rows, width, dtype)
  many, batches, lengths = made.batches[0], made.batches, made.lengths
  whole = mesh and sharding.replicated(mesh)

  def flat(*shape, dtype=np.int32):  # what the host gives, and gets
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
  def laid(make):  # rows split over devices, and key heads
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=mesh and sharding.slot_sharding(mesh, x.shape, made.count > 0)),
        jax.eval_shape(make))
  def lower(f, out, *args, donate=()):
    places = mesh and jax.tree.map(lambda x: x.sharding, out)
    return jax.jit(f, out_shardings=places, donate_argnums=donate).lower(*args)
  def empty(B, S):
    cache = (caches.empty_cache(config, B, S, dtype) if not room.page else caches.empty_pages(
        config, B, made.count * made.shards, room.page, made.table, dtype))
    return decode.empty(cache, B)
  def written(B):
    tokens, numbers = flat(B, room.tokens), flat(B, room.tokens, dtype=np.float32)
    return decode.Written(tokens, numbers, numbers, flat(B), flat(B, dtype=bool))

  slots = {(B, S): laid(functools.partial(empty, B, S)) for B in batches for S in lengths}
  read = _read(config, made, mesh, dtype)
  prepare = functools.partial(decode.prepare, model)
  weights = jax.eval_shape(prepare, params)
  if mesh is not None:
    weights = sharding.laid_out(weights, _layout(config, mesh, weights))
  prefill = functools.partial(decode.prefill, model, made.chunk, dtype)
  run = functools.partial(decode.decode, model, sampling, room.tokens)
  admit, found = decode.admit, [flat(many)]
  if room.page:
    pages = many + made.prompts * made.shards * made.width // room.page
    admit, found = decode.admit_paged, [flat(pages), flat(pages)]
  rows = flat(many, dtype=bool), flat(many), flat(many), flat(many, 2, dtype=np.uint32)
  return _compile(Programs(
      made, room, slots, lower(prepare, weights, params),
      lower(functools.partial(empty, many, lengths[0]), slots[many, lengths[0]]),
      lower(prefill, read, weights, flat(made.prompts, made.width), flat()),
      {S: lower(admit, slots[many, S], slots[many, S], read, *found, *rows, donate=0)
       for S in lengths},
      {(B, S): lower(run, (slots[B, S], written(B)), weights, slots[B, S], flat(B, dtype=bool),
                     flat(), donate=1) for B in batches for S in lengths},
      {(B, S): lower(functools.partial(decode.grow, length=longer), slots[B, longer], slots[B, S])
       for B in batches for S, longer in itertools.pairwise(lengths)},
      {S: lower(functools.partial(decode.shorten, length=shorter), slots[many, shorter],
                slots[many, S]) for shorter, S in itertools.pairwise(lengths)},
      {(B, S): lower(decode.shrink, slots[fewer, S], slots[B, S], flat(fewer))
       for B, fewer in itertools.pairwise(batches) for S in lengths}))


def _read(config, made, mesh, dtype):
  """The cache of the prompts that are read at once, abstract."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=mesh and sharding.slot_sharding(mesh, x.shape, False)),
      jax.eval_shape(lambda: caches.empty_cache(config, made.prompts, made.width, dtype)))


def _compile(programs):
  """Every program of the Programs compiled, several at a time."""
  lowered, tree = jax.tree.flatten(programs, is_leaf=lambda x: isinstance(x, jax.stages.Lowered))
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return tree.unflatten(pool.map(
        lambda x: x.compile() if isinstance(x, jax.stages.Lowered) else x, lowered))


def _layout(config, mesh, weights):
  """Where the Weights live: split over `tensor` as the trainer's, and whole over `fsdp`.

  What the trainer gathers for each use is gathered here once for all tokens.
  """
  axes = models.axes(config)
  layers = tuple(jax.tree.map(lambda names: names[1:], axes["layers"],
                              is_leaf=lambda x: isinstance(x, tuple)) for _ in range(config.layers))
  def place(names, x):
    return sharding.decode_sharding(mesh, names, x.shape)
  params = jax.tree.map(place, axes | {"layers": layers}, weights.params,
                        is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], str))
  return decode.Weights(params, place(("embed", "vocab"), weights.head_DV))
