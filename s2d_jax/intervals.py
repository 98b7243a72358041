"""Confidence intervals of scores: over problems, and over training seeds and problems.

value_P holds a statistic of each of P problems and value_SP that of each training seed and problem;
s2d_jax/stats.py has the statistics. A score is the mean over problems. The interval of one training
seed is a bootstrap over problems (`bootstrap`). The interval of several seeds adds the spread
between seeds (`over_seeds`).
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from s2d_jax.errors import InputError

CHUNK = 1 << 24  # resampled values held at once: 128 MB
RULE = 2         # raised when an interval of the same values changes


class Interval(NamedTuple):
  """An estimate and the two ends of its confidence interval."""
  estimate: float
  low: float
  high: float


def bootstrap(value_P: np.ndarray, seed: int, draws: int, level: float = 0.95,
              bounds: tuple[float, float] = (0.0, 1.0)) -> Interval:
  """Interval of a mean over the choice of problems and of their samples, by a bootstrap.

  Each draw takes P problems with replacement, each with all of its samples. The ends are
  percentiles of the means, held to `bounds`. With ten right samples in all, an interval of level
  0.95 covers 92 %, as percentiles near 0 do. Where all values are equal, as where no sample is
  right, a resampled mean has no spread, and the interval is that of `all_equal`.

  Args:
    value_P: a statistic of each problem.
    seed: of NumPy's default generator; level: the share of draws inside the interval.
    bounds: the least and the largest value that a problem can have.

  Raises:
    InputError: there is not one problem.
  """
  # Samples are nested in problems: the spread between the problems' values already contains the
  # spread of G samples. Drawing the samples anew as well would count it twice (Davison & Hinkley,
  # Bootstrap Methods and their Application, 1997, section 3.8).
  P = len(value_P)
  if P == 0:
    raise InputError("an interval needs at least one problem and got none: score some problems.")
  if value_P.min() == value_P.max() and np.isfinite(bounds).all():
    return all_equal(float(value_P[0]), P, level, bounds)
  rng = np.random.default_rng(seed)
  # All draws at once would take draws·P values of memory, gigabytes for a large split.
  chunk = max(1, CHUNK // P)
  means = []
  for start in range(0, draws, chunk):
    problem_DP = rng.integers(P, size=(min(chunk, draws - start), P))
    means.append(value_P[problem_DP].mean(axis=1))
  tail = (1 - level) / 2
  low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
  return Interval(float(value_P.mean()), float(max(low, bounds[0])), float(min(high, bounds[1])))


def all_equal(value: float, problems: int, level: float,
              bounds: tuple[float, float] = (0.0, 1.0)) -> Interval:
  """Interval of a mean where every problem has the same value.

  Other problems may have another one: a share of at most e = 1 − ((1 − level) / 2)^(1 / problems),
  the exact bound of a binomial rate of which no trial was seen (Clopper and Pearson, Biometrika 26,
  1934). Problems are the trials, because more samples of the same ones say nothing about others.
  """
  share = 1 - ((1 - level) / 2) ** (1 / problems)
  low, high = bounds
  return Interval(value, value - share * (value - low), value + share * (high - value))


def paired_difference(value_a_P: np.ndarray, value_b_P: np.ndarray, seed: int, draws: int,
                      level: float = 0.95) -> Interval:
  """Interval of a rate of model a minus that of b on the same problems, by a bootstrap of the gaps.

  Args:
    value_a_P, value_b_P: a statistic of each problem; the numbers of samples may differ.
    seed, draws, level: as `bootstrap`.

  Raises:
    InputError: the two have different problems.
  """
  # Resampling the gaps keeps the pairs: what makes a problem hard for both models cancels.
  return bootstrap(gaps(value_a_P, value_b_P), seed, draws, level, (-1.0, 1.0))


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

  tests/test_intervals.py measures the coverage on simulated data of three seeds, also near 0 and 1:
  it is 93 to 97 %. Other methods, measured in the same way:

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
  # Without a spread there is nothing to estimate, and at 0 and 1 the logit is infinite.
  if half == 0:
    return all_equal(estimate, value_SP.shape[1], level)
  # The derivative of the logit carries the half-width to its scale (the delta method).
  half /= estimate * (1 - estimate)
  low, high = special.expit(special.logit(estimate) + np.array([-half, half]))
  return Interval(estimate, float(low), float(high))


def count_over_seeds(value_SP: np.ndarray, level: float = 0.95) -> Interval:
  """`over_seeds` of a number, such as tokens, that has no upper end: on its own scale.

  Args:
    value_SP: a statistic of each training seed and problem, at least two of each.
    level: of the interval.
  """
  value_SP = _seeds(value_SP)
  estimate = float(value_SP.mean())
  half = _half(value_SP, level)
  return Interval(estimate, estimate - half, estimate + half)


def gap_over_seeds(gap_SP: np.ndarray, level: float = 0.95) -> Interval:
  """`over_seeds` of a difference of two rates, in [−1, 1], on its own scale.

  Args:
    gap_SP: a difference of each training seed and problem, at least two of each.
    level: of the interval.
  """
  # A difference may be negative, so there is no logit of it; the ends are cut off instead.
  found = count_over_seeds(gap_SP, level)
  if found.low == found.high:
    return all_equal(found.estimate, np.shape(gap_SP)[1], level, (-1.0, 1.0))
  return found._replace(low=max(found.low, -1.0), high=min(found.high, 1.0))


def difference(gap_SP: np.ndarray, seed: int, draws: int, level: float = 0.95) -> Interval:
  """Interval of a mean difference of two rates: over seeds and problems, or over problems alone.

  Args:
    gap_SP: a difference of each training seed and problem. One seed has no spread between seeds.
    seed, draws: of the bootstrap, which one training seed needs; level: of the interval.
  """
  if len(gap_SP) > 1:
    return gap_over_seeds(gap_SP, level)
  return bootstrap(gap_SP[0], seed, draws, level, (-1.0, 1.0))


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
