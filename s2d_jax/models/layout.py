"""The Hugging Face form of a dense decoder: its table of weights and the keys of its config.json.

A family's file names its own keys and adds its own rows; the rest is here.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from s2d_jax.errors import InputError
from s2d_jax.json_objects import Fields, Json, shown
from s2d_jax.models.config import Config, RopeScaling
from s2d_jax.sharding import Params

# The range of a config.json's numbers; activations in float32 hold all of it, and not 0.
_LEAST = 1e-30
_MOST = 1e30


@dataclasses.dataclass(frozen=True)
class Weight:
  """One row of a family's table of weights: our axes and the Hugging Face name.

  A Hugging Face matrix is [out, in] and two-dimensional. Ours is [in..., out...], and heads have an
  axis of their own. Our matrix is therefore theirs transposed and reshaped.
  """
  axes: tuple[str, ...]  # logical names, for sharding; a leading "layer" is the stack of layers
  name: str              # in the safetensors; {} stands for the layer's number
  inputs: int = 0        # number of our axes that are a matrix's "in", without layer; 0: no matrix

  @property
  def stacked(self) -> bool:
    """True if every layer has one of its own."""
    return self.axes[0] == "layer"

  def to_ours(self, theirs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One layer of our weight, of `shape`, from their array (a view)."""
    return theirs.T.reshape(shape) if self.inputs else theirs.reshape(shape)

  def to_theirs(self, ours: jax.Array) -> jax.Array:
    """Their array from one layer of our weight (a view)."""
    return ours.reshape(self.their_shape(ours.shape)[::-1]).T if self.inputs else ours

  def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of their array for one layer of our weight, of `shape`."""
    if not self.inputs:
      return tuple(shape)
    return math.prod(shape[self.inputs:]), math.prod(shape[:self.inputs])

  def their_index(self, index: Sequence[slice], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices of their array that hold the slices `index` of one layer of our weight.

    Of the axes that are folded into one of theirs only the first may be split: the heads, but never
    one head.
    """
    if not self.inputs:
      return tuple(index)
    def fold(slices: Sequence[slice], sizes: Sequence[int]) -> slice:
      # The inner axes are whole, so a range of the first one is one range of the folded axis.
      inner = math.prod(sizes[1:])
      return slice(slices[0].start * inner, slices[0].stop * inner)
    return (fold(index[self.inputs:], shape[self.inputs:]),
            fold(index[:self.inputs], shape[:self.inputs]))


def dense_weights(config: Config) -> dict[str, Weight]:
  """{path of a parameter: its Weight} of a dense decoder: what Qwen3 and Llama have in common."""
  in_layer = {
      "attn_norm": (("embed",), "input_layernorm", 0),
      "attn/q": (("embed", "heads", "head"), "self_attn.q_proj", 1),
      "attn/k": (("embed", "kv_heads", "head"), "self_attn.k_proj", 1),
      "attn/v": (("embed", "kv_heads", "head"), "self_attn.v_proj", 1),
      "attn/o": (("heads", "head", "embed"), "self_attn.o_proj", 2),
      "mlp_norm": (("embed",), "post_attention_layernorm", 0),
      "mlp/gate": (("embed", "mlp"), "mlp.gate_proj", 1),
      "mlp/up": (("embed", "mlp"), "mlp.up_proj", 1),
      "mlp/down": (("mlp", "embed"), "mlp.down_proj", 1),
  }
  # The order is that of the tensors in saved files, which are filled one after the other.
  table = {"embed": Weight(("vocab", "embed"), "model.embed_tokens.weight")}
  for path, (axes, name, inputs) in in_layer.items():
    table[f"layers/{path}"] = layer_weight(axes, name, inputs)
  table["norm"] = Weight(("embed",), "model.norm.weight")
  if not config.tied:
    table["unembed"] = Weight(("vocab", "embed"), "lm_head.weight")
  return table


def layer_weight(axes: tuple[str, ...], name: str, inputs: int = 0) -> Weight:
  """The Weight of a parameter that every layer has; `name` is the module's name in a layer."""
  return Weight(("layer", *axes), f"model.layers.{{}}.{name}.weight", inputs)


def flat(tree: Params) -> dict[str, Any]:
  """{"layers/attn/q": leaf, ...} of a nested dict; a tuple is a leaf."""
  # A tuple holds the logical axes of one parameter; parameters themselves are nested dicts only.
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(leaves: dict[str, Any]) -> Params:
  """The nested dict of {"layers/attn/q": leaf, ...}; the inverse of `flat`."""
  tree = {}
  for path, leaf in leaves.items():
    *folders, name = path.split("/")
    functools.reduce(lambda at, folder: at.setdefault(folder, {}), folders, tree)[name] = leaf
  return tree


def refuse(json: Json, key: str, *allowed: Any) -> None:
  """Refuses a setting that is not implemented.

  Raises:
    InputError: config.json has the key, and its value is neither None nor one of `allowed`.
  """
  value = json.get(key)
  if value is not None and value not in allowed:
    raise InputError(f"config.json asks for {key}={shown(value)}, which is not implemented: "
                     f"use a model with {key} {' or '.join(map(repr, allowed)) or 'absent'}.")


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
  """(theta, scaling) of RoPE from config.json, in the new spelling or the old one.

  The new one is `rope_parameters`; the old one is `rope_theta` with `rope_scaling`.

  Raises:
    InputError: two settings contradict each other, a key is missing or wrong or read by nothing, or
      the kind is not implemented.
  """
  # A file may have both spellings for the sake of older readers; equal ones do no harm.
  spellings = {f"config.json's {key}": json for key in ("rope_parameters", "rope_scaling")
               if (json := fields.object(key, {}))}
  # Without either, the model's own keys are RoPE's settings.
  if not spellings:
    spellings = {"config.json": {k: v for k, v in fields.json.items() if k == "rope_theta"}}
  found = {name: _rope_settings(Fields(name, json), fields) for name, json in spellings.items()}
  name, settings = next(iter(found.items()))
  if any(_not_null(other) != _not_null(settings) for other in found.values()):
    new, old = spellings.values()
    raise InputError(f"config.json has rope_parameters={new} and rope_scaling={old}, which "
                     "differ: keep the one that the weights were trained with.")
  refuse(settings, "rope_type", *_ROPE_KEYS)
  kind = settings["rope_type"]
  unread = sorted(_not_null(settings).keys() - {*_ROPE_KEYS[kind]})
  if unread:
    raise InputError(f"{name} has the key {shown(unread[0])}, which RoPE of type {kind} does not "
                     "read: correct rope_type, or take the file that came with the weights.")
  settings = Fields(name, settings)
  theta = settings.number("rope_theta", _LEAST, _MOST)
  if kind == "default":
    return theta, None
  scaling = RopeScaling(
      factor=settings.number("factor", _LEAST, _MOST),
      low_freq_factor=settings.number("low_freq_factor", _LEAST, _MOST),
      high_freq_factor=settings.number("high_freq_factor", _LEAST, _MOST),
      original_max_positions=settings.integer("original_max_position_embeddings"))
  # Frequencies between the two are interpolated, which divides by their difference.
  if scaling.low_freq_factor >= scaling.high_freq_factor:
    raise InputError(f"{settings.name} has low_freq_factor {scaling.low_freq_factor:g} and "
                     f"high_freq_factor {scaling.high_freq_factor:g}: the first is the smaller "
                     "one, so take the file that came with the weights.")
  return theta, scaling


# The keys that each implemented kind of RoPE reads.
_ROPE_KEYS = {"default": ("rope_type", "rope_theta")}
_ROPE_KEYS["llama3"] = (*_ROPE_KEYS["default"], "factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings")


def _not_null(json: Json) -> Json:
  return {key: value for key, value in json.items() if value is not None}


def _rope_settings(settings: Fields, fields: Fields) -> Json:
  """The settings of one spelling, together with those that stand among the model's own keys.

  Args:
    settings: the object of the spelling.
    fields: the whole config.json.
  """
  found = dict(settings.json)
  # Older files say "type" where newer ones say "rope_type"; some have both.
  older = settings.text("type", None)
  kind = settings.text("rope_type", None) or older or "default"
  if older not in (None, kind):
    raise InputError(f"{settings.name} has rope_type={kind!r} and type={older!r}, which differ: "
                     "keep the one that the weights were trained with.")
  found["rope_type"] = kind
  found.pop("type", None)
  for json in (found, fields.json):
    refuse(json, "partial_rotary_factor", 1.0)
  found.pop("partial_rotary_factor", None)
  for key in {*_ROPE_KEYS.get(kind, ()), "rope_theta"} - {"rope_type"}:
    inner = settings.number(key, _LEAST, _MOST, None)
    outer = fields.number(key, _LEAST, _MOST, None)
    if inner is None and outer is not None:
      found[key] = fields.json[key]
    elif outer not in (None, inner):
      raise InputError(f"{settings.name} has {key}={inner:g} and config.json itself has {outer:g}, "
                       "which differ: keep the one that the weights were trained with.")
  return found


def read(json: Json, *, architecture: str, qk_norm: bool, head_width: int | None,
         **run: Any) -> Config:
  """The Config of a config.json, from the keys that Qwen3 and Llama have in common.

  Args:
    json: the object of a config.json.
    architecture: the family's name.
    qk_norm: whether the family normalizes queries and keys.
    head_width: the family's default for a config.json without head_dim; None: width / heads.
    **run: the fields of the Config that say how it runs, `models.RUN`.

  Raises:
    InputError: a key is missing, has a value of another type or beyond its range, or asks for
      something that is not implemented.
  """
  # Each of these changes what the model computes, so none may be passed over in silence.
  refuse(json, "hidden_act", "silu")
  for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
    refuse(json, key, False)
  for key in ("num_experts", "num_local_experts", "quantization_config"):
    refuse(json, key)
  fields = Fields("config.json", json)
  layer_types = fields.list("layer_types", [])
  for kind in layer_types:
    refuse({"layer_types": kind}, "layer_types", "full_attention")
  layers = fields.integer("num_hidden_layers", high=10**4)
  if layer_types and len(layer_types) != layers:
    raise InputError(f"config.json has {len(layer_types)} layer_types and num_hidden_layers is "
                     f"{layers}: take the file that came with the weights.")
  theta, scaling = _rope(fields)
  # The upper bounds are far above any model. They keep products of sizes within 64 bits, so that a
  # wrong size is refused with the weights and does not overflow before.
  width = fields.integer("hidden_size", high=10**6)
  heads = fields.integer("num_attention_heads", high=10**4)
  # The width of a head is read where it is given: in Qwen3 it is not width / heads. A file without
  # num_key_value_heads is of a model in which every query head has its own key head.
  return Config(
      architecture=architecture,
      vocab_size=fields.integer("vocab_size", high=10**8),
      width=width,
      layers=layers,
      heads=heads,
      kv_heads=fields.integer("num_key_value_heads", high=10**4, default=heads),
      head_width=fields.integer("head_dim", high=10**4, default=head_width or width // heads),
      mlp=fields.integer("intermediate_size", high=10**7),
      norm_eps=fields.number("rms_norm_eps", _LEAST, 1.0),
      rope_theta=theta,
      rope_scaling=scaling,
      qk_norm=qk_norm,
      tied=fields.boolean("tie_word_embeddings", False),
      max_positions=fields.integer("max_position_embeddings"),
      **run)


def write(config: Config, *, model_type: str, architecture: str) -> Json:
  """The config.json of a Config: the inverse of `read`."""
  # In the new spelling alone, so that the file cannot contradict itself.
  rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
  if config.rope_scaling is not None:
    scaling = dataclasses.asdict(config.rope_scaling)
    scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
    rope_parameters |= {"rope_type": "llama3", **scaling}
  # `head_dim` and `attention_bias` are always written, because other readers have defaults of
  # their own for a family, and those may differ from ours.
  return {
      "architectures": [architecture],
      "model_type": model_type,
      "vocab_size": config.vocab_size,
      "hidden_size": config.width,
      "num_hidden_layers": config.layers,
      "num_attention_heads": config.heads,
      "num_key_value_heads": config.kv_heads,
      "head_dim": config.head_width,
      "intermediate_size": config.mlp,
      "hidden_act": "silu",
      "rms_norm_eps": config.norm_eps,
      "rope_parameters": rope_parameters,
      "tie_word_embeddings": config.tied,
      "max_position_embeddings": config.max_positions,
      "attention_bias": False,
  }
