r"""Boxes in a response: \boxed{5}, \boxed {5}, \boxed 5, \boxed\frac{1}{2} and \fbox{5}.

Found by tokens of TeX, so that an escaped brace, as in \boxed{\{1,2\}}, closes nothing. One pass
over the text finds them all, however many of them are open.
"""

import re
from typing import NamedTuple

# An escaped sign is one token, so that \{ opens and \} closes nothing.
_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|\\[^A-Za-z]|[{}]|[$\s]", re.DOTALL)
_SPACE = re.compile(r"[ \t\n]*")
_BOXES = ("\\boxed", "\\fbox")
# Between boxes that together are one answer: punctuation, a conjunction and the next name. A search
# that began at every character would take quadratic time, so it begins at the first alone.
_JOINS = re.compile(r"\A(?:[\s$,;.&]|and|or|\\text|\\quad|\\qquad|\\[,;()\[\] ]|[{}]|\\?[A-Za-z]+"
                    r"(?:_\{?\w+\}?)?\s*=|=)*")
_JOIN_WORD = re.compile(r"[,;&]|\band\b|\bor\b|\\q?quad")
_LONGEST_JOIN = 60  # characters


class _Box(NamedTuple):
  start: int           # of the control word
  end: int             # behind the box
  inside: slice        # of the text; cut out only where it is needed, because boxes may be nested


class _Open(NamedTuple):
  start: int | None   # of the control word; None for a brace that opens no box
  begin: int          # of the inside
  bare: bool          # whether the box has no braces of its own


def last(text: str) -> str | None:
  r"""The text inside the last \boxed or \fbox, or None where there is none or it is cut."""
  found = _closed(text)
  return text[found[-1].inside] if found else None


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
  return [text[box.inside] for box in found[max(first, 0) :]]


# One for all braces that open no box: a text may have very many.
_BRACE = _Open(None, 0, bare=False)


def _closed(text: str) -> list[_Box]:
  """All boxes by their starts; [] where the last one to start is not closed."""
  found: list[_Box] = []
  opened: list[_Open] = []
  last_start = -1
  skip = 0

  def close(end: int) -> None:
    """Ends the boxes without braces that are open last."""
    if opened and opened[-1].bare:
      # The full stop is the sentence's.
      while text[end - 1] in ".,;:":
        end -= 1
    while opened and opened[-1].bare:
      box = opened.pop()
      end_of_box = max(end, box.begin)
      found.append(_Box(box.start, end_of_box, slice(box.begin, end_of_box)))

  for token in _TOKEN.finditer(text):
    if token.start() < skip:
      continue
    if token[0] == "{":
      opened.append(_BRACE)
    elif token[0] == "}":
      close(token.start())
      box = opened.pop() if opened else None
      if box and box.start is not None:
        found.append(_Box(box.start, token.end(), slice(box.begin, token.start())))
    elif token[0] in _BOXES:
      begin = _SPACE.match(text, token.end()).end()
      following = text[begin : begin + 1]
      # Behind it is a group, or as in \boxed\frac12 a text up to the next space or dollar.
      if following and following not in "$}" and not following.isspace():
        last_start = token.start()
        opened.append(_Open(token.start(), begin + (following == "{"), bare=following != "{"))
        skip = begin + (following == "{")
    elif token[0] == "$" or token[0].isspace():
      close(token.start())
  close(len(text))
  # Boxes are found by their ends, and an inner one ends first.
  found.sort(key=lambda box: box.start)
  # A box that never closes: the response was cut.
  return found if found and found[-1].start == last_start else []
