"""Llama 3 (https://arxiv.org/abs/2407.21783): its config.json and its table of weights."""

from typing import Any

from s2d_jax.json_objects import Json
from s2d_jax.models import layout
from s2d_jax.models.config import Config
from s2d_jax.models.layout import Weight


def config(json: Json, **run: Any) -> Config:
  """The Config of a Llama config.json; `run` as in `layout.read`.

  Raises:
    InputError: a key is missing, or asks for something that is not implemented; it is named.
  """
  layout.refuse(json, "pretraining_tp", 1)
  layout.refuse(json, "sliding_window")
  return layout.read(json, architecture="llama", qk_norm=False, head_width=None, **run)


def config_json(config: Config) -> Json:
  """The config.json of a Config."""
  json = layout.write(config, model_type="llama", architecture="LlamaForCausalLM")
  return json | {"mlp_bias": False}


def weights(config: Config) -> dict[str, Weight]:
  """{path of a parameter: its Weight}; import, export and sharding all read this table."""
  return layout.dense_weights(config)


def _published(width: int, layers: int, heads: int, head_width: int, mlp: int, tied: bool,
               factor: float) -> Json:
  # Every published size shares the rest: vocabulary, eight key heads and a window of 8192 tokens
  # that RoPE's scaling by `factor` extends.
  return {
      "model_type": "llama", "vocab_size": 128256, "hidden_size": width,
      "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
      "head_dim": head_width, "intermediate_size": mlp, "hidden_act": "silu",
      "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": tied,
      "max_position_embeddings": 131072,
      "rope_scaling": {
          "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
  }


PUBLISHED = {  # https://huggingface.co/meta-llama
    "llama-3.1-8b": _published(4096, 32, 32, 128, 14336, False, 8.0),
    "llama-3.1-70b": _published(8192, 80, 64, 128, 28672, False, 8.0),
    "llama-3.2-1b": _published(2048, 16, 32, 64, 8192, True, 32.0),
    "llama-3.2-3b": _published(3072, 28, 24, 128, 8192, True, 32.0),
    "llama-3.3-70b": _published(8192, 80, 64, 128, 28672, False, 8.0),
}
