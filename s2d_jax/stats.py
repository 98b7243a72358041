"""Evaluation statistics and their confidence intervals: pass@k, avg@k, intervals over seeds.

correct_PG is 1 where sample g of problem p is right, else 0. A statistic turns it into one value
for each problem, value_P: an unbiased estimate of that problem's rate. A score is the mean over
problems.

The interval of one training seed is a bootstrap over problems with their samples nested in them
(`nested_bootstrap`). The interval of several seeds adds the spread between seeds (`over_seeds`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from s2d_jax.errors import InputError

CHUNK = 1 << 24  # resampled values held at once: 128 MB

PerProblem = Callable[[np.ndarray], np.ndarray]  # correct_PG -> value_P


class Interval(NamedTuple):
  """An estimate and the two ends of its confidence interval."""
  estimate: float
  low: float
  high: float


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


def nested_bootstrap(correct_PG: np.ndarray, statistic: PerProblem, seed: int, draws: int,
                     level: float = 0.95) -> Interval:
  """Interval of a score over the choice of problems and of samples, by a bootstrap.

  Each draw takes P problems with replacement, each with all of its samples. The ends are held to
  [0, 1]. With ten right samples in all, an interval of level 0.95 covers 92 %, as percentiles near
  0 do.

  Args:
    correct_PG: 0 or 1, [P, G]; statistic: gives a value for each problem.
    seed: of NumPy's default generator; level: the share of draws inside the interval.
  """
  # Samples are nested in problems: the spread between the problems' values already contains the
  # spread of G samples. Drawing the samples anew as well would count it twice (Davison & Hinkley,
  # Bootstrap Methods and their Application, 1997, section 3.8).
  return _bootstrap(statistic(_matrix(correct_PG)), seed, draws, level, (0.0, 1.0))


def paired_difference(value_a_P: np.ndarray, value_b_P: np.ndarray, seed: int, draws: int,
                      level: float = 0.95) -> Interval:
  """Interval of a rate of model a minus that of b on the same problems, by a bootstrap of the gaps.

  Args:
    value_a_P, value_b_P: a statistic of each problem; the numbers of samples may differ.
    seed, draws, level: as `nested_bootstrap`.

  Raises:
    InputError: the two have different problems.
  """
  # Resampling the gaps keeps the pairs: what makes a problem hard for both models cancels.
  return _bootstrap(gaps(value_a_P, value_b_P), seed, draws, level, (-1.0, 1.0))


def gaps(value_a_P: np.ndarray, value_b_P: np.ndarray) -> np.ndarray:
  """A statistic of model a minus that of b for each problem, [P].

  Raises:
    InputError: the two have different problems.
  """
  if len(value_a_P) != len(value_b_P):
    raise InputError(f"a paired difference needs the same problems and got {len(value_a_P)} and "
                     f"{len(value_b_P)}: score both on one split.")
  return value_a_P - value_b_P


def over_seeds(value_SP: np.ndarray, level: float = 0.95) -> Interval:
  """Interval of a rate over the choice of training seeds, problems and samples.

  Seeds and problems cross: every seed is scored on the same problems. The mean m has variance

    V = V_s + max(V_p − V_r, 0),   V_s = Var_s(mean over p) / S,   V_p = Var_p(mean over s) / P,

  where V_r = (residual mean square) / (S·P) is contained in both V_s and V_p.

  V_s is known from S − 1 degrees of freedom and takes the quantile t of Student's distribution. The
  rest takes the normal quantile z: a Behrens–Fisher problem. With ρ = V_s / V the half-width is a
  geometric mean of the two quantiles,

    h = √V · z · (t / z)^(ρ^1.25).

  In the normal limit of three seeds it covers 94.1 (ρ near 0.9) to 96.0 % (ρ near 0.25). The ends
  are taken on the logit's scale, where a rate near 0 or 1 is not skewed:
  logit(m) ± h / (m·(1 − m)).

  tests/test_stats.py measures the coverage on simulated data of three seeds, also near 0 and 1: it
  is 93 to 97 %. Other methods, measured in the same way:

    * Cochran's arithmetic mean (Biometrics 20, 1964) reaches 97.3 %.
    * Welch's degrees of freedom fall to 92 %, and without the logit to 91 %.
    * A bootstrap of the three seeds falls below 85 %.

  Where the seeds' spread dominates near 0 or 1, coverage is 92 to 94 %. With two
  seeds it falls to 91 %.

  Args:
    value_SP: a statistic in [0, 1] of each training seed and problem, at least two of each.
    level: of the interval.
  """
  value_SP = _seeds(value_SP)
  estimate = float(value_SP.mean())
  half = _half(value_SP, level)
  # Without a spread the estimate may be 0 or 1, where the logit is infinite.
  if half == 0:
    return Interval(estimate, estimate, estimate)
  # The derivative of the logit carries the half-width to its scale (the delta method).
  half /= estimate * (1 - estimate)
  low, high = special.expit(special.logit(estimate) + np.array([-half, half]))
  return Interval(estimate, float(low), float(high))


def gap_over_seeds(gap_SP: np.ndarray, level: float = 0.95) -> Interval:
  """`over_seeds` of a difference of two rates, in [−1, 1], on its own scale.

  Args:
    gap_SP: a difference of each training seed and problem, at least two of each.
    level: of the interval.
  """
  gap_SP = _seeds(gap_SP)
  estimate = float(gap_SP.mean())
  half = _half(gap_SP, level)
  # A difference may be negative, so there is no logit of it; the ends are cut off instead.
  return Interval(estimate, max(estimate - half, -1.0), min(estimate + half, 1.0))


def resolvable(gap_SP: np.ndarray, level: float = 0.95, power: float = 0.8) -> float:
  """The smallest true difference that an interval of `level` excludes 0 for with chance `power`.

  It assumes the spread of these data, which few seeds estimate badly. The seeds' share follows the
  noncentral t, the rest the normal, combined by the geometric mean of `over_seeds`.

  Args:
    gap_SP: differences of each training seed and problem, [S, P]; one seed is allowed.
    level: of the interval; power: the chance of finding the difference.
  """
  gap_SP = np.asarray(gap_SP, np.float64)
  z = special.ndtri(0.5 + level / 2) + special.ndtri(power)
  # One seed shows no spread between seeds: only the spread between problems is left.
  if len(gap_SP) == 1:
    return float(z * np.sqrt(gap_SP.var(ddof=1) / gap_SP.size))
  variance, share = _spread(_seeds(gap_SP))
  df = len(gap_SP) - 1
  t = special.nctdtrinc(df, 1 - power, special.stdtrit(df, 0.5 + level / 2))
  return float(np.sqrt(variance) * z * (t / z) ** share ** 1.25)


def _half(value_SP: np.ndarray, level: float) -> float:
  """The half-width h of `over_seeds`."""
  variance, share = _spread(value_SP)
  t = special.stdtrit(len(value_SP) - 1, 0.5 + level / 2)
  z = special.ndtri(0.5 + level / 2)
  # The exponent is chosen by coverage: with ρ itself up to 97.1 % of the intervals hold the truth.
  return float(np.sqrt(variance) * z * (t / z) ** share ** 1.25)


def _spread(value_SP: np.ndarray) -> tuple[float, float]:
  """The variance V and the seeds' share ρ of `over_seeds`."""
  S, P = value_SP.shape
  seed_S1 = value_SP.mean(axis=1, keepdims=True)
  problem_P = value_SP.mean(axis=0)
  residual_SP = value_SP - seed_S1 - problem_P + value_SP.mean()
  seeds = seed_S1.var(ddof=1) / S
  shared = np.square(residual_SP).sum() / ((S - 1) * (P - 1)) / (S * P)
  # The estimated difference can be negative by chance; a variance cannot.
  variance = seeds + max(problem_P.var(ddof=1) / P - shared, 0.0)
  return variance, seeds / variance if variance > 0 else 0.0


def _seeds(value_SP: np.ndarray) -> np.ndarray:
  """Values in float64, refused unless a spread can be estimated over both axes."""
  value_SP = np.asarray(value_SP, np.float64)
  if value_SP.ndim != 2 or min(value_SP.shape) < 2:
    raise InputError(f"value_SP has shape {value_SP.shape}: give at least two training seeds and "
                     "two problems.")
  return value_SP


def _matrix(correct_PG: np.ndarray) -> np.ndarray:
  """The matrix of right samples, refused unless it has two axes and an entry."""
  correct_PG = np.asarray(correct_PG)
  if correct_PG.ndim != 2 or correct_PG.size == 0:
    raise InputError(f"correct_PG has shape {correct_PG.shape}: give problems × samples, "
                     "at least one of each.")
  return correct_PG


def _bootstrap(value_P: np.ndarray, seed: int, draws: int, level: float,
               bounds: tuple[float, float]) -> Interval:
  """Percentiles of the mean over resampled problems."""
  rng = np.random.default_rng(seed)
  P = len(value_P)
  # All draws at once would take draws·P values of memory, gigabytes for a large split.
  chunk = max(1, CHUNK // P)
  means = []
  for start in range(0, draws, chunk):
    problem_DP = rng.integers(P, size=(min(chunk, draws - start), P))
    means.append(value_P[problem_DP].mean(axis=1))
  tail = (1 - level) / 2
  low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
  return Interval(float(value_P.mean()), float(max(low, bounds[0])), float(min(high, bounds[1])))


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
  """A statistic's mean over problems with its interval: `nested_bootstrap` of any statistic.

  Args:
    seed, draws, level: of the bootstrap.
  """
  upper = 1.0 if statistic(name)[0].unit == "rate" else np.inf
  return _bootstrap(value_P(name, samples), seed, draws, level, (0.0, upper))


def score_over_seeds(name: str, value_SP: np.ndarray, level: float = 0.95) -> Interval:
  """A statistic's mean with its interval over seeds: `over_seeds` of any statistic."""
  if statistic(name)[0].unit == "rate":
    return over_seeds(value_SP, level)
  # A number of tokens has no upper end, so it stays on its own scale.
  value_SP = _seeds(value_SP)
  estimate = float(value_SP.mean())
  half = _half(value_SP, level)
  return Interval(estimate, estimate - half, estimate + half)
