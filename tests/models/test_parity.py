"""Logits equal to transformers' own classes, in float32, and folders that go both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from s2d_jax import models
from s2d_jax.models import hf

CLASSES = {"qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
           "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)}
# An original window of 32 puts waves of each of the three kinds among the 8 of a tiny head.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
CASES = [
    ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}, PLAIN),
    ("qwen3", {"num_key_value_heads": 2, "tie_word_embeddings": False}, PLAIN),
    ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 8}, PLAIN),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}, LLAMA3),
    ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}, LLAMA3),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 8}, PLAIN),
]
ATOL = 1e-4  # two layers in float32, on logits of order one to ten


def torch_model(family, changes, rope):
  """A tiny random model of transformers, its weights large enough for every one to show."""
  torch.manual_seed(0)
  config_class, model_class = CLASSES[family]
  settings = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 40,
              "max_position_embeddings": 256, "rope_parameters": dict(rope)}
  model = model_class(config_class(**settings | changes)).to(torch.float32).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
  return model


def logits(model, params, ids):
  rows, length = ids.shape
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  features, _ = jax.jit(model.apply)(params, ids, positions, np.ones_like(ids))
  return jnp.einsum("BTD,VD->BTV", features, model.unembed(params))


def torch_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor(ids).long()).logits.numpy()


@pytest.mark.medium
@pytest.mark.parametrize("family, changes, rope", CASES)
def test_logits_both_ways(family, changes, rope, tmp_path):
  theirs = torch_model(family, changes, rope)
  theirs.save_pretrained(tmp_path / "theirs")
  model, params = hf.load(tmp_path / "theirs")
  ids = np.random.default_rng(0).integers(0, 48, (2, 60)).astype(np.int32)
  want = torch_logits(theirs, ids)
  assert np.std(want) > 0.5
  np.testing.assert_allclose(logits(model, params, ids), want, atol=ATOL, rtol=0)

  for source in (None, tmp_path / "theirs"):  # a config.json of our own, and theirs
    hf.save(tmp_path / "ours", model, params, source=source)
    again = CLASSES[family][1].from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    np.testing.assert_allclose(torch_logits(again, ids), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(models.PUBLISHED))
def test_transformers_reads_our_config_as_we_do(name):
  config = models.get(name).config
  json = models.config_json(config)
  theirs = CLASSES[config.architecture][0](**json)
  assert models.read_config(theirs.to_dict()) == config


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_rope_frequencies(scaling):
  model = torch_model("llama", {"num_key_value_heads": 2}, scaling or PLAIN)
  config = models.read_config(model.config.to_dict())
  got = models.decoder.rope_frequencies(16, config.rope_theta, config.rope_scaling)
  np.testing.assert_allclose(got, model.model.rotary_emb.inv_freq, rtol=1e-6)
