"""Kullback–Leibler divergences: exact over the vocabulary, and estimated from one sampled token.

Exact forms take finite logits [B, T, V] and are differentiated at each visited prefix: the effect
of earlier tokens on which prefixes are visited is ignored (GKD, https://arxiv.org/abs/2306.13649;
MiniLLM, https://arxiv.org/abs/2306.08543, keeps that term). Temperature is 1 on both sides. Every
result is float32 nats, [B, T], unreduced.
"""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def _kl(p_logits_BTV, q_logits_BTV):
  """Σ_v p · (log p − log q) from float32 logits."""
  log_p_BTV, log_q_BTV = jax.nn.log_softmax(p_logits_BTV), jax.nn.log_softmax(q_logits_BTV)
  return jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)


@_kl.defjvp
def _kl_jvp(logits, tangents):
  # In closed form, so that p = q gives a gradient of exactly zero. Left to autodiff it is what
  # remains of Σ p − 1 after rounding, and a finished student never comes to rest.
  log_p_BTV, log_q_BTV = map(jax.nn.log_softmax, logits)
  p_BTV, q_BTV = jnp.exp(log_p_BTV), jnp.exp(log_q_BTV)
  log_ratio_BTV = log_p_BTV - log_q_BTV
  kl_BT = jnp.sum(p_BTV * log_ratio_BTV, axis=-1)
  in_p_BTV = p_BTV * (log_ratio_BTV - kl_BT[..., None])
  in_q_BTV = q_BTV - p_BTV
  return kl_BT, jnp.sum(in_p_BTV * tangents[0] + in_q_BTV * tangents[1], axis=-1)


def forward_kl(student_logits_BTV, teacher_logits_BTV):
  """KL(teacher ‖ student) at each position, in nats: the student must cover.

    KL(p ‖ q) = Σ_v p(v) · (log p(v) − log q(v)),   p teacher, q student.

  Its gradient in the student's logits is q − p. Token-level distillation at temperature 1 (Hinton
  et al. 2015, https://arxiv.org/abs/1503.02531).
  """
  return _kl(teacher_logits_BTV.astype(jnp.float32), student_logits_BTV.astype(jnp.float32))


def reverse_kl(student_logits_BTV, teacher_logits_BTV):
  """KL(student ‖ teacher) at each position, in nats: the student must not stray.

    KL(p ‖ q) = Σ_v p(v) · (log p(v) − log q(v)),   p student, q teacher.

  Its gradient in the student's logits is p · (log p/q − KL(p ‖ q)). On the student's own samples
  this is on-policy distillation (GKD, https://arxiv.org/abs/2306.13649).
  """
  return _kl(student_logits_BTV.astype(jnp.float32), teacher_logits_BTV.astype(jnp.float32))


def forward_kl_gradient_norm(student_logits_BTV, teacher_logits_BTV):
  """‖q − p‖₂, the length of `forward_kl`'s gradient in the student's logits; p teacher, q student.
  """
  p_BTV = jax.nn.softmax(teacher_logits_BTV.astype(jnp.float32))
  q_BTV = jax.nn.softmax(student_logits_BTV.astype(jnp.float32))
  return jnp.linalg.norm(q_BTV - p_BTV, axis=-1)


def reverse_kl_gradient_norm(student_logits_BTV, teacher_logits_BTV):
  """‖p · (log p/q − KL(p ‖ q))‖₂, the length of `reverse_kl`'s gradient in the student's logits.

  p is the student and q the teacher.
  """
  log_p_BTV = jax.nn.log_softmax(student_logits_BTV.astype(jnp.float32))
  log_q_BTV = jax.nn.log_softmax(teacher_logits_BTV.astype(jnp.float32))
  kl_BT = reverse_kl(student_logits_BTV, teacher_logits_BTV)
  return jnp.linalg.norm(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV - kl_BT[..., None]), axis=-1)


def top_k_overlap(p_logits_BTV, q_logits_BTV, k):
  """Share of p's k most probable tokens that are among q's k most probable, in [0, 1]."""
  return jnp.sum(_both_top(p_logits_BTV, q_logits_BTV, k), axis=-1) / k


def overlap_mass(p_logits_BTV, q_logits_BTV, k):
  """Probability that p puts on the tokens that are among the k most probable of both."""
  p_BTV = jax.nn.softmax(p_logits_BTV.astype(jnp.float32))
  return jnp.sum(p_BTV * _both_top(p_logits_BTV, q_logits_BTV, k), axis=-1)


def _both_top(p_logits_BTV, q_logits_BTV, k):
  """1.0 on the tokens that are among the k largest logits of both, else 0; ties go to lower ids."""
  def top(logits_BTV):
    _, index_BTk = jax.lax.top_k(logits_BTV, k)
    return jnp.sum(jax.nn.one_hot(index_BTk, logits_BTV.shape[-1]), axis=-2)
  return top(p_logits_BTV) * top(q_logits_BTV)


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


def k1_as_loss(logp_BT, reference_logp_BT):
  """Refused: log π(a) − log π_ref(a) estimates a KL but is not a loss.

  Its gradient is ∇ log π(a): the reference drops out, and over a sampled from π it averages to 0.

  Raises:
    ValueError: always.
  """
  del logp_BT, reference_logp_BT
  raise ValueError(
      "k1 (log π − log π_ref) cannot be a loss, because its gradient is zero in expectation and "
      "never sees the reference: choose kl = \"k2\" or \"k3\".")
