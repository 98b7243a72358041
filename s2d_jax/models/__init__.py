"""Models: a `Model` is a frozen Config and five pure functions on a plain dict of parameters.

A model family is one file that FAMILIES names. It has four public names:

  config(json, **run) -> Config          of a Hugging Face config.json
  config_json(config) -> dict            its inverse
  weights(config) -> {path: Weight}      the table that import, export and sharding read
  PUBLISHED                              {name: config.json} of published models
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from s2d_jax import keys, sharding
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Json, shown
from s2d_jax.models import decoder, layout, llama, qwen3
from s2d_jax.models.caches import KV, empty_cache
from s2d_jax.models.config import ADAPTED, Config, Lora
from s2d_jax.models.layout import Weight
from s2d_jax.sharding import Params

__all__ = [
    "KV", "Config", "Lora", "Model", "Weight", "adapters", "axes", "build", "config_json",
    "empty_cache", "frozen_shapes", "get", "laid_out", "lora", "merge", "read_config", "shapes",
    "split", "trained", "weights",
]

# The key is model_type in config.json, and `architecture` in a Config.
FAMILIES = {"qwen3": qwen3, "llama": llama}
RUN = ("dtype", "remat", "attention")  # the fields of a Config that say how it runs
PUBLISHED = {name: json for family in FAMILIES.values() for name, json in family.PUBLISHED.items()}


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder. Models of equal `config` are equal, and `build` returns the identical one.

  init(key) -> params: float32, layers stacked on a leading axis.
  apply(params, tokens_BT, positions_BT, segments_BT, cache=None) -> (features_BTD, cache):
    positions restart with each segment, and segment 0 is padding. A token reads the tokens of its
    own segment that are not later. With a cache the T tokens go to the slots of their positions,
    which are consecutive, and read all slots up to their own; segments are ignored.
  unembed(params) -> weight_VD: features · weightᵀ are the logits.
  embed(params, tokens_BT) -> x_BTD: what the first layer reads.
  layer(params, x_BTD, positions_BT, kv) -> (x_BTD, kv): one layer, of its own parameters, with a
    cache; `apply` with a cache calls all layers.
  """
  config: Config
  init: Callable[[jax.Array], Params] = dataclasses.field(compare=False)
  apply: Callable[..., tuple[jax.Array, Any]] = dataclasses.field(compare=False)
  unembed: Callable[[Params], jax.Array] = dataclasses.field(compare=False)
  embed: Callable[[Params, jax.Array], jax.Array] = dataclasses.field(compare=False)
  layer: Callable[..., tuple[jax.Array, KV]] = dataclasses.field(compare=False)


@functools.cache
def build(config: Config) -> Model:
  """The Model of a Config; equal configs give the identical Model, so `jit` compiles it once."""
  module = decoder.Decoder(config)

  def init(key: jax.Array) -> Params:
    # One token is enough: no parameter's shape depends on the number of tokens.
    token_BT = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, token_BT, token_BT, token_BT)["params"]

  def apply(params: Params, tokens_BT: jax.Array, positions_BT: jax.Array,
            segments_BT: jax.Array, cache: Any = None) -> tuple[jax.Array, Any]:
    return module.apply({"params": params}, tokens_BT, positions_BT, segments_BT, cache)

  # A separate function, because the losses form logits from features one block at a time.
  def unembed(params: Params) -> jax.Array:
    return params["embed"] if config.tied else params["unembed"]

  def embed(params: Params, tokens_BT: jax.Array) -> jax.Array:
    return decoder.embedded(config, params["embed"], tokens_BT)

  def layer(params: Params, x_BTD: jax.Array, positions_BT: jax.Array,
            kv: KV) -> tuple[jax.Array, KV]:
    return decoder.layer(config, params, x_BTD, positions_BT, kv)

  return Model(config, init, apply, unembed, embed, layer)


def get(name_or_json: str | Json, **run: Any) -> Model:
  """The Model of a published name or of a config.json dict.

  Args:
    name_or_json: a key of PUBLISHED, or the object of a config.json.
    **run: values of the fields that RUN names.

  Raises:
    InputError: the name is unknown, the family or a setting is not implemented, or a key of
      config.json is missing.
  """
  if not isinstance(name_or_json, str):
    return build(read_config(name_or_json, **run))
  # Our names are lower case, and the published ones are written as in Qwen3-8B.
  if name_or_json.lower() not in PUBLISHED:
    raise InputError(f"no model is called {name_or_json!r}: choose from {', '.join(PUBLISHED)}, "
                     "or give the dict of a config.json.")
  return build(read_config(PUBLISHED[name_or_json.lower()], **run))


def read_config(json: Json, **run: Any) -> Config:
  """The Config of a config.json dict; arguments and errors as `get`."""
  family = json.get("model_type")
  # A list has no hash and could not be looked up.
  if not isinstance(family, str) or family not in FAMILIES:
    raise InputError(f"config.json asks for model_type={shown(family)}, which is not implemented: "
                     f"use one of {', '.join(FAMILIES)}.")
  return FAMILIES[family].config(json, **run)


def config_json(config: Config) -> Json:
  """The config.json dict of a Config."""
  return FAMILIES[config.architecture].config_json(config)


# Cached, because an equal Weight that is another object would be compiled for again.
@functools.cache
def weights(config: Config) -> dict[str, Weight]:
  """{"layers/attn/q": Weight(axes, name, ...), ...}: the family's table of weights, to be read."""
  return FAMILIES[config.architecture].weights(config)


def axes(config: Config) -> Params:
  """The logical axes of each parameter, in a tree of the parameters' structure."""
  names = {path: weight.axes for path, weight in weights(config).items()}
  for _, a, b in _adapters(config):
    names |= dict([a, b])
  return layout.nest(names)


_Named = tuple[str, tuple[str, ...]]  # the path of a parameter and its logical axes


def _adapters(config: Config) -> Iterator[tuple[str, _Named, _Named]]:
  """(path of a weight, (path, axes) of its A, (path, axes) of its B) for each adapted weight."""
  targets = () if config.lora is None else config.lora.targets
  for path, weight in weights(config).items():
    # Embeddings and the scales of norms have no `inputs`, and so no adapters.
    if weight.inputs and path.rpartition("/")[2] in targets:
      (layer, *names), n = weight.axes, weight.inputs
      yield (path, (f"{path}_a", (layer, *names[:n], "rank")),
             (f"{path}_b", (layer, "rank", *names[n:])))


LORA_KEYS = {
    "rank": keys.at_least(0, neutral=0),
    "alpha": keys.Key(lambda alpha: alpha > 0, "choose it above 0", neutral=32.0),
    "targets": keys.Key(lambda names: set(names) <= set(ADAPTED),
                        f"choose from {', '.join(ADAPTED)}", neutral=ADAPTED)}


def lora(hp: ConfigDict) -> Lora | None:
  """The Lora of a stage's `lora` block; None if its rank is 0, which trains all weights."""
  if not hp.rank:
    return None
  # A Config is hashed by `build`, and its Lora with it, so the targets are a tuple.
  return Lora(hp.rank, float(hp.alpha), tuple(hp.targets))


def trained(config: Config) -> Params:
  """The logical axes of the trained parameters: of the adapters if there are any, else of all."""
  return axes(config) if config.lora is None else split(config, axes(config))[0]


def split(config: Config, tree: Params) -> tuple[Params, Params]:
  """(adapters, weights) of a tree of parameters, or of their shapes or axes."""
  adapter_paths = {path for _, (a, _), (b, _) in _adapters(config) for path in (a, b)}
  # By path and not by position, so that trees of shapes and of axes are split alike.
  flat = layout.flat(tree)
  return (layout.nest({path: x for path, x in flat.items() if path in adapter_paths}),
          layout.nest({path: x for path, x in flat.items() if path not in adapter_paths}))


def adapters(model: Model, seed: int) -> Params:
  """New adapters of a model whose config.lora is set, on the current mesh.

  A is random and B is zero, so the model computes the same as without them.
  """
  mesh = sharding.current_mesh()
  config = model.config
  where = None
  # The seed is copied explicitly, so that this works where implicit transfers are forbidden.
  if mesh is None:
    seed = jax.device_put(np.uint32(seed))
  else:
    where = sharding.weight_shardings(mesh, split(config, axes(config))[0],
                                      split(config, shapes(config))[0])
    seed = sharding.put(np.uint32(seed), sharding.replicated(mesh))
  # The compiler drops the weights that are initialized and not returned.
  def init(seed: jax.Array) -> Params:
    return split(config, model.init(jax.random.key(seed)))[0]
  return jax.jit(init, out_shardings=where)(seed)


def merge(config: Config, params: Params) -> Params:
  """The parameters of the model without adapters: W + (alpha / rank)·AB, in the dtype of W."""
  flat = layout.flat(params)
  scale = config.lora.alpha / config.lora.rank
  for path, (a, _), (b, _) in _adapters(config):
    a_LDr = flat.pop(a)
    b_LrO = flat.pop(b)
    L, *inputs, r = a_LDr.shape
    # Matrix units would round the operands, and the merged weights are saved for good.
    # AB is therefore formed in float32, whatever the dtype of the weights.
    product = jnp.einsum("LDr,LrO->LDO", a_LDr.reshape(L, -1, r).astype(jnp.float32),
                         b_LrO.reshape(L, r, -1).astype(jnp.float32), precision="highest")
    weight = flat[path]
    flat[path] = (weight.astype(jnp.float32) + scale * product.reshape(weight.shape)).astype(
        weight.dtype)
  return layout.nest(flat)


def shapes(config: Config) -> Params:
  """The parameters as `jax.ShapeDtypeStruct`s, all float32; no array is made."""
  # A tree of its own, which the caller may change.
  return jax.tree.map(lambda x: x, _shapes(config))


# Cached, because tracing a model takes a fifth of a second and a run asks for it often.
@functools.cache
def _shapes(config: Config) -> Params:
  return jax.eval_shape(lambda: build(config).init(jax.random.key(0)))


def frozen_shapes(config: Config) -> Params:
  """`shapes` of a model that is not trained: its matrices have the activations' dtype.

  Products read them in that dtype, and norms read their scales in float32. The model therefore
  computes bit for bit what it computes from float32 weights.
  """
  flat = layout.flat(shapes(config))
  for path, weight in weights(config).items():
    # RMSNorm reads its scale in float32, so a rounded one would change the features.
    is_scale = len(weight.axes) - weight.stacked == 1
    if not is_scale:
      flat[path] = jax.ShapeDtypeStruct(flat[path].shape, config.dtype)
  for _, *pair in _adapters(config):
    for path, _ in pair:
      flat[path] = jax.ShapeDtypeStruct(flat[path].shape, config.dtype)
  return layout.nest(flat)


def laid_out(config: Config, mesh: jax.sharding.Mesh,
             shapes_of: Callable[[Config], Params] = shapes) -> Params:
  """The abstract parameters with the layouts that training uses on a mesh.

  Args:
    shapes_of: `shapes` or `frozen_shapes`.
  """
  tree = shapes_of(config)
  return sharding.laid_out(tree, sharding.weight_shardings(mesh, axes(config), tree))
