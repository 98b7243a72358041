"""Group advantages and the clipped surrogate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from s2d_jax.losses import grpo, tokens

LOW, HIGH = 0.2, 0.28
CLIP = grpo.Clip(LOW, HIGH)


def test_group_advantages_by_hand():
  # Rewards 1, 0, 0, 0: mean 1/4, variance (9 + 1 + 1 + 1)/16/4 = 3/16, std √3/4 = 0.433013.
  # (3/4)/0.433013 = √3 = 1.732051 and (−1/4)/0.433013 = −1/√3 = −0.577350.
  reward_PG = np.array([[1.0, 0.0, 0.0, 0.0]])
  np.testing.assert_allclose(grpo.group_advantages(reward_PG),
                             [[1.732051, -0.577350, -0.577350, -0.577350]], atol=1e-6)
  np.testing.assert_allclose(grpo.group_advantages_centred(reward_PG),
                             [[0.75, -0.25, -0.25, -0.25]], atol=1e-12)


@pytest.mark.parametrize("advantages", [grpo.group_advantages, grpo.group_advantages_centred])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_group_gives_exactly_zero(advantages, dtype):
  # The float mean of three times 0.1 is not 0.1, so subtracting it leaves something to divide.
  reward_PG = np.array([[0.1, 0.1, 0.1], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype)
  got_PG = advantages(reward_PG)
  assert got_PG.dtype == dtype
  np.testing.assert_array_equal(got_PG[:2], 0.0)
  assert np.all(got_PG[2] != 0)


def test_a_group_of_one_gives_zero():
  np.testing.assert_array_equal(grpo.group_advantages(np.array([[1.0], [0.0]])), 0.0)


@pytest.mark.parametrize("advantages", [grpo.group_advantages, grpo.group_advantages_centred])
def test_groups_are_rows(advantages):
  reward_PG = np.random.default_rng(0).normal(size=(3, 4))
  got_PG = advantages(reward_PG)
  np.testing.assert_allclose(got_PG.sum(axis=1), 0.0, atol=1e-12)
  for p in range(3):  # a group does not see its neighbours
    np.testing.assert_allclose(got_PG[p], advantages(reward_PG[p:p + 1])[0], rtol=1e-12)


def test_divided_advantages_have_mean_square_one_and_ignore_scale():
  reward_PG = np.random.default_rng(1).normal(size=(3, 4))
  got_PG = grpo.group_advantages(reward_PG)
  np.testing.assert_allclose((got_PG ** 2).mean(axis=1), 1.0, rtol=1e-12)
  np.testing.assert_allclose(grpo.group_advantages(5 * reward_PG + 2), got_PG, rtol=1e-9)


def test_jax_rewards_work_too():
  reward_PG = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
  for advantages in (grpo.group_advantages, grpo.group_advantages_centred):
    got_PG = jax.jit(advantages)(jnp.asarray(reward_PG))
    np.testing.assert_allclose(got_PG, advantages(reward_PG), atol=1e-6)


def surrogate(ratio, advantage):
  logp_BT = jnp.log(jnp.array([[ratio]], jnp.float32))
  advantage_BT = jnp.array([[advantage]], jnp.float32)
  def f(logp_BT):
    loss_BT, clipped_BT = grpo.clipped_surrogate(logp_BT, jnp.zeros((1, 1)), advantage_BT, CLIP)
    return loss_BT[0, 0], clipped_BT
  (value, clipped_BT), grad_BT = jax.value_and_grad(f, has_aux=True)(logp_BT)
  return float(value), float(grad_BT[0, 0]), bool(clipped_BT[0, 0])


# −min(r·A, clip(r, 0.8, 1.28)·A); inside, the gradient in log π is −r·A.
@pytest.mark.parametrize("ratio, advantage, value, grad, clipped", [
    (1.0, 2.0, -2.0, -2.0, False),    # on policy
    (1.25, 2.0, -2.5, -2.5, False),   # above 1.2, still inside: the upper side is 1.28
    (1.5, 2.0, -2.56, 0.0, True),     # raised far enough: −1.28·2
    (0.5, 2.0, -1.0, -1.0, False),    # a good token lost ground: the clip must not stop its return
    (0.5, -2.0, 1.6, 0.0, True),      # lowered far enough: 0.8·2
    (0.9, -2.0, 1.8, 1.8, False),
    (1.5, -2.0, 3.0, 3.0, False),     # a bad token gained: nothing stops its way down
    (1.5, 0.0, 0.0, 0.0, False),
])
def test_both_sides_of_the_clip_by_hand(ratio, advantage, value, grad, clipped):
  got = surrogate(ratio, advantage)
  np.testing.assert_allclose(got[:2], (value, grad), atol=1e-6)
  assert got[2] == clipped


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_ratio_at_the_end_of_the_clip_is_inside_it(advantage):
  # On policy with a clip range of zero: nothing is clipped, and the gradient is the whole −A.
  args = jnp.full((1, 1), -1.5), jnp.full((1, 1), advantage), grpo.Clip(0.0, 0.0)
  grad_BT = jax.grad(lambda x_BT: grpo.clipped_surrogate(x_BT, *args)[0][0, 0])(args[0])
  np.testing.assert_allclose(grad_BT, [[-advantage]], rtol=1e-6)
  assert not grpo.clipped_surrogate(args[0], *args)[1][0, 0]


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
  rng = np.random.default_rng(2)
  logits_BTV = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
  targets_BT = jnp.asarray(rng.integers(5, size=(2, 3)))
  advantage_BT = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
  old_logp_BT = tokens.log_prob(logits_BTV, targets_BT)

  def f(logits_BTV):
    logp_BT = tokens.log_prob(logits_BTV, targets_BT)
    return grpo.clipped_surrogate(logp_BT, old_logp_BT, advantage_BT, CLIP)[0].sum()

  # −A·∇ log π = −A·(one-hot − softmax), softmax in float64.
  p_BTV = np.exp(np.asarray(logits_BTV, np.float64))
  p_BTV /= p_BTV.sum(axis=-1, keepdims=True)
  want_BTV = -np.asarray(advantage_BT)[..., None] * (np.eye(5)[np.asarray(targets_BT)] - p_BTV)
  np.testing.assert_allclose(jax.grad(f)(logits_BTV), want_BTV, atol=1e-6)


def test_gradient_is_finite_differences_away_from_the_kinks():
  logp_BT = jnp.log(jnp.array([[0.5, 0.9, 1.1, 1.6], [0.6, 0.95, 1.05, 1.5]]))
  advantage_BT = jnp.array([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])
  def f(x):
    return grpo.clipped_surrogate(x, jnp.zeros((2, 4)), advantage_BT, CLIP)[0]
  check_grads(f, (logp_BT,), order=1, modes=["rev"], atol=2e-3, rtol=2e-3, eps=1e-2)


def test_bfloat16_log_probabilities_are_cast_to_float32_first():
  got_BT, _ = grpo.clipped_surrogate(jnp.full((1, 1), -1.0, jnp.bfloat16), jnp.full((1, 1), -1.25),
                                     jnp.ones((1, 1)), grpo.Clip(0.5, 0.5))
  assert got_BT.dtype == jnp.float32
  np.testing.assert_allclose(got_BT, [[-np.exp(0.25)]], rtol=1e-6)


def test_gradients_of_dual_clip_are_finite_differences_away_from_the_kinks():
  # A < 0: free, below the clip, free, beyond the bound. A > 0: free, free, twice above the clip.
  logp_BT = jnp.log(jnp.array([[1.1, 0.5, 2.5, 4.0], [0.5, 1.1, 1.6, 4.0]]))
  advantage_BT = jnp.array([[-1.0] * 4, [2.0] * 4])
  def f(x):
    clip = grpo.Clip(LOW, HIGH, 3.0)
    return grpo.dual_clipped_surrogate(x, jnp.zeros((2, 4)), advantage_BT, clip)
  check_grads(lambda x: f(x)[0], (logp_BT,), order=1, modes=["rev"], atol=2e-3, rtol=2e-3, eps=1e-2)
  grad_BT = jax.grad(lambda x: f(x)[0].sum())(logp_BT)
  np.testing.assert_allclose(grad_BT, [[1.1, 0, 2.5, 0], [-1.0, -2.2, 0, 0]], rtol=1e-6)
  _, clipped_BT = f(logp_BT)
  np.testing.assert_array_equal(clipped_BT, grad_BT == 0)


def test_the_clipped_tokens_of_each_surrogate_by_hand():
  # r = 1.5, 0.5, 1.5, 4, 0.5, 4 under a clip to [0.8, 1.2] and a bound of 3.
  logp_BT = jnp.log(jnp.array([[1.5, 0.5, 1.5, 4.0, 0.5, 4.0]]))
  advantage_BT = jnp.array([[1.0, 1.0, -1.0, -1.0, -1.0, 0.0]])
  args = logp_BT, jnp.zeros((1, 6)), advantage_BT, grpo.Clip(0.2, 0.2, 3.0)
  np.testing.assert_array_equal(grpo.clipped_surrogate(*args)[1], [[1, 0, 0, 0, 1, 0]])
  np.testing.assert_array_equal(grpo.dual_clipped_surrogate(*args)[1], [[1, 0, 0, 1, 1, 0]])
  np.testing.assert_array_equal(grpo.cispo(*args)[1], [[1, 1, 1, 1, 1, 0]])
  # Of a sequence: its geometric mean is √(1.5·0.5) = 0.87, inside; √(4·0.5) = 1.41, outside.
  log_BT, A_BT = jnp.log(jnp.array([[1.5, 0.5, 4.0, 0.5]])), jnp.ones((1, 4))
  _, got = grpo.gspo(log_BT, jnp.zeros((1, 4)), A_BT, grpo.Clip(0.2, 0.2), np.ones((1, 4), bool),
                     np.array([[1, 1, 2, 2]]))
  np.testing.assert_array_equal(got, [[0, 0, 1, 1]])


def test_dual_clip_bounds_the_loss_of_a_bad_token_by_hand():
  # A = −2, r = 10: the clipped surrogate has 20, the bound at 3 has 6; A = 2 is as before.
  logp_BT, advantage_BT = jnp.log(jnp.array([[10.0, 10.0, 0.5]])), jnp.array([[-2.0, 2.0, -2.0]])
  def f(x):
    clip = grpo.Clip(0.2, 0.2, 3.0)
    return grpo.dual_clipped_surrogate(x, jnp.zeros((1, 3)), advantage_BT, clip)[0]
  np.testing.assert_allclose(f(logp_BT), [[6.0, -2.4, 1.6]], rtol=1e-6)
  np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(logp_BT), [[0.0, 0.0, 0.0]])


SEGMENTS_BT = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
MASK_BT = np.array([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]], bool)


def test_sequence_mean_by_hand():
  x = jnp.array([[9.0, 1.0, 3.0, 4.0, 8.0, jnp.nan], [9.0, 9.0, 1.0, 2.0, 3.0, 6.0]])
  got = grpo.sequence_mean(x, MASK_BT, SEGMENTS_BT)
  np.testing.assert_allclose(got, [[2, 2, 2, 6, 6, 0], [3] * 6])


def test_gspo_is_one_ratio_a_sequence():
  rng = np.random.default_rng(5)
  new, old = (rng.normal(size=(2, 6)).astype(np.float32) / 4 for _ in range(2))
  advantage_BT = np.where(SEGMENTS_BT == 2, -1.0, 1.5).astype(np.float32)
  want = np.zeros((2, 6))
  for b, s in ((0, 1), (0, 2), (1, 1)):
    mask_T = (SEGMENTS_BT[b] == s) & MASK_BT[b]
    ratio = np.exp(np.mean(np.float64(new[b, mask_T]) - old[b, mask_T]))
    A = advantage_BT[b, mask_T][0]
    want[b, mask_T] = -min(ratio * A, np.clip(ratio, 0.8, 1.3) * A)
  def f(x):
    return grpo.gspo(x, old, advantage_BT, grpo.Clip(0.2, 0.3), MASK_BT, SEGMENTS_BT)[0]
  np.testing.assert_allclose(np.asarray(f(new))[MASK_BT], want[MASK_BT], rtol=1e-5)
  check_grads(lambda x: f(x)[MASK_BT], (jnp.asarray(new),), order=1, modes=["rev"], atol=2e-3,
              rtol=2e-3, eps=1e-2)


def test_cispo_keeps_the_gradient_of_a_clipped_token():
  # r = 4 is clipped to 1.2: the gradient is −1.2·A, where the clipped surrogate has none.
  logp_BT = jnp.log(jnp.array([[4.0]]))
  clip = grpo.Clip(0.2, 0.2)
  grad = jax.grad(lambda x: grpo.cispo(x, jnp.zeros((1, 1)), jnp.full((1, 1), 2.0), clip)[0].sum())
  np.testing.assert_allclose(grad(logp_BT), [[-2.4]], rtol=1e-6)


def test_mismatch_ratios_by_hand():
  log_BT = np.log(np.array([[9, 2, 0.5, 4, 0.5, 9], [9, 9, 2, 2, 2, 2]])).astype(np.float32)
  zeros = np.zeros_like(log_BT)
  got = grpo.mismatch_ratio(log_BT, zeros, MASK_BT, SEGMENTS_BT, "token")
  np.testing.assert_allclose(got, [[1, 2, 0.5, 4, 0.5, 1], [1, 1, 2, 2, 2, 2]], rtol=1e-6)
  got = grpo.mismatch_ratio(log_BT, zeros, MASK_BT, SEGMENTS_BT, "sequence")
  np.testing.assert_allclose(got, [[1, 1, 1, 2, 2, 1], [1, 1, 16, 16, 16, 16]], rtol=1e-5)
  np.testing.assert_allclose(grpo.truncated(got[1], 2.0), [1, 1, 2, 2, 2, 2])
  np.testing.assert_allclose(grpo.masked(got, 0.5, 5.0), [[1, 1, 1, 2, 2, 1], [1, 1, 0, 0, 0, 0]],
                             rtol=1e-5)
  with pytest.raises(ValueError, match="choose \"token\" or \"sequence\""):
    grpo.mismatch_ratio(log_BT, zeros, MASK_BT, SEGMENTS_BT, "batch")


def test_importance_weights_make_the_samplers_draws_the_trainers():
  # Σ_a μ(a)·w(a)·f(a) is Σ_a π(a)·f(a): unbiased where nothing is cut.
  rng = np.random.default_rng(6)
  mu, pi = (p / p.sum() for p in rng.random((2, 5)))
  f = rng.normal(size=5)
  w = grpo.mismatch_ratio(jnp.log(pi)[None], jnp.log(mu)[None], np.ones((1, 5), bool),
                          np.ones((1, 5), int), "token")
  np.testing.assert_allclose(np.sum(mu * np.asarray(w[0]) * f), np.sum(pi * f), rtol=1e-5)


def test_overlong_penalty_by_hand():
  # DAPO's own: 20,480 tokens of which the last 4,096 are penalised.
  got = grpo.overlong_penalty(np.array([0, 16_384, 18_432, 20_480, 30_000]), 20_480, 4096)
  np.testing.assert_allclose(got, [0, 0, -0.5, -1, -1])


@pytest.mark.parametrize("advantages", [grpo.group_advantages, grpo.group_advantages_centred])
def test_rewards_that_are_equal_to_rounding_have_no_advantage(advantages):
  # In float32 the sum is 0.70000005, and 0.7 is 0.69999999.
  row = [np.float32(0.3) + np.float32(0.4), 0.7, 0.7, 0.7]
  reward_PG = np.array([row, row], np.float32)
  assert len(set(reward_PG[0])) == 2
  np.testing.assert_array_equal(advantages(reward_PG), np.zeros((2, 4)))
  # A spread that is small and no rounding counts.
  assert advantages(np.array([[1.0, 1.0001]], np.float32))[0, 1] > 0


def test_advantages_are_those_of_float64():
  reward_PG = np.random.default_rng(0).normal(1000, 1e-2, (5, 8)).astype(np.float32)
  wide_PG = reward_PG.astype(np.float64)
  want_PG = (wide_PG - wide_PG.mean(1, keepdims=True)) / wide_PG.std(1, keepdims=True)
  got_PG = grpo.group_advantages(reward_PG)
  assert got_PG.dtype == np.float32
  np.testing.assert_allclose(got_PG, want_PG, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("surrogate, advantage, log_ratio, grad", [
    # The clipped side of a ratio beyond the largest float32, e^88.7.
    ("clipped", 1.0, 89.0, 0.0), ("clipped", 1.0, 1000.0, 0.0), ("dual_clipped", 1.0, 89.0, 0.0),
    ("dual_clipped", -1.0, 89.0, 0.0), ("dual_clipped", -1.0, 1000.0, 0.0),
    ("clipped", -1.0, -200.0, 0.0), ("gspo", 1.0, 89.0, 0.0), ("cispo", 1.0, 89.0, -1.2)])
def test_a_gradient_on_the_clipped_side_is_finite(surrogate, advantage, log_ratio, grad):
  ones = jnp.ones((1, 1))
  def loss(logp):
    value_BT, _ = grpo.SURROGATES[surrogate](
        logp * ones, 0.0 * ones, advantage * ones, grpo.Clip(0.2, 0.2, 3.0), ones > 0,
        jnp.zeros((1, 1), jnp.int32))
    return value_BT[0, 0]
  assert float(jax.grad(loss)(log_ratio)) == pytest.approx(grad)
