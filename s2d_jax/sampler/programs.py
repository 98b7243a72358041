"""Everything a sampler runs on the device, compiled ahead of time for a short list of shapes."""

import functools
import itertools
import os
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from s2d_jax import models, sharding
from s2d_jax.models import decoder
from s2d_jax.sampler import decode

SIZES = 4  # batches, and lengths of the cache, that programs are compiled for: halves of the largest
LEAST_BATCH, LEAST_LENGTH = 8, 128
PROMPTS = 16  # at most so many are read at once
KINDS = {"float32": jax.numpy.float32, "bfloat16": jax.numpy.bfloat16, "int8": jax.numpy.int8}


class Room(NamedTuple):
  """How a sampler uses a device; nothing here changes a sample, but for an int8 cache."""
  cache_gib: float = 4.0  # of each device's memory, for the cache: the number of slots follows
  tokens: int = 32        # at most so many of each row in one dispatch
  chunk: int = 256        # tokens of a prompt that are read at a time
  cache: str = "auto"     # its numbers: float32, bfloat16, int8, or those of the activations


class Programs(NamedTuple):
  """What is compiled for a sampler, and its shapes."""
  batches: tuple  # falling
  lengths: tuple  # rising
  width: int      # of a prompt's window, a multiple of the chunk
  slots: dict     # (batch, length) -> abstract Slots
  prepare: Any
  empty: Any      # at the largest batch and the shortest length
  prefill: Any
  prompts: int    # that are read at once
  admit: dict     # length -> program
  decode: dict    # (batch, length) -> program
  grow: dict      # (batch, length) -> program, to the next length
  shrink: dict    # (batch, length) -> program, to the next batch

  def all(self):
    """{name: executable}, every one."""
    found = {"prepare": self.prepare, "empty": self.empty, "prefill": self.prefill}
    for kind in ("admit", "decode", "grow", "shrink"):
      for shape, program in getattr(self, kind).items():
        sizes = shape if isinstance(shape, tuple) else (shape,)
        found[f"{kind} {'x'.join(map(str, sizes))}"] = program
    return found


def halves(largest, least, multiple):
  """`largest` and its halves down to `least`, at most SIZES, rounded up to the multiple; falling.
  """
  found = [largest]
  while len(found) < SIZES and found[-1] // 2 >= least:
    half = -(-found[-1] // 2)
    found.append(-(-half // multiple) * multiple)
  return tuple(dict.fromkeys(found))


def slot_bytes(config, length, dtype):
  """Bytes of one row's cache on a device that has its part of the key heads."""
  shapes = jax.eval_shape(lambda: decoder.empty_cache(config, 1, length, dtype))
  mesh, heads = sharding.current_mesh(), config.kv_heads
  parts = 1 if mesh is None else sharding.parts(mesh, "kv_heads", heads)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) // parts


def slots_for(config, room, rows, length, dtype):
  """How many slots there are: for all the rows, or as many as the stated memory holds.

  Raises:
    ValueError: it does not hold one row of every device.
  """
  mesh = sharding.current_mesh()
  shards = 1 if mesh is None else sharding.parts(mesh, "batch", None)
  one = slot_bytes(config, length, dtype)
  fit = int(room.cache_gib * 2**30 // one) * shards
  if not fit:
    raise ValueError(f"one row of {length} tokens has a cache of {one / 2**30:.2f} GiB on a device "
                     f"and config.sampler.cache_gib is {room.cache_gib}: raise it, or lower "
                     "max_tokens.")
  wanted = -(-rows // shards) * shards if rows >= shards else rows
  return min(wanted, fit)


@functools.cache
def build(model, sampling, room, rows, width, mesh, tree, leaves):
  """The Programs of a sampler of so many rows, compiled ahead of time."""
  config, params = model.config, jax.tree.unflatten(tree, leaves)
  kind = config.dtype if room.cache == "auto" else room.cache
  dtype = KINDS[kind]
  chunk = min(room.chunk, width)
  width = -(-width // chunk) * chunk
  longest = width + sampling.max_tokens
  many = slots_for(config, room, rows, longest, dtype)
  shards = 1 if mesh is None else sharding.parts(mesh, "batch", None)
  batches = halves(many, LEAST_BATCH, shards if many % shards == 0 else 1)
  lengths = tuple(x for x in reversed(halves(longest, LEAST_LENGTH, 8)) if x >= width)
  G = sampling.samples_per_prompt
  prompts = min(PROMPTS, -(-many // G))
  none = jax.ShapeDtypeStruct((), np.int32, sharding=mesh and sharding.replicated(mesh))
  def flat(*shape, dtype=np.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and sharding.replicated(mesh))
  def laid(tree):  # rows split over devices, and key heads
    return tree if mesh is None else jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.slot_sharding(mesh, x.shape)), tree)
  def places(tree):
    return mesh and jax.tree.map(lambda x: x.sharding, tree)
  def lower(f, out, *args, donate=()):
    return jax.jit(f, out_shardings=places(out), donate_argnums=donate).lower(*args)
  slots = {(B, S): laid(jax.eval_shape(lambda B=B, S=S: decode.empty(model, B, S, dtype)))
           for B in batches for S in lengths}
  read = laid(jax.eval_shape(lambda: decoder.empty_cache(config, prompts, width, dtype)))
  def written(B):
    return jax.tree.map(lambda x: flat(*x.shape, dtype=x.dtype), decode.Written(
        *(np.zeros((B, room.tokens)) for _ in range(3)), np.zeros(B), np.zeros(B)))
  run = functools.partial(decode.decode, model, sampling, room.tokens)
  prepare = functools.partial(decode.prepare, model)
  weights = jax.eval_shape(prepare, params)
  if mesh is not None:
    weights = sharding.laid_out(weights, _layout(model.config, mesh, weights))
  return _compile(Programs(
      batches, lengths, width, slots, lower(prepare, weights, params),
      lower(lambda: decode.empty(model, many, lengths[0], dtype), slots[many, lengths[0]]),
      lower(functools.partial(decode.prefill, model, chunk, dtype), read, weights,
            flat(prompts, width), none), prompts,
      {S: lower(decode.admit, slots[many, S], slots[many, S], read, flat(many),
                flat(many, dtype=bool), flat(many), flat(many), flat(many, 2, dtype=np.uint32),
                donate=0) for S in lengths},
      {(B, S): lower(run, (slots[B, S], written(B)), weights, slots[B, S], flat(B, dtype=bool),
                     none, donate=1) for B in batches for S in lengths},
      {(B, S): lower(functools.partial(decode.grow, length=longer), slots[B, longer], slots[B, S])
       for B in batches for S, longer in itertools.pairwise(lengths)},
      {(B, S): lower(decode.shrink, slots[fewer, S], slots[B, S], flat(fewer))
       for B, fewer in itertools.pairwise(batches) for S in lengths}))


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
