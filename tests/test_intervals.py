"""Confidence intervals against closed forms, coverage and the clock."""

import functools
import time

import numpy as np
import pytest
import scipy.special
import scipy.stats

from s2d_jax import intervals, stats


def samples(P=200, G=8, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.random((P, G)) < rng.beta(1, 2, size=(P, 1))).astype(np.int64)


def test_the_bootstrap_interval_of_the_mean_has_its_closed_form_width():
  # The mean of 200 resampled problems' shares has variance Var_p(c/G) / P and is normal: ± 1.96
  # standard deviations at 95 %.
  correct_PG = samples()
  variance = correct_PG.mean(axis=1).var() / 200
  estimate, low, high = intervals.bootstrap(correct_PG.mean(axis=1), seed=0, draws=20_000)
  np.testing.assert_allclose(estimate, correct_PG.mean())
  np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(variance), rtol=0.03)
  np.testing.assert_allclose((high + low) / 2, estimate, atol=2e-3)
  _, low80, high80 = intervals.bootstrap(correct_PG.mean(axis=1), 0, 20_000, level=0.8)
  np.testing.assert_allclose(high80 - low80, 2 * 1.2816 * np.sqrt(variance), rtol=0.03)


# Worlds of known truth: the logits of success are sums of normal terms. (Mean, spread of seeds, of
# problems, of their interaction.)
WORLDS = {"problems differ": (0, 0.0, 2.0, 0.0), "problems and seeds": (0, 0.15, 2.0, 0.5),
          "seeds rule": (0, 0.6, 1.0, 0.5), "only samples": (0, 0.0, 0.0, 0.0),
          "a little of all": (0, 0.05, 0.3, 0.3), "near the top": (4, 0.3, 1.5, 0.5),
          "near the bottom": (-4, 0.15, 1.5, 0.5), "nearly all right": (6, 0.5, 1.0, 0.5)}
SKEWED = (4, 0.6, 1.0, 0.5)  # near the top, and the seeds' spread is all there is


def logits(world, rng, problem_P, S):
  """[S, P] of an arm with these problems."""
  mean, seeds, problems, both = world
  P = len(problem_P)
  return (mean + seeds * rng.normal(size=(S, 1)) + problems * problem_P
          + both * rng.normal(size=(S, P)))


def simulate(world, rng, S, P, G):
  """value_SP of one simulated experiment: the share of right among G samples."""
  return rng.binomial(G, scipy.special.expit(logits(world, rng, rng.normal(size=P), S))) / G


@functools.cache
def truth(world):
  """The rate over all seeds and problems, by Gauss–Hermite quadrature of the normal logit."""
  point, weight = np.polynomial.hermite_e.hermegauss(80)
  mean, *spread = world
  return float(scipy.special.expit(mean + np.linalg.norm(spread) * point) @ weight / weight.sum())


@pytest.mark.parametrize("G", [1, 4, 16])
@pytest.mark.parametrize("name", ["problems differ", "only samples", "a little of all",
                                  "near the bottom"])
def test_coverage_of_the_interval_over_problems_and_samples(name, G):
  # 2,000 data sets of one training seed; the seed is as it is.
  rng, held = np.random.default_rng(0), 0
  mean, _, *spread = WORLDS[name]
  world, P = (mean, 0.0, *spread), 400 if mean else 200  # the rare right ones must be some
  for seed in range(2000):
    right_P = np.rint(simulate(world, rng, 1, P, G)[0] * G).astype(int)
    correct_PG = (np.arange(G) < right_P[:, None]).astype(int)
    _, low, high = intervals.bootstrap(correct_PG.mean(axis=1), seed, 300)
    held += low <= truth(world) <= high
  assert 0.93 <= held / 2000 <= 0.97, held / 2000


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("P", [100, 512])
def test_coverage_of_the_interval_over_three_seeds(name, P):
  rng, held, want = np.random.default_rng(7), 0, truth(WORLDS[name])
  for _ in range(2000):
    _, low, high = intervals.over_seeds(simulate(WORLDS[name], rng, 3, P, 16))
    held += low <= want <= high
  assert 0.93 <= held / 2000 <= 0.97, held / 2000


@pytest.mark.parametrize("above, below", [
    ("problems and seeds", "problems and seeds"), ("seeds rule", "a little of all"),
    ("near the top", "problems differ"), ("near the bottom", "near the bottom"),
    ("near the top", "nearly all right")])
def test_coverage_of_the_interval_of_a_difference_over_three_seeds(above, below):
  # Two arms on the same problems, each with seeds of its own.
  worlds, rng, held = (WORLDS[above], WORLDS[below]), np.random.default_rng(7), 0
  want = truth(worlds[0]) - truth(worlds[1])
  for _ in range(2000):
    problem_P = rng.normal(size=512)
    a, b = (rng.binomial(16, scipy.special.expit(logits(world, rng, problem_P, 3))) / 16
            for world in worlds)
    _, low, high = intervals.gap_over_seeds(a - b)
    held += low <= want <= high
  assert 0.93 <= held / 2000 <= 0.97, held / 2000


def test_coverage_is_lower_where_the_spread_of_seeds_dominates_near_1():
  # Three draws of a skewed spread say too little of it: 92 to 94 % in place of 95.
  rng, held = np.random.default_rng(7), 0
  for _ in range(2000):
    _, low, high = intervals.over_seeds(simulate(SKEWED, rng, 3, 512, 16))
    held += low <= truth(SKEWED) <= high
  assert 0.91 <= held / 2000 <= 0.95, held / 2000


def test_over_seeds_by_hand():
  # Seeds alone: 0.3, 0.4, 0.5 on every problem. Var_s = 0.01, so h = 4.3027·√(0.01/3); for a rate
  # the ends are at logit(0.4) ± h / 0.24.
  seeds_only = np.repeat([[0.3], [0.4], [0.5]], 50, axis=1)
  half = 4.30265 * np.sqrt(0.01 / 3)
  np.testing.assert_allclose(intervals.gap_over_seeds(seeds_only), [0.4, 0.4 - half, 0.4 + half],
                             rtol=1e-5)
  odds = 2 / 3 * np.exp([-half / 0.24, half / 0.24])
  np.testing.assert_allclose(intervals.over_seeds(seeds_only), [0.4, *odds / (1 + odds)], rtol=1e-5)
  # Problems alone: half at 0, half at 1, the same for every seed: h = 1.96·√(Var_p/P).
  problems_only = np.tile(np.arange(100) % 2, (3, 1)).astype(float)
  half = 1.959964 * np.sqrt(0.25 * 100 / 99 / 100)
  np.testing.assert_allclose(intervals.gap_over_seeds(problems_only), [0.5, 0.5 - half, 0.5 + half],
                             rtol=1e-5)


def test_a_gap_over_seeds_is_the_t_interval_where_problems_do_not_vary():
  # SciPy's own one-sample t interval, with the rest of the variance gone.
  seed_S = np.array([0.3, 0.35, 0.5, 0.41])
  want = scipy.stats.ttest_1samp(seed_S, 0).confidence_interval(0.9)
  got = intervals.gap_over_seeds(np.repeat(seed_S[:, None], 9, axis=1), level=0.9)
  np.testing.assert_allclose(got[1:], want)


@pytest.mark.medium
def test_a_plain_bootstrap_of_three_seeds_covers_too_little():
  # The usual way, in the same worlds: resampled seeds and problems, and percentiles.
  rng, held = np.random.default_rng(0), 0
  for _ in range(500):
    value_SP = simulate(WORLDS["seeds rule"], rng, 3, 100, 16)
    means = [value_SP[np.ix_(rng.integers(3, size=3), rng.integers(100, size=100))].mean()
             for _ in range(200)]
    low, high = np.quantile(means, [0.025, 0.975])
    held += low <= 0.5 <= high
  assert held / 500 < 0.85, held / 500


@pytest.mark.parametrize("shape", [(1, 10), (3, 1), (6,)])
def test_an_interval_over_one_seed_is_refused(shape):
  with pytest.raises(ValueError, match="at least two training seeds"):
    intervals.over_seeds(np.zeros(shape))


@pytest.mark.parametrize("name", ["problems differ", "seeds rule"])
def test_a_resolvable_difference_is_found_with_the_stated_power(name):
  # Three seeds: shift their differences from the truth by what is resolvable under the variance
  # that many such experiments show on average.
  world, rng = WORLDS[name], np.random.default_rng(1)
  sizes = [intervals.resolvable(simulate(world, rng, 3, 100, 8)) for _ in range(400)]
  size = np.sqrt(np.mean(np.square(sizes)))
  gaps = (simulate(world, rng, 3, 100, 8) - truth(world) + size for _ in range(2000))
  found = sum(intervals.gap_over_seeds(gap_SP).low > 0 for gap_SP in gaps)
  assert 0.75 < found / 2000 < 0.85, found / 2000


def test_the_resolvable_difference_of_one_seed_by_hand():
  # Half of 100 differences at 0.2: Var = 0.01·100/99, so (1.96 + 0.84)·√(Var/100).
  gap_SP = np.tile([[0.0, 0.2]], (1, 50))
  np.testing.assert_allclose(intervals.resolvable(gap_SP),
                             (1.959964 + 0.841621) * np.sqrt(0.01 / 99), rtol=1e-5)


def test_pass_at_k_keeps_the_samples_of_a_problem_together():
  # With k = G a problem with one right sample has pass@8 = 1, however often it is drawn. The
  # resampled mean is then Binomial(50, 1/2) / 50. Resampling samples too would lose the right one
  # every third time.
  correct_PG = np.zeros((50, 8), int)
  correct_PG[:25, 0] = 1
  estimate, low, high = intervals.bootstrap(stats.mean_pass_at_k(8)(correct_PG), 0, 20_000)
  assert estimate == 0.5
  np.testing.assert_allclose([low, high], scipy.stats.binom(50, 0.5).ppf([0.025, 0.975]) / 50,
                             atol=0.021)


@pytest.mark.parametrize("value", [0, 1])
def test_a_rate_that_is_0_or_1_on_every_problem_has_the_exact_interval(value):
  # scipy's interval of a binomial rate with 10 trials; it was [0, 0], as if the rate were known.
  want = scipy.stats.binomtest(10 * value, 10).proportion_ci(0.95, "exact")
  assert (want.low, want.high) == pytest.approx((0, 0.308) if value == 0 else (0.692, 1), abs=1e-3)
  values = np.full((3, 10), float(value))
  for found in (intervals.bootstrap(values[0], 0, 100), intervals.over_seeds(values)):
    np.testing.assert_allclose(found, (value, want.low, want.high), rtol=1e-12)


def test_equal_values_allow_for_problems_of_other_values():
  # Of ten problems none differs, so of all at most 1 − 0.025^(1/10) = 0.3085 may.
  share = scipy.stats.binomtest(0, 10).proportion_ci(0.95, "exact").high
  for found in (intervals.bootstrap(np.full(10, 0.5), 0, 100),
                intervals.over_seeds(np.full((3, 10), 0.5))):
    np.testing.assert_allclose(found, (0.5, 0.5 - share / 2, 0.5 + share / 2), rtol=1e-12)
  # A difference is from −1 to 1: it was [0, 0], and [1, 1].
  zeros, ones = np.zeros(10), np.ones(10)
  np.testing.assert_allclose(intervals.paired_difference(zeros, zeros, 0, 100),
                             (0, -share, share), rtol=1e-12)
  np.testing.assert_allclose(intervals.paired_difference(ones, zeros, 0, 100),
                             (1, 1 - 2 * share, 1), rtol=1e-12)
  np.testing.assert_allclose(intervals.gap_over_seeds(np.zeros((3, 10))), (0, -share, share),
                             rtol=1e-12)
  # One problem says next to nothing, and a number of tokens has no largest value.
  np.testing.assert_allclose(intervals.bootstrap(np.ones(1), 0, 100), (1, 0.025, 1), rtol=1e-12)
  assert intervals.bootstrap(np.full(10, 7.0), 0, 100, bounds=(0, np.inf)) == (7, 7, 7)


def test_the_ends_stay_within_0_and_1():
  correct_PG = np.ones((10, 4), int)
  correct_PG[0, 0] = 0
  assert intervals.bootstrap(correct_PG.mean(axis=1), 0, 500).high == 1.0


def test_the_interval_depends_on_the_seed_and_hardly_on_chunks(monkeypatch):
  correct_PG = samples()
  first = intervals.bootstrap(correct_PG.mean(axis=1), 7, 2000)
  assert first == intervals.bootstrap(correct_PG.mean(axis=1), 7, 2000)
  assert first != intervals.bootstrap(correct_PG.mean(axis=1), 8, 2000)
  monkeypatch.setattr(intervals, "CHUNK", 3 * len(correct_PG))  # three draws at a time
  np.testing.assert_allclose(
      intervals.bootstrap(correct_PG.mean(axis=1), 7, 2000), first, atol=5e-3)


def test_pairing_removes_the_spread_of_the_problems_difficulty():
  # b is a with every problem's difficulty kept: the paired interval is far narrower than the two
  # intervals apart, and holds the closed-form width of the mean of differences.
  rng = np.random.default_rng(1)
  p_P1 = np.where(rng.random((200, 1)) < 0.5, 0.05, 0.95)
  a_PG, b_PG = (rng.random((2, 200, 8)) < p_P1).astype(int)
  estimate, low, high = intervals.paired_difference(a_PG.mean(axis=1), b_PG.mean(axis=1), 0, 20_000)
  gap_P = a_PG.mean(axis=1) - b_PG.mean(axis=1)
  np.testing.assert_allclose(estimate, gap_P.mean())
  np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(gap_P.var() / 200), rtol=0.03)
  alone = intervals.bootstrap(a_PG.mean(axis=1), 0, 2000)
  assert high - low < 0.5 * (alone.high - alone.low)


def test_swapped_arguments_swap_the_sign_of_a_difference():
  a_PG, b_PG = samples(seed=0), samples(seed=0) * (np.random.default_rng(2).random((200, 8)) < 0.5)
  a_P, b_P = a_PG.mean(axis=1), b_PG.mean(axis=1)
  ab = intervals.paired_difference(a_P, b_P, 0, 2000)
  ba = intervals.paired_difference(b_P, a_P, 0, 2000)
  np.testing.assert_allclose(ab.estimate, -ba.estimate)
  assert ab.low > 0 > ba.high


def test_a_difference_takes_other_numbers_of_samples_but_not_of_problems():
  interval = intervals.paired_difference(
      samples(G=8).mean(axis=1), samples(G=4).mean(axis=1), 0, 100)
  np.testing.assert_allclose(interval.estimate, samples(G=8).mean() - samples(G=4).mean())
  with pytest.raises(ValueError, match="got 200 and 150"):
    intervals.paired_difference(samples().mean(axis=1), samples(P=150).mean(axis=1), 0, 100)


def test_an_interval_of_no_problem_is_refused():
  with pytest.raises(ValueError, match="at least one problem"):
    intervals.bootstrap(np.zeros(0), 0, 10)


def test_the_bootstrap_takes_less_than_two_seconds():
  correct_PG = samples(300, 16)
  start = time.process_time()
  intervals.bootstrap(stats.mean_pass_at_k(8)(correct_PG), 0, 1000)
  assert time.process_time() - start < 2
