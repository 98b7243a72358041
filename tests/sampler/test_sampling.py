"""Sampling one token: truncation, frequencies, and the reported log-probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from s2d_jax import rollouts
from s2d_jax.sampler import Sampler, Sampling, sampling

PLAIN = Sampling(max_tokens=1)
CASES = [{}, {"top_k": 1}, {"top_k": 5}, {"top_k": 12}, {"top_k": 99}, {"top_p": 0.0},
         {"top_p": 0.3}, {"top_p": 0.9}, {"min_p": 0.05}, {"min_p": 1.0},
         {"temperature": 0.5, "top_p": 0.9}, {"temperature": 3.0, "min_p": 0.2},
         {"temperature": 0.7, "top_k": 8, "top_p": 0.8}, {"top_k": 5, "top_p": 0.95, "min_p": 0.1}]
ids = functools.partial(map, lambda case: "-".join(f"{k}={v}" for k, v in case.items()) or "plain")
sample_token = jax.jit(sampling.sample_token, static_argnums=3)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_truncation_keeps_the_tokens_of_the_reference(case, truncated):
  logits = np.random.default_rng(0).normal(0, 2, (50, 12)).astype(np.float32)
  got = np.asarray(sampling.truncate(jnp.asarray(logits), PLAIN._replace(**case)))
  want = np.array([truncated(row, **case) for row in logits])
  np.testing.assert_array_equal(np.isfinite(got), want > 0)
  np.testing.assert_allclose(np.asarray(jax.nn.softmax(got)), want, atol=1e-6)


LOGITS = np.log(np.array([0.3, 0.02, 0.16, 0.1, 0.05, 0.25, 0.08, 0.04], np.float32))
ROWS = 20_000


@functools.cache
def keys():
  return np.stack([rollouts.row_key((0, 7), row // 8, row % 8) for row in range(ROWS)])


def sampled(fields, index=0, logits=LOGITS):
  """(token, logp, behaviour_logp) of each of ROWS rows that differ in their keys alone."""
  rows = jnp.asarray(np.tile(logits, (ROWS, 1)))
  index_B = jnp.full(ROWS, index, jnp.int32)
  return tuple(map(np.asarray, sample_token(rows, keys(), index_B, fields)))


@pytest.mark.parametrize("case, size", [
    ({"temperature": 0.6}, 8), ({"top_p": 0.75}, 4), ({"top_k": 3}, 3), ({"min_p": 0.2}, 5),
    ({"temperature": 1.4, "top_k": 6, "top_p": 0.8, "min_p": 0.3}, 4)],
    ids=lambda v: next(ids([v])) if isinstance(v, dict) else "")
def test_sampled_frequencies(case, size, truncated):
  token, logp, behaviour_logp = sampled(PLAIN._replace(**case))
  want = truncated(LOGITS, **case)
  count = np.bincount(token, minlength=len(LOGITS))
  assert (want > 0).sum() == size and count[want == 0].sum() == 0
  assert scipy.stats.chisquare(count[want > 0], ROWS * want[want > 0]).pvalue > 0.001
  # Whatever was done to the distribution, the model's own log-probability is reported.
  np.testing.assert_allclose(logp, LOGITS[token], atol=1e-6)  # LOGITS are normalised
  np.testing.assert_allclose(behaviour_logp, np.log(want[token]), atol=1e-5)


def test_successive_tokens_are_independent():
  first, second = sampled(PLAIN)[0], sampled(PLAIN, index=1)[0]
  table = np.zeros((8, 8))
  np.add.at(table, (first, second), 1)
  assert scipy.stats.chi2_contingency(table).pvalue > 0.001
  np.testing.assert_array_equal(first, sampled(PLAIN)[0])


def test_temperature_0_samples_the_most_probable_token():
  logits = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
  token, logp, behaviour_logp = sample_token(
      jnp.asarray(logits), keys(), jnp.zeros(ROWS, jnp.int32), PLAIN._replace(temperature=0.0))
  assert not behaviour_logp.any()  # certain
  np.testing.assert_array_equal(token, logits.argmax(axis=1))
  p = np.exp(logits.astype(np.float64))
  np.testing.assert_allclose(logp, np.log(p.max(axis=1) / p.sum(axis=1)), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_before_min_tokens(temperature):
  early = PLAIN._replace(temperature=temperature, min_tokens=3, stop_ids=(0, 2))
  for index, stops in ((0, False), (2, False), (3, True)):
    token, logp, _ = sampled(early, index)
    assert np.isin(token, (0, 2)).any() == stops
    np.testing.assert_allclose(logp, LOGITS[token], atol=1e-6)  # and not of what was allowed
  if temperature:
    token, _, behaviour_logp = sampled(early)
    want = np.exp(LOGITS.astype(np.float64)) * ~np.isin(np.arange(8), (0, 2))
    np.testing.assert_allclose(behaviour_logp, np.log((want / want.sum())[token]), atol=1e-5)
    assert scipy.stats.chisquare(np.bincount(token, minlength=8)[want > 0],
                                 ROWS * want[want > 0] / want.sum()).pvalue > 0.001


def test_a_vocabulary_of_many_groups():
  # 1,000 tokens are eight groups, the last not full; every token is drawn as often as it should.
  logits = np.random.default_rng(5).normal(0, 1.5, 1000).astype(np.float32)
  token, logp, behaviour_logp = sampled(PLAIN, logits=logits)
  want = np.exp(logits.astype(np.float64))
  want = want / want.sum()
  np.testing.assert_allclose(logp, np.log(want)[token], atol=1e-5)
  np.testing.assert_allclose(behaviour_logp, logp, atol=1e-5)
  order = np.argsort(want)  # rare ones together, so that none is expected less than ten times
  groups = np.cumsum(want[order]) // (10 / ROWS)
  expected = np.array([want[order][groups == g].sum() for g in np.unique(groups)]) * ROWS
  found = np.bincount(token, minlength=1000)[order]
  counts = np.array([found[groups == g].sum() for g in np.unique(groups)])
  big = expected > 5
  assert big.sum() > 100
  assert scipy.stats.chisquare(np.append(counts[big], counts[~big].sum() + 1e-9),
                               np.append(expected[big], expected[~big].sum() + 1e-9)).pvalue > 0.001


def test_top_p_of_a_long_row_equals_the_sorted_form():
  logits = np.random.default_rng(6).normal(0, 3, (20, 5000)).astype(np.float32)
  got = np.isfinite(sampling.truncate(jnp.asarray(logits), PLAIN._replace(top_p=0.95)))
  p = np.exp(logits.astype(np.float64))
  p = p / p.sum(axis=1, keepdims=True)
  for row, support in zip(p, got, strict=True):
    sorted_p = np.sort(row)[::-1]
    need = int(np.searchsorted(np.cumsum(sorted_p), 0.95)) + 1
    assert abs(support.sum() - need) <= 1 and row[support].min() > row[~support].max()


def test_the_last_possible_token_is_sampled_and_no_later_one():
  # The largest number below one, and tokens after the last possible one that cannot be drawn.
  logits = np.full((1, 300), -np.inf, np.float32)
  logits[0, [3, 150]] = 0.0
  for uniform, want in ((0.0, 3), (0.499, 3), (0.501, 150), (1 - 2**-24, 150)):
    token, logp = sampling._pick(jnp.asarray(logits), jnp.full(1, uniform, jnp.float32))
    assert token[0] == want
    np.testing.assert_allclose(logp, np.log(0.5), atol=1e-6)


@pytest.mark.medium
@pytest.mark.parametrize("case", [{"top_k": 20}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.8}])
def test_an_excluded_token_is_never_sampled(case, full_compiles):
  # Running sums over 151,936 tokens stand still between the few that are left, but for rounding,
  # which may move them either way: uniforms on every step of them, and beside it.
  logits = np.random.default_rng(7).normal(size=(1, 151_936)).astype(np.float32)
  truncated_logits = sampling.truncate(jnp.asarray(logits), PLAIN._replace(**case))
  p = np.exp(np.asarray(truncated_logits[0], np.float64))
  steps = np.cumsum(p[p > 0]) / p.sum()
  around = [steps + k * 2.0**-24 for k in range(-12, 13)]
  uniforms = np.clip(np.concatenate(around), 0, 1 - 2**-24).astype(np.float32)
  vocabulary = truncated_logits.shape[1]
  pick = jax.jit(lambda u: sampling._pick(
      jnp.broadcast_to(truncated_logits, (len(u), vocabulary)), u))
  for part in np.array_split(uniforms, -(-len(uniforms) // 32)):
    token, logp = pick(jnp.asarray(np.resize(part, 32)))
    assert np.isfinite(logp).all() and (np.asarray(token) < vocabulary).all()
    assert np.isfinite(np.asarray(truncated_logits[0])[np.asarray(token)]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_has_the_type_of_the_activations(dtype, tiny):
  model, params = tiny("qwen3", dtype=dtype)
  sampler = Sampler(model, PLAIN, 2, 4)
  cache = jax.tree.leaves(sampler.programs.slots[2, 5].cache)
  assert {x.dtype for x in cache} == {jnp.dtype(dtype)}


PADDED = PLAIN._replace(vocabulary=5)  # of LOGITS the ids 5, 6 and 7 have no token


@pytest.mark.parametrize("case", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8},
                                  {"min_p": 0.3}], ids=lambda case: next(ids([case])))
def test_ids_without_a_token_are_not_drawn(case, truncated):
  token, logp, behaviour_logp = sampled(PADDED._replace(**case))
  want = truncated(LOGITS[:5], **case)
  count = np.bincount(token, minlength=8)
  assert count[5:].sum() == 0
  assert scipy.stats.chisquare(count[:5][want > 0], ROWS * want[want > 0]).pvalue > 0.001
  # The model's own log-probability has the mass of all ids, as the trainer's.
  np.testing.assert_allclose(logp, LOGITS[token], atol=1e-6)
  np.testing.assert_allclose(behaviour_logp, np.log(want[token]), atol=1e-5)


@pytest.mark.parametrize("fields", [PADDED, PADDED._replace(min_tokens=1, stop_ids=(0,))])
def test_a_greedy_token_has_text(fields):
  logits = np.array([0, 1, 2, 3, 2.5, 9, 7, 8], np.float32)
  token, logp, _ = sampled(fields._replace(temperature=0.0), logits=logits)
  assert set(token) == {3}
  np.testing.assert_allclose(logp, 3 - np.log(np.exp(logits).sum()), atol=1e-5)


@pytest.mark.parametrize("vocabulary", [0, 8, 9])
def test_a_vocabulary_that_is_not_padded_changes_no_program(vocabulary):
  def text(fields):
    shapes = (jax.ShapeDtypeStruct((2, 8), jnp.float32), jax.ShapeDtypeStruct((2, 2), jnp.uint32),
              jax.ShapeDtypeStruct((2,), jnp.int32))
    return sample_token.lower(*shapes, fields).as_text()
  assert text(PLAIN._replace(vocabulary=vocabulary)) == text(PLAIN)
  assert text(PADDED) != text(PLAIN)


def test_top_p_after_top_k_reaches_its_mass_also_where_logits_are_equal():
  # Top-k keeps both and all that equal the second. Of these four the first has mass
  # e / (e + 3) = 0.475, and 0.7 is reached with the equal ones alone.
  both = sampling.Sampling(4, top_k=2, top_p=0.7)
  truncated = sampling.truncate(jnp.array([[1.0, 0, 0, 0]]), both)
  np.testing.assert_array_equal(truncated, [[1, 0, 0, 0]])
  # Without equal ones: masses 0.665, 0.245 and 0.09 of three.
  both = sampling.Sampling(4, top_k=3, top_p=0.7)
  truncated = sampling.truncate(jnp.array([[3.0, 2, 1, 0]]), both)
  np.testing.assert_array_equal(truncated, [[3, 2, -np.inf, -np.inf]])
