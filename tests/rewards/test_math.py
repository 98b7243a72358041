"""The mathematics reward: pairs whose verdict is known, and texts a checker must survive."""

import pytest

from s2d_jax.rewards import math

SAME = [
  ("42", " 42 "), ("42", "042"), ("42", "42."), ("42", "42.0"), ("1000", "1,000"), ("-7", "-07"),
  ("1234567", "1{,}234{,}567"), ("\\frac{1}{2}", "\\dfrac12"), ("\\frac{1}{2}", "1/2"),
  ("-\\frac{3}{4}", "-3/4"), ("\\frac{3}{4}", "\\tfrac{3}{4}"), ("0.5", ".5"), ("5", "5\\%"),
  ("5", "5\\text{ cm}"), ("\\text{Monday}", "Monday"), ("90", "90^\\circ"), ("10", "\\$10"),
  ("(1,2)", "\\left( 1, 2 \\right)"), ("5", "x = 5"), ("\\sqrt{2}", "\\sqrt2"), ("0", "-0"),
]  # fmt: skip
OTHER = [
  ("42", "24"), ("42", "4 2 1"), ("1", "1.5"), ("\\frac{1}{2}", "\\frac{2}{1}"), ("-7", "7"),
  ("(1,2)", "(2,1)"), ("\\sqrt{2}", "\\sqrt{3}"), ("12", "1,2"), ("x+1", "x-1"), ("100", "10"),
]  # fmt: skip


@pytest.mark.parametrize("answer, given", SAME)
def test_same(answer, given):
  assert math.reward({"answer": answer}, f"so \\boxed{{{given}}}.") == 1.0


@pytest.mark.parametrize("answer, given", OTHER)
def test_other(answer, given):
  assert math.reward({"answer": answer}, f"so \\boxed{{{given}}}.") == 0.0


@pytest.mark.parametrize(
  "text, expected",
  [
    ("\\boxed{1} then \\boxed{2}", "2"),
    ("\\boxed{\\frac{1}{2}} and \\frac{1}{3}", "\\frac{1}{2}"),
    ("\\fbox{3}", "3"),
    ("\\boxed{\\frac{1}{2}", None),  # cut before the brace closed
    ("2", None),
  ],
)
def test_last_boxed(text, expected):
  assert math.last_boxed(text) == expected


def test_no_box_earns_nothing_even_for_an_empty_answer():
  assert math.reward({"answer": ""}, "no box here") == 0.0


def test_thousands_of_digits_and_braces_are_quick():
  # int() refuses more than 4300 digits; a quadratic scan of a million braces would not end.
  assert math.reward({"answer": "1"}, "\\boxed{" + "1" * 10000 + "}") == 0.0
  assert math.reward({"answer": "1"}, "\\boxed{" + "{}" * 1_000_000 + "}") == 0.0
  assert math.reward({"answer": "1"}, "\\boxed{\\text{" + " " * 100_000 + "}") == 0.0
