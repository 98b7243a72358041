"""How much a response repeats itself, by its runs of three tokens. NumPy only."""

from collections.abc import Sequence

import numpy as np


def repeated(ids: Sequence[int]) -> np.ndarray:
  """bool [T]: whether the three tokens that end here ended earlier in the response too."""
  earlier: set[tuple[int, ...]] = set()
  repeated_T = np.zeros(len(ids), bool)
  for t in range(2, len(ids)):
    run = tuple(int(i) for i in ids[t - 2: t + 1])
    repeated_T[t] = run in earlier
    earlier.add(run)
  return repeated_T


def repetition(ids: Sequence[int]) -> float:
  """The share of a response's runs of three tokens that occurred before; 0 where there is none."""
  return float(repeated(ids).sum() / max(len(ids) - 2, 1))
