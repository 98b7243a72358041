"""Sources of problems: published sets, files of JSON lines or parquet, prepared TFDS data sets.

A source is a sequence of rows {"id": int, "problem": str, "answer": str} with, where the data has
one, "solution": str, and texts of the names FAMILIES. Reading needs no TensorFlow.
"""

import contextlib
import fcntl
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from s2d_jax.data import jsonl, published, tables
from s2d_jax.data.arithmetic import arithmetic_dataset_builder
from s2d_jax.data.composition import composition_dataset_builder
from s2d_jax.data.math_problems import math_problems_dataset_builder
from s2d_jax.data.word_problems import word_problems_dataset_builder
from s2d_jax.errors import InputError

# A "solution" is optional.
_REQUIRED = ("id", "problem", "answer")
# Text columns that may name the kind of a problem, the first one that is there.
FAMILIES = ("family", "subject", "level")


class _Decoded(Sequence):
  """A TFDS data source whose text is str instead of bytes and whose ids are Python integers."""

  def __init__(self, source: Sequence[dict[str, Any]]) -> None:
    """Wraps a TFDS data source without reading it."""
    self._source = source

  def __len__(self) -> int:
    """The number of rows."""
    return len(self._source)

  def __getitem__(self, index: int | np.integer) -> dict[str, Any]:
    """One row, decoded when it is asked for."""
    # A range raises IndexError past the end and takes -1 as the last; a TFDS source does neither.
    row = self._source[range(len(self))[index]]
    text = {k: v.decode() for k, v in row.items() if isinstance(v, bytes)}
    return {"id": int(row["id"])} | text


def arithmetic(split: str, data_dir: str | os.PathLike) -> _Decoded:
  """A split of the arithmetic world, prepared under `data_dir` the first time.

  Raises:
    InputError: there is no such split.
  """
  builder = arithmetic_dataset_builder.Builder(data_dir=str(data_dir), file_format="array_record")
  return prepared(_prepare(builder), split)


def composition(split: str, data_dir: str | os.PathLike) -> _Decoded:
  """A split of the composition world, prepared under `data_dir` the first time.

  Raises:
    InputError: there is no such split.
  """
  builder = composition_dataset_builder.Builder(data_dir=str(data_dir), file_format="array_record")
  return prepared(_prepare(builder), split)


def word_problems(split: str, data_dir: str | os.PathLike) -> _Decoded:
  """A split of the sums and word problems, prepared under `data_dir` the first time.

  Raises:
    InputError: there is no such split.
  """
  builder = word_problems_dataset_builder.Builder(data_dir=str(data_dir),
                                                  file_format="array_record")
  return prepared(_prepare(builder), split)


def prepared(folder: str | os.PathLike, split: str) -> _Decoded:
  """A split of a TFDS data set that stands prepared in a folder.

  Raises:
    InputError: the folder holds no data set, the split is absent or empty, or the features lack id,
      problem or answer.
  """
  if not (Path(folder) / "dataset_info.json").is_file():
    raise InputError(f"{folder} is not a prepared TFDS folder (it has no dataset_info.json): give "
                     "one, or a file of JSON lines.")
  builder = tfds.builder_from_directory(str(folder))
  # TFDS lists a split of no rows like any other, and fails only when it is read.
  filled = [key for key, info in builder.info.splits.items() if info.num_examples]
  if split not in filled:
    raise InputError(f"{folder} has no rows in split {split}: choose one of {filled}.")
  missing = [key for key in _REQUIRED if key not in builder.info.features]
  if missing:
    raise InputError(f"{folder} lacks the features {missing}: rebuild it with them.")
  return _Decoded(builder.as_data_source(split))


def _prepare(builder: tfds.core.DatasetBuilder) -> Path:
  """Writes a builder's files unless they exist, quietly and offline; returns their folder.

  Of two processes of one machine that call this at once, the second waits and uses the first's
  files.
  """
  folder = Path(builder.data_dir)
  folder.parent.mkdir(parents=True, exist_ok=True)
  # TFDS prints its progress, also on standard output. The lock is beside the folder, because TFDS
  # moves the folder into place as a whole.
  with open(folder.parent / ".lock", "w") as lock, contextlib.redirect_stdout(io.StringIO()):
    fcntl.flock(lock, fcntl.LOCK_EX)
    tfds.display_progress_bar(False)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
  return folder


class Problems(list[dict[str, Any]]):
  """Rows of problems, and in `origin` the file that they are from, where that is known."""

  def __init__(self, rows: Iterable[dict[str, Any]], origin: Mapping[str, Any] | None) -> None:
    """The rows with their origin: "file", its "sha256", and of a published set "set" and more."""
    super().__init__(rows)
    self.origin = origin


def read(path: str | os.PathLike, split: str, folder: str | os.PathLike = "") -> Sequence[dict]:
  """The problems that an entry of `config.data` names.

  Args:
    path: a name of `published.SOURCES`, whose file is in `folder` or is downloaded to there; such
      a name, a colon and the set's file elsewhere; a file of JSON lines or parquet with "problem"
      and "answer"; or a folder that TFDS prepared.
    split: of a folder that TFDS prepared.

  Raises:
    InputError: as `published`, `jsonl` and `prepared` say.
  """
  name, colon, file = str(path).partition(":")
  if name in published.SOURCES:
    return _published(name, Path(file).expanduser() if colon else published.locate(name, folder))
  path = Path(path).expanduser()
  if path.is_dir():
    return prepared(path, split)
  if not path.exists():
    raise InputError(f"{path} is not a file: give JSON lines or parquet of problem and answer "
                     f"there, or name one of {', '.join(published.SOURCES)}.")
  rows = jsonl.distinct(tables.objects(path, ("id", "problem", "answer", "solution", *FAMILIES)),
                        path)
  return Problems(rows, {"file": str(path), "sha256": sha256(path)})


def count(path: str, split: str, folder: str | os.PathLike = "") -> int | None:
  """The number of problems that `read` would find, without a download; None where it is unknown."""
  name, colon, file = path.partition(":")
  is_published = name in published.SOURCES
  if is_published and not colon and not published.placed(name, folder):
    return published.SOURCES[name].rows
  file = file if is_published else path
  # A published set without a colon is in the folder, and everything else where it says.
  if file and not Path(file).expanduser().exists():
    return None
  return len(read(path, split, folder))


def sha256(path: Path) -> str:
  """SHA-256, in hex, of a file's bytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _published(name: str, file: Path) -> Problems:
  """The problems of a published set from its file; prepared beside it where that can be written."""
  if not file.is_file():
    raise InputError(f"{file} is not a file: place the file of {name} there, from "
                     f"{published.SOURCES[name].url}.")
  digest = sha256(file)
  source = published.SOURCES[name]
  origin = {"set": name, "file": str(file), "sha256": digest, "published_rows": source.rows,
            "repository": source.repository, "revision": source.revision,
            # Of other bytes it is unknown whether they hold the published set.
            "is_published": digest == source.sha256}
  if not os.access(file.parent, os.W_OK):
    return Problems(published.rows(name, file), origin)
  # A folder for each content of the file, so that what was prepared is never stale.
  builder = math_problems_dataset_builder.Builder(
      name=name, file=file, data_dir=str(file.parent / "tfds" / digest[:12]))
  rows = prepared(_prepare(builder), "problems")
  # TFDS has no optional feature: an empty text stands for an absent one.
  return Problems(({key: value for key, value in row.items() if value != ""} for row in rows),
                  origin)
