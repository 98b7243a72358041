r"""Plus-minus in an answer: an element of a list or a set that has one stands for two elements."""

from collections.abc import Sequence

_OPENING = {"(", "[", "{", "\\{", "\\left.", "\\begin"}
_CLOSING = {")", "]", "}", "\\}", "\\right.", "\\end"}
_MOST_SETS = 64  # within each other
# In a set of all that have a property, the comma and the sign belong to the property.
_PROPERTY = {"|", ":"}
_Elements = list[list[str]]  # each with the comma before it


def both(tokens: Sequence[str]) -> list[str]:
  """Tokens in which an element that has one plus-minus stands twice, with each sign.

  Elements are those of the list, and those of each set in it. Sets that are nested more deeply
  than those of any answer stay as they are.
  """
  sets: list[_Elements] = []  # those that are open, each with the elements so far
  depths: list[int] = []      # brackets that are open within each
  elements: _Elements = [[]]
  depth = 0
  for token in tokens:
    if token in (",", ";") and depth <= 0:
      elements.append([])
    if token == "\\{":
      if len(sets) == _MOST_SETS:
        return list(tokens)
      elements[-1].append(token)
      sets.append(elements)
      depths.append(depth)
      elements, depth = [[]], 0
    elif token in _CLOSING and depth == 0 and sets:
      inside = _signed(elements) if token == "\\}" and _are_listed(elements) else _joined(elements)
      elements, depth = sets.pop(), depths.pop()
      elements[-1] += [*inside, token]
    else:
      depth += (token in _OPENING) - (token in _CLOSING)
      elements[-1].append(token)
  if sets:
    # A set that does not close is refused by the parser.
    return list(tokens)
  return _signed(elements)


def _joined(elements: _Elements) -> list[str]:
  return [token for element in elements for token in element]


def _are_listed(elements: _Elements) -> bool:
  """Whether a set names its elements one by one."""
  return not any(token in _PROPERTY or token == "\\begin"
                 for element in elements for token in element)


def _signed(elements: _Elements) -> list[str]:
  signed: list[str] = []
  for element in elements:
    # A sign before a set belongs to each of the set's elements.
    if element.count("\\pm") == 1 and "\\{" not in element:
      at = element.index("\\pm")
      plus, minus = ([*element[:at], sign, *element[at + 1 :]] for sign in "+-")
      element = [*plus, *minus] if element[0] in (",", ";") else [*plus, ",", *minus]
    signed += element
  return signed
