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
  logits_BTV = logits_BTV - logits_BTV.max(axis=-1, keepdims=True)
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
def test_bfloat16_logits_are_cast_to_float32_first(f):
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
  # 200,000 sampled tokens at one prefix: the mean is within five standard errors everywhere.
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


def test_penalties_have_the_gradients_of_the_two_kls():
  np.testing.assert_allclose(expected_gradient(kl.k2), gradient(kl.reverse_kl), atol=1e-5)
  np.testing.assert_allclose(expected_gradient(kl.k3), gradient(kl.forward_kl), atol=1e-5)


@pytest.mark.parametrize("penalty", [kl.k2, kl.k3])
def test_penalties_are_positive_with_finite_difference_gradients(penalty):
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


def test_gradient_over_sequences_of_a_token_counts_later_tokens():
  want_SV = policy_gradient(discount=1)
  np.testing.assert_allclose(differences(sequence_kl, TABLE_SV), want_SV, atol=1e-8)
  np.testing.assert_allclose(visited_gradient(lambda reach_S: reach_S), want_SV, atol=2e-6)


def test_with_fixed_prefixes_a_tokens_gradient_is_its_own_divergences():
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


def test_the_constant_term_of_the_gradient_cancels_over_the_whole_vocabulary_only():
  # ∇Σ p·log p/q = Σ ∇p·(log p/q + 1), and Σ ∇p is 0 over all four, but over the two likeliest, of
  # mass 0.7, p·(1 − 0.7) for them and −0.7·p for the others.
  p_V, q_V = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.25, 0.25, 0.25, 0.25])
  slope_VV = np.diag(p_V) - np.outer(p_V, p_V)  # of p in its logits
  ratio_V = np.log(p_V / q_V)
  quarters_BTV = gradient(kl.reverse_kl, jnp.log(jnp.asarray(p_V, jnp.float32))[None, None],
                       jnp.zeros((1, 1, 4)))
  for one in (0, 1):
    np.testing.assert_allclose(quarters_BTV[0, 0], (ratio_V + one) @ slope_VV, atol=1e-6)

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


def test_the_norms_of_the_gradients():
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


def test_masses_of_large_logits_are_those_of_their_differences():
  # Shifted by 1e4, whose neighbours are 1e-3 apart, these quarters are what they were.
  quarters_BTV = jnp.round(4 * STUDENT_BTV) / 4
  far_BTV = quarters_BTV + 10_000
  for k in (1, 3):
    np.testing.assert_array_equal(kl.overlap_mass(far_BTV, TEACHER_BTV, k),
                                  kl.overlap_mass(quarters_BTV, TEACHER_BTV, k))
    np.testing.assert_array_equal(
        kl.top_k_reverse_kl(far_BTV, TEACHER_BTV, k)[1]["student_mass"],
        kl.top_k_reverse_kl(quarters_BTV, TEACHER_BTV, k)[1]["student_mass"])


# The forms between, beside and of fewer outcomes; NumPy in float64 has the formulas once more.
LOG_S, LOG_T = log_softmax(STUDENT_BTV), log_softmax(TEACHER_BTV)


def numpy_jsd(log_s, log_t, pi):
  log_m = np.log(pi * np.exp(log_t) + (1 - pi) * np.exp(log_s))
  return pi * plain_kl(log_t, log_m) + (1 - pi) * plain_kl(log_s, log_m)


def numpy_support(log_s, log_t, k, support):
  def top(x):  # of equal ones the lower ids
    order = np.argsort(np.argsort(-np.asarray(x, np.float64), axis=-1, kind="stable"), axis=-1)
    return order < k
  return {"teacher": top(log_t), "student": top(log_s), "union": top(log_t) | top(log_s),
          "intersection": top(log_t) & top(log_s)}[support]


def numpy_with_rest(log_p, log_q, inside):
  def outcomes(log):
    return np.concatenate([np.where(inside, np.exp(log), 0.0),
                           np.where(inside, 0.0, np.exp(log)).sum(-1, keepdims=True)], axis=-1)
  p, q = outcomes(log_p), outcomes(log_q)
  return np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0.0).sum(-1)


def numpy_restricted_kl(log_p, log_q, inside):
  """KL of both renormalised on what is inside."""
  def renormalised(log):
    mass = np.where(inside, np.exp(log), 0.0)
    return mass / np.maximum(mass.sum(-1, keepdims=True), 1e-300)
  p, q = renormalised(log_p), renormalised(log_q)
  return np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0.0).sum(-1)


def numpy_generalised(log_p, log_q, inside):
  return np.where(inside, np.exp(log_p) * (log_p - log_q - 1) + np.exp(log_q), 0.0).sum(-1)


def numerical(f, x, h=1e-6):
  """The gradient of Σ f(x) by central differences, in float64."""
  grad = np.zeros_like(x)
  for i in np.ndindex(*x.shape):
    step = np.zeros_like(x)
    step[i] = h
    grad[i] = (f(x + step).sum() - f(x - step).sum()) / (2 * h)
  return grad


# Ours of logits; NumPy's of log-probabilities, and of what the support is chosen by: it stays.
FORMS = {
    "forward": (kl.forward_kl, lambda s, t, chosen: plain_kl(t, s)),
    "reverse": (kl.reverse_kl, lambda s, t, chosen: plain_kl(s, t)),
    "jsd": (lambda s, t: kl.jsd(s, t, 0.3), lambda s, t, chosen: numpy_jsd(s, t, 0.3)),
    "intersection": (
        lambda s, t: kl.intersection_reverse_kl(s, t, 3)[0],
        lambda s, t, chosen: numpy_restricted_kl(s, t, numpy_support(*chosen, 3, "intersection"))),
    **{f"forward {support}": (
        lambda s, t, u=support: kl.top_k_forward_kl(s, t, 3, u)[0],
        lambda s, t, chosen, u=support: numpy_with_rest(t, s, numpy_support(*chosen, 3, u)))
       for support in kl.SUPPORTS},
    **{f"reverse {support}": (
        lambda s, t, u=support: kl.top_k_reverse_kl(s, t, 3, u)[0],
        lambda s, t, chosen, u=support: numpy_with_rest(s, t, numpy_support(*chosen, 3, u)))
       for support in kl.SUPPORTS},
    **{f"generalised {support}": (
        lambda s, t, u=support: kl.generalised_reverse_kl(s, t, 3, u)[0],
        lambda s, t, chosen, u=support: numpy_generalised(s, t, numpy_support(*chosen, 3, u)))
       for support in kl.SUPPORTS}}
EVERY_FORM = pytest.mark.parametrize("name", FORMS)


def numpy_both(numpy, student_BTV, teacher_BTV):
  """(value, gradient in the student's logits) of a form, in float64."""
  student_BTV = np.asarray(student_BTV, np.float64)
  log_s, log_t = log_softmax(student_BTV), log_softmax(teacher_BTV)
  chosen = student_BTV, np.asarray(teacher_BTV)
  return numpy(log_s, log_t, chosen), numerical(
      lambda x: numpy(log_softmax(x), log_t, chosen), student_BTV)


@EVERY_FORM
def test_forms_and_their_gradients_are_those_of_float64(name):
  ours, numpy = FORMS[name]
  value_BT, want = numpy_both(numpy, STUDENT_BTV, TEACHER_BTV)
  np.testing.assert_allclose(ours(STUDENT_BTV, TEACHER_BTV), value_BT, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(gradient(ours), want, atol=2e-6)
  jitted = jax.jit(jax.grad(lambda x: ours(x, TEACHER_BTV).sum()))(STUDENT_BTV)
  np.testing.assert_allclose(jitted, want, atol=2e-6)


def far_apart():
  """Student's and teacher's logits [1, N, 6]: 0 and ±100, and single peaks 85 to 200 high."""
  rng = np.random.default_rng(11)
  coarse = 100.0 * rng.integers(-1, 2, size=(2, 40, 6))
  peaks = np.zeros((2, 10, 6))
  for n, height in enumerate((85, 88, 100, 150, 200)):
    peaks[0, n, 4], peaks[1, n, 1] = height, height  # each certain of another token
    peaks[1, 5 + n, 4] = height  # a student that knows nothing
  return (jnp.asarray(x, jnp.float32)[None] for x in np.concatenate([coarse, peaks], axis=1))


@EVERY_FORM
def test_gradients_where_a_likely_token_is_impossible_to_the_other_model(name):
  ours, numpy = FORMS[name]
  student_BTV, teacher_BTV = far_apart()
  value_BT, want = numpy_both(numpy, student_BTV, teacher_BTV)
  got = jax.jit(jax.grad(lambda s: ours(s, teacher_BTV).sum()))(student_BTV)
  # Log-ratios up to 400, whose float32 neighbours are 3e-5 apart, times probabilities.
  np.testing.assert_allclose(ours(student_BTV, teacher_BTV), value_BT, rtol=1e-6, atol=2e-5)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5)


@EVERY_FORM
def test_equal_models_have_no_loss_and_no_gradient_in_any_form(name):
  ours, _ = FORMS[name]
  for both_BTV in (TEACHER_BTV, next(far_apart())):
    np.testing.assert_array_equal(ours(both_BTV, both_BTV), 0.0)
    np.testing.assert_array_equal(gradient(ours, both_BTV, both_BTV), 0.0)
    np.testing.assert_array_equal(jax.jit(
        lambda s, t: gradient(ours, s, t))(both_BTV, both_BTV), 0.0)


def test_jsd_by_hand_and_its_limits():
  # p = (3/4, 1/4), q = (1/2, 1/2), π = 1/2: m = (5/8, 3/8), KL(p‖m) = 0.035374 and
  # KL(q‖m) = 0.032269, so half their sum.
  teacher_BTV, zeros = jnp.log(jnp.array([[[0.75, 0.25]]])), jnp.zeros((1, 1, 2))
  np.testing.assert_allclose(kl.jsd(zeros, teacher_BTV, 0.5), [[0.0338215]], atol=1e-6)
  for pi, end, over in ((1e-4, kl.forward_kl, 1e-4), (1 - 1e-4, kl.reverse_kl, 1e-4)):
    np.testing.assert_allclose(kl.jsd(STUDENT_BTV, TEACHER_BTV, pi) / over,
                               end(STUDENT_BTV, TEACHER_BTV), rtol=1e-2)
  for pi in (0.0, 1.0, -1.0):
    with pytest.raises(ValueError, match="choose it between 0 and 1"):
      kl.jsd(STUDENT_BTV, TEACHER_BTV, pi)
  far = kl.jsd(STUDENT_BTV * 100, -TEACHER_BTV * 100, 0.5)
  # Logits of size 600 are 6e-5 apart, and nothing overflows.
  assert np.all(far <= np.log(2) + 6e-5) and np.isfinite(far).all()


def test_a_temperature_divides_its_own_sides_logits():
  for f, pair in ((kl.forward_kl, lambda s, t: plain_kl(t, s)),
                  (kl.reverse_kl, lambda s, t: plain_kl(s, t))):
    warm = log_softmax(np.asarray(STUDENT_BTV) / 2), log_softmax(np.asarray(TEACHER_BTV) / 3)
    np.testing.assert_allclose(f(STUDENT_BTV, TEACHER_BTV, 2.0, 3.0), pair(*warm), rtol=1e-5)
  warm = log_softmax(np.asarray(STUDENT_BTV) / 2), log_softmax(np.asarray(TEACHER_BTV) / 3)
  np.testing.assert_allclose(kl.jsd(STUDENT_BTV, TEACHER_BTV, 0.3, 2.0, 3.0),
                             numpy_jsd(*warm, 0.3), rtol=1e-5)


@pytest.mark.parametrize("support", kl.SUPPORTS)
def test_merging_outcomes_never_raises_a_divergence(support):
  rng = np.random.default_rng(7)
  s, t = (jnp.asarray(rng.normal(size=(50, 4, 20)) * 3, jnp.float32) for _ in range(2))
  for few, full in ((kl.top_k_forward_kl, kl.forward_kl), (kl.top_k_reverse_kl, kl.reverse_kl)):
    got, masses = few(s, t, 4, support)
    assert np.all(got >= -1e-6) and np.all(got <= full(s, t) + 1e-5)
    inside = numpy_support(np.asarray(s), np.asarray(t), 4, support)
    for name, x in (("student_mass", s), ("teacher_mass", t)):
      np.testing.assert_allclose(masses[name], np.sum(np.exp(log_softmax(x)) * inside, -1),
                                 rtol=1e-5, atol=1e-6)
  # Every token a category of its own: the full divergence.
  np.testing.assert_allclose(kl.top_k_reverse_kl(s, t, 20, support)[0], kl.reverse_kl(s, t),
                             rtol=1e-4, atol=1e-6)


def test_top_k_by_hand():
  # Student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4). The support is the teacher's top token, so
  # (1/4, 3/4) is compared with (1/2, 1/2). Reverse 1/4·ln(1/2) + 3/4·ln(3/2) = 0.130812, forward
  # 1/2·ln 2 + 1/2·ln(2/3) = 0.143841.
  student_BTV, teacher_BTV = (jnp.log(jnp.array([[row]])) for row in ([.5, .25, .25],
                                                                    [.25, .5, .25]))
  def forward(s, t):
    return kl.top_k_forward_kl(s, t, 1, "teacher")[0]
  def reverse(s, t):
    return kl.top_k_reverse_kl(s, t, 1, "teacher")[0]
  np.testing.assert_allclose(forward(student_BTV, teacher_BTV), [[0.143841]], atol=1e-6)
  np.testing.assert_allclose(reverse(student_BTV, teacher_BTV), [[0.130812]], atol=1e-6)
  _, masses = kl.top_k_forward_kl(student_BTV, teacher_BTV, 1, "teacher")
  np.testing.assert_allclose([masses["student_mass"], masses["teacher_mass"]], [[[.25]], [[.5]]])
  # Forward: 1/4 − 1/2 for the token in the support, q·(1 − (1/2)/(3/4)) for the others. Reverse:
  # 1/4·(ln(1/2) − KL), then 1/2 and 1/4 of ln(3/2) − KL = 0.274653.
  np.testing.assert_allclose(gradient(forward, student_BTV, teacher_BTV),
                             [[[1 / 6, -1 / 4, 1 / 12]]], atol=1e-6)
  np.testing.assert_allclose(gradient(reverse, student_BTV, teacher_BTV),
                             [[[0.137327, -0.205990, 0.068663]]], atol=1e-6)


def test_the_sampled_form_and_corrected_k3_by_hand():
  # log π = −1 and log π_ref = −1.5: log-ratio 0.5, with a baseline of 0.2 a slope of 0.3.
  logp_BT, reference_logp_BT = jnp.array([[-1.0]]), jnp.array([[-1.5]])
  for baseline, slope in ((0.0, 0.5), (0.2, 0.3)):
    value, grad = jax.value_and_grad(
        lambda x, b=baseline: kl.sampled_reverse_kl(x, reference_logp_BT, b)[0, 0])(logp_BT)
    np.testing.assert_allclose([value, grad[0, 0]], [0.5, slope], atol=1e-6)
  # log π_old = −1.2: e^0.2·k3 = 1.221403·0.106531 = 0.130117, and e^0.2·(1 − e^−0.5) = 0.480585
  # more in its slope.
  value, grad = jax.value_and_grad(
      lambda x: kl.k3_corrected(x, reference_logp_BT, jnp.array([[-1.2]]))[0, 0])(logp_BT)
  np.testing.assert_allclose([value, grad[0, 0]], [0.130117, 0.610702], atol=1e-6)


def test_ties_go_to_lower_ids_and_the_support_has_exactly_k():
  # Teacher: 2, three times 1, twice 0; student: all equal. Two of the first are {0, 1}, three
  # {0, 1, 3}; of the student's they are {0, 1} and {0, 1, 2}.
  teacher_BTV = jnp.array([[[2.0, 1.0, 0.0, 1.0, 1.0, 0.0]]])
  student_BTV = jnp.zeros((1, 1, 6))
  p = np.exp(log_softmax(teacher_BTV))[0, 0]
  for support, k, inside in (("teacher", 2, [0, 1]), ("teacher", 3, [0, 1, 3]),
                             ("student", 2, [0, 1]), ("student", 3, [0, 1, 2]),
                             ("union", 3, [0, 1, 2, 3]), ("intersection", 3, [0, 1])):
    _, masses = kl.top_k_forward_kl(student_BTV, teacher_BTV, k, support)
    np.testing.assert_allclose(masses["student_mass"], [[len(inside) / 6]], rtol=1e-6)
    np.testing.assert_allclose(masses["teacher_mass"], [[p[inside].sum()]], rtol=1e-6)
  np.testing.assert_allclose(kl.top_k_overlap(teacher_BTV, student_BTV, 3), [[2 / 3]], rtol=1e-6)
  np.testing.assert_allclose(kl.overlap_mass(teacher_BTV, student_BTV, 3), [[p[:2].sum()]],
                             rtol=1e-6)


def test_a_support_needs_no_more_than_a_block_of_logits():
  student, teacher = (jax.ShapeDtypeStruct((1, 8, 4096), jnp.float32) for _ in range(2))
  for f in (kl.top_k_forward_kl, kl.top_k_overlap):
    text = str(jax.make_jaxpr(lambda s, t, f=f: f(s, t, 64))(student, teacher))
    assert "8,4096]" in text and "64,4096]" not in text


def test_an_unknown_support_is_refused():
  with pytest.raises(ValueError, match="support is 'both': choose it from teacher, student, union"):
    kl.top_k_forward_kl(STUDENT_BTV, TEACHER_BTV, 3, "both")


def test_the_intersection_is_renormalised_and_an_empty_one_has_loss_0():
  got, _ = kl.intersection_reverse_kl(STUDENT_BTV, TEACHER_BTV, 4)
  inside = numpy_support(LOG_S, LOG_T, 4, "intersection")
  np.testing.assert_allclose(got, numpy_restricted_kl(LOG_S, LOG_T, inside), rtol=1e-5, atol=1e-6)
  want = numerical(lambda x: numpy_restricted_kl(log_softmax(x), LOG_T, inside),
                   np.asarray(STUDENT_BTV, np.float64))
  np.testing.assert_allclose(
      gradient(lambda s, t: kl.intersection_reverse_kl(s, t, 4)[0]), want, atol=2e-6)
  apart = jnp.array([[[5.0, 0.0, 0.0]]]), jnp.array([[[0.0, 5.0, 0.0]]])
  value, masses = kl.intersection_reverse_kl(*apart, 1)
  assert value == 0 and masses["student_mass"] == 0
  np.testing.assert_array_equal(
      jax.grad(lambda s: kl.intersection_reverse_kl(s, apart[1], 1)[0].sum())(apart[0]), 0.0)


@pytest.mark.parametrize("support", kl.SUPPORTS)
def test_the_generalised_form_is_never_negative_and_of_the_whole_vocabulary_the_full_one(support):
  rng = np.random.default_rng(8)
  s, t = (jnp.asarray(rng.normal(size=(50, 4, 20)) * 3, jnp.float32) for _ in range(2))
  near = s + 1e-4 * t  # where rounding is as large as the terms
  for student in (s, near):
    assert np.all(kl.generalised_reverse_kl(student, s, 4, support)[0] >= 0)
    got, masses = kl.generalised_reverse_kl(student, t, 4, support)
    np.testing.assert_array_equal(got > 0, masses["student_mass"] > 0)  # 0 on an empty support
  def whole(s, t):
    return kl.generalised_reverse_kl(s, t, 20, support)[0]
  np.testing.assert_allclose(whole(s, t), kl.reverse_kl(s, t), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient(whole, s, t), gradient(kl.reverse_kl, s, t),
                             rtol=1e-5, atol=1e-6)
  _, masses = kl.generalised_reverse_kl(s, t, 4, support)
  inside = numpy_support(np.asarray(s), np.asarray(t), 4, support)
  for name, x in (("student_mass", s), ("teacher_mass", t)):
    np.testing.assert_allclose(masses[name], np.sum(np.exp(log_softmax(x)) * inside, -1),
                               rtol=1e-5, atol=1e-6)


def test_the_generalised_form_by_hand():
  # Student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4). The support is the teacher's top token:
  # 1/4·ln(1/2) − 1/4 + 1/2 = 0.076713, and a slope of 1/4·ln(1/2) = −0.173287 in its log p.
  student_BTV, teacher_BTV = (jnp.log(jnp.array([[row]])) for row in ([.5, .25, .25],
                                                                    [.25, .5, .25]))
  def form(s, t):
    return kl.generalised_reverse_kl(s, t, 1, "teacher")[0]
  np.testing.assert_allclose(form(student_BTV, teacher_BTV), [[0.076713]], atol=1e-6)
  np.testing.assert_allclose(gradient(form, student_BTV, teacher_BTV),
                             [[[0.086643, -0.129965, 0.043322]]], atol=1e-6)
  # In the teacher's logits: q − p = 1/4 on the support, less q times that.
  np.testing.assert_allclose(gradient(lambda t, s: form(s, t), teacher_BTV, student_BTV),
                             [[[-0.0625, 0.125, -0.0625]]], atol=1e-6)


# A teacher of 24 tokens whose top 4 have the mass 0.706, and the student that a form ends in.
TOY_V = np.log([.4, .17, .086, .05, *[.294 / 20] * 20])
TOY_BTV = jnp.asarray(TOY_V[None, None], jnp.float32)


def descended(loss, start_V):
  """Probabilities [24] after gradient descent in the logits, from `start_V`."""
  def step(_, x_BTV):
    return x_BTV - 2.0 * jax.grad(lambda x: loss(x).sum())(x_BTV)
  start_BTV = jnp.asarray(start_V, jnp.float32)[None, None]
  return np.asarray(jax.nn.softmax(jax.jit(
      lambda x: jax.lax.fori_loop(0, 20_000, step, x))(start_BTV)))[0, 0]


STARTS = {"teacher": TOY_V, "uniform": np.zeros(24),
          "random": np.random.default_rng(3).normal(size=24)}


@pytest.mark.parametrize("start", STARTS)
def test_the_generalised_form_pins_the_teachers_probabilities_on_the_support(start):
  p_V = descended(lambda x: kl.generalised_reverse_kl(x, TOY_BTV, 4, "teacher")[0], STARTS[start])
  np.testing.assert_allclose(p_V[:4], np.exp(TOY_V[:4]), rtol=1e-4)
  np.testing.assert_allclose(p_V[:4].sum(), 0.706, rtol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_the_refused_unnormalised_form_ends_at_a_share_of_1_in_e(start):
  def unnormalised(x_BTV):
    log_p_BTV = jax.nn.log_softmax(x_BTV)
    return jnp.sum((jnp.exp(log_p_BTV) * (log_p_BTV - TOY_BTV))[..., :4], axis=-1)
  p_V = descended(unnormalised, STARTS[start])
  np.testing.assert_allclose(p_V[:4], np.exp(TOY_V[:4] - 1), rtol=1e-4)
  np.testing.assert_allclose(p_V[:4].sum(), 0.706 / np.e, rtol=1e-4)  # 0.2597
  np.testing.assert_allclose(unnormalised(jnp.log(p_V)[None, None]), [[-0.706 / np.e]], rtol=1e-4)


def test_the_renormalised_form_leaves_the_supports_mass_free():
  def form(x_BTV):
    return kl.intersection_reverse_kl(x_BTV, TOY_BTV, 4)[0]
  # The four first tokens of each start are its own top four too.
  ends = {}
  for mass in (0.5, 0.706, 0.9):
    p_V = np.array([*[mass / 4] * 4, *[(1 - mass) / 20] * 20])
    p_V[:4] *= [1.1, 1.0, 1.0, 0.9]
    ends[mass] = descended(form, np.log(p_V))
    np.testing.assert_allclose(ends[mass][:4] / ends[mass][:4].sum(), np.exp(TOY_V[:4]) / 0.706,
                               rtol=1e-3)
  masses = [p_V[:4].sum() for p_V in ends.values()]
  assert np.all(np.diff(masses) > 0.05), masses
  np.testing.assert_allclose(descended(form, TOY_V), np.exp(TOY_V), rtol=1e-5)


@pytest.mark.parametrize("with_baseline", [True, False])
def test_the_sampled_forms_gradient_averages_to_that_of_reverse_kl(with_baseline):
  # Over every token, weighted by its probability: p · (log p/q − KL), as of the full vocabulary.
  s, t = STUDENT_BTV[0], TEACHER_BTV[0]
  base = kl.reverse_kl(s, t) if with_baseline else 0.0
  def expected(x):
    log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(t)
    p = jax.lax.stop_gradient(jnp.exp(log_p))
    each = [kl.sampled_reverse_kl(log_p[:, v], log_q[:, v], base) for v in range(x.shape[-1])]
    return jnp.sum(p * jnp.stack(each, axis=-1))
  np.testing.assert_allclose(expected(s), np.sum(plain_kl(LOG_S[0], LOG_T[0])), rtol=1e-5)
  want = np.exp(LOG_S[0]) * (LOG_S[0] - LOG_T[0] - plain_kl(LOG_S[0], LOG_T[0])[..., None])
  np.testing.assert_allclose(jax.grad(expected)(s), want, atol=1e-6)
  # By itself the log-ratio has a gradient that averages to nothing.
  def naive(x):
    log_p = jax.nn.log_softmax(x)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p)) * (log_p - jax.nn.log_softmax(t)))
  np.testing.assert_allclose(jax.grad(naive)(s), 0.0, atol=1e-6)


def test_corrected_k3_is_unbiased_in_value_and_gradient_off_policy():
  # Samples of π_old, π elsewhere: Σ π_old · ρ·k3 is KL(π ‖ ref), and so is its gradient.
  rng = np.random.default_rng(9)
  new, old, ref = (jnp.asarray(rng.normal(size=6), jnp.float32) for _ in range(3))
  def expected(x):
    log_new, log_old, log_ref = map(jax.nn.log_softmax, (x, old, ref))
    return jnp.sum(jnp.exp(log_old) * kl.k3_corrected(log_new, log_ref, log_old))
  np.testing.assert_allclose(expected(new), kl.reverse_kl(new, ref), rtol=1e-5)
  want = jax.grad(lambda x: kl.reverse_kl(x, ref))(new)
  np.testing.assert_allclose(jax.grad(expected)(new), want, atol=1e-6)


@pytest.mark.parametrize("log_ratio", [2**-10, 0.5, -3.0, 18.0, 20.0, 30.0, -40.0])
def test_the_gradient_of_corrected_k3_is_that_of_float64(log_ratio):
  # On policy the derivative of π/π_old · k3 in log π is log π − log π_ref, whatever its size.
  logp, reference = -1.5, -1.5 + log_ratio
  def value(logp, old):
    return kl.k3_corrected(jnp.full((1, 1), logp), jnp.full((1, 1), reference),
                           jnp.full((1, 1), old))[0, 0]
  assert float(jax.grad(value)(logp, logp)) == pytest.approx(-log_ratio, rel=1e-5, abs=1e-6)
  # Off policy it is weighted by the ratio.
  assert float(jax.grad(value)(logp, logp - 0.5)) == pytest.approx(
      -log_ratio * np.exp(0.5), rel=1e-5, abs=1e-6)
  # The value is ρ − 1 − log ρ, of two terms that are each rounded to float32.
  assert float(value(logp, logp)) == pytest.approx(
      np.expm1(log_ratio) - log_ratio, rel=1e-5, abs=2 * 1.2e-7 * abs(log_ratio))
