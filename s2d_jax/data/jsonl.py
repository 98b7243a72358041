"""Files of JSON lines: problems, and the solutions that a model sampled.

Errors name the file and the line.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s2d_jax.errors import InputError


def objects(path: str | os.PathLike, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """The JSON objects of a file, one a line; blank lines are skipped.

  Args:
    content: names what a line holds, for the error message of an absent file.

  Yields:
    ("file line 3", the object): the first names the line in error messages.

  Raises:
    InputError: there is no such file, or a line is not a JSON object; names file and line.
  """
  if not Path(path).is_file():
    raise InputError(f"{path} is not a file: give JSON lines of {content} there.")
  # By the file's lines: str.splitlines also splits at characters that JSON allows in a text.
  with open(path, encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        yield f"{path} line {number}", _object(f"{path} line {number}", line)


def _text_id(text: str) -> int:
  """The id of a problem that brings none: 63 bits of a hash of its text."""
  # 63 bits, so that the id fits in a signed integer of 64.
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def line_id(line_name: str, row: dict[str, Any], text: str) -> int:
  """The "id" of a JSON line; an absent one is a hash of `text`, the same in every file.

  Raises:
    InputError: the id is not an integer from 0 to 2**63 - 1; names file and line.
  """
  number = row["id"] if "id" in row else _text_id(text)
  # To Python a bool is an int.
  if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
    raise InputError(f"{line_name} has id {number!r}: ids are integers from 0 to 2**63 - 1, or "
                     "left out.")
  return number


def rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a JSON-lines file with "problem" and "answer", and optionally "id" and "solution".

  An absent id is a hash of the problem's text, which does not depend on its line or file.

  Raises:
    InputError: the file is absent or empty; a line is not such an object, or repeats an id or a
      problem. Names file and line.
  """
  found = {}
  # id -> "line 3", where it was used first
  first = {}
  for line_name, row in objects(path, "problem and answer"):
    row = _row(line_name, row)
    if row["id"] in found:
      raise InputError(f"{line_name} uses id {row['id']} again, first used in {first[row['id']]}: "
                       "make every id distinct, and without ids every problem.")
    found[row["id"]] = row
    first[row["id"]] = line_name.removeprefix(f"{path} ")
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
  responses: dict[int, dict[int | None, str | None]] = {}
  for line_name, row in objects(path, "id and response"):
    number = row.get("id")
    text = row.get("response")
    if not isinstance(number, int) or not isinstance(text, str):
      raise InputError(f"{line_name} lacks an integer id or a response's text: give both.")
    samples = responses.setdefault(number, {})
    if row.get("sample") in samples:
      raise InputError(f"{line_name} answers problem {number} again: keep one response a problem, "
                       'or number them under "sample".')
    # A response that was cut, or is empty, is not a solution.
    finished = row.get("finish", "stop") == "stop"
    samples[row.get("sample")] = text if finished and text else None
  return [row | _solution(responses.get(row["id"], {})) for row in problems]


def _solution(samples: dict[int | None, str | None]) -> dict[str, str]:
  """{"solution"} of the first sample that is one, or {}."""
  # Of files without "sample" each problem has one response, under None.
  usable = [(sample or 0, text) for sample, text in samples.items() if text is not None]
  return {"solution": min(usable)[1]} if usable else {}


def _object(line_name: str, line: str) -> dict[str, Any]:
  """The JSON object of a line."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise InputError(f"{line_name} is not JSON ({error.msg}): write one object per line."
                     ) from error
  if not isinstance(row, dict):
    raise InputError(f"{line_name} is not a JSON object: write one object per line.")
  return row


def _row(line_name: str, row: dict[str, Any]) -> dict[str, Any]:
  """A problem's row with its id, without keys that nothing reads."""
  for key in ("problem", "answer"):
    if not isinstance(row.get(key), str) or not row[key]:
      raise InputError(f'{line_name} has no text under "{key}": give every row problem and answer.')
  number = line_id(line_name, row, row["problem"])
  solution = {"solution": row["solution"]} if "solution" in row else {}
  if not all(isinstance(text, str) for text in solution.values()):
    raise InputError(f"{line_name} has a solution that is not text: write it as a string.")
  return {"id": number, "problem": row["problem"], "answer": row["answer"]} | solution
