"""pass@k against brute force; intervals against closed forms, coverage and the clock."""

import itertools
import time

import numpy as np
import pytest
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


def test_the_interval_of_the_mean_has_its_closed_form_width():
  # A draw's mean of 200 problems' shares has variance Var_p(c/G) / P and is normal: ± 1.96 standard
  # deviations at 95 %.
  correct_PG = samples()
  variance = correct_PG.mean(axis=1).var() / 200
  estimate, low, high = stats.nested_bootstrap(correct_PG, stats.avg_at_k, seed=0, draws=20_000)
  np.testing.assert_allclose(estimate, correct_PG.mean())
  np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(variance), rtol=0.03)
  np.testing.assert_allclose((high + low) / 2, estimate, atol=2e-3)
  _, low80, high80 = stats.nested_bootstrap(correct_PG, stats.avg_at_k, 0, 20_000, level=0.8)
  np.testing.assert_allclose(high80 - low80, 2 * 1.2816 * np.sqrt(variance), rtol=0.03)


# Worlds of known truth, as (spread of seeds, of problems, of their interaction): the logits of
# success are sums of normal terms. The last two are differences of arms, where pairing has taken
# the problems' spread away.
WORLDS = {"problems differ": (0.0, 2.0, 0.0), "problems and seeds": (0.15, 2.0, 0.5),
          "seeds rule": (0.6, 1.0, 0.5), "only samples": (0.0, 0.0, 0.0),
          "a little of all": (0.05, 0.3, 0.3)}


def world(spread, rng, S, P, G):
  """value_SP of one simulated experiment: the share of right among G samples."""
  seeds, problems, both = spread
  logit_SP = (seeds * rng.normal(size=(S, 1)) + problems * rng.normal(size=(1, P))
              + both * rng.normal(size=(S, P)))
  return rng.binomial(G, 1 / (1 + np.exp(-logit_SP))) / G  # symmetric, so the truth is 1/2


@pytest.mark.parametrize("G", [1, 4, 16])
@pytest.mark.parametrize("name", ["problems differ", "only samples", "a little of all"])
def test_the_interval_over_problems_and_samples_covers(name, G):
  # 2,000 data sets of one training seed and 200 problems; the seed is as it is.
  rng, held = np.random.default_rng(0), 0
  spread = (0.0, *WORLDS[name][1:])
  for seed in range(2000):
    right_P = np.rint(world(spread, rng, 1, 200, G)[0] * G).astype(int)
    correct_PG = (np.arange(G) < right_P[:, None]).astype(int)
    _, low, high = stats.nested_bootstrap(correct_PG, stats.avg_at_k, seed, 400)
    held += low <= 0.5 <= high
  assert 0.93 <= held / 2000 <= 0.97, held / 2000


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("P", [100, 512])
def test_the_interval_over_three_training_seeds_covers(name, P):
  rng, held = np.random.default_rng(0), 0
  for _ in range(2000):
    _, low, high = stats.over_seeds(world(WORLDS[name], rng, 3, P, 16))
    held += low <= 0.5 <= high
  assert 0.93 <= held / 2000 <= 0.97, held / 2000


def test_a_plain_bootstrap_of_three_seeds_does_not_cover():
  # The same worlds; seeds and problems both drawn anew, percentiles taken: what is usually done.
  rng, held = np.random.default_rng(0), 0
  for _ in range(500):
    value_SP = world(WORLDS["seeds rule"], rng, 3, 100, 16)
    drawn = [value_SP[np.ix_(rng.integers(3, size=3), rng.integers(100, size=100))].mean()
             for _ in range(200)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    held += low <= 0.5 <= high
  assert held / 500 < 0.85, held / 500


def test_over_seeds_by_hand():
  # Seeds alone: 0.3, 0.4, 0.5 on every problem. Var_s = 0.01, so 0.4 ± 4.3027·√(0.01/3).
  seeds_only = np.repeat([[0.3], [0.4], [0.5]], 50, axis=1)
  half = 4.30265 * np.sqrt(0.01 / 3)
  np.testing.assert_allclose(stats.over_seeds(seeds_only), [0.4, 0.4 - half, 0.4 + half],
                             rtol=1e-5)
  # Problems alone: half at 0, half at 1, the same for every seed: 0.5 ± 1.96·√(Var_p/P).
  problems_only = np.tile(np.arange(100) % 2, (3, 1)).astype(float)
  half = 1.959964 * np.sqrt(0.25 * 100 / 99 / 100)
  np.testing.assert_allclose(stats.over_seeds(problems_only), [0.5, 0.5 - half, 0.5 + half],
                             rtol=1e-5)


def test_over_seeds_is_the_t_interval_of_the_seeds_where_problems_do_not_vary():
  # SciPy's own one-sample t interval, with the rest of the variance gone.
  seed_S = np.array([0.3, 0.35, 0.5, 0.41])
  want = scipy.stats.ttest_1samp(seed_S, 0).confidence_interval(0.9)
  got = stats.over_seeds(np.repeat(seed_S[:, None], 9, axis=1), level=0.9)
  np.testing.assert_allclose(got[1:], want)


@pytest.mark.parametrize("shape", [(1, 10), (3, 1), (6,)])
def test_one_training_seed_has_no_spread_between_seeds(shape):
  with pytest.raises(ValueError, match="at least two training seeds"):
    stats.over_seeds(np.zeros(shape))


def test_a_resolvable_difference_is_found_as_often_as_promised():
  # Differences of three seeds with the seeds' own spread: shift them by what is called resolvable.
  spread = WORLDS["problems differ"]
  rng = np.random.default_rng(1)
  size = np.mean([stats.resolvable(world(spread, rng, 3, 100, 8)) for _ in range(200)])
  found = sum(stats.over_seeds(world(spread, rng, 3, 100, 8) - 0.5 + size, bounds=(-1, 1)).low > 0
              for _ in range(1000))
  assert 0.75 < found / 1000 < 0.85
  one = np.mean([stats.resolvable(world(spread, rng, 1, 100, 8)) for _ in range(200)])
  assert one > size  # fewer samples in all


def test_pass_at_k_keeps_the_samples_of_a_problem_together():
  # With k = G a problem with one right sample has pass@8 = 1, however often it is drawn: a draw is
  # then Binomial(50, 1/2) / 50. Samples drawn anew would lose the right one every third time.
  correct_PG = np.zeros((50, 8), int)
  correct_PG[:25, 0] = 1
  estimate, low, high = stats.nested_bootstrap(correct_PG, stats.mean_pass_at_k(8), 0, 20_000)
  assert estimate == 0.5
  np.testing.assert_allclose([low, high], scipy.stats.binom(50, 0.5).ppf([0.025, 0.975]) / 50,
                             atol=0.021)


@pytest.mark.parametrize("value", [0, 1])
def test_certain_results_have_no_width(value):
  interval = stats.nested_bootstrap(np.full((10, 4), value), stats.avg_at_k, 0, 100)
  assert interval == (value, value, value)


def test_the_ends_are_rates():
  correct_PG = np.ones((10, 4), int)
  correct_PG[0, 0] = 0
  assert stats.nested_bootstrap(correct_PG, stats.avg_at_k, 0, 500).high == 1.0


def test_the_seed_decides_and_chunks_do_not_change_the_kind_of_answer(monkeypatch):
  correct_PG = samples()
  first = stats.nested_bootstrap(correct_PG, stats.avg_at_k, 7, 2000)
  assert first == stats.nested_bootstrap(correct_PG, stats.avg_at_k, 7, 2000)
  assert first != stats.nested_bootstrap(correct_PG, stats.avg_at_k, 8, 2000)
  monkeypatch.setattr(stats, "CHUNK", 3 * len(correct_PG))  # three draws at a time
  np.testing.assert_allclose(
      stats.nested_bootstrap(correct_PG, stats.avg_at_k, 7, 2000), first, atol=5e-3)


def test_pairing_removes_what_the_problems_share():
  # b is a with every problem's difficulty kept: the paired interval is far narrower than the two
  # intervals apart, and holds the closed-form width of the mean of differences.
  rng = np.random.default_rng(1)
  p_P1 = np.where(rng.random((200, 1)) < 0.5, 0.05, 0.95)
  a_PG, b_PG = (rng.random((2, 200, 8)) < p_P1).astype(int)
  estimate, low, high = stats.paired_difference(a_PG, b_PG, stats.avg_at_k, 0, 20_000)
  gap_P = a_PG.mean(axis=1) - b_PG.mean(axis=1)
  np.testing.assert_allclose(estimate, gap_P.mean())
  np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(gap_P.var() / 200), rtol=0.03)
  alone = stats.nested_bootstrap(a_PG, stats.avg_at_k, 0, 2000)
  assert high - low < 0.5 * (alone.high - alone.low)


def test_a_difference_turns_its_sign_with_its_arguments_and_sees_a_real_gap():
  a_PG, b_PG = samples(seed=0), samples(seed=0) * (np.random.default_rng(2).random((200, 8)) < 0.5)
  ab = stats.paired_difference(a_PG, b_PG, stats.avg_at_k, 0, 2000)
  ba = stats.paired_difference(b_PG, a_PG, stats.avg_at_k, 0, 2000)
  np.testing.assert_allclose(ab.estimate, -ba.estimate)
  assert ab.low > 0 > ba.high


def test_numbers_of_samples_may_differ_but_problems_may_not():
  interval = stats.paired_difference(samples(G=8), samples(G=4), stats.avg_at_k, 0, 100)
  np.testing.assert_allclose(interval.estimate, samples(G=8).mean() - samples(G=4).mean())
  with pytest.raises(ValueError, match="got 200 and 150"):
    stats.paired_difference(samples(), samples(P=150), stats.avg_at_k, 0, 100)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_nothing_to_resample_is_refused(shape):
  with pytest.raises(ValueError, match="problems × samples"):
    stats.nested_bootstrap(np.zeros(shape), stats.avg_at_k, 0, 10)


def test_it_is_fast():
  correct_PG = samples(300, 16)
  start = time.process_time()
  stats.nested_bootstrap(correct_PG, stats.mean_pass_at_k(8), 0, 1000)
  assert time.process_time() - start < 2
