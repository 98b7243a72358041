"""Statistics of scores: pass@k against brute force, the others by hand."""

import itertools

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
  np.testing.assert_allclose(stats.avg_at_k(correct_PG), [1 / 4, 1 / 2])
  np.testing.assert_allclose(stats.mean_pass_at_k(2)(correct_PG), [1 / 2, 5 / 6])
  np.testing.assert_allclose(stats.mean_pass_at_k(1)(correct_PG), [1 / 4, 1 / 2])  # pass@1 = avg@k


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
