"""Adapters that give the losses one signature: objective(student_head, guide_head, batch, hp).

Each returns {name: (sum, count)} with "loss" among the names; `update` adds the pairs over
microbatches and divides once. The sum is over tokens, weighted by batch.weight_BT; the loss's count
is that of batch.count_BT, and that of all else the weights', so that it is a mean whatever the kind
of the loss's. Heads are pairs (features_BTD, weight_VD); guide_head is None without a guide.
`READS` names the config keys each objective reads.
"""

import functools

import jax
import jax.numpy as jnp

from s2d_jax.losses import blockwise, grpo, kl, tokens

OVERLONG = ("none", "mask", "soft")  # cut answers left out of the loss; long ones punished
REWARD_READS = ("advantages", "rounds", "overlong", "overlong_cache")  # of a row with rewards
ADVANTAGES = {"group": grpo.group_advantages, "centred": grpo.group_advantages_centred}
KL_PENALTIES = {"k2": lambda logp, reference, old: kl.k2(logp, reference),
                "k3": lambda logp, reference, old: kl.k3(logp, reference),
                "k3_corrected": kl.k3_corrected}
SURROGATES = {  # (the loss, whether its clip acts, what both read besides log-probabilities and A)
    "clipped": (grpo.clipped_surrogate, grpo.clipped,
                lambda batch, hp: (hp.clip_low, hp.clip_high)),
    "dual_clipped": (grpo.dual_clipped_surrogate, grpo.dual_clipped,
                     lambda batch, hp: (hp.clip_low, hp.clip_high, hp.clip_most)),
    "gspo": (grpo.gspo, grpo.gspo_clipped,
             lambda batch, hp: (hp.clip_low, hp.clip_high, batch.weight_BT > 0,
                                batch.segments_BT)),
    "cispo": (grpo.cispo, grpo.cispo_clipped, lambda batch, hp: (hp.clip_low, hp.clip_high))}
MISMATCHES = {
    "truncate": lambda ratio_BT, hp: grpo.truncated(ratio_BT, hp.mismatch_most),
    "mask": lambda ratio_BT, hp: grpo.masked(ratio_BT, hp.mismatch_least, hp.mismatch_most)}


def summed(x_BT, batch):
  """(Σ weight · x, Σ count); where the weight is 0, x is left out, whatever it is."""
  weight_BT = batch.weight_BT
  return jnp.sum(x_BT * weight_BT, where=weight_BT > 0), jnp.sum(batch.count_BT)


def metric(x_BT, batch):
  """(Σ weight · x, Σ weight): the pair of something logged, a mean under the weights."""
  return summed(x_BT, batch)[0], jnp.sum(batch.weight_BT)


def logp(head, batch, hp):
  """The model's own log-probability of each target and its entropy: what `update.score` runs."""
  return blockwise.logp(head, batch.targets_BT, hp.block)


def negative_log_likelihood(student_head, guide_head, batch, hp):
  """Supervised fine-tuning: −log π of each target, in nats."""
  del guide_head
  def f(logits_BTV, _, targets_BT):
    return (tokens.negative_log_likelihood(logits_BTV, targets_BT),
            {"entropy": tokens.entropy(logits_BTV)})
  return _direct(f, student_head, None, batch, hp, batch.targets_BT)


def clipped_surrogate(student_head, guide_head, batch, hp):
  """GRPO: a surrogate on batch.advantage_BT, plus hp.kl_coef times a KL to the guide.

    L = w · surrogate(π, π_old, A) + kl_coef · KL(π, π_ref).

  The surrogate is hp.surrogate, a name in SURROGATES, and the KL hp.kl: an estimate from the
  sampled token in KL_PENALTIES, "exact" over the vocabulary, or "none"; without one a guide is not
  looked at. w corrects for a sampler that is not the trainer (hp.mismatch, a name in MISMATCHES)
  and is 1 with "none"; the ratio it is made of is logged as it is.

  Raises:
    ValueError: hp.kl is "k1", a name is unknown, or a KL is asked for and there is no guide.
  """
  check_penalty(hp)
  weight_BT = batch.weight_BT
  logp_BT, entropy_BT = logp(student_head, batch, hp)
  # A token without weight may hold anything, and 0 · anything can be NaN: give it ratio 1, A = 0.
  old_logp_BT = jnp.where(weight_BT > 0, batch.old_logp_BT, jax.lax.stop_gradient(logp_BT))
  advantage_BT = jnp.where(weight_BT > 0, batch.advantage_BT, 0.0)
  loss, clipped, besides = SURROGATES[hp.surrogate]
  args = logp_BT, old_logp_BT, advantage_BT, *besides(batch, hp)
  loss_BT, clipped_BT = loss(*args), clipped(*args)
  sums = {"entropy": metric(entropy_BT, batch),
          "ratio_mean": metric(jnp.exp(logp_BT - old_logp_BT), batch),
          "clip_fraction": metric(clipped_BT.astype(jnp.float32), batch)}
  if hp.mismatch != "none":
    ratio_BT = grpo.mismatch_ratio(old_logp_BT, batch.drawn_logp_BT, weight_BT > 0,
                                   batch.segments_BT, hp.mismatch_level)
    kept_BT = MISMATCHES[hp.mismatch](ratio_BT, hp)
    loss_BT = loss_BT * kept_BT
    sums |= {"mismatch_ratio": metric(ratio_BT, batch), "mismatch_weight": metric(kept_BT, batch)}
  more = 0.0
  if hp.kl != "none" and hp.kl_coef > 0:
    _need(guide_head, f"clipped_surrogate with kl = \"{hp.kl}\"")
    if hp.kl == "exact":
      total, kl_BT = blockwise.divergence(
          kl.reverse_kl, student_head, guide_head, weight_BT, hp.block)
      more = hp.kl_coef * total
    else:
      own_head, reference_head = blockwise.common(student_head, guide_head)
      reference_logp_BT, _ = logp(reference_head, batch, hp)
      # A second pass only where the student has padding of its own, which the surrogate counts.
      alike = own_head.weight_VD.shape == student_head[1].shape
      own_logp_BT = logp_BT if alike else logp(own_head, batch, hp)[0]
      kl_BT = KL_PENALTIES[hp.kl](own_logp_BT, reference_logp_BT, old_logp_BT)
      loss_BT = loss_BT + hp.kl_coef * kl_BT
    sums["kl"] = metric(kl_BT, batch)
  total, count = summed(loss_BT, batch)
  return {"loss": (total + more, count), **sums}


def forward_kl(student_head, guide_head, batch, hp):
  """Distillation on given text: KL(guide ‖ student) at every token, in a form of FORWARD_FORMS."""
  check_form(forward_kl, hp)
  return _distil(FORWARD_FORMS[hp.form], student_head, guide_head, batch, hp)


def reverse_kl(student_head, guide_head, batch, hp):
  """On-policy distillation: KL(student ‖ guide) at every token, in a form of REVERSE_FORMS."""
  check_form(reverse_kl, hp)
  if hp.form == "sampled":
    return _sampled(student_head, guide_head, batch, hp)
  return _distil(REVERSE_FORMS[hp.form], student_head, guide_head, batch, hp)


def jsd(student_head, guide_head, batch, hp):
  """Between the two: the generalised Jensen–Shannon divergence, hp.pi the guide's share of it."""
  check_form(jsd, hp)
  _need(guide_head, "jsd")
  def f(student_BTV, guide_BTV):
    return kl.jsd(student_BTV, guide_BTV, hp.pi, hp.student_temperature,
                  hp.teacher_temperature), {}
  return _direct(f, student_head, guide_head, batch, hp)


def _distil(form, student_head, guide_head, batch, hp):
  _need(guide_head, "a divergence")
  return _direct(lambda s, g: form(s, g, hp), student_head, guide_head, batch, hp)


def _direct(f, student_head, guide_head, batch, hp, *more_BT):
  """The sums of an f(student_logits, guide_logits, *more) -> (loss_BT, {name: value_BT})."""
  total, (value_BT, found) = blockwise.divergence(
      f, student_head, guide_head, batch.weight_BT, hp.block, *more_BT)
  sums = {name: metric(x_BT, batch) for name, x_BT in found.items()}
  if guide_head is not None:
    sums["kl"] = metric(value_BT, batch)
  return {"loss": (total, summed(value_BT, batch)[1]), **sums}


def _sampled(student_head, guide_head, batch, hp):
  """Reverse KL from the sampled token, with the exact KL as its baseline where hp.baseline."""
  _need(guide_head, "the sampled form")
  student_head, guide_head = blockwise.common(student_head, guide_head)
  student_logp_BT, _ = logp(student_head, batch, hp)
  guide_logp_BT, _ = logp(guide_head, batch, hp)
  baseline_BT = 0.0
  if hp.baseline:
    _, baseline_BT = blockwise.divergence(
        kl.reverse_kl, jax.lax.stop_gradient(student_head), guide_head, batch.weight_BT, hp.block)
  loss_BT = kl.sampled_reverse_kl(student_logp_BT, jax.lax.stop_gradient(guide_logp_BT),
                                  baseline_BT)
  return {"loss": summed(loss_BT, batch), "kl": metric(jax.lax.stop_gradient(loss_BT), batch)}


FORWARD_FORMS = {
    "full": lambda s, g, hp: (
        kl.forward_kl(s, g, hp.student_temperature, hp.teacher_temperature), {}),
    "top_k": lambda s, g, hp: kl.top_k_forward_kl(s, g, hp.top_k, hp.support)}
REVERSE_FORMS = {
    "full": lambda s, g, hp: (
        kl.reverse_kl(s, g, hp.student_temperature, hp.teacher_temperature), {}),
    "top_k": lambda s, g, hp: kl.top_k_reverse_kl(s, g, hp.top_k, hp.support),
    "intersection": lambda s, g, hp: kl.intersection_reverse_kl(s, g, hp.top_k)}


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
  def f(s, t):
    return kl.reverse_kl(s, t), {
        "forward_kl": kl.forward_kl(s, t), "reverse_kl": kl.reverse_kl(s, t),
        "overlap": kl.top_k_overlap(s, t, hp.top_k), "same_first": kl.top_k_overlap(s, t, 1),
        "student_mass": kl.overlap_mass(s, t, hp.top_k),
        "teacher_mass": kl.overlap_mass(t, s, hp.top_k),
        "student_entropy": tokens.entropy(s), "teacher_entropy": tokens.entropy(t),
        "forward_kl_gradient": kl.forward_kl_gradient_norm(s, t),
        "reverse_kl_gradient": kl.reverse_kl_gradient_norm(s, t)}
  _, (_, found) = blockwise.divergence(f, student_head, guide_head, batch.weight_BT, hp.block)
  return found


TEMPERATURES = ("student_temperature", "teacher_temperature")
TOPS = ("top_k", "intersection")  # the forms that read top_k
_DISTIL = ("block", "form", "top_k", "support", *TEMPERATURES)
READS = {
    negative_log_likelihood: ("block",),
    clipped_surrogate: ("block", "surrogate", "clip_low", "clip_high", "clip_most", "kl",
                        "kl_coef", "mismatch", "mismatch_level", "mismatch_least",
                        "mismatch_most"),
    forward_kl: _DISTIL,
    reverse_kl: (*_DISTIL, "baseline"),
    jsd: ("block", "pi", *TEMPERATURES),
}


def check_penalty(hp):
  """Refuses what `clipped_surrogate` cannot do.

  Raises:
    ValueError: hp.kl is "k1" (its gradient is zero in expectation), a name is unknown, or a number
      is out of range.
  """
  for key, fits in (("kl_coef", hp.kl_coef >= 0), ("clip_low", 0 <= hp.clip_low <= 1),
                    ("clip_high", hp.clip_high >= 0)):
    if not fits:
      raise ValueError(f"{key} is {getattr(hp, key)}: choose it at least 0, and clip_low at most "
                       "1.")
  if hp.kl == "k1":
    kl.k1_as_loss(None, None)
  if hp.clip_most <= 1 or not 0 < hp.mismatch_least < hp.mismatch_most:
    raise ValueError(f"clip_most is {hp.clip_most}, mismatch_least {hp.mismatch_least} and "
                     f"mismatch_most {hp.mismatch_most}: choose the first above 1 and the others "
                     "above 0 and in that order.")
  for key, choices in (("kl", ("none", *KL_PENALTIES, "exact")), ("surrogate", SURROGATES),
                       ("mismatch", ("none", *MISMATCHES)),
                       ("mismatch_level", ("token", "sequence"))):
    if getattr(hp, key) not in choices:
      raise ValueError(f"{key} is {getattr(hp, key)!r}: choose it from {', '.join(choices)}.")


def check_rewards(place, hp):
  """Refuses rounds and treatments of long answers that there are none of.

  Raises:
    ValueError: what is wrong, with what there is.
  """
  if hp.rounds < 0:
    raise ValueError(f"{place}.rounds is {hp.rounds}: choose 0, which keeps every group, or more.")
  if hp.overlong not in OVERLONG:
    raise ValueError(f"{place}.overlong is {hp.overlong!r}: choose it from {', '.join(OVERLONG)}.")
  if not 0 < hp.overlong_cache <= hp.sampling.max_tokens:
    raise ValueError(f"{place}.overlong_cache is {hp.overlong_cache}: choose it above 0 and at "
                     f"most sampling.max_tokens, {hp.sampling.max_tokens}.")


def punishment(hp):
  """What is added to the reward of a long answer, as a function of lengths, or None."""
  if hp.overlong != "soft":
    return None
  return functools.partial(grpo.overlong_punishment, longest=hp.sampling.max_tokens,
                           cache=hp.overlong_cache)


def check_form(objective, hp):
  """Refuses a divergence that there is none of, and settings that are out of range or not read.

  Args:
    objective: forward_kl, reverse_kl or jsd.

  Raises:
    ValueError: what is wrong, with what there is.
  """
  for key in TEMPERATURES:
    if getattr(hp, key) <= 0:
      raise ValueError(f"{key} is {getattr(hp, key)}: choose it above 0.")
  if objective is jsd:
    kl.check_share(hp.pi)
    return
  if hp.form == "k1":
    raise ValueError(f"{kl.K1}: choose form = \"full\" or \"sampled\".")
  forms = {forward_kl: (*FORWARD_FORMS,), reverse_kl: (*REVERSE_FORMS, "sampled")}[objective]
  for key, choices in (("form", forms), ("support", kl.SUPPORTS)):
    if getattr(hp, key) not in choices:
      raise ValueError(f"{key} is {getattr(hp, key)!r}: choose it from {', '.join(choices)}.")
  if type(hp.top_k) is not int or hp.top_k < 1:
    raise ValueError(f"top_k is {hp.top_k}: give a whole number of tokens, at least 1.")
  for key in TEMPERATURES:
    if hp.form != "full" and getattr(hp, key) != 1:
      raise ValueError(f"{key} is {getattr(hp, key)} and the form \"{hp.form}\" takes logits as "
                       "they are: set it to 1, or form to \"full\".")
  if hp.form == "intersection" and hp.support != "intersection":
    raise ValueError(f"support is {hp.support!r} and the form \"intersection\" takes what both "
                     "have in their top: set it to \"intersection\", or form to \"top_k\".")
  if objective is reverse_kl and hp.baseline not in (True, False):
    raise ValueError(f"baseline is {hp.baseline!r}: choose True or False.")


def _need(guide_head, what):
  if guide_head is None:
    raise ValueError(f"{what} compares with a guide and has none: name one in the stage's row.")
