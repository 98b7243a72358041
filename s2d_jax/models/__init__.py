"""Models as data: a `Model` is a frozen config and three pure functions on a plain dict."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from s2d_jax.models import decoder, layout, llama, qwen3
from s2d_jax.models.decoder import Cache, Config, empty_cache
from s2d_jax.models.layout import Weight

__all__ = [
    "Cache", "Config", "Model", "Weight", "axes", "build", "config_json", "empty_cache", "get",
    "read_config", "shapes", "weights",
]

FAMILIES = {"qwen3": qwen3, "llama": llama}
PUBLISHED = qwen3.PUBLISHED | llama.PUBLISHED


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder; two of equal `config` are equal, and `build` makes them identical.

  init(key) -> params: float32, layers stacked on a leading axis.
  apply(params, tokens_BT, positions_BT, segments_BT, cache=None) -> (features_BTD, cache):
    positions restart with each segment, segment 0 is padding, a token reads what is not later in
    its own segment. With a cache the T tokens go to its next T slots, and are read with the rest.
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
  """The Model of a published name or of a config.json dict; `run` may give dtype and remat.

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
  return layout.nest({path: weight.axes for path, weight in weights(config).items()})


def shapes(config):
  """The parameters as `jax.ShapeDtypeStruct`s, without making them."""
  return jax.eval_shape(lambda: build(config).init(jax.random.key(0)))
