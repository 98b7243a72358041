"""The adapters: sums, counts, penalties, refusals, and exactly the config keys they declare."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import objectives, rollout
from s2d_jax.losses import grpo, kl, tokens

B, T, D, V = 3, 4, 5, 7
RNG = np.random.default_rng(0)
HP = dict(block=9, clip_low=0.2, clip_high=0.3, kl="none", kl_coef=0.0)


def head(seed):
  rng = np.random.default_rng(seed)
  return (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
          jnp.asarray(rng.normal(size=(V, D)), jnp.float32))


STUDENT, GUIDE = head(1), head(2)
WEIGHT_BT = np.array([[0, 0.5, 1, 1], [0, 0, 0, 0], [1, 0.25, 0, 2]], np.float32)
COUNT = 5.75


def batch():
  fields = dict.fromkeys(rollout.Batch._fields)
  fields["targets_BT"] = jnp.asarray(RNG.integers(V, size=(B, T)), jnp.int32)
  fields["weight_BT"] = jnp.asarray(WEIGHT_BT)
  fields["advantage_BT"] = jnp.asarray(np.random.default_rng(3).normal(size=(B, T)), jnp.float32)
  noise_BT = 0.4 * np.random.default_rng(4).normal(size=(B, T))
  logp_BT = tokens.log_prob(logits(STUDENT), fields["targets_BT"])
  fields["old_logp_BT"] = logp_BT + jnp.asarray(noise_BT, jnp.float32)
  return rollout.Batch(**fields)


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
  np.testing.assert_allclose(count, COUNT)


def test_summed_by_hand():
  # 2·1 + 3·0.5 = 3.5 over 1.5; the token of weight 0 is not a number and is left out.
  total, count = objectives.summed(jnp.array([[2.0, 3.0, jnp.nan]]), jnp.array([[1.0, 0.5, 0.0]]))
  assert (total, count) == (3.5, 1.5)


def test_negative_log_likelihood():
  sums = objectives.negative_log_likelihood(STUDENT, None, BATCH, hp())
  expect(sums, "loss", -LOGP_BT)
  expect(sums, "entropy", tokens.entropy(logits(STUDENT)))
  assert set(sums) == {"loss", "entropy"}


@pytest.mark.parametrize("objective, f", [(objectives.forward_kl, kl.forward_kl),
                                          (objectives.reverse_kl, kl.reverse_kl)])
def test_distillation(objective, f):
  sums = objective(STUDENT, GUIDE, BATCH, hp())
  expect(sums, "loss", f(logits(STUDENT), logits(GUIDE)))
  expect(sums, "kl", f(logits(STUDENT), logits(GUIDE)))
  with pytest.raises(ValueError, match=f"{f.__name__} compares with a guide and has none"):
    objective(STUDENT, None, BATCH, hp())


def surrogate_by_numpy():
  ratio_BT = np.exp(LOGP_BT - np.asarray(BATCH.old_logp_BT))
  advantage_BT = np.asarray(BATCH.advantage_BT)
  return ratio_BT, -np.minimum(ratio_BT * advantage_BT, np.clip(ratio_BT, 0.8, 1.3) * advantage_BT)


@pytest.mark.parametrize("guide_head", [None, GUIDE])
def test_clipped_surrogate_without_penalty(guide_head):
  sums = objectives.clipped_surrogate(STUDENT, guide_head, BATCH, hp(kl_coef=0.5))
  ratio_BT, loss_BT = surrogate_by_numpy()
  advantage_BT = np.asarray(BATCH.advantage_BT)
  clipped_BT = np.where(advantage_BT > 0, ratio_BT > 1.3, ratio_BT < 0.8)
  assert 0 < np.sum(WEIGHT_BT * clipped_BT) < COUNT
  expect(sums, "loss", loss_BT)
  expect(sums, "ratio_mean", ratio_BT)
  expect(sums, "clip_fraction", clipped_BT)
  expect(sums, "entropy", tokens.entropy(logits(STUDENT)))
  assert "kl" not in sums


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_clipped_surrogate_with_penalty(name):
  sums = objectives.clipped_surrogate(STUDENT, GUIDE, BATCH, hp(kl=name, kl_coef=0.5))
  log_ratio_BT = LOGP_BT - REFERENCE_BT
  kl_BT = {"k2": log_ratio_BT ** 2 / 2, "k3": np.exp(-log_ratio_BT) - 1 + log_ratio_BT}[name]
  expect(sums, "kl", kl_BT)
  expect(sums, "loss", surrogate_by_numpy()[1] + 0.5 * kl_BT)


def test_a_penalty_needs_a_guide_and_k1_is_refused():
  with pytest.raises(ValueError, match="clipped_surrogate with kl = \"k3\" compares with a guide"):
    objectives.clipped_surrogate(STUDENT, None, BATCH, hp(kl="k3", kl_coef=0.1))
  with pytest.raises(ValueError, match="gradient is zero in expectation"):
    objectives.clipped_surrogate(STUDENT, GUIDE, BATCH, hp(kl="k1", kl_coef=0.1))
  with pytest.raises(ValueError, match="kl = \"k4\" is not a penalty"):
    objectives.check_penalty(hp(kl="k4"))


def test_a_token_without_weight_cannot_spoil_the_gradient():
  keep_BT = BATCH.weight_BT > 0
  wild = BATCH._replace(old_logp_BT=jnp.where(keep_BT, BATCH.old_logp_BT, -1e9),  # a ratio of ∞
                        advantage_BT=jnp.where(keep_BT, BATCH.advantage_BT, jnp.nan))

  def loss(head, batch):
    return objectives.clipped_surrogate(head, None, batch, hp())["loss"][0]

  grad = jax.jit(jax.grad(loss))
  want, got = grad(STUDENT, BATCH), grad(STUDENT, wild)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_group_advantages_give_the_gradient_of_the_group():
  # One prompt, three samples, ratio 1: the gradient in log π is −A of the row on tokens that weigh.
  advantage_BT = jnp.asarray(
      np.repeat(grpo.group_advantages(np.array([[1.0, 0.0, 0.0]])).T, T, axis=1), jnp.float32)
  on_policy = BATCH._replace(advantage_BT=advantage_BT, old_logp_BT=jnp.asarray(LOGP_BT))

  def loss(head):
    return objectives.clipped_surrogate(head, None, on_policy, hp())["loss"][0]

  def policy_gradient(head):
    logp_BT = tokens.log_prob(logits(head), BATCH.targets_BT)
    return -jnp.sum(WEIGHT_BT * advantage_BT * logp_BT)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
               jax.jit(jax.grad(loss))(STUDENT), jax.jit(jax.grad(policy_gradient))(STUDENT))


@pytest.mark.parametrize("objective", objectives.READS)
def test_each_objective_reads_exactly_the_keys_it_declares(objective):
  read = set()

  class Spy:
    def __getattr__(self, key):
      read.add(key)
      return {**HP, "kl": "k2", "kl_coef": 0.1}[key]

  objective(STUDENT, GUIDE, BATCH, Spy())
  assert read == set(objectives.READS[objective])
