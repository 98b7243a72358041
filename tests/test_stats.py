"""pass@k against brute force; intervals against closed forms, coverage and the clock."""

import itertools
import time

import numpy as np
import pytest

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
  assert stats.avg_at_k(correct_PG) == 3 / 8
  np.testing.assert_allclose(stats.mean_pass_at_k(2)(correct_PG), (1 / 2 + 5 / 6) / 2)
  assert stats.mean_pass_at_k(1)(correct_PG) == 3 / 8  # pass@1 is avg@k
  stack = np.stack([correct_PG, 1 - correct_PG])  # leading axes are kept
  np.testing.assert_allclose(stats.avg_at_k(stack), [3 / 8, 5 / 8])
  assert stats.mean_pass_at_k(2)(stack).shape == (2,)


def samples(P=200, G=8, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.random((P, G)) < rng.beta(1, 2, size=(P, 1))).astype(np.int64)


def test_the_interval_of_the_mean_has_its_closed_form_width():
  # Given the data, a draw's mean has variance [Var_p(c/G) + mean_p(c/G·(1 − c/G))/G] / P, and for
  # 200 problems it is normal: ± 1.96 standard deviations at 95 %.
  correct_PG = samples()
  share_P = correct_PG.mean(axis=1)
  variance = (share_P.var() + (share_P * (1 - share_P)).mean() / 8) / 200
  estimate, low, high = stats.nested_bootstrap(correct_PG, stats.avg_at_k, seed=0, draws=20_000)
  np.testing.assert_allclose(estimate, correct_PG.mean())
  np.testing.assert_allclose(high - low, 2 * 1.96 * np.sqrt(variance), rtol=0.03)
  np.testing.assert_allclose((high + low) / 2, estimate, atol=2e-3)
  _, low80, high80 = stats.nested_bootstrap(correct_PG, stats.avg_at_k, 0, 20_000, level=0.8)
  np.testing.assert_allclose(high80 - low80, 2 * 1.2816 * np.sqrt(variance), rtol=0.03)


def test_the_interval_covers_the_truth():
  # 300 worlds of 40 problems × 4 samples whose true rate is 1/3: nested intervals err on the wide
  # side, so at least 93 % of them hold it (three binomial errors under 95 % is 91 %).
  held = 0
  for seed in range(300):
    _, low, high = stats.nested_bootstrap(samples(40, 4, seed), stats.avg_at_k, seed, 300)
    held += low <= 1 / 3 <= high
  assert held / 300 > 0.93


def test_pass_at_k_stays_inside_its_interval():
  # With k = G every repeated sample lowers a resampled pass@k; the estimate must not fall outside.
  correct_PG = np.zeros((50, 8), int)
  correct_PG[:25, 0] = 1
  estimate, low, high = stats.nested_bootstrap(correct_PG, stats.mean_pass_at_k(8), 0, 2000)
  assert estimate == 0.5
  assert low < estimate < high


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
  monkeypatch.setattr(stats, "CHUNK", 3 * correct_PG.size)  # three draws at a time
  np.testing.assert_allclose(
      stats.nested_bootstrap(correct_PG, stats.avg_at_k, 7, 2000), first, atol=5e-3)


def test_pairing_removes_what_the_problems_share():
  # b is a with every problem's difficulty kept: the paired interval is far narrower than the two
  # intervals apart, and holds the closed-form width of the mean of differences.
  rng = np.random.default_rng(1)
  p_P1 = np.where(rng.random((200, 1)) < 0.5, 0.05, 0.95)
  a_PG, b_PG = (rng.random((2, 200, 8)) < p_P1).astype(int)
  estimate, low, high = stats.paired_difference(a_PG, b_PG, stats.avg_at_k, 0, 20_000)
  a_P, b_P = a_PG.mean(axis=1), b_PG.mean(axis=1)
  within = (a_P * (1 - a_P) + b_P * (1 - b_P)).mean() / 8
  np.testing.assert_allclose(estimate, (a_P - b_P).mean())
  np.testing.assert_allclose(
      high - low, 2 * 1.96 * np.sqrt(((a_P - b_P).var() + within) / 200), rtol=0.03)
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
