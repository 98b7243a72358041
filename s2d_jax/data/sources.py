"""Random-access sources of problems: prepared TFDS data sets, or files of JSON lines.

A source is a sequence of rows {"id": int, "problem": str, "answer": str} with, where the data has
one, "solution": str. Reading needs no TensorFlow.
"""

import contextlib
import fcntl
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from s2d_jax.data import jsonl
from s2d_jax.data.arithmetic import arithmetic_dataset_builder
from s2d_jax.errors import InputError

# A "solution" is optional.
_REQUIRED = ("id", "problem", "answer")


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


def read(path: str | os.PathLike, split: str) -> Sequence[dict[str, Any]]:
  """The rows at a path: a file of JSON lines, or the split of a folder that TFDS prepared.

  Raises:
    InputError: as `jsonl.rows` and `prepared`.
  """
  return prepared(path, split) if Path(path).is_dir() else jsonl.rows(path)
