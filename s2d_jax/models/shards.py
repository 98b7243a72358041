"""The safetensors files of a Hugging Face folder: their names, headers and tensors."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
import safetensors

from s2d_jax import json_objects
from s2d_jax.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Looked for in order to refuse them by name; unpickling runs code.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEADER_BYTES = 100_000_000  # the cap of the safetensors library itself
_ROWS = 4096  # rows of two tensors that are compared at a time


class Stored(NamedTuple):
  """The place, shape and dtype of a tensor, from the header of its file."""
  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str  # in the spelling of safetensors


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a folder; those of its index if it has one.

  Raises:
    InputError: there are none, a shard is missing, or the index names a file outside the folder.
  """
  if (folder / INDEX).exists():
    names = sorted(set(_index(folder).values()))
  elif (folder / WEIGHTS).exists():
    names = [WEIGHTS]
  elif pickle := next((path for kind in _PICKLES for path in sorted(folder.glob(kind))), None):
    raise InputError(f"{folder} has pickled weights only ({pickle.name}), and unpickling runs "
                     "code: convert them to safetensors.")
  else:
    raise InputError(f"{folder} has no weights: it needs {WEIGHTS} or {INDEX} and its shards.")
  for name in names:
    # An index comes from elsewhere: "../x" or an absolute path would read any file of the machine.
    if pathlib.PurePath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
      raise InputError(f"{folder / INDEX} names the shard {name!r}, which is not a safetensors "
                       "file of this folder: download the model again.")
    if not (folder / name).exists():
      raise InputError(f"{folder} lacks the shard {name}: finish its download.")
    if not (folder / name).is_file():
      raise InputError(f"{folder / name} is a folder, not a safetensors file: download it again.")
  return [folder / name for name in names]


def _index(folder: pathlib.Path) -> dict[str, str]:
  """{tensor: file} of a folder's index."""
  names = json_objects.read(folder / INDEX).get("weight_map")
  if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
    raise InputError(f"{folder / INDEX} has no weight_map of tensors to files: download it again.")
  return names


def headers(folder: pathlib.Path) -> dict[str, Stored]:
  """{name: Stored} of every tensor of a folder; only headers are read.

  Raises:
    InputError: as `files`; a file is cut short; a tensor is stored twice; the index is wrong.
  """
  found = {}
  for path in files(folder):
    with _open(path) as file:
      for name in file.keys():
        if name in found:
          raise InputError(f"{path} has the weight {name}, and {found[name].file.name} has it too: "
                           "download the model again.")
        # A slice has the shape and the dtype, and reads none of the tensor's bytes.
        part = file.get_slice(name)
        found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
  # An index that contradicts its shards is a sign of files from two downloads.
  if (folder / INDEX).exists():
    index = _index(folder)
    for name in sorted(index.keys() | found.keys()):
      here = found[name].file.name if name in found else "no shard"
      if index.get(name, "no shard") != here:
        raise InputError(f"{folder / INDEX} says that {name} is in {index.get(name, 'no shard')} "
                         f"and it is in {here}: download the model again.")
  return found


def read(stored: Stored, index: slice | tuple[slice, ...] = slice(None)) -> np.ndarray:
  """The part of a tensor at `index`, by default all of it."""
  # The file is opened for each part, because pages that stay mapped count as memory in use.
  with _open(stored.file) as file:
    return file.get_slice(stored.name)[index]


def equal(a: Stored, b: Stored) -> bool:
  """True if two stored matrices are equal; compared a few rows at a time."""
  if a.shape != b.shape:
    return False
  # They are the largest matrices of a model, so neither is held whole.
  parts = [slice(start, min(start + _ROWS, a.shape[0])) for start in range(0, a.shape[0], _ROWS)]
  return all(np.array_equal(read(a, part), read(b, part)) for part in parts)


def spans(path: pathlib.Path) -> dict[str, tuple[int, int]]:
  """{name: (its first byte in the file, the byte after its last)} of every tensor of a file.

  Raises:
    InputError: the header is damaged.
  """
  length, header = header_of(path)
  fields = json_objects.parse(f"{path}'s header", header)
  fields.pop("__metadata__", None)
  try:
    offsets = {name: tuple(about["data_offsets"]) for name, about in fields.items()}
    return {name: (8 + length + start, 8 + length + end) for name, (start, end) in offsets.items()}
  except (TypeError, KeyError, ValueError) as error:
    raise InputError(f"{path} has a header without data_offsets: download it again.") from error


def header_of(path: pathlib.Path) -> tuple[int, bytes]:
  """(declared length, bytes) of a safetensors file's header.

  Raises:
    InputError: the file cannot be read, or the header is too long to be one.
  """
  try:
    with open(path, "rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if length > HEADER_BYTES:
        raise InputError(f"{path} declares a header of {length} bytes: download it again.")
      return length, file.read(length)
  except OSError as error:
    raise InputError(f"{path} cannot be read ({error.strerror}): download it again.") from error


def _open(path: pathlib.Path) -> Any:
  """The open safetensors file, a context manager."""
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    raise InputError(f"{path} is not whole ({error}){_beyond(path)}: download it again.") from error
  except OSError as error:
    raise InputError(f"{path} cannot be read ({error}): download it again.") from error


def _beyond(path: pathlib.Path) -> str:
  """Names the first tensor that is missing from a file cut short; "" if it cannot be known."""
  # The header may be damaged too. Then the message is shorter, and the error is the same.
  try:
    ends = {name: end for name, (_, end) in spans(path).items()}
  except InputError:
    return ""
  lost = [(end, name) for name, end in ends.items() if end > path.stat().st_size]
  return f", {min(lost)[1]} is cut short" if lost else ""
