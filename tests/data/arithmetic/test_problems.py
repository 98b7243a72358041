"""Chained addition: examples by hand, disjoint splits, a corpus outside all of them."""

import numpy as np
import pytest

from s2d_jax.data.arithmetic import problems


def checked(text, problem):
  """Whether every step of a worked solution adds up and uses the problem's operands, in order."""
  running, *operands = problem.split("+")
  steps = text.split("=")
  if len(steps) != len(operands) + 1:
    return False
  for operand, step, after in zip(operands, steps[:-1], steps[1:], strict=True):
    if step != f"{running}+{operand}" or (int(running) + int(operand)) % 100 != int(after[:2]):
      return False
    running = after[:2]
  return True


def test_worked_by_hand():
  assert problems.problem((12, 34, 57)) == "12+34+57"
  assert problems.worked((12, 34, 57)) == "12+34=46+57=03"
  assert problems.answer((12, 34, 57)) == "03"
  assert problems.worked((5, 0, 9), slips=(1, 0)) == "05+00=06+09=15"


def test_splits_are_disjoint_and_right():
  rows = problems.splits()
  assert {split: len(x) for split, x in rows.items()} == {
    "labelled": 2048, "validation": 256, "test": 512,
  }  # fmt: skip
  everything = [row for split in rows.values() for row in split]
  assert len({row["problem"] for row in everything}) == 2816
  assert [row["id"] for row in everything] == list(range(2816))
  for row in everything:
    assert int(row["answer"]) == sum(map(int, row["problem"].split("+"))) % 100
    assert checked(row["solution"], row["problem"])
    assert row["solution"].endswith("=" + row["answer"])
  operands = [row["problem"].count("+") + 1 for row in rows["labelled"]]
  np.testing.assert_allclose(np.bincount(operands)[3:] / 2048, 1 / 3, atol=0.04)  # 4 deviations


def test_the_same_problem_twice_is_refused():
  row = {"problem": "01+02+03"}
  with pytest.raises(ValueError, match=r"01\+02\+03 stands in test and again in labelled"):
    problems.assert_disjoint({"test": [row], "labelled": [row]})


def test_corpus_leaves_held_out_problems_out_and_has_its_shares():
  # Hold out half of what this corpus would ask.
  first = problems.corpus(3, 4000, longest=4, worked_share=0.25, slip_share=0.1, held_out=set())
  held_out = {problem for problem, _ in first[::2]}
  pairs = problems.corpus(3, 4000, 4, 0.25, 0.1, held_out)
  assert len(pairs) == 4000 and not held_out & {problem for problem, _ in pairs}
  worked = [(p, r) for p, r in pairs if "=" in r]
  np.testing.assert_allclose(len(worked) / 4000, 0.25, atol=4 * (0.25 * 0.75 / 4000) ** 0.5)
  steps = sum(p.count("+") for p, _ in worked)
  right = sum(1 for p, r in worked if checked(r, p))
  expected = np.mean([0.9 ** p.count("+") for p, _ in worked])
  assert steps > 2000
  np.testing.assert_allclose(right / len(worked), expected, atol=4 * (0.25 / len(worked)) ** 0.5)
  guesses = [int(r) for _, r in pairs if "=" not in r]
  assert min(guesses) == 0 and max(guesses) == 99


def test_corpus_is_a_function_of_its_seed():
  a, b, c = (problems.corpus(seed, 20, 3, 0.5, 0.1, set()) for seed in (0, 0, 1))
  assert a == b != c
  assert max(problem.count("+") for problem, _ in a) == 2


def test_sums_are_right_and_cover_the_table():
  pairs = problems.sums(seed=0, count=45_000)
  for question, total in pairs:
    assert question[2] == "+" and question[5:] == "=" and len(total) == 2
    assert (int(question[:2]) + int(question[3:5])) % 100 == int(total)
  # Of 10,000 sums each is drawn 4.5 times on average: e^-4.5 = 1.1 % never are.
  assert len(set(pairs)) / 10_000 == pytest.approx(1 - np.exp(-4.5), abs=0.005)
