"""Tiny models of both families; without torch, parity is left out of the collection, visibly."""

import importlib.util

import jax
import numpy as np
import pytest

from s2d_jax import models

PARITY = ["test_parity.py"]
collect_ignore = [] if importlib.util.find_spec("torch") else PARITY


def pytest_report_collectionfinish():
  return [f"not collected, torch is absent: tests/sampler/{name}" for name in collect_ignore]


@pytest.fixture(scope="session")
def tiny():
  """tiny(family, seed=0, **run): a model of 16 tokens and parameters far from uniform logits."""
  def make(family, seed=0, **run):
    model = models.get({
        "model_type": family, "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 24, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 64}, **run)
    rng = np.random.default_rng(seed)
    def random_leaf(path, x):
      centre = 1.0 if "norm" in path[-1].key else 0.0
      return jax.device_put(rng.normal(centre, 0.3, x.shape).astype(np.float32))
    return model, jax.tree_util.tree_map_with_path(random_leaf, models.shapes(model.config))
  return make


@pytest.fixture(scope="session")
def truncated():
  """truncated(logits, temperature, top_p, top_k, min_p): what one row is sampled with, in float64.
  """
  def probabilities(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    order = order[:top_k] if top_k else order
    mass, support = 0.0, []
    for i in order:
      support.append(i)
      mass += p[i] / p[order].sum()
      if mass >= top_p:
        break
    support = [i for i in support if p[i] >= min_p * p[order[0]]]
    return np.array([p[i] if i in support else 0.0 for i in range(len(p))]) / p[support].sum()
  return probabilities
