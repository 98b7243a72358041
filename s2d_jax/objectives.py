"""Objectives: what a stage minimises, as records of a loss, its config keys and its use of a guide.

A loss has the signature loss(student_head, guide_head, batch, hp) and returns {name: (sum, count)}
with "loss" among the names. `training` adds the pairs over microbatches and divides once.

* The sum runs over tokens, weighted by batch.weight_BT.
* The count of "loss" is the sum of batch.count_BT; every other count is the sum of the weights.
* A tuple of one value, (maximum,), is reduced by the largest instead.

A head is a pair (features_BTD, weight_VD). A stage without a guide passes None as guide_head.

A batch without old_logp_BT was not scored before the update. Where the learner sampled it, the
update's own log-probabilities are then the old ones, and `sampler_gap` compares the sampler's
log-probabilities with them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from s2d_jax import keys
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.losses import blockwise, grpo, kl, tokens
from s2d_jax.losses.blockwise import Head
from s2d_jax.rollouts import Batch

Sums = dict[str, tuple[jax.Array, ...]]  # {name: (sum, count)} or {name: (maximum,)}
_Values = dict[str, jax.Array]           # {name: value_BT}


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
  """A loss, the keys of the stage's config that it reads, and whether it reads a guide.

  A user's own record is checked, hashed and run like those of this module. Raise `version` when
  the loss changes its meaning: a stage's name then changes, and finished stages train anew.
  """
  loss: Callable[[Head, Head | None, Batch, ConfigDict], Sums]
  keys: Mapping[str, Key]
  uses_guide: Callable[[ConfigDict], bool] = lambda hp: True
  check: Callable[[ConfigDict], None] = lambda hp: None  # refuses values that do not combine
  version: int = 1

  def __call__(self, student_head: Head, guide_head: Head | None, batch: Batch,
               hp: ConfigDict) -> Sums:
    """The loss, its config checked.

    Raises:
      InputError: a value or a combination is not allowed, or a guide is needed and absent.
    """
    keys.check_values(hp, self.keys)
    self.check(hp)
    # Only a KL penalty of positive weight needs a guide, so this depends on the config.
    if guide_head is None and self.uses_guide(hp):
      raise InputError(f"{self.loss.__name__} compares with a guide and has none: name one in the "
                       "stage's row.")
    return self.loss(student_head, guide_head, batch, hp)


def weighted_loss_sum(loss_BT: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """(Σ weight · loss, Σ count); a token of weight 0 is left out, even if its loss is NaN."""
  weight_BT = batch.weight_BT
  return jnp.sum(loss_BT * weight_BT, where=weight_BT > 0), jnp.sum(batch.count_BT)


def weighted_mean_pair(value_BT: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """(Σ weight · value, Σ weight): the pair of a logged value, whose mean is under the weights."""
  return weighted_loss_sum(value_BT, batch)[0], jnp.sum(batch.weight_BT)


def logp(head: Head, batch: Batch, hp: ConfigDict) -> tuple[jax.Array, jax.Array]:
  """(logp_BT, entropy_BT) of a model on the response tokens, in nats; 0 at all other tokens."""
  return blockwise.logp(head, batch.targets_BT, hp.block, batch.sequence_BT >= 0)


def _trained_logp(head: Head, batch: Batch, hp: ConfigDict) -> tuple[jax.Array, jax.Array]:
  """(logp_BT, entropy_BT), only where weight_BT > 0: what an update trains on."""
  return blockwise.logp(head, batch.targets_BT, hp.block, batch.weight_BT > 0)


def _unscored(batch: Batch) -> bool:
  """Whether an update is the first pass to compute log-probabilities of a sampler's rollout."""
  return batch.old_logp_BT is None and batch.sampler_logp_BT is not None


def sampler_gap(logp_BT: jax.Array, batch: Batch) -> Sums:
  """Sums of |update's log-probability − sampler's| in nats; {} unless the batch is `_unscored`."""
  if not _unscored(batch):
    return {}
  trained_BT = batch.weight_BT > 0
  gap_BT = jnp.where(trained_BT, jnp.abs(logp_BT - batch.sampler_logp_BT), 0.0)
  count = jnp.sum(trained_BT)
  return {"logp_gap_mean": (jnp.sum(gap_BT), count),
          "logp_gap_square": (jnp.sum(gap_BT**2), count),
          "logp_gap_max": (jnp.max(gap_BT),)}


def sums_from_logits(
    f: Callable[..., tuple[jax.Array, _Values]], student_head: Head, guide_head: Head | None,
    batch: Batch, hp: ConfigDict, *more_BT: jax.Array) -> Sums:
  """The sums of a per-token loss, computed block by block from logits.

  Args:
    f: f(student_logits, guide_logits, *more) -> (loss_BT, {name: value_BT}). A value named "logp"
      is not logged; the sampler's log-probabilities are compared with it.
    more_BT: further arrays of one value a token, handed to f.
  """
  total, (loss_BT, values) = blockwise.divergence(
      f, student_head, guide_head, batch.weight_BT, hp.block, *more_BT)
  gaps = sampler_gap(values.pop("logp"), batch) if "logp" in values else {}
  sums = gaps | {name: weighted_mean_pair(x_BT, batch) for name, x_BT in values.items()}
  if guide_head is not None:
    sums["kl"] = weighted_mean_pair(loss_BT, batch)
  return {"loss": (total, jnp.sum(batch.count_BT)), **sums}


# Not hashed: the size of a block changes the memory and, by rounding alone, the result.
BLOCK_KEYS = {"block": keys.at_least(1, default=4096, hashed=False)}


def negative_log_likelihood(student_head: Head, guide_head: Head | None, batch: Batch,
                            hp: ConfigDict) -> Sums:
  """Supervised fine-tuning: −log π of each target, in nats."""
  del guide_head

  def f(logits_BTV, _, targets_BT):
    loss_BT = tokens.negative_log_likelihood(logits_BTV, targets_BT)
    return loss_BT, {"entropy": tokens.entropy(logits_BTV), "logp": -loss_BT}

  return sums_from_logits(f, student_head, None, batch, hp, batch.targets_BT)


NEGATIVE_LOG_LIKELIHOOD = Objective(
    negative_log_likelihood, BLOCK_KEYS, uses_guide=lambda hp: False)


ADVANTAGES = {"group": grpo.group_advantages, "centred": grpo.group_advantages_centred}
KL_PENALTIES = {"k2": lambda logp, reference, old: kl.k2(logp, reference),
                "k3": lambda logp, reference, old: kl.k3(logp, reference),
                "k3_corrected": kl.k3_corrected}
_MISMATCHES = {
    "truncate": lambda ratio_BT, hp: grpo.truncated(ratio_BT, hp.mismatch_most),
    "mask": lambda ratio_BT, hp: grpo.masked(ratio_BT, hp.mismatch_least, hp.mismatch_most)}
# "k1" is absent: its gradient is 0 in expectation.
_PENALTY_NAMES = ("none", *KL_PENALTIES, "exact")
_GRPO_KEYS = BLOCK_KEYS | {
    "surrogate": keys.one_of(grpo.SURROGATES, default="clipped"),
    "clip_low": Key(lambda low: 0 <= low <= 1, "choose it from 0 to 1", default=0.2),
    "clip_high": Key(lambda high: high >= 0, "choose 0 or more", default=0.2),
    "clip_most": Key(lambda most: most > 1, "choose it above 1", default=3.0),
    "kl": Key(lambda name: name in _PENALTY_NAMES,
              f"choose it from {', '.join(_PENALTY_NAMES)}; {kl.K1}", neutral="none"),
    "kl_coef": Key(lambda coefficient: coefficient >= 0, "choose 0 or more", neutral=0.0),
    "mismatch": keys.one_of(("none", *_MISMATCHES), neutral="none"),
    "mismatch_level": keys.one_of(("token", "sequence"), default="token"),
    "mismatch_least": Key(lambda ratio: ratio > 0, "choose it above 0", default=0.5),
    "mismatch_most": Key(lambda ratio: ratio > 0, "choose it above 0", default=2.0)}


def grpo_loss(student_head: Head, guide_head: Head | None, batch: Batch, hp: ConfigDict) -> Sums:
  """GRPO: a surrogate on batch.advantage_BT, plus hp.kl_coef times a KL to the guide.

    L = w · surrogate(π, π_old, A) + kl_coef · KL(π, π_ref).

  The surrogate is hp.surrogate, a name in grpo.SURROGATES. The KL is hp.kl: an estimate from the
  sampled token in KL_PENALTIES, "exact" over the vocabulary, or "none". w corrects for a sampler
  that differs from the trainer (hp.mismatch, a name in _MISMATCHES) and is 1 with "none"; its
  ratio is logged unchanged. arXiv 2402.03300.
  """
  own_head = student_head
  reference_BT = None
  penalised = _uses_penalty(hp)
  if penalised and hp.kl != "exact":
    own_head, reference_head = blockwise.common(student_head, guide_head)
    reference_BT = _trained_logp(jax.lax.stop_gradient(reference_head), batch, hp)[0]
  # The surrogate is over the student's whole vocabulary, its padding included; the KL is over the
  # tokens that both models have. One pass serves both where the two vocabularies are equal.
  same_vocabulary = own_head[1].shape == student_head[1].shape
  if same_vocabulary and not _couples_tokens(hp):
    def f(logits_btV, _, batch_bt, reference_bt):
      logp_bt = tokens.log_prob(logits_btV, batch_bt.targets_BT)
      loss_bt, values = _surrogate_loss(logp_bt, logp_bt, reference_bt, batch_bt, hp)
      return loss_bt, values | {"logp": logp_bt, "entropy": tokens.entropy(logits_btV)}
    total, (_, values) = blockwise.divergence(
        f, student_head, None, batch.weight_BT, hp.block, batch, reference_BT)
  else:
    logp_BT, entropy_BT = _trained_logp(student_head, batch, hp)
    own_logp_BT = logp_BT if same_vocabulary else _trained_logp(own_head, batch, hp)[0]
    loss_BT, values = _surrogate_loss(logp_BT, own_logp_BT, reference_BT, batch, hp)
    total = weighted_loss_sum(loss_BT, batch)[0]
    values = values | {"logp": logp_BT, "entropy": entropy_BT}
  gaps = sampler_gap(values.pop("logp"), batch)
  if penalised and hp.kl == "exact":
    # The coefficient multiplies the sum in float32, not gradients in the features' type.
    penalty, values["kl"] = blockwise.divergence(
        kl.reverse_kl, student_head, guide_head, batch.weight_BT, hp.block)
    total = total + hp.kl_coef * penalty
  return {"loss": (total, jnp.sum(batch.count_BT)), **gaps,
          **{name: weighted_mean_pair(x_BT, batch) for name, x_BT in values.items()}}


def _uses_penalty(hp: ConfigDict) -> bool:
  return hp.kl != "none" and hp.kl_coef > 0


def _check_mismatch(hp: ConfigDict) -> None:
  if hp.mismatch_least >= hp.mismatch_most:
    raise InputError(f"mismatch_least is {hp.mismatch_least}: choose it below mismatch_most, "
                     f"{hp.mismatch_most}.")


GRPO = Objective(grpo_loss, _GRPO_KEYS, uses_guide=_uses_penalty, check=_check_mismatch)


def _couples_tokens(hp: ConfigDict) -> bool:
  """Whether a token's loss depends on other tokens of its response.

  If not, its gradient is formed in the same pass over the vocabulary.
  """
  return hp.surrogate == "gspo" or (
      hp.mismatch != "none" and hp.mismatch_level == "sequence")


def _surrogate_loss(logp_BT: jax.Array, own_logp_BT: jax.Array, reference_BT: jax.Array | None,
                    batch: Batch, hp: ConfigDict) -> tuple[jax.Array, _Values]:
  """(loss_BT, {name: value_BT}) of `grpo_loss` without the exact KL, for any set of tokens.

  own_logp_BT is log π over the vocabulary that the student shares with the reference.
  """
  trained_BT = batch.weight_BT > 0
  old_BT = jax.lax.stop_gradient(logp_BT)
  if batch.old_logp_BT is not None:
    # A token without weight may hold anything, and 0 · anything can be NaN: give it ratio 1, A = 0.
    old_BT = jnp.where(trained_BT, batch.old_logp_BT, old_BT)
  advantage_BT = jnp.where(trained_BT, batch.advantage_BT, 0.0)
  clip = grpo.Clip(hp.clip_low, hp.clip_high, hp.clip_most)
  loss_BT, clipped_BT = grpo.SURROGATES[hp.surrogate](
      logp_BT, old_BT, advantage_BT, clip, trained_BT, batch.segments_BT)
  values = {"ratio_mean": jnp.exp(logp_BT - old_BT),
            "clip_fraction": clipped_BT.astype(jnp.float32)}
  if hp.mismatch != "none":
    ratio_BT = grpo.mismatch_ratio(
        old_BT, batch.behaviour_logp_BT, trained_BT, batch.segments_BT, hp.mismatch_level)
    correction_BT = _MISMATCHES[hp.mismatch](ratio_BT, hp)
    loss_BT = loss_BT * correction_BT
    values |= {"mismatch_ratio": ratio_BT, "mismatch_weight": correction_BT}
  if reference_BT is not None:
    values["kl"] = KL_PENALTIES[hp.kl](own_logp_BT, reference_BT, old_BT)
    loss_BT = loss_BT + hp.kl_coef * values["kl"]
  return loss_BT, values


# Keys of a stage with rewards, whatever its objective.
REWARD_KEYS = {
    "advantages": keys.one_of(ADVANTAGES, default="group"),
    "rounds": keys.at_least(0, neutral=0),
    "overlong": keys.one_of(("none", "mask", "soft"), neutral="none"),
    "overlong_cache": keys.at_least(1, default=1)}


def length_penalty(hp: ConfigDict) -> Callable[[np.ndarray], np.ndarray] | None:
  """The function length_B -> addition_B to the rewards of long responses, or None without one."""
  if hp.overlong != "soft":
    return None
  return functools.partial(grpo.overlong_penalty, longest=hp.sampling.max_tokens,
                           cache=hp.overlong_cache)


# Keys of a stage whose prompts are weighted by the learner's pass rate on them.
PROMPT_WEIGHT_KEYS = {"pass_samples": keys.at_least(1)}


def learnable(pass_rate_P: np.ndarray) -> np.ndarray:
  """A prompt's weight p(1 − p) from the student's pass rate p on it.

  It is the variance of one sample's reward: largest where half of the samples are right, 0 where
  all or none are. The PACED track of arXiv 2605.12483's repository weights forward KL so.
  """
  return pass_rate_P * (1 - pass_rate_P)


# A form returns (value_BT, {name: value_BT}) from two logits and the stage's config. Functions of
# the top k take logits as they are, so only the full form reads the temperatures.
_FORWARD_FORMS = {
    "full": lambda s, g, hp: (
        kl.forward_kl(s, g, hp.student_temperature, hp.teacher_temperature), {}),
    "top_k": lambda s, g, hp: kl.top_k_forward_kl(s, g, hp.top_k, hp.support)}
_REVERSE_FORMS = {
    "full": lambda s, g, hp: (
        kl.reverse_kl(s, g, hp.student_temperature, hp.teacher_temperature), {}),
    "top_k": lambda s, g, hp: kl.top_k_reverse_kl(s, g, hp.top_k, hp.support),
    "intersection": lambda s, g, hp: kl.intersection_reverse_kl(s, g, hp.top_k),
    "generalised": lambda s, g, hp: kl.generalised_reverse_kl(s, g, hp.top_k, hp.support)}
# The doctor compares top_k with the vocabulary where the form is one of these.
TOP_K_FORMS = ("top_k", "intersection", "generalised")
_TEMPERATURE_KEYS = dict.fromkeys(
    ("student_temperature", "teacher_temperature"),
    Key(lambda temperature: temperature > 0, "choose it above 0", neutral=1.0))


def _distillation_keys(forms: tuple[str, ...], refused: str = kl.K1) -> dict[str, Key]:
  """The keys of a divergence that has the given forms; `refused` says why others are absent."""
  form = Key(lambda name: name in forms, f"choose it from {', '.join(forms)}; {refused}",
             default="full")
  return BLOCK_KEYS | _TEMPERATURE_KEYS | {
      "form": form, "top_k": keys.at_least(1, default=64),
      "support": keys.one_of(kl.SUPPORTS, default="teacher")}


def _check_form(hp: ConfigDict) -> None:
  """Refuses a key that the form does not read, unless it has the value that the form implies."""
  for name in _TEMPERATURE_KEYS:
    if hp.form != "full" and getattr(hp, name) != 1:
      raise InputError(f"{name} is {getattr(hp, name)} and the form \"{hp.form}\" takes logits as "
                       "they are: set it to 1, or form to \"full\".")
  if hp.form == "intersection" and hp.support != "intersection":
    raise InputError(f"support is {hp.support!r} and the form \"intersection\" takes what both "
                     "have in their top: set it to \"intersection\", or form to \"top_k\".")


def forward_kl(student_head: Head, guide_head: Head, batch: Batch, hp: ConfigDict) -> Sums:
  """Distillation on given text: KL(guide ‖ student) at every token, in a form of _FORWARD_FORMS."""
  return _distillation(_FORWARD_FORMS[hp.form], student_head, guide_head, batch, hp)


def reverse_kl(student_head: Head, guide_head: Head, batch: Batch, hp: ConfigDict) -> Sums:
  """On-policy distillation: KL(student ‖ guide) at every token.

  hp.form is a form of _REVERSE_FORMS, or "sampled": an estimate from the sampled token, with the
  exact KL as its baseline where hp.baseline is True.
  """
  if hp.form == "sampled":
    return _sampled_reverse_kl(student_head, guide_head, batch, hp)
  return _distillation(_REVERSE_FORMS[hp.form], student_head, guide_head, batch, hp)


def jsd(student_head: Head, guide_head: Head, batch: Batch, hp: ConfigDict) -> Sums:
  """The generalised Jensen–Shannon divergence, whose mixture has the share hp.pi of the guide."""
  return _distillation(
      lambda s, g, hp: (kl.jsd(s, g, hp.pi, hp.student_temperature, hp.teacher_temperature), {}),
      student_head, guide_head, batch, hp)


FORWARD_KL = Objective(forward_kl, _distillation_keys((*_FORWARD_FORMS,)), check=_check_form)
REVERSE_KL = Objective(
    reverse_kl,
    _distillation_keys((*_REVERSE_FORMS, "sampled"), f"{kl.K1}; {kl.UNNORMALISED}") | {
        "baseline": Key(lambda x: x is True or x is False, "choose True or False", default=True)},
    check=_check_form)
JSD = Objective(jsd, BLOCK_KEYS | _TEMPERATURE_KEYS | {
    "pi": Key(lambda share: 0 < share < 1,
              "choose the teacher's share of the mixture between 0 and 1", default=0.5)})


def _distillation(form: Callable, student_head: Head, guide_head: Head, batch: Batch,
                  hp: ConfigDict) -> Sums:
  """The sums of a form: form(student_logits, guide_logits, hp) -> (loss_BT, {name: value_BT})."""
  if not _unscored(batch):
    return sums_from_logits(lambda s, g: form(s, g, hp), student_head, guide_head, batch, hp)

  # The update is the first to see these log-probabilities: report the sampler's gap as well.
  def f(student_BTV, guide_BTV, targets_BT):
    loss_BT, values = form(student_BTV, guide_BTV, hp)
    return loss_BT, values | {"logp": tokens.log_prob(student_BTV, targets_BT)}

  return sums_from_logits(f, student_head, guide_head, batch, hp, batch.targets_BT)


def _sampled_reverse_kl(student_head: Head, guide_head: Head, batch: Batch,
                        hp: ConfigDict) -> Sums:
  """Reverse KL from the sampled token, with the exact KL as its baseline where hp.baseline."""
  # Padding that only one vocabulary has is not an outcome, so it takes no probability.
  student_head, guide_head = blockwise.common(student_head, guide_head)
  student_logp_BT, _ = _trained_logp(student_head, batch, hp)
  guide_logp_BT, _ = _trained_logp(guide_head, batch, hp)
  baseline_BT = 0.0
  if hp.baseline:
    _, baseline_BT = blockwise.divergence(
        kl.reverse_kl, jax.lax.stop_gradient(student_head), guide_head, batch.weight_BT, hp.block)
  loss_BT = kl.sampled_reverse_kl(student_logp_BT, jax.lax.stop_gradient(guide_logp_BT),
                                  baseline_BT)
  return {"loss": weighted_loss_sum(loss_BT, batch),
          "kl": weighted_mean_pair(jax.lax.stop_gradient(loss_BT), batch),
          **sampler_gap(jax.lax.stop_gradient(student_logp_BT), batch)}
