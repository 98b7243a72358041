"""Everything a sampler runs on the device, compiled ahead of time for a short list of shapes."""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from s2d_jax import models, program_cache, sharding
from s2d_jax.models import caches, kernels
from s2d_jax.models.config import Config
from s2d_jax.sampler import capacity, decode, driver
from s2d_jax.sampler.capacity import SamplerConfig, Shapes
from s2d_jax.sampler.sampling import Sampling
from s2d_jax.sharding import Params

# Lowered while `build` collects them, compiled in what it returns.
Program = jax.stages.Lowered | jax.stages.Compiled
Size = tuple[int, int]  # (batch, length)


class Compiler(NamedTuple):
  """How a sampler's programs are compiled; `preflight` has a compiler that reports each."""
  compile: Callable[[jax.stages.Lowered], Any] = jax.stages.Lowered.compile
  largest_only: bool = False  # of each kind of program the one with the largest arrays


RUN_COMPILER = Compiler()


class Programs(NamedTuple):
  """The compiled programs of a sampler, by the sizes of the slots that they take.

  Those of `layer_weights`, `prefill`, `admit`, `grow`, `shorten` and `shrink` take one layer.
  """
  mesh: Mesh | None
  shapes: Shapes
  config: SamplerConfig
  weights: decode.Weights          # abstract
  slots: dict[Size, decode.Slots]  # abstract
  prompts: tuple[caches.KV, ...]   # abstract: the cache of the prompts that are read at once
  layer_weights: Program
  other_weights: Program
  empty: Program                   # at the largest batch and the shortest length
  empty_prompts: Program
  embed_chunk: Program
  prefill: Program
  admit: dict[int, Program]        # by length
  start_rows: Program              # of the largest batch, in which alone rows are admitted
  decode: dict[Size, Program]
  grow: dict[Size, Program]        # to the next length
  shorten: dict[int, Program]      # by length: of the largest batch to the length before
  shrink: dict[Size, Program]      # to the next batch
  shrink_rows: dict[int, Program]  # by batch: the slots without their cache

  def put(self, x: np.ndarray, layout: jax.sharding.Sharding | None = None) -> jax.Array:
    """A host's array on the devices; without a layout whole on each, as the programs take it."""
    if self.mesh is None:
      return jax.device_put(x)
    return sharding.put(x, layout or sharding.replicated(self.mesh))

  def prepare(self, params: Params) -> decode.Weights:
    """The Weights of parameters, laid out for decoding."""
    others, layers = decode.split_layers(params)
    count = len(self.weights.params["layers"])
    return self.other_weights(others).with_layers(
        self.layer_weights(layers, self.put(np.int32(i))) for i in range(count))

  def read_prompts(self, weights: decode.Weights, prompt_PW: np.ndarray,
                   longest: int) -> tuple[caches.KV, ...]:
    """The cache of P prompts, of which the longest has `longest` tokens."""
    others, layers = decode.split_layers(weights.params)
    tokens_PW = self.put(prompt_PW)
    cache = list(self.empty_prompts())
    # Attention scores are chunk × W for each prompt and head, and not W × W: memory bounds the
    # chunk.
    for start in range(0, longest, self.shapes.chunk):
      at = self.put(np.int32(start))
      x_PCD = self.embed_chunk(others, tokens_PW, at)
      for i, layer in enumerate(layers):
        x_PCD, cache[i] = self.prefill(layer, x_PCD, at, cache[i])
    return tuple(cache)


@program_cache.cached
def build(model: models.Model, sampling: Sampling, config: SamplerConfig, rows: int,
          prompt_tokens: int, mesh: Mesh | None, tree: jax.tree_util.PyTreeDef,
          leaves: tuple[Any, ...], compiler: Compiler = RUN_COMPILER) -> Programs:
  """The Programs of a sampler for `rows` rows and prompts of at most `prompt_tokens` tokens.

  `tree` and `leaves` are the abstract parameters, flattened so that the cache can hash them.
  """
  model_config = model.config
  params = jax.tree.unflatten(tree, leaves)
  shapes = capacity.shapes(model_config, sampling, config, rows, prompt_tokens)
  shapes = shapes.largest() if compiler.largest_only else shapes
  # Samplers that differ in these share programs, because the shapes follow from them.
  config = config._replace(cache_gib=0.0, available=None, taken=None)
  slots = {(B, S): abstract_slots(model_config, config, shapes, B, S, mesh)
           for B in shapes.batches for S in shapes.lengths}
  empty_prompts = functools.partial(caches.empty_cache, model_config, shapes.prompts,
                                    shapes.window, capacity.cache_type(model_config, config))
  prompts = _abstract_cache(jax.eval_shape(empty_prompts), mesh)
  weights = abstract_weights(model, params, mesh)
  # All layers have the same shapes, so the first stands for each.
  layer = {size: caches.layers(found.cache)[0] for size, found in slots.items()}
  states = {B: slots[B, shapes.lengths[0]]._replace(cache=None) for B in shapes.batches}
  whole = functools.partial(_whole, mesh)
  lower = functools.partial(_lower, mesh)
  most = shapes.batches[0]
  decoded = list(slots)
  if compiler.largest_only:
    decoded = [(most, shapes.lengths[-1])]
  admit = functools.partial(decode.admit, shapes.shards)
  sources = [whole(most), whole(most, dtype=bool)]
  if config.page:
    admit = decode.admit_paged
    pages = most + shapes.prompts * shapes.shards * shapes.window // config.page
    sources = [whole(pages), whole(pages)]
  new_rows = whole(most, dtype=bool), whole(most), whole(most), whole(most, 2, dtype=np.uint32)
  return _compile(Programs(
      mesh, shapes, config, weights, slots, prompts,
      empty=lower(functools.partial(_empty, model_config, config, shapes, most, shapes.lengths[0]),
                  slots[most, shapes.lengths[0]]),
      empty_prompts=lower(empty_prompts, prompts),
      # `admit` and `decode` donate the cache, which is so updated in place.
      admit={S: lower(admit, layer[most, S], layer[most, S], prompts[0], *sources, donate=0)
             for S in shapes.lengths},
      start_rows=lower(decode.start_rows, states[most], states[most], *new_rows),
      decode={size: lower_decode(model, sampling, config.tokens, weights, slots[size], mesh)
              for size in decoded},
      **_reading(model, shapes, params, weights, prompts, mesh),
      **_resizing(shapes, layer, states, mesh)), compiler.compile)


def _reading(model: models.Model, shapes: Shapes, params: Params, weights: decode.Weights,
             prompts: tuple[caches.KV, ...], mesh: Mesh | None) -> dict[str, Program]:
  """The programs that lay out weights and read prompts, lowered; `prompts` is their cache."""
  whole = functools.partial(_whole, mesh)
  lower = functools.partial(_lower, mesh)
  others, layers = decode.split_layers(params)
  layer = weights.params["layers"][0]
  other_weights = weights._replace(params=decode.split_layers(weights.params)[0])
  x_PCD = _abstract_features(model.config, shapes, mesh)
  return {
      "layer_weights": lower(functools.partial(decode.layer_weights, model), layer, layers,
                             whole()),
      "other_weights": lower(functools.partial(decode.other_weights, model), other_weights,
                             others),
      "embed_chunk": lower(functools.partial(decode.embed_chunk, model, shapes.chunk), x_PCD,
                           other_weights.params, whole(shapes.prompts, shapes.window), whole()),
      "prefill": lower(functools.partial(decode.prefill, model), (x_PCD, prompts[0]), layer, x_PCD,
                       whole(), prompts[0], donate=(1, 3))}


def _resizing(shapes: Shapes, layer: dict[Size, caches.Layer], states: dict[int, decode.Slots],
              mesh: Mesh | None) -> dict[str, dict[Any, Program]]:
  """The programs that change the cache's size, lowered.

  Args:
    layer: of the cache, by its size.
    states: the slots without their cache, by batch.
  """
  whole = functools.partial(_whole, mesh)
  # They donate nothing, because no array of the result has the old size.
  lower = functools.partial(_lower, mesh)
  most = shapes.batches[0]
  longer = list(itertools.pairwise(shapes.lengths))
  fewer = list(itertools.pairwise(shapes.batches))
  return {
      "grow": {(B, S): lower(functools.partial(decode.grow, length=to), layer[B, to], layer[B, S])
               for B in shapes.batches for S, to in longer},
      "shorten": {S: lower(functools.partial(decode.shorten, length=to), layer[most, to],
                           layer[most, S]) for to, S in longer},
      "shrink": {(B, S): lower(functools.partial(decode.shrink, shapes.shards), layer[to, S],
                               layer[B, S], whole(to))
                 for B, to in fewer for S in shapes.lengths},
      "shrink_rows": {B: lower(decode.shrink_rows, states[to], states[B], whole(to))
                      for B, to in fewer}}


def fitted(config: SamplerConfig, model: models.Model, params: Params, memory: int | None,
           held: int) -> SamplerConfig:
  """The config, with the bytes that a device has left for the cache where it asks for those.

  Args:
    params: the model's, or their abstract arrays, of which a call makes a copy for decoding.
    memory: bytes of a device's memory; None: unknown.
    held: bytes on each device that are in use while the sampler runs.
  """
  if config.cache_gib or memory is None:
    return config
  weights = abstract_weights(model, sharding.abstract(params), sharding.current_mesh())
  copied = sharding.device_bytes(weights)
  return config._replace(available=capacity.available_bytes(memory, held + copied),
                         taken=(held, copied))


def abstract_weights(model: models.Model, params: Params, mesh: Mesh | None) -> decode.Weights:
  """The shapes of the Weights that `decode.prepare` makes of `params`, laid out for decoding."""
  weights = jax.eval_shape(functools.partial(decode.prepare, model), params)
  if mesh is None:
    return weights
  return sharding.laid_out(weights, _layout(model.config, mesh, weights))


def abstract_slots(model_config: Config, config: SamplerConfig, shapes: Shapes, batch: int,
                   length: int, mesh: Mesh | None) -> decode.Slots:
  """The shapes of `batch` slots with a cache of `length` tokens, laid out on the mesh."""
  slots = jax.eval_shape(
      functools.partial(_empty, model_config, config, shapes, batch, length))
  rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=mesh and sharding.batch_sharding(mesh, x.shape)),
      slots._replace(cache=None))
  return rows._replace(cache=_abstract_cache(slots.cache, mesh))


def lower_decode(model: models.Model, sampling: Sampling, tokens: int, weights: decode.Weights,
                 slots: decode.Slots, mesh: Mesh | None) -> jax.stages.Lowered:
  """The program that decodes up to `tokens` tokens of each slot; the slots are donated."""
  batch = slots.token_B.shape[0]
  # The host reads these two alone, so samplers that differ in them share the program.
  sampling = sampling._replace(samples_per_prompt=1, stop_strings=())
  whole = functools.partial(_whole, mesh)
  run = functools.partial(decode.decode, model, sampling, tokens)
  alive_B = whole(batch, dtype=bool)
  return _lower(mesh, run, (slots, alive_B, _decoded(whole, batch, tokens)), weights, slots,
                alive_B, whole(), donate=1, options=_loop_on_device(mesh))


# The parts of one CUDA graph: those of XLA's default, and loops.
_GRAPH = "xla_gpu_enable_command_buffer"
_GRAPH_PARTS = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,WHILE"


def _loop_on_device(mesh: Mesh | None) -> dict[str, str] | None:
  """The compiler's options with which a GPU runs the whole loop over tokens as one CUDA graph.

  Without them the host launches each token's kernels and waits for one boolean. A driver before
  CUDA 12.3 has no loops in graphs, and XLA would then leave all graphs out: its default stays, with
  a warning. Messages between devices are not put into graphs by default, so on several devices
  XLA's default stays. So does what the user sets of it in XLA_FLAGS.
  """
  single = mesh is None or mesh.size == 1
  if sharding.platform() != "gpu" or not single or _GRAPH in os.environ.get("XLA_FLAGS", ""):
    return None
  return {_GRAPH: _GRAPH_PARTS} if driver.has_loops_in_graphs() else None


def _lower(mesh: Mesh | None, f: Callable, out: Params, *args: Any, donate: Any = (),
           options: dict[str, str] | None = None) -> jax.stages.Lowered:
  """f lowered for abstract arguments, with the layouts of `out` for its results.

  `f` is a function, or a partial of one with hashable arguments. `options` are the compiler's.
  """
  layout = mesh and jax.tree.map(lambda x: x.sharding, out)
  parts = (f,)
  # Partials are equal only where they are identical.
  if isinstance(f, functools.partial):
    parts = (f.func, *f.args, *sorted(f.keywords.items()))
  def lower() -> jax.stages.Lowered:
    with kernels.without_warning():
      # The newest jax would leave out arguments that a program does not use, and the account of
      # memory with them, though the device holds them meanwhile.
      return jax.jit(f, out_shardings=layout, donate_argnums=donate,
                     keep_unused=True, compiler_options=options).lower(*args)

  return program_cache.shared((*parts, program_cache.shapes_of((out, args)), donate, mesh), lower)


def _whole(mesh: Mesh | None, *shape: int,
           dtype: jax.typing.DTypeLike = np.int32) -> jax.ShapeDtypeStruct:
  """An array that the host sends or fetches: whole on every device."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and sharding.replicated(mesh))


def _decoded(whole: Callable[..., jax.ShapeDtypeStruct], batch: int,
             tokens: int) -> decode.Decoded:
  """The shapes of a dispatch's results; `whole` is `_whole` on the mesh."""
  logp_BN = whole(batch, tokens, dtype=np.float32)
  return decode.Decoded(whole(batch, tokens), logp_BN, logp_BN, whole(batch),
                        whole(batch, dtype=bool))


def _empty(model_config: Config, config: SamplerConfig, shapes: Shapes, batch: int,
           length: int) -> decode.Slots:
  """Slots without rows, with a cache of `length` tokens for each."""
  dtype = capacity.cache_type(model_config, config)
  if config.page:
    return decode.empty(caches.empty_pages(model_config, batch, shapes.pages * shapes.shards,
                                           config.page, shapes.table, dtype), batch)
  return decode.empty(caches.empty_cache(model_config, batch, length, dtype), batch)


def _abstract_features(model_config: Config, shapes: Shapes,
                       mesh: Mesh | None) -> jax.ShapeDtypeStruct:
  """The shape of a layer's features of a chunk of each prompt, laid out on the mesh."""
  shape = (shapes.prompts, shapes.chunk, model_config.width)
  return jax.ShapeDtypeStruct(shape, model_config.dtype,
                              sharding=mesh and sharding.batch_sharding(
                                  mesh, shape, ("batch", "time", "embed")))


def _abstract_cache(cache: caches.Cache, mesh: Mesh | None) -> caches.Cache:
  """The shapes of a cache with their layouts; rows and key heads are split over the devices."""
  def laid_out(x: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> jax.ShapeDtypeStruct:
    where = mesh and sharding.batch_sharding(mesh, x.shape, names)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(laid_out, cache, caches.axis_names(cache))


def _compile(programs: Programs, compile: Callable[[jax.stages.Lowered], Any]) -> Programs:
  """The Programs with every lowered program compiled."""
  # XLA compiles without the interpreter's lock, so threads compile several programs at a time.
  lowered, tree = jax.tree.flatten(programs, is_leaf=lambda x: isinstance(x, jax.stages.Lowered))
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return tree.unflatten(pool.map(
        # A lowered program that another sampler of the run has is compiled already.
        lambda x: (program_cache.shared((compile, x), lambda: compile(x))
                   if isinstance(x, jax.stages.Lowered) else x), lowered))


def _layout(model_config: Config, mesh: Mesh, weights: decode.Weights) -> decode.Weights:
  """The layout of the Weights: split over `tensor` as the trainer's, and whole over `fsdp`."""
  # The trainer gathers weights over `fsdp` for each use. Decoding uses them for each token, so they
  # are gathered once for all tokens.
  axes = models.axes(model_config)
  # The trainer's layers are stacked, and those of decoding are not: they lack the first axis.
  layer = jax.tree.map(lambda names: names[1:], axes["layers"],
                       is_leaf=lambda x: isinstance(x, tuple))
  layers = (layer,) * model_config.layers
  def layout(names: tuple[str, ...], x: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
    return sharding.decode_sharding(mesh, names, x.shape)
  params = jax.tree.map(layout, axes | {"layers": layers}, weights.params,
                        is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], str))
  return decode.Weights(params, layout(("embed", "vocab"), weights.head_DV))
