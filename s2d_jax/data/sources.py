"""Random-access sources of problems: prepared TFDS data sets, and JSON lines.

A source is a sequence of rows {"id": int, "problem": str, "answer": str} with, where the data has
one, "solution": str. Reading needs no TensorFlow.
"""

import contextlib
import fcntl
import io
import json
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from s2d_jax import rollouts
from s2d_jax.data.arithmetic import arithmetic_dataset_builder

REQUIRED = ("id", "problem", "answer")


class Decoded(Sequence):
  """A TFDS data source whose text is str instead of bytes and whose ids are Python integers."""

  def __init__(self, rows):
    self._rows = rows

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    row = self._rows[range(len(self))[index]]  # IndexError past the end, and -1 is the last
    text = {k: v.decode() for k, v in row.items() if isinstance(v, bytes)}
    return {"id": int(row["id"])} | text


def tfds_source(name, split, data_dir=None):
  """Rows of `split` of a TFDS data set: "arithmetic", or a folder where one was prepared.

  "arithmetic" is prepared under `data_dir` the first time and reused afterwards. ValueError where
  the split is absent or empty, or the features lack id, problem or answer.
  """
  if name == "arithmetic":
    name = prepare(
      arithmetic_dataset_builder.Builder(data_dir=str(data_dir), file_format="array_record")
    )
  if not (Path(name) / "dataset_info.json").is_file():
    raise ValueError(
      f"{name} is no prepared TFDS folder (it has no dataset_info.json): name one, "
      'or a JSONL file, or "arithmetic".'
    )
  builder = tfds.builder_from_directory(str(name))
  filled = [key for key, info in builder.info.splits.items() if info.num_examples]
  if split not in filled:
    raise ValueError(f"{name} has no rows in split {split}: choose one of {filled}.")
  missing = [key for key in REQUIRED if key not in builder.info.features]
  if missing:
    raise ValueError(f"{name} lacks the features {missing}: rebuild it with them.")
  return Decoded(builder.as_data_source(split))


def prepare(builder):
  """Folder of the builder's files, written unless they are there: atomic, quiet, offline.

  Of two processes of one machine that ask at once, the second waits and finds the first's files.
  """
  folder = Path(builder.data_dir)
  folder.parent.mkdir(parents=True, exist_ok=True)
  with open(folder.parent / ".lock", "w") as lock, contextlib.redirect_stdout(io.StringIO()):
    fcntl.flock(lock, fcntl.LOCK_EX)
    tfds.display_progress_bar(False)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
  return folder


def jsonl(path):
  """Rows of a JSON-lines file with "problem" and "answer", and optionally "id" and "solution".

  An absent id is a hash of the problem's text: the same wherever the row stands, and not that of
  another problem in another file. ValueError, naming file and line, for a line that is not such an
  object, or an id or a problem used twice; naming the file when it is absent or has no rows.
  """
  if not Path(path).is_file():
    raise ValueError(f"{path} is no file: give JSON lines of problem and answer there.")
  places, rows = {}, []
  with open(path, encoding="utf-8") as lines:
    for index, line in enumerate(lines):
      if line.strip():
        rows.append(_row(f"{path} line {index + 1}", line))
        first = places.setdefault(rows[-1]["id"], index + 1)
        if first != index + 1:
          raise ValueError(
            f"{path} line {index + 1} uses id {rows[-1]['id']} again, first used in line {first}: "
            "make every id distinct, and without ids every problem."
          )
  if not rows:
    raise ValueError(f"{path} has no rows: give it one JSON object per line.")
  return rows


def solved(rows, path):
  """The rows of `jsonl` with the responses of another JSON-lines file, {"id", "response"}, as their
  solutions: what a teacher's supervised fine-tuning learns from. `path` None changes nothing.

  Several samples of a problem, as `python -m s2d_jax.sampler` writes them, are told apart by
  "sample": the first that came to its end ("finish" is "stop") is the solution.

  ValueError, naming file and line, for a line that is not such an object, or an id or a sample of
  it used twice.
  """
  if path is None:
    return rows
  if not Path(path).is_file():
    raise ValueError(f"{path} is no file: give JSON lines of id and response there.")
  responses = {}
  with open(path, encoding="utf-8") as lines:
    for index, line in enumerate(lines):
      if line.strip():
        place, row = f"{path} line {index + 1}", _object(f"{path} line {index + 1}", line)
        number, text = row.get("id"), row.get("response")
        if not isinstance(number, int) or not isinstance(text, str):
          raise ValueError(f"{place} lacks an integer id or a response's text: give both.")
        samples = responses.setdefault(number, {})
        if row.get("sample") in samples:
          raise ValueError(f"{place} answers problem {number} again: keep one response a problem, "
                           'or number them under "sample".')
        ended = row.get("finish", "stop") == "stop"
        samples[row.get("sample")] = text if ended and text else None  # an empty one is no solution
  def solution(row):
    ended = sorted((sample or 0, text) for sample, text in responses.get(row["id"], {}).items()
                   if text is not None)
    return row | {"solution": ended[0][1]} if ended else row
  return [solution(row) for row in rows]


def _object(place, line):
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(f"{place} is not JSON ({error.msg}): write one object per line.") from error
  if not isinstance(row, dict):
    raise ValueError(f"{place} is not a JSON object: write one object per line.")
  return row


def _row(place, line):
  row = _object(place, line)
  for key in ("problem", "answer"):
    if not isinstance(row.get(key), str) or not row[key]:
      raise ValueError(f'{place} has no text under "{key}": give every row problem and answer.')
  number = row.get("id", rollouts.text_id(row["problem"]))
  if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
    raise ValueError(f"{place} has id {number!r}: ids are integers from 0 to 2**63 - 1, or left "
                     "out.")
  solution = {"solution": row["solution"]} if "solution" in row else {}
  if not all(isinstance(text, str) for text in solution.values()):
    raise ValueError(f"{place} has a solution that is not text: write it as a string.")
  return {"id": number, "problem": row["problem"], "answer": row["answer"]} | solution
