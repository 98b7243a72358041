"""Expressions in TeX compared by math-verify, which parses and simplifies with sympy.

As `verify`, only `worker` processes import this module. Decimals are exact fractions here, since
math-verify would round 1/3 to 0.333333.
"""

import functools
import re
from collections.abc import Callable

import math_verify
import sympy
from math_verify.parser import LatexExtractionConfig, NormalizationConfig

_DECIMAL = re.compile(r"([0-9]+)\.([0-9]+)")
_REPEATING = re.compile(r"([0-9]+)\.([0-9]*)\\overline\{([0-9]+)\}")
_DEGREES = re.compile(r"([0-9]+)\^\{\\circ\}")
# Letters that stand for a word and not for a product of variables.
_WORDS = re.compile(r"(?<![\\a-zA-Z])(?!xyz|abc|pqr|mnk)[a-zA-Z]{3,}")
# A number in another base than ten, whose index the parser would drop.
_BASE = re.compile(r"[0-9]_")
# Signs that the parser drops or reads as others: 5' as 5, and 5:1 as a division.
_UNREAD = re.compile(r"[:'?]|\\(?:dots|approx|sim|equiv|prime|to)(?![a-z])|\\text")
_CAPITALS = re.compile(r"[A-Z]{2,}")
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]+")
_DIGITS = 30  # significant ones to which two numbers must agree, however small they are
# Units are read here already. Math-verify would drop more: 20th would be 20.
_CONFIG = (LatexExtractionConfig(normalization_config=NormalizationConfig(
    units=False, malformed_operators=True, nits=True)),)

# The errors of sympy and math-verify where they cannot evaluate an expression, as with 16 \mod 15.
# Limits of memory and depth are not among them: those end the check.
_NOT_EVALUATED = (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError)


def _none_if_not_evaluated(function: Callable) -> Callable:
  """The function, which returns None where an expression cannot be evaluated."""
  @functools.wraps(function)
  def guarded(*arguments):
    try:
      return function(*arguments)
    except _NOT_EVALUATED:
      return None
  return guarded


def equal(gold: str, found: str) -> bool:
  """Whether math-verify finds two expressions equal."""
  # AB and IV name points and a number, so they are not BA and VI.
  if differ_by_case(gold, found) or _CAPITALS.fullmatch(gold) or _CAPITALS.fullmatch(found):
    return False
  first, second = _parsed(gold), _parsed(found)
  return first is not None and second is not None and bool(_values_equal(first, second))


@_none_if_not_evaluated
def _values_equal(first: sympy.Expr, second: sympy.Expr) -> bool:
  """Whether two expressions are equal; None where that is not evaluated."""
  if not math_verify.verify(first, second, float_rounding=_DIGITS, timeout_seconds=None):
    return False
  # It takes differences below 1e-15 for 0, and so 10^-20 for 10^-30.
  if first.free_symbols or second.free_symbols:
    return True
  values = [sympy.N(x, _DIGITS) for x in (first, second)]
  return bool(abs(values[0] - values[1]) <= abs(values[0]) * sympy.Float(10) ** (5 - _DIGITS))


def rounds(value: str, decimal: str) -> bool:
  """Whether a decimal is a number to as many digits as it has; its last may be cut instead."""
  number = _parsed(value)
  if number is None or number.free_symbols:
    return False
  return bool(_is_near(number, decimal))


@_none_if_not_evaluated
def _is_near(number: sympy.Expr, decimal: str) -> bool:
  """Whether a number is less than one of a decimal's last place away.

  None where that is not evaluated.
  """
  digits = len(decimal.partition(".")[2])
  distance = abs(sympy.N(number, _DIGITS) - sympy.Rational(decimal))
  return bool(distance < sympy.Rational(1, 10**digits))


@_none_if_not_evaluated
def ratio(gold: tuple[str, str], found: tuple[str, str]) -> sympy.Expr | None:
  """The number by which the difference of one relation's sides is a multiple of another's.

  None where there is none, or it is 0.
  """
  sides = [_parsed(x) for x in (*gold, *found)]
  if None in sides:
    return None
  multiple = sympy.simplify((sides[0] - sides[1]) / (sides[2] - sides[3]))
  return multiple if multiple.is_number and multiple.is_finite and multiple != 0 else None


def differ_by_case(gold: str, found: str) -> bool:
  """Whether small letters of one are capitals of the other: math-verify takes X for x."""
  letters = [set(_LETTERS.findall(x)) for x in (gold, found)]
  return letters[0] != letters[1] and len({"".join(sorted(x)).lower() for x in letters}) == 1 or \
      gold.lower() == found.lower()


@_none_if_not_evaluated
def _parsed(answer: str) -> sympy.Expr | None:
  """An expression as sympy's, or None where math-verify does not read it as one."""
  # It takes "east" for a product like "seat".
  if any(pattern.search(answer) for pattern in (_WORDS, _BASE, _UNREAD)):
    return None
  exact = _DECIMAL.sub(_fraction, _REPEATING.sub(_repeating, answer))
  exact = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", exact)
  found = math_verify.parse(f"\\boxed{{{exact}}}", _CONFIG, fallback_mode="no_fallback",
                            parsing_timeout=None)
  if not found or not isinstance(found[0], sympy.Expr):
    return None
  # The parser reads the i of 4i as a real variable.
  return found[0].subs({x: sympy.I for x in found[0].free_symbols if x.name == "i"})


def _fraction(decimal: re.Match) -> str:
  """A decimal as a fraction of whole numbers."""
  return f"\\frac{{{decimal[1]}{decimal[2]}}}{{1{'0' * len(decimal[2])}}}"


def _repeating(decimal: re.Match) -> str:
  """A decimal whose last digits repeat for ever as a fraction of whole numbers."""
  whole, digits, repeated = decimal.groups()
  # int() refuses thousands of digits.
  if len(decimal[0]) > 60:
    return decimal[0]
  top = int(whole + digits + repeated) - int(whole + digits)
  return f"\\frac{{{top}}}{{{'9' * len(repeated)}{'0' * len(digits)}}}"
