"""How Hugging Face spells a decoder: the layout of its weights and the keys of its config.json."""

import dataclasses
import functools
import math

import jax

from s2d_jax.models import decoder


@dataclasses.dataclass(frozen=True)
class Weight:
  """One row of an architecture's table of weights: what it is to us and what it is to them.

  A Hugging Face matrix is [out, in] and two-dimensional; ours is [in..., out...] with heads as
  an axis of their own. So ours is theirs transposed and reshaped, whatever the heads are.
  """
  axes: tuple[str, ...]  # logical, for sharding; the leading "layer" is the stack
  name: str  # in the safetensors; {} is the layer
  inputs: int = 0  # how many of our axes (layer aside) are the "in" of a matrix; 0: left as it is

  @property
  def stacked(self):
    return self.axes[0] == "layer"

  def to_ours(self, theirs, shape):
    """One layer of our weight, of `shape`, from their array (a view)."""
    return theirs.T.reshape(shape) if self.inputs else theirs.reshape(shape)

  def to_theirs(self, ours):
    """Their array from one layer of our weight (a view)."""
    return ours.reshape(self.their_shape(ours.shape)[::-1]).T if self.inputs else ours

  def their_shape(self, shape):
    """The shape of their array for one layer of our weight, of `shape`."""
    if not self.inputs:
      return tuple(shape)
    return math.prod(shape[self.inputs:]), math.prod(shape[:self.inputs])

  def their_index(self, index, shape):
    """Where in their array the part `index` (slices) of one layer of our weight lies.

    Of the axes folded into one of theirs only the first may be split: heads, never a head.
    """
    if not self.inputs:
      return tuple(index)
    def fold(slices, sizes):
      inner = math.prod(sizes[1:])
      return slice(slices[0].start * inner, slices[0].stop * inner)
    return (fold(index[self.inputs:], shape[self.inputs:]),
            fold(index[:self.inputs], shape[:self.inputs]))


def flat(tree):
  """{"layers/attn/q": leaf, ...} of a nested dict."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(leaves):
  """The nested dict of {"layers/attn/q": leaf, ...}."""
  tree = {}
  for path, leaf in leaves.items():
    *folders, name = path.split("/")
    functools.reduce(lambda at, folder: at.setdefault(folder, {}), folders, tree)[name] = leaf
  return tree


def need(json, key):
  """config.json's value of a key that has no default."""
  if key not in json:
    raise ValueError(f"config.json has no {key!r}: take the file that came with the weights.")
  return json[key]


def refuse(json, key, *allowed):
  """Raises where `key` asks for something that is not implemented; absent or None is fine."""
  value = json.get(key)
  if value is not None and value not in allowed:
    raise ValueError(f"config.json asks for {key}={value!r}, which is not implemented: "
                     f"use a model with {key} {' or '.join(map(repr, allowed)) or 'absent'}.")


def rope(json):
  """(theta, scaling) from either spelling: `rope_parameters`, or `rope_theta` + `rope_scaling`."""
  settings = dict(json.get("rope_parameters") or {})
  old = dict(json.get("rope_scaling") or {})
  if settings and any(settings.get(key, value) != value for key, value in old.items()):
    raise ValueError(f"config.json has rope_parameters={settings} and rope_scaling={old}, which "
                     "differ: keep the one that the weights were trained with.")
  settings = settings or old
  theta = settings.pop("rope_theta", None) or need(json, "rope_theta")
  kind = settings.pop("rope_type", None) or settings.pop("type", "default")
  settings.pop("type", None)
  refuse({"rope_type": kind}, "rope_type", "default", "llama3")
  refuse(settings | json, "partial_rotary_factor", 1.0)
  if kind == "default":
    return float(theta), None
  return float(theta), decoder.RopeScaling(
      factor=float(need(settings, "factor")),
      low_freq_factor=float(need(settings, "low_freq_factor")),
      high_freq_factor=float(need(settings, "high_freq_factor")),
      original_max_positions=int(need(settings, "original_max_position_embeddings")))


def read(json, *, architecture, qk_norm, head_width, **run):
  """A Config from the keys that Qwen3 and Llama spell alike; `run` says how it runs.

  `head_width` is the family's own default, for a config.json without head_dim; None is
  width / heads.
  """
  refuse(json, "hidden_act", "silu")
  for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
    refuse(json, key, False)
  for key in ("num_experts", "num_local_experts", "quantization_config"):
    refuse(json, key)
  for kind in json.get("layer_types") or ():
    refuse({"layer_types": kind}, "layer_types", "full_attention")
  theta, scaling = rope(json)
  width, heads = int(need(json, "hidden_size")), int(need(json, "num_attention_heads"))
  return decoder.Config(
      architecture=architecture,
      vocab_size=int(need(json, "vocab_size")),
      width=width,
      layers=int(need(json, "num_hidden_layers")),
      heads=heads,
      kv_heads=int(json.get("num_key_value_heads") or heads),
      head_width=int(json.get("head_dim") or head_width or width // heads),
      mlp=int(need(json, "intermediate_size")),
      norm_eps=float(need(json, "rms_norm_eps")),
      rope_theta=theta,
      rope_scaling=scaling,
      qk_norm=qk_norm,
      tied=bool(json.get("tie_word_embeddings", False)),
      max_positions=int(need(json, "max_position_embeddings")),
      **run)


def write(config, *, model_type, architecture):
  """config.json of a Config: the inverse of `read`."""
  rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
  if config.rope_scaling is not None:
    scaling = dataclasses.asdict(config.rope_scaling)
    scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
    rope_parameters |= {"rope_type": "llama3", **scaling}
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
