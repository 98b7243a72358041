"""Every loss through the trainer's update, on every mesh, equals its direct form on all logits.

One program a mesh runs all of them: each has student weights of its own, in a stack, so that the
gradient of the sum of the losses has the gradient of each.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from s2d_jax import objectives, rollouts, sharding, training
from s2d_jax.losses import grpo, kl, tokens

B, T, D, V = 16, 12, 8, 16
HP = common.grpo(clip_high=0.3, clip_most=1.1) | common.reverse_kl(top_k=5) | {"pi": 0.3}
AXES = {"features": ("layer", "layer", "embed"), "unembed": ("layer", "vocab", "embed")}


def logp(logits_BTV, batch):
  return tokens.log_prob(logits_BTV, batch.targets_BT)


CLIP = grpo.Clip(0.2, 0.3)


def ratios(f, clip=CLIP):
  """The loss of a surrogate of `grpo` on logits."""
  return lambda s, g, batch: f(logp(s, batch), batch.old_logp_BT, batch.advantage_BT, clip,
                               batch.weight_BT > 0, batch.segments_BT)[0]


CLIPPED = ratios(grpo.clipped_surrogate)


def penalised(penalty):
  return lambda s, g, batch: CLIPPED(s, g, batch) + 0.5 * penalty(s, g, batch)


def weighted(level, mismatch):
  def loss(s, g, batch):
    ratio_BT = grpo.mismatch_ratio(batch.old_logp_BT, batch.behaviour_logp_BT, batch.weight_BT > 0,
                                   batch.segments_BT, level)
    return mismatch(ratio_BT) * CLIPPED(s, g, batch)
  return loss


def surrogate(**changes):
  return objectives.GRPO, changes


def forward(**changes):
  return objectives.FORWARD_KL, changes


def reverse(**changes):
  return objectives.REVERSE_KL, changes


WARM = {"student_temperature": 2.0, "teacher_temperature": 0.5}
LOSSES = {  # what the trainer runs, and the same on logits [B, T, V]
    "nll": ((objectives.NEGATIVE_LOG_LIKELIHOOD, {}), lambda s, g, batch: -logp(s, batch)),
    "forward": (forward(), lambda s, g, _: kl.forward_kl(s, g)),
    "forward, warm": (forward(**WARM), lambda s, g, _: kl.forward_kl(s, g, 2.0, 0.5)),
    "reverse": (reverse(), lambda s, g, _: kl.reverse_kl(s, g)),
    "reverse, warm": (reverse(**WARM), lambda s, g, _: kl.reverse_kl(s, g, 2.0, 0.5)),
    "jsd": ((objectives.JSD, {}), lambda s, g, _: kl.jsd(s, g, 0.3)),
    "jsd, warm": ((objectives.JSD, WARM), lambda s, g, _: kl.jsd(s, g, 0.3, 2.0, 0.5)),
    **{f"forward top {support}": (
        forward(form="top_k", support=support),
        lambda s, g, _, support=support: kl.top_k_forward_kl(s, g, 5, support)[0])
       for support in kl.SUPPORTS},
    **{f"reverse top {support}": (
        reverse(form="top_k", support=support),
        lambda s, g, _, support=support: kl.top_k_reverse_kl(s, g, 5, support)[0])
       for support in kl.SUPPORTS},
    "intersection": (reverse(form="intersection", support="intersection"),
                     lambda s, g, _: kl.intersection_reverse_kl(s, g, 5)[0]),
    "generalised": (reverse(form="generalised"),
                    lambda s, g, _: kl.generalised_reverse_kl(s, g, 5, "teacher")[0]),
    "sampled": (reverse(form="sampled", baseline=False),
                lambda s, g, batch: kl.sampled_reverse_kl(logp(s, batch), logp(g, batch))),
    "sampled, baseline": (
        reverse(form="sampled"),
        lambda s, g, batch: kl.sampled_reverse_kl(
            logp(s, batch), logp(g, batch), kl.reverse_kl(s, g))),
    "clipped": (surrogate(), CLIPPED),
    "dual": (surrogate(surrogate="dual_clipped"),
             ratios(grpo.dual_clipped_surrogate, grpo.Clip(0.2, 0.3, 1.1))),
    "gspo": (surrogate(surrogate="gspo"), ratios(grpo.gspo)),
    "cispo": (surrogate(surrogate="cispo"), ratios(grpo.cispo)),
    "k2": (surrogate(kl="k2", kl_coef=0.5),
           penalised(lambda s, g, batch: kl.k2(logp(s, batch), logp(g, batch)))),
    "k3": (surrogate(kl="k3", kl_coef=0.5),
           penalised(lambda s, g, batch: kl.k3(logp(s, batch), logp(g, batch)))),
    "k3, corrected": (surrogate(kl="k3_corrected", kl_coef=0.5),
                      penalised(lambda s, g, batch: kl.k3_corrected(
                          logp(s, batch), logp(g, batch), batch.old_logp_BT))),
    "exact": (surrogate(kl="exact", kl_coef=0.5), penalised(lambda s, g, _: kl.reverse_kl(s, g))),
    "truncated by token": (surrogate(mismatch="truncate"),
                           weighted("token", lambda r: grpo.truncated(r, 2.0))),
    "masked by sequence": (surrogate(mismatch="mask", mismatch_level="sequence"),
                           weighted("sequence", lambda r: grpo.masked(r, 0.5, 2.0))),
}


class Model:
  """A stand-in whose features are a table of the tokens' places, one for each loss."""

  def apply(self, params, tokens_BT, positions_BT, segments_BT):
    return params["features"][:, tokens_BT], None

  def unembed(self, params):
    return params["unembed"]


def every(student, guide, batch, hp):
  """The objective that is the sum of all objectives; each one's own sum beside it."""
  features_LBTD, weight_LVD = student
  guide_head = guide[0][0], guide[1][0]
  sums = {}
  for l, (name, ((objective, changes), _)) in enumerate(LOSSES.items()):
    settings = SimpleNamespace(**HP | changes | {"block": hp.block})
    sums[name] = objective((features_LBTD[l], weight_LVD[l]), guide_head, batch, settings)["loss"]
  totals, counts = zip(*sums.values(), strict=True)
  return {"loss": (sum(totals), counts[0]), **sums}


def tables(width, seed):
  rng = np.random.default_rng(seed)
  return {"features": rng.normal(size=(1, B * T, width)).astype(np.float32),
          "unembed": (rng.normal(size=(1, V, width)) * width**-0.5).astype(np.float32)}


# A wider guide, which differs from the student by the features that it has besides.
STUDENT_TABLES, PADDING = tables(D, 1), tables(8, 2)
STUDENT = {key: np.repeat(x, len(LOSSES), axis=0) for key, x in STUDENT_TABLES.items()}
GUIDE = {key: np.concatenate([x, PADDING[key]], axis=-1) for key, x in STUDENT_TABLES.items()}


def batches():
  """{name: Batch}: sixteen sequences of unequal lengths and weights, a row each and packed."""
  rng = np.random.default_rng(3)
  lengths = [rng.integers(1, high, B).astype(np.int32) for high in (4, 7)]
  rows = rollouts.Rollout(
      np.arange(B), np.zeros(B, np.int32), rng.integers(0, V, (B, 4)).astype(np.int32), lengths[0],
      rng.integers(0, V, (B, 9)).astype(np.int32), lengths[1],
      np.zeros((B, 9), np.float32), (0.3 * rng.normal(size=(B, 9))).astype(np.float32),
      np.ones(B, np.int32), 0)
  # Weights in quarters: their sum, which every number is divided by, is exact in any order.
  plain = rollouts.batch(rows, "token", rng.normal(size=B).astype(np.float32) + 0.5,
                        rng.integers(0, 9, B).astype(np.float32) / 4)
  packed = rollouts.pack(plain, T)
  assert packed.segments_BT.max() > 1 and (packed.segments_BT.max(axis=1) == 0).any()
  return {"plain": placed(plain), "packed": placed(packed)}


def placed(batch):
  """The batch with each place as its own input, and old and drawn numbers near the student's."""
  batch = batch._replace(inputs_BT=np.arange(B * T, dtype=np.int32).reshape(B, T))
  noise_BT = 0.3 * np.random.default_rng(4).normal(size=(B, T)).astype(np.float32)
  logits_BTV = STUDENT_TABLES["features"][0, batch.inputs_BT] @ STUDENT_TABLES["unembed"][0].T
  old_BT = np.asarray(logp(jnp.asarray(logits_BTV), batch)) + noise_BT
  return batch._replace(old_logp_BT=old_BT, behaviour_logp_BT=old_BT + batch.behaviour_logp_BT)


@jax.jit
def direct(params, guide, batch):
  """({name: mean}, gradients) of every loss on logits [B, T, V] of its own."""
  def logits(params, l):
    return jnp.einsum("BTD,VD->BTV", params["features"][l, batch.inputs_BT], params["unembed"][l])
  def losses(params):
    means = {name: jnp.sum(f(logits(params, l), logits(guide, 0), batch) * batch.weight_BT)
                   / jnp.sum(batch.count_BT) for l, (name, (_, f)) in enumerate(LOSSES.items())}
    return sum(means.values()), means
  grads, means = jax.grad(losses, has_aux=True)(params)
  return means, grads


def log_softmax_float64(features_ND, weight_VD, inputs_BT):
  logits_BTV = features_ND.astype(np.float64)[inputs_BT] @ weight_VD.astype(np.float64).T
  return logits_BTV - np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))


def k3_corrected_float64(batch):
  """(mean, gradients) of the loss "k3, corrected", by hand in float64.

  Its gradients are large differences of small numbers: in float32 the direct form alone is 3e-7
  from this, as far as the blockwise one on the other side.
  """
  features_ND, weight_VD = STUDENT_TABLES["features"][0], STUDENT_TABLES["unembed"][0]
  log_p_BTV = log_softmax_float64(features_ND, weight_VD, batch.inputs_BT)
  log_ref_BTV = log_softmax_float64(GUIDE["features"][0], GUIDE["unembed"][0], batch.inputs_BT)
  targets_BT1 = np.asarray(batch.targets_BT)[..., None]
  logp_BT = np.take_along_axis(log_p_BTV, targets_BT1, axis=-1)[..., 0]
  gap_BT = np.take_along_axis(log_ref_BTV, targets_BT1, axis=-1)[..., 0] - logp_BT
  ratio_BT = np.exp(logp_BT - batch.old_logp_BT)
  advantage_BT, weight_BT = batch.advantage_BT, batch.weight_BT
  k3_BT = np.expm1(gap_BT) - gap_BT
  loss_BT = 0.5 * ratio_BT * k3_BT - np.minimum(
      ratio_BT * advantage_BT, np.clip(ratio_BT, 0.8, 1.3) * advantage_BT)
  clipped_BT = np.where(advantage_BT > 0, ratio_BT > 1.3, ratio_BT < 0.8)
  dlogp_BT = (np.where(clipped_BT, 0.0, -ratio_BT * advantage_BT)
              + 0.5 * ratio_BT * (k3_BT - np.expm1(gap_BT)))
  is_target_BTV = np.arange(V) == targets_BT1
  dlogits_BTV = (weight_BT * dlogp_BT)[..., None] * (is_target_BTV - np.exp(log_p_BTV))
  count = batch.count_BT.sum(dtype=np.float64)
  dfeatures_ND = np.zeros(features_ND.shape)
  dfeatures_ND[batch.inputs_BT] = dlogits_BTV @ weight_VD
  dweight_VD = np.einsum("BTV,BTD->VD", dlogits_BTV, features_ND[batch.inputs_BT])
  return (np.sum(weight_BT * loss_BT) / count,
          {"features": dfeatures_ND / count, "unembed": dweight_VD / count})


@pytest.fixture(scope="module")
def expected():
  """{name of a batch: (batch, means, gradients)}."""
  found, name_of_k3 = {}, "k3, corrected"
  for name, batch in batches().items():
    means, grads = jax.device_get(direct(STUDENT, GUIDE, batch))
    for grad_LND in grads.values():
      assert np.abs(grad_LND).max(axis=(1, 2)).min() > 1e-3  # of every loss
    mean, own_grads = k3_corrected_float64(batch)
    near(means[name_of_k3], mean, name_of_k3)
    means[name_of_k3] = mean
    grads = {key: grad_LND.astype(np.float64) for key, grad_LND in grads.items()}
    for key, grad_LND in grads.items():
      grad_ND = grad_LND[list(LOSSES).index(name_of_k3)]
      near(grad_ND, own_grads[key], f"direct {name_of_k3}: {key}")
      grad_ND[:] = own_grads[key]
    found[name] = batch, means, grads
  return found


# On 8 x 1 x 1 a device has 24 tokens of a batch and 12 of half of one; 4 divides them, 5 does not.
@pytest.mark.medium
@pytest.mark.parametrize("block, microbatches", [(4, 1), (5, 2)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_every_loss_equals_the_direct_one(expected, shape, block, microbatches):
  mesh, keep = sharding.make_mesh(shape), optax.trace(decay=0.0)  # its slots are the gradient
  hp = SimpleNamespace(block=block, microbatches=microbatches)
  def put(params):
    return jax.tree.map(sharding.put, params, sharding.weight_shardings(mesh, AXES, params))
  with jax.set_mesh(mesh):
    layout = training.shardings(training.init(keep, mesh, put(STUDENT)))
    step = training.jit_update(Model(), Model(), every, keep, hp, layout)
    for batch, means, grads in expected.values():
      state, metrics = jax.device_get(step(training.init(keep, mesh, put(STUDENT)), put(GUIDE),
                                           sharding.put_batch(batch, mesh)))
      for l, name in enumerate(LOSSES):
        near(metrics[name], means[name], name)
        for key, grad_LND in grads.items():
          near(state.opt_state.trace[key][l], grad_LND[l], f"{name}: {key}")


def near(got, want, name):
  """Within 1e-6 of the largest entry."""
  error = np.abs(got - want).max() / np.abs(want).max()
  assert error <= 1e-6, f"{name} is {error:.1e} off"
