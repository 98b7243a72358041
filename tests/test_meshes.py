"""The jitted step of every row, on one device and on meshes of eight: equal to float32 rounding."""

import types

import jax
import ml_collections
import numpy as np
import optax
import pytest

from configs import common
from s2d_jax import microbatches, models, objectives, rollouts, sharding, training
from s2d_jax.errors import InputError

MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
TEACHER = {"model_type": "qwen3", "vocab_size": 32, "hidden_size": 32, "head_dim": 8,
           "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
           "tie_word_embeddings": True, "max_position_embeddings": 64}
STUDENT = TEACHER | {"hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 1,
                     "intermediate_size": 32}


def params(model, seed, mesh):
  rng = np.random.default_rng(seed)
  tree = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape) / 4, np.float32),
                      models.shapes(model.config))
  return jax.tree.map(sharding.put, tree,
                      sharding.weight_shardings(mesh, models.axes(model.config), tree))


def batch():
  """Sixteen rows of random prompts and responses, of unequal lengths."""
  rng = np.random.default_rng(0)
  B = 16
  length_B = rng.integers(1, 8, B).astype(np.int32)
  rows = rollouts.Rollout(
      np.arange(B), np.zeros(B, np.int32), rng.integers(0, 32, (B, 4)).astype(np.int32),
      rng.integers(1, 5, B).astype(np.int32), rng.integers(0, 32, (B, 8)).astype(np.int32),
      length_B, *2 * (rng.normal(size=(B, 8)).astype(np.float32) - 3,), np.ones(B, np.int32), 0)
  batch = rollouts.batch(rows, "sequence", rng.normal(size=B).astype(np.float32))
  return batch._replace(old_logp_BT=batch.sampler_logp_BT)


def step(shape, objective, guided):
  """(metrics, new parameters, slots' shardings agree) of one update with momentum on a mesh."""
  mesh, student, teacher = sharding.make_mesh(shape), models.get(STUDENT), models.get(TEACHER)
  hp = ml_collections.ConfigDict(common.stage(steps=1, prompts=16, sampling={}, optim={},
                                              microbatches=2, block=64) |
                                 common.grpo(kl="k3", kl_coef=0.1) | common.reverse_kl())
  with jax.set_mesh(mesh):
    optimizer = optax.sgd(0.5, momentum=0.9)
    state = training.init(optimizer, mesh, params(student, 1, mesh))
    run = training.jit_update(student, teacher if guided else None, objective, optimizer, hp,
                      training.shardings(state))
    guide = params(teacher, 2, mesh) if guided else None
    before = jax.device_get(guide)
    data = sharding.put_batch(batch(), mesh)
    new, metrics = run(state, guide, data)
    new, metrics = run(new, guide, data)
    assert run._cache_size() == 1  # the second step found the first one's program
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(guide))
    assert training.shardings(new) == training.shardings(
        training.abstract(optimizer, mesh, new.params))
    return jax.device_get(metrics), jax.device_get(new.params)


@pytest.mark.slow
@pytest.mark.parametrize("objective, guided", [
    (objectives.GRPO, True), (objectives.FORWARD_KL, True),
    (objectives.REVERSE_KL, True), (objectives.NEGATIVE_LOG_LIKELIHOOD, False)])
def test_one_step_on_every_mesh(objective, guided, quick_compiles):
  metrics, params = step(MESHES[0], objective, guided)
  assert metrics["grad_norm"] > 1e-3 and metrics["finite"] == 1
  for shape in MESHES[1:]:
    others, new = step(shape, objective, guided)
    for name, value in metrics.items():
      np.testing.assert_allclose(others[name], value, rtol=2e-5, atol=1e-6,
                                 err_msg=f"{name} {shape}")
    jax.tree.map(lambda a, b, shape=shape: np.testing.assert_allclose(
        a, b, rtol=2e-5, atol=2e-6, err_msg=str(shape)), new, params)


@pytest.mark.medium
def test_padding_to_whole_tiles_changes_no_update_of_a_decoder(monkeypatch):
  metrics, params = step((1, 1, 1), objectives.REVERSE_KL, True)
  # As on a TPU, but for the number: rows of 11 tokens get five more, which attention must not read.
  monkeypatch.setattr(microbatches, "time_multiple", lambda: 16)
  others, new = step((1, 1, 1), objectives.REVERSE_KL, True)
  for name, value in metrics.items():
    np.testing.assert_allclose(others[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), new, params)


def test_two_slices_of_tpus_are_refused():
  devices = [types.SimpleNamespace(platform="tpu", slice_index=k // 4) for k in range(8)]
  with pytest.raises(InputError, match=r"\(1, 8, 1\), whose devices belong to 2 TPU slices"):
    sharding.make_mesh((1, 8, 1), devices)
