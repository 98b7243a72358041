"""The jitted update: one division, any split, any mesh, no step on NaN, and it learns."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from s2d_jax import microbatches, objectives, optim, rollouts, sharding, training
from s2d_jax.losses import kl, tokens

B, T, D, V = 16, 5, 8, 12
AXES = {"embedding": ("vocab", "embed"), "dense": ("embed", "mlp"),
        "unembedding": ("vocab", "embed")}
HP = ConfigDict(common.grpo(kl="k3", kl_coef=0.1) | common.reverse_kl()
                | {"microbatches": 1, "block": 16})
OPTIM = ConfigDict(dict(lr=0.05, warmup=0, decay="constant", clip=1.0,
                        weight_decay=0.01, b1=0.9, b2=0.99, eps=1e-8))


class Model(NamedTuple):
  """A stand-in: an embedding, one dense layer, an unembedding. A token sees only itself."""
  config: Any = None

  def init(self, key):
    keys = jax.random.split(key, 3)
    shapes = ((V, D), (D, D), (V, D))
    return {name: jax.random.normal(k, shape) / 2
            for name, k, shape in zip(AXES, keys, shapes, strict=True)}

  def apply(self, params, tokens_BT, positions_BT, segments_BT, cache=None):
    x_BTD = params["embedding"][tokens_BT] + 0.1 * positions_BT[..., None].astype(jnp.float32)
    x_BTD = jnp.where(segments_BT[..., None] > 0, x_BTD, 0.0)
    return jnp.tanh(jnp.einsum("BTD,DF->BTF", x_BTD, params["dense"])), cache

  def unembed(self, params):
    return params["unembedding"]


MODEL = Model()


def make_batch(seed=0, rows=B):
  rng = np.random.default_rng(seed)
  # Weights of rows differ much, so that a mean of microbatch means is far from the mean.
  weight_B = rng.exponential(size=rows) ** 2
  keep_BT = rng.random((rows, T)) < 0.7
  keep_BT[0, 0] = True
  numbers = rng.normal(size=(3, rows, T)).astype(np.float32)
  return rollouts.Batch(
      inputs_BT=rng.integers(V, size=(rows, T), dtype=np.int32),
      targets_BT=rng.integers(V, size=(rows, T), dtype=np.int32),
      positions_BT=np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
      segments_BT=np.ones((rows, T), np.int32),
      weight_BT=(keep_BT * weight_B[:, None]).astype(np.float32),
      count_BT=(keep_BT * weight_B[:, None]).astype(np.float32),
      advantage_BT=numbers[0], old_logp_BT=-2 + 0.2 * numbers[1], sampler_logp_BT=numbers[2],
      behaviour_logp_BT=numbers[2],
      sequence_BT=np.where(keep_BT, 0, -1).astype(np.int32))


def host_params(seed):
  return jax.tree.map(np.asarray, MODEL.init(jax.random.key(seed)))


def put(params, mesh):
  return jax.tree.map(jax.device_put, params, sharding.weight_shardings(mesh, AXES, params))


SGD = optax.sgd(1.0)  # parameters move by minus the gradient
ADAMW = optim.make(OPTIM, 1000, AXES)


@functools.lru_cache
def compiled(objective, guide, shape, optimizer, changes):
  """(mesh, the jitted update), compiled once for all tests of equal settings."""
  hp = ConfigDict({**HP.to_dict(), **dict(changes)})
  mesh = sharding.make_mesh(shape)
  with jax.set_mesh(mesh):
    layout = training.shardings(training.init(optimizer, mesh, put(host_params(0), mesh)))
  guide_model = MODEL if guide else None
  return mesh, training.jit_update(MODEL, guide_model, objective, optimizer, hp, layout)


def run(batch, objective=objectives.GRPO, guide=True, mesh=(1, 1, 1), steps=1,
        optimizer=ADAMW, params=None, **changes):
  """(params, metrics, state, step) after `steps` updates on one batch, parameters fetched."""
  mesh, step = compiled(objective, guide, mesh, optimizer, tuple(sorted(changes.items())))
  with jax.set_mesh(mesh):
    start = host_params(0) if params is None else params
    state = training.init(optimizer, mesh, put(start, mesh))
    guide_params = put(host_params(1), mesh) if guide else None
    batch = sharding.put_batch(batch, mesh)
    for _ in range(steps):
      state, metrics = step(state, guide_params, batch)
    return jax.device_get(state.params), jax.device_get(metrics), state, step


def close(a, b, rtol=1e-5, atol=1e-6):
  """Float32 rounding: sums of a few hundred terms of size 1 in another order."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@jax.jit
def logits(params, batch):
  features_BTD, _ = MODEL.apply(params, batch.inputs_BT, batch.positions_BT, batch.segments_BT)
  return jnp.einsum("BTD,VD->BTV", features_BTD, MODEL.unembed(params))


def gradient(batch, **kwargs):
  """The gradient, as one step of gradient descent of rate 1 subtracts it, and the metrics."""
  params, metrics, *_ = run(batch, optimizer=SGD, **kwargs)
  return jax.tree.map(np.subtract, host_params(0), params), metrics


# One division


def test_gradient_equals_that_of_the_loss_on_all_logits():
  batch = jax.tree.map(jnp.asarray, make_batch())
  guide_params = host_params(1)

  def mean_reverse_kl(params):
    value_BT = kl.reverse_kl(logits(params, batch), logits(guide_params, batch))
    return jnp.sum(value_BT * batch.weight_BT) / jnp.sum(batch.weight_BT)

  want, want_grads = jax.jit(jax.value_and_grad(mean_reverse_kl))(host_params(0))
  grads, metrics = gradient(make_batch(), objective=objectives.REVERSE_KL, microbatches=4)
  close(grads, want_grads)
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in want_grads.values()))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  np.testing.assert_allclose(metrics["update_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [2, 8])
def test_unequal_microbatches_equal_one_batch(microbatches):
  batch = make_batch()
  counts = [batch.weight_BT[i::microbatches].sum() for i in range(microbatches)]
  assert max(counts) > 1.3 * min(counts)  # a mean of means would show
  want, want_metrics = gradient(batch)
  got, metrics = gradient(batch, microbatches=microbatches)
  close(got, want)
  close(metrics, want_metrics)


def test_rows_of_weight_zero_equal_deleted_rows():
  batch = make_batch()
  keep = np.array([0, 3, 5, 8, 9, 12, 14, 15])
  weight_BT = np.zeros_like(batch.weight_BT)
  weight_BT[keep] = batch.weight_BT[keep]
  # A dropped row may hold any numbers; only its token ids must be valid.
  old_logp_BT = np.where(weight_BT > 0, batch.old_logp_BT, -1e9).astype(np.float32)
  advantage_BT = np.where(weight_BT > 0, batch.advantage_BT, np.nan).astype(np.float32)
  masked = batch._replace(weight_BT=weight_BT, count_BT=weight_BT, old_logp_BT=old_logp_BT,
                          advantage_BT=advantage_BT)
  got, metrics = gradient(masked, microbatches=2)
  want, want_metrics = gradient(jax.tree.map(lambda x: x[keep], batch))
  close(got, want)
  close(metrics, want_metrics)


def test_a_batch_without_weight_has_gradient_zero():
  empty = make_batch()._replace(weight_BT=np.zeros((B, T), np.float32),
                                count_BT=np.zeros((B, T), np.float32))
  grads, metrics = gradient(empty, microbatches=2)
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0.0), grads)
  assert metrics["loss"] == 0 and metrics["finite"] == 1


def test_microbatches_must_divide_the_rows():
  with pytest.raises(ValueError, match="16 rows does not split into microbatches = 3"):
    run(make_batch(), microbatches=3)


# Meshes and layouts


@pytest.mark.medium
def test_every_mesh_gives_the_same_parameters():
  # The stand-in leaves its layout to the compiler, and blocks of 16 tokens do not
  # divide T = 5.
  want, want_metrics, *_ = run(make_batch(), steps=2, microbatches=2)
  for shape in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
    got, metrics, *_ = run(make_batch(), steps=2, microbatches=2, mesh=shape)
    close(got, want)
    close(metrics, want_metrics)


@pytest.mark.medium
def test_the_state_keeps_its_layout_and_compiles_once():
  _, _, state, step = run(make_batch(), steps=3, microbatches=2, mesh=(2, 2, 2))
  specs = {"embedding": ("tensor", "fsdp"), "dense": ("fsdp", "tensor"),
           "unembedding": ("tensor", "fsdp")}
  adam = optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")
  for tree in (state.params, *adam):
    for name, x in tree.items():
      assert x.sharding.spec == jax.P(*specs[name]), name
  assert state.step.sharding.spec == jax.P()
  assert state.step == 3
  assert step._cache_size() == 1


def test_microbatches_stay_spread_over_data_and_fsdp():
  layouts = []

  def spy(student_head, guide_head, batch, hp):
    jax.debug.inspect_array_sharding(batch.targets_BT, callback=layouts.append)
    return objectives.NEGATIVE_LOG_LIKELIHOOD(student_head, guide_head, batch, hp)

  run(make_batch(), objective=spy, guide=False, microbatches=2, mesh=(2, 2, 2))
  # Eight rows a microbatch over data × fsdp = 4 groups of devices: two rows on each.
  assert layouts and all(s.shard_shape((B // 2, T)) == (2, T) for s in layouts)


def test_the_abstract_state_has_the_states_shapes_and_layouts():
  mesh = sharding.make_mesh((2, 2, 2))
  params = put(host_params(0), mesh)
  with jax.set_mesh(mesh):
    state, shapes = training.init(ADAMW, mesh, params), training.abstract(ADAMW, mesh, params)
  want = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), shapes) == want


# The state


def test_the_old_state_is_donated_and_the_guide_is_not():
  mesh, step = compiled(objectives.REVERSE_KL, True, (1, 1, 1), ADAMW, ())
  with jax.set_mesh(mesh):
    old = training.init(ADAMW, mesh, put(host_params(0), mesh))
    guide = put(host_params(1), mesh)
    batch = sharding.put_batch(make_batch(), mesh)
    with jax.transfer_guard("disallow"):
      new, _ = step(old, guide, batch)
  assert all(x.is_deleted() for x in jax.tree.leaves(old.params))
  assert not any(x.is_deleted() for x in jax.tree.leaves((guide, batch)))
  close(jax.device_get(guide), host_params(1), rtol=0, atol=0)
  assert new.step == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_leaves_the_state_unchanged(bad):
  batch = make_batch()
  batch.advantage_BT[0, 0] = bad  # a token with weight
  before, _, state, step = run(make_batch())
  want = jax.device_get(state)
  mesh = sharding.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    after, metrics = step(state, put(host_params(1), mesh), sharding.put_batch(batch, mesh))
  assert metrics["finite"] == 0
  assert not np.isfinite(metrics["loss"])
  close(jax.device_get(after), want, rtol=0, atol=0)
  close(jax.device_get(after).params, before, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_leaves_the_state_unchanged():
  def steep(student_head, guide_head, batch, hp):
    features_BTD, _ = student_head
    count = jnp.sum(batch.weight_BT)
    return {"loss": (jnp.sum(jnp.sqrt(0.0 * features_BTD)), count)}  # √ has slope ∞ at 0

  params, metrics, state, _ = run(make_batch(), objective=steep, guide=False)
  assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
  assert metrics["finite"] == 0 and state.step == 0
  close(params, host_params(0), rtol=0, atol=0)


def test_distillation_of_equal_models_has_gradient_zero():
  for objective in (objectives.REVERSE_KL, objectives.FORWARD_KL):
    params, metrics, *_ = run(make_batch(), objective=objective, optimizer=SGD,
                              params=host_params(1), microbatches=2)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    close(params, host_params(1), rtol=0, atol=0)


# Padding to whole tiles, as on a TPU


@pytest.mark.parametrize("objective, changes, mesh", [
    (objectives.REVERSE_KL, {}, (1, 1, 1)),
    (objectives.REVERSE_KL, {"form": "sampled"}, (2, 2, 2)),
    (objectives.NEGATIVE_LOG_LIKELIHOOD, {}, (1, 1, 1)),
    (objectives.GRPO, {"kl": "exact"}, (1, 1, 1)),
    (objectives.GRPO, {"surrogate": "gspo", "mismatch": "truncate", "mismatch_level": "sequence"},
     (2, 2, 2))])
def test_padding_after_the_tokens_changes_no_update(objective, changes, mesh, monkeypatch):
  batch = make_batch()

  def updated(width):
    def counted(head, guide_head, batch, hp):
      assert head[0].shape == (B // 2, width, D)  # a microbatch, when this is traced
      one = jnp.float32(1)
      return objective(head, guide_head, batch, hp) | {
          "trained": (jnp.sum(batch.weight_BT > 0), one),
          "scored": (jnp.sum(batch.sequence_BT >= 0), one)}
    return gradient(batch, objective=counted, mesh=mesh, microbatches=2, **changes)

  # A mesh that splits heads would pad them for its own sake.
  monkeypatch.setattr(microbatches, "time_multiple", lambda: 1)
  want, expected = updated(T)
  # As on a TPU, but for the number: rows of T = 5 tokens get three more.
  monkeypatch.setattr(microbatches, "time_multiple", lambda: 8)
  got, metrics = updated(8)
  close(got, want)
  close(metrics, expected)
  # Means over two microbatches, and exact: padding is not counted.
  assert 2 * metrics["trained"] == (batch.weight_BT > 0).sum()
  assert 2 * metrics["scored"] == (batch.sequence_BT >= 0).sum()


# Scores


def test_token_logps_are_those_of_rows_with_padding_after_them(monkeypatch):
  hp = ConfigDict({**HP.to_dict(), "microbatches": 2})
  def scored():
    mesh = sharding.make_mesh((1, 1, 1))
    with jax.set_mesh(mesh):
      arguments = put(host_params(0), mesh), sharding.put_batch(make_batch(), mesh)
      score = training.token_logps(MODEL, objectives.logp, hp)
      # The features of a microbatch, by which the loss is computed.
      width = T + -T % microbatches.time_multiple()
      assert f"{B // 2}x{width}x{D}x" in score.lower(*arguments).as_text()
      return jax.device_get(score(*arguments))
  want = scored()
  assert want[0].shape == want[1].shape == (B, T)
  # As on a TPU, but for the number: rows of T = 5 tokens get three more.
  monkeypatch.setattr(microbatches, "time_multiple", lambda: 8)
  close(scored(), want)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_token_logps_keep_the_order_of_rows(mesh):
  batch = make_batch()
  mesh = sharding.make_mesh(mesh)
  hp = ConfigDict({**HP.to_dict(), "microbatches": 4})
  with jax.set_mesh(mesh):
    logp_BT, entropy_BT = training.token_logps(MODEL, objectives.logp, hp)(
        put(host_params(0), mesh), sharding.put_batch(batch, mesh))
  want_BTV = logits(host_params(0), jax.tree.map(jnp.asarray, batch))
  response_BT = batch.sequence_BT >= 0
  assert 0.5 < response_BT.mean() < 1  # and elsewhere 0
  want_BT = np.where(response_BT, tokens.log_prob(want_BTV, batch.targets_BT), 0)
  np.testing.assert_allclose(logp_BT, want_BT, atol=1e-5)
  np.testing.assert_allclose(
      entropy_BT, np.where(response_BT, tokens.entropy(want_BTV), 0), atol=1e-5)


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_on_policy_the_first_ratio_is_one(mean):
  batch = make_batch()
  kept_BT = batch.weight_BT > 0
  weight_BT, count_BT = (np.where(kept_BT, x_B[:, None], 0) for x_B in
                         rollouts.token_weights(kept_BT.sum(axis=1), mean, T))
  batch = batch._replace(weight_BT=weight_BT, count_BT=count_BT)
  mesh = sharding.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    old_logp_BT, _ = training.token_logps(MODEL, objectives.logp, HP)(
        put(host_params(0), mesh), sharding.put_batch(batch, mesh))
  batch = batch._replace(old_logp_BT=np.asarray(old_logp_BT))
  _, first, *_ = run(batch, guide=False, kl="none", microbatches=2)
  np.testing.assert_allclose(first["ratio_mean"], 1.0, atol=1e-6)
  assert first["clip_fraction"] == 0
  _, last, *_ = run(batch, guide=False, kl="none", steps=20)  # more updates on one batch: it moves
  assert last["clip_fraction"] > 0


@pytest.mark.parametrize("changes", [
    {}, {"surrogate": "gspo"}, {"surrogate": "cispo", "kl": "k3_corrected"}, {"kl": "exact"},
    {"mismatch": "truncate"}, {"mismatch": "mask", "mismatch_level": "sequence"}])
def test_one_update_is_the_same_without_a_pass_that_scores_before_it(changes):
  batch, mesh = make_batch(), sharding.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    old_logp_BT = np.asarray(training.token_logps(MODEL, objectives.logp, HP)(
        put(host_params(0), mesh), sharding.put_batch(batch, mesh))[0])
  gap_BT = np.random.default_rng(1).normal(size=(B, T)).astype(np.float32)
  batch = batch._replace(sampler_logp_BT=old_logp_BT + gap_BT,
                         behaviour_logp_BT=old_logp_BT - gap_BT)
  settings = dict(optimizer=SGD, microbatches=4, **changes)
  want, expected, *_ = run(batch._replace(old_logp_BT=old_logp_BT), **settings)
  got, found, *_ = run(batch._replace(old_logp_BT=None), **settings)
  close(got, want)
  gaps = np.abs(gap_BT[batch.weight_BT > 0])
  close(found, expected | {"logp_gap_mean": gaps.mean(), "logp_gap_max": gaps.max(),
                       "logp_gap_square": np.mean(gaps**2)})


@pytest.mark.parametrize("objective, changes", [
    (objectives.REVERSE_KL, {}), (objectives.REVERSE_KL, {"form": "sampled"}),
    (objectives.FORWARD_KL, {"form": "top_k", "top_k": 3}),
    (objectives.NEGATIVE_LOG_LIKELIHOOD, {})])
def test_an_update_compares_the_samplers_log_probabilities_with_its_own(objective, changes):
  batch = make_batch()
  logp_BT = tokens.log_prob(logits(host_params(0), batch), batch.targets_BT)
  gaps = np.abs(logp_BT - batch.sampler_logp_BT)[batch.weight_BT > 0]
  params, expected, *_ = run(batch, objective, microbatches=2, **changes)
  assert not any(name.startswith("logp_gap") for name in expected)
  got, found, *_ = run(batch._replace(old_logp_BT=None), objective, microbatches=2, **changes)
  close(got, params)
  close(found, expected | {"logp_gap_mean": gaps.mean(), "logp_gap_max": gaps.max(),
                       "logp_gap_square": np.mean(gaps**2)})
  # Given solutions have no log-probabilities to compare.
  solutions = batch._replace(old_logp_BT=None, sampler_logp_BT=None, behaviour_logp_BT=None)
  close(run(solutions, objective, microbatches=2, **changes)[1], expected)


# Learning


@pytest.mark.parametrize("objective", [objectives.REVERSE_KL, objectives.FORWARD_KL])
def test_distillation_trains_the_student_to_its_teacher(objective):
  batch = make_batch()._replace(weight_BT=np.ones((B, T), np.float32),
                                count_BT=np.ones((B, T), np.float32))
  _, first, *_ = run(batch, objective=objective)
  _, last, *_ = run(batch, objective=objective, steps=300)
  assert first["kl"] > 0.3
  assert last["kl"] < 0.02


def test_the_surrogate_raises_tokens_of_positive_advantage_and_lowers_others():
  batch = make_batch()
  batch = batch._replace(advantage_BT=np.sign(batch.advantage_BT))
  before_BT = tokens.log_prob(logits(host_params(0), batch), batch.targets_BT)
  batch = batch._replace(old_logp_BT=np.asarray(before_BT))
  params, *_ = run(batch, guide=False, kl="none", optimizer=optax.sgd(0.1))
  moved_BT = tokens.log_prob(logits(params, batch), batch.targets_BT) - before_BT
  assert np.sum(batch.weight_BT * batch.advantage_BT * np.asarray(moved_BT)) > 0
