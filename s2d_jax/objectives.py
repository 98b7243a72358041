"""Adapters that give the losses one signature: objective(student_head, guide_head, batch, hp).

Each returns {name: (sum, count)} with "loss" among the names; `update` adds the pairs over
microbatches and divides once. The sum is over tokens, weighted by batch.weight_BT; the loss's count
is that of batch.count_BT, and that of all else the weights', so that it is a mean whatever the kind
of the loss's. A name alone in its tuple is a largest value. Heads are pairs (features_BTD,
weight_VD); guide_head is None without a guide. `READS` names the config keys each objective reads.

A batch whose old_logp_BT is None was not scored before (`loop.scored`): of the learner's own
samples, learned from once, the update's log-probabilities are the old ones too, and the sampler's
are held against them (`gap_sums`); of given solutions there are none of either.
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
  """The model's own log-probability of each response token and its entropy, elsewhere 0: what
  `training.score` runs."""
  return blockwise.logp(head, batch.targets_BT, hp.block, batch.sequence_BT >= 0)


def _logp(head, batch, hp):
  """The same where the batch has weight."""
  return blockwise.logp(head, batch.targets_BT, hp.block, batch.weight_BT > 0)


def unscored(batch):
  """Whether an update is the first to see the log-probabilities of what a sampler drew."""
  return batch.old_logp_BT is None and batch.sampler_logp_BT is not None


def gap_sums(logp_BT, batch):
  """How far the sampler's log-probabilities are from the update's own, in nats, if `unscored`."""
  if not unscored(batch):
    return {}
  counts_BT = batch.weight_BT > 0
  gap_BT = jnp.where(counts_BT, jnp.abs(logp_BT - batch.sampler_logp_BT), 0.0)
  count = jnp.sum(counts_BT)
  return {"logp_gap_mean": (jnp.sum(gap_BT), count),
          "logp_gap_square": (jnp.sum(gap_BT**2), count), "logp_gap_max": (jnp.max(gap_BT),)}


def negative_log_likelihood(student_head, guide_head, batch, hp):
  """Supervised fine-tuning: −log π of each target, in nats."""
  del guide_head
  def f(logits_BTV, _, targets_BT):
    loss_BT = tokens.negative_log_likelihood(logits_BTV, targets_BT)
    return loss_BT, {"entropy": tokens.entropy(logits_BTV), "logp": -loss_BT}
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
  own_head, reference_BT = student_head, None
  penalised = hp.kl != "none" and hp.kl_coef > 0
  if penalised:
    _need(guide_head, f"clipped_surrogate with kl = \"{hp.kl}\"")
    if hp.kl != "exact":
      own_head, reference_head = blockwise.common(student_head, guide_head)
      reference_BT = _logp(jax.lax.stop_gradient(reference_head), batch, hp)[0]
  # Padding of the student's own counts in the surrogate and not in the KL.
  alike = own_head[1].shape == student_head[1].shape
  if alike and not _reads_sequences(hp):
    def f(logits_btV, _, batch_bt, reference_bt):
      logp_bt = tokens.log_prob(logits_btV, batch_bt.targets_BT)
      loss_bt, found = _policy_gradient(logp_bt, logp_bt, reference_bt, batch_bt, hp)
      return loss_bt, found | {"logp": logp_bt, "entropy": tokens.entropy(logits_btV)}
    total, (_, found) = blockwise.divergence(
        f, student_head, None, batch.weight_BT, hp.block, batch, reference_BT)
  else:
    logp_BT, entropy_BT = _logp(student_head, batch, hp)
    own_logp_BT = logp_BT if alike else _logp(own_head, batch, hp)[0]
    loss_BT, found = _policy_gradient(logp_BT, own_logp_BT, reference_BT, batch, hp)
    total, found = summed(loss_BT, batch)[0], found | {"logp": logp_BT, "entropy": entropy_BT}
  sums = gap_sums(found.pop("logp"), batch)
  if penalised and hp.kl == "exact":
    more, found["kl"] = blockwise.divergence(
        kl.reverse_kl, student_head, guide_head, batch.weight_BT, hp.block)
    total = total + hp.kl_coef * more
  return {"loss": (total, jnp.sum(batch.count_BT)), **sums,
          **{name: metric(x_BT, batch) for name, x_BT in found.items()}}


def _reads_sequences(hp):
  """Whether a token's loss reads other tokens of its response.

  If not, its gradient is formed in the same pass over the vocabulary.
  """
  return hp.surrogate == "gspo" or (
      hp.mismatch != "none" and hp.mismatch_level == "sequence")


def _policy_gradient(logp_BT, own_logp_BT, reference_BT, batch, hp):
  """(loss_BT, {name: value_BT}) of `clipped_surrogate` but for the exact KL, of any tokens.

  own_logp_BT is log π where only the vocabulary of the reference counts.
  """
  counts_BT, old_BT = batch.weight_BT > 0, jax.lax.stop_gradient(logp_BT)
  if batch.old_logp_BT is not None:
    # A token without weight may hold anything, and 0 · anything can be NaN: give it ratio 1, A = 0.
    old_BT = jnp.where(counts_BT, batch.old_logp_BT, old_BT)
  advantage_BT = jnp.where(counts_BT, batch.advantage_BT, 0.0)
  loss, clipped, besides = SURROGATES[hp.surrogate]
  args = logp_BT, old_BT, advantage_BT, *besides(batch, hp)
  loss_BT = loss(*args)
  found = {"ratio_mean": jnp.exp(logp_BT - old_BT),
           "clip_fraction": clipped(*args).astype(jnp.float32)}
  if hp.mismatch != "none":
    ratio_BT = grpo.mismatch_ratio(old_BT, batch.behaviour_logp_BT, counts_BT, batch.segments_BT,
                                   hp.mismatch_level)
    kept_BT = MISMATCHES[hp.mismatch](ratio_BT, hp)
    loss_BT = loss_BT * kept_BT
    found |= {"mismatch_ratio": ratio_BT, "mismatch_weight": kept_BT}
  if reference_BT is not None:
    found["kl"] = KL_PENALTIES[hp.kl](own_logp_BT, reference_BT, old_BT)
    loss_BT = loss_BT + hp.kl_coef * found["kl"]
  return loss_BT, found


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
  def form(student_BTV, guide_BTV, hp):
    return kl.jsd(student_BTV, guide_BTV, hp.pi, hp.student_temperature,
                  hp.teacher_temperature), {}
  return _distil(form, student_head, guide_head, batch, hp)


def _distil(form, student_head, guide_head, batch, hp):
  _need(guide_head, "a divergence")
  if not unscored(batch):
    return _direct(lambda s, g: form(s, g, hp), student_head, guide_head, batch, hp)
  def f(student_BTV, guide_BTV, targets_BT):
    loss_BT, found = form(student_BTV, guide_BTV, hp)
    return loss_BT, found | {"logp": tokens.log_prob(student_BTV, targets_BT)}
  return _direct(f, student_head, guide_head, batch, hp, batch.targets_BT)


def _direct(f, student_head, guide_head, batch, hp, *more_BT):
  """The sums of an f(student_logits, guide_logits, *more) -> (loss_BT, {name: value_BT}).

  Log-probabilities under the name "logp" are held against the sampler's.
  """
  total, (value_BT, found) = blockwise.divergence(
      f, student_head, guide_head, batch.weight_BT, hp.block, *more_BT)
  sums = gap_sums(found.pop("logp"), batch) if "logp" in found else {}
  sums |= {name: metric(x_BT, batch) for name, x_BT in found.items()}
  if guide_head is not None:
    sums["kl"] = metric(value_BT, batch)
  return {"loss": (total, summed(value_BT, batch)[1]), **sums}


def _sampled(student_head, guide_head, batch, hp):
  """Reverse KL from the sampled token, with the exact KL as its baseline where hp.baseline."""
  _need(guide_head, "the sampled form")
  student_head, guide_head = blockwise.common(student_head, guide_head)
  student_logp_BT, _ = _logp(student_head, batch, hp)
  guide_logp_BT, _ = _logp(guide_head, batch, hp)
  baseline_BT = 0.0
  if hp.baseline:
    _, baseline_BT = blockwise.divergence(
        kl.reverse_kl, jax.lax.stop_gradient(student_head), guide_head, batch.weight_BT, hp.block)
  loss_BT = kl.sampled_reverse_kl(student_logp_BT, jax.lax.stop_gradient(guide_logp_BT),
                                  baseline_BT)
  return {"loss": summed(loss_BT, batch), "kl": metric(jax.lax.stop_gradient(loss_BT), batch),
          **gap_sums(jax.lax.stop_gradient(student_logp_BT), batch)}


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
  objectives' gradients in the student's logits. `training.compare` runs it.
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
