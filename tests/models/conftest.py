"""Tiny models of both families; without torch, parity is left out of the collection, visibly."""

import importlib.util

import jax
import numpy as np
import pytest

PARITY = ["test_parity.py"]
collect_ignore = [] if importlib.util.find_spec("torch") else PARITY


def pytest_report_collectionfinish():
  return [f"not collected, torch is absent: tests/models/{name}" for name in collect_ignore]


@pytest.fixture(scope="session")
def tiny_json():
  """tiny_json(family, **changes): config.json of a tiny model, heads not adding up to its width."""
  def make(family, **changes):
    return {
        "model_type": family, "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 40, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
        "max_position_embeddings": 128} | changes
  return make


@pytest.fixture(scope="session")
def randomized():
  """randomized(model): parameters far from their initial values, so that every one shows."""
  def make(model, seed=0):
    rng = np.random.default_rng(seed)
    def random_leaf(path, x):
      centre = 1.0 if "norm" in path[-1].key else 0.0
      return jax.device_put(rng.normal(centre, 0.3, x.shape).astype(np.float32))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(random_leaf, shapes)
  return make
