"""Rows of a file of JSON lines or of a parquet file, which its first bytes tell apart."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from s2d_jax.data import jsonl
from s2d_jax.errors import InputError

_MAGIC = b"PAR1"  # the first and the last bytes of a parquet file
_ROWS = 4096      # of a parquet file that are in memory at once


def is_parquet(path: str | os.PathLike) -> bool:
  """Whether a path is a file that begins as parquet does, under any name."""
  if not Path(path).is_file():
    return False
  with open(path, "rb") as file:
    return file.read(len(_MAGIC)) == _MAGIC


def objects(path: str | os.PathLike,
            columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields ("file line 3" or "file row 3", its object), from JSON lines or parquet.

  Args:
    columns: those of a parquet file that are read, where it has them; a null counts as absent.

  Raises:
    InputError: there is no such file, it is damaged, a line is not a JSON object, or a text is not
      UTF-8.
  """
  if not is_parquet(path):
    yield from jsonl.objects(path, "problem and answer")
    return
  number = 0
  try:
    table = pyarrow.parquet.ParquetFile(path)
    read = [name for name in dict.fromkeys(columns) if name in table.schema_arrow.names]
    for batch in table.iter_batches(_ROWS, columns=read):
      for row in batch.to_pylist():
        number += 1
        yield f"{path} row {number}", {k: v for k, v in row.items() if v is not None}
  except UnicodeDecodeError as error:
    last = min(number + _ROWS, table.metadata.num_rows)
    raise InputError(f"{path} has a text that is not UTF-8 in the rows {number + 1} to {last} "
                     f"({error}): write it again as UTF-8.") from error
  except (pyarrow.ArrowException, OSError) as error:
    reason = str(error).splitlines()[0]
    raise InputError(f"{path} is a damaged parquet file ({reason}): download it again.") from error
