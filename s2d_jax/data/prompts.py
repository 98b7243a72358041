"""Which problems a step draws, and which labels a budget buys: pure functions. NumPy only."""

import zlib
from collections.abc import Sequence

import numpy as np

from s2d_jax.errors import InputError


def at(count: int, seed: int, stage: str, step: int, size: int, round: int = 0,
       rounds: int = 1) -> np.ndarray:
  """Indices in [0, count) of the `size` problems of (stage, step, round), distinct within a step.

  Each epoch is a fresh permutation cut into steps, its short tail dropped. A step owns `rounds`
  consecutive batches, so drawing again within a step does not move the steps after it. The result
  depends on the arguments alone, so a resumed run draws what the killed one would have drawn.

  Raises:
    InputError: `size` times `rounds` exceeds `count`, or the round is outside the rounds.
  """
  if size < 1 or not 0 < size * rounds <= count:
    request = f"{size} problems" if rounds == 1 else f"{rounds} rounds of {size} problems"
    raise InputError(f"{request} per step were asked of {count} in {stage}: lower the number of "
                     "prompts per step or of rounds, or add problems.")
  if not 0 <= round < rounds:
    raise InputError(f"round {round} of {stage} is outside its {rounds} rounds: raise the rounds.")
  # crc32 and not hash(): Python salts the hash of a text anew in every process.
  key = (seed, zlib.crc32(stage.encode()), epoch(count, step, size, rounds))
  order = np.random.default_rng(key).permutation(count)
  # Consecutive batches within an epoch: first the rounds of a step, then the next step's.
  steps_per_epoch = count // (size * rounds)
  batch = step % steps_per_epoch * rounds + round
  return order[batch * size : (batch + 1) * size]


def epoch(count: int, step: int, size: int, rounds: int = 1) -> int:
  """The index of the pass over the `count` problems that a step belongs to."""
  return step // (count // (size * rounds))


def share(ids: Sequence[int] | np.ndarray, seed: int, fraction: float) -> np.ndarray:
  """True for the `fraction` of ids, rounded, whose labels a smaller budget buys; bool [len(ids)].

  They come first in the order of a seeded hash, so a larger fraction only adds ids. The order is
  independent of `half`'s.
  """
  # Unlike in `half`, ids are mixed before the seed joins them: else both would read the bits of one
  # number, and a share would not be cut into fair halves.
  salt = _mix(np.array([seed], np.uint64))
  # A hash's rank, not the hash against a threshold: the share is exact.
  hashed = _mix(_mix(np.asarray(ids).astype(np.uint64)) ^ salt)
  rank = np.argsort(np.argsort(hashed))
  return rank < round(fraction * len(rank))


def half(ids: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
  """True where an id belongs to the first half (1H), False in the second (2H); bool [len(ids)].

  A seeded hash of the id alone, which does not depend on the other ids. So the halves are
  near-equal rather than equal, and each is exactly the complement of the other.
  """
  salt = _mix(np.array([seed], np.uint64))
  return (_mix(np.asarray(ids).astype(np.uint64) ^ salt) & 1) == 0


def _mix(x: np.ndarray) -> np.ndarray:
  """splitmix64's finalizer (Steele et al. 2014): every bit of x moves every bit of the result."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
