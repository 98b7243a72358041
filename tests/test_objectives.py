"""The objectives: sums, counts, penalties, refusals, and exactly the config keys they declare."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from s2d_jax import keys, objectives, optim, rollouts
from s2d_jax.losses import grpo, kl, tokens

B, T, D, V = 3, 4, 5, 7
RNG = np.random.default_rng(0)
HP = common.grpo() | common.reverse_kl(top_k=3) | {
    "block": 9, "clip_high": 0.3, "form": "full", "pi": 0.5}


def head(seed):
  rng = np.random.default_rng(seed)
  return (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
          jnp.asarray(rng.normal(size=(V, D)), jnp.float32))


STUDENT, GUIDE = head(1), head(2)
WEIGHT_BT = np.array([[0, 0.5, 1, 1], [0, 0, 0, 0], [1, 0.25, 0, 2]], np.float32)
COUNT_BT = np.where(WEIGHT_BT > 0, [[0.5], [1], [0.25]], 0).astype(np.float32)  # as Dr. GRPO's
WEIGHT, COUNT = 5.75, 2.25


def batch():
  fields = dict.fromkeys(rollouts.Batch._fields)
  fields["targets_BT"] = jnp.asarray(RNG.integers(V, size=(B, T)), jnp.int32)
  fields["weight_BT"], fields["count_BT"] = jnp.asarray(WEIGHT_BT), jnp.asarray(COUNT_BT)
  fields["segments_BT"] = jnp.ones((B, T), jnp.int32)
  fields["behaviour_logp_BT"] = jnp.zeros((B, T))
  fields["advantage_BT"] = jnp.asarray(np.random.default_rng(3).normal(size=(B, T)), jnp.float32)
  noise_BT = 0.4 * np.random.default_rng(4).normal(size=(B, T))
  logp_BT = tokens.log_prob(logits(STUDENT), fields["targets_BT"])
  fields["old_logp_BT"] = logp_BT + jnp.asarray(noise_BT, jnp.float32)
  return rollouts.Batch(**fields)


def logits(head):
  return jnp.einsum("BTD,VD->BTV", *head)


def hp(**changes):
  return SimpleNamespace(**{**HP, **changes})


BATCH = batch()
LOGP_BT = np.asarray(tokens.log_prob(logits(STUDENT), BATCH.targets_BT))
REFERENCE_BT = np.asarray(tokens.log_prob(logits(GUIDE), BATCH.targets_BT))


def expect(sums, name, value_BT):
  total, count = sums[name]
  np.testing.assert_allclose(total, np.sum(WEIGHT_BT * np.asarray(value_BT)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(count, COUNT if name == "loss" else WEIGHT)


def test_sums_by_hand():
  # 2·1 + 3·0.5 = 3.5 over 1 + 2; the token of weight 0 is not a number and is left out.
  weights = SimpleNamespace(weight_BT=jnp.array([[1.0, 0.5, 0.0]]),
                            count_BT=jnp.array([[1.0, 2.0, 0.0]]))
  total, count = objectives.weighted_loss_sum(jnp.array([[2.0, 3.0, jnp.nan]]), weights)
  assert (total, count) == (3.5, 3.0)
  # A logged value is a mean under the weights: 3.5 over 1 + 0.5.
  total, count = objectives.weighted_mean_pair(jnp.array([[2.0, 3.0, jnp.nan]]), weights)
  assert (total, count) == (3.5, 1.5)


def test_negative_log_likelihood():
  sums = objectives.NEGATIVE_LOG_LIKELIHOOD(STUDENT, None, BATCH, hp())
  expect(sums, "loss", -LOGP_BT)
  expect(sums, "entropy", tokens.entropy(logits(STUDENT)))
  assert set(sums) == {"loss", "entropy"}


@pytest.mark.parametrize("objective, f", [(objectives.FORWARD_KL, kl.forward_kl),
                                          (objectives.REVERSE_KL, kl.reverse_kl)])
def test_distillation(objective, f):
  sums = objective(STUDENT, GUIDE, BATCH, hp())
  expect(sums, "loss", f(logits(STUDENT), logits(GUIDE)))
  expect(sums, "kl", f(logits(STUDENT), logits(GUIDE)))
  with pytest.raises(ValueError, match="_kl compares with a guide and has none: name one"):
    objective(STUDENT, None, BATCH, hp())


WARM = {"student_temperature": 2.0, "teacher_temperature": 3.0}
STUDENTS, BOTHS = {"support": "student"}, {"support": "intersection"}


@pytest.mark.parametrize("objective, form, changes, f", [
    (objectives.FORWARD_KL, "top_k", STUDENTS,
     lambda s, t: kl.top_k_forward_kl(s, t, 3, "student")[0]),
    (objectives.REVERSE_KL, "top_k", STUDENTS,
     lambda s, t: kl.top_k_reverse_kl(s, t, 3, "student")[0]),
    (objectives.REVERSE_KL, "intersection", BOTHS,
     lambda s, t: kl.intersection_reverse_kl(s, t, 3)[0]),
    (objectives.REVERSE_KL, "generalised", STUDENTS,
     lambda s, t: kl.generalised_reverse_kl(s, t, 3, "student")[0]),
    (objectives.JSD, "full", WARM, lambda s, t: kl.jsd(s, t, 0.5, 2.0, 3.0)),
    (objectives.FORWARD_KL, "full", WARM, lambda s, t: kl.forward_kl(s, t, 2.0, 3.0)),
    (objectives.REVERSE_KL, "full", WARM, lambda s, t: kl.reverse_kl(s, t, 2.0, 3.0))])
def test_forms_of_the_divergences(objective, form, changes, f):
  settings = hp(form=form, **changes)
  sums = objective(STUDENT, GUIDE, BATCH, settings)
  expect(sums, "loss", f(logits(STUDENT), logits(GUIDE)))
  def loss(head):
    return objective(head, GUIDE, BATCH, settings)["loss"][0]
  want = jax.grad(lambda head: jnp.sum(WEIGHT_BT * f(logits(head), logits(GUIDE))))(STUDENT)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.grad(loss)(STUDENT),
               want)
  if form != "full":
    assert sums.keys() == {"loss", "kl", "student_mass", "teacher_mass"}


@pytest.mark.parametrize("baseline", [True, False])
def test_sampled_form(baseline):
  sums = objectives.REVERSE_KL(STUDENT, GUIDE, BATCH, hp(form="sampled", baseline=baseline))
  expect(sums, "loss", LOGP_BT - REFERENCE_BT)
  grad = jax.grad(lambda head: objectives.REVERSE_KL(
      head, GUIDE, BATCH, hp(form="sampled", baseline=baseline))["loss"][0])(STUDENT)
  base_BT = np.asarray(kl.reverse_kl(logits(STUDENT), logits(GUIDE))) if baseline else 0.0
  advantage_BT = LOGP_BT - REFERENCE_BT - base_BT
  want = jax.grad(lambda head: jnp.sum(WEIGHT_BT * advantage_BT * tokens.log_prob(
      logits(head), BATCH.targets_BT)))(STUDENT)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad, want)


def padded(head):
  """The head with two more rows, likely ones, that only it has."""
  return head[0], jnp.concatenate([head[1], 3 * head[1][:2]])


WIDER = pytest.mark.parametrize("wider", ["student", "guide"])


@pytest.mark.parametrize("baseline", [True, False])
@WIDER
def test_padding_of_a_vocabulary_has_no_probability(baseline, wider):
  # No part in a log-probability, and no gradient.
  heads = {"student": STUDENT, "guide": GUIDE}
  heads[wider] = padded(heads[wider])
  def loss(student, guide):
    settings = hp(form="sampled", baseline=baseline)
    return objectives.REVERSE_KL(student, guide, BATCH, settings)["loss"][0]
  want, dwant = jax.value_and_grad(loss)(STUDENT, GUIDE)
  got, dgot = jax.value_and_grad(loss)(heads["student"], heads["guide"])
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(dgot[0], dwant[0], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(dgot[1][:V], dwant[1], rtol=1e-4, atol=1e-6)
  assert not np.any(dgot[1][V:])


@pytest.mark.parametrize("name", objectives.KL_PENALTIES)
@WIDER
def test_a_penalty_covers_the_vocabulary_that_both_have(name, wider):
  # The surrogate is the policy's own, all it has: only the penalty leaves padding out.
  heads = {"student": STUDENT, "guide": GUIDE}
  heads[wider] = padded(heads[wider])
  def logp(head):
    return tokens.log_prob(logits(head), BATCH.targets_BT)
  clip = grpo.Clip(0.2, 0.3)
  def direct(head):
    cut = head[0], head[1][:V]
    kl_BT = objectives.KL_PENALTIES[name](logp(cut), logp(GUIDE), BATCH.old_logp_BT)
    loss_BT, _ = grpo.clipped_surrogate(logp(head), BATCH.old_logp_BT, BATCH.advantage_BT, clip)
    return jnp.sum(WEIGHT_BT * (loss_BT + 0.5 * kl_BT)), kl_BT
  def through_the_objective(head):
    sums = objectives.GRPO(head, heads["guide"], BATCH, hp(kl=name, kl_coef=0.5))
    return sums["loss"][0], sums
  (_, kl_BT), want = jax.value_and_grad(direct, has_aux=True)(heads["student"])
  (_, sums), got = jax.value_and_grad(through_the_objective, has_aux=True)(heads["student"])
  expect(sums, "kl", kl_BT)
  surrogate_BT, _ = grpo.clipped_surrogate(logp(heads["student"]), BATCH.old_logp_BT,
                                           BATCH.advantage_BT, clip)
  expect(sums, "loss", surrogate_BT + 0.5 * kl_BT)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("change, message", [
    ({"form": "half"}, "form is 'half': choose it from full, top_k, intersection, generalised"),
    ({"form": "k1"}, "form is 'k1': choose it from full, .*; k1 .* cannot be a loss, .* zero in e"),
    ({"form": "unnormalised"},
     "form is 'unnormalised': .*; the unnormalised .* cannot be a loss, .* minimum is q/e on"),
    ({"support": "both"}, "support is 'both': choose it from teacher, student, union"),
    ({"form": "intersection"}, "support is 'teacher' and the form \"intersection\" .*: set it to"),
    *(({"top_k": k}, f"top_k is {k}: set it to a whole number of at least 1")
      for k in (0, 2.5, True)),
    *(({f"{side}_temperature": t}, f"{side}_temperature is {t}: choose it above 0")
      for side in ("student", "teacher") for t in (0.0, -1.0)),
    *(({"form": form, "support": "intersection", f"{side}_temperature": 2.0},
       f"{side}_temperature is 2.0 and the form \"{form}\" takes logits as they are: set it to 1")
      for form in ("top_k", "intersection", "generalised", "sampled")
      for side in ("student", "teacher")),
    ({"baseline": 0.5}, "baseline is 0.5")])
def test_values_that_a_divergence_cannot_have_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    objectives.REVERSE_KL(STUDENT, GUIDE, BATCH, hp(**change))


@pytest.mark.parametrize("change, message", [
    ({"pi": 0.0}, "pi is 0.0"), ({"pi": 1.5}, "pi is 1.5"),
    ({"student_temperature": 0.0}, "student_temperature is 0.0: choose it above 0"),
    ({"teacher_temperature": -1.0}, "teacher_temperature is -1.0: choose it above 0")])
def test_values_that_a_jsd_cannot_have_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    keys.check_values(hp(**change), objectives.JSD.keys)
  with pytest.raises(ValueError, match=message):
    objectives.JSD(STUDENT, GUIDE, BATCH, hp(**change))


TWICE = {"student_temperature": 2.0, "teacher_temperature": 2.0}
EVERY = [(objectives.FORWARD_KL, {}), (objectives.FORWARD_KL, TWICE), (objectives.REVERSE_KL, {}),
         (objectives.REVERSE_KL, TWICE), (objectives.JSD, {}), (objectives.JSD, TWICE),
         (objectives.FORWARD_KL, {"form": "top_k"}), (objectives.REVERSE_KL, {"form": "top_k"}),
         (objectives.REVERSE_KL, {"form": "intersection"} | BOTHS),
         (objectives.REVERSE_KL, {"form": "generalised"}),
         *((objectives.REVERSE_KL, {"form": "sampled", "baseline": baseline})
           for baseline in (True, False)),
         *((objectives.GRPO, {"kl": name, "kl_coef": 0.5})
           for name in (*objectives.KL_PENALTIES, "exact"))]


@pytest.mark.parametrize("objective, changes", EVERY)
def test_equal_models_have_no_loss_and_no_gradient(objective, changes):
  still = BATCH._replace(advantage_BT=jnp.zeros((B, T)))  # a penalty alone
  def loss(head, guide):
    sums = objective(head, guide, still, hp(**changes))
    return sums["loss"][0], sums["kl"][0]
  for wrap in (lambda f: f, jax.jit):
    (total, found), grads = wrap(jax.value_and_grad(loss, has_aux=True))(STUDENT, STUDENT)
    assert total == 0 and found == 0
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), grads)


# Arrays of a block by the vocabulary in the compiled program's temporaries, by what XLA of jax 0.10
# and of jax 0.12 makes of the same program.
ARRAYS = [(objectives.NEGATIVE_LOG_LIKELIHOOD, {}, 3, 3), (objectives.FORWARD_KL, {}, 4, 4),
          (objectives.REVERSE_KL, {}, 3, 3), (objectives.JSD, {}, 6, 5),
          (objectives.FORWARD_KL, {"form": "top_k"}, 6, 7),
          (objectives.REVERSE_KL, {"form": "top_k", "support": "union"}, 8, 4),
          (objectives.REVERSE_KL, {"form": "intersection"} | BOTHS, 9, 4),
          (objectives.REVERSE_KL, {"form": "generalised"}, 7, 6),
          (objectives.REVERSE_KL, {"form": "generalised", "support": "union"}, 10, 7),
          (objectives.REVERSE_KL, {"form": "sampled"}, 2, 3),
          (objectives.GRPO, {"kl": "k3", "kl_coef": 0.5}, 3, 3),
          (objectives.GRPO, {"surrogate": "gspo"}, 2, 2),
          (objectives.GRPO, {"kl": "exact", "kl_coef": 0.5}, 3, 3)]


@pytest.mark.parametrize("unscored", [False, True])
@pytest.mark.parametrize("objective, changes, arrays_before, arrays_now", ARRAYS)
def test_temporaries_are_a_few_arrays_of_a_block_by_the_vocabulary(
    objective, changes, arrays_before, arrays_now, unscored):
  arrays = arrays_before if jax.__version_info__ < (0, 11) else arrays_now
  count, block, width, words = 2048, 1024, 64, 8192
  def shapes(kind):
    return jax.ShapeDtypeStruct((1, count), kind)
  ids = {"targets_BT": jnp.int32, "segments_BT": jnp.int32}
  batch = rollouts.Batch(*(shapes(ids.get(name, jnp.float32)) for name in rollouts.Batch._fields))
  if unscored:
    batch = batch._replace(old_logp_BT=None)
  head = (jax.ShapeDtypeStruct((1, count, width), jnp.float32),
          jax.ShapeDtypeStruct((words, width), jnp.float32))
  def loss(head, guide, batch):
    sums = objective(head, guide, batch, hp(block=block, **changes))
    return sums["loss"][0], sums
  program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(head, head, batch).compile()
  got = program.memory_analysis().temp_size_in_bytes / (4 * block * words)
  # Features, their gradients and numbers of every token beside them; the gradient is output.
  assert arrays - 1 < got < arrays + 0.4


def surrogate_by_numpy():
  ratio_BT = np.exp(LOGP_BT - np.asarray(BATCH.old_logp_BT))
  advantage_BT = np.asarray(BATCH.advantage_BT)
  return ratio_BT, -np.minimum(ratio_BT * advantage_BT, np.clip(ratio_BT, 0.8, 1.3) * advantage_BT)


@pytest.mark.parametrize("guide_head", [None, GUIDE])
def test_clipped_surrogate_without_penalty(guide_head):
  sums = objectives.GRPO(STUDENT, guide_head, BATCH, hp(kl_coef=0.5))
  ratio_BT, loss_BT = surrogate_by_numpy()
  advantage_BT = np.asarray(BATCH.advantage_BT)
  clipped_BT = np.where(advantage_BT > 0, ratio_BT > 1.3, ratio_BT < 0.8)
  assert 0 < np.sum(WEIGHT_BT * clipped_BT) < WEIGHT
  expect(sums, "loss", loss_BT)
  expect(sums, "ratio_mean", ratio_BT)
  expect(sums, "clip_fraction", clipped_BT)
  expect(sums, "entropy", tokens.entropy(logits(STUDENT)))
  assert "kl" not in sums


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_clipped_surrogate_with_penalty(name):
  sums = objectives.GRPO(STUDENT, GUIDE, BATCH, hp(kl=name, kl_coef=0.5))
  log_ratio_BT = LOGP_BT - REFERENCE_BT
  kl_BT = {"k2": log_ratio_BT ** 2 / 2, "k3": np.exp(-log_ratio_BT) - 1 + log_ratio_BT}[name]
  expect(sums, "kl", kl_BT)
  expect(sums, "loss", surrogate_by_numpy()[1] + 0.5 * kl_BT)


def test_the_other_surrogates_and_penalties():
  new, old = LOGP_BT, np.asarray(BATCH.old_logp_BT)
  advantage_BT, mask_BT = np.asarray(BATCH.advantage_BT), WEIGHT_BT > 0
  ratio_BT, clipped_BT = np.exp(new - old), surrogate_by_numpy()[1]
  mean_B1 = np.sum((new - old) * mask_BT, axis=1, keepdims=True) / np.maximum(
      mask_BT.sum(axis=1, keepdims=True), 1)
  s_BT = np.broadcast_to(np.exp(mean_B1), new.shape)
  want = {
      "dual_clipped": np.where(advantage_BT < 0, np.minimum(clipped_BT, -1.1 * advantage_BT),
                               clipped_BT),
      "gspo": -np.minimum(s_BT * advantage_BT, np.clip(s_BT, 0.8, 1.3) * advantage_BT),
      "cispo": -np.clip(ratio_BT, 0.8, 1.3) * advantage_BT * new}
  def stopped(ratio_BT):
    return np.where(advantage_BT > 0, ratio_BT > 1.3, ratio_BT < 0.8)
  held = {"dual_clipped": stopped(ratio_BT) | (advantage_BT < 0) & (ratio_BT > 1.1),
          "gspo": stopped(s_BT), "cispo": (ratio_BT < 0.8) | (ratio_BT > 1.3)}
  for name, loss_BT in want.items():
    sums = objectives.GRPO(STUDENT, None, BATCH, hp(surrogate=name, clip_most=1.1))
    expect(sums, "loss", loss_BT)
    expect(sums, "clip_fraction", held[name])
    assert not np.array_equal(held[name][WEIGHT_BT > 0], stopped(ratio_BT)[WEIGHT_BT > 0])
  log_ratio_BT = new - REFERENCE_BT
  kls = {"k3_corrected": ratio_BT * (np.exp(-log_ratio_BT) - 1 + log_ratio_BT),
         "exact": np.asarray(kl.reverse_kl(logits(STUDENT), logits(GUIDE)))}
  for name, kl_BT in kls.items():
    sums = objectives.GRPO(STUDENT, GUIDE, BATCH, hp(kl=name, kl_coef=0.5))
    expect(sums, "kl", kl_BT)
    expect(sums, "loss", clipped_BT + 0.5 * kl_BT)


def test_a_coefficient_is_not_rounded_to_the_type_of_the_features():
  # 5e-4 in bfloat16 is 4.997e-4. The surrogate is left out by advantages of 0.
  head = STUDENT[0].astype(jnp.bfloat16), STUDENT[1]
  def features_gradient(coefficient):
    settings = hp(kl="exact", kl_coef=coefficient)
    still = BATCH._replace(advantage_BT=jnp.zeros((B, T)))
    grad_BTD, _ = jax.grad(lambda head: objectives.GRPO(
        head, GUIDE, still, settings)["loss"][0])(head)
    return np.asarray(grad_BTD.astype(jnp.float32))
  for coefficient in (5e-4, 0.3):
    exact_BTD = features_gradient(1.0) * np.float32(coefficient)
    want_BTD = jnp.asarray(exact_BTD).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(features_gradient(coefficient), want_BTD)


@pytest.mark.parametrize("mismatch", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_mismatch_weight_multiplies_the_surrogate_and_the_ratio_is_logged(mismatch, level):
  sampler_BT = np.asarray(BATCH.old_logp_BT) - np.array([-0.9, 0.2, -0.1, 1.0], np.float32)
  batch_ = BATCH._replace(behaviour_logp_BT=jnp.asarray(sampler_BT))
  sums = objectives.GRPO(STUDENT, None, batch_, hp(mismatch=mismatch, mismatch_level=level))
  log_BT = (np.asarray(BATCH.old_logp_BT) - sampler_BT) * (WEIGHT_BT > 0)
  if level == "sequence":
    log_BT = np.broadcast_to(log_BT.sum(axis=1, keepdims=True), log_BT.shape)
  ratio_BT = np.exp(log_BT)
  kept_BT = (np.minimum(ratio_BT, 2.0) if mismatch == "truncate"
             else np.where((ratio_BT >= 0.5) & (ratio_BT <= 2.0), ratio_BT, 0.0))
  expect(sums, "mismatch_ratio", ratio_BT)
  expect(sums, "mismatch_weight", kept_BT)
  expect(sums, "loss", surrogate_by_numpy()[1] * kept_BT)
  assert not np.array_equal(kept_BT, ratio_BT)


def test_a_penalty_needs_a_guide_and_k1_is_refused():
  with pytest.raises(ValueError, match="grpo_loss compares with a guide"):
    objectives.GRPO(STUDENT, None, BATCH, hp(kl="k3", kl_coef=0.1))
  with pytest.raises(ValueError, match="gradient is zero in expectation"):
    objectives.GRPO(STUDENT, GUIDE, BATCH, hp(kl="k1", kl_coef=0.1))
  with pytest.raises(ValueError, match="kl is 'k4': choose it from none, k2, k3, k3_corrected"):
    keys.check_values(hp(kl="k4"), objectives.GRPO.keys)


def test_a_token_of_weight_0_does_not_change_the_gradient():
  keep_BT = BATCH.weight_BT > 0
  wild = BATCH._replace(old_logp_BT=jnp.where(keep_BT, BATCH.old_logp_BT, -1e9),  # a ratio of ∞
                        advantage_BT=jnp.where(keep_BT, BATCH.advantage_BT, jnp.nan))

  def loss(head, batch):
    return objectives.GRPO(head, None, batch, hp())["loss"][0]

  grad = jax.jit(jax.grad(loss))
  want, got = grad(STUDENT, BATCH), grad(STUDENT, wild)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_group_advantages_give_the_gradient_of_the_group():
  # One prompt, three samples, ratio 1: the gradient in log π is −A of the row on weighted tokens.
  advantage_BT = jnp.asarray(
      np.repeat(grpo.group_advantages(np.array([[1.0, 0.0, 0.0]])).T, T, axis=1), jnp.float32)
  on_policy = BATCH._replace(advantage_BT=advantage_BT, old_logp_BT=jnp.asarray(LOGP_BT))

  def loss(head):
    return objectives.GRPO(head, None, on_policy, hp())["loss"][0]

  def policy_gradient(head):
    logp_BT = tokens.log_prob(logits(head), BATCH.targets_BT)
    return -jnp.sum(WEIGHT_BT * advantage_BT * logp_BT)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               jax.jit(jax.grad(loss))(STUDENT), jax.jit(jax.grad(policy_gradient))(STUDENT))


BROKEN = [
    (objectives.GRPO, {"clip_low": -0.1}, "clip_low is -0.1: choose it from 0 to 1"),
    (objectives.GRPO, {"clip_high": -0.1}, "clip_high is -0.1: choose 0 or more"),
    (objectives.GRPO, {"kl_coef": -0.1}, "kl_coef is -0.1: choose 0 or more"),
    (objectives.GRPO, {"clip_most": 1.0}, "clip_most is 1.0: choose it above 1"),
    (objectives.GRPO, {"mismatch_least": 0.0}, "mismatch_least is 0.0: choose it above 0"),
    (objectives.GRPO, {"mismatch_least": 2.0}, "mismatch_least is 2.0: choose it below mismatch_m"),
    (objectives.GRPO, {"surrogate": "ppo"}, "surrogate is 'ppo': choose it from clipped, dual_cl"),
    (objectives.GRPO, {"mismatch": "drop"}, "mismatch is 'drop': choose it from none, truncate"),
    (objectives.GRPO, {"mismatch_level": "word"}, "mismatch_level is 'word': choose it from token"),
    (objectives.NEGATIVE_LOG_LIKELIHOOD, {"block": 0}, "block is 0: set it to a whole number")]


@pytest.mark.parametrize("objective, change, message", BROKEN)
def test_values_out_of_range_are_refused(objective, change, message):
  objective(STUDENT, GUIDE, BATCH, hp())
  with pytest.raises(ValueError, match=message):
    objective(STUDENT, GUIDE, BATCH, hp(**change))


FULL_CONFIGS = [  # objective, settings under which its loss reads all of its keys between them
    (objectives.NEGATIVE_LOG_LIKELIHOOD, [{}]),
    (objectives.GRPO, [{"kl": "k2", "kl_coef": 0.1}, {"surrogate": "dual_clipped"},
                       {"mismatch": "mask"}]),
    (objectives.FORWARD_KL, [{}, {"form": "top_k"}]),
    (objectives.REVERSE_KL, [{}, {"form": "top_k"}, {"form": "sampled"}]),
    (objectives.JSD, [{}])]


@pytest.mark.parametrize("objective, settings", FULL_CONFIGS)
def test_each_loss_reads_exactly_the_keys_it_declares(objective, settings):
  read = set()

  class Spy:
    def __init__(self, values):
      self.values = values

    def __getattr__(self, key):
      read.add(key)
      return self.values[key]

  for changes in settings:  # the loss alone: a check of a key does not count as reading it
    objective.loss(STUDENT, GUIDE, BATCH, Spy({**HP, **changes}))
  assert read == set(objective.keys)


def test_the_config_files_and_a_script_have_the_same_defaults():
  # configs/ and s2d_jax/ may not import each other, so each has the defaults once.
  blocks = [(objectives.GRPO.keys | objectives.REWARD_KEYS, common.grpo),
            (objectives.FORWARD_KL.keys, common.forward_kl),
            (objectives.REVERSE_KL.keys, common.reverse_kl)]
  for record, block in blocks:
    assert keys.defaults(record).to_dict() == block() | {"block": common.stage.defaults["block"]}
  assert keys.defaults(optim.KEYS, lr=0.1).to_dict() == common.adamw(lr=0.1)
  assert keys.defaults(objectives.JSD.keys).to_dict() == {
      "block": 4096, "pi": 0.5, "student_temperature": 1.0, "teacher_temperature": 1.0}


def test_the_keys_of_a_users_objective_are_checked():
  def loss(student_head, guide_head, batch, hp):
    return {"loss": (hp.alpha, 1.0)}
  alpha = keys.Key(lambda a: a > 0, "choose it above 0")
  user_objective = objectives.Objective(loss, {"alpha": alpha},
                                        uses_guide=lambda hp: hp.alpha > 1)
  assert user_objective(STUDENT, None, BATCH, SimpleNamespace(alpha=0.5)) == {"loss": (0.5, 1.0)}
  with pytest.raises(ValueError, match="^alpha is -1: choose it above 0.$"):
    user_objective(STUDENT, GUIDE, BATCH, SimpleNamespace(alpha=-1))
  with pytest.raises(ValueError, match="loss compares with a guide and has none: name one in the"):
    user_objective(STUDENT, None, BATCH, SimpleNamespace(alpha=2.0))
