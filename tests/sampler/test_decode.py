"""One token: which may be drawn, how often, and the log-probability that is reported for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from s2d_jax import rollout
from s2d_jax.sampler import Sampling, decode

PLAIN = Sampling(samples_per_prompt=1, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
                 max_tokens=1, min_tokens=0, stop_ids=())
CASES = [{}, {"top_k": 1}, {"top_k": 5}, {"top_k": 12}, {"top_k": 99}, {"top_p": 0.0},
         {"top_p": 0.3}, {"top_p": 0.9}, {"min_p": 0.05}, {"min_p": 1.0},
         {"temperature": 0.5, "top_p": 0.9}, {"temperature": 3.0, "min_p": 0.2},
         {"temperature": 0.7, "top_k": 8, "top_p": 0.8}, {"top_k": 5, "top_p": 0.95, "min_p": 0.1}]
ids = functools.partial(map, lambda case: "-".join(f"{k}={v}" for k, v in case.items()) or "plain")
draw = jax.jit(decode.draw, static_argnums=3)


def truncated(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
  """The probabilities that one row of logits is sampled with, token by token in float64."""
  order = sorted(range(len(logits)), key=lambda i: -logits[i])
  p = np.exp(np.asarray(logits, np.float64) / temperature)
  order = order[:top_k] if top_k else order
  mass, kept = 0.0, []
  for i in order:
    kept.append(i)
    mass += p[i] / p[order].sum()
    if mass >= top_p:
      break
  kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
  return np.array([p[i] if i in kept else 0.0 for i in range(len(p))]) / p[kept].sum()


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_what_is_kept(case):
  logits = np.random.default_rng(0).normal(0, 2, (50, 12)).astype(np.float32)
  got = np.asarray(decode.truncate(jnp.asarray(logits), PLAIN._replace(**case)))
  want = np.array([truncated(row, **case) for row in logits])
  np.testing.assert_array_equal(np.isfinite(got), want > 0)
  np.testing.assert_allclose(np.asarray(jax.nn.softmax(got)), want, atol=1e-6)


LOGITS = np.log(np.array([0.3, 0.02, 0.16, 0.1, 0.05, 0.25, 0.08, 0.04], np.float32))
ROWS = 20_000


@functools.cache
def keys():
  return np.stack([rollout.row_key((0, 7), row // 8, row % 8) for row in range(ROWS)])


def drawn(sampling, index=0, logits=LOGITS):
  """One token for each of ROWS rows that differ in their keys alone, and what was reported."""
  rows = jnp.asarray(np.tile(logits, (ROWS, 1)))
  return map(np.asarray, draw(rows, keys(), jnp.int32(index), sampling))


@pytest.mark.parametrize("case, kept", [
    ({"temperature": 0.6}, 8), ({"top_p": 0.75}, 4), ({"top_k": 3}, 3), ({"min_p": 0.2}, 5),
    ({"temperature": 1.4, "top_k": 6, "top_p": 0.8, "min_p": 0.3}, 4)],
    ids=lambda v: next(ids([v])) if isinstance(v, dict) else "")
def test_how_often(case, kept):
  token, logp = drawn(PLAIN._replace(**case))
  want = truncated(LOGITS, **case)
  count = np.bincount(token, minlength=len(LOGITS))
  assert (want > 0).sum() == kept and count[want == 0].sum() == 0
  assert scipy.stats.chisquare(count[want > 0], ROWS * want[want > 0]).pvalue > 0.001
  # Whatever was done to the distribution, the model's own log-probability is reported.
  np.testing.assert_allclose(logp, LOGITS[token], atol=1e-6)  # LOGITS are normalised


def test_successive_tokens_are_independent():
  first, _ = drawn(PLAIN)
  second, _ = drawn(PLAIN, index=1)
  table = np.zeros((8, 8))
  np.add.at(table, (first, second), 1)
  assert scipy.stats.chi2_contingency(table).pvalue > 0.001
  again, _ = drawn(PLAIN)
  np.testing.assert_array_equal(first, again)


def test_temperature_0_is_the_most_probable():
  logits = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
  token, logp = draw(jnp.asarray(logits), keys(), jnp.int32(0), PLAIN._replace(temperature=0.0))
  np.testing.assert_array_equal(token, logits.argmax(axis=1))
  p = np.exp(logits.astype(np.float64))
  np.testing.assert_allclose(logp, np.log(p.max(axis=1) / p.sum(axis=1)), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_waits_for_min_tokens(temperature):
  early = PLAIN._replace(temperature=temperature, min_tokens=3, stop_ids=(0, 2))
  for index, stops in ((0, False), (2, False), (3, True)):
    token, logp = drawn(early, index)
    assert np.isin(token, (0, 2)).any() == stops
    np.testing.assert_allclose(logp, LOGITS[token], atol=1e-6)  # and not of what was allowed
  if temperature:
    token, _ = drawn(early)
    want = np.exp(LOGITS.astype(np.float64)) * ~np.isin(np.arange(8), (0, 2))
    assert scipy.stats.chisquare(np.bincount(token, minlength=8)[want > 0],
                                 ROWS * want[want > 0] / want.sum()).pvalue > 0.001


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_has_the_type_of_the_activations(dtype, tiny):
  model, params = tiny("qwen3", dtype=dtype)
  logits, cache = jax.eval_shape(
      lambda *args: decode._prefill(model, *args), params, np.zeros((3, 5), np.int32),
      np.ones(3, np.int32))
  assert (cache.k_LBSKH.dtype, cache.v_LBSKH.dtype, logits.dtype) == (dtype, dtype, "float32")
