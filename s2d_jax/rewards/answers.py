"""An answer in one spelling, as its parts, and whether two of them are one answer."""

import re
from typing import NamedTuple

from s2d_jax.rewards import names, units

_CHOICE = re.compile(r"[A-Z]+")  # A, or II


class Part(NamedTuple):
  """An element of a list, or the whole answer: its name, its value and its known unit."""
  name: str   # "" where it has none
  value: str
  unit: str   # "" where it has none, or one that is not known

  @property
  def measured(self) -> str:
    """The value with its unit."""
    return units.attached(self.value, self.unit)

  @property
  def spelled(self) -> str:
    """Name, value and unit as one text."""
    return f"{self.name}={self.measured}" if self.name else self.measured


class Answer(NamedTuple):
  """The elements of a list in their order, () where nothing is left, and "and" or "or" or ""."""
  parts: tuple[Part, ...]
  joint: str

  @property
  def spelled(self) -> str:
    """The whole answer as one text, with names and units."""
    return self._joined([part.spelled for part in self.parts])

  def normalised(self, ordered: bool) -> str:
    """One text for answers that mean the same: without units, and without names where they agree.

    Args:
      ordered: whether the order of a list counts; that of a set never does, of a tuple always.
    """
    parts = []
    for part in self.parts:
      name = part.name if self.is_named else ""
      parts.append(Part(name, units.without(part.value), "").spelled)
    return self._joined(parts if ordered else sorted(parts))

  def _joined(self, parts: list[str]) -> str:
    return (f" {self.joint} " if self.conjunction else ", ").join(parts)

  @property
  def is_named(self) -> bool:
    """Whether the elements have names that differ, as in x=1, y=2."""
    return len({part.name for part in self.parts if part.name}) > 1

  @property
  def conjunction(self) -> str:
    """The word between relations or choices; "" between values: "1 and 2" is the list "1 or 2".

    A comma between equations or choices means "and". Between inequalities it may mean either.
    """
    choices = all(_CHOICE.fullmatch(part.value) for part in self.parts)
    if len(self.parts) < 2 or not self.kind and not self.is_named and not choices:
      return ""
    if self.kind == "inequality":
      return self.joint
    return "or" if self.joint == "or" else ""

  @property
  def kind(self) -> str:
    """"inequality" or "equation" where a part is one, else ""."""
    kinds = {names.relation(part.value) for part in self.parts}
    return next((kind for kind in ("inequality", "equation") if kind in kinds), "")


def equal(first: Answer, second: Answer, ordered: bool) -> bool:
  """Whether two answers have one spelling, and no names or units that differ.

  Args:
    ordered: whether the order of a list counts. It does where one list alone has names.
  """
  if len(first.parts) != len(second.parts) or first.conjunction != second.conjunction:
    return False
  lists = [first.parts, second.parts]
  if not ordered and first.is_named == second.is_named:
    lists = [sorted(parts, key=lambda part: (part.name if first.is_named else "",
                                             units.without(part.value), part.unit))
             for parts in lists]
  named = first.is_named and second.is_named
  return all(_parts_equal(one, other, named) for one, other in zip(*lists, strict=True))


def names_agree(first: Part, second: Part, named: bool) -> bool:
  """Whether the names of two parts allow that they are one; if `named`, they must be equal."""
  return first.name == second.name if named else names.agree(first.name, second.name)


def _parts_equal(first: Part, second: Part, named: bool) -> bool:
  return (names_agree(first, second, named)
          and units.without(first.value) == units.without(second.value)
          and units.agree(first.measured, second.measured))
