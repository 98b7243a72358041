"""Random-access sources of problems: prepared TFDS data sets, and JSON lines.

A source is a sequence of rows {"id": int, "problem": str, "answer": str} with, where the data has
one, "solution": str. Reading needs no TensorFlow.
"""

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from s2d_jax import rollouts
from s2d_jax.data.arithmetic import arithmetic_dataset_builder

REQUIRED = ("id", "problem", "answer")


class Decoded(Sequence):
  """A TFDS data source whose text is str instead of bytes and whose ids are Python integers."""

  def __init__(self, source: Sequence[dict[str, Any]]) -> None:
    """Wraps a TFDS data source without reading it."""
    self._source = source

  def __len__(self) -> int:
    """The number of rows."""
    return len(self._source)

  def __getitem__(self, index: int | np.integer) -> dict[str, Any]:
    """One row, decoded when it is asked for."""
    row = self._source[range(len(self))[index]]  # IndexError past the end, and -1 is the last
    text = {k: v.decode() for k, v in row.items() if isinstance(v, bytes)}
    return {"id": int(row["id"])} | text


def arithmetic(split: str, data_dir: str | os.PathLike) -> Decoded:
  """A split of the arithmetic world, prepared under `data_dir` the first time.

  Raises:
    ValueError: there is no such split.
  """
  builder = arithmetic_dataset_builder.Builder(data_dir=str(data_dir), file_format="array_record")
  return prepared(prepare(builder), split)


def prepared(folder: str | os.PathLike, split: str) -> Decoded:
  """A split of a TFDS data set that stands prepared in a folder.

  Raises:
    ValueError: the folder holds no data set, the split is absent or empty, or the features lack id,
      problem or answer.
  """
  if not (Path(folder) / "dataset_info.json").is_file():
    raise ValueError(f"{folder} is no prepared TFDS folder (it has no dataset_info.json): give "
                     "one, or a file of JSON lines.")
  builder = tfds.builder_from_directory(str(folder))
  filled = [key for key, info in builder.info.splits.items() if info.num_examples]
  if split not in filled:
    raise ValueError(f"{folder} has no rows in split {split}: choose one of {filled}.")
  missing = [key for key in REQUIRED if key not in builder.info.features]
  if missing:
    raise ValueError(f"{folder} lacks the features {missing}: rebuild it with them.")
  return Decoded(builder.as_data_source(split))


def prepare(builder: tfds.core.DatasetBuilder) -> Path:
  """Writes a builder's files unless they exist, quietly and offline; returns their folder.

  Of two processes of one machine that call this at once, the second waits and uses the first's
  files.
  """
  folder = Path(builder.data_dir)
  folder.parent.mkdir(parents=True, exist_ok=True)
  # TFDS prints its progress, on standard output too.
  with open(folder.parent / ".lock", "w") as lock, contextlib.redirect_stdout(io.StringIO()):
    fcntl.flock(lock, fcntl.LOCK_EX)
    tfds.display_progress_bar(False)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
  return folder


def read(path: str | os.PathLike, split: str) -> Sequence[dict[str, Any]]:
  """The rows at a path: a file of JSON lines, or the split of a folder that TFDS prepared.

  Raises:
    ValueError: as `jsonl` and `prepared`.
  """
  return prepared(path, split) if Path(path).is_dir() else jsonl(path)


def json_lines(path: str | os.PathLike, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """The JSON objects of a file, one a line; blank lines are skipped.

  Args:
    content: names what a line holds, for the error message of an absent file.

  Yields:
    ("file line 3", the object): the first names the line in error messages.

  Raises:
    ValueError: there is no such file, or a line is not a JSON object; names file and line.
  """
  if not Path(path).is_file():
    raise ValueError(f"{path} is no file: give JSON lines of {content} there.")
  with open(path, encoding="utf-8") as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        yield f"{path} line {number}", _object(f"{path} line {number}", line)


def checked_id(line_name: str, row: dict[str, Any], text: str) -> int:
  """The "id" of a JSON line; an absent one is a hash of `text`, the same in every file.

  Raises:
    ValueError: the id is not an integer from 0 to 2**63 - 1; names file and line.
  """
  number = row["id"] if "id" in row else rollouts.text_id(text)
  if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
    raise ValueError(f"{line_name} has id {number!r}: ids are integers from 0 to 2**63 - 1, or "
                     "left out.")
  return number


def jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a JSON-lines file with "problem" and "answer", and optionally "id" and "solution".

  An absent id is a hash of the problem's text, which does not depend on its line or file.

  Raises:
    ValueError: the file is absent or empty; a line is not such an object, or repeats an id or a
      problem. Names file and line.
  """
  rows = {}
  first = {}
  for line_name, row in json_lines(path, "problem and answer"):
    row = _row(line_name, row)
    if row["id"] in rows:
      raise ValueError(f"{line_name} uses id {row['id']} again, first used in {first[row['id']]}: "
                       "make every id distinct, and without ids every problem.")
    rows[row["id"]] = row
    first[row["id"]] = line_name.removeprefix(f"{path} ")
  if not rows:
    raise ValueError(f"{path} has no rows: give it one JSON object per line.")
  return list(rows.values())


def solved(rows: Sequence[dict[str, Any]],
           path: str | os.PathLike | None) -> Sequence[dict[str, Any]]:
  """The rows with the responses of a JSON-lines file, {"id", "response"}, as their solutions.

  Supervised fine-tuning learns from them. A problem may have several samples, numbered by "sample"
  as the offline sampling command writes them: the first with "finish" "stop" is the solution.

  Args:
    path: None changes nothing.

  Raises:
    ValueError: a line is not such an object, or repeats an id and sample; names file and line.
  """
  if path is None:
    return rows
  responses: dict[int, dict[int | None, str | None]] = {}
  for line_name, row in json_lines(path, "id and response"):
    number = row.get("id")
    text = row.get("response")
    if not isinstance(number, int) or not isinstance(text, str):
      raise ValueError(f"{line_name} lacks an integer id or a response's text: give both.")
    samples = responses.setdefault(number, {})
    if row.get("sample") in samples:
      raise ValueError(f"{line_name} answers problem {number} again: keep one response a problem, "
                       'or number them under "sample".')
    # A response that was cut, or is empty, is no solution.
    finished = row.get("finish", "stop") == "stop"
    samples[row.get("sample")] = text if finished and text else None
  return [row | _solution(responses.get(row["id"], {})) for row in rows]


def _solution(samples: dict[int | None, str | None]) -> dict[str, str]:
  """{"solution"} of the first sample that is one, or {}."""
  usable = [(sample or 0, text) for sample, text in samples.items() if text is not None]
  return {"solution": min(usable)[1]} if usable else {}


def _object(line_name: str, line: str) -> dict[str, Any]:
  """The JSON object of a line."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{line_name} is not JSON ({error.msg}): write one object per line."
                     ) from error
  if not isinstance(row, dict):
    raise ValueError(f"{line_name} is not a JSON object: write one object per line.")
  return row


def _row(line_name: str, row: dict[str, Any]) -> dict[str, Any]:
  """A problem's row with its id, without keys that nothing reads."""
  for key in ("problem", "answer"):
    if not isinstance(row.get(key), str) or not row[key]:
      raise ValueError(f'{line_name} has no text under "{key}": give every row problem and answer.')
  number = checked_id(line_name, row, row["problem"])
  solution = {"solution": row["solution"]} if "solution" in row else {}
  if not all(isinstance(text, str) for text in solution.values()):
    raise ValueError(f"{line_name} has a solution that is not text: write it as a string.")
  return {"id": number, "problem": row["problem"], "answer": row["answer"]} | solution
