"""An answer that shows how it was found: 3+9=12, m+n=12 or 12\\pi\\approx 37.7."""

import re
from typing import NamedTuple

from s2d_jax.rewards import names

# Quantities that a problem may ask for: m+n, |z|, |AB|, \cos\theta, \tan(A+B), f(g(2)).
# Of 2x=12, x+1=12 and |x|=12 the variable may be asked for, which is not 12.
_QUANTITY = re.compile(
  r"[A-Za-z](?:\+[A-Za-z])+"
  r"|\|(?:[zw]|[A-Z]{2})\|"
  r"|\\(?:sin|cos|tan|cot|sec|csc) ?(?:[A-Za-z]|\\(?:theta|alpha|beta|gamma|phi)"
  r"|\([A-Za-z](?:[+-][A-Za-z])*\))"
  r"|[fghFGH]\([fghFGH]\([-+0-9A-Za-z]{1,9}\)\)")
_DECIMAL = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?")


class Chain(NamedTuple):
  """The sides of a chain: the value at its end, those before it, and the decimal that rounds it."""
  end: str
  before: list[str]
  rounded: str  # "" where there is none


def read(value: str) -> Chain | None:
  """The chain of a value in one spelling; None where it is one value or has other relations."""
  value, about, rounded = value.partition("\\approx")
  if names.relation(value) == "inequality" or "\\ne" in value:
    return None
  if about and not _DECIMAL.fullmatch(rounded.strip()):
    return None
  *before, end = value.split("=")
  return Chain(end, before, rounded.strip()) if before or about else None


def is_quantity(side: str) -> bool:
  """Whether a side names what was asked for, so that the next side is the answer."""
  # The a of a+a=12 may be asked for.
  terms = side.split("+")
  return _QUANTITY.fullmatch(side) is not None and len(set(terms)) == len(terms)
