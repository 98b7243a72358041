r"""Problems that two splits share, by normalised text: what a model trains on it is not scored on.

The normal form drops what two files of one problem usually differ in: case, spaces, the marks of
mathematics ($, \(, \[), TeX's spacing and sizes, and the full stop. It keeps signs and digits.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from s2d_jax.data import leave_out
from s2d_jax.errors import InputError

Row = Mapping[str, Any]

# The marks of mathematics, spacing, and sizes of brackets. "\\\\" is a row's end and stays.
_LOOSE = re.compile(
    r"(?P<row>\\\\)|\$|\\[()\[\],;:! ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-z])|~|\s+")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_END = re.compile(r"[.?!:]+$")
# Texts of one sign in several fonts, beyond those that Unicode's NFKC unites.
_SIGNS = str.maketrans({"−": "-", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'",
                        "×": "*", "·": "*"})


def normalised(text: str) -> str:
  """A problem's text in its normal form; normalising twice changes nothing."""
  text = unicodedata.normalize("NFKC", text).translate(_SIGNS).casefold()
  text = _FRACTION.sub(r"\\frac", text)
  text = _LOOSE.sub(lambda found: found["row"] or "", text)
  return _END.sub("", text)


def shared(labelled: Iterable[Row],
           scored: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
  """The rows of each scored split whose problem stands among the labelled ones."""
  texts = {normalised(row["problem"]) for row in labelled}
  return {split: [row for row in rows if normalised(row["problem"]) in texts]
          for split, rows in scored.items()}


def check(splits: Mapping[str, Sequence[Row]], among_labelled: Mapping[str, Sequence[Row]],
          allowed: Collection[str], left_out: str) -> None:
  """Refuses an id or a problem that stands twice in a run's splits.

  Args:
    splits: the problems of "labelled" and of every scored split.
    among_labelled: as `shared` returns it.
    allowed: scored splits that may share problems with others, where the rows are equal.
    left_out: the value of config.data.leave_out, which the message extends.

  Raises:
    InputError: names the problem or id, both splits, and how to leave problems out.
  """
  # The split and row of each problem's text and of each id.
  first_of: dict[Any, tuple[str, Row]] = {}
  for split, problems in splits.items():
    for problem in problems:
      # Readers make an absent id from the text, so both are compared: a shared problem would let a
      # model train on what it is scored on.
      entry = (split, problem)
      for key in (problem["problem"], problem["id"]):
        first, row = found = first_of.setdefault(key, entry)
        if found is entry or (first != split and {first, split} & {*allowed}
                              and _one_problem(row, problem)):
          continue
        if row["problem"] != problem["problem"]:
          raise InputError(f"{problem['id']} stands in {first} and again in {split}, for another "
                           "problem: give every problem an id of its own.")
        found_twice = _found(problem, first, split, among_labelled)
        if first == "labelled" != split:
          others = {*allowed} - {split}
          raise InputError(f"{found_twice}: {_remedy(splits, among_labelled, others, left_out)}")
        remedy = leave_out.remedy(left_out, [(split, problem["id"])])
        raise InputError(f"{found_twice}: correct its file, or {remedy} to leave it out.")
  for split, problems in among_labelled.items():
    if problems and split not in allowed:
      raise InputError(f"{_found(problems[0], 'labelled', split, among_labelled)}: "
                       f"{_remedy(splits, among_labelled, allowed, left_out)}")


def _one_problem(first: Row, second: Row) -> bool:
  """Whether two rows may stand in one run: a problem is found by its id, so an id has one answer.
  """
  return (first["id"] != second["id"] or first["problem"] == second["problem"]
          and first["answer"] == second["answer"])


def _found(problem: Row, first: str, split: str,
           among_labelled: Mapping[str, Sequence[Row]]) -> str:
  """The beginning of a message: which problem stands in which splits, and how many there are."""
  text = problem["problem"]
  shown = repr(text) if len(text) <= 80 else repr(text[:80]) + " ..."
  problems = among_labelled.get(split, ())
  count = f" ({len(problems)} of its problems are labelled ones)" if problems else ""
  return f"{shown} stands in {first} and again in {split}{count}"


def _remedy(splits: Mapping[str, Sequence[Row]], among_labelled: Mapping[str, Sequence[Row]],
            allowed: Collection[str], left_out: str) -> str:
  """The end of a message: the labelled problems to leave out, of all splits that share them."""
  scored = [row for split, rows in among_labelled.items() if split not in allowed for row in rows]
  twins = shared(scored, {"labelled": splits["labelled"]})["labelled"]
  remedy = leave_out.remedy(left_out, [("labelled", row["id"]) for row in twins])
  return (f"{remedy} to leave these out of training, or give equal rows and its name in "
          "config.data.overlap.")
