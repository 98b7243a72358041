"""Everything a sampler runs on the device, compiled ahead of time for a short list of shapes."""

import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s2d_jax import keys, models, sharding
from s2d_jax.keys import Key
from s2d_jax.models import attention, caches
from s2d_jax.models.config import Config
from s2d_jax.sampler import decode
from s2d_jax.sharding import Params

CACHE_SIZES = 4  # batch and length sizes compiled, each half the previous
LEAST_BATCH, LEAST_LENGTH = 8, 128
# On a CPU, for models of FINE_WEIGHTS parameters or more, there are smaller batches too, because
# there a row costs more than a compile.
FINE_SIZES, FINE_LEAST_BATCH, FINE_WEIGHTS = 5, 4, 10_000_000
PROMPTS = 16  # the largest number of prompts that a device reads at once
KINDS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


class Room(NamedTuple):
  """How a sampler uses a device; samples depend on it by rounding alone."""
  cache_gib: float = 4.0  # of each device's memory, for the cache: the number of slots follows
  tokens: int = 32        # the largest number of tokens of each row in one dispatch
  chunk: int = 256        # tokens of a prompt that are read at a time
  cache: str = "auto"     # type of its numbers: float32, bfloat16, int8, or the activations'
  page: int = 0           # tokens of a page; 0 is a cache without pages

  KEYS = {
      "cache_gib": Key(lambda gib: 0 < gib < math.inf, "choose a number above 0", default=4.0),
      "tokens": keys.at_least(1, default=32),
      "chunk": keys.at_least(1, default=256),
      "cache": keys.one_of(("auto", *KINDS), neutral="auto"),
      "page": Key(lambda tokens: tokens >= 0, "choose 0 (no pages) or more", neutral=0)}

  def narrow(self, dtype: str) -> bool:
    """True if the cache has fewer bits than activations of `dtype`, and so loses precision."""
    kept, given = (jnp.dtype(KINDS[name]).itemsize for name in (
        dtype if self.cache == "auto" else self.cache, dtype))
    return kept < given

  def exact(self) -> "Room":
    """This Room with a cache in the activations' type."""
    # Validation, probes and pass rates are not compared with the trainer before they are used, as
    # the rollouts of a narrow cache are.
    return self._replace(cache="auto")


class Shapes(NamedTuple):
  """The array sizes that a sampler's programs are compiled for."""
  batches: tuple[int, ...]  # numbers of rows, falling
  lengths: tuple[int, ...]  # tokens of a row's cache, rising
  width: int      # tokens of a prompt's window
  chunk: int      # tokens of a prompt that are read at a time; divides the width
  prompts: int    # prompts that are read at once
  shards: int     # devices that have rows of their own
  count: int      # pages of each device, or 0
  table: int      # pages that a row may hold


# Lowered while `build` collects them, compiled in what it returns.
Program = jax.stages.Lowered | jax.stages.Compiled
Size = tuple[int, int]  # (batch, length)


class Programs(NamedTuple):
  """The compiled programs of a sampler, by the sizes of the slots that they take."""
  shapes: Shapes
  room: Room
  slots: dict[Size, decode.Slots]  # abstract
  prepare: Program
  empty: Program                   # at the largest batch and the shortest length
  prefill: Program
  admit: dict[int, Program]        # by length
  decode: dict[Size, Program]
  grow: dict[Size, Program]        # to the next length
  shorten: dict[int, Program]      # by length: of the largest batch to the length before
  shrink: dict[Size, Program]      # to the next batch


def halves(largest: int, least: int, multiple: int, sizes: int = CACHE_SIZES) -> tuple[int, ...]:
  """`largest` and its halves down to `least`, falling: at most `sizes` numbers.

  The halves are rounded up to the multiple.
  """
  found = [largest]
  while len(found) < sizes and found[-1] // 2 >= least:
    found.append(_up(-(-found[-1] // 2), multiple))
  # Rounding up may give a number twice, and a second program for it would be compiled in vain.
  return tuple(dict.fromkeys(found))


def batch_sizes(largest: int, multiple: int, weights: int) -> tuple[int, ...]:
  """Numbers of rows that decoding is compiled for, falling; `weights` is the model's parameters."""
  # A step on an accelerator is mostly the reading of weights, so halves are enough. They are for a
  # small model on any device. On a CPU a row is arithmetic: a large model has smaller batches too,
  # and three quarters of those from 16 on.
  if sharding.platform() != "cpu" or weights < FINE_WEIGHTS:
    return halves(largest, LEAST_BATCH, multiple)
  found = halves(largest, FINE_LEAST_BATCH, multiple, FINE_SIZES)
  between = {_up(-(-3 * B // 4), multiple) for B in found if B >= 16}
  return tuple(sorted(between.union(found), reverse=True))


def _up(count: int, multiple: int) -> int:
  """`count` rounded up to the multiple."""
  return -(-count // multiple) * multiple


def cache_type(config: Config, room: Room) -> jax.typing.DTypeLike:
  """The type of the numbers in the cache of a Room."""
  return KINDS[config.dtype if room.cache == "auto" else room.cache]


def slot_bytes(config: Config, length: int, dtype: jax.typing.DTypeLike) -> int:
  """Bytes of one row's cache of `length` tokens on a device, with its part of the key heads."""
  shapes = jax.eval_shape(lambda: caches.empty_cache(config, 1, length, dtype))
  mesh, heads = sharding.current_mesh(), config.kv_heads
  parts = 1 if mesh is None else sharding.shard_count(mesh, "kv_heads", heads)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) // parts


def slots_for(config: Config, room: Room, rows: int, longest: int, spent: int,
              dtype: jax.typing.DTypeLike) -> int:
  """Number of slots of each device: for its `rows`, or as many as fit its memory.

  `spent` bytes of that memory are taken already. A row has `longest` tokens.

  Raises:
    ValueError: not one row fits.
  """
  one = slot_bytes(config, longest, dtype)
  fit = int(room.cache_gib * 2**30 - spent) // one
  if fit < 1:
    raise ValueError(f"one row of {longest} tokens and the reading of a prompt need "
                     f"{(one + spent) / 2**30:.2g} GiB on a device and config.sampler.cache_gib is "
                     f"{room.cache_gib}: raise it, or lower max_tokens.")
  return min(rows, fit)


# Twice the rows that would fit at full length are admitted. Few grow that long, and a row without a
# free page waits.
ADMIT_FACTOR = 2


def pages_for(config: Config, room: Room, rows: int, longest: int, spent: int,
              dtype: jax.typing.DTypeLike) -> tuple[int, int, int]:
  """(slots of each device, its pages, pages of the longest row); arguments as `slots_for`.

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
  # Page 0 belongs to no row, so the longest row needs one page more than it fills.
  if count <= most:
    raise ValueError(f"one row of {longest} tokens needs {most + 1} pages of {one:,} bytes on a "
                     f"device and config.sampler.cache_gib is {room.cache_gib}: raise it, or lower "
                     "max_tokens.")
  own = min(rows, ADMIT_FACTOR * ((count - 1) // most))
  return own, min(count, own * most + 1), most


def shapes(config: Config, sampling: decode.Sampling, room: Room, rows: int, width: int,
           dtype: jax.typing.DTypeLike) -> Shapes:
  """The Shapes of a sampler on the current mesh, for `rows` rows in a call.

  Prompts have at most `width` tokens, and `dtype` is the type of the cache's numbers.

  Raises:
    ValueError: as `slots_for` and `pages_for`.
  """
  mesh = sharding.current_mesh()
  shards = 1 if mesh is None else sharding.shard_count(mesh, "batch", None)
  unit = room.page or 1
  chunk = -(-width // -(-width // room.chunk))  # chunks of equal size pad the window least
  chunk = _up(chunk, unit)
  window = _up(width, chunk)
  longest = max(window, width + sampling.max_tokens)
  own = -(-rows // shards)
  heads = config.heads // (1 if mesh is None else sharding.shard_count(mesh, "heads", config.heads))
  # A prompt being read needs its keys and values and the scores of a chunk in float32. All prompts
  # that are read at once may have a quarter of the memory, so that most of it is for slots.
  prompt = slot_bytes(config, window, dtype) + 4 * heads * chunk * window
  prompts = max(1, min(PROMPTS, -(-own // sampling.samples_per_prompt),
                       int(room.cache_gib * 2**30 / 4) // prompt))
  if room.page:
    own, count, most = pages_for(config, room, own, longest, prompts * prompt, dtype)
    # The memory of pages does not depend on the batch or the length, so one size is enough.
    batches, lengths = (own * shards,), (longest,)
    table = attention.table_size(most)
  else:
    own, count, table = slots_for(config, room, own, longest, prompts * prompt, dtype), 0, 0
    weights = sum(x.size for x in jax.tree.leaves(models.shapes(config)))
    batches = batch_sizes(own * shards, shards, weights)
    lengths = tuple(x for x in reversed(halves(longest, LEAST_LENGTH, 8)) if x >= window)
  return Shapes(batches, lengths, window, chunk, prompts * shards, shards, count, table)


@functools.cache
def build(model: models.Model, sampling: decode.Sampling, room: Room, rows: int, width: int,
          mesh: Mesh | None, tree: jax.tree_util.PyTreeDef, leaves: tuple[Any, ...]) -> Programs:
  """The Programs of a sampler for `rows` rows and prompts of at most `width` tokens.

  `tree` and `leaves` are the abstract parameters, flattened so that the cache can hash them.
  """
  config, params = model.config, jax.tree.unflatten(tree, leaves)
  dtype = cache_type(config, room)
  made = shapes(config, sampling, room, rows, width, dtype)
  many, batches, lengths = made.batches[0], made.batches, made.lengths
  whole = mesh and sharding.replicated(mesh)

  # Arrays that the host sends and fetches are whole on every device.
  def flat(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
  def laid(make: Callable[[], Params]) -> Params:  # rows and key heads are split over devices
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=mesh and sharding.slot_sharding(mesh, x.shape, made.count > 0)),
        jax.eval_shape(make))
  def lower(f: Callable, out: Params, *args: Any, donate: Any = ()) -> jax.stages.Lowered:
    places = mesh and jax.tree.map(lambda x: x.sharding, out)
    return jax.jit(f, out_shardings=places, donate_argnums=donate).lower(*args)
  def empty(B: int, S: int) -> decode.Slots:
    cache = (caches.empty_cache(config, B, S, dtype) if not room.page else caches.empty_pages(
        config, B, made.count * made.shards, room.page, made.table, dtype))
    return decode.empty(cache, B)
  def written(B: int) -> decode.Written:
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
  # `admit` and `decode` donate the slots, so that the cache is updated in place. The programs that
  # change its size cannot, because no array of the result has the old size.
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


def _read(config: Config, made: Shapes, mesh: Mesh | None,
          dtype: jax.typing.DTypeLike) -> tuple[caches.KV, ...]:
  """The abstract cache of the prompts that are read at once; it never has pages."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=mesh and sharding.slot_sharding(mesh, x.shape, False)),
      jax.eval_shape(lambda: caches.empty_cache(config, made.prompts, made.width, dtype)))


def _compile(programs: Programs) -> Programs:
  """The Programs with every lowered program compiled."""
  # XLA compiles without the interpreter's lock, so threads compile several programs at a time.
  lowered, tree = jax.tree.flatten(programs, is_leaf=lambda x: isinstance(x, jax.stages.Lowered))
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return tree.unflatten(pool.map(
        lambda x: x.compile() if isinstance(x, jax.stages.Lowered) else x, lowered))


def _layout(config: Config, mesh: Mesh, weights: decode.Weights) -> decode.Weights:
  """The layout of the Weights: split over `tensor` as the trainer's, and whole over `fsdp`."""
  # The trainer gathers weights over `fsdp` for each use. Decoding uses them for each token, so they
  # are gathered once for all tokens.
  axes = models.axes(config)
  layers = tuple(jax.tree.map(lambda names: names[1:], axes["layers"],
                              is_leaf=lambda x: isinstance(x, tuple)) for _ in range(config.layers))
  def place(names: tuple[str, ...], x: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
    return sharding.decode_sharding(mesh, names, x.shape)
  params = jax.tree.map(place, axes | {"layers": layers}, weights.params,
                        is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], str))
  return decode.Weights(params, place(("embed", "vocab"), weights.head_DV))
