r"""The parts around a value in an answer: a name before "=", a unit behind it, a conjunction.

A unit is one only behind a number: 5\text{ cm} is 5, but n\text{ is odd} stays whole. Words that
change a value, say something of it or add an alternative never count as units.
"""

import re
from collections.abc import Sequence

from s2d_jax.rewards import numerals

_WORD = re.compile(r"[^\W\d_]+")
# Words behind a number that change its value, say something of it or add an alternative.
_NOT_IN_UNITS = frozenset(
  """
  zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty
  sixty seventy eighty ninety hundred hundreds thousand thousands million millions billion billions
  trillion trillions quadrillion dozen dozens half halves third thirds fourth fourths fifth fifths
  sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths
  thousandth thousandths millionth millionths quarter quarters score scores gross pair pairs
  negative positive minus plus factorial times
  or and to through but not nor if when where for except excluding is are was equals with without
  mod modulo remainder base than most least odd even prime none infinity less more greater fewer
  am pm bc ad bce ce north south east west i ii iii k
  """.split()
) - {"times"}
_UNITS = {
  "meter": "m meter meters metre metres", "centimeter": "cm centimeter centimeters centimetre "
  "centimetres", "millimeter": "mm millimeter millimeters", "kilometer": "km kilometer kilometers",
  "inch": "in inch inches", "foot": "ft foot feet", "yard": "yd yard yards",
  "mile": "mi mile miles", "gram": "g gram grams", "kilogram": "kg kilogram kilograms",
  "milligram": "mg milligram milligrams", "pound": "lb lbs pound pounds",
  "ounce": "oz ounce ounces", "ton": "ton tons", "second": "s sec secs second seconds",
  "minute": "min mins minute minutes", "hour": "h hr hrs hour hours", "day": "day days",
  "week": "week weeks", "month": "month months", "year": "yr year years",
  "percent": "percent percentage pct", "degree": "deg degree degrees", "radian": "rad radians",
  "dollar": "dollar dollars usd", "cent": "cent cents", "liter": "l liter liters litre litres",
  "milliliter": "ml milliliter milliliters", "unit": "unit units", "mph": "mph", "kph": "kph",
}
_UNIT_OF = {alias: unit for unit, aliases in _UNITS.items() for alias in aliases.split()}
# With a unit they say which power of it, or what it is counted by.
_WITH_UNITS = {"square", "squared", "cubic", "cubed", "sq", "cu", "per", "of", "a", "each"}
_MORE_THAN_UNIT = re.compile(r"(?<!\^)(?<!\^-)[0-9]|[<>=≤≥≠±;]|^(?:squared|cubed)\b")
_NAME_WORD = re.compile(r"[A-Za-z]|[A-Z]{2,3}|\\[A-Za-z]+|\\text\{[^{}]*\}")
_NOT_NAMES = {"\\pi", "\\infty", "\\emptyset", "\\pm", "\\sin", "\\cos", "\\tan", "\\ln", "\\log",
              "\\circ"}
_ARGUMENTS = re.compile(r"\([A-Za-z](?:,[A-Za-z])*\)")
_CAPITALISED = re.compile(r"[A-Z][a-z]{2,}|YES|NO|No|TRUE|FALSE|NONE|True|False")
_LONGEST_NAME = 6  # atoms
_DIGITS = tuple("0123456789.")


def conjunctions(tokens: Sequence[str]) -> list[str]:
  """Tokens with "and" or "or" between two values as ";": the values are a list.

  In an answer with other words, as in "Alice and Bob", they belong to the text.
  """
  words = {token for token in tokens if len(token) > 2 and token.isalpha()} - {"and"}
  joining = {"and", "or"} & set(tokens)
  if not joining or any(word.lower() not in _UNIT_OF for word in words):
    return list(tokens)
  return [";" if token in joining else token for token in tokens]


def bare(atoms: Sequence[str], names: bool = False) -> tuple[list[str], str | None]:
  """The value of an answer without its full stop, name and unit, and the unit where it is known.

  Args:
    atoms: of `tex`; names: whether a name before "=" stays.
  """
  found = _trimmed(atoms)
  if not names:
    found = _trimmed(_without_name(found))
  unit = None
  value, suffix = _split_unit(found)
  if suffix:
    unit = _standard(suffix)
    found = _trimmed(value)
  return numerals.mixed(found), unit


def _trimmed(atoms: Sequence[str]) -> list[str]:
  """Atoms without spaces at both ends, a full stop or comma behind and a plus before."""
  start = 0
  end = len(atoms)
  while end > start and atoms[end - 1] in (" ", ".", ",", ";", "\\text{}", "\\text{.}", ":"):
    end -= 1
  while start < end and atoms[start] in (" ", "+", "\\text{}"):
    start += 1
  return list(atoms[start:end])


def _without_name(atoms: list[str]) -> list[str]:
  r"""Atoms without a name and its "=": 5 of x=5, \theta = 5, f(x)=5, (x,y)=5 and x\in 5."""
  signs = [k for k, atom in enumerate(atoms[: _LONGEST_NAME + 1]) if atom in ("=", "\\in")]
  if not signs:
    return atoms
  name = [atom for atom in atoms[: signs[0]] if atom != " "]
  # Behind the word: an index, primes, and the arguments of a function.
  while name[1:] and (name[-1][0] == "_" or name[-1] == "'" or _ARGUMENTS.fullmatch(name[-1])):
    name.pop()
  is_name = len(name) == 1 and name[0] not in _NOT_NAMES and (
    _NAME_WORD.fullmatch(name[0]) or _ARGUMENTS.fullmatch(name[0]))
  return atoms[signs[0] + 1 :] if is_name else atoms


def _split_unit(atoms: list[str]) -> tuple[list[str], list[str]]:
  """(value, unit) of an answer; the unit is [] where there is none."""
  if "\\$" in atoms:
    # Money's sign stands before the number, or behind it.
    return [atom for atom in atoms if atom != "\\$"], ["\\text{dollar}"]
  start = len(atoms)
  while start and _may_be_in_unit(atoms, start - 1):
    start -= 1
  # An exponent at the front belongs to the value: only that of a unit is the unit's.
  while start < len(atoms) and atoms[start][0] in "^_/ " and atoms[start] != "^{\\circ}":
    start += 1
  value = atoms[:start]
  suffix = [atom for atom in atoms[start:] if atom != " "]
  return (value, suffix) if suffix and _is_unit(value, suffix) else (atoms, [])


def _may_be_in_unit(atoms: list[str], k: int) -> bool:
  """Whether an atom may be part of a unit at the end of an answer."""
  atom = atoms[k]
  if atom.startswith(("\\text{", "^{")) or atom in (" ", "\\%", "/", "."):
    return True
  # Without \text, "5m" is a product, and only whole words are units.
  return len(atom) > 1 and atom.lower() in _UNIT_OF.keys() | {"square", "cubic", "sq"}


def _is_unit(value: list[str], suffix: list[str]) -> bool:
  """Whether what stands behind a value is its unit."""
  text = _unit_text(suffix)
  words = _WORD.findall(text.lower().replace(".", ""))
  is_standard = bool(words) and all(word in _UNIT_OF or word in _WITH_UNITS for word in words)
  # Letters make the value an expression, of which a text may say more.
  if any(atom.isalpha() or atom.startswith("\\text") for atom in value) and not is_standard:
    return False
  has_number = any("\\pi" in atom or any(c.isdigit() for c in atom) for atom in value)
  if not has_number and not (is_standard and any(atom.isalpha() for atom in value)):
    return False
  # Of \sin 30^\circ the degrees are part of the argument.
  if any(atom in _NOT_NAMES and atom not in ("\\pi", "\\infty", "\\pm") for atom in value):
    return False
  return not _MORE_THAN_UNIT.search(text) and _NOT_IN_UNITS.isdisjoint(words)


def _unit_text(suffix: list[str]) -> str:
  """A unit as plain text."""
  text = " ".join(suffix).replace("^{\\circ}", "degree").replace("\\%", "percent")
  return text.replace("\\text{", " ").replace("{", "").replace("}", "").strip()


def _standard(suffix: list[str]) -> str | None:
  """A unit by its known names, as in "meter second" of m/s; None where a word is not known."""
  words = [word for word in _WORD.findall(_unit_text(suffix).lower().replace(".", ""))
           if word not in _WITH_UNITS]
  return " ".join(_UNIT_OF[word] for word in words) if set(words) <= _UNIT_OF.keys() else None


def rendered(atoms: Sequence[str]) -> str:
  """Atoms as one text, with spaces only between digits and behind control words."""
  found: list[str] = []
  space = False
  for atom in atoms:
    if atom == " ":
      space = True
      continue
    if atom.startswith("\\text{"):
      atom = "".join(atom[len("\\text{") : -1].split())
    if not atom:
      continue
    last = found[-1] if found else ""
    # "4 2" must not become 42, nor "\pi x" an unknown word.
    digits = space and last[-1:] in _DIGITS and atom[0] in _DIGITS
    word = last[:1] == "\\" and last[1:].isalpha() and atom[0].isalpha()
    if digits or word:
      found.append(" ")
    found.append(atom)
    space = False
  text = "".join(found)
  return text.lower() if _CAPITALISED.fullmatch(text) else text
