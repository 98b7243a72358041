r"""Boxes in a response: \boxed{5}, \boxed {5}, \boxed 5 and \fbox{5}.

Found by tokens of TeX, so that an escaped brace, as in \boxed{\{1,2\}}, closes nothing. One pass
over the text finds them all, however many of them are open.
"""

import re
from typing import NamedTuple

# An escaped sign is one token, so that \{ opens and \} closes nothing.
_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|\\[^A-Za-z]|[{}]", re.DOTALL)
_SPACE = re.compile(r"[ \t\n]*")
# Without braces: up to the next space, dollar or sentence's end.
_UNBRACED = re.compile(r"[^\s${}]+")
# Between boxes that together are one answer: punctuation, a conjunction and the next name. A search
# that began at every character would take quadratic time, so it begins at the first alone.
_JOINS = re.compile(r"\A(?:[\s$,;.&]|and|or|\\text|\\quad|\\qquad|\\[,;()\[\] ]|[{}]|\\?[A-Za-z]+"
                    r"(?:_\{?\w+\}?)?\s*=|=)*")
_JOIN_WORD = re.compile(r"[,;&]|\band\b|\bor\b|\\q?quad")
_LONGEST_JOIN = 60  # characters


class _Box(NamedTuple):
  start: int    # of the control word
  end: int      # behind the box
  inside: str


def last(text: str) -> str | None:
  r"""The text inside the last \boxed or \fbox, or None where there is none or it is cut."""
  found = _closed(text)
  return found[-1].inside if found else None


def joined(text: str) -> list[str]:
  """The insides of the last boxes that together are the answer, in their order; [] without a box.

  "$x=\\boxed{2}$ or $x=\\boxed{3}$" has two; in "\\boxed{1}, no: \\boxed{2}" the last one counts.
  """
  found = _closed(text)
  first = len(found) - 1
  while first > 0:
    between = text[found[first - 1].end : found[first].start]
    joins = (len(between) <= _LONGEST_JOIN and _JOIN_WORD.search(between)
             and _JOINS.fullmatch(between))
    # A box inside another one ends behind the next one's start.
    if not joins or found[first - 1].end > found[first].start:
      break
    first -= 1
  return [box.inside for box in found[max(first, 0) :]]


def _closed(text: str) -> list[_Box]:
  """All boxes by their starts; [] where the last one to start is not closed."""
  found: list[_Box] = []
  # The start of each open box, None for another open brace, and where its inside begins.
  opened: list[tuple[int | None, int]] = []
  last_start = -1
  skip = 0
  for token in _TOKEN.finditer(text):
    if token.start() < skip:
      continue
    if token[0] == "{":
      opened.append((None, token.end()))
    elif token[0] == "}":
      if opened:
        start, begin = opened.pop()
        if start is not None:
          found.append(_Box(start, token.end(), text[begin : token.start()]))
    elif token[0] in ("\\boxed", "\\fbox"):
      begin = _SPACE.match(text, token.end()).end()
      if text[begin : begin + 1] == "{":
        last_start = token.start()
        opened.append((token.start(), begin + 1))
        skip = begin + 1
      elif unbraced := _UNBRACED.match(text, begin):
        last_start = token.start()
        inside = unbraced[0].rstrip(".,;:")
        skip = begin + len(inside)
        found.append(_Box(token.start(), skip, inside))
  # Boxes are found by their ends, and an inner one ends first.
  found.sort()
  # A box that never closes: the response was cut.
  return found if found and found[-1].start == last_start else []
