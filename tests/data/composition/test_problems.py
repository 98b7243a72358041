"""Composition: examples by hand, the rule, disjoint splits, the corpus and its shares of orders."""

import hashlib
import json
import re

import numpy as np
import pytest

from s2d_jax.data.composition import problems

FAMILIES = ("sum", "product", "left", "right", "long")
# Recorded scores are of these problems: another hash makes them incomparable.
FROZEN = "2400b9e71314a374146b8d21fd73611a4d9c9475a85447d2cdbf5bbf76027b88"


def by_rule(text):
  """The answer by the rule of the module's docstring, from a problem's text alone."""
  tokens = re.findall(r"\d+|[-+*]", text)
  for i in range(len(tokens) - 2, 0, -1):
    if tokens[i] == "*":
      tokens[i - 1 : i + 2] = [int(tokens[i - 1]) * int(tokens[i + 1])]
  numbers, operators = list(map(int, tokens[::2])), tokens[1::2]
  if text.endswith("#"):
    while operators:
      b, a, operator = numbers.pop(), numbers.pop(), operators.pop()
      numbers.append(a + b if operator == "+" else a - b)
    return f"{numbers[0] % 100:02d}"
  signed = zip(["+", *operators], numbers, strict=True)
  return f"{sum(x if operator == '+' else -x for operator, x in signed) % 100:02d}"


def order_of(problem, response):
  """The order of a worked solution without slips, found by trying all of the family's."""
  name = problems.family({"problem": problem})
  operands = tuple(map(int, re.findall(r"\d+", problem)))
  return next((order for order in problems.FAMILIES[name].shares
               if problems.worked(name, operands, order) == response), None)


@pytest.mark.parametrize("family, operands, text, worked", [
    ("sum", (12, 34, 57), "12+34+57", "12+34=46;46+57=03"),
    ("product", (12, 34, 5), "12+34*5", "34*5=70;12+70=82"),
    ("left", (12, 34, 57), "12-34-57", "12-34=78;78-57=21"),
    ("right", (12, 34, 57), "12-34-57#", "34-57=77;12-77=35"),
    ("long", (3, 34, 5, 8), "03-34*5-08", "34*5=70;03-70=33;33-08=25"),
])
def test_worked_by_hand(family, operands, text, worked):
  assert problems.problem(family, operands) == text
  assert problems.family({"problem": text}) == family
  assert problems.worked(family, operands) == worked
  assert problems.answer(family, operands) == worked[-2:] == by_rule(text)


def test_wrong_orders_and_slips_by_hand():
  assert problems.worked("product", (12, 34, 5), (0, 1)) == "12+34=46;46*5=30"
  assert problems.worked("left", (12, 34, 57), (1, 0)) == "34-57=77;12-77=35"
  assert problems.worked("left", (12, 34, 57), (0,)) == "12-34=78"
  assert problems.worked("long", (3, 34, 5, 8), (1, 2, 0)) == "34*5=70;70-08=62;03-62=41"
  assert problems.worked("left", (12, 34, 57), slips=(1, 0)) == "12-34=79;79-57=22"


def test_splits_are_disjoint_and_right():
  rows = problems.splits()
  assert {split: len(x) for split, x in rows.items()} == {
      "labelled": 2048, "validation": 256, "test": 512}
  everything = [row for split in rows.values() for row in split]
  assert len({row["problem"] for row in everything}) == 2816
  assert [row["id"] for row in everything] == list(range(2816))
  for row in everything:
    assert row["answer"] == by_rule(row["problem"]) == row["solution"].rpartition("=")[2]
    for a, operator, b, result in re.findall(r"(\d+)([-+*])(\d+)=(\d\d)", row["solution"]):
      assert by_rule(a + operator + b) == result
  # Each of the five has a fifth: within 4 deviations.
  found = [problems.family(row) for row in rows["labelled"]]
  shares = [found.count(name) / 2048 for name in FAMILIES]
  np.testing.assert_allclose(shares, 0.2, atol=4 * (0.2 * 0.8 / 2048) ** 0.5)


def test_splits_are_frozen():
  text = json.dumps(problems.splits(), sort_keys=True)
  assert hashlib.sha256(text.encode()).hexdigest() == FROZEN


def test_the_first_order_alone_is_right():
  # Of a wrong order at most one problem in forty has the right answer by chance.
  rows = problems.splits()["labelled"]
  for name, family in problems.FAMILIES.items():
    of_family = [row for row in rows if problems.family(row) == name]
    for order in list(family.shares)[1:]:
      lucky = [row for row in of_family if problems.worked(
          name, tuple(map(int, re.findall(r"\d+", row["problem"]))), order).endswith(
              "=" + row["answer"])]
      assert len(lucky) / len(of_family) < 0.05, (name, order)
    assert sum(family.shares.values()) == pytest.approx(1.0)


def test_left_and_right_look_alike_and_have_equal_shares():
  alike, other = problems.FAMILIES["left"], problems.FAMILIES["right"]
  assert alike.operators == other.operators and alike.shares == other.shares
  assert problems.right_order("left") != problems.right_order("right")


def test_corpus_leaves_held_out_problems_out_and_has_its_shares():
  # Hold out half of what this corpus would ask.
  first = problems.corpus(3, 6000, 4, 0.5, 0.0, held_out=set())
  held_out = {problem for problem, _ in first[::2]}
  pairs = problems.corpus(3, 6000, 4, 0.5, 0.0, held_out)
  assert len(pairs) == 6000 and not held_out & {problem for problem, _ in pairs}
  worked = [(p, r) for p, r in pairs if "=" in r]
  np.testing.assert_allclose(len(worked) / 6000, 0.5, atol=4 * (0.25 / 6000) ** 0.5)
  for name, family in problems.FAMILIES.items():
    orders = [order_of(p, r) for p, r in worked if problems.family({"problem": p}) == name]
    for order, share in family.shares.items():
      np.testing.assert_allclose(orders.count(order) / len(orders), share,
                                 err_msg=f"{name} {order}",
                                 atol=4 * (share * (1 - share) / len(orders)) ** 0.5)
  guesses = [int(r) for _, r in pairs if "=" not in r]
  assert min(guesses) == 0 and max(guesses) == 99


def test_slips_have_their_share():
  pairs = problems.corpus(3, 4000, 3, 1.0, 0.2, set())
  steps = [step for _, response in pairs for step in response.split(";")]
  right = sum(by_rule(step.partition("=")[0]) == step[-2:] for step in steps)
  assert right / len(steps) == pytest.approx(0.8, abs=4 * (0.16 / len(steps)) ** 0.5)
  assert max(len(re.findall(r"\d+", problem)) for problem, _ in pairs) == 3


def test_corpus_is_a_function_of_its_seed():
  a, b, c = (problems.corpus(seed, 20, 3, 0.5, 0.1, set()) for seed in (0, 0, 1))
  assert a == b != c


def test_steps_are_right_and_cover_the_table():
  pairs = problems.steps(seed=0, count=40_000)
  for question, result in pairs:
    assert question.endswith("=") and by_rule(question[:-1]) == result
  # Of 200 products each is drawn 40 times on average.
  products = {question for question, _ in pairs if "*" in question}
  assert len(products) == 200
  # Of 20,000 sums and differences each is drawn 1.6 times: e^-1.6 = 20 % never are.
  others = {question for question, _ in pairs if "*" not in question}
  assert len(others) / 20_000 == pytest.approx(1 - np.exp(-1.6), abs=0.01)
