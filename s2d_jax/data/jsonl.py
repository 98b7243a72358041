"""Files of JSON lines: problems, and the solutions that a model sampled.

Errors name the file and the line.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from s2d_jax import json_objects
from s2d_jax.errors import InputError

_REMEDY = "write one object per line"


def objects(path: str | os.PathLike, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """The JSON objects of a file, one a line; blank lines are skipped.

  Args:
    content: names what a line holds, for the error message of an absent file.

  Yields:
    ("file line 3", the object): the first names the line in error messages.

  Raises:
    InputError: there is no such file, or `json_objects` refuses a line; names file and line.
  """
  if not Path(path).is_file():
    raise InputError(f"{path} is not a file: give JSON lines of {content} there.")
  # By the file's lines: str.splitlines also splits at characters that JSON allows in a text. As
  # bytes, because a file in another encoding is refused by its line too.
  with open(path, "rb") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        name = f"{path} line {number}"
        yield name, json_objects.parse(name, line, _REMEDY)


def text_id(text: str) -> int:
  """The id of a problem that brings none: 63 bits of a hash of its text."""
  # 63 bits, so that the id fits in a signed integer of 64.
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def line_id(line_name: str, row: dict[str, Any], text: str) -> int:
  """The "id" of a JSON line; an absent one is a hash of `text`, the same in every file.

  Raises:
    InputError: the id is not an integer from 0 to 2**63 - 1; names file and line.
  """
  number = row["id"] if "id" in row else text_id(text)
  # To Python a bool is an int.
  if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
    raise InputError(f"{line_name} has id {json_objects.shown(number)}: ids are integers from 0 to "
                     "2**63 - 1, or left out.")
  return number


def rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a JSON-lines file with "problem" and "answer", and optionally "id" and "solution".

  Raises:
    InputError: as `objects` and `distinct`.
  """
  return distinct(objects(path, "problem and answer"), path)


def distinct(lines: Iterable[tuple[str, dict[str, Any]]],
             path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a file's objects, in order: `row` of each.

  An absent id is a hash of the problem's text, which does not depend on its line or file.

  Args:
    lines: the file's objects with their names, as `objects` yields them.

  Raises:
    InputError: there is no object, or one is not such a row, or repeats an id or a problem. Names
      file and line.
  """
  found = {}
  # id -> "line 3", where it was used first
  first = {}
  for line_name, line in lines:
    new = row(line_name, line)
    if new["id"] in found:
      raise InputError(f"{line_name} uses id {new['id']} again, first used in {first[new['id']]}: "
                       "make every id distinct, and without ids every problem.")
    found[new["id"]] = new
    first[new["id"]] = line_name.removeprefix(f"{path} ")
  if not found:
    raise InputError(f"{path} has no rows: give it one JSON object per line.")
  return list(found.values())


def solved(problems: Sequence[dict[str, Any]],
           path: str | os.PathLike | None) -> Sequence[dict[str, Any]]:
  """The problems with the responses of a JSON-lines file, {"id", "response"}, as their solutions.

  Supervised fine-tuning learns from them. A problem may have several samples, numbered by "sample"
  as the offline sampling command writes them: the first with "finish" "stop" is the solution.

  Args:
    path: None changes nothing.

  Raises:
    InputError: a line is not such an object, or repeats an id and sample; names file and line.
  """
  if path is None:
    return problems
  # problem id -> sample index -> text, or None where the sample is not a solution
  responses: dict[int, dict[int, str | None]] = {}
  for line_name, row in objects(path, "id and response"):
    number = row.get("id")
    text = row.get("response")
    if not _is_index(number) or not isinstance(text, str):
      raise InputError(f"{line_name} lacks an integer id or a response's text: give both.")
    # A response without "sample" is the first.
    sample = 0 if row.get("sample") is None else row["sample"]
    if not _is_index(sample):
      raise InputError(f'{line_name} has {json_objects.shown(sample)} under "sample": number the '
                       "samples of a problem from 0, or leave it out.")
    samples = responses.setdefault(number, {})
    if sample in samples:
      raise InputError(f"{line_name} answers problem {number} again: keep one response a problem, "
                       'or number them under "sample".')
    # A response that was cut, or is empty, is not a solution.
    finished = row.get("finish", "stop") == "stop"
    samples[sample] = text if finished and text else None
  return [row | _solution(responses.get(row["id"], {})) for row in problems]


def _is_index(number: Any) -> bool:
  """Whether a value is an integer of at least 0; to Python a bool is an int."""
  return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _solution(samples: dict[int, str | None]) -> dict[str, str]:
  """{"solution"} of the first sample that is one, or {}."""
  usable = [index for index, text in samples.items() if text is not None]
  return {"solution": samples[min(usable)]} if usable else {}


def row(line_name: str, line: dict[str, Any]) -> dict[str, Any]:
  """A problem's row with its id, and with its other texts, by which guides may be chosen.

  Raises:
    InputError: the problem is not a text, the answer neither a text nor an integer, the solution
      not a text, or the id is refused; names the line.
  """
  texts = {"problem": line.get("problem"), "answer": answer_text(line.get("answer"))}
  for key, text in texts.items():
    if isinstance(text, str) and text.strip():
      continue
    held = line.get(key)
    if held is None or isinstance(held, str):
      raise InputError(f'{line_name} has no text under "{key}": give every row problem and answer.')
    kinds = "a text or an integer" if key == "answer" else "a text"
    raise InputError(f'{line_name} has no text under "{key}" but {json_objects.shown(held)}: write '
                     f"{kinds}.")
  number = line_id(line_name, line, line["problem"])
  solution = {"solution": line["solution"]} if "solution" in line else {}
  if not all(isinstance(text, str) for text in solution.values()):
    raise InputError(f"{line_name} has a solution that is not text: write it as a string.")
  columns = {key: x for key, x in line.items()
             if isinstance(x, str) and key not in ("id", *texts, *solution)}
  return {"id": number, **texts} | solution | columns


def answer_text(answer: str | float | list | dict | None) -> str | None:
  """An answer that a file holds as text or as an integer, as text; None for another value."""
  if isinstance(answer, str):
    return answer
  # To Python a bool is an int. A float is refused: 0.1 and 1e-1 are one number, not one text.
  return str(answer) if isinstance(answer, int) and not isinstance(answer, bool) else None
