"""The kernels that choose a token on a GPU, interpreted, against float64 in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import sharding
from s2d_jax.sampler import one_pass, sampling

BELOW_1 = np.nextafter(np.float32(1), np.float32(0))


def pick(logits, uniforms):
  token_B, logp_B = one_pass.pick(jnp.asarray(logits, jnp.float32),
                                  jnp.asarray(uniforms, jnp.float32), interpret=True)
  assert token_B.dtype == jnp.int32 and logp_B.dtype == jnp.float32
  return np.asarray(token_B), np.asarray(logp_B)


def random_logits(rows, groups, excluded=0.0):
  rng = np.random.default_rng(groups)
  logits = rng.normal(0, 4, (rows, groups * one_pass.GROUP)).astype(np.float32)
  return np.where(rng.random(logits.shape) < excluded, -np.inf, logits)


# 1 group, fewer than a program takes, whole programs, and some that two programs take.
@pytest.mark.parametrize("groups, excluded", [(1, 0), (3, 0.5), (32, 0), (37, 0.999)])
def test_the_token_is_where_the_running_sum_passes_the_uniform(groups, excluded):
  rows = 20
  logits = random_logits(rows, groups, excluded)
  uniforms = np.random.default_rng(1).random(rows).astype(np.float32)
  tokens, logps = pick(logits, uniforms)
  p = np.exp(np.float64(logits) - logits.max(axis=1, keepdims=True))
  p /= p.sum(axis=1, keepdims=True)
  upto = np.cumsum(p, axis=1)
  assert np.abs(upto - uniforms[:, None]).min() > 1e-6  # no row is decided by rounding
  np.testing.assert_array_equal(tokens, np.argmax(upto > uniforms[:, None], axis=1))
  np.testing.assert_allclose(logps, np.log(p[np.arange(rows), tokens]), atol=1e-5)


@pytest.mark.parametrize("uniform, token", [(0.0, 130), (BELOW_1, 520)])  # the first and the last
def test_an_excluded_token_is_never_chosen(uniform, token):
  # All groups but three are excluded, and parts of those.
  logits = np.full((1, 6 * one_pass.GROUP), -np.inf)
  logits[0, [130, 131, 300, 520]] = [0, -3, 2, -4]
  assert pick(logits, [uniform])[0] == token


@pytest.mark.parametrize("truncation", [{"top_k": 20}, {"min_p": 0.05}])
def test_rounding_never_chooses_an_excluded_token(truncation):
  # Uniforms on and beside every step of the running sum, which stands still between the few words.
  logits = jnp.asarray(random_logits(1, 24))
  logits = np.asarray(sampling.truncate(logits, sampling.Sampling(1, **truncation)))[0]
  p = np.exp(np.float64(logits))
  steps = np.cumsum(p[p > 0]) / p.sum()
  uniforms = np.clip([steps + k * 2.0**-24 for k in range(-4, 5)], 0, BELOW_1).ravel()
  tokens, logps = pick(np.broadcast_to(logits, (len(uniforms), len(logits))), uniforms)
  assert np.isfinite(logits[tokens]).all() and np.isfinite(logps).all()


def test_a_group_of_words_that_add_up_to_less_has_its_last_one():
  # The mass of a group is a product, which may exceed the sum of its words by rounding. All words
  # but the first of each group are excluded, and uniforms are at the end of the first group.
  rows, allowed = 1000, 5
  logits = random_logits(rows, 2).reshape(rows, 2, -1)
  logits[:, :, allowed:] = -np.inf
  p = np.exp(np.float64(logits)).sum(axis=2)
  ends = np.float32(p[:, 0] / p.sum(axis=1))
  for uniforms in (ends, np.nextafter(ends, np.float32(0))):
    tokens, logps = pick(logits.reshape(rows, -1), uniforms)
    assert (tokens % one_pass.GROUP < allowed).all() and np.isfinite(logps).all()


def test_a_number_that_is_not_finite_shows_in_its_own_row():
  logits = random_logits(3, 4)
  want = pick(logits, [0.3, 0.6, 0.9])
  logits[1, 200] = np.nan
  tokens, logps = pick(logits, [0.3, 0.6, 0.9])
  np.testing.assert_array_equal(tokens[[0, 2]], want[0][[0, 2]])
  np.testing.assert_array_equal(logps[[0, 2]], want[1][[0, 2]])
  assert np.isnan(logps[1])


def test_a_row_does_not_depend_on_its_place_or_neighbours():
  logits = random_logits(4, 19)
  uniforms = np.array([0.1, 0.4, 0.7, 0.95])
  tokens, logps = pick(logits, uniforms)
  order = [2, 0, 3, 1]
  for got, want in zip(pick(logits[order], uniforms[order]), (tokens, logps), strict=True):
    np.testing.assert_array_equal(got, want[order])
  for got, want in zip(pick(logits[3:], uniforms[3:]), (tokens, logps), strict=True):
    np.testing.assert_array_equal(got, want[3:])


def test_whole_groups_on_a_gpu_are_chosen_from_by_the_kernels(monkeypatch):
  def applies(vocabulary=256, platform="gpu", split=False):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(sharding, "splits_heads", lambda: split)
    return one_pass.applies(vocabulary)
  assert applies()
  assert not applies(200) and not applies(platform="tpu") and not applies(split=True)
  assert not applies(platform="cpu")
  # `sampling` then takes them, and gives them what it would take itself.
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  monkeypatch.setattr(sharding, "splits_heads", lambda: False)
  monkeypatch.setattr(one_pass, "pick", lambda logits_BV, uniform_B: ("token", "logp"))
  assert sampling._pick(jnp.zeros((1, 256)), jnp.zeros(1)) == ("token", "logp")
