"""The mathematics reward: pairs whose verdict is known, and texts a checker must survive."""

import contextlib
import json
import pathlib
import random
import re
import signal
import string
import time
import timeit

import pytest

from s2d_jax.rewards import boxes, lexer, math, names, numerals, tex, units, words

EQUAL = [
  ("42", " 42 "), ("42", "042"), ("42", "42."), ("42", "42.0"), ("1000", "1,000"), ("-7", "-07"),
  ("1234567", "1{,}234{,}567"), ("\\frac{1}{2}", "\\dfrac12"), ("\\frac{1}{2}", "1/2"),
  ("-\\frac{3}{4}", "-3/4"), ("\\frac{3}{4}", "\\tfrac{3}{4}"), ("0.5", ".5"), ("5", "5\\%"),
  ("5", "5\\text{ cm}"), ("\\text{Monday}", "Monday"), ("90", "90^\\circ"), ("10", "\\$10"),
  ("(1,2)", "\\left( 1, 2 \\right)"), ("5", "x = 5"), ("\\sqrt{2}", "\\sqrt2"), ("0", "-0"),
]  # fmt: skip
DIFFERENT = [
  ("42", "24"), ("42", "4 2 1"), ("1", "1.5"), ("\\frac{1}{2}", "\\frac{2}{1}"), ("-7", "7"),
  ("(1,2)", "(2,1)"), ("\\sqrt{2}", "\\sqrt{3}"), ("12", "1,2"), ("x+1", "x-1"), ("100", "10"),
]  # fmt: skip


@pytest.mark.parametrize("answer, boxed", EQUAL)
def test_equal_answers(answer, boxed):
  assert math.reward({"answer": answer}, f"so \\boxed{{{boxed}}}.") == 1.0


@pytest.mark.parametrize("answer, boxed", DIFFERENT)
def test_different_answers(answer, boxed):
  assert math.reward({"answer": answer}, f"so \\boxed{{{boxed}}}.") == 0.0


@pytest.mark.parametrize(
  "text, expected",
  [
    ("\\boxed{1} then \\boxed{2}", "2"),
    ("\\boxed{\\frac{1}{2}} and \\frac{1}{3}", "\\frac{1}{2}"),
    ("\\fbox{3}", "3"),
    ("\\boxed{\\frac{1}{2}", None),  # cut before the brace closed
    ("2", None),
    ("\\boxed {5}", "5"), ("\\boxed 5", "5"), ("\\boxed\n{5}", "5"), ("$\\boxed 5$.", "5"),
    ("\\boxed 5.", "5"), ("\\boxed -42, so", "-42"), ("\\boxed{5} \\boxed", "5"),
    ("\\boxed{f=\\left\\{\\begin{array}{l}1\\end{array}\\right.}",
     "f=\\left\\{\\begin{array}{l}1\\end{array}\\right."),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"), ("\\boxed{\\}}", "\\}"), ("\\boxed{a\\\\}", "a\\\\"),
    ("{\\boxed{5}}", "5"), ("\\boxed{\\boxed{5}}", "5"), ("\\fbox {5}", "5"),
    ("\\boxed{5}} and {", "5"), ("\\boxedx{5}", None),
    ("\\boxed{1} \\boxed{2", None), ("\\boxed", None),
  ],
)
def test_last_boxed(text, expected):
  assert math.last_boxed(text) == expected


@pytest.mark.parametrize("text, expected", [
  ("$x=\\boxed{2}$ or $x=\\boxed{3}$", ["2", "3"]),
  ("\\boxed{1}, \\boxed{2} and \\boxed{3}.", ["1", "2", "3"]),
  ("$\\boxed{2}$ and $\\boxed{-2}$", ["2", "-2"]),
  ("\\boxed{1} \\text{ and } \\boxed{2}", ["1", "2"]),
  ("\\boxed{1}; \\boxed 2", ["1", "2"]),
  ("\\boxed{x=1} \\quad \\boxed{y=2}", ["x=1", "y=2"]),
  ("\\boxed{1} then \\boxed{2}", ["2"]),
  ("\\boxed{1}, no, it is \\boxed{2}", ["2"]),
  ("\\boxed{1}\n\n\\boxed{2}", ["2"]),
  ("Case 1: \\boxed{1}. Case 2: \\boxed{2}, \\boxed{3}", ["2", "3"]),
  ("\\boxed{a \\text{ or } \\boxed{2}}", ["2"]),
  ("none", []),
])
def test_boxes_that_together_are_the_answer(text, expected):
  assert boxes.joined(text) == expected


@pytest.mark.parametrize("answer, text, expected", [
  ("2, 3", "$x=\\boxed{2}$ or $x=\\boxed{3}$", 1), ("3", "$x=\\boxed{2}$ or $x=\\boxed{3}$", 0),
  ("3, 2", "\\boxed{2}, \\boxed{3}", 1), ("5", "$\\boxed{5}$, that is, $\\boxed{5}$", 1),
  ("5", "\\boxed{5}, \\boxed{5}", 1), ("2, 3, 4", "\\boxed{2}, \\boxed{3} and \\boxed{4}", 1),
])
def test_several_boxes_are_read_as_a_list(answer, text, expected):
  assert math.reward({"answer": answer}, text) == expected


def test_a_text_without_a_box_has_reward_0_for_an_empty_answer():
  assert math.reward({"answer": ""}, "no box here") == 0.0


def test_thousands_of_digits_and_a_million_braces_are_checked():
  # int() refuses more than 4300 digits; a quadratic scan of a million braces would not end.
  assert math.reward({"answer": "1"}, "\\boxed{" + "1" * 10000 + "}") == 0.0
  assert math.reward({"answer": "1"}, "\\boxed{" + "{}" * 1_000_000 + "}") == 0.0
  assert math.reward({"answer": "1"}, "\\boxed{\\text{" + " " * 100_000 + "}") == 0.0


# (answer, boxed, reward): a separator between digits may be dropped only between groups of three.
SEPARATED = [
  ("1 1/2", "11/2", 0), ("1 1/2", "3/2", 1), ("11/2", "1 1/2", 0), ("4 2", "42", 0),
  ("42", "4 2", 0), ("32, 349", "32349", 0), ("32349", "32, 349", 0), ("3125", "3, 125", 0),
  ("3, 125", "3125", 0), ("11 5/6", "115/6", 0), ("115/6", "11 5/6", 0), ("11 5/6", "71/6", 1),
  # Spellings of a number in groups of three.
  ("1000", "1 000", 1), ("1000", "1\\,000", 1), ("1000", "1\\!000", 1), ("1000", "1{,}000", 1),
  ("1000", "1,000", 1), ("1000", "1,\\!000", 1), ("1000", "1{,}\\! 000", 1), ("1000", "1\\ 000", 1),
  ("1234567.5", "1 234 567.5", 1), ("1234567", "1{,}234 567", 1), ("-1000", "-1,000", 1),
  ("1000", "x = 1,000", 1), ("1000", "\\$1,000.00", 1), ("1000", "1\\,000\\text{ cm}", 1),
  ("3.141592", "3.141 592", 1), ("1000x", "1\\,000x", 1), ("(1000,2)", "(1{,}000, 2)", 1),
  # Other groups are other numbers.
  ("1000", "10 00", 0), ("10000", "1 0000", 0), ("1000", "1,0,00", 0), ("100", "1,00", 0),
  ("15", "1{,}5", 0), ("15", "1\\,5", 0), ("15", "1\\;5", 0), ("15", "1\n5", 0), ("15", "1~5", 0),
  ("15", "1\\%5", 0), ("90", "9^\\circ0", 0), ("15", "$1$ $5$", 0), ("15", "1$5", 0),
  ("1000", "1 ,000", 0), ("2 3400", "2 3 400", 0), ("3.14", "3.1 4", 0), ("3.14", "3. 14", 0),
  ("3.1234", "3.1 234", 0), ("1000", "1, 000", 0), ("4 2", "4\\ 2", 1),
  # Lists keep their commas, with a space behind or without.
  ("100, 200", "100,200", 1), ("(3,125)", "(3, 125)", 1), ("(3, 125)", "(3,125)", 1),
  ("1, 2, 3", "1,2,3", 1), ("(100, 200)", "(100200)", 0), ("1,2", "1, 2", 1),
  # A mixed number is a sum.
  ("\\frac{3}{2}", "1 1/2", 1), ("1\\frac{1}{2}", "1 1/2", 1), ("1\\frac12", "\\frac{3}{2}", 1),
  ("1\\frac{1}{2}", "11/2", 0), ("-\\frac{3}{2}", "-1\\frac{1}{2}", 1), ("3/2", "1\\,\\tfrac12", 1),
  ("3/2", "1 1/2\\text{ cups}", 1), ("3/2", "x=1\\ 1/2", 1), ("21/3", "2 1/3", 0),
  ("1500/7", "1 500/7", 1), ("x^2\\frac{1}{3}", "x^{2}\\frac13", 1),
  ("x^2\\frac{1}{3}", "x^{7/3}", 0), ("2\\frac{1}{3}", "x^2\\frac13", 0), ("1/2", "0 1/2", 1),
]  # fmt: skip


@pytest.mark.parametrize("answer, boxed, expected", SEPARATED)
def test_separators_between_digits(answer, boxed, expected):
  assert math.reward({"answer": answer}, f"so \\boxed{{{boxed}}}.") == expected


# (answer, boxed, reward): a text at the end is a unit only behind a number.
UNITS = [
  ("\\text{ Monday}", "", 0), ("\\text{ Monday}", "\\text{ Tuesday}", 0),
  ("\\text{ Monday}", "Monday", 1), ("\\text{Monday}", "\\text{ Monday}", 1),
  ("n\\text{ is even}", "n\\text{ is odd}", 0), ("n\\text{ is even}", "n\\text{ is  even}", 1),
  ("n^2\\text{ is even}", "n^2\\text{ is odd}", 0), ("(A)\\text{ only}", "(A)\\text{ and B}", 0),
  ("\\infty\\text{ many}", "\\infty\\text{ few}", 0), ("x=2\\text{ or 3}", "x=2", 0),
  ("5", "5\\text{ or 6}", 0), ("5", "5\\text{ million}", 0), ("5", "5\\text{ and 6}", 0),
  ("2\\text{ (mod 3)}", "2\\text{ (mod 5)}", 0), ("2", "2\\text{ mod }", 0),
  ("5", "5\\text{ thousand}", 0), ("5", "5\\text{ dozen eggs}", 0), ("2", "2\\text{ thirds}", 0),
  ("5", "5\\text{ and a half}", 0), ("5", "5\\text{ Hundred}", 0), ("5", "5\\text{ or more}", 0),
  ("5", "5\\text{ feet 6 inches}", 0), ("7", "7\\text{ R 3}", 0), ("5", "5\\text{ < x}", 0),
  ("5", "5\\text{ to ten}", 0), ("5", "5\\text{ squared}", 0), ("101", "101\\text{ base 2}", 0),
  ("5\\text{ p.m.}", "5\\text{ a.m.}", 0), ("3", "3\\text{ at most}", 0),
  ("5\\text{ million}", "5\\text{ million}", 1), ("5\\text{ or 6}", "5\\text{ or  6}", 1),
  # Units that are one.
  ("5", "5\\text{ cm}", 1), ("5\\text{ cm}", "5", 1), ("5\\text{ in}", "5\\text{ inches}", 1),
  ("12", "12\\text{ ways}", 1), ("5", "5\\text{ sq. ft.}", 1), ("5", "5\\text{ cm$^2$}", 1),
  ("5", "5\\text{ m/s^2}", 1), ("5", "5\\text{ s^-1}", 1), ("5", "5\\text{ cm squared}", 1),
  ("\\frac{1}{2}", "\\frac12\\text{ hour}", 1), ("10\\pi", "10\\pi\\text{ units}", 1),
  ("2\\sqrt{3}", "2\\sqrt3\\text{ m}", 1), ("(3,4)", "(3, 4)\\text{ km}", 1),
  ("5", "x = 5\\text{ cm}", 1), ("5", "5\\text{ miles per hour}", 1), ("5", "5\\text{ times}", 1),
  ("5", "5\\text{ percent}", 1), ("5", "$5\\text{ cm}$", 1), ("5", "5\\text{ cm}.", 1),
  ("3\\times10^8", "3\\times10^8\\text{ m/s}", 1), ("5", "5\\text{ µm}", 1),
  # Nothing matches nothing.
  ("\\%", "", 0), ("  ", "", 0), ("", "", 0), ("\\$", "\\%", 0), (".", ".", 0), ("x=", "", 0),
  ("\\text{}", "", 0), ("^\\circ", "\\text{ }", 0), ("\\left\\right", "\\,", 0),
]  # fmt: skip


@pytest.mark.parametrize("answer, boxed, expected", UNITS)
def test_units_and_empty_answers(answer, boxed, expected):
  assert math.reward({"answer": answer}, f"so \\boxed{{{boxed}}}.") == expected


@contextlib.contextmanager
def limited(seconds):
  """Stops a search that would not end; Python's pattern engine looks for signals as it runs."""
  def stop(*_):
    raise TimeoutError(f"no answer in {seconds} seconds")
  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def cpu_seconds(function, text):
  """The least of two measured times, in seconds of this thread's processor time.

  timeit leaves Python's garbage collector out: it visits every object of the test's process.
  """
  return min(timeit.repeat(lambda: function(text), timer=time.thread_time, repeat=2, number=1))


def assert_linear(function, prefix, filler, suffix, length):
  """Four times the text takes about four times as long; a quadratic search takes 16 times.

  A machine that others use slows some measurements down, so a failed one is made again.
  """
  short, long = (prefix + filler * (n // len(filler)) + suffix for n in (length, 4 * length))
  for _ in range(5):
    allowed = 8 * cpu_seconds(function, short) + 0.002
    took = cpu_seconds(function, long)
    if took < allowed:
      return
  assert took < allowed, (prefix, filler, suffix)


PATTERNS = {f"{module.__name__.rpartition('.')[2]}.{name}": value
            for module in (boxes, lexer, math, names, numerals, tex, units, words)
            for name, value in vars(module).items() if isinstance(value, re.Pattern)}
FILLERS = [*string.printable, "\\!", "{,}", ",000", " 000", "0 ", "\\frac{", "\\text{ ", "\\$"]
PREFIXES = ["", "-", "1", "1,", "1 ", "1.", "(", "x=", "\\frac", "\\frac{", "\\text{ ", "\\sqrt"]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_takes_linear_time(name):
  pattern = PATTERNS[name]

  def search(text):
    pattern.sub("", text)
    pattern.fullmatch(text)

  with limited(120):
    for prefix in PREFIXES:
      for filler in FILLERS:
        assert_linear(search, prefix, filler, "\x00", 2000)


@pytest.mark.medium
def test_the_control_of_linear_time_is_quadratic():
  with limited(60), pytest.raises(AssertionError):
    assert_linear(re.compile(r"0*(\d+)").fullmatch, "", "0", "x", 2000)


@pytest.mark.parametrize("prefix, filler, suffix", [
  ("", "0", "x"), ("", "0", ".5"), ("-", "0", "x"), ("", "0", ","), ("", "0", ""), ("", " ", "x"),
  ("1", " ", "1"), ("", "1,", "x"), ("", "1,000", "x"), ("", "1 ", "/"), ("", "1 000 ", "x"),
  ("x", "=", "1"), ("", "\\frac1", "{"), ("", "{", ""), ("", "\\text{ a}", "1"), ("5", ".", "x"),
  ("1", "{,}000", "x"), ("1", "\\!", "000"), ("", "\\sqrt", "2"), ("1.", "0", "1"),
  ("\\{", "\\pm1,", "1\\}"), ("x\\in\\{1", ",a", "\\}"), ("", "\\text{a}=", "1"),
])  # fmt: skip
def test_a_reward_takes_linear_time(prefix, filler, suffix):
  """16,384 tokens of three digits each are 49,000 characters, as long as a response gets."""
  with limited(60):
    assert_linear(lambda text: math.reward({"answer": "1"}, f"\\boxed{{{text}}}"),
                  prefix, filler, suffix, 12_000)



@pytest.mark.parametrize("filler", [*FILLERS, "{}", "()", "\\{", "\\left", "\\begin{a}", "&",
                                    "\\\\",
                                    "^", "1/2 ", "1 1/2 ", "x=", "and 1 ", "\\text{a}", "\\pm",
                                    "\\boxed", "\\boxed{", "}\\boxed{", "\\boxed{1},", "cm ", "1."])
def test_every_repeated_text_takes_linear_time(filler):
  def in_box(text):
    math.reward({"answer": "1"}, f"\\boxed{{{text}}}")

  with limited(120):
    assert_linear(in_box, "", filler, "x", 4000)
    assert_linear(lambda text: math.reward({"answer": "1"}, text), "", filler, "x", 4000)


@pytest.mark.slow
def test_a_megabyte_of_every_character_takes_linear_time():
  with limited(3000):
    for filler in [*string.printable, "\\boxed{", "\\boxed", "}\\boxed{", "\\boxed{1},", "\\{"]:
      for box in ("", "\\boxed{"):
        assert_linear(lambda text: math.reward({"answer": "1"}, text), box, filler, "x", 250_000)


@pytest.mark.parametrize("filler", ["½", "0.", "1,000", "x=", "{", "\\text{ a}", "\\pm", "1 1/2 ",
                                    "\\frac12", "a\\text{ cm}", "(1,", "π", "°", ".", "and 1 ",
                                    "\\{\\pm1,", "\\text{no}="])
def test_an_answer_is_read_in_a_fifth_of_a_second(filler):
  """A step of training reads hundreds of answers in its own process."""
  for length in (16_384, 90_000):
    for characters in (length, 1500):
      text = f"\\boxed{{{filler * (characters // len(filler))}}}"
      assert any(cpu_seconds(lambda text: math.reward({"answer": "1"}, text), text) < 0.2
                 for _ in range(5))


def test_longer_texts_than_an_answer_are_none():
  assert math.reward({"answer": "1"}, "\\boxed{" + "0" * 50_000 + "1}") == 1.0
  assert math.reward({"answer": "1"}, "\\boxed{" + "0" * tex.MAX_CHARACTERS + "1}") == 0.0
  assert math.reward({"answer": "1"}, "\\boxed{" + "1+" * 900 + "1}") == 0.0
  assert math.reward({"answer": "1+" * 400 + "1"}, "\\boxed{" + "1 + " * 400 + "1}") == 1.0
  assert math.reward({"answer": "1+" * 1000 + "1"}, "\\boxed{" + "1+" * 1000 + "1}") == 0.0
  assert math.reward({"answer": "1"}, "\\boxed{" + "{" * 30 + "1" + "}" * 31) == 1.0
  assert math.reward({"answer": "1"}, "\\boxed{" + "{" * 99 + "1" + "}" * 100) == 0.0


# (answer, boxed, reward): a rule holds in any order with the others.
ORDER = [(answer, boxed, 1) for answer in ("\\frac{1}{3}", "1/3", "{1}/{3}") for boxed in (
  "x=\\frac{1}{3}", "\\frac{1}{3}.", "k=\\frac13.", "{\\frac{1}{3}}", "{1}/{3}", "{{1}}/3",
  "x = {\\frac{1}{3}}.", "x=y=\\frac13", "f(x)=1/3", "f'(x)=1/3", "x_1=1/3", "x_{12} = \\frac13",
  "$x=\\frac13$.", "\\theta=\\dfrac13", "x\\,=\\,\\tfrac{1}{3}\\text{ cm}.", "P(A)=\\frac13",
  "\\text{Area} = \\frac13", "AB=1/3", "+\\frac13", "\\left(\\frac13\\right)", "(1/3)")] + [
  # Equations with more than a name before "=" stay.
  ("1/3", "2x=1/3", 0), ("1/3", "x+1=\\frac13", 0), ("1/3", "xy=1/3", 0),
  ("1/3", "x=\\frac13=y", 0),
  ("1/3", "\\pi=1/3", 0), ("1/3", "\\frac13=x", 0), ("1/3", "x\\ne\\frac13", 0),
]  # fmt: skip
# (answer, boxed, reward): spellings of one TeX.
SPELLINGS = [
  ("25", "25\\text{ cm}^2", 1), ("25", "25\\text{ cm}^{2}", 1), ("25", "25\\,\\mathrm{cm}^2", 1),
  ("25", "25~\\text{m}/\\text{s}^2", 1), ("25", "25\\text{ square units}", 1), ("25", "25 cm", 1),
  ("\\frac{1}{2}", "\\frac 12", 1), ("\\frac{1}{2}", "\\frac1{2}", 1),
  ("\\frac{1}{2}", "\\frac{1}2", 1),
  ("\\frac12", "0.5", 1), ("0.5", "\\frac12", 1), ("0.25", "1/4", 1), ("1.50", "3/2", 1),
  ("\\frac{\\pi}{2}", "\\frac\\pi2", 1), ("\\frac12", "\\\\dfrac12", 1),
  ("\\frac12", "\\\\frac{1}{2}", 1),
  ("\\begin{pmatrix}1\\\\ 2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 1),
  ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix} 1 \\\\ 2 \\\\ \\end{bmatrix}", 1),
  ("\\begin{pmatrix}1\\\\2\\end{pmatrix}",
   "\\left(\\begin{array}{c} 1 \\\\ 2 \\end{array}\\right)", 1),
  ("12", "12\\,\\text{cm}", 1), ("12", "12\\text{cm}", 1), ("\\sqrt{2}", "\\sqrt 2", 1),
  ("\\sqrt{x}", "\\sqrt x", 1), ("2\\sqrt{3}", "2 \\sqrt 3", 1), ("\\sqrt{2}", "√2", 1),
  ("\\sqrt{3}", "\\sqrt[2]{3}", 1), ("x^{2}", "x^2", 1), ("x^{10}", "x^10", 1), ("a_{1}", "a_1", 1),
  ("x_{n+1}", "x_n+1", 0), ("x^{2y}", "x^2y", 0), ("90", "90°", 1), ("90", "90^{\\circ}", 1),
  ("90", "90\\degree", 1), ("90", "90\\text{ degrees}", 1), ("-5", "−5", 1), ("2\\pi", "2π", 1),
  ("x\\le 5", "x≤5", 1), ("C", "(C)", 1), ("(C)", "\\text{C}", 1),
  ("\\text{(C)}", "\\textbf{(C)}", 1),
  ("\\text{(C)}", "\\mathrm{(C)}", 1), ("C", "(D)", 0), ("x\\le 5", "x\\leq 5", 1),
  ("x\\geq 5", "x\\ge 5", 1), ("x\\ge 5", "x\\le 5", 0), ("x\\neq 1", "x\\ne 1", 1),
  ("28", "28 percent", 1), ("28\\%", "28 percent", 1), ("28\\%", "28\\text{ cm}", 0),
  ("\\theta = 5", "5", 1), ("5", "\\theta = 5", 1), ("\\emptyset", "\\varnothing", 1),
  ("\\{1,2\\}", "\\lbrace 2, 1\\rbrace", 1), ("\\{1,2\\}", "\\left\\{1,2\\right\\}", 1),
  ("5\\text{ m}", "5\\text{ cm}", 0), ("5\\text{ m}", "5\\text{ meters}", 1),
  ("60\\text{ km/h}", "60\\text{ kilometers per hour}", 1), ("\\text{Yes}", "yes", 1),
  ("\\text{Monday}", "\\text{monday}", 1), ("x", "X", 0), ("AB", "ab", 0),
  ("\\frac{-3}{4}", "-\\frac34", 1), ("\\frac{3}{-4}", "-\\frac34", 1),
  ("\\frac{-3}{-4}", "3/4", 1),
  ("3^{-1}", "3^-1", 1), ("(-\\infty,2]\\cup[5,\\infty)", "(-∞, 2]∪[5, ∞)", 1),
  ("1\\pm\\sqrt2", "1+\\sqrt{2}, 1-\\sqrt{2}", 1),
]  # fmt: skip
NEAR_NOTHING = [("=", "=", 1), ("\\%", "\\%", 0), ("\\$", "\\$", 0), ("^\\circ", "°", 0),
                ("-", "-", 0), ("\\text{ }", "\\text{ }", 0), ("\\{\\}", "\\{\\}", 1), ("0", "", 0)]


@pytest.mark.parametrize("answer, boxed, expected", ORDER + SPELLINGS + NEAR_NOTHING)
def test_orders_and_spellings(answer, boxed, expected):
  assert math.reward({"answer": answer}, f"so \\boxed{{{boxed}}}.") == expected


@pytest.mark.parametrize("answer", [
  "\\boxed{5}", "\\left\\{1", "She has 2 + 3 = 5 apples.\n#### 5", "#### 5", "  ", "", ".", "\\%",
  "\\text{}", "{", "}", "\\frac{1}", "\\sqrt", "x^", "\\begin{pmatrix} 1 \\\\ 2",
  "{" * 99 + "}" * 99,
  "\\{1,2", "1,2\\}", "\\begin{a}1\\end{b}",
])
def test_an_answer_that_no_response_can_give_is_found_by_the_checker(answer):
  assert math.reward({"answer": answer}, f"\\boxed{{{answer}}}") == 0.0
  assert math.verified({"answer": answer}, f"\\boxed{{{answer}}}") == 0.0


def labelled_rows():
  path = pathlib.Path(__file__).with_name("labelled_answers.jsonl")
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def spellings():
  """Many answers, and random strings of the same tokens."""
  rows = [*((a, b) for a, b, _ in SEPARATED + UNITS + ORDER + SPELLINGS + NEAR_NOTHING), *EQUAL,
          *DIFFERENT]
  found = [text for row in rows for text in row]
  found += [text for row in labelled_rows()
            for text in (row["answer"], *boxes.joined(row["response"]))]
  tokens = sorted({token for text in found for token in lexer.tokens(text)})
  choose = random.Random(0)
  return found + ["".join(choose.choices(tokens, k=choose.randrange(1, 9))) for _ in range(4000)]


@pytest.mark.parametrize("ordered", [False, True])
def test_normalising_twice_changes_nothing(ordered):
  for text in spellings():
    once = math.normalised(text, ordered)
    assert math.normalised(once, ordered) == once, text


def test_a_name_and_a_full_stop_change_no_verdict():
  rows = [*((a, b) for a, b, _ in SEPARATED + UNITS + SPELLINGS), *EQUAL, *DIFFERENT]
  for answer, boxed in rows:
    expected = math.reward({"answer": answer}, f"\\boxed{{{boxed}}}")
    for changed in (f"x={boxed}", f"x = {boxed}", f"{boxed}.", f"\\theta={boxed}.", f"${boxed}$"):
      assert math.reward({"answer": answer}, f"\\boxed{{{changed}}}") == expected, (answer, changed)


def test_the_order_of_a_list_is_an_option():
  problem = {"answer": "1, 2, 3"}
  assert math.reward(problem, "\\boxed{3, 1, 2}") == 1.0
  assert math.reward_in_order(problem, "\\boxed{3, 1, 2}") == 0.0
  assert math.reward_in_order(problem, "\\boxed{1,2,3}") == 1.0
  assert math.reward_in_order(problem, "\\boxed{1} and \\boxed{2} and \\boxed{3}") == 1.0
  # A set has no order, and a tuple always has one.
  assert math.reward_in_order({"answer": "\\{1,2\\}"}, "\\boxed{\\{2,1\\}}") == 1.0
  assert math.reward({"answer": "(1,2)"}, "\\boxed{(2,1)}") == 0.0
  assert math.answer("\\boxed{3, 1}") == math.answer("\\boxed{1, 3}")
  assert math.answer_in_order("\\boxed{3, 1}") != math.answer_in_order("\\boxed{1, 3}")


def test_the_string_match_agrees_with_every_label_that_needs_no_algebra():
  wrong = [row for row in labelled_rows()
           if (math.reward(row, row["response"]) == 1) != row["equal"]]
  # An answer that algebra alone finds equal may be missed, and no wrong one is accepted.
  assert all(row["algebra"] and row["equal"] for row in wrong)


def test_the_answer_is_one_spelling_of_the_last_box():
  assert math.answer(r"\boxed{2}, so \boxed{\dfrac12}.") == math.answer(r"\boxed{1/2}") == "1/2"
  assert math.answer("no box") is None and math.answer(r"\boxed{ }") is None
