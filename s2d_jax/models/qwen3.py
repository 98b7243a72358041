"""Qwen3, dense (https://arxiv.org/abs/2505.09388): its config.json and its table of weights."""

from s2d_jax.models import layout
from s2d_jax.models.layout import Weight


def config(json, **run):
  """The Config of a Qwen3 config.json; what is not implemented is refused by its key."""
  return layout.read(json, architecture="qwen3", qk_norm=True, head_width=128, **run)


def config_json(config):
  """The config.json of a Config."""
  return layout.write(config, model_type="qwen3", architecture="Qwen3ForCausalLM")


def weights(config):
  """{path of a parameter: its Weight}, the one table that import, export and sharding read."""
  layer = "model.layers.{}."
  table = {
      "embed": Weight(("vocab", "embed"), "model.embed_tokens.weight"),
      "layers/attn_norm": Weight(("layer", "embed"), layer + "input_layernorm.weight"),
      "layers/attn/q": Weight(
          ("layer", "embed", "heads", "head"), layer + "self_attn.q_proj.weight", inputs=1),
      "layers/attn/k": Weight(
          ("layer", "embed", "kv_heads", "head"), layer + "self_attn.k_proj.weight", inputs=1),
      "layers/attn/v": Weight(
          ("layer", "embed", "kv_heads", "head"), layer + "self_attn.v_proj.weight", inputs=1),
      "layers/attn/q_norm": Weight(("layer", "head"), layer + "self_attn.q_norm.weight"),
      "layers/attn/k_norm": Weight(("layer", "head"), layer + "self_attn.k_norm.weight"),
      "layers/attn/o": Weight(
          ("layer", "heads", "head", "embed"), layer + "self_attn.o_proj.weight", inputs=2),
      "layers/mlp_norm": Weight(("layer", "embed"), layer + "post_attention_layernorm.weight"),
      "layers/mlp/gate": Weight(
          ("layer", "embed", "mlp"), layer + "mlp.gate_proj.weight", inputs=1),
      "layers/mlp/up": Weight(("layer", "embed", "mlp"), layer + "mlp.up_proj.weight", inputs=1),
      "layers/mlp/down": Weight(
          ("layer", "mlp", "embed"), layer + "mlp.down_proj.weight", inputs=1),
      "norm": Weight(("embed",), "model.norm.weight"),
  }
  if not config.tied:
    table["unembed"] = Weight(("vocab", "embed"), "lm_head.weight")
  return table


def _published(width, layers, heads, mlp, tied):
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
