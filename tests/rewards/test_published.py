r"""Answers that the published comparison of MATH takes for one are one here too.

They also take 10 cm for 10 m and drop every word behind a number, which is not done here.
"""

import pytest

from s2d_jax.rewards import math
from tests.rewards import published

# (an answer as the dataset spells it, the spelling of a response).
RESPELLED = [
  ("\\frac{1}{2}", "\\frac12"), ("\\frac{1}{2}", "\\dfrac{1}{2}"), ("\\frac{1}{2}", "\\tfrac12"),
  ("\\frac{1}{2}", "0.5"), ("\\frac{1}{2}", ".5"), ("\\frac{1}{2}", "1/2"),
  ("\\frac{1}{2}", "\\frac1{2}"), ("\\frac{1}{2}", "x=\\frac{1}{2}"), ("\\frac12", "k = 1/2"),
  ("-\\frac{3}{4}", "-\\dfrac34"), ("\\frac{137}{190}", "137/190"), ("\\frac{-3}{4}", "-3/4"),
  ("\\frac{\\sqrt{3}}{2}", "\\frac{\\sqrt3}{2}"), ("\\frac{\\sqrt3}2", "\\dfrac{\\sqrt{3}}2"),
  ("\\frac{a}{b}", "\\frac ab"), ("\\frac{x+1}{2}", "\\dfrac{x + 1}{2}"),
  ("2\\sqrt{3}", "2\\sqrt3"), ("2\\sqrt{3}", "2 \\sqrt3"),
  ("\\sqrt{51}", "\\sqrt{ 51 }"), ("5\\sqrt{2}+1", "5\\sqrt2 + 1"),
  ("\\sqrt[3]{2}", "\\sqrt[3]{2} "),
  ("10\\text{ cm}", "10"), ("10", "10\\text{ cm}"), ("18", "18\\text{ inches}"),
  ("600", "600\\text{ square units}"), ("120\\text{ minutes}", "120"),
  ("6\\pi", "6\\pi\\text{ feet}"),
  ("20\\%", "20"), ("45", "45\\%"), ("33\\frac{1}{3}\\%", "33\\frac13\\%"),
  ("10\\!000", "10000"), ("6\\!500\\!000", "6500000"),
  ("\\$36", "36"), ("36", "\\$36"), ("\\$4.50", "4.50"), ("\\$0.75", "0.75"),
  ("90^\\circ", "90"), ("90", "90^{\\circ}"), ("135^\\circ", "135^{\\circ}"),
  ("\\left(3,\\frac{\\pi}{2}\\right)", "(3, \\frac{\\pi}{2})"), ("(2,3)", "\\left( 2, 3 \\right)"),
  ("[0,1)", "\\left[0, 1\\right)"),
  ("(-\\infty,2)\\cup(3,\\infty)", "( -\\infty, 2) \\cup (3, \\infty)"),
  ("x^2+2x+1", "x^2 + 2x + 1"), ("2x-7", "y=2x-7"), ("5", "x=5"), ("5", "5 "),
  ("7", "\n7"), ("\\{1,2\\}", "\\left\\{ 1, 2\\right\\}"), ("3+4i", "z=3+4i"), ("0.25", ".25"),
  ("1,2,3", "1, 2, 3"),
]  # fmt: skip
# Different answers, by the published rules and here.
DIFFERENT = [("\\frac{1}{2}", "\\frac{2}{1}"), ("2\\sqrt{3}", "3\\sqrt2"), ("(2,3)", "(3,2)"),
             ("10\\text{ cm}", "11\\text{ cm}"), ("\\{1,2\\}", "\\{1,3\\}"), ("5", "-5")]


@pytest.mark.parametrize("answer, boxed", RESPELLED)
def test_answers_that_the_published_rules_find_equal(answer, boxed):
  assert published.is_equiv(answer, boxed)
  assert math.reward({"answer": answer}, f"\\boxed{{{boxed}}}") == 1.0


@pytest.mark.parametrize("answer, boxed", DIFFERENT)
def test_answers_that_differ_by_the_published_rules(answer, boxed):
  assert not published.is_equiv(answer, boxed)
  assert math.reward({"answer": answer}, f"\\boxed{{{boxed}}}") == 0.0
