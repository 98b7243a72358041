"""Composition modulo 100: easy steps that must be taken in the right order.

A problem is a chain of numbers, "12-34-57". The rule has one right answer for each problem:
products come first; then sums and differences go from left to right, or from right to left where
the problem ends in "#"; every result is taken modulo 100. A worked solution writes one step after
another, "12-34=78;78-57=21", and its answer is the text after the last "=".

The base models' corpus takes most problems in a wrong order, family by family, as FAMILIES says.
Numbers have two digits, but for a factor, which has one. NumPy only.
"""

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from s2d_jax.data.arithmetic.problems import cut

_MODULUS = 100
# The published splits: another seed or size would make every recorded score incomparable.
_SEED = 0
_SIZES = {"labelled": 2048, "validation": 256, "test": 512}

# Indices of operators, counted from 0 in the problem, in the order in which they are applied. An
# order may leave operators out: the last result is then the answer, as one who forgets a step says.
Order = tuple[int, ...]


class _Family(NamedTuple):
  """A kind of problem: its operators, its ending, and how the corpus solves it."""

  operators: str
  ending: str
  shares: dict[Order, float]  # of worked solutions in the corpus; the first order is the right one


# Of "left" and "right" the corpus has equal shares, so that a base model does not heed the "#": the
# right order of one is a wrong order of the other. Elsewhere a wrong order has most of the shares.
FAMILIES = {
  "sum": _Family("++", "", {(0, 1): 0.6, (0,): 0.4}),
  "product": _Family("+*", "", {(1, 0): 0.3, (0, 1): 0.7}),
  "left": _Family("--", "", {(0, 1): 0.3, (1, 0): 0.3, (0,): 0.4}),
  "right": _Family("--", "#", {(1, 0): 0.3, (0, 1): 0.3, (0,): 0.4}),
  "long": _Family("-*-", "", {(1, 0, 2): 0.05, (0, 1, 2): 0.6, (1, 2, 0): 0.35}),
}
_NAMES = tuple(FAMILIES)


class _Problem(NamedTuple):
  """A family's name and the numbers between its operators."""

  family: str
  operands: tuple[int, ...]


def _number(value: int, operator: str = "") -> str:
  """Two digits, or one behind a "*"."""
  return str(value) if operator == "*" else f"{value:02d}"


def problem(family: str, operands: Sequence[int]) -> str:
  """The text of a problem: "right" with (12, 34, 57) is "12-34-57#"."""
  operators, ending, _ = FAMILIES[family]
  others = (o + _number(x, o) for o, x in zip(operators, operands[1:], strict=True))
  return _number(operands[0]) + "".join(others) + ending


def family(problem: Mapping[str, str]) -> str:
  """The name of the family that a row's "problem" is of, a key of FAMILIES."""
  operators = "".join(c for c in problem["problem"] if c in "+-*")
  ending = "#" if problem["problem"].endswith("#") else ""
  return next(name for name, one in FAMILIES.items() if one[:2] == (operators, ending))


def worked(family: str, operands: Sequence[int], order: Order | None = None,
           slips: Sequence[int] | np.ndarray | None = None) -> str:
  """The worked solution: "left" with (12, 34, 57) is "12-34=78;78-57=21".

  Args:
    order: the operators in the order in which they are applied; None is the right order.
    slips: added to the result of each step, modulo 100; one number for each step. A slip of 0 is a
      right step, and the steps after a wrong one build on it. None makes no slip.
  """
  order = right_order(family) if order is None else order
  slips = (0,) * len(order) if slips is None else slips
  operators = FAMILIES[family].operators
  # The value of the part of the problem around each number; equal for the numbers of one part.
  part = list(range(len(operands)))
  value = list(operands)
  steps = []
  for i, slip in zip(order, slips, strict=True):
    a, b, operator = part[i], part[i + 1], operators[i]
    result = (_applied(value[a], operator, value[b]) + int(slip)) % _MODULUS
    steps.append(f"{_number(value[a])}{operator}{_number(value[b], operator)}={result:02d}")
    value[a] = result
    part = [a if p == b else p for p in part]
  return ";".join(steps)


def _applied(a: int, operator: str, b: int) -> int:
  """One step modulo 100."""
  result = {"+": a + b, "-": a - b, "*": a * b}[operator]
  return result % _MODULUS


def right_order(family: str) -> Order:
  """The order that the rule of this module prescribes."""
  return next(iter(FAMILIES[family].shares))


def answer(family: str, operands: Sequence[int]) -> str:
  """The answer of a problem, two digits."""
  return worked(family, operands).rpartition("=")[2]


def _random_operand(rng: np.random.Generator, operator: str) -> int:
  """A number behind an operator: uniform in 0..99, and behind a "*" 2 or 3."""
  # Greater factors made products that models of this size did not learn.
  return int(rng.integers(2, 4) if operator == "*" else rng.integers(0, _MODULUS))


def _random_problem(rng: np.random.Generator, longest: int) -> _Problem:
  """A problem of at most `longest` operands: its family is uniform, and so is each number."""
  names = [name for name in _NAMES if len(FAMILIES[name].operators) < longest]
  name = names[int(rng.integers(0, len(names)))]
  operands = [int(rng.integers(0, _MODULUS))]
  for operator in FAMILIES[name].operators:
    operands.append(_random_operand(rng, operator))
  return _Problem(name, tuple(operands))


def splits(sizes: Mapping[str, int] | None = None) -> dict[str, list[dict]]:
  """{split: rows} of distinct problems, disjoint between splits; ids count through all splits.

  A row is {"id", "problem", "answer", "solution"}. The sizes determine the result.
  """
  sizes = _SIZES if sizes is None else sizes
  rng = np.random.default_rng(_SEED)
  # A dict keeps the order of the draws; a set does not.
  chosen: dict[_Problem, None] = {}
  while len(chosen) < sum(sizes.values()):
    chosen.setdefault(_random_problem(rng, _MODULUS))
  rows = [{"id": i, "problem": problem(*x), "answer": answer(*x), "solution": worked(*x)}
          for i, x in enumerate(chosen)]
  return cut(rows, sizes)


def corpus(seed: int, count: int, longest: int, worked_share: float, slip_share: float,
           held_out: Set[str]) -> list[tuple[str, str]]:
  """`count` pairs (problem, response) for next-token training of a base model.

  Args:
    longest: most operands of a problem; held_out: texts of problems that must not appear.
    worked_share: probability that a response is a worked solution, in an order by the shares of
      its family. The others are a bare guess, two digits drawn without looking at the problem.
    slip_share: probability that a step of a worked solution has a wrong result.
  """
  # Another stream than that of `splits`, whose key is the seed alone.
  rng = np.random.default_rng((seed, 1))
  pairs = []
  while len(pairs) < count:
    # A held-out problem still takes its draws, so that the others stay as they are.
    name, operands = _random_problem(rng, longest)
    shares = FAMILIES[name].shares
    order = list(shares)[int(rng.choice(len(shares), p=list(shares.values())))]
    # From 1: a slip of 0 would be a right step.
    slips = rng.integers(1, _MODULUS, len(order)) * (rng.random(len(order)) < slip_share)
    guess = f"{rng.integers(0, _MODULUS):02d}"
    is_worked = rng.random() < worked_share
    text = problem(name, operands)
    if text not in held_out:
      pairs.append((text, worked(name, operands, order, slips) if is_worked else guess))
  return pairs


def steps(seed: int, count: int) -> list[tuple[str, str]]:
  """`count` pairs ("12-34=", "78"): the single steps that every solution consists of.

  They have no question before them, like text that a base model might have read. None of the
  20,200 possible pairs is held out. A fifth are products, of which there are 200.
  """
  # A third stream, so that `count` changes nothing in `corpus` of one seed.
  rng = np.random.default_rng((seed, 2))
  pairs = []
  for operator in rng.choice(list("++--*"), count).tolist():
    a = int(rng.integers(0, _MODULUS))
    b = _random_operand(rng, operator)
    question = f"{_number(a)}{operator}{_number(b, operator)}="
    pairs.append((question, f"{_applied(a, operator, b):02d}"))
  return pairs
