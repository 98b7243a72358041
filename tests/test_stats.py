"""pass@k against brute force; intervals against closed forms, coverage and the clock."""

import functools
import itertools
import time

import numpy as np
import pytest
import scipy.special
import scipy.stats

from s2d_jax import stats


def test_pass_at_k_by_hand():
  # 4 samples, 1 right, k = 2: of the 6 pairs 3 hold it. 4 samples, 2 right: 5 of 6.
  np.testing.assert_allclose(stats.pass_at_k(4, [0, 1, 2, 3, 4], 2), [0, 1 / 2, 5 / 6, 1, 1])


@pytest.mark.parametrize("n, k", [(1, 1), (5, 1), (5, 3), (6, 6)])
def test_pass_at_k_equals_counting_every_subset(n, k):
  for c in range(n + 1):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    np.testing.assert_allclose(stats.pass_at_k(n, c, k), np.mean([any(s) for s in subsets]))


def test_pass_at_k_is_unbiased():
  # Over c ~ Binomial(8, p) it averages to 1 − (1 − p)^k.
  p, n, k = 0.3, 8, 4
  c_N = np.random.default_rng(0).binomial(n, p, size=200_000)
  value_N = stats.pass_at_k(n, c_N, k)
  error = value_N.std() / np.sqrt(len(value_N))
  assert abs(value_N.mean() - (1 - (1 - p) ** k)) < 4 * error


def test_pass_at_k_broadcasts_and_survives_large_counts():
  assert stats.pass_at_k(np.array([4, 10_000]), np.array([[1], [2]]), 3).shape == (2, 2)
  np.testing.assert_allclose(stats.pass_at_k(10_000, 1, 100), 0.01, rtol=1e-9)  # k/n for c = 1


@pytest.mark.parametrize("n, c, k", [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
  with pytest.raises(ValueError):
    stats.pass_at_k(n, c, k)


def test_avg_and_pass_statistics_by_hand():
  correct_PG = np.array([[1, 0, 0, 0], [1, 1, 0, 0]])
  np.testing.assert_allclose(stats.avg_at_k(correct_PG), [1 / 4, 1 / 2])
  np.testing.assert_allclose(stats.mean_pass_at_k(2)(correct_PG), [1 / 2, 5 / 6])
  np.testing.assert_allclose(stats.mean_pass_at_k(1)(correct_PG), [1 / 4, 1 / 2])  # pass@1 = avg@k


def samples(P=200, G=8, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.random((P, G)) < rng.beta(1, 2, size=(P, 1))).astype(np.int64)


def test_the_bootstrap_interval_of_the_mean_has_its_closed_form_width():
  # The mean of 200 resampled problems' shares has variance Var_p(c/G) / P and is normal: ± 1.96
  # standard deviations at 95 %.
  correct_PG = samples()
  variance = correct_PG.mean(axis=1).var() / 200
  estimate, low, high = stats.nested_bootstrap(correct_PG, stats.avg_at_k, seed=0, draws=20_000)
  np.testing.assert_allclose(estimate, correct_PG.mean())
  np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(variance), rtol=0.03)
  np.testing.assert_allclose((high + low) / 2, estimate, atol=2e-3)
  _, low80, high80 = stats.nested_bootstrap(correct_PG, stats.avg_at_k, 0, 20_000, level=0.8)
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
    _, low, high = stats.nested_bootstrap(correct_PG, stats.avg_at_k, seed, 300)
    held += low <= truth(world) <= high
  assert 0.93 <= held / 2000 <= 0.97, held / 2000


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("P", [100, 512])
def test_coverage_of_the_interval_over_three_seeds(name, P):
  rng, held, want = np.random.default_rng(7), 0, truth(WORLDS[name])
  for _ in range(2000):
    _, low, high = stats.over_seeds(simulate(WORLDS[name], rng, 3, P, 16))
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
    _, low, high = stats.gap_over_seeds(a - b)
    held += low <= want <= high
  assert 0.93 <= held / 2000 <= 0.97, held / 2000


def test_coverage_is_lower_where_the_spread_of_seeds_dominates_near_1():
  # Three draws of a skewed spread say too little of it: 92 to 94 % in place of 95.
  rng, held = np.random.default_rng(7), 0
  for _ in range(2000):
    _, low, high = stats.over_seeds(simulate(SKEWED, rng, 3, 512, 16))
    held += low <= truth(SKEWED) <= high
  assert 0.91 <= held / 2000 <= 0.95, held / 2000


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


def test_over_seeds_by_hand():
  # Seeds alone: 0.3, 0.4, 0.5 on every problem. Var_s = 0.01, so h = 4.3027·√(0.01/3); for a rate
  # the ends are at logit(0.4) ± h / 0.24.
  seeds_only = np.repeat([[0.3], [0.4], [0.5]], 50, axis=1)
  half = 4.30265 * np.sqrt(0.01 / 3)
  np.testing.assert_allclose(stats.gap_over_seeds(seeds_only), [0.4, 0.4 - half, 0.4 + half],
                             rtol=1e-5)
  odds = 2 / 3 * np.exp([-half / 0.24, half / 0.24])
  np.testing.assert_allclose(stats.over_seeds(seeds_only), [0.4, *odds / (1 + odds)], rtol=1e-5)
  # Problems alone: half at 0, half at 1, the same for every seed: h = 1.96·√(Var_p/P).
  problems_only = np.tile(np.arange(100) % 2, (3, 1)).astype(float)
  half = 1.959964 * np.sqrt(0.25 * 100 / 99 / 100)
  np.testing.assert_allclose(stats.gap_over_seeds(problems_only), [0.5, 0.5 - half, 0.5 + half],
                             rtol=1e-5)


def test_a_gap_over_seeds_is_the_t_interval_where_problems_do_not_vary():
  # SciPy's own one-sample t interval, with the rest of the variance gone.
  seed_S = np.array([0.3, 0.35, 0.5, 0.41])
  want = scipy.stats.ttest_1samp(seed_S, 0).confidence_interval(0.9)
  got = stats.gap_over_seeds(np.repeat(seed_S[:, None], 9, axis=1), level=0.9)
  np.testing.assert_allclose(got[1:], want)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_seeds_give_an_interval_of_width_0(value):
  assert stats.over_seeds(np.full((3, 10), value)) == (value, value, value)


@pytest.mark.parametrize("shape", [(1, 10), (3, 1), (6,)])
def test_an_interval_over_one_seed_is_refused(shape):
  with pytest.raises(ValueError, match="at least two training seeds"):
    stats.over_seeds(np.zeros(shape))


@pytest.mark.parametrize("name", ["problems differ", "seeds rule"])
def test_a_resolvable_difference_is_found_with_the_stated_power(name):
  # Three seeds: shift their differences from the truth by what is resolvable under the variance
  # that many such experiments show on average.
  world, rng = WORLDS[name], np.random.default_rng(1)
  sizes = [stats.resolvable(simulate(world, rng, 3, 100, 8)) for _ in range(400)]
  size = np.sqrt(np.mean(np.square(sizes)))
  found = sum(stats.gap_over_seeds(simulate(world, rng, 3, 100, 8) - truth(world) + size).low > 0
              for _ in range(2000))
  assert 0.75 < found / 2000 < 0.85, found / 2000


def test_the_resolvable_difference_of_one_seed_by_hand():
  # Half of 100 differences at 0.2: Var = 0.01·100/99, so (1.96 + 0.84)·√(Var/100).
  gap_SP = np.tile([[0.0, 0.2]], (1, 50))
  np.testing.assert_allclose(stats.resolvable(gap_SP),
                             (1.959964 + 0.841621) * np.sqrt(0.01 / 99), rtol=1e-5)


def test_pass_at_k_keeps_the_samples_of_a_problem_together():
  # With k = G a problem with one right sample has pass@8 = 1, however often it is drawn. The
  # resampled mean is then Binomial(50, 1/2) / 50. Resampling samples too would lose the right one
  # every third time.
  correct_PG = np.zeros((50, 8), int)
  correct_PG[:25, 0] = 1
  estimate, low, high = stats.nested_bootstrap(correct_PG, stats.mean_pass_at_k(8), 0, 20_000)
  assert estimate == 0.5
  np.testing.assert_allclose([low, high], scipy.stats.binom(50, 0.5).ppf([0.025, 0.975]) / 50,
                             atol=0.021)


@pytest.mark.parametrize("value", [0, 1])
def test_equal_results_give_an_interval_of_width_0(value):
  interval = stats.nested_bootstrap(np.full((10, 4), value), stats.avg_at_k, 0, 100)
  assert interval == (value, value, value)


def test_the_ends_stay_within_0_and_1():
  correct_PG = np.ones((10, 4), int)
  correct_PG[0, 0] = 0
  assert stats.nested_bootstrap(correct_PG, stats.avg_at_k, 0, 500).high == 1.0


def test_the_interval_depends_on_the_seed_and_hardly_on_chunks(monkeypatch):
  correct_PG = samples()
  first = stats.nested_bootstrap(correct_PG, stats.avg_at_k, 7, 2000)
  assert first == stats.nested_bootstrap(correct_PG, stats.avg_at_k, 7, 2000)
  assert first != stats.nested_bootstrap(correct_PG, stats.avg_at_k, 8, 2000)
  monkeypatch.setattr(stats, "CHUNK", 3 * len(correct_PG))  # three draws at a time
  np.testing.assert_allclose(
      stats.nested_bootstrap(correct_PG, stats.avg_at_k, 7, 2000), first, atol=5e-3)


def test_pairing_removes_the_spread_of_the_problems_difficulty():
  # b is a with every problem's difficulty kept: the paired interval is far narrower than the two
  # intervals apart, and holds the closed-form width of the mean of differences.
  rng = np.random.default_rng(1)
  p_P1 = np.where(rng.random((200, 1)) < 0.5, 0.05, 0.95)
  a_PG, b_PG = (rng.random((2, 200, 8)) < p_P1).astype(int)
  estimate, low, high = stats.paired_difference(a_PG.mean(axis=1), b_PG.mean(axis=1), 0, 20_000)
  gap_P = a_PG.mean(axis=1) - b_PG.mean(axis=1)
  np.testing.assert_allclose(estimate, gap_P.mean())
  np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(gap_P.var() / 200), rtol=0.03)
  alone = stats.nested_bootstrap(a_PG, stats.avg_at_k, 0, 2000)
  assert high - low < 0.5 * (alone.high - alone.low)


def test_swapped_arguments_swap_the_sign_of_a_difference():
  a_PG, b_PG = samples(seed=0), samples(seed=0) * (np.random.default_rng(2).random((200, 8)) < 0.5)
  a_P, b_P = a_PG.mean(axis=1), b_PG.mean(axis=1)
  ab = stats.paired_difference(a_P, b_P, 0, 2000)
  ba = stats.paired_difference(b_P, a_P, 0, 2000)
  np.testing.assert_allclose(ab.estimate, -ba.estimate)
  assert ab.low > 0 > ba.high


def test_a_difference_takes_other_numbers_of_samples_but_not_of_problems():
  interval = stats.paired_difference(
      samples(G=8).mean(axis=1), samples(G=4).mean(axis=1), 0, 100)
  np.testing.assert_allclose(interval.estimate, samples(G=8).mean() - samples(G=4).mean())
  with pytest.raises(ValueError, match="got 200 and 150"):
    stats.paired_difference(samples().mean(axis=1), samples(P=150).mean(axis=1), 0, 100)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_an_empty_matrix_is_refused(shape):
  with pytest.raises(ValueError, match="problems × samples"):
    stats.nested_bootstrap(np.zeros(shape), stats.avg_at_k, 0, 10)


def test_the_bootstrap_takes_less_than_two_seconds():
  correct_PG = samples(300, 16)
  start = time.process_time()
  stats.nested_bootstrap(correct_PG, stats.mean_pass_at_k(8), 0, 1000)
  assert time.process_time() - start < 2


def test_majority_by_hand():
  answer_PG = np.array([[0, 0, 2, 3], [0, 1, 1, 0], [-1, -1, -1, 3], [-1, -1, -1, -1]])
  correct_PG = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
  # All four: the most frequent answer is right; a tie of a right and a wrong one; one vote; none.
  np.testing.assert_allclose(stats.majority(answer_PG, correct_PG, 4), [1, 1 / 2, 1, 0])
  # Two groups of two: right and a tie of wrong ones; two ties; no vote and one; no vote.
  np.testing.assert_allclose(stats.majority(answer_PG, correct_PG, 2), [1 / 2, 1 / 2, 1 / 2, 0])
  # One group of three, the last sample left out.
  np.testing.assert_allclose(stats.majority(answer_PG, correct_PG, 3), [1, 0, 0, 0])


def test_scores_are_named_and_ordered_by_the_table():
  one = stats.Samples(np.ones((3, 4)), np.full((3, 4), 7), np.zeros((3, 4)),
                      np.zeros((3, 4), int))
  names = stats.names({"sampled": one, "greedy": stats.Samples(np.ones((3, 1)))}, (1, 4))
  assert names == ["greedy", "avg@4", "pass@1", "pass@4", "maj@4", "truncated", "format",
                   "response_length"]
  assert stats.ordered(["response_length", "pass@16", "maj@4", "pass@4", "avg@4", "greedy"]) == [
      "greedy", "avg@4", "pass@4", "pass@16", "maj@4", "response_length"]
  assert stats.headline(names) == "avg@4"
  # Without answers, lengths and a greedy sample their statistics are absent.
  assert stats.names({"sampled": stats.Samples(np.ones((3, 4)))}, (2,)) == ["avg@4", "pass@2"]


def test_each_statistic_is_its_own():
  # Two of three samples right, with one answer; pass@3 would be 1 and is not maj@2's value.
  samples = {"sampled": stats.Samples(np.array([[0, 1, 1]]), np.array([[4, 5, 9]]),
                                      np.array([[0, 0, 1]]), np.array([[0, 1, 1]]))}
  values = {name: float(stats.value_P(name, samples)[0])
            for name in ("avg@3", "pass@2", "maj@2", "truncated", "format", "response_length")}
  assert values == pytest.approx({"avg@3": 2 / 3, "pass@2": 1, "maj@2": 1 / 2, "truncated": 1 / 3,
                                  "format": 1, "response_length": 6})
  # Of four samples two have an answer, and a wrong one counts.
  some = stats.Samples(np.zeros((2, 2)), answer_PG=np.array([[0, -1], [-1, 1]]))
  assert stats.value_P("format", {"sampled": some}).tolist() == [0.5, 0.5]
  with pytest.raises(ValueError, match="there is no statistic 'best@2': choose from greedy, avg,"):
    stats.value_P("best@2", samples)


def test_a_length_has_an_interval_in_tokens():
  length_PG = np.random.default_rng(0).integers(1, 100, (50, 2))
  samples = {"sampled": stats.Samples(np.zeros((50, 2)), length_PG)}
  found = stats.score("response_length", samples, 0, 500)
  assert found.estimate == pytest.approx(length_PG.mean())
  # The standard error of the mean over problems, about it on both sides.
  error = length_PG.mean(axis=1).std(ddof=1) / 50**0.5
  assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
  value_SP = np.stack([length_PG[:, 0], length_PG[:, 1]]).astype(float)
  pooled = stats.score_over_seeds("response_length", value_SP)
  assert pooled.estimate == pytest.approx(length_PG.mean())
  assert pooled.high - pooled.estimate == pytest.approx(pooled.estimate - pooled.low) and \
      pooled.high > 1
