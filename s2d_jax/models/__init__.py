"""Models as data: a `Model` is a frozen config and three pure functions on a plain dict."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax import keys, sharding
from s2d_jax.models import decoder, layout, llama, qwen3
from s2d_jax.models.caches import KV, empty_cache
from s2d_jax.models.decoder import ADAPTED, Config, Lora
from s2d_jax.models.layout import Weight

__all__ = [
    "KV", "Config", "Lora", "Model", "Weight", "adapters", "axes", "build", "config_json",
    "empty_cache", "frozen_shapes", "get", "lora", "merge", "read_config", "shapes", "split",
    "trained", "weights",
]

FAMILIES = {"qwen3": qwen3, "llama": llama}
RUN = ("dtype", "remat", "attention")  # the fields of a Config that say how it runs
PUBLISHED = qwen3.PUBLISHED | llama.PUBLISHED


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder; two of equal `config` are equal, and `build` makes them identical.

  init(key) -> params: float32, layers stacked on a leading axis.
  apply(params, tokens_BT, positions_BT, segments_BT, cache=None) -> (features_BTD, cache):
    positions restart with each segment, segment 0 is padding, a token reads what is not later in
    its own segment. With a cache the T tokens go to the slots of their positions, which follow one
    another, and read those before them; segments are not looked at.
  unembed(params) -> weight_VD: features · weightᵀ are the logits.
  """
  config: Config
  init: Callable = dataclasses.field(compare=False)
  apply: Callable = dataclasses.field(compare=False)
  unembed: Callable = dataclasses.field(compare=False)


@functools.cache
def build(config):
  """The Model of a Config; equal configs give the identical Model, so `jit` knows it again."""
  module = decoder.Decoder(config)

  def init(key):
    token_BT = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, token_BT, token_BT, token_BT)["params"]

  def apply(params, tokens_BT, positions_BT, segments_BT, cache=None):
    return module.apply({"params": params}, tokens_BT, positions_BT, segments_BT, cache)

  def unembed(params):
    return params["embed"] if config.tied else params["unembed"]

  return Model(config, init, apply, unembed)


def get(which, **run):
  """The Model of a published name or of a config.json dict; `run` may give what RUN names.

  Raises:
    ValueError: an unknown name, a family or a setting that is not implemented, a key missing.
  """
  if isinstance(which, str):
    if which.lower() not in PUBLISHED:
      raise ValueError(f"no model is called {which!r}: choose from {', '.join(PUBLISHED)}, "
                       "or give the dict of a config.json.")
    which = PUBLISHED[which.lower()]
  return build(read_config(which, **run))


def read_config(json, **run):
  """The Config of a config.json dict."""
  if json.get("model_type") not in FAMILIES:
    raise ValueError(f"config.json asks for model_type={json.get('model_type')!r}, which is not "
                     f"implemented: use one of {', '.join(FAMILIES)}.")
  return FAMILIES[json["model_type"]].config(json, **run)


def config_json(config):
  """The config.json dict of a Config."""
  return FAMILIES[config.architecture].config_json(config)


def weights(config):
  """{"layers/attn/q": Weight(axes, name, ...), ...}: the architecture's table of weights."""
  return FAMILIES[config.architecture].weights(config)


def axes(config):
  """The logical axes of each parameter, in a tree of the parameters' structure."""
  base = {path: weight.axes for path, weight in weights(config).items()}
  return layout.nest(base | {path: names for _, *pair in _adapters(config)
                             for path, names in pair})


def _adapters(config):
  """(path of a weight, (path, axes) of its A, (path, axes) of its B) for each adapted weight."""
  targets = () if config.lora is None else config.lora.targets
  for path, weight in weights(config).items():
    if weight.inputs and path.rpartition("/")[2] in targets:
      (layer, *names), n = weight.axes, weight.inputs
      yield (path, (f"{path}_a", (layer, *names[:n], "rank")),
             (f"{path}_b", (layer, "rank", *names[n:])))


LORA_KEYS = {
    "rank": keys.at_least(0, neutral=0),
    "alpha": keys.Key(lambda alpha: alpha > 0, "choose it above 0", neutral=32.0),
    "targets": keys.Key(lambda names: set(names) <= set(ADAPTED),
                        f"choose from {', '.join(ADAPTED)}", neutral=ADAPTED)}


def lora(hp):
  """The Lora of a stage's block of config, None where its rank is 0: everything is trained."""
  rank, alpha, targets = hp.rank, float(hp.alpha), tuple(hp.targets)
  return Lora(rank, alpha, targets) if rank else None


def trained(config):
  """The logical axes of what is trained: of the adapters where there are some, else of all."""
  return axes(config) if config.lora is None else split(config, axes(config))[0]


def split(config, tree):
  """(adapters, the rest) of a tree of parameters, or of their shapes or axes."""
  own = {path for _, *pair in _adapters(config) for path, _ in pair}
  flat = layout.flat(tree)
  return (layout.nest({path: x for path, x in flat.items() if path in own}),
          layout.nest({path: x for path, x in flat.items() if path not in own}))


def adapters(model, seed):
  """New adapters of a model whose config.lora is set, on the current mesh: B is zero, A drawn.

  With them the model computes what it does without. `seed` is an integer.
  """
  mesh, config = sharding.current_mesh(), model.config
  where = None
  if mesh is None:
    seed = jax.device_put(np.uint32(seed))
  else:
    where = sharding.weight_shardings(mesh, split(config, axes(config))[0],
                                      split(config, shapes(config))[0])
    seed = sharding.put(np.uint32(seed), sharding.replicated(mesh))
  def draw(seed):
    return split(config, model.init(jax.random.key(seed)))[0]
  return jax.jit(draw, out_shardings=where)(seed)


def merge(config, params):
  """The parameters of the same model without adapters: W + (alpha / rank)·AB, in W's own type."""
  flat, scale = layout.flat(params), config.lora.alpha / config.lora.rank
  for path, (a, _), (b, _) in _adapters(config):
    a_LDr, b_LrO = flat.pop(a), flat.pop(b)
    L, *inputs, r = a_LDr.shape
    product = jnp.einsum("LDr,LrO->LDO", a_LDr.reshape(L, -1, r).astype(jnp.float32),
                         b_LrO.reshape(L, r, -1).astype(jnp.float32), precision="highest")
    weight = flat[path]
    flat[path] = (weight.astype(jnp.float32) + scale * product.reshape(weight.shape)).astype(
        weight.dtype)
  return layout.nest(flat)


def shapes(config):
  """The parameters as `jax.ShapeDtypeStruct`s, without making them."""
  return jax.eval_shape(lambda: build(config).init(jax.random.key(0)))


def frozen_shapes(config):
  """`shapes` of a model that is not trained: stored in the type that products read, config.dtype.

  RMSNorm's scales stay float32, as they are multiplied, so that the model computes to the last bit
  what it does in float32.
  """
  found, table = layout.flat(shapes(config)), weights(config)
  def stored(path, x):
    scale = path in table and len(table[path].axes) - table[path].stacked == 1  # no adapter
    return x if scale else jax.ShapeDtypeStruct(x.shape, config.dtype)
  return layout.nest({path: stored(path, x) for path, x in found.items()})
