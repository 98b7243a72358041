"""Log-probability, entropy and negative log-likelihood of one token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from s2d_jax.losses import tokens

RNG = np.random.default_rng(0)
LOGITS_BTV = RNG.normal(size=(2, 3, 5)) * 2
TARGETS_BT = np.array([[0, 4, 2], [1, 1, 3]], np.int32)


def reference(logits_BTV):
  """Log-softmax in float64 NumPy, straight from the definition."""
  exp_BTV = np.exp(logits_BTV)
  return np.log(exp_BTV / exp_BTV.sum(axis=-1, keepdims=True))


def test_by_hand():
  # Probabilities (3/4, 1/4), logits ln 3 and 0. log π(0) = ln 3/4 = −0.287682; log π(1) = ln 1/4 =
  # −1.386294. H = 3/4·0.287682 + 1/4·1.386294 = 0.562335 nats.
  logits_BTV = jnp.log(jnp.array([[[3.0, 1.0], [3.0, 1.0]]]))
  targets_BT = jnp.array([[0, 1]])
  logp_BT = tokens.log_prob(logits_BTV, targets_BT)
  np.testing.assert_allclose(logp_BT, [[-0.287682, -1.386294]], atol=1e-6)
  nll_BT = tokens.negative_log_likelihood(logits_BTV, targets_BT)
  np.testing.assert_allclose(nll_BT, [[0.287682, 1.386294]], atol=1e-6)
  np.testing.assert_allclose(tokens.entropy(logits_BTV), [[0.562335] * 2], atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_equals_float64(wrap):
  logp_BTV = reference(LOGITS_BTV)
  want_BT = np.take_along_axis(logp_BTV, TARGETS_BT[..., None], axis=-1)[..., 0]
  logits_BTV = jnp.asarray(LOGITS_BTV, jnp.float32)
  np.testing.assert_allclose(wrap(tokens.log_prob)(logits_BTV, TARGETS_BT), want_BT, atol=2e-6)
  want_BT = -(np.exp(logp_BTV) * logp_BTV).sum(axis=-1)
  np.testing.assert_allclose(wrap(tokens.entropy)(logits_BTV), want_BT, atol=2e-6)


def test_bfloat16_logits_are_cast_to_float32_first():
  logits_BTV = jnp.asarray(LOGITS_BTV, jnp.bfloat16)
  want_BTV = reference(np.asarray(logits_BTV.astype(jnp.float32), np.float64))
  got_BT = tokens.log_prob(logits_BTV, TARGETS_BT)
  assert got_BT.dtype == jnp.float32
  want_BT = np.take_along_axis(want_BTV, TARGETS_BT[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(got_BT, want_BT, atol=2e-6)


def test_large_logits_stay_finite():
  # Two equal logits of 1e4: log π = ln 1/2 and H = ln 2, whatever their size.
  logits_BTV = jnp.full((1, 1, 2), 1e4)
  targets_BT = jnp.zeros((1, 1), jnp.int32)
  np.testing.assert_allclose(tokens.log_prob(logits_BTV, targets_BT), [[-np.log(2)]], rtol=1e-5)
  np.testing.assert_allclose(tokens.entropy(logits_BTV), [[np.log(2)]], rtol=1e-5)


def test_adding_a_constant_changes_nothing():
  logits_BTV = jnp.asarray(LOGITS_BTV, jnp.float32)
  for f in (lambda x: tokens.log_prob(x, TARGETS_BT), tokens.entropy):
    np.testing.assert_allclose(f(logits_BTV + 3.0), f(logits_BTV), atol=2e-6)


def test_uniform_logits_have_the_greatest_entropy():
  np.testing.assert_allclose(tokens.entropy(jnp.zeros((1, 1, 7))), [[np.log(7)]], rtol=1e-6)


def test_gradients_are_finite_differences():
  logits_BTV = jnp.asarray(LOGITS_BTV, jnp.float32)
  for f in (lambda x: tokens.log_prob(x, TARGETS_BT), tokens.entropy):
    check_grads(f, (logits_BTV,), order=1, modes=["rev"], atol=2e-3, rtol=2e-3, eps=1e-2)


def test_the_entropy_of_a_gpu_is_that_of_the_definition():
  # Flat and peaked ones; the last is a certain token among a thousand.
  rng = np.random.default_rng(1)
  logits_TV = rng.normal(size=(4, 1000)) * np.array([[0.0], [1.0], [10.0], [1.0]])
  logits_TV[3, 5] = 60.0
  logits_TV = logits_TV.astype(np.float32).astype(np.float64)
  logp_TV = reference(logits_TV)
  want_T = -(np.exp(logp_TV) * logp_TV).sum(axis=-1)
  narrow_TV = jnp.asarray(logits_TV, jnp.float32)
  np.testing.assert_allclose(tokens._entropy_of_sums(narrow_TV), want_T, atol=4e-6)
  # dH/dz = −p (log p + H).
  want_TV = -np.exp(logp_TV) * (logp_TV + want_T[:, None])
  got_TV = jax.grad(lambda x: tokens._entropy_of_sums(x).sum())(narrow_TV)
  np.testing.assert_allclose(got_TV, want_TV, atol=2e-6)


def test_gradient_of_nll_is_softmax_minus_one_hot():
  grad_BTV = jax.grad(lambda x: tokens.negative_log_likelihood(x, TARGETS_BT).sum())(
      jnp.asarray(LOGITS_BTV, jnp.float32))
  np.testing.assert_allclose(
      grad_BTV, np.exp(reference(LOGITS_BTV)) - np.eye(5)[TARGETS_BT], atol=1e-6)


def test_ranks_by_hand():
  # Of equal ones none is above the other.
  logits_BTV = jnp.array([[[0.5, 2.0, -1.0, 0.5], [3.0, 2.0, 1.0, 0.0]]])
  for targets, ranks in (([0, 0], [2, 1]), ([3, 1], [2, 2]), ([2, 3], [4, 4]), ([1, 2], [1, 3])):
    np.testing.assert_array_equal(tokens.rank(logits_BTV, jnp.array([targets])), [ranks])
