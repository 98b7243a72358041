"""The safetensors files of a Hugging Face folder: which there are, and what their headers say."""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import safetensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEADER_BYTES = 100_000_000  # the cap of the safetensors library itself
ROWS = 4096  # of two tensors that are compared, at a time


class Stored(NamedTuple):
  """Where a tensor is, from the header of its file."""
  file: pathlib.Path
  name: str
  shape: tuple
  dtype: str  # as safetensors spells it


def json_object(path):
  """The object in a JSON file of a model's folder."""
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}): download it again.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} is not a JSON object: download it again.")
  return found


def files(folder):
  """The safetensors files of a folder, by its index where it has one."""
  if (folder / INDEX).exists():
    names = sorted(set(_index(folder).values()))
  elif (folder / WEIGHTS).exists():
    names = [WEIGHTS]
  elif pickle := next((path for kind in PICKLES for path in sorted(folder.glob(kind))), None):
    raise ValueError(f"{folder} has pickled weights only ({pickle.name}), and unpickling runs "
                     "code: convert them to safetensors.")
  else:
    raise ValueError(f"{folder} has no weights: it needs {WEIGHTS} or {INDEX} and its shards.")
  for name in names:
    if pathlib.PurePath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
      raise ValueError(f"{folder / INDEX} names the shard {name!r}, which is no safetensors file "
                       "of this folder: download the model again.")
    if not (folder / name).exists():
      raise ValueError(f"{folder} lacks the shard {name}: finish its download.")
  return [folder / name for name in names]


def _index(folder):
  """{tensor: file} of a folder's index."""
  names = json_object(folder / INDEX).get("weight_map")
  if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
    raise ValueError(f"{folder / INDEX} has no weight_map of tensors to files: download it again.")
  return names


def headers(folder):
  """{name: Stored} of every tensor of a folder, from the headers alone."""
  found = {}
  for path in files(folder):
    with _open(path) as file:
      for name in file.keys():
        if name in found:
          raise ValueError(f"{path} has the weight {name}, and {found[name].file.name} has it too: "
                           "download the model again.")
        part = file.get_slice(name)
        found[name] = Stored(path, name, tuple(part.get_shape()), part.get_dtype())
  if (folder / INDEX).exists():
    index = _index(folder)
    for name in sorted(index.keys() | found.keys()):
      here = found[name].file.name if name in found else "no shard"
      if index.get(name, "no shard") != here:
        raise ValueError(f"{folder / INDEX} says that {name} is in {index.get(name, 'no shard')} "
                         f"and it is in {here}: download the model again.")
  return found


def read(stored, index=slice(None)):
  """A part of a tensor. The file is opened for it alone: what stays mapped counts as memory."""
  with _open(stored.file) as file:
    return file.get_slice(stored.name)[index]


def same(a, b):
  """Whether two stored matrices are equal, a few rows of both at a time."""
  if a.shape != b.shape:
    return False
  parts = [slice(at, min(at + ROWS, a.shape[0])) for at in range(0, a.shape[0], ROWS)]
  return all(np.array_equal(read(a, part), read(b, part)) for part in parts)


def _open(path):
  try:
    return safetensors.safe_open(path, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is not whole ({error}){_beyond(path)}: download it again.") from error


def _beyond(path):
  """The first tensor that a file cut short does not hold, in words; nothing where none is known."""
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
      return ""
    try:
      header = json.loads(file.read(length))
      ends = {name: 8 + length + about["data_offsets"][1] for name, about in header.items()
              if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
      return ""
  lost = [(end, name) for name, end in ends.items() if end > path.stat().st_size]
  return f", {min(lost)[1]} is cut short" if lost else ""
