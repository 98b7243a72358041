"""Evaluation statistics: avg@k, pass@k, maj@k, and the mean length of a response.

correct_PG is 1 where sample g of problem p is right, else 0. A statistic turns it into one value
for each problem, value_P: an unbiased estimate of that problem's rate. A score is the mean over
problems, with an interval of s2d_jax/intervals.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from s2d_jax import intervals
from s2d_jax.errors import InputError
from s2d_jax.intervals import Interval

PerProblem = Callable[[np.ndarray], np.ndarray]  # correct_PG -> value_P


def pass_at_k(n: int | np.ndarray, c: int | np.ndarray, k: int) -> np.ndarray:
  """Unbiased estimate of the chance that at least one of k samples is right.

    pass@k = 1 − C(n − c, k) / C(n, k) = 1 − Π_{j<k} (n − c − j) / (n − j).

  Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1.

  Args:
    n: the number of samples; c: how many of them are right. The two broadcast.
    k: the number of samples of which one must be right.

  Raises:
    InputError: k is not in 1..n or c not in 0..n.
  """
  n = np.asarray(n)
  c = np.asarray(c)
  if k < 1 or np.any(k > n):
    raise InputError(f"pass@{k} needs 1 <= k <= n and n goes down to {n.min()}: draw more samples.")
  if np.any(c < 0) or np.any(c > n):
    raise InputError("pass@k was given more right samples than samples: count them again.")
  # A product of k ratios: binomial coefficients overflow at a thousand samples. Where fewer than k
  # samples are wrong one factor is 0, as C(n − c, k) is.
  miss = np.ones(np.broadcast_shapes(n.shape, c.shape))
  for j in range(k):
    miss = miss * np.maximum(n - c - j, 0) / (n - j)
  return 1 - miss


def avg_at_k(correct_PG: np.ndarray) -> np.ndarray:
  """The statistic avg@k: the share of right samples of each problem."""
  return np.mean(correct_PG, axis=-1)


def mean_pass_at_k(k: int) -> PerProblem:
  """Returns the statistic pass@k, `pass_at_k` of each problem."""
  def statistic(correct_PG: np.ndarray) -> np.ndarray:
    correct_PG = np.asarray(correct_PG)
    return pass_at_k(correct_PG.shape[-1], correct_PG.sum(axis=-1), k)
  return statistic


class Samples(NamedTuple):
  """G samples of each of P problems, all of one model and one way of sampling."""
  correct_PG: np.ndarray                   # 1 where the sample is right, else 0
  length_PG: np.ndarray | None = None      # tokens of the response
  truncated_PG: np.ndarray | None = None   # 1 where max_tokens ended the response, else 0
  answer_PG: np.ndarray | None = None      # equal answers of a problem have equal numbers; -1: none


class Statistic(NamedTuple):
  """One way to turn the samples of a problem into one number."""
  per_problem: Callable[[Samples, int], np.ndarray]   # (samples, k) -> value_P
  k: str = "none"          # "none", "all": the number of samples, or "each": of the config's ks
  least_k: int = 1         # smaller ks say nothing new
  reads: str = "correct_PG"  # the field of Samples; a score without it lacks the statistic
  of: str = "sampled"      # "sampled" as the config says, or "greedy": one sample at temperature 0
  unit: str = "rate"       # "rate", from 0 to 1, or "tokens"
  label: str = ""          # in a report; the name where it is empty


def majority(answer_PG: np.ndarray, correct_PG: np.ndarray, k: int) -> np.ndarray:
  """maj@k of each problem: the chance that the most frequent answer of k samples is right, [P].

  The mean over the G // k disjoint groups of k samples, in order. Of answers with equally many
  votes each is taken equally often. A sample without an answer has no vote.

  Wang et al. 2022, https://arxiv.org/abs/2203.11171.

  Args:
    answer_PG: equal answers of a problem have equal numbers; -1 where a sample has none.
    correct_PG: 1 where the sample is right, else 0.
  """
  P, G = answer_PG.shape
  groups = G // k
  value_PN = np.zeros((P, groups))
  for p in range(P):
    for n in range(groups):
      part = slice(n * k, (n + 1) * k)
      answer_K = answer_PG[p, part]
      votes_K = np.sum(answer_K[:, None] == answer_K, axis=1) * (answer_K >= 0)
      # Samples of a winning answer are equally many, so their mean is the mean over a tie.
      if votes_K.max() > 0:
        value_PN[p, n] = correct_PG[p, part][votes_K == votes_K.max()].mean()
  return value_PN.mean(axis=1)


# Every statistic by its name, in the order of a report's columns. The name of a score is this name,
# with "@" and k where the statistic has a k.
STATISTICS = {
    "greedy": Statistic(lambda samples, k: avg_at_k(samples.correct_PG), of="greedy"),
    "avg": Statistic(lambda samples, k: avg_at_k(samples.correct_PG), k="all"),
    "pass": Statistic(lambda samples, k: mean_pass_at_k(k)(samples.correct_PG), k="each"),
    "maj": Statistic(lambda samples, k: majority(samples.answer_PG, samples.correct_PG, k),
                     k="each", least_k=2, reads="answer_PG"),
    "truncated": Statistic(lambda samples, k: np.mean(samples.truncated_PG, axis=1),
                           reads="truncated_PG"),
    # The share of samples from which an answer could be read, right or wrong.
    "format": Statistic(lambda samples, k: np.mean(samples.answer_PG >= 0, axis=1),
                        reads="answer_PG"),
    "response_length": Statistic(lambda samples, k: np.mean(samples.length_PG, axis=1),
                                 reads="length_PG", unit="tokens", label="response tokens"),
}
# The statistic that differences, curves and bars show: a rate, of all samples of a problem.
HEADLINE = "avg"


def statistic(name: str) -> tuple[Statistic, int]:
  """The Statistic of a score's name, and its k, 0 where it has none: "pass@4" -> (pass, 4).

  Raises:
    InputError: the table has no such statistic.
  """
  kind, _, k = name.partition("@")
  if kind not in STATISTICS:
    raise InputError(f"there is no statistic {name!r}: choose from {', '.join(STATISTICS)}.")
  return STATISTICS[kind], int(k or 0)


def names(samples: Mapping[str, Samples], ks: Sequence[int],
          kinds: Iterable[str] = tuple(STATISTICS)) -> list[str]:
  """The scores that these samples have, by name, in the table's order.

  Args:
    samples: by way of sampling, as `Statistic.of`; ks: of the statistics that have several.
    kinds: statistics; others are left out.
  """
  found = []
  for kind, entry in STATISTICS.items():
    if kind in kinds and computable(kind, samples):
      all_samples = samples[entry.of].correct_PG.shape[1]
      found += [f"{kind}@{k}" if k else kind for k in chosen_ks(entry, ks, all_samples)]
  return found


def chosen_ks(entry: Statistic, ks: Sequence[int], samples: int = 1) -> list[int]:
  """The k of each score of a statistic, from a config's ks; [0] for a statistic without a k."""
  if entry.k == "none":
    return [0]
  return [k for k in (ks if entry.k == "each" else (samples,)) if k >= entry.least_k]


def computable(name: str, samples: Mapping[str, Samples]) -> bool:
  """Whether the samples have what a score is computed from; those of an older run may not."""
  entry, _ = statistic(name)
  return entry.of in samples and getattr(samples[entry.of], entry.reads) is not None


def ordered(found: Iterable[str]) -> list[str]:
  """The names of scores in the table's order, then by k."""
  table = list(STATISTICS.values())

  def table_order(name: str) -> tuple[int, int]:
    entry, k = statistic(name)
    return table.index(entry), k

  return sorted(found, key=table_order)


def headline(found: Iterable[str]) -> str:
  """The one of some scores' names that is the headline's."""
  return next(name for name in found if statistic(name)[0] is STATISTICS[HEADLINE])


def value_P(name: str, samples: Mapping[str, Samples]) -> np.ndarray:
  """A statistic of each problem, [P]."""
  entry, k = statistic(name)
  return entry.per_problem(samples[entry.of], k)


def score(name: str, samples: Mapping[str, Samples], seed: int, draws: int,
          level: float = 0.95) -> Interval:
  """A statistic's mean over problems with its interval.

  Args:
    seed, draws, level: of the bootstrap.
  """
  bounds = (0.0, 1.0 if statistic(name)[0].unit == "rate" else np.inf)
  return intervals.bootstrap(value_P(name, samples), seed, draws, level, bounds)


def score_over_seeds(name: str, value_SP: np.ndarray, level: float = 0.95) -> Interval:
  """A statistic's mean with its interval over seeds."""
  if statistic(name)[0].unit == "rate":
    return intervals.over_seeds(value_SP, level)
  return intervals.count_over_seeds(value_SP, level)
