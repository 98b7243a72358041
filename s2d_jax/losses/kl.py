"""Kullback–Leibler divergences: exact over the vocabulary, and estimated from one sampled token.

Exact forms take finite logits [B, T, V] and are differentiated at each visited prefix: the effect
of earlier tokens on which prefixes are visited is ignored (GKD, https://arxiv.org/abs/2306.13649;
MiniLLM, https://arxiv.org/abs/2306.08543, keeps that term). A temperature divides its side's logits
before the softmax; nothing is multiplied back. Every result is float32 nats, [B, T], unreduced.

Each gradient is written out, so that equal logits give a gradient of exactly zero. Left to autodiff
it is what remains of Σ p − 1 after rounding, and a finished student never comes to rest.
"""

import functools

import jax
import jax.numpy as jnp

from s2d_jax.losses.tokens import expectation, log_softmax, log_sum, once

LOWEST = -1e30  # a logit of no probability, finite
K1 = ("k1 (log π − log π_ref) cannot be a loss, because its gradient is zero in expectation and "
      "never sees the reference")
SUPPORTS = ("teacher", "student", "union", "intersection")


@jax.custom_jvp
def _kl(p_logits_BTV, q_logits_BTV):
  """Σ_v p · (log p − log q) from float32 logits."""
  p_BTV, _, ratio_BTV = _ratio(p_logits_BTV, q_logits_BTV)
  return expectation(p_BTV, ratio_BTV)


def _ratio(p_logits_BTV, q_logits_BTV):
  """(p, q, log p/q), the last one exactly 0 where the logits are equal."""
  log_p_BTV, log_q_BTV = log_softmax(p_logits_BTV), log_softmax(q_logits_BTV)
  return once(jnp.exp(log_p_BTV)), once(jnp.exp(log_q_BTV)), once(log_p_BTV - log_q_BTV)


@_kl.defjvp
def _kl_jvp(logits, tangents):
  p_BTV, q_BTV, ratio_BTV = _ratio(*logits)
  kl_BT = expectation(p_BTV, ratio_BTV)
  in_p_BTV = p_BTV * (ratio_BTV - kl_BT[..., None])
  return kl_BT, _along(in_p_BTV, tangents[0]) + _along(q_BTV - p_BTV, tangents[1])


def _along(gradient_BTV, tangent_BTV):
  """The change along a tangent; a plain sum, whose transpose is a plain product."""
  return jnp.sum(gradient_BTV * tangent_BTV, axis=-1)


def forward_kl(student_logits_BTV, teacher_logits_BTV, student_temperature=1.0,
               teacher_temperature=1.0):
  """KL(teacher ‖ student) at each position, in nats: the student must cover.

    KL(p ‖ q) = Σ_v p(v) · (log p(v) − log q(v)),   p teacher, q student.

  Its gradient in the student's logits is (q − p) / student_temperature. Token-level distillation
  (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
  """
  return _kl(_warm(teacher_logits_BTV, teacher_temperature),
             _warm(student_logits_BTV, student_temperature))


def reverse_kl(student_logits_BTV, teacher_logits_BTV, student_temperature=1.0,
               teacher_temperature=1.0):
  """KL(student ‖ teacher) at each position, in nats: the student must not stray.

    KL(p ‖ q) = Σ_v p(v) · (log p(v) − log q(v)),   p student, q teacher.

  Its gradient in the student's logits is p · (log p/q − KL(p ‖ q)) / student_temperature. On the
  student's own samples this is on-policy distillation (GKD, https://arxiv.org/abs/2306.13649).
  """
  return _kl(_warm(student_logits_BTV, student_temperature),
             _warm(teacher_logits_BTV, teacher_temperature))


def _warm(logits_BTV, temperature):
  return logits_BTV.astype(jnp.float32) / temperature


def jsd(student_logits_BTV, teacher_logits_BTV, pi, student_temperature=1.0,
        teacher_temperature=1.0):
  """Generalised Jensen–Shannon divergence at each position, in nats: between the two directions.

    JSD = π · KL(p ‖ m) + (1 − π) · KL(q ‖ m),   m = π p + (1 − π) q,   p teacher, q student.

  π in (0, 1) is the teacher's share of the mixture (GKD, https://arxiv.org/abs/2306.13649, eq. 1);
  JSD / π goes to KL(p ‖ q), the forward one, as π goes to 0, and JSD / (1 − π) to the reverse one
  as π goes to 1. Its gradient in the student's logits is q · (g − Σ q g) / student_temperature,
  g = (1 − π) · (log q − log m).

  Raises:
    ValueError: π is not between 0 and 1.
  """
  check_share(pi)
  return _jsd(_warm(student_logits_BTV, student_temperature),
              _warm(teacher_logits_BTV, teacher_temperature), pi)


def check_share(pi):
  """Refuses a share of `jsd`'s mixture that is none.

  Raises:
    ValueError: π is not between 0 and 1.
  """
  if not 0 < pi < 1:
    raise ValueError(f"pi is {pi}, the teacher's share of a mixture: choose it between 0 and 1, or "
                     "take forward_kl or reverse_kl, which its ends go to.")


def _mixed(student_BTV, teacher_BTV, pi):
  """(q, log m/q, p, log m/p) from float32 logits: 0 to the last bit where both are equal."""
  p_BTV, q_BTV, gap_BTV = _ratio(teacher_BTV, student_BTV)
  # log(1 − π + π e^gap), by the form whose exponential does not overflow.
  high_BTV = gap_BTV > 0
  share_BTV = jnp.where(high_BTV, 1 - pi, pi)
  log_BTV = once(jnp.log1p(share_BTV * jnp.expm1(-jnp.abs(gap_BTV))))
  return (q_BTV, log_BTV + jnp.where(high_BTV, gap_BTV, 0.0),
          p_BTV, log_BTV - jnp.where(high_BTV, 0.0, gap_BTV))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _jsd(student_BTV, teacher_BTV, pi):
  q_BTV, over_q_BTV, p_BTV, over_p_BTV = _mixed(student_BTV, teacher_BTV, pi)
  return -(pi * expectation(p_BTV, over_p_BTV) + (1 - pi) * expectation(q_BTV, over_q_BTV))


@_jsd.defjvp
def _jsd_jvp(pi, logits, tangents):
  q_BTV, over_q_BTV, p_BTV, over_p_BTV = _mixed(*logits, pi)
  def pulled(p_BTV, g_BTV):
    return p_BTV * (g_BTV - expectation(p_BTV, g_BTV)[..., None])
  in_q_BTV = pulled(q_BTV, -(1 - pi) * over_q_BTV)
  in_p_BTV = pulled(p_BTV, -pi * over_p_BTV)
  return _jsd(*logits, pi), _along(in_q_BTV, tangents[0]) + _along(in_p_BTV, tangents[1])


def top_k_forward_kl(student_logits_BTV, teacher_logits_BTV, k, support="teacher"):
  """`top_k_reverse_kl` the other way, KL(teacher ‖ student), on as many outcomes: (kl, masses)."""
  return _top_k(student_logits_BTV, teacher_logits_BTV, k, support, forward=True)


def top_k_reverse_kl(student_logits_BTV, teacher_logits_BTV, k, support="student"):
  """KL(student ‖ teacher) on the tokens of a support and one outcome more, all the rest.

    Σ_{v ∈ S} p(v) · log p(v)/q(v) + p(rest) · log p(rest)/q(rest),   p student, q teacher.

  A divergence of two distributions, so never negative and no more than the full one (the
  data-processing inequality); without the rest it is neither. The support is the k most probable
  tokens of the "teacher" or the "student" (of equal ones the lower ids), their "union" or
  "intersection", and is not differentiated.

  Returns:
    The divergence, [B, T], and the masses that the support holds: {"student_mass", "teacher_mass"}.

  Raises:
    ValueError: an unknown support.
  """
  return _top_k(student_logits_BTV, teacher_logits_BTV, k, support, forward=False)


def _top_k(student_BTV, teacher_BTV, k, support, forward):
  student_BTV, teacher_BTV = student_BTV.astype(jnp.float32), teacher_BTV.astype(jnp.float32)
  inside_BTV = _support(student_BTV, teacher_BTV, k, support)
  pair = (teacher_BTV, student_BTV) if forward else (student_BTV, teacher_BTV)
  return _kl_with_rest(*pair, inside_BTV), _masses(student_BTV, teacher_BTV, inside_BTV)


def _masses(student_BTV, teacher_BTV, inside_BTV):
  return {f"{who}_mass": jax.lax.stop_gradient(_mass(x_BTV, inside_BTV))
          for who, x_BTV in (("student", student_BTV), ("teacher", teacher_BTV))}


def _mass(logits_BTV, inside_BTV):
  """The probability of what is inside."""
  p_BTV = jnp.exp(log_softmax(logits_BTV.astype(jnp.float32)))
  return expectation(p_BTV, inside_BTV.astype(jnp.float32))


def _top(logits_BTV, k):
  """bool_BTV: the k largest logits, exactly k of them; ties go to lower ids. No gradient."""
  logits_BTV = jax.lax.stop_gradient(logits_BTV)
  last_BTk, index_BTk = jax.lax.top_k(logits_BTV, k)
  last_BT1, index_BT1 = last_BTk[..., -1:], index_BTk[..., -1:]
  id_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1)
  return (logits_BTV > last_BT1) | ((logits_BTV == last_BT1) & (id_BTV <= index_BT1))


def _support(student_BTV, teacher_BTV, k, support):
  """bool_BTV: the tokens that are told apart."""
  if support not in SUPPORTS:
    raise ValueError(f"support is {support!r}: choose it from {', '.join(SUPPORTS)}.")
  found = {"teacher": lambda: _top(teacher_BTV, k), "student": lambda: _top(student_BTV, k),
           "union": lambda: _top(student_BTV, k) | _top(teacher_BTV, k),
           "intersection": lambda: _top(student_BTV, k) & _top(teacher_BTV, k)}
  return found[support]()


@jax.custom_jvp
def _kl_with_rest(p_logits_BTV, q_logits_BTV, inside_BTV):
  p_BTV, *_, ratio_BTV = _with_rest(p_logits_BTV, q_logits_BTV, inside_BTV)
  return expectation(p_BTV, ratio_BTV)


@_kl_with_rest.defjvp
def _kl_with_rest_jvp(logits, tangents):
  # A token outside shares the ratio of all the rest, inside it has its own; p_from_q is p inside,
  # and outside what p's rest would be if shared out as q's. One exponential: q · p/q overflows.
  p_BTV, q_BTV, p_from_q_BTV, ratio_BTV = _with_rest(*logits)
  kl_BT = expectation(p_BTV, ratio_BTV)
  in_p_BTV = p_BTV * (ratio_BTV - kl_BT[..., None])
  in_q_BTV = q_BTV - p_from_q_BTV
  return kl_BT, _along(in_p_BTV, tangents[0]) + _along(in_q_BTV, tangents[1])


def _with_rest(p_logits_BTV, q_logits_BTV, inside_BTV):
  """(p, q, q · p/q of each token's outcome, log p/q of it)."""
  log_p_BTV, log_q_BTV = log_softmax(p_logits_BTV), log_softmax(q_logits_BTV)
  def rest(logits_BTV):  # log-mass outside, finite where there is nothing outside
    top_BT1, log_BT1 = log_sum(jnp.where(inside_BTV, LOWEST, logits_BTV))
    whole_BT1, log_whole_BT1 = log_sum(logits_BTV)
    return (top_BT1 - whole_BT1) + (log_BT1 - log_whole_BT1)
  over_BT1 = rest(p_logits_BTV) - rest(q_logits_BTV)
  ratio_BTV = jnp.where(inside_BTV, log_p_BTV - log_q_BTV, over_BT1)
  p_from_q_BTV = jnp.exp(jnp.where(inside_BTV, log_p_BTV, log_q_BTV + over_BT1))
  return (*(once(jnp.exp(x)) for x in (log_p_BTV, log_q_BTV)), once(p_from_q_BTV), once(ratio_BTV))


def intersection_reverse_kl(student_logits_BTV, teacher_logits_BTV, k):
  """KL(student ‖ teacher), both renormalised on what is among the k most probable of both.

    Σ_{v ∈ S} p̄(v) · sg[log p̄(v)/q̄(v)],   p̄, q̄ the student and the teacher given S.

  0, and no gradient, where they share nothing. Because p̄ sums to one on S, stopping the gradient of
  the log-ratio changes none ("The Many Faces of On-Policy Distillation",
  https://arxiv.org/abs/2605.11182, whose choice it is, with k = 20). It does not see what is
  outside.

  Returns:
    The divergence and the masses, as `top_k_reverse_kl`.
  """
  student_BTV, teacher_BTV = (x.astype(jnp.float32)
                              for x in (student_logits_BTV, teacher_logits_BTV))
  inside_BTV = _support(student_BTV, teacher_BTV, k, "intersection")
  kl_BT = _kl(*(jnp.where(inside_BTV, x, LOWEST) for x in (student_BTV, teacher_BTV)))
  return kl_BT, _masses(student_BTV, teacher_BTV, inside_BTV)


def sampled_reverse_kl(logp_BT, teacher_logp_BT, baseline_BT=0.0):
  """The policy-gradient form of reverse KL, from the sampled token, in nats.

    L = log p(a)/q(a),   ∇L = (log p(a)/q(a) − b) · ∇ log p(a),   a sampled from p.

  The value is k1's, unbiased; so is the gradient, that of KL(p ‖ q) at the visited prefix, for any
  baseline b that does not depend on a (Tinker's on-policy distillation has none; KL(p ‖ q) itself,
  the mean of the log-ratio, lowers the variance). p student, q teacher, log-probabilities
  in nats, [B, T]. Differentiating k1 by itself would lose the teacher: `k1_as_loss`.
  """
  p_BT = logp_BT.astype(jnp.float32)
  ratio_BT = jax.lax.stop_gradient(p_BT - teacher_logp_BT.astype(jnp.float32))
  baseline_BT = jax.lax.stop_gradient(baseline_BT)
  return ratio_BT + (ratio_BT - baseline_BT) * (p_BT - jax.lax.stop_gradient(p_BT))


def forward_kl_gradient_norm(student_logits_BTV, teacher_logits_BTV):
  """‖q − p‖₂, the length of `forward_kl`'s gradient in the student's logits; p teacher, q student.
  """
  p_BTV, q_BTV, _ = _ratio(*(x.astype(jnp.float32)
                             for x in (teacher_logits_BTV, student_logits_BTV)))
  return jnp.linalg.norm(q_BTV - p_BTV, axis=-1)


def reverse_kl_gradient_norm(student_logits_BTV, teacher_logits_BTV):
  """‖p · (log p/q − KL(p ‖ q))‖₂, the length of `reverse_kl`'s gradient in the student's logits.

  p is the student and q the teacher.
  """
  p_BTV, _, ratio_BTV = _ratio(*(x.astype(jnp.float32)
                                 for x in (student_logits_BTV, teacher_logits_BTV)))
  kl_BT = expectation(p_BTV, ratio_BTV)
  return jnp.linalg.norm(p_BTV * (ratio_BTV - kl_BT[..., None]), axis=-1)


def top_k_overlap(p_logits_BTV, q_logits_BTV, k):
  """Share of p's k most probable tokens that are among q's k most probable, in [0, 1]."""
  both_BTV = _support(p_logits_BTV, q_logits_BTV, k, "intersection")
  return jnp.sum(both_BTV, axis=-1, dtype=jnp.float32) / k


def overlap_mass(p_logits_BTV, q_logits_BTV, k):
  """Probability that p puts on the tokens that are among the k most probable of both."""
  return _mass(p_logits_BTV, _support(p_logits_BTV, q_logits_BTV, k, "intersection"))


def k2(logp_BT, reference_logp_BT):
  """Half the squared log-ratio of the sampled token, in nats: biased value, right gradient.

    k2 = ½ (log π(a) − log π_ref(a))²,   a sampled from π.

  E_a[∇k2] is the gradient of KL(π ‖ π_ref). Schulman's second estimator
  (http://joschu.net/blog/kl-approx.html). Log-probabilities in nats, [B, T].
  """
  return 0.5 * jnp.square(logp_BT.astype(jnp.float32) - reference_logp_BT.astype(jnp.float32))


def k3(logp_BT, reference_logp_BT):
  """The low-variance, never negative estimate of KL(π ‖ π_ref) from the sampled token, in nats.

    k3 = ρ − 1 − log ρ,   ρ = π_ref(a) / π(a),   a sampled from π.

  The value is unbiased; as a loss, E_a[∇k3] is the gradient of KL(π_ref ‖ π), the other direction.
  Schulman's third estimator (http://joschu.net/blog/kl-approx.html), the penalty of GRPO
  (https://arxiv.org/abs/2402.03300, eq. 4). Log-probabilities in nats, [B, T].
  """
  log_ratio_BT = reference_logp_BT.astype(jnp.float32) - logp_BT.astype(jnp.float32)
  return jnp.expm1(log_ratio_BT) - log_ratio_BT


def k3_corrected(logp_BT, reference_logp_BT, old_logp_BT):
  """k3 of samples of an older policy, weighted by the importance ratio, in nats.

    π(a)/π_old(a) · k3(π, π_ref),   a sampled from π_old.

  The value is unbiased for KL(π ‖ π_ref) whatever π has become, and so is the gradient, which that
  of k3 alone is not even where π = π_old. DeepSeek-V3.2 (https://arxiv.org/abs/2512.02556).
  Log-probabilities in nats, [B, T].
  """
  ratio_BT = jnp.exp(logp_BT.astype(jnp.float32) - old_logp_BT.astype(jnp.float32))
  return ratio_BT * k3(logp_BT, reference_logp_BT)


def k1_as_loss(logp_BT, reference_logp_BT):
  """Refused: log π(a) − log π_ref(a) estimates a KL but is not a loss.

  Its gradient is ∇ log π(a): the reference drops out, and over a sampled from π it averages to 0.

  Raises:
    ValueError: always.
  """
  del logp_BT, reference_logp_BT
  raise ValueError(f"{K1}: choose kl = \"k2\" or \"k3\".")
