r"""Numbers in an answer: separators between digits, decimals, fractions and mixed numbers.

Only groups of exactly three digits close up: 1 000, 1\,000, 1\!000, 1{,}000 and 1,000 are 1000,
but "4 2" and "32, 349" are two numbers each. A mixed number is a sum: 1 1/2 is 3/2.
"""

import math
import re
from collections.abc import Sequence

_DIGITS = re.compile(r"[0-9]+")
# Between two groups of digits, spacings as " ": spaces, or a comma that TeX sets without a space.
_SEPARATOR = re.compile(r" ?(?:\\! ?)+| |(?:\{,\}|,(?=\\!)) ?(?:\\! ?)*")
_IN_SEPARATORS = {" ", "\\!", ",", "{", "}"}
_LONGEST_SEPARATOR = 8  # tokens
_MOST_DIGITS = 15       # of a decimal that becomes a fraction, and of the parts of a mixed number
_WHOLE = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]+))?")
# From the first character alone: a search that began at each would take quadratic time.
_FRACTION = re.compile(r"\A(-?)(?:\\frac\{(-?)(\w+)\}\{(-?)(\w+)\}|(\w+)/(-?)(\w+))", re.ASCII)
_BASE_TEN = re.compile(r"\A(-?[0-9]+)_\{10\}")
_PROPER = re.compile(r"\\frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}|([0-9]{1,9})/([0-9]{1,9})")
# Behind these a whole number begins a value, and is neither exponent nor factor.
_BEFORE_VALUE = {"+", "-", "=", "<", ">", "\\le", "\\ge", "\\pm", "\\in", "\\$", "\\cdot"}


def grouped(tokens: Sequence[str], tight: bool) -> list[str]:
  """Tokens with the digits of each number in one token, and braces around a comma left out.

  Args:
    tight: whether commas without a space may separate thousands. In brackets they never do:
      (3,125) is a pair.
  """
  found: list[str] = []
  depth = 0
  i = 0
  while i < len(tokens):
    token = tokens[i]
    depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
    bare_point = token == "." and not _is_number(found[-1:]) and _is_digits(tokens[i + 1 : i + 2])
    if bare_point:
      # .5 is 0.5
      i = _fraction_digits(tokens, i, "0", found)
    elif _DIGITS.fullmatch(token):
      i = _number(tokens, i, found, tight and depth <= 0)
    elif token == "{" and list(tokens[i + 1 : i + 3]) == [",", "}"]:
      found.append(",")
      i += 3
    else:
      found.append(token)
      i += 1
  return found


def _is_digits(tokens: Sequence[str]) -> bool:
  return bool(tokens) and _DIGITS.fullmatch(tokens[0]) is not None


def _is_number(tokens: Sequence[str]) -> bool:
  return bool(tokens) and tokens[0][0] in "0123456789"


def _groups(tokens: Sequence[str], i: int, tight: bool) -> tuple[list[str], list[str], int]:
  """(groups of digits, separators between them, the index behind them), from the group at i."""
  groups = [tokens[i]]
  separators: list[str] = []
  i += 1
  while True:
    k = i
    while k < len(tokens) and k - i < _LONGEST_SEPARATOR and tokens[k] in _IN_SEPARATORS:
      k += 1
    separator = "".join(tokens[i:k])
    fits = separator == "," if tight and separator == "," else _SEPARATOR.fullmatch(separator)
    if not fits or not _is_digits(tokens[k : k + 1]):
      return groups, separators, i
    separators.append(separator)
    groups.append(tokens[k])
    i = k + 1


def _number(tokens: Sequence[str], i: int, found: list[str], tight: bool) -> int:
  """Adds the number or numbers at i to `found`; returns the index behind them."""
  before = found[-1] if found else ""
  groups, separators, i = _groups(tokens, i, tight)
  closes = (len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:])
            and before not in ("^", "_", ".")
            # 1 234,567 mixes two conventions, so neither is certain.
            and ("," not in separators or set(separators) == {","}))
  if closes:
    groups = ["".join(groups)]
  for group, separator in zip(groups, separators, strict=False):
    if len(groups) > 1:
      found += [group, "," if "," in separator else " "]
  if tokens[i : i + 1] == ["."] and _is_digits(tokens[i + 1 : i + 2]) and before != ".":
    return _fraction_digits(tokens, i, groups[-1], found)
  found.append(groups[-1])
  return i


def _fraction_digits(tokens: Sequence[str], i: int, whole: str, found: list[str]) -> int:
  """Adds a decimal whose point is at i; its digits may stand in groups of three."""
  groups, separators, end = _groups(tokens, i + 1, tight=False)
  if all(len(group) == 3 for group in groups):
    found.append(f"{whole}.{''.join(groups)}")
    return end
  found.append(f"{whole}.{groups[0]}")
  for group, separator in zip(groups[1:], separators, strict=True):
    found += ["," if "," in separator else " ", group]
  return end


def shortest(number: str) -> str:
  """A number without zeros that say nothing: 042 is 42, and 0.50 is 0.5."""
  # By its text: int() refuses the thousands of digits that a model may write.
  whole, _, digits = number.partition(".")
  whole = whole.lstrip("0") or "0"
  digits = digits.rstrip("0")
  return f"{whole}.{digits}" if digits else whole


def mixed(atoms: Sequence[str]) -> list[str]:
  r"""Atoms with every mixed number as one fraction: 1 1/2 and 1\frac{1}{2} are \frac{3}{2}."""
  found: list[str] = []
  last = ""  # the last atom that is not a space
  i = 0
  while i < len(atoms):
    atom = atoms[i]
    length = 0
    if (not last or last in _BEFORE_VALUE) and _is_digits([atom]) and len(atom) < 10:
      space = atoms[i + 1 : i + 2] == [" "]
      start = i + 1 + space
      if start < len(atoms) and atoms[start].startswith("\\frac"):
        length = 1
      elif space and atoms[start + 1 : start + 2] in (["/"], [" "]):
        length = _slashed(atoms, start)
      proper = length and _PROPER.fullmatch("".join(atoms[start : start + length]).replace(" ", ""))
      top, bottom = (int(x) for x in proper.groups() if x) if proper else (0, 0)
      if 0 < top < bottom:
        atom = f"\\frac{{{int(atom) * bottom + top}}}{{{bottom}}}"
        i = start + length - 1
    found.append(atom)
    last = last if atom == " " else atom
    i += 1
  return found


def _slashed(atoms: Sequence[str], start: int) -> int:
  """The number of atoms of a fraction like 1/2 at `start`, or 0 where it is something else."""
  end = start
  digits = 0
  while end < len(atoms) and end - start < 5 and digits < 2:
    digits += _is_digits(atoms[end : end + 1])
    end += 1
  # Behind 1/2x the fraction ends nowhere that all readers agree on.
  after = "".join(atoms[end : end + 1])
  return 0 if after[:1].isalnum() or after in (".", "/") else end - start


def number(answer: str) -> str:
  """An answer that is one number in one spelling: 0.5 and \\frac12 are 1/2; others are unchanged.

  A fraction is not reduced: whoever is asked for 2/4 in lowest terms has not answered with it.
  """
  decimal = _BASE_TEN.fullmatch(answer)
  answer = decimal[1] if decimal else answer
  found = _WHOLE.fullmatch(answer)
  if found:
    return _decimal(found[1], found[2], (found[3] or "").rstrip("0"))
  found = _FRACTION.fullmatch(answer)
  if found is None:
    return answer
  minus = sum(sign == "-" for sign in (found[1], found[2], found[4], found[7])) % 2
  top = found[3] or found[6]
  bottom = found[5] or found[8]
  return f"{'-' * minus}{top}/{bottom}"


def _decimal(sign: str, whole: str, digits: str) -> str:
  """A whole number or decimal; a short decimal is a fraction in lowest terms."""
  whole = whole.lstrip("0") or "0"
  minus = "-" if sign == "-" and (whole != "0" or digits) else ""
  if not digits:
    return minus + whole
  if len(whole) + len(digits) > _MOST_DIGITS:
    return f"{minus}{whole}.{digits}"
  top = int(whole + digits)
  bottom = 10 ** len(digits)
  shared = math.gcd(top, bottom)
  return f"{minus}{top // shared}/{bottom // shared}"
