"""The agreement of two models on the tokens of a batch, in blocks."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.losses.agreement import agreement


def test_ranks_and_differences_of_the_sampled_tokens_for_any_block():
  rng = np.random.default_rng(0)
  def head():
    return (jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32),
            jnp.asarray(rng.normal(size=(11, 3)), jnp.float32))
  student, teacher = head(), head()
  targets_BT = rng.integers(11, size=(2, 5))
  batch = SimpleNamespace(weight_BT=jnp.ones((2, 5)), targets_BT=jnp.asarray(targets_BT))
  at = np.arange(2)[:, None], np.arange(5)[None], targets_BT
  def log_probabilities(head):
    logits = np.einsum("BTD,VD->BTV", *(np.asarray(x, np.float64) for x in head))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  log_s, log_t = log_probabilities(student), log_probabilities(teacher)
  order = np.argsort(np.argsort(-log_t, axis=-1), axis=-1)
  for block in (1, 4, 100):
    found = agreement(student, teacher, batch, SimpleNamespace(block=block, top_k=3))
    np.testing.assert_array_equal(found["teacher_rank"], order[at] + 1)
    np.testing.assert_allclose(found["delta_logp"], (log_t - log_s)[at], atol=1e-5)
  assert jax.tree.all(jax.tree.map(lambda x: x.shape == (2, 5), found))
