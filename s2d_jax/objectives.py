"""Adapters that give the losses one signature: objective(student_head, guide_head, batch, hp).

Each returns {name: (sum, count)} with "loss" among the names; `update` adds the pairs over
microbatches and divides once. The sum is over tokens, weighted by batch.weight_BT, and the count is
the sum of the weights. Heads are pairs (features_BTD, weight_VD); guide_head is None without a
guide. `READS` names the config keys each objective reads.
"""

import jax
import jax.numpy as jnp

from s2d_jax.losses import blockwise, grpo, kl

ADVANTAGES = {"group": grpo.group_advantages, "centred": grpo.group_advantages_centred}
KL_PENALTIES = {"k2": kl.k2, "k3": kl.k3}


def summed(x_BT, weight_BT):
  """(Σ weight · x, Σ weight); where the weight is 0, x is left out, whatever it is."""
  return jnp.sum(x_BT * weight_BT, where=weight_BT > 0), jnp.sum(weight_BT)


def logp(head, batch, hp):
  """The model's own log-probability of each target and its entropy: what `update.score` runs."""
  return blockwise.logp(head, batch.targets_BT, hp.block)


def negative_log_likelihood(student_head, guide_head, batch, hp):
  """Supervised fine-tuning: −log π of each target, in nats."""
  del guide_head
  logp_BT, entropy_BT = logp(student_head, batch, hp)
  return {"loss": summed(-logp_BT, batch.weight_BT),
          "entropy": summed(entropy_BT, batch.weight_BT)}


def clipped_surrogate(student_head, guide_head, batch, hp):
  """GRPO: the clipped surrogate on batch.advantage_BT, plus hp.kl_coef times a KL to the guide.

    L = clipped_surrogate(π, π_old, A; clip_low, clip_high) + kl_coef · k(π, π_ref).

  k is hp.kl: "k2", "k3" or "none". Without a penalty a guide is not looked at.

  Raises:
    ValueError: hp.kl is "k1" or unknown, or a penalty is asked for and there is no guide.
  """
  check_penalty(hp)
  weight_BT = batch.weight_BT
  logp_BT, entropy_BT = logp(student_head, batch, hp)
  # A token without weight may hold anything, and 0 · anything can be NaN: give it ratio 1, A = 0.
  old_logp_BT = jnp.where(weight_BT > 0, batch.old_logp_BT, jax.lax.stop_gradient(logp_BT))
  advantage_BT = jnp.where(weight_BT > 0, batch.advantage_BT, 0.0)
  clip = (hp.clip_low, hp.clip_high)
  loss_BT = grpo.clipped_surrogate(logp_BT, old_logp_BT, advantage_BT, *clip)
  clipped_BT = grpo.clipped(logp_BT, old_logp_BT, advantage_BT, *clip)
  sums = {"entropy": summed(entropy_BT, weight_BT),
          "ratio_mean": summed(jnp.exp(logp_BT - old_logp_BT), weight_BT),
          "clip_fraction": summed(clipped_BT.astype(jnp.float32), weight_BT)}
  if hp.kl != "none" and hp.kl_coef > 0:
    _need(guide_head, f"clipped_surrogate with kl = \"{hp.kl}\"")
    reference_logp_BT, _ = logp(guide_head, batch, hp)
    kl_BT = KL_PENALTIES[hp.kl](logp_BT, reference_logp_BT)
    loss_BT = loss_BT + hp.kl_coef * kl_BT
    sums["kl"] = summed(kl_BT, weight_BT)
  return {"loss": summed(loss_BT, weight_BT), **sums}


def forward_kl(student_head, guide_head, batch, hp):
  """Distillation on given text: KL(guide ‖ student) at every token, over the whole vocabulary."""
  return _divergence(kl.forward_kl, student_head, guide_head, batch, hp)


def reverse_kl(student_head, guide_head, batch, hp):
  """On-policy distillation: KL(student ‖ guide) at every token, over the whole vocabulary."""
  return _divergence(kl.reverse_kl, student_head, guide_head, batch, hp)


def learnable(pass_rate_P):
  """A prompt's weight from the student's pass rate p on it: p(1 − p).

  Largest where the student is right every second time, 0 where it always or never is: the variance
  of one sample's reward. The PACED track of arXiv 2605.12483's repository weights forward KL so.
  """
  return pass_rate_P * (1 - pass_rate_P)


def agreement(student_head, guide_head, batch, hp):
  """How near two models are on the same tokens: {name: value_BT}, in nats or shares.

  What condition C2 of arXiv 2605.12483 asks for and leaves unmeasured: both divergences, the top-k
  sets (hp.top_k) and the mass on what they share, both entropies, and the lengths of the two
  objectives' gradients in the student's logits. `update.compare` runs it.
  """
  def value(f, *more):
    return blockwise.divergence(lambda s, t: f(s, t, *more), student_head, guide_head,
                                batch.weight_BT, hp.block)[1]
  return {
      "forward_kl": value(kl.forward_kl), "reverse_kl": value(kl.reverse_kl),
      "overlap": value(kl.top_k_overlap, hp.top_k), "same_first": value(kl.top_k_overlap, 1),
      "student_mass": value(kl.overlap_mass, hp.top_k),
      "teacher_mass": value(lambda s, t: kl.overlap_mass(t, s, hp.top_k)),
      "student_entropy": logp(student_head, batch, hp)[1],
      "teacher_entropy": logp(guide_head, batch, hp)[1],
      "forward_kl_gradient": value(kl.forward_kl_gradient_norm),
      "reverse_kl_gradient": value(kl.reverse_kl_gradient_norm)}


READS = {
    negative_log_likelihood: ("block",),
    clipped_surrogate: ("block", "clip_low", "clip_high", "kl", "kl_coef"),
    forward_kl: ("block",),
    reverse_kl: ("block",),
}


def check_penalty(hp):
  """Refuses an hp.kl that is not a usable penalty.

  Raises:
    ValueError: hp.kl is "k1" (its gradient is zero in expectation) or unknown, its weight or a
      clip is out of range.
  """
  for key, fits in (("kl_coef", hp.kl_coef >= 0), ("clip_low", 0 <= hp.clip_low <= 1),
                    ("clip_high", hp.clip_high >= 0)):
    if not fits:
      raise ValueError(f"{key} is {hp[key]}: choose it at least 0, and clip_low at most 1.")
  if hp.kl == "k1":
    kl.k1_as_loss(None, None)
  if hp.kl != "none" and hp.kl not in KL_PENALTIES:
    raise ValueError(f"kl = \"{hp.kl}\" is not a penalty: choose \"none\", \"k2\" or \"k3\".")


def _divergence(f, student_head, guide_head, batch, hp):
  _need(guide_head, f.__name__)
  total, value_BT = blockwise.divergence(f, student_head, guide_head, batch.weight_BT, hp.block)
  return {"loss": (total, jnp.sum(batch.weight_BT)), "kl": summed(value_BT, batch.weight_BT)}


def _need(guide_head, what):
  if guide_head is None:
    raise ValueError(f"{what} compares with a guide and has none: name one in the stage's row.")
