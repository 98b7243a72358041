"""Sums and word problems whose answer is a whole number, for a small real language model.

A problem is "Compute 7 + 8." or "Mia has 4 shells and finds 9 more. How many shells does Mia
have now?". Its solution is one line with the answer in a box. NumPy only.
"""

from collections.abc import Callable, Mapping

import numpy as np

from s2d_jax.data.arithmetic.problems import cut

# Another seed or size would make every recorded score incomparable.
_SEED = 0
_SIZES = {"labelled": 2048, "validation": 256, "test": 512}

_NAMES = ("Ana", "Ben", "Chloe", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jack", "Kate",
          "Leo", "Mia", "Noah", "Olivia", "Paul", "Rosa", "Sam", "Tara", "Will")
_THINGS = ("apples", "balls", "books", "buttons", "cards", "coins", "cookies", "eggs", "flowers",
           "marbles", "pencils", "pens", "shells", "stamps", "stickers", "toys")
_CONTAINERS = ("bags", "baskets", "boxes", "drawers", "jars", "packs", "rows", "trays")

_QUESTIONS = ("Calculate {}.", "Compute {}.", "Evaluate {}.", "Find {}.", "How much is {}?",
              "What is {}?", "Work out {}.", "{} = ?")

# (text of the problem, expression of its solution, answer)
Sampled = tuple[str, str, int]


def _calculation(rng: np.random.Generator, expression: str, answer: int) -> Sampled:
  """A problem without words around its numbers."""
  text = rng.choice(_QUESTIONS)
  return text.format(expression), expression, answer


def _sum(rng: np.random.Generator) -> Sampled:
  a = _number(rng, 1, 9)
  b = _number(rng, 1, 9)
  return _calculation(rng, f"{a} + {b}", a + b)


def _difference(rng: np.random.Generator) -> Sampled:
  a = _number(rng, 3, 12)
  b = _number(rng, 1, a - 1)
  return _calculation(rng, f"{a} - {b}", a - b)


def _product(rng: np.random.Generator) -> Sampled:
  a = _number(rng, 2, 5)
  b = _number(rng, 2, 9)
  return _calculation(rng, f"{a} * {b}", a * b)


def _gain(rng: np.random.Generator) -> Sampled:
  name, thing = _name_and_thing(rng)
  verb = rng.choice(("buys", "finds", "gets", "wins"))
  a = _number(rng, 2, 9)
  b = _number(rng, 2, 9)
  text = f"{name} has {a} {thing} and {verb} {b} more. How many {thing} does {name} have now?"
  return text, f"{a} + {b}", a + b


def _loss(rng: np.random.Generator) -> Sampled:
  name, thing = _name_and_thing(rng)
  verb = rng.choice(("gives away", "loses", "sells"))
  a = _number(rng, 4, 12)
  b = _number(rng, 2, a - 1)
  text = f"{name} has {a} {thing} and {verb} {b} of them. How many {thing} are left?"
  return text, f"{a} - {b}", a - b


def _groups(rng: np.random.Generator) -> Sampled:
  thing = rng.choice(_THINGS)
  container = rng.choice(_CONTAINERS)
  a = _number(rng, 2, 5)
  b = _number(rng, 2, 6)
  text = f"There are {a} {container} with {b} {thing} each. How many {thing} are there in all?"
  return text, f"{a} * {b}", a * b


# Equally likely, up to those whose texts run out.
KINDS: dict[str, Callable[[np.random.Generator], Sampled]] = {
    "sum": _sum, "difference": _difference, "product": _product,
    "gain": _gain, "loss": _loss, "groups": _groups}


def splits(sizes: Mapping[str, int] | None = None) -> dict[str, list[dict]]:
  """{split: rows} of distinct problems, disjoint between splits; ids count through all splits.

  A row is {"id", "problem", "answer", "solution"}. The sizes determine the result.
  """
  sizes = _SIZES if sizes is None else sizes
  rng = np.random.default_rng(_SEED)
  # A dict keeps the order in which the problems were sampled; a set does not.
  chosen: dict[str, tuple[str, int]] = {}
  while len(chosen) < sum(sizes.values()):
    kind = str(rng.choice(list(KINDS)))
    text, expression, answer = KINDS[kind](rng)
    chosen.setdefault(text, (expression, answer))
  # Shuffled, because a kind with few texts runs out, and would be missing from the last split.
  rows = []
  texts = list(chosen)
  for i, j in enumerate(rng.permutation(len(texts))):
    text = texts[j]
    expression, answer = chosen[text]
    rows.append({"id": i, "problem": text, "answer": str(answer),
                 "solution": f"{expression} = \\boxed{{{answer}}}"})
  return cut(rows, sizes)


def family(problem: Mapping[str, str]) -> str:
  """A problem's kind, a key of KINDS, by the calculation of its solution."""
  calculation = problem["solution"].partition(" =")[0]
  bare, story = {"+": ("sum", "gain"), "-": ("difference", "loss"),
                 "*": ("product", "groups")}[calculation.split()[1]]
  # A story has the numbers apart.
  return bare if calculation in problem["problem"] else story


def _number(rng: np.random.Generator, low: int, high: int) -> int:
  """A whole number, uniform from `low` to `high`."""
  return int(rng.integers(low, high + 1))


def _name_and_thing(rng: np.random.Generator) -> tuple[str, str]:
  """Whom a story is about, and what is counted in it."""
  return str(rng.choice(_NAMES)), str(rng.choice(_THINGS))
