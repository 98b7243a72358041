"""Kullback–Leibler divergences: exact over the vocabulary, and estimated from one sampled token.

Exact forms take finite logits [B, T, V] and are differentiated at each visited prefix: the effect
of earlier tokens on which prefixes are visited is ignored (GKD, https://arxiv.org/abs/2306.13649;
MiniLLM, https://arxiv.org/abs/2306.08543, keeps that term). A temperature divides its side's logits
before the softmax; nothing is multiplied back. Every result is float32 nats, [B, T], unreduced.

Definitions come first. Their gradients are written out at the end of the file, so that equal logits
give a gradient of exactly zero.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from s2d_jax.errors import InputError
from s2d_jax.losses import tokens

K1 = ("k1 (log π − log π_ref) cannot be a loss, because its gradient is zero in expectation and "
      "never sees the reference")
UNNORMALISED = ("the unnormalised top k (Σ p log p/q over a support) cannot be a loss, because its "
                "minimum is q/e on the support")
SUPPORTS = ("teacher", "student", "union", "intersection")
_LOWEST = -1e30  # the logit of an excluded token: finite, and its probability is 0


def forward_kl(student_logits_BTV: jax.Array, teacher_logits_BTV: jax.Array,
               student_temperature: float = 1.0, teacher_temperature: float = 1.0) -> jax.Array:
  """KL(teacher ‖ student) at each position, in nats: the student must cover.

    KL(p ‖ q) = Σ_v p(v) · (log p(v) − log q(v)),   p teacher, q student.

  Its gradient in the student's logits is (q − p) / student_temperature. Token-level distillation
  (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
  """
  return _kl(_tempered(teacher_logits_BTV, teacher_temperature),
             _tempered(student_logits_BTV, student_temperature))


def reverse_kl(student_logits_BTV: jax.Array, teacher_logits_BTV: jax.Array,
               student_temperature: float = 1.0, teacher_temperature: float = 1.0) -> jax.Array:
  """KL(student ‖ teacher) at each position, in nats: the student must not stray.

    KL(p ‖ q) = Σ_v p(v) · (log p(v) − log q(v)),   p student, q teacher.

  Its gradient in the student's logits is p · (log p/q − KL(p ‖ q)) / student_temperature. On the
  student's own samples this is on-policy distillation (GKD, https://arxiv.org/abs/2306.13649).
  """
  return _kl(_tempered(student_logits_BTV, student_temperature),
             _tempered(teacher_logits_BTV, teacher_temperature))


def jsd(student_logits_BTV: jax.Array, teacher_logits_BTV: jax.Array, pi: float,
        student_temperature: float = 1.0, teacher_temperature: float = 1.0) -> jax.Array:
  """Generalised Jensen–Shannon divergence at each position, in nats: between the two directions.

    JSD = π · KL(p ‖ m) + (1 − π) · KL(q ‖ m),   m = π p + (1 − π) q,   p teacher, q student.

  π in (0, 1) is the teacher's share of the mixture (GKD, https://arxiv.org/abs/2306.13649, eq. 1);
  JSD / π goes to KL(p ‖ q), the forward one, as π goes to 0, and JSD / (1 − π) to the reverse one
  as π goes to 1. Its gradient in the student's logits is q · (g − Σ q g) / student_temperature,
  g = (1 − π) · (log q − log m).

  Raises:
    InputError: π is not between 0 and 1.
  """
  if not 0 < pi < 1:
    raise InputError(f"pi is {pi}, the teacher's share of a mixture: choose it between 0 and 1, or "
                     "take forward_kl or reverse_kl, which its ends go to.")
  divergence = _with_gradient(functools.partial(_jsd_terms, pi=pi))
  return divergence(_tempered(student_logits_BTV, student_temperature),
                    _tempered(teacher_logits_BTV, teacher_temperature))


def top_k_forward_kl(student_logits_BTV: jax.Array, teacher_logits_BTV: jax.Array, k: int,
                     support: str = "teacher") -> tuple[jax.Array, dict[str, jax.Array]]:
  """KL(teacher ‖ student) on the outcomes of `top_k_reverse_kl`, and the masses that it returns."""
  return _top_k(student_logits_BTV, teacher_logits_BTV, k, support, forward=True)


def top_k_reverse_kl(student_logits_BTV: jax.Array, teacher_logits_BTV: jax.Array, k: int,
                     support: str = "student") -> tuple[jax.Array, dict[str, jax.Array]]:
  """KL(student ‖ teacher) on the tokens of a support, and all other tokens as one outcome.

    Σ_{v ∈ S} p(v) · log p(v)/q(v) + p(rest) · log p(rest)/q(rest),   p student, q teacher.

  A divergence of two distributions, so never negative and no more than the full one (the
  data-processing inequality); without the rest it is neither. The support is the k most probable
  tokens of the "teacher" or the "student" (of equal ones the lower ids), their "union" or
  "intersection", and is not differentiated.

  Returns:
    The divergence, [B, T], and the masses that the support holds: {"student_mass", "teacher_mass"}.

  Raises:
    InputError: an unknown support.
  """
  return _top_k(student_logits_BTV, teacher_logits_BTV, k, support, forward=False)


def intersection_reverse_kl(student_logits_BTV: jax.Array, teacher_logits_BTV: jax.Array,
                            k: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """KL(student ‖ teacher), both renormalised on the tokens in the top k of both.

    Σ_{v ∈ S} p̄(v) · sg[log p̄(v)/q̄(v)],   p̄, q̄ the student and the teacher given S.

  0, and no gradient, where they share no token. Because p̄ sums to one on S, stopping the gradient
  of the log-ratio changes none ("The Many Faces of On-Policy Distillation",
  https://arxiv.org/abs/2605.11182, whose choice it is, with k = 20). It does not see the tokens
  outside.

  Returns:
    The divergence, [B, T], and the masses that the support holds: {"student_mass", "teacher_mass"}.
  """
  student_BTV, _ = tokens.shifted_logits(student_logits_BTV)
  teacher_BTV, _ = tokens.shifted_logits(teacher_logits_BTV)
  inside_BTV = _support(student_BTV, teacher_BTV, k, "intersection")
  kl_BT = _kl(jnp.where(inside_BTV, student_BTV, _LOWEST),
              jnp.where(inside_BTV, teacher_BTV, _LOWEST))
  return kl_BT, _masses(student_BTV, teacher_BTV, inside_BTV)


def generalised_reverse_kl(student_logits_BTV: jax.Array, teacher_logits_BTV: jax.Array, k: int,
                           support: str = "student") -> tuple[jax.Array, dict[str, jax.Array]]:
  """The generalised KL(student ‖ teacher) of measures that need not sum to one, on a support.

    Σ_{v ∈ S} p(v) · log p(v)/q(v) − p(v) + q(v),   p student, q teacher.

  No term is negative, and all are 0 exactly where p = q on S; the other tokens are free. Its
  gradient is Σ_{v ∈ S} p(v) · log p(v)/q(v) · ∇ log p(v), the stop-gradient top k of "The Many
  Faces of On-Policy Distillation" (https://arxiv.org/abs/2605.11182, eq. 12). With k = V it is
  `reverse_kl`. Without − p + q it is refused, see `UNNORMALISED`.

  Returns the divergence, [B, T], and the masses of `top_k_reverse_kl`, and raises as it does.
  """
  student_BTV, _ = tokens.shifted_logits(student_logits_BTV)
  teacher_BTV, _ = tokens.shifted_logits(teacher_logits_BTV)
  inside_BTV = _support(student_BTV, teacher_BTV, k, support)
  return (_generalised_kl(student_BTV, teacher_BTV, inside_BTV),
          _masses(student_BTV, teacher_BTV, inside_BTV))


def sampled_reverse_kl(logp_BT: jax.Array, teacher_logp_BT: jax.Array,
                       baseline_BT: jax.Array | float = 0.0) -> jax.Array:
  """The policy-gradient form of reverse KL, from the sampled token, in nats.

    L = log p(a)/q(a),   ∇L = (log p(a)/q(a) − b) · ∇ log p(a),   a sampled from p.

  The value is k1's, unbiased; so is the gradient, that of KL(p ‖ q) at the visited prefix, for any
  baseline b that does not depend on a (Tinker's on-policy distillation has none; KL(p ‖ q) itself,
  the mean of the log-ratio, lowers the variance). p student, q teacher, log-probabilities
  in nats, [B, T]. Differentiating k1 by itself would lose the teacher: see `K1`.
  """
  p_BT = logp_BT.astype(jnp.float32)
  # The log-ratio acts as the reward of the sampled token, so only log p(a) is differentiated.
  ratio_BT = jax.lax.stop_gradient(p_BT - teacher_logp_BT.astype(jnp.float32))
  baseline_BT = jax.lax.stop_gradient(baseline_BT)
  # The second term is 0 in value: it carries the gradient and leaves the estimate unbiased.
  return ratio_BT + (ratio_BT - baseline_BT) * (p_BT - jax.lax.stop_gradient(p_BT))


def k2(logp_BT: jax.Array, reference_logp_BT: jax.Array) -> jax.Array:
  """Half the squared log-ratio of the sampled token, in nats: biased value, right gradient.

    k2 = ½ (log π(a) − log π_ref(a))²,   a sampled from π.

  E_a[∇k2] is the gradient of KL(π ‖ π_ref). Schulman's second estimator
  (http://joschu.net/blog/kl-approx.html). Log-probabilities in nats, [B, T].
  """
  return 0.5 * jnp.square(logp_BT.astype(jnp.float32) - reference_logp_BT.astype(jnp.float32))


def k3(logp_BT: jax.Array, reference_logp_BT: jax.Array) -> jax.Array:
  """The low-variance, never negative estimate of KL(π ‖ π_ref) from the sampled token, in nats.

    k3 = ρ − 1 − log ρ,   ρ = π_ref(a) / π(a),   a sampled from π.

  The value is unbiased; as a loss, E_a[∇k3] is the gradient of KL(π_ref ‖ π), the other direction.
  Schulman's third estimator (http://joschu.net/blog/kl-approx.html), GRPO's penalty
  (https://arxiv.org/abs/2402.03300, eq. 4). Log-probabilities in nats, [B, T].
  """
  log_ratio_BT = reference_logp_BT.astype(jnp.float32) - logp_BT.astype(jnp.float32)
  # expm1, because ρ − 1 loses all digits where the two policies nearly agree.
  return jnp.expm1(log_ratio_BT) - log_ratio_BT


def k3_corrected(logp_BT: jax.Array, reference_logp_BT: jax.Array,
                 old_logp_BT: jax.Array) -> jax.Array:
  """k3 of samples of an older policy, weighted by the importance ratio, in nats; [B, T].

    π(a)/π_old(a) · k3(π, π_ref),   a sampled from π_old.

  The value is unbiased for KL(π ‖ π_ref) whatever π has become, and so is the gradient, which that
  of k3 alone is not even where π = π_old. DeepSeek-V3.2 (https://arxiv.org/abs/2512.02556).
  """
  logp_BT = logp_BT.astype(jnp.float32)
  ratio_BT = jnp.exp(logp_BT - old_logp_BT.astype(jnp.float32))
  # The derivative in log π is π/π_old · (log π − log π_ref); term by term it would be rounding.
  linear_BT = jax.lax.stop_gradient(ratio_BT * (logp_BT - reference_logp_BT)) * logp_BT
  value_BT = jax.lax.stop_gradient(ratio_BT * k3(logp_BT, reference_logp_BT))
  return value_BT + (linear_BT - jax.lax.stop_gradient(linear_BT))


def forward_kl_gradient_norm(student_logits_BTV: jax.Array,
                             teacher_logits_BTV: jax.Array) -> jax.Array:
  """‖q − p‖₂, the length of `forward_kl`'s gradient in the student's logits; p teacher, q student.
  """
  # The length of the written-out gradient, so that measuring it needs no differentiation.
  p_BTV, q_BTV, _ = tokens.compare(teacher_logits_BTV, student_logits_BTV)
  return jnp.linalg.norm(q_BTV - p_BTV, axis=-1)


def reverse_kl_gradient_norm(student_logits_BTV: jax.Array,
                             teacher_logits_BTV: jax.Array) -> jax.Array:
  """‖p · (log p/q − KL(p ‖ q))‖₂, the length of `reverse_kl`'s gradient in the student's logits.

  p is the student and q the teacher.
  """
  p_BTV, _, ratio_BTV = tokens.compare(student_logits_BTV, teacher_logits_BTV)
  kl_BT = tokens.expectation(p_BTV, ratio_BTV)
  return jnp.linalg.norm(p_BTV * (ratio_BTV - kl_BT[..., None]), axis=-1)


def top_k_overlap(p_logits_BTV: jax.Array, q_logits_BTV: jax.Array, k: int) -> jax.Array:
  """Share of p's k most probable tokens that are among q's k most probable, in [0, 1]."""
  both_BTV = _support(p_logits_BTV, q_logits_BTV, k, "intersection")
  return jnp.sum(both_BTV, axis=-1, dtype=jnp.float32) / k


def overlap_mass(p_logits_BTV: jax.Array, q_logits_BTV: jax.Array, k: int) -> jax.Array:
  """Probability that p puts on the tokens that are among the k most probable of both."""
  return _mass(p_logits_BTV, _support(p_logits_BTV, q_logits_BTV, k, "intersection"))


def _tempered(logits_BTV: jax.Array, temperature: float) -> jax.Array:
  return logits_BTV.astype(jnp.float32) / temperature


def _top_k(student_BTV: jax.Array, teacher_BTV: jax.Array, k: int, support: str,
           forward: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Both directions of the top-k divergence, and the masses that the support holds."""
  # Shifted first: then the support, the divergence and the masses read the same array in memory.
  student_BTV, _ = tokens.shifted_logits(student_BTV)
  teacher_BTV, _ = tokens.shifted_logits(teacher_BTV)
  # The support is a choice of outcomes, made before the divergence is differentiated.
  inside_BTV = _support(student_BTV, teacher_BTV, k, support)
  pair = (teacher_BTV, student_BTV) if forward else (student_BTV, teacher_BTV)
  return _kl_with_rest(*pair, inside_BTV), _masses(student_BTV, teacher_BTV, inside_BTV)


def _support(student_BTV: jax.Array, teacher_BTV: jax.Array, k: int, support: str) -> jax.Array:
  """bool [B, T, V]: the tokens of a support, one of SUPPORTS."""
  if support not in SUPPORTS:
    raise InputError(f"support is {support!r}: choose it from {', '.join(SUPPORTS)}.")
  if support == "teacher":
    return _top(teacher_BTV, k)
  if support == "student":
    return _top(student_BTV, k)
  if support == "union":
    return _top(student_BTV, k) | _top(teacher_BTV, k)
  return _top(student_BTV, k) & _top(teacher_BTV, k)


def _top(logits_BTV: jax.Array, k: int) -> jax.Array:
  """bool [B, T, V]: the k largest logits, exactly k of them; ties go to lower ids. No gradient."""
  logits_BTV = jax.lax.stop_gradient(logits_BTV)
  # By the k-th value and not by a [k, vocabulary] comparison, which would be k times the memory.
  value_BTk, id_BTk = jax.lax.top_k(logits_BTV, k)
  last_value_BT1 = value_BTk[..., -1:]
  last_id_BT1 = id_BTk[..., -1:]
  id_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1)
  is_tied_BTV = (logits_BTV == last_value_BT1) & (id_BTV <= last_id_BT1)
  return (logits_BTV > last_value_BT1) | is_tied_BTV


def _masses(student_BTV: jax.Array, teacher_BTV: jax.Array,
            inside_BTV: jax.Array) -> dict[str, jax.Array]:
  """Probability of the tokens inside under each model; not differentiated."""
  return {"student_mass": jax.lax.stop_gradient(_mass(student_BTV, inside_BTV)),
          "teacher_mass": jax.lax.stop_gradient(_mass(teacher_BTV, inside_BTV))}


def _mass(logits_BTV: jax.Array, inside_BTV: jax.Array) -> jax.Array:
  p_BTV = jnp.exp(tokens.log_softmax(logits_BTV))
  return tokens.expectation(p_BTV, inside_BTV.astype(jnp.float32))


# The gradients, written out. Automatic differentiation of an equal pair leaves the rounding error
# of Σ p − 1, and a student that has become its teacher would never come to rest.

_Gradients = Callable[[], tuple[jax.Array, jax.Array]]  # in the two logits, [B, T, V] each


def _with_gradient(terms: Callable[..., tuple[jax.Array, _Gradients]]) -> Callable[..., jax.Array]:
  """A divergence of two float32 logits, differentiable by the gradients that `terms` returns.

  Args:
    terms: terms(p_logits, q_logits, *constants) -> (divergence_BT, gradients).
  """
  @jax.custom_jvp
  def divergence(p_logits_BTV: jax.Array, q_logits_BTV: jax.Array,
                 *constants: jax.Array) -> jax.Array:
    value_BT, _ = terms(p_logits_BTV, q_logits_BTV, *constants)
    return value_BT

  @divergence.defjvp
  def jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    value_BT, gradients = terms(*primals)
    in_p_BTV, in_q_BTV = gradients()
    # Plain sums: their transposes are plain products, which fuse.
    return value_BT, (jnp.sum(in_p_BTV * tangents[0], axis=-1)
                      + jnp.sum(in_q_BTV * tangents[1], axis=-1))

  return divergence


def _kl_terms(p_logits_BTV: jax.Array, q_logits_BTV: jax.Array) -> tuple[jax.Array, _Gradients]:
  """KL(p ‖ q) = Σ_v p · log p/q; gradients p · (log p/q − KL) and q − p."""
  p_BTV, q_BTV, ratio_BTV = tokens.compare(p_logits_BTV, q_logits_BTV)
  kl_BT = tokens.expectation(p_BTV, ratio_BTV)
  return kl_BT, lambda: (p_BTV * (ratio_BTV - kl_BT[..., None]), q_BTV - p_BTV)


_kl = _with_gradient(_kl_terms)


def _generalised_kl_terms(p_logits_BTV: jax.Array, q_logits_BTV: jax.Array,
                          inside_BTV: jax.Array) -> tuple[jax.Array, _Gradients]:
  """Σ_S p · log p/q − p + q; gradients as in `_kl_terms`, log p/q being 0 outside, and of q."""
  p_BTV, q_BTV, ratio_BTV = tokens.compare(p_logits_BTV, q_logits_BTV)
  ratio_BTV = tokens.computed_once(jnp.where(inside_BTV, ratio_BTV, 0.0))
  inside_BTV = inside_BTV.astype(jnp.float32)
  kl_BT = tokens.expectation(p_BTV, ratio_BTV)
  gap_BT = tokens.expectation(q_BTV, inside_BTV) - tokens.expectation(p_BTV, inside_BTV)
  # Negative by rounding alone.
  return jnp.maximum(kl_BT + gap_BT, 0.0), lambda: (
      p_BTV * (ratio_BTV - kl_BT[..., None]),
      (q_BTV - p_BTV) * inside_BTV - q_BTV * gap_BT[..., None])


_generalised_kl = _with_gradient(_generalised_kl_terms)


def _jsd_terms(student_BTV: jax.Array, teacher_BTV: jax.Array,
               pi: float) -> tuple[jax.Array, _Gradients]:
  """The divergence of `jsd`; gradients q · (g − Σ q g), g = (1 − π) log q/m, and the teacher's."""
  p_BTV, q_BTV, gap_BTV = tokens.compare(teacher_BTV, student_BTV)
  # log m/q = log(1 − π + π e^gap), and log m/p is that less the gap. Both are 0 to the last bit
  # where the logits are equal, and written with the exponential that does not overflow.
  is_high_BTV = gap_BTV > 0
  share_BTV = jnp.where(is_high_BTV, 1 - pi, pi)
  log_BTV = tokens.computed_once(jnp.log1p(share_BTV * jnp.expm1(-jnp.abs(gap_BTV))))
  m_over_q_BTV = log_BTV + jnp.where(is_high_BTV, gap_BTV, 0.0)
  m_over_p_BTV = log_BTV - jnp.where(is_high_BTV, 0.0, gap_BTV)

  def softmax_gradient(p_BTV: jax.Array, g_BTV: jax.Array) -> jax.Array:
    return p_BTV * (g_BTV - tokens.expectation(p_BTV, g_BTV)[..., None])

  def gradients() -> tuple[jax.Array, jax.Array]:
    return (softmax_gradient(q_BTV, -(1 - pi) * m_over_q_BTV),
            softmax_gradient(p_BTV, -pi * m_over_p_BTV))

  divergence_BT = -(pi * tokens.expectation(p_BTV, m_over_p_BTV)
                    + (1 - pi) * tokens.expectation(q_BTV, m_over_q_BTV))
  return divergence_BT, gradients


def _kl_with_rest_terms(p_logits_BTV: jax.Array, q_logits_BTV: jax.Array,
                        inside_BTV: jax.Array) -> tuple[jax.Array, _Gradients]:
  """KL(p ‖ q) with all tokens outside as one outcome; gradients as in `_kl_terms` on outcomes."""
  log_p_BTV = tokens.log_softmax(p_logits_BTV)
  log_q_BTV = tokens.log_softmax(q_logits_BTV)

  def log_rest(logits_BTV: jax.Array) -> jax.Array:
    """Log-mass outside the support, finite where it is empty."""
    top_BT1, log_BT1 = tokens.log_sum_exp(jnp.where(inside_BTV, _LOWEST, logits_BTV))
    whole_top_BT1, whole_log_BT1 = tokens.log_sum_exp(logits_BTV)
    return (top_BT1 - whole_top_BT1) + (log_BT1 - whole_log_BT1)

  # A token inside has its own ratio; one outside shares that of all the rest.
  rest_ratio_BT1 = log_rest(p_logits_BTV) - log_rest(q_logits_BTV)
  ratio_BTV = tokens.computed_once(
      jnp.where(inside_BTV, log_p_BTV - log_q_BTV, rest_ratio_BT1))
  p_BTV = tokens.computed_once(jnp.exp(log_p_BTV))
  kl_BT = tokens.expectation(p_BTV, ratio_BTV)

  def gradients() -> tuple[jax.Array, jax.Array]:
    q_BTV = tokens.computed_once(jnp.exp(log_q_BTV))
    # p inside; outside, p's rest shared out among the tokens as q's is. It is one exponential,
    # because the product q · p/q overflows.
    p_from_q_BTV = tokens.computed_once(
        jnp.exp(jnp.where(inside_BTV, log_p_BTV, log_q_BTV + rest_ratio_BT1)))
    return p_BTV * (ratio_BTV - kl_BT[..., None]), q_BTV - p_from_q_BTV

  return kl_BT, gradients


_kl_with_rest = _with_gradient(_kl_with_rest_terms)
