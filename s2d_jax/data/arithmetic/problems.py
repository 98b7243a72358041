"""Chained addition modulo 100: problems, worked solutions, splits and the base models' corpus.

A problem is "12+34+57"; its worked solution carries the running sum along, "12+34=46+57=03"; its
answer is what follows the last "=". Every number is two digits. NumPy only.
"""

import numpy as np

MODULUS = 100
SHORTEST, LONGEST = 2, 4  # operands
SEED = 0
SIZES = {"labelled": 2048, "validation": 256, "test": 512}


def draw(rng, shortest=SHORTEST, longest=LONGEST):
  """Operands of one problem: as many as a uniform draw says, each uniform in 0..99."""
  count = int(rng.integers(shortest, longest + 1))
  return tuple(int(x) for x in rng.integers(0, MODULUS, count))


def problem(operands):
  """The text of a problem: (12, 34, 57) is "12+34+57"."""
  return "+".join(f"{x:02d}" for x in operands)


def worked(operands, slips=None):
  """The worked solution: (12, 34, 57) is "12+34=46+57=03".

  `slips` is added to the running sum after each step (modulo 100, one number for each operand but
  the first): a slip of 0 is a right step, and what follows a wrong step builds on it.
  """
  slips = (0,) * (len(operands) - 1) if slips is None else slips
  total = operands[0]
  text = f"{total:02d}"
  for operand, slip in zip(operands[1:], slips, strict=True):
    total = (total + operand + int(slip)) % MODULUS
    text += f"+{operand:02d}={total:02d}"
  return text


def answer(operands):
  """The sum modulo 100, two digits."""
  return f"{sum(operands) % MODULUS:02d}"


def splits(seed=SEED, sizes=None):
  """{split: rows} of distinct problems, disjoint between splits, ids running through all of them.

  A row is {"id", "problem", "answer", "solution"}. A pure function of the seed and the sizes.
  """
  sizes = SIZES if sizes is None else sizes
  rng = np.random.default_rng(seed)
  chosen = {}  # a dict keeps the order of the draws
  while len(chosen) < sum(sizes.values()):
    chosen.setdefault(draw(rng))
  rows = [
    {"id": i, "problem": problem(x), "answer": answer(x), "solution": worked(x)}
    for i, x in enumerate(chosen)
  ]
  out, start = {}, 0
  for name, size in sizes.items():
    out[name] = rows[start : start + size]
    start += size
  assert_disjoint(out)
  return out


def assert_disjoint(rows_by_split):
  """Raises ValueError naming the first problem that stands twice, in one split or in two."""
  seen = {}
  for split, rows in rows_by_split.items():
    for row in rows:
      if row["problem"] in seen:
        raise ValueError(
          f"problem {row['problem']} stands in {seen[row['problem']]} and again in {split}: "
          "every problem must belong to one split, once."
        )
      seen[row["problem"]] = split


def corpus(seed, count, longest, worked_share, slip_share, held_out):
  """`count` pairs (problem, response) for next-token training of a base model.

  Problems have up to `longest` operands; those in `held_out` (a set of texts) never appear. A share
  `worked_share` of the responses is a worked solution in which each step is, with probability
  `slip_share`, replaced by a wrong one; the others are a bare guess, two digits drawn without
  looking at the problem.
  """
  rng = np.random.default_rng((seed, 1))
  pairs = []
  while len(pairs) < count:
    operands = draw(rng, longest=longest)
    steps = len(operands) - 1
    slips = rng.integers(1, MODULUS, steps) * (rng.random(steps) < slip_share)
    guess = f"{rng.integers(0, MODULUS):02d}"
    is_worked = rng.random() < worked_share
    if problem(operands) not in held_out:
      pairs.append((problem(operands), worked(operands, slips) if is_worked else guess))
  return pairs


def sums(seed, count):
  """`count` pairs ("12+34=", "46"): the single steps that every solution is made of.

  They are written without a question, as text a base model might have read; of the 10,000 there
  are, none is held out.
  """
  operands = np.random.default_rng((seed, 2)).integers(0, MODULUS, (count, 2))
  return [(f"{a:02d}+{b:02d}=", f"{(a + b) % MODULUS:02d}") for a, b in operands.tolist()]
