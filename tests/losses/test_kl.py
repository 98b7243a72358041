"""Both exact divergences and the sampled estimators, with the identities that tie them together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from s2d_jax.losses import kl, tokens

RNG = np.random.default_rng(0)
STUDENT_BTV = jnp.asarray(RNG.normal(size=(2, 3, 6)) * 2, jnp.float32)
TEACHER_BTV = jnp.asarray(RNG.normal(size=(2, 3, 6)) * 2, jnp.float32)
BOTH = pytest.mark.parametrize("f", [kl.forward_kl, kl.reverse_kl])


def log_softmax(logits_BTV):
  """In float64 NumPy."""
  logits_BTV = np.asarray(logits_BTV, np.float64)
  return logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))


def plain_kl(log_p, log_q):
  return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def gradient(f, student_BTV=STUDENT_BTV, teacher_BTV=TEACHER_BTV):
  return jax.grad(lambda x: f(x, teacher_BTV).sum())(student_BTV)


def test_forward_kl_by_hand():
  # p = (3/4, 1/4), q = (1/2, 1/2): 3/4·ln(3/2) + 1/4·ln(1/2) = 0.130812 nats.
  teacher_BTV = jnp.log(jnp.array([[[0.75, 0.25]]]))
  np.testing.assert_allclose(
      kl.forward_kl(jnp.zeros((1, 1, 2)), teacher_BTV), [[0.130812]], atol=1e-6)


def test_reverse_kl_by_hand():
  # Student p = (1/2, 1/2), teacher q = (3/4, 1/4): 1/2·ln(2/3) + 1/2·ln 2 = 0.143841 nats.
  teacher_BTV = jnp.log(jnp.array([[[0.75, 0.25]]]))
  np.testing.assert_allclose(
      kl.reverse_kl(jnp.zeros((1, 1, 2)), teacher_BTV), [[0.143841]], atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_equals_float64(wrap):
  log_s, log_t = log_softmax(STUDENT_BTV), log_softmax(TEACHER_BTV)
  np.testing.assert_allclose(
      wrap(kl.forward_kl)(STUDENT_BTV, TEACHER_BTV), plain_kl(log_t, log_s), rtol=1e-5)
  np.testing.assert_allclose(
      wrap(kl.reverse_kl)(STUDENT_BTV, TEACHER_BTV), plain_kl(log_s, log_t), rtol=1e-5)


@BOTH
def test_bfloat16_is_cast_at_the_door(f):
  student_BTV, teacher_BTV = STUDENT_BTV.astype(jnp.bfloat16), TEACHER_BTV.astype(jnp.bfloat16)
  got_BT = f(student_BTV, teacher_BTV)
  assert got_BT.dtype == jnp.float32
  log_s = log_softmax(student_BTV.astype(jnp.float32))
  log_t = log_softmax(teacher_BTV.astype(jnp.float32))
  want_BT = plain_kl(log_t, log_s) if f is kl.forward_kl else plain_kl(log_s, log_t)
  np.testing.assert_allclose(got_BT, want_BT, rtol=1e-5)


def test_one_direction_is_the_other_with_its_arguments_swapped():
  np.testing.assert_array_equal(kl.forward_kl(STUDENT_BTV, TEACHER_BTV),
                                kl.reverse_kl(TEACHER_BTV, STUDENT_BTV))
  gap_BT = kl.forward_kl(STUDENT_BTV, TEACHER_BTV) - kl.reverse_kl(STUDENT_BTV, TEACHER_BTV)
  assert np.all(np.abs(gap_BT) > 1e-3)  # and they are not the same number


@BOTH
def test_not_negative_beyond_rounding(f):
  nearly_BTV = TEACHER_BTV + 1e-4 * STUDENT_BTV
  assert np.all(f(nearly_BTV, TEACHER_BTV) >= -5e-7)  # log-probabilities of size 4 are 2.4e-7 apart
  assert np.all(f(STUDENT_BTV, TEACHER_BTV) > 0)


@BOTH
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_equal_models_give_exactly_zero_and_a_zero_gradient(f, wrap):
  np.testing.assert_array_equal(wrap(f)(TEACHER_BTV, TEACHER_BTV), 0.0)
  grad_BTV = wrap(lambda s, t: gradient(f, s, t))(TEACHER_BTV, TEACHER_BTV)
  np.testing.assert_array_equal(grad_BTV, 0.0)


@BOTH
def test_adding_a_constant_to_either_changes_nothing(f):
  want_BT = f(STUDENT_BTV, TEACHER_BTV)
  np.testing.assert_allclose(f(STUDENT_BTV + 3.0, TEACHER_BTV), want_BT, rtol=1e-5)
  np.testing.assert_allclose(f(STUDENT_BTV, TEACHER_BTV - 5.0), want_BT, rtol=1e-5)


@BOTH
def test_gradients_are_finite_differences(f):
  check_grads(f, (STUDENT_BTV, TEACHER_BTV), order=1, modes=["rev"], atol=5e-3, rtol=5e-3, eps=1e-2)


def test_gradient_of_reverse_kl():
  # p·(log p/q − KL(p ‖ q)), p student, q teacher.
  log_p, log_q = log_softmax(STUDENT_BTV), log_softmax(TEACHER_BTV)
  want_BTV = np.exp(log_p) * (log_p - log_q - plain_kl(log_p, log_q)[..., None])
  np.testing.assert_allclose(gradient(kl.reverse_kl), want_BTV, atol=2e-6)


def test_gradient_of_forward_kl():
  # q − p, q student, p teacher.
  want_BTV = np.exp(log_softmax(STUDENT_BTV)) - np.exp(log_softmax(TEACHER_BTV))
  np.testing.assert_allclose(gradient(kl.forward_kl), want_BTV, atol=2e-6)


# Sampled estimators. With six tokens the expectation over a ~ π is a sum over all six, exactly.


def expected_gradient(estimator):
  """E_{a ~ student}[∇ estimator(log π(a), log π_ref(a))] in the student's logits, [B, T, V]."""
  def loss(student_BTV, targets_BT):
    reference_logp_BT = tokens.log_prob(TEACHER_BTV, targets_BT)
    return estimator(tokens.log_prob(student_BTV, targets_BT), reference_logp_BT).sum()

  grad = jax.jit(jax.grad(loss))
  p_BTV = np.exp(log_softmax(STUDENT_BTV))
  total_BTV = np.zeros(p_BTV.shape)
  for a in range(p_BTV.shape[-1]):
    grad_BTV = grad(STUDENT_BTV, jnp.full(p_BTV.shape[:2], a))
    total_BTV += p_BTV[..., a:a + 1] * np.asarray(grad_BTV, np.float64)
  return total_BTV


def test_policy_gradient_of_the_log_ratio_averages_to_the_full_gradient():
  def sampled(logp_BT, reference_logp_BT):
    advantage_BT = jax.lax.stop_gradient(reference_logp_BT - logp_BT)
    return -advantage_BT * logp_BT
  np.testing.assert_allclose(expected_gradient(sampled), gradient(kl.reverse_kl), atol=5e-6)


def test_policy_gradient_of_the_log_ratio_by_sampling():
  # The same estimator from 200,000 draws at one prefix: within five standard errors everywhere.
  student_V, teacher_V = STUDENT_BTV[0, 0], TEACHER_BTV[0, 0]
  log_p, log_q = log_softmax(student_V), log_softmax(teacher_V)
  drawn_N = np.random.default_rng(3).choice(6, size=200_000, p=np.exp(log_p) / np.exp(log_p).sum())
  score_NV = np.eye(6)[drawn_N] - np.exp(log_p)
  sample_NV = (log_p - log_q)[drawn_N][:, None] * score_NV
  error_V = sample_NV.std(axis=0) / np.sqrt(len(drawn_N))
  want_V = gradient(kl.reverse_kl)[0, 0]
  assert np.all(np.abs(sample_NV.mean(axis=0) - want_V) < 5 * error_V)


def test_back_propagating_the_log_ratio_itself_averages_to_zero():
  naive_BTV = expected_gradient(lambda logp_BT, reference_logp_BT: logp_BT - reference_logp_BT)
  np.testing.assert_allclose(naive_BTV, 0.0, atol=5e-6)
  assert np.abs(gradient(kl.reverse_kl)).max() > 0.1


def test_k1_as_a_loss_is_refused_by_name():
  with pytest.raises(ValueError, match="zero in expectation.*choose kl = \"k2\" or \"k3\""):
    kl.k1_as_loss(jnp.zeros((1, 1)), jnp.zeros((1, 1)))


def test_k2_and_k3_by_hand():
  # log π = −1, log π_ref = −1.5: k2 = ½·0.25 = 0.125; k3 = e^−0.5 − 1 + 0.5 = 0.106531.
  logp_BT, reference_logp_BT = jnp.array([[-1.0]]), jnp.array([[-1.5]])
  np.testing.assert_allclose(kl.k2(logp_BT, reference_logp_BT), [[0.125]], atol=1e-6)
  np.testing.assert_allclose(kl.k3(logp_BT, reference_logp_BT), [[0.106531]], atol=1e-6)


def test_k3_averages_to_the_divergence():
  p_BTV = np.exp(log_softmax(STUDENT_BTV))
  k3_BTV = kl.k3(jax.nn.log_softmax(STUDENT_BTV), jax.nn.log_softmax(TEACHER_BTV))
  np.testing.assert_allclose((p_BTV * np.asarray(k3_BTV)).sum(axis=-1),
                             kl.reverse_kl(STUDENT_BTV, TEACHER_BTV), rtol=2e-5)


def test_which_direction_each_penalty_pulls():
  np.testing.assert_allclose(expected_gradient(kl.k2), gradient(kl.reverse_kl), atol=1e-5)
  np.testing.assert_allclose(expected_gradient(kl.k3), gradient(kl.forward_kl), atol=1e-5)


@pytest.mark.parametrize("penalty", [kl.k2, kl.k3])
def test_penalties(penalty):
  logp_BT, reference_logp_BT = jnp.array([[-1.0, -0.2]]), jnp.array([[-1.5, -2.0]])
  check_grads(penalty, (logp_BT, reference_logp_BT), order=1, modes=["rev"],
              atol=2e-3, rtol=2e-3, eps=1e-2)
  assert np.all(penalty(logp_BT, reference_logp_BT) > 0)
  value_BT, pull = jax.vjp(lambda x: penalty(x, logp_BT), logp_BT)
  np.testing.assert_array_equal(value_BT, 0.0)
  np.testing.assert_array_equal(pull(jnp.ones((1, 2)))[0], 0.0)
  got_BT = penalty(logp_BT.astype(jnp.bfloat16), reference_logp_BT)
  assert got_BT.dtype == jnp.float32


# Whole sequences: two tokens of three, from tables of logits, all nine enumerated in float64. Row 0
# of a table is the empty prefix, row 1 + v the prefix that is the token v.

TABLE_SV, TEACHER_SV = np.random.default_rng(5).normal(size=(2, 4, 3)) * 1.5


def differences(f, x):
  """The gradient of a float64 function by central differences."""
  steps = 1e-5 * np.eye(x.size).reshape(-1, *x.shape)
  return np.array([(f(x + e) - f(x - e)) / 2e-5 for e in steps]).reshape(x.shape)


def sequences():
  """(probability, visited (prefix, token) pairs, their log-ratios) of every sequence."""
  log_p_SV, log_q_SV = log_softmax(TABLE_SV), log_softmax(TEACHER_SV)
  for a, b in np.ndindex(3, 3):
    pairs = [(0, a), (1 + a, b)]
    yield (np.exp(sum(log_p_SV[pair] for pair in pairs)), pairs,
           [log_p_SV[pair] - log_q_SV[pair] for pair in pairs])


def policy_gradient(discount):
  """Σ_t E[∇log p(y_t | s_t) · Σ_{t' ≥ t} discount^(t' − t) · log p/q(y_t' | s_t')], [S, V]."""
  grad_SV = np.zeros((4, 3))
  for probability, pairs, ratios in sequences():
    for t, (s, v) in enumerate(pairs):
      score_V = np.eye(3)[v] - np.exp(log_softmax(TABLE_SV)[s])
      ahead = sum(discount ** k * ratio for k, ratio in enumerate(ratios[t:]))
      grad_SV[s] += probability * ahead * score_V
  return grad_SV


def sequence_kl(table_SV):
  """KL of the table's sequences to the teacher's, in float64."""
  def joint(log_SV):
    return log_SV[0][:, None] + log_SV[1:]
  return plain_kl(joint(log_softmax(table_SV)).ravel(), joint(log_softmax(TEACHER_SV)).ravel())


def visited_gradient(prefixes):
  """Gradient of reverse_kl summed over the prefixes a student visits, by their probabilities."""
  def loss(table_SV):
    reach_S = prefixes(jnp.concatenate([jnp.ones(1), jax.nn.softmax(table_SV[0])]))
    value_BT = kl.reverse_kl(table_SV[None], jnp.asarray(TEACHER_SV, jnp.float32)[None])
    return jnp.sum(reach_S * value_BT[0])
  return jax.grad(loss)(jnp.asarray(TABLE_SV, jnp.float32))


def test_gradient_over_sequences_weighs_a_token_by_all_that_follows():
  want_SV = policy_gradient(discount=1)
  np.testing.assert_allclose(differences(sequence_kl, TABLE_SV), want_SV, atol=1e-8)
  np.testing.assert_allclose(visited_gradient(lambda reach_S: reach_S), want_SV, atol=2e-6)


def test_with_its_prefixes_held_a_token_answers_for_itself_alone():
  own_SV = policy_gradient(discount=0)
  np.testing.assert_allclose(visited_gradient(jax.lax.stop_gradient), own_SV, atol=2e-6)
  gap_SV = np.abs(policy_gradient(discount=1) - own_SV)
  assert gap_SV[0].max() > 0.02 and gap_SV[1:].max() < 1e-12  # nothing follows the second token


def test_divergence_from_the_teacher_splits_at_an_old_policy():
  # −KL(p ‖ q) = E_p[log q/p_k] − KL(p ‖ p_k); where p = p_k the last gradient is zero, and the
  # reward log q/p_k alone has the whole one.
  old_BTV = jnp.asarray(np.random.default_rng(6).normal(size=(2, 3, 6)), jnp.float32)
  log_p, log_q = log_softmax(STUDENT_BTV), log_softmax(TEACHER_BTV)
  for k_BTV, still in ((old_BTV, False), (STUDENT_BTV, True)):
    reward = log_q - log_softmax(k_BTV)
    mean = (np.exp(log_p) * reward).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        -kl.reverse_kl(STUDENT_BTV, TEACHER_BTV), mean[..., 0] - kl.reverse_kl(STUDENT_BTV, k_BTV),
        rtol=1e-5, atol=2e-6)
    last_BTV = gradient(kl.reverse_kl, STUDENT_BTV, k_BTV)
    np.testing.assert_allclose(
        -gradient(kl.reverse_kl), np.exp(log_p) * (reward - mean) - last_BTV, atol=4e-6)
    assert np.any(last_BTV) != still


def test_the_one_cancels_over_the_whole_vocabulary_and_not_over_a_part():
  # ∇Σ p·log p/q = Σ ∇p·(log p/q + 1), and Σ ∇p is 0 over all four, but over the two likeliest, of
  # mass 0.7, p·(1 − 0.7) for them and −0.7·p for the others.
  p_V, q_V = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.25, 0.25, 0.25, 0.25])
  slope_VV = np.diag(p_V) - np.outer(p_V, p_V)  # of p in its logits
  ratio_V = np.log(p_V / q_V)
  whole_BTV = gradient(kl.reverse_kl, jnp.log(jnp.asarray(p_V, jnp.float32))[None, None],
                       jnp.zeros((1, 1, 4)))
  for one in (0, 1):
    np.testing.assert_allclose(whole_BTV[0, 0], (ratio_V + one) @ slope_VV, atol=1e-6)

  def part(logits_V):
    log_p_V = log_softmax(logits_V)[:2]
    return plain_kl(log_p_V, np.log(q_V[:2]))

  with_one_V = (ratio_V[:2] + 1) @ slope_VV[:2]
  without_V = ratio_V[:2] @ slope_VV[:2]
  np.testing.assert_allclose(differences(part, np.log(p_V)), with_one_V, atol=1e-8)
  np.testing.assert_allclose(with_one_V - without_V, [0.12, 0.09, -0.14, -0.07], atol=1e-12)


@BOTH
def test_padded_ids_masked_on_both_sides_change_nothing(f):
  def padded(logits_BTV, masked=-1e9):
    return jnp.pad(logits_BTV, ((0, 0), (0, 0), (0, 2)), constant_values=masked)

  student_BTV, teacher_BTV = padded(STUDENT_BTV), padded(TEACHER_BTV)
  np.testing.assert_allclose(f(student_BTV, teacher_BTV), f(STUDENT_BTV, TEACHER_BTV), rtol=1e-6)
  grad_BTV = gradient(f, student_BTV, teacher_BTV)
  np.testing.assert_allclose(grad_BTV[..., :6], gradient(f), atol=1e-6)
  np.testing.assert_array_equal(grad_BTV[..., 6:], 0.0)
  one_sided_BT = f(padded(STUDENT_BTV, 0.0), teacher_BTV)
  assert np.all(np.abs(one_sided_BT - f(STUDENT_BTV, TEACHER_BTV)) > 1e-3)


def test_the_lengths_of_the_gradients():
  for length, loss in ((kl.forward_kl_gradient_norm, kl.forward_kl),
                       (kl.reverse_kl_gradient_norm, kl.reverse_kl)):
    np.testing.assert_allclose(length(STUDENT_BTV, TEACHER_BTV),
                               np.linalg.norm(gradient(loss), axis=-1), rtol=1e-5)


def test_overlap_by_hand():
  # Probabilities .5 .3 .1 .1 and .1 .5 .3 .1: the top two are {0, 1} and {1, 2}.
  p_BTV, q_BTV = (jnp.log(jnp.array([[row]])) for row in ([.5, .3, .15, .05], [.1, .5, .3, .1]))
  np.testing.assert_allclose(kl.top_k_overlap(p_BTV, q_BTV, 2), [[0.5]])
  np.testing.assert_allclose(kl.overlap_mass(p_BTV, q_BTV, 2), [[0.3]], rtol=1e-6)
  np.testing.assert_allclose(kl.overlap_mass(q_BTV, p_BTV, 2), [[0.5]], rtol=1e-6)
  np.testing.assert_allclose(kl.top_k_overlap(p_BTV, q_BTV, 1), [[0.0]])
  np.testing.assert_allclose(kl.overlap_mass(p_BTV, q_BTV, 4), [[1.0]], rtol=1e-6)
