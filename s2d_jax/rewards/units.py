r"""Units behind a number in an answer, with their powers: 5\text{ cm}^2, 60\text{ km/h}, 12\%.

Words behind a number are a unit where each word is known, or where they are a noun that was
counted, in the plural, as in 12\text{ students}. No others are, because "5 million", "5 K",
"5 or 6", "3 over 4" and "5 less than x" are other values than 5. A known unit has one spelling,
"meter^2" or "mile*hour^-1", and a noun that was counted has none.
"""

import re
from collections.abc import Sequence

from s2d_jax.rewards import words

_UNITS = {
  "meter": "m meter meters metre metres", "centimeter": "cm centimeter centimeters centimetre "
  "centimetres", "millimeter": "mm millimeter millimeters", "kilometer": "km kilometer kilometers "
  "kilometre kilometres", "micrometer": "µm μm micrometer micrometers",
  "inch": "in inch inches", "foot": "ft foot feet", "yard": "yd yds yard yards",
  "mile": "mi mile miles", "gram": "g gram grams", "kilogram": "kg kilo kilos kilogram kilograms",
  "milligram": "mg milligram milligrams", "pound": "lb lbs pound pounds",
  "ounce": "oz ounce ounces", "ton": "ton tons", "second": "s sec secs second seconds",
  "minute": "min mins minute minutes", "hour": "h hr hrs hour hours", "day": "day days",
  "week": "week weeks", "month": "month months", "year": "yr yrs year years",
  "percent": "percent percentage pct", "degree": "deg degree degrees", "radian": "rad radian "
  "radians", "celsius": "celsius", "fahrenheit": "fahrenheit",
  "dollar": "dollar dollars usd", "sterling": "sterling gbp", "euro": "euro euros eur",
  "yen": "yen", "rupee": "rupee rupees", "newton": "N newton newtons", "joule": "J joule joules",
  "watt": "W watt watts", "kilowatt": "kW kilowatt kilowatts", "kilowatt hour": "kwh",
  "volt": "V volt volts", "hertz": "Hz hertz", "pascal": "Pa pascal pascals", "byte": "byte bytes",
  "kilobyte": "KB kilobyte kilobytes", "megabyte": "MB megabyte megabytes",
  "gigabyte": "GB gigabyte gigabytes", "terabyte": "TB terabyte terabytes",
  "cent": "cent cents", "liter": "l L liter liters litre litres",
  "milliliter": "ml mL milliliter milliliters", "gallon": "gal gallon gallons",
  "cup": "cup cups", "acre": "acre acres", "unit": "unit units",
}
_UNIT_OF = {alias: unit for unit, aliases in _UNITS.items() for alias in aliases.split()}
# Speeds whose names have no "per".
_WHOLE = {"mph": {"mile": 1, "hour": -1}, "kph": {"kilometer": 1, "hour": -1}}
_MONEY = {"\\$": "dollar", "£": "sterling", "\\pounds": "sterling", "€": "euro", "\\euro": "euro",
          "¥": "yen", "¢": "cent", "\\cent": "cent"}
_POWER_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWER_BEHIND = {"squared": 2, "cubed": 3}
_SCALES = {"C": "celsius", "celsius": "celsius", "F": "fahrenheit", "fahrenheit": "fahrenheit"}
# Words that change nothing: 5 dollars each, 3 apples left, 12 years old.
_FILLERS = {"each", "left", "remaining", "total", "altogether", "apiece", "old", "long", "tall",
            "wide", "deep", "high"}
_MOST_WORDS = 8   # of a unit
_BARE_NOUN = 5    # letters; without \text a shorter word may be a product of variables
_PIECE = re.compile(r"[^\W\d_]+|\^-?[0-9]+|[^\s.'’-]")
_UNIT_ATOM = re.compile(r"\\text\{([^{}]*)\}")
# A share as whole percents. 1% is more often meant as 1/100.
_WHOLE_PERCENT = re.compile(r"[2-9]|[1-9][0-9]|100")
_LIST_SIGN = re.compile(r"[,(\[{]")
_BRACKET = re.compile(r"\(([A-Za-z]{2,}(?: [A-Za-z]{2,})*)\)")
_FRACTION = ("\\frac", "/")
_FUNCTIONS = {"\\sin", "\\cos", "\\tan", "\\ln", "\\log", "\\circ", "\\emptyset"}


class _NotUnit(Exception):
  """A text behind a number that is not a unit."""


def is_known(word: str) -> bool:
  """Whether a word is a known unit, or says which power of it."""
  return _name(word) is not None or word in _POWER_BEFORE


def _name(word: str) -> str | None:
  """The known unit of a word. Abbreviations of one or two letters keep their case: M is million."""
  return _UNIT_OF.get(word if len(word) < 3 else word.lower())


def split(atoms: Sequence[str]) -> tuple[list[str], str]:
  r"""(value, unit) of the atoms of an answer.

  The unit is "" where there is none or it is a count noun, which the value then goes without.
  """
  money = next((_MONEY[atom] for atom in atoms if atom in _MONEY), "")
  bare = [atom for atom in atoms if atom not in _MONEY]
  value, suffix = _suffix(_unbracketed(bare), bool(money))
  text = _plain(suffix)
  if money not in text:
    # Money's sign stands before the number, or behind it.
    text = f"{money} {text}"
  if not text:
    return list(atoms), ""
  try:
    unit = _spelled(_factors(text, _is_part(value)))
  except _NotUnit:
    # 5 million dollars are dollars.
    return bare, money
  return (value, unit) if money or _has_unit(value, unit) else (list(atoms), "")


def _unbracketed(atoms: list[str]) -> list[str]:
  r"""Atoms with the words of a last bracket outside it, where they are a unit: 5 (\text{cm})."""
  found = _BRACKET.fullmatch(atoms[-1]) if len(atoms) > 1 else None
  inside = found[1].split() if found else []
  if not inside or not all(map(_is_unit_word, inside)):
    return atoms
  return [*atoms[:-1], *(f"\\text{{{word}}}" for word in inside)]


def _is_unit_word(word: str) -> bool:
  """Whether a word is a unit also without \\text, where letters and AB may be products."""
  return len(word) > 1 and not word.isupper() and (is_known(word) or word in _WHOLE
                            or len(word) >= _BARE_NOUN and words.is_plural(word))


def _suffix(atoms: list[str], money: bool) -> tuple[list[str], list[str]]:
  """(what stands before, the atoms at the end that may be a unit)."""
  # Of money the unit stands before the number, and so "/" behind it means "per".
  of_value = "^_*- " if money else "^_/*- "
  start = len(atoms)
  while start and _may_be_in_unit(atoms, start - 1):
    start -= 1
  # An exponent at the front belongs to the value: only that of a unit is the unit's.
  while start < len(atoms) and atoms[start][0] in of_value and atoms[start] != "^{\\circ}":
    start += 1
  return atoms[:start], [atom for atom in atoms[start:] if atom != " "]


def _may_be_in_unit(atoms: list[str], k: int) -> bool:
  """Whether an atom may be part of a unit at the end of an answer."""
  atom = atoms[k]
  if atom.startswith(("\\text{", "^{")) or atom in (" ", "\\%", "/", ".", "*", "-", "\\cdot"):
    return True
  if atom in ("C", "F"):
    return "^{\\circ}" in atoms[max(k - 2, 0) : k]
  # Without \text, "5m" is a product.
  return _is_unit_word(atom)


def _plain(suffix: list[str]) -> str:
  """A unit as plain text."""
  text = " ".join(suffix).replace("^{\\circ}", "degree ").replace("\\%", "percent")
  text = text.replace("\\text{", " ").replace("\\cdot", "*")
  return text.replace("{", "").replace("}", "").strip()


def _is_part(value: Sequence[str]) -> bool:
  """Whether a value is 1 or a fraction, behind which a noun is in the singular."""
  return "".join(value).strip() == "1" or any(atom.startswith(_FRACTION) for atom in value)


def _has_unit(value: Sequence[str], unit: str) -> bool:
  """Whether a value is one that may have a unit: a number, or with a known unit an expression."""
  # A text in the value says more than a number does.
  if any(atom.startswith("\\text{") for atom in value):
    return False
  letters = any(atom.isalpha() for atom in value)
  numbers = any("\\pi" in atom or any(c.isdigit() for c in atom) for atom in value)
  if not (numbers and not letters or letters and unit):
    return False
  # Of \sin 30^\circ the degrees are part of the argument.
  return _FUNCTIONS.isdisjoint(value)


class _Reader:
  """Reads the pieces of a unit one by one into powers of known units."""

  def __init__(self, singular: bool) -> None:
    self.singular = singular   # whether what is counted need not be in the plural
    self.factors: dict[str, int] = {}
    self.last = ""             # the known unit that a power may follow
    self.nouns: list[str] = []  # unknown words since the last "per", "of" or unit
    self.sign = 1
    self.power = 1
    self.parts = 0             # units and nouns that are complete

  def end_part(self) -> None:
    """Ends a unit or noun, before "per", "of" or the end."""
    if not self.last and not self.nouns or self.power != 1:
      raise _NotUnit
    # Of what is counted the first noun is in the plural: pages of "pages per hour".
    if self.nouns and not (self.parts or self.singular or words.is_plural(self.nouns[-1])
                           or self.nouns[-1] in words.TUPLES):
      raise _NotUnit
    self.parts += 1
    self.last, self.nouns, self.sign = "", [], 1

  def add(self, powers: dict[str, int]) -> None:
    """Adds a known unit; words before it make it another one, as in nautical miles."""
    for name, power in powers.items():
      self.last = " ".join([*self.nouns, name])
      power *= self.sign * self.power
      self.factors[self.last] = self.factors.get(self.last, 0) + power
    self.nouns, self.power = [], 1

  def raised(self, power: int) -> None:
    """Raises the last unit to a power, as in cm^2 and in cm squared."""
    if not self.last or self.sign * self.factors[self.last] != 1:
      raise _NotUnit
    self.factors[self.last] *= power


def _factors(text: str, singular: bool) -> dict[str, int]:
  """The powers of the known units in a text, {} for a noun.

  Raises:
    _NotUnit: a word or sign says something else.
  """
  pieces = _PIECE.findall(text)
  if len(pieces) > _MOST_WORDS:
    raise _NotUnit
  reader = _Reader(singular)
  for k, piece in enumerate(pieces):
    name = _name(piece)
    is_per = piece in ("/", "per") or piece in ("a", "an") and (reader.last or reader.nouns)
    if is_per or piece == "of":
      reader.end_part()
      reader.sign = -1 if is_per else 1
    elif piece == "*":
      reader.end_part()
    elif piece[0] == "^":
      reader.raised(int(piece[1:]))
    elif piece in _POWER_BEFORE and pieces[k + 1 :]:
      reader.power = _POWER_BEFORE[piece]
    elif piece in _POWER_BEHIND:
      reader.raised(_POWER_BEHIND[piece])
    elif reader.last == "degree" and piece in _SCALES:
      # A temperature's degree has its own name.
      reader.factors = {_SCALES[piece]: 1}
      reader.last = _SCALES[piece]
    elif name or piece.lower() in _WHOLE:
      reader.add({name: 1} if name else _WHOLE[piece.lower()])
    elif piece in _FILLERS and (reader.last or reader.nouns):
      continue
    elif not reader.last and words.is_counted(pieces, k):
      if piece not in words.ADJECTIVES:
        reader.nouns.append(piece)
      reader.power = 1
    else:
      raise _NotUnit
  reader.end_part()
  return reader.factors


def _spelled(factors: dict[str, int]) -> str:
  """Powers of units in one spelling, as in "mile*hour^-1"."""
  shown = sorted((unit, power) for unit, power in factors.items() if power)
  return "*".join(unit if power == 1 else f"{unit}^{power}" for unit, power in shown)


def attached(value: str, unit: str) -> str:
  r"""A value with its known unit behind it, as in 5\text{meter^2}."""
  return f"{value}\\text{{{unit}}}" if unit else value


def detached(text: str) -> tuple[str, str]:
  """(value, unit) of an answer in one spelling; the unit is "" where it has none."""
  found = text.endswith("}") and _UNIT_ATOM.fullmatch(text, max(text.rfind("\\text{"), 0))
  return (text[: found.start()], found[1]) if found else (text, "")


def without(text: str) -> str:
  """An answer in one spelling without any unit, also in brackets."""
  return _UNIT_ATOM.sub("", text)


def agree(gold: str, found: str) -> bool:
  """Whether no unit differs between two answers that are one text without their units.

  The answer may leave units out, and may add some to the problem's: see `may_add`.
  """
  expected, units = _unit_by_offset(gold), _unit_by_offset(found)
  value = without(gold)
  return all(expected[offset] == unit if offset in expected else may_add(value[:offset], unit)
             for offset, unit in units.items())


def may_add(value: str, unit: str) -> bool:
  r"""Whether an answer may have a unit that the problem's answer leaves out.

  20\% may be meant by 20, but 0.5\% is not 0.5, and \pi/4 is an angle without degrees.

  Args:
    value: the problem's answer up to the unit.
  """
  if unit == "percent":
    return _WHOLE_PERCENT.fullmatch(_LIST_SIGN.split(value)[-1]) is not None
  return unit != "degree" or "\\pi" not in value


def _unit_by_offset(text: str) -> dict[int, str]:
  """The units of an answer by where they stand in the answer without units."""
  found = {}
  before = 0
  for unit in _UNIT_ATOM.finditer(text):
    found[unit.start() - before] = unit[1]
    before += len(unit[0])
  return found
