"""Chained addition modulo 100: problems, worked solutions, splits and the base models' corpus.

A problem is "12+34+57". Its worked solution carries the running sum along, "12+34=46+57=03". Its
answer is the text after the last "=". Every number has two digits. NumPy only.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from s2d_jax.errors import InputError

_MODULUS = 100
_LONGEST = 4  # operands; the shortest problem has 2
# The published splits: another seed or size would make every recorded score incomparable.
_SEED = 0
_SIZES = {"labelled": 2048, "validation": 256, "test": 512}


def _random_operands(rng: np.random.Generator, longest: int) -> tuple[int, ...]:
  """The operands of one problem: their number is uniform, and each is uniform in 0..99."""
  count = int(rng.integers(2, longest + 1))
  return tuple(int(x) for x in rng.integers(0, _MODULUS, count))


def problem(operands: Sequence[int]) -> str:
  """The text of a problem: (12, 34, 57) is "12+34+57"."""
  return "+".join(f"{x:02d}" for x in operands)


def worked(operands: Sequence[int], slips: Sequence[int] | np.ndarray | None = None) -> str:
  """The worked solution: (12, 34, 57) is "12+34=46+57=03".

  Args:
    slips: added to the running sum after each step, modulo 100; one number for each operand but
      the first. A slip of 0 is a right step, and the steps after a wrong one build on it. None
      makes no slip.
  """
  slips = (0,) * (len(operands) - 1) if slips is None else slips
  total = operands[0]
  text = f"{total:02d}"
  for operand, slip in zip(operands[1:], slips, strict=True):
    total = (total + operand + int(slip)) % _MODULUS
    text += f"+{operand:02d}={total:02d}"
  return text


def answer(operands: Sequence[int]) -> str:
  """The sum modulo 100, two digits."""
  return f"{sum(operands) % _MODULUS:02d}"


def family(problem: Mapping[str, str]) -> str:
  """The number of operands of a row's "problem": "2", "3" or "4"."""
  return str(problem["problem"].count("+") + 1)


def splits(sizes: Mapping[str, int] | None = None) -> dict[str, list[dict]]:
  """{split: rows} of distinct problems, disjoint between splits; ids count through all splits.

  A row is {"id", "problem", "answer", "solution"}. The sizes determine the result.
  """
  sizes = _SIZES if sizes is None else sizes
  rng = np.random.default_rng(_SEED)
  # A dict keeps the order of the draws; a set does not.
  chosen: dict[tuple[int, ...], None] = {}
  while len(chosen) < sum(sizes.values()):
    chosen.setdefault(_random_operands(rng, _LONGEST))
  rows = [{"id": i, "problem": problem(x), "answer": answer(x), "solution": worked(x)}
          for i, x in enumerate(chosen)]
  return cut(rows, sizes)


def cut(rows: list[dict[str, Any]], sizes: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
  """Splits of these sizes from one list of distinct problems: none holds a problem of another.

  Raises:
    InputError: a problem occurs twice.
  """
  found = {}
  start = 0
  for name, size in sizes.items():
    found[name] = rows[start : start + size]
    start += size
  assert_disjoint(found)
  return found


def assert_disjoint(rows_by_split: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  """Checks that no problem occurs twice, in one split or in two.

  Raises:
    InputError: names the first problem that does.
  """
  split_of = {}
  for split, rows in rows_by_split.items():
    for row in rows:
      # By text, not by id: ids are distinct even where a problem stands twice.
      first = split_of.get(row["problem"])
      if first is not None:
        raise InputError(f"problem {row['problem']} stands in {first} and again in {split}: every "
                         "problem must belong to one split, once.")
      split_of[row["problem"]] = split


def corpus(seed: int, count: int, longest: int, worked_share: float, slip_share: float,
           held_out: Set[str]) -> list[tuple[str, str]]:
  """`count` pairs (problem, response) for next-token training of a base model.

  Args:
    longest: most operands of a problem; held_out: texts of problems that must not appear.
    worked_share: probability that a response is a worked solution. The others are a bare guess, two
      digits drawn without looking at the problem.
    slip_share: probability that a step of a worked solution is replaced by a wrong one.
  """
  # Another stream than that of `splits`, whose key is the seed alone.
  rng = np.random.default_rng((seed, 1))
  pairs = []
  while len(pairs) < count:
    # A held-out problem still takes its draws, so that the others stay as they are.
    operands = _random_operands(rng, longest)
    steps = len(operands) - 1
    # From 1: a slip of 0 would be a right step.
    slips = rng.integers(1, _MODULUS, steps) * (rng.random(steps) < slip_share)
    guess = f"{rng.integers(0, _MODULUS):02d}"
    is_worked = rng.random() < worked_share
    if problem(operands) not in held_out:
      pairs.append((problem(operands), worked(operands, slips) if is_worked else guess))
  return pairs


def sums(seed: int, count: int) -> list[tuple[str, str]]:
  """`count` pairs ("12+34=", "46"): the single steps that every solution consists of.

  They have no question before them, like text that a base model might have read. None of the
  10,000 possible pairs is held out.
  """
  # A third stream, so that `count` changes nothing in `corpus` of one seed.
  operands = np.random.default_rng((seed, 2)).integers(0, _MODULUS, (count, 2))
  return [(f"{a:02d}+{b:02d}=", f"{(a + b) % _MODULUS:02d}") for a, b in operands.tolist()]
