"""How a role is loaded: a learner whole, a frozen model in the type it is multiplied in."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from s2d_jax import (
  checkpoint,
  manifest,
  models,
  objectives,
  rollouts,
  sharding,
  stage,
  training,
)
from s2d_jax.models import hf, layout

CONFIG = {"model_type": "qwen3", "vocab_size": 32, "hidden_size": 16, "head_dim": 8,
          "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
          "tie_word_embeddings": False, "max_position_embeddings": 64}
SCALES = {"norm", "layers/attn_norm", "layers/mlp_norm", "layers/attn/q_norm",
          "layers/attn/k_norm"}


@pytest.fixture
def plan(tmp_path):
  """A plan with a base model and a finished stage of other weights, as `stage.load` reads it."""
  rng = np.random.default_rng(0)
  def random_array(x):
    return rng.normal(0.5, 0.3, x.shape).astype(np.float32)
  model = models.get(CONFIG)
  shapes = models.shapes(model.config)
  folder = hf.save(tmp_path / "base", model, jax.tree.map(random_array, shapes))
  mesh = sharding.make_mesh((2, 2, 2))
  shardings = sharding.weight_shardings(mesh, models.axes(model.config), shapes)
  trained = jax.tree.map(
      lambda x, sharding_of_x: sharding.put(random_array(x), sharding_of_x), shapes, shardings)
  checkpoint.save_final(tmp_path / "finished", trained)
  manifest.write(tmp_path / "finished", {})
  with jax.set_mesh(mesh):
    yield types.SimpleNamespace(
        config=ml_collections.ConfigDict({"dtype": "bfloat16", "remat": "none",
                                          "attention": "auto"}),
        bases={"base": {}}, base=lambda role: {"folder": str(folder)})


@pytest.mark.medium
@pytest.mark.parametrize("role", ["base", "finished"])
def test_a_frozen_model_in_bfloat16_gives_the_log_probabilities_of_float32_bit_for_bit(
    plan, role, tmp_path):
  mesh = sharding.current_mesh()
  frozen = stage.load(plan, role, tmp_path, mesh)
  whole = stage.load(plan, role, tmp_path, mesh, models.shapes)
  assert frozen.model is whole.model
  assert {x.dtype for x in jax.tree.leaves(whole.params)} == {jnp.dtype("float32")}
  for path, x in layout.flat(frozen.params).items():
    assert x.dtype == ("float32" if path in SCALES else "bfloat16"), path
  assert training.shardings(frozen.params) == training.shardings(whole.params)
  rng = np.random.default_rng(1)
  zeros_BT = np.zeros((8, 5), np.float32)
  rows = rollouts.Rollout(
      np.arange(8), np.zeros(8, np.int32), rng.integers(0, 32, (8, 4)).astype(np.int32),
      np.full(8, 4, np.int32), rng.integers(0, 32, (8, 5)).astype(np.int32),
      rng.integers(1, 6, 8).astype(np.int32), zeros_BT, zeros_BT,
      np.ones(8, np.int32), 0)
  batch = sharding.put_batch(rollouts.batch(rows), mesh)
  hp = types.SimpleNamespace(microbatches=1, block=8)
  token_logps = training.token_logps(whole.model, objectives.logp, hp)
  (logp_BT, _), (want_BT, _) = (
      jax.device_get(token_logps(role.params, batch)) for role in (frozen, whole))
  np.testing.assert_array_equal(logp_BT, want_BT)
  assert np.abs(logp_BT).max() > 1


def test_a_frozen_model_of_float32_activations_is_stored_in_float32():
  config = models.get(CONFIG).config
  assert models.frozen_shapes(config) == models.shapes(config)
