"""Schedule, clipping and decay against their formulas and against a hand-written AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from s2d_jax import keys, optim, training

AXES = {"embed": ("vocab", "embed"), "layers": {"mlp": ("layer", "embed", "mlp"),
                                                "norm": ("layer", "embed")}, "norm": ("embed",)}
UPDATES = 12
HP = dict(lr=0.1, warmup=4, decay="cosine", clip=1.0, weight_decay=0.5, b1=0.8, b2=0.9,
          eps=1e-6)


def hp(**changes):
  return ConfigDict({**HP, **changes})


def filled(value):
  return {"embed": jnp.full((3, 2), value), "norm": jnp.full((2,), value),
          "layers": {"mlp": jnp.full((2, 2, 2), value), "norm": jnp.full((2, 2), value)}}


def rates(**changes):
  lr = optim.schedule(hp(**changes), UPDATES)
  return np.array([lr(jnp.int32(i)) for i in range(14)])


def test_warmup_by_hand():
  # Four updates of warmup: quarters of 0.1, the first one already moving.
  np.testing.assert_allclose(rates()[:4], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)


@pytest.mark.parametrize("decay, middle", [("constant", 0.1), ("linear", 0.05), ("cosine", 0.05)])
def test_decay_by_hand(decay, middle):
  got = rates(decay=decay)
  np.testing.assert_allclose(got[4], 0.1, rtol=1e-6)       # warm, nothing decayed
  np.testing.assert_allclose(got[8], middle, rtol=1e-5)    # half of the eight updates left
  last = {"constant": 0.1, "linear": 0.0, "cosine": 0.0}[decay]
  np.testing.assert_allclose(got[12:], last, atol=1e-8)    # and it stays there


def test_cosine_and_linear_differ_off_the_middle():
  # A quarter on: linear 3/4, cosine (1 + cos(π/4))/2 = 0.853553.
  np.testing.assert_allclose(rates(decay="linear")[6], 0.075, rtol=1e-5)
  np.testing.assert_allclose(rates(decay="cosine")[6], 0.0853553, rtol=1e-5)


def test_no_warmup_starts_at_the_full_rate():
  np.testing.assert_allclose(rates(warmup=0, decay="constant"), 0.1, rtol=1e-6)


def test_matrices_decay_and_norm_scales_do_not():
  assert optim.matrices(AXES) == {"embed": True, "layers": {"mlp": True, "norm": False},
                                  "norm": False}
  params = filled(2.0)
  optimizer = optim.make(hp(warmup=0, decay="constant"), UPDATES, AXES)
  updates, _ = optimizer.update(filled(0.0), optimizer.init(params), params)
  # Without a gradient only decay acts: −0.1·0.5·2 = −0.1.
  np.testing.assert_allclose(updates["embed"], -0.1, rtol=1e-6)
  np.testing.assert_allclose(updates["layers"]["mlp"], -0.1, rtol=1e-6)
  np.testing.assert_array_equal(updates["layers"]["norm"], 0.0)
  np.testing.assert_array_equal(updates["norm"], 0.0)


def adamw(grads, w, h, lr):
  """AdamW of Loshchilov & Hutter, algorithm 2, on one float64 array."""
  m = v = np.zeros_like(w)
  for t, (g, rate) in enumerate(zip(grads, lr, strict=False), start=1):
    m, v = h.b1 * m + (1 - h.b1) * g, h.b2 * v + (1 - h.b2) * g ** 2
    step = (m / (1 - h.b1 ** t)) / (np.sqrt(v / (1 - h.b2 ** t)) + h.eps)
    w = w - rate * (step + h.weight_decay * w)
  return w


def test_four_updates_equal_adamw_in_float64():
  h = hp(clip=float("inf"))
  grads = np.random.default_rng(0).normal(size=(4, 3, 2))
  w = np.random.default_rng(1).normal(size=(3, 2))
  optimizer = optim.make(h, UPDATES, {"w": ("vocab", "embed")})
  params = {"w": jnp.asarray(w, jnp.float32)}
  state = optimizer.init(params)
  for g in grads:
    updates, state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["w"], adamw(grads, w, h, [0.025, 0.05, 0.075, 0.1]), rtol=1e-5)


def test_clipping_is_by_the_global_norm():
  # Norm of 20 entries of 3: √180 = 13.4; clipped to 1 they are the same gradient at 1/√20 each.
  # Adam forgets scale, so look at its first moment: (1 − b1)/√20.
  params = filled(1.0)
  optimizer = optim.make(hp(), UPDATES, AXES)
  _, state = optimizer.update(filled(3.0), optimizer.init(params), params)
  mu = optax.tree.get(state, "mu")
  np.testing.assert_allclose(mu["norm"], 0.2 / np.sqrt(20), rtol=1e-5)
  _, state = optimizer.update(filled(0.01), optimizer.init(params), params)  # short: left alone
  np.testing.assert_allclose(optax.tree.get(state, "mu")["norm"], 0.2 * 0.01, rtol=1e-5)


@pytest.mark.parametrize("changes, message", [
    (dict(decay="exponential"), "decay is 'exponential': choose it from constant, linear, cosine"),
    (dict(warmup=12), "warmup is 12 and the stage makes 12 optimizer updates: shorten the warmup"),
    (dict(warmup=-1), "warmup is -1: set it to a whole number of at least 0"),
    (dict(lr=0.0), "lr is 0.0: choose it above 0"),
    (dict(clip=0.0), "clip is 0.0: choose it above 0"),
    (dict(b2=1.0), "b2 is 1.0: choose it from 0 to below 1"),
    (dict(weight_decay=-0.1), "weight_decay is -0.1: choose 0 or more"),
])
def test_values_out_of_range_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    optim.make(hp(**changes), UPDATES, AXES)


def test_adamw_equals_make_at_a_constant_rate():
  config = hp(warmup=0, decay="constant", b1=0.9, b2=0.999, eps=1e-8)
  params, grads = filled(2.0), filled(0.3)
  for axes in (AXES, None):
    want, got = (optimizer.update(grads, optimizer.init(params), params)[0] for optimizer in (
        optim.make(config, UPDATES, axes), optim.adamw(0.1, axes, weight_decay=0.5)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(got["norm"], -0.2, rtol=1e-4)  # −0.1 − 0.1: decay acts
  with pytest.raises(ValueError, match="the block has the key 'decay', which nothing reads"):
    optim.adamw(0.1, decay="linear")


def test_make_reads_exactly_its_declared_keys(monkeypatch):
  read = set()
  monkeypatch.setattr(keys, "check_values", lambda *_: None)  # a check does not count as reading

  class Spy:
    def __getattr__(self, key):
      read.add(key)
      return HP[key]

  optim.make(Spy(), UPDATES, AXES).init(filled(1.0))
  optim.schedule(Spy(), UPDATES)(jnp.int32(0))
  assert read == set(optim.KEYS)


@pytest.mark.parametrize("bad", [1.0, np.nan])
def test_the_norm_of_updates_on_a_gpu_changes_no_number(bad, monkeypatch):
  # There the updates are computed a second time, for their norm alone.
  optimizer = optim.make(hp(), UPDATES, AXES)
  params = filled(0.5)
  state = training.TrainState(jnp.int32(3), params, optimizer.init(params))
  total = filled(0.25)
  total["norm"] = total["norm"].at[0].set(bad)

  def applied():
    def f(state, total):
      return training._apply(optimizer, state, total, {"loss": (jnp.float32(1), jnp.float32(2))})
    return "optimization_barrier" in str(jax.make_jaxpr(f)(state, total)), jax.jit(f)(state, total)

  apart, want = applied()
  assert not apart
  monkeypatch.setattr(training.sharding, "platform", lambda: "gpu")
  apart, got = applied()
  assert apart
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert (got[1]["finite"] == 1) == np.isfinite(bad)
  if not np.isfinite(bad):
    jax.tree.map(np.testing.assert_array_equal, got[0], state)
