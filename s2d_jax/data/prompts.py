"""Which problems a step draws, and which belong to the first half: pure functions. NumPy only."""

import zlib

import numpy as np


def at(count, seed, stage, step, size, round=0, rounds=1):
  """Indices in [0, count) of the `size` problems of (stage, step, round), distinct within a round.

  Each epoch is a fresh permutation cut into steps, the short tail dropped; a step owns `rounds`
  consecutive batches, so redrawing within a step neither moves the steps after it nor draws a
  problem twice. A pure function of its arguments: ask again after a restart, get the same.
  ValueError when size times rounds exceeds count.
  """
  if size < 1 or not 0 < size * rounds <= count:
    asked = f"{size} problems" if rounds == 1 else f"{rounds} rounds of {size} problems"
    raise ValueError(f"{asked} per step were asked of {count} in {stage}: lower the number of "
                     "prompts per step or of rounds, or add problems.")
  if not 0 <= round < rounds:
    raise ValueError(f"round {round} of {stage} is outside its {rounds} rounds: raise the rounds.")
  turn = epoch(count, step, size, rounds)
  order = np.random.default_rng((seed, zlib.crc32(stage.encode()), turn)).permutation(count)
  batch = step % (count // (size * rounds)) * rounds + round
  return order[batch * size : (batch + 1) * size]


def epoch(count, step, size, rounds=1):
  """Which pass over the `count` problems a step belongs to."""
  return step // (count // (size * rounds))


def share(ids, seed, fraction):
  """True for the `fraction` of ids, rounded, that a seeded hash puts first; a larger one adds ids.

  Which problems a smaller budget of labels buys. The order is independent of `half`'s.
  """
  place = np.argsort(np.argsort(_mix(_mix(np.asarray(ids).astype(np.uint64)) ^ _mix(
      np.array([seed], np.uint64)))))
  return place < round(fraction * len(place))


def half(ids, seed):
  """True where an id belongs to the first half (1H), False in the second (2H).

  A seeded hash of the id alone: it does not depend on which other ids are present, so the halves
  are near-equal rather than equal, and each is exactly the complement of the other.
  """
  return (_mix(np.asarray(ids).astype(np.uint64) ^ _mix(np.array([seed], np.uint64))) & 1) == 0


def _mix(x):
  """splitmix64's finalizer (Steele et al. 2014): every bit of x moves every bit of the result."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
