r"""Answers of problems as no response spells them: JSON, tags, "Answer:" before the answer.

A checker of boxes finds such an answer equal to itself alone. Texts such as \text{Monday}, ratios,
equations such as x=5, and intervals such as (1,2] or ]1,2[ are answers.
"""

import json
import re
from collections.abc import Iterator

_ABSENT = re.compile(r"n/a|n\.a\.|null|nan|tbd|todo|\?+|see\s+(the\s+|attached\s+|full\s+)*"
                     r"(solution|explanation|answer|proof|working|above|below|figure)s?\b.*",
                     re.I | re.S)
_ANNOUNCED = re.compile(r"\W*(?:so\s+|thus,?\s+|therefore,?\s+|hence,?\s+)?(?:the\s+)?(?:final\s+|"
                        r"correct\s+)?(?:answer|ans|result|solution)\W*(?:\bis\b|[:=])[\s:*]*"
                        r"(.*?)\.?", re.I | re.S)
_TAGGED = re.compile(r"<([A-Za-z_]\w*)>(.*)</\1>", re.S)
_MARKED = re.compile(r"(.*?)\s*(?:&|\\\\)\s*", re.S)  # the end of a table's cell or row
_INTERVAL = re.compile(r"[\[\]()][^\[\]()]*[,;][^\[\]()]*[\[\]()]", re.S)
_CONTINUED = re.compile(r"[,;=+*/(\[{-]\s*\n|\n\s*[{}=+*/^_)\]]")  # where a formula has a new line
_BRACKETS = re.compile(r"[\[\]()]")


def bare(answer: str) -> str | None:
  r"""The answer without what no response has around it; None where there is nothing of that kind.

  "5" for "Answer: 5", '["5"]', "<answer>5</answer>", "(5", and of several lines the first. "" for
  what holds no answer: "N/A", "See solution".
  """
  text = answer.strip()
  if _ABSENT.fullmatch(text):
    return ""
  texts = _of_json(text)
  if texts is not None:
    return ", ".join(texts)
  found = _ANNOUNCED.fullmatch(text)
  if found:
    return found[1].strip()
  found = _TAGGED.fullmatch(text)
  if found:
    return found[2].strip()
  # An environment has several lines and cells of its own.
  if "\\begin" in text:
    return None
  lines = [line for line in text.splitlines() if line.strip()]
  # A bracket over several lines, and a line that a brace or a comma continues, are one formula.
  if len(lines) > 1 and all(map(_balanced, lines)) and not _CONTINUED.search(text):
    return lines[0].strip()
  found = _MARKED.fullmatch(text)
  if found:
    return found[1].strip()
  return None if _balanced(text) else _BRACKETS.sub("", text).strip()


def _of_json(text: str) -> list[str] | None:
  """The texts and numbers of an object, a list of texts or a quoted text; None for another text."""
  # A list of numbers is an answer: [1, 2] is an interval.
  if not text.startswith(("{", "[", '"')):
    return None
  # Python writes a list of texts in single quotes.
  if text.startswith(("['", "{'")):
    text = text.replace("'", '"')
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return None
  if isinstance(value, list) and not any(isinstance(part, str | dict) for part in value):
    return None
  return list(_scalars(value))


def _scalars(value: object) -> Iterator[str]:
  """Yields the texts and numbers of a value of JSON, in order."""
  if isinstance(value, dict | list):
    for part in value.values() if isinstance(value, dict) else value:
      yield from _scalars(part)
  elif value is not None:
    yield str(value)


def _balanced(text: str) -> bool:
  """Whether a text opens as many round and square brackets as it closes, intervals aside."""
  plain = text.replace("\\left", "").replace("\\right", "")
  # Without intervals last: ]1,2] closes two brackets, and taken out of f(1,2) both are gone too.
  for shortened in (plain, _INTERVAL.sub("", plain)):
    brackets = _BRACKETS.findall(shortened)
    if 2 * sum(bracket in "([" for bracket in brackets) == len(brackets):
      return True
  return False
