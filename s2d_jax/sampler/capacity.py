"""How much fits: the sizes of a sampler's arrays, as integers, from a memory limit.

Nothing here runs on a device. `programs` compiles for the sizes that `shapes` returns.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2d_jax import chips, keys, models, sharding
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.models import attention, caches, paged
from s2d_jax.models.config import Config
from s2d_jax.sampler.sampling import Sampling

CACHE_SIZES = 4  # batch and length sizes compiled, each half the previous
LEAST_BATCH = 8
LEAST_LENGTH = 128
ROWS = 8  # matrix units take rows in eights, so on an accelerator a device has such a multiple
# On a CPU, for models of FINE_WEIGHTS parameters or more, there are smaller batches too, because
# there a row costs more than a compile.
FINE_SIZES = 5
FINE_LEAST_BATCH = 4
FINE_WEIGHTS = 10_000_000
MAX_PROMPTS = 16  # the largest number of prompts that a device reads at once
CPU_BYTES = 4 * 2**30  # for the cache where no device says how much memory it has
# The part of a device's memory that stays free for what is not counted: activations of a prompt's
# chunk, logits, programs, gaps between arrays.
RESERVE = 0.1
CACHE_TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


class SamplerConfig(NamedTuple):
  """How a sampler uses a device; samples depend on it by rounding alone."""
  # of each device's memory, for the cache: the number of slots follows; 0 is what a device has left
  cache_gib: float = 0.0
  tokens: int = 32        # the largest number of tokens of each row in one dispatch
  chunk: int = 256        # tokens of a prompt that are read at a time
  cache: str = "auto"     # type of its numbers: float32, bfloat16, int8, or the activations'
  page: int = 0           # tokens of a page; 0 is a cache without pages
  # bytes that a device has left for the cache, where cache_gib is 0; None: not computed yet
  available: int | None = None
  # bytes of a device that are in use meanwhile, and those of the weights' copy for decoding
  taken: tuple[int, int] | None = None

  KEYS = {
      "cache_gib": Key(lambda gib: 0 <= gib < math.inf,
                       "choose a number above 0, or 0 for what the device has left", default=0.0),
      "tokens": keys.at_least(1, default=32),
      "chunk": keys.at_least(1, default=256),
      "cache": keys.one_of(("auto", *CACHE_TYPES), neutral="auto"),
      "page": Key(lambda tokens: tokens >= 0, "choose 0 (no pages) or more", neutral=0)}

  @property
  def cache_bytes(self) -> int:
    """Bytes of each device for the cache and for the prompts being read."""
    if self.cache_gib:
      return int(self.cache_gib * 2**30)
    return CPU_BYTES if self.available is None else self.available

  def narrow(self, dtype: str) -> bool:
    """True if the cache has fewer bits than activations of `dtype`, and so loses precision."""
    cache = dtype if self.cache == "auto" else self.cache
    return jnp.dtype(CACHE_TYPES[cache]).itemsize < jnp.dtype(CACHE_TYPES[dtype]).itemsize

  def exact(self) -> "SamplerConfig":
    """This SamplerConfig with a cache in the activations' type."""
    # Validation, probes and pass rates are not compared with the trainer before they are used, as
    # the rollouts of a narrow cache are.
    return self._replace(cache="auto")


def check_config(config: SamplerConfig) -> None:
  """Checks a SamplerConfig.

  Raises:
    InputError: a number is out of its range, or the cache is unknown or in pages of int8. The
      message begins with the field's name.
  """
  keys.check_values(config, SamplerConfig.KEYS)
  # Pages have no array for int8's scales.
  if config.page and config.cache == "int8":
    raise InputError(f"page is {config.page} and the cache int8, which pages do not hold: set one "
                     "of them to 0 or auto.")


def available_bytes(memory: int, taken: int) -> int:
  """Bytes that a device has left for the cache, where other arrays take `taken` of its memory."""
  return max(int(memory * (1 - RESERVE)) - taken, 0)


class Unfit(InputError):
  """Not one row fits the memory, or a mesh cannot split it; the message begins with a field."""


def _too_small(config: SamplerConfig, need: str) -> Unfit:
  """The error that the cache's memory is too small for what a sentence says is needed."""
  if config.cache_gib:
    return Unfit(f"cache_gib is {config.cache_gib}, and {need}: raise it, or lower max_tokens.")
  free = f"{config.cache_bytes / 2**30:.2g} GiB left"
  if config.taken is not None:
    held, copied = (size / 2**30 for size in config.taken)
    free += (f" beside {held:.3g} GiB of models, {copied:.3g} GiB of weights copied for decoding "
             f"and the {RESERVE:.0%} of its memory that stay free")
  return Unfit(f"cache_gib is 0 and a device has {free}, and {need}: choose a number, use more "
               "devices, or lower max_tokens.")


class Shapes(NamedTuple):
  """The array sizes that a sampler's programs are compiled for."""
  batches: tuple[int, ...]  # numbers of rows, falling
  lengths: tuple[int, ...]  # tokens of a row's cache, rising
  window: int     # tokens of the longest prompt, in whole chunks
  chunk: int      # tokens of a prompt that are read at a time; divides the window
  prompts: int    # prompts that are read at once
  shards: int     # devices that have rows of their own
  pages: int      # pages of each device, or 0
  table: int      # pages that a row may hold

  def largest(self) -> "Shapes":
    """These Shapes with the two largest batches and the two longest lengths alone."""
    # Two of each, because a change of size needs the memory of both sizes of a layer at once.
    return self._replace(batches=self.batches[:2], lengths=self.lengths[-2:])


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
  # A step on an accelerator is mostly the reading of weights, so halves are enough. They are also
  # enough for a small model on any device. On a CPU a row is arithmetic: a large model has smaller
  # batches too, and three quarters of those from 16 on.
  if sharding.platform() != "cpu" and largest % (ROWS * multiple) == 0:
    return halves(largest, LEAST_BATCH, ROWS * multiple)
  if sharding.platform() != "cpu" or weights < FINE_WEIGHTS:
    return halves(largest, LEAST_BATCH, multiple)
  found = halves(largest, FINE_LEAST_BATCH, multiple, FINE_SIZES)
  between = {_up(-(-3 * B // 4), multiple) for B in found if B >= 16}
  return tuple(sorted(between.union(found), reverse=True))


# `worthwhile` reads these. A program reaches about this share of the rates of the data sheet.
COMPILE_SECONDS = 0.25  # for each layer of a decoding program, on sixteen cores
READ_SHARE = 0.9        # of the bytes that it reads in a second
FLOP_SHARE = 0.8        # of its products in bfloat16
UNKNOWN_CHIP = "h100"   # whose rates stand for a device that is not in the table of chips
LOGIT_BYTES = 16        # for each word: float32 logits are written and read up to three times
CALLS = 100             # a program is worth its compilation if that many calls save it
LEAST_SAVING = 0.1      # and if it saves this share of a step


def worthwhile(sizes: Sequence[int], seconds: float, steps: Callable[[int], float],
               step_seconds: Callable[[int], float]) -> tuple[int, ...]:
  """The first of some sizes, falling, and the smaller ones that save more time than they cost.

  Args:
    seconds: that the programs of one more size take to compile.
    steps: size -> decoding steps of a call in which it is enough.
    step_seconds: size -> the time of one step.
  """
  found = [sizes[0]]
  for size in sizes[1:]:
    larger = step_seconds(found[-1])
    saved = larger - step_seconds(size)
    if saved > LEAST_SAVING * larger and CALLS * steps(size) * saved > seconds:
      found.append(size)
  return tuple(found)


def stops_at_rows(model_config: Config, dtype: jax.typing.DTypeLike) -> bool:
  """Whether decoding reads a row's cache of this type up to the row's last token alone.

  cuDNN's kernel does. Else a step reads every row to the end of its cache.
  """
  implementation = attention.choose(model_config.attention, model_config.dtype,
                                    model_config.head_width)
  return attention.cudnn_reads(implementation, dtype, CACHE_TYPES[model_config.dtype])


def accelerator_sizes(model_config: Config, sampling: Sampling, dtype: jax.typing.DTypeLike,
                      weights: int, shapes: Shapes) -> Shapes:
  """The Shapes with those of the batches and lengths that a TPU or a GPU has programs for.

  A program has all layers written out and takes seconds to compile: four of 28 layers took 29 on
  sixteen cores. A step reads all weights at any size, so a smaller size saves only the reading of
  the cache and its rows' products, and only in the steps in which it is enough. A length S is
  enough until the longest row has as many tokens, in S less the window. Rows that end evenly leave
  a batch of b enough for b/B of all steps. For 1.7 B parameters and 64 rows of 192 tokens one
  program is enough on an H100. On a TPU, with responses of 16,384 tokens, every size pays within a
  few calls.

  Where a step stops at each row's last token, ended rows cost no reading and another length saves
  nothing. Reading weights and multiplying by them add up: on an H200 (benchmarks/results) a row
  costs 9 microseconds beside its cache with 1.7 B parameters and 17 to 22 with 8 B. The rates of
  its chip give 5 and 21.

  Args:
    dtype: of the cache.
    weights: parameters on each device.
  """
  token_bytes = slot_bytes(model_config, 1, dtype)
  if stops_at_rows(model_config, dtype):
    token_bytes = 0
  chip = chips.of_kind(sharding.device_kind()) or chips.CHIPS[UNKNOWN_CHIP]
  read_rate = READ_SHARE * chip.bandwidth
  flop_rate = FLOP_SHARE * chip.flops

  def step_seconds(batch: int, length: int) -> float:
    rows = batch // shapes.shards
    products = 2 * weights * (1 / read_rate + rows / flop_rate)
    row_bytes = token_bytes * length + LOGIT_BYTES * model_config.vocab_size
    return products + rows * row_bytes / read_rate

  seconds = COMPILE_SECONDS * model_config.layers
  largest = shapes.batches[0]
  longest = shapes.lengths[-1]
  lengths = worthwhile(shapes.lengths[::-1], seconds, lambda S: S - shapes.window,
                       lambda S: step_seconds(largest, S))
  # A batch has a program for each length.
  batches = worthwhile(shapes.batches, seconds * len(lengths),
                       lambda B: sampling.max_tokens * B / largest,
                       lambda B: step_seconds(B, longest))
  return shapes._replace(batches=batches, lengths=lengths[::-1])


def _up(count: int, multiple: int) -> int:
  """`count` rounded up to the multiple."""
  return -(-count // multiple) * multiple


def cache_type(model_config: Config, config: SamplerConfig) -> jax.typing.DTypeLike:
  """The type of the numbers in the cache of a model."""
  return CACHE_TYPES[model_config.dtype if config.cache == "auto" else config.cache]


def slot_bytes(model_config: Config, length: int, dtype: jax.typing.DTypeLike) -> int:
  """Bytes of one row's cache of `length` tokens on a device, with its part of the key heads."""
  shapes = jax.eval_shape(lambda: caches.empty_cache(model_config, 1, length, dtype))
  mesh = sharding.current_mesh()
  shards = 1 if mesh is None else sharding.shard_count(mesh, "kv_heads", model_config.kv_heads)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) // shards


def slots_for(model_config: Config, config: SamplerConfig, rows: int, longest: int,
              spent: int) -> int:
  """Number of slots of each device: for its `rows`, or as many as fit its memory.

  On an accelerator more than ROWS slots are a multiple of them, where memory allows. `spent` bytes
  of the memory are taken already. A row has `longest` tokens.

  Raises:
    Unfit: not one row fits.
  """
  row_bytes = slot_bytes(model_config, longest, cache_type(model_config, config))
  # While a cache changes its size, one layer exists twice. With cache_gib set, memory beyond it
  # serves for that.
  if not config.cache_gib and config.available is not None:
    row_bytes += row_bytes // model_config.layers
  fit = (config.cache_bytes - spent) // row_bytes
  if fit < 1:
    raise _too_small(config, f"one row of {longest} tokens and the reading of a prompt need "
                             f"{(row_bytes + spent) / 2**30:.2g} GiB on a device")
  if sharding.platform() == "cpu" or min(rows, fit) <= ROWS:
    return min(rows, fit)
  # All rows at once are better than a rounded number of them and a second batch for the others.
  return min(_up(rows, ROWS), fit) if rows <= fit else fit - fit % ROWS


# Twice the rows that would fit at full length are admitted. Few grow that long, and a row without a
# free page waits.
ADMIT_FACTOR = 2


def pages_for(model_config: Config, config: SamplerConfig, rows: int, longest: int,
              spent: int) -> tuple[int, int, int]:
  """(slots of each device, its pages, pages of the longest row); arguments as `slots_for`.

  Raises:
    Unfit: pages that a GPU does not read, key heads that `tensor` does not divide, or not one
      row fits.
  """
  mesh = sharding.current_mesh()
  if mesh is not None and mesh.shape["tensor"] != sharding.shard_count(
      mesh, "kv_heads", model_config.kv_heads):
    raise Unfit(f"page is {config.page}, and the mesh's tensor of {mesh.shape['tensor']} "
                f"does not divide {model_config.kv_heads} key heads: set it to 0.")
  if sharding.platform() == "gpu" and config.page not in (16, 32, 64):
    raise Unfit(f"page is {config.page} and the GPU's kernel reads pages of 16, 32 or 64 tokens: "
                "choose one of those.")
  row_pages = -(-longest // config.page)
  page_bytes = slot_bytes(model_config, config.page, cache_type(model_config, config))
  pages = (config.cache_bytes - spent) // page_bytes
  # Page 0 belongs to no row, so the longest row needs one page more than it fills.
  if pages <= row_pages:
    raise _too_small(config, f"one row of {longest} tokens needs {row_pages + 1} pages of "
                             f"{page_bytes:,} bytes on a device")
  slots = min(rows, ADMIT_FACTOR * ((pages - 1) // row_pages))
  return slots, min(pages, slots * row_pages + 1), row_pages


def shapes(model_config: Config, sampling: Sampling, config: SamplerConfig, rows: int,
           prompt_tokens: int) -> Shapes:
  """The Shapes of a sampler on the current mesh.

  Args:
    rows: of one call.
    prompt_tokens: tokens of the longest prompt.

  Raises:
    Unfit: as `slots_for` and `pages_for`.
  """
  mesh = sharding.current_mesh()
  shards = 1 if mesh is None else sharding.shard_count(mesh, "batch", None)
  head_shards = 1 if mesh is None else sharding.shard_count(mesh, "heads", model_config.heads)
  # Chunks of equal size pad the window least.
  chunk = _up(-(-prompt_tokens // -(-prompt_tokens // config.chunk)), config.page or 1)
  window = _up(prompt_tokens, chunk)
  longest = max(window, prompt_tokens + sampling.max_tokens)
  device_rows = -(-rows // shards)
  # A prompt being read needs its keys and values and the scores of a chunk in float32. All prompts
  # that are read at once may have a quarter of the memory, so that most of it is for slots.
  prompt_bytes = (slot_bytes(model_config, window, cache_type(model_config, config))
                  + 4 * (model_config.heads // head_shards) * chunk * window)
  prompts = max(1, min(MAX_PROMPTS, -(-device_rows // sampling.samples_per_prompt),
                       config.cache_bytes // 4 // prompt_bytes))
  spent = prompts * prompt_bytes
  if config.page:
    slots, pages, row_pages = pages_for(model_config, config, device_rows, longest, spent)
    # The memory of pages does not depend on the batch or the length, so one size is enough.
    return Shapes((slots * shards,), (longest,), window, chunk, prompts * shards, shards, pages,
                  paged.table_size(row_pages))
  slots = slots_for(model_config, config, device_rows, longest, spent)
  weights = sum(x.size for x in jax.tree.leaves(models.shapes(model_config)))
  lengths = tuple(x for x in reversed(halves(longest, LEAST_LENGTH, 8)) if x >= window)
  found = Shapes(batch_sizes(slots * shards, shards, weights), lengths, window, chunk,
                 prompts * shards, shards, pages=0, table=0)
  # On a CPU a program takes a second or two, and a row is arithmetic.
  if sharding.platform() == "cpu":
    return found
  return accelerator_sizes(model_config, sampling, cache_type(model_config, config),
                           weights // head_shards, found)
