"""Qwen3, dense (https://arxiv.org/abs/2505.09388): its config.json and its table of weights."""

from typing import Any

from s2d_jax.json_objects import Json
from s2d_jax.models import layout
from s2d_jax.models.config import Config
from s2d_jax.models.layout import Weight


def config(json: Json, **run: Any) -> Config:
  """The Config of a Qwen3 config.json; `run` as in `layout.read`.

  Raises:
    InputError: a key is missing, or asks for something that is not implemented; it is named.
  """
  return layout.read(json, architecture="qwen3", qk_norm=True, head_width=128, **run)


def config_json(config: Config) -> Json:
  """The config.json of a Config."""
  return layout.write(config, model_type="qwen3", architecture="Qwen3ForCausalLM")


def weights(config: Config) -> dict[str, Weight]:
  """{path of a parameter: its Weight}; import, export and sharding all read this table."""
  return layout.dense_weights(config) | {
      "layers/attn/q_norm": layout.layer_weight(("head",), "self_attn.q_norm"),
      "layers/attn/k_norm": layout.layer_weight(("head",), "self_attn.k_norm"),
  }


def _published(width: int, layers: int, heads: int, mlp: int, tied: bool) -> Json:
  # Every published size shares the rest: vocabulary, eight key heads of width 128 and the window.
  return {
      "model_type": "qwen3", "vocab_size": 151936, "hidden_size": width,
      "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
      "head_dim": 128, "intermediate_size": mlp, "hidden_act": "silu", "rms_norm_eps": 1e-6,
      "rope_theta": 1000000.0, "tie_word_embeddings": tied, "max_position_embeddings": 40960,
  }


PUBLISHED = {  # https://huggingface.co/Qwen
    "qwen3-0.6b": _published(1024, 28, 16, 3072, True),
    "qwen3-1.7b": _published(2048, 28, 16, 6144, True),
    "qwen3-4b": _published(2560, 36, 32, 9728, True),
    "qwen3-8b": _published(4096, 36, 32, 12288, False),
    "qwen3-14b": _published(5120, 40, 40, 17408, False),
    "qwen3-32b": _published(5120, 64, 64, 25600, False),
}
