"""Llama 3 (https://arxiv.org/abs/2407.21783): its config.json and its table of weights."""

from s2d_jax.models import layout
from s2d_jax.models.layout import Weight


def config(json, **run):
  """The Config of a Llama config.json; what is not implemented is refused by its key."""
  layout.refuse(json, "pretraining_tp", 1)
  layout.refuse(json, "sliding_window")
  return layout.read(json, architecture="llama", qk_norm=False, head_width=None, **run)


def config_json(config):
  """The config.json of a Config."""
  json = layout.write(config, model_type="llama", architecture="LlamaForCausalLM")
  return json | {"mlp_bias": False}


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


def _published(width, layers, heads, head_width, mlp, tied, factor):
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
