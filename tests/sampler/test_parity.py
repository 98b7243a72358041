"""Greedy tokens equal to those of transformers' own `generate`, one by one, on both families."""

import numpy as np
import pytest
import torch
import transformers

from s2d_jax import rollouts, sampler
from s2d_jax.models import hf

pytestmark = pytest.mark.torch

T = 14
CLASSES = {"qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {
               "rope_type": "default", "rope_theta": 10000.0}),
           "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {
               "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32})}
PROMPTS = [[4, 9, 30], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [40, 40, 40, 11, 2], [22, 13]]


def torch_model(family):
  """A tiny random model, its weights large enough for its choices to be clear."""
  torch.manual_seed(0)
  config_class, model_class, rope = CLASSES[family]
  model = model_class(config_class(
      vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
      num_key_value_heads=2, head_dim=16, intermediate_size=40, max_position_embeddings=256,
      tie_word_embeddings=False, rope_parameters=rope, bos_token_id=None, eos_token_id=None,
      pad_token_id=0)).to(torch.float32).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
  return model


def generated(model, prompt, stop=None):
  """The ids `generate` adds to one prompt, and their log-probabilities."""
  ids = torch.tensor([prompt])
  out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=T,
                       eos_token_id=stop, return_dict_in_generate=True, output_logits=True)
  tokens = out.sequences[0, len(prompt):]
  logp = torch.log_softmax(torch.cat(out.logits), dim=-1)
  return tokens.tolist(), logp[torch.arange(len(tokens)), tokens].numpy()


@pytest.mark.medium
@pytest.mark.parametrize("family", CLASSES)
def test_greedy_equals_generate(family, tmp_path):
  theirs = torch_model(family)
  theirs.save_pretrained(tmp_path)
  model, params = hf.load(tmp_path)
  free = [generated(theirs, prompt)[0] for prompt in PROMPTS]
  stop = free[0][6]  # so that some responses end and others do not
  greedy = sampler.Sampling(max_tokens=T, stop_ids=(stop,), temperature=0.0)
  compiled = sampler.Sampler(model, greedy, len(PROMPTS), max(map(len, PROMPTS)))
  prompts = [rollouts.Prompt(i, tuple(p)) for i, p in enumerate(PROMPTS)]
  rows, _ = compiled(params, prompts, (0,))
  for b, prompt in enumerate(PROMPTS):
    tokens, logp = generated(theirs, prompt, stop)
    assert rows.response(b).tolist() == tokens
    np.testing.assert_allclose(rows.sampler_logp_BT[b, : len(tokens)], logp, atol=1e-4)
  assert len(set(rows.response_length_B)) > 1 and rows.finish_reason_B[0] == 1
  assert len(set(np.concatenate(free))) > 8  # no row repeats one token
