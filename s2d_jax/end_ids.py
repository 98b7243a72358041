"""The ids that end a response, from the files of a Hugging Face folder."""

import pathlib
from collections.abc import Mapping
from typing import Any

from s2d_jax.errors import InputError
from s2d_jax.json_objects import Json, shown

# Looked at in this order, as in `transformers`: config.json counts where the other names no id.
_FILES = ("generation_config.json", "config.json")


def named(folder: pathlib.Path, objects: Mapping[str, Json]) -> tuple[str, list[int]]:
  """(file, ids): the first file of the folder that has ids under eos_token_id; ("", []): none.

  Args:
    objects: {name: object} of the folder's JSON files.

  Raises:
    InputError: a value is not an integer, or negative; names the file.
  """
  found = []
  for name in _FILES:
    ids = objects.get(name, {}).get("eos_token_id")
    if ids is None:
      continue
    ids = ids if isinstance(ids, list) else [ids]
    for number in ids:
      # To Python a boolean is an integer.
      if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise _wrong(folder / name, number)
    if ids:
      found.append((name, ids))
  return found[0] if found else ("", [])


def read(folder: pathlib.Path, objects: Mapping[str, Json], token: str | None,
         vocabulary: Mapping[str, int]) -> tuple[int, ...]:
  """Ids that end a response: the tokenizer's own first, then those that `named` returns.

  Args:
    objects: as `named` takes it.
    token: the tokenizer's end token; None: it has none.
    vocabulary: {token: id}, added tokens included.

  Raises:
    InputError: an id is not in the vocabulary, or there is no end token at all.
  """
  found = []
  if token is not None:
    found.append(vocabulary[token])
  token_ids = set(vocabulary.values())
  name, ids = named(folder, objects)
  for number in ids:
    if number not in token_ids:
      raise _wrong(folder / name, number)
    found.append(number)
  if not found:
    raise InputError(f"{folder} names no end token: add eos_token to its tokenizer_config.json.")
  # A dict keeps the order and drops what comes twice.
  return tuple(dict.fromkeys(found))


def _wrong(path: pathlib.Path, number: Any) -> InputError:
  return InputError(f"{path} has {shown(number)} under 'eos_token_id', which is not an id of the "
                    "tokenizer: write ids of tokens, as integers.")
