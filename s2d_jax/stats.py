"""Evaluation statistics with honest intervals: pass@k, avg@k, nested bootstrap. NumPy only.

correct_PG is 1 where sample g of problem p was right, else 0. A statistic is a function of an array
[..., P, G] that reduces its last two axes to a rate in [0, 1], so that all bootstrap draws are
evaluated at once.
"""

from typing import NamedTuple

import numpy as np

CHUNK = 1 << 24  # resampled values held at once: 16 MB of booleans


class Interval(NamedTuple):
  """An estimate and the two ends of its confidence interval."""
  estimate: float
  low: float
  high: float


def pass_at_k(n, c, k):
  """Unbiased chance that one of k samples is right, for c right ones among n; broadcasts.

    pass@k = 1 − C(n − c, k) / C(n, k) = 1 − Π_{j<k} (n − c − j) / (n − j).

  Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1.

  Raises:
    ValueError: k is not in 1..n or c not in 0..n.
  """
  n, c = np.asarray(n), np.asarray(c)
  if k < 1 or np.any(k > n):
    raise ValueError(f"pass@{k} needs 1 <= k <= n and n goes down to {n.min()}: draw more samples.")
  if np.any(c < 0) or np.any(c > n):
    raise ValueError("pass@k was given more right samples than samples: count them again.")
  miss = np.ones(np.broadcast_shapes(n.shape, c.shape))
  for j in range(k):
    miss = miss * np.maximum(n - c - j, 0) / (n - j)
  return 1 - miss


def avg_at_k(correct_PG):
  """Mean over problems of the share of right samples; reduces the last two axes."""
  return np.mean(correct_PG, axis=(-2, -1))


def mean_pass_at_k(k):
  """The statistic: mean over problems of `pass_at_k`."""
  def statistic(correct_PG):
    correct_PG = np.asarray(correct_PG)
    return pass_at_k(correct_PG.shape[-1], correct_PG.sum(axis=-1), k).mean(axis=-1)
  return statistic


def nested_bootstrap(correct_PG, statistic, seed, draws, level=0.95):
  """Interval of a statistic when both the problems and the samples could have been others.

  Each draw resamples P problems, then G samples within each. The draws give the spread; the centre
  is the estimate itself, because repeated samples push a resampled pass@k down while the estimate
  is unbiased. The ends are held to [0, 1].

  Davison & Hinkley, Bootstrap Methods and their Application (1997), section 3.8. Resampling both
  levels counts the spread between samples twice over, so the interval errs on the wide side.

  Args:
    correct_PG: 0/1, [P, G].
    statistic: see the module.
    seed: of NumPy's default generator. draws: how many. level: the share of draws inside.
  """
  correct_PG = _matrix(correct_PG)
  rng = np.random.default_rng(seed)
  drawn = [statistic(_resampled(correct_PG, problem_DP, rng))
           for problem_DP in _problems(rng, draws, *correct_PG.shape)]
  return _interval(statistic(correct_PG), np.concatenate(drawn), level, (0.0, 1.0))


def paired_difference(correct_a_PG, correct_b_PG, statistic, seed, draws, level=0.95):
  """Interval of statistic(a) − statistic(b) on the same problems, nested as `nested_bootstrap`.

  A draw takes the same problems for both and resamples the samples of each; the numbers of samples
  may differ.

  Raises:
    ValueError: the two have different problems.
  """
  a_PG, b_PG = _matrix(correct_a_PG), _matrix(correct_b_PG)
  if len(a_PG) != len(b_PG):
    raise ValueError(f"a paired difference needs the same problems and got {len(a_PG)} and "
                     f"{len(b_PG)}: score both on one split.")
  rng = np.random.default_rng(seed)
  shape = len(a_PG), max(a_PG.shape[1], b_PG.shape[1])
  drawn = []
  for problem_DP in _problems(rng, draws, *shape):
    a_D = statistic(_resampled(a_PG, problem_DP, rng))
    drawn.append(a_D - statistic(_resampled(b_PG, problem_DP, rng)))
  return _interval(statistic(a_PG) - statistic(b_PG), np.concatenate(drawn), level, (-1.0, 1.0))


def _matrix(correct_PG):
  correct_PG = np.asarray(correct_PG)
  if correct_PG.ndim != 2 or correct_PG.size == 0:
    raise ValueError(f"correct_PG has shape {correct_PG.shape}: give problems × samples, "
                     "at least one of each.")
  return correct_PG


def _problems(rng, draws, P, G):
  """Indices of the resampled problems, [D, P], in chunks of draws that bound the memory."""
  chunk = max(1, CHUNK // (P * G))
  for start in range(0, draws, chunk):
    yield rng.integers(P, size=(min(chunk, draws - start), P))


def _resampled(correct_PG, problem_DP, rng):
  """Samples drawn with replacement within each drawn problem, [D, P, G]."""
  G = correct_PG.shape[1]
  sample_DPG = rng.integers(G, size=(*problem_DP.shape, G), dtype=np.int32)
  return correct_PG[problem_DP[..., None], sample_DPG]


def _interval(estimate, drawn_D, level, bounds):
  tail = (1 - level) / 2
  low, high = estimate + np.quantile(drawn_D, [tail, 1 - tail]) - drawn_D.mean()
  return Interval(float(estimate), float(max(low, bounds[0])), float(min(high, bounds[1])))
