"""The JSON files of a tokenizer's folder, checked so that an error names the file at fault.

transformers gives a special token that tokenizer.json lacks a new id, for which no weight was
trained, and says nothing. Such a folder is refused here.
"""

import math
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping

from s2d_jax import json_objects
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Fields, Json, shown

CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"  # {token: id}
_DECODER = "added_tokens_decoder"  # {id: token}, in tokenizer_config.json
_MODELS = ("generation_config.json", "config.json")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def read(folder: pathlib.Path) -> dict[str, Json]:
  """{name: object} of the JSON files that describe a folder's tokenizer and its ids.

  Raises:
    InputError: tokenizer_config.json is absent; a file is not a JSON object, needs code of its own,
      or has a value of a wrong type. Names the file.
  """
  path = folder / CONFIG
  if not os.path.lexists(path):
    raise InputError(f"{folder} has no {CONFIG}: name a folder with a tokenizer.")
  objects = {CONFIG: json_objects.read(path)}
  names = [TOKENIZER, *_MODELS]
  # Older files, which transformers passes over where tokenizer_config.json has the ids itself.
  if _DECODER not in objects[CONFIG]:
    names += [_MAP, _ADDED]
  for name in names:
    # A folder or a link to nothing in a file's place is refused where it is read.
    if os.path.lexists(folder / name):
      objects[name] = json_objects.read(folder / name)
  for name, json in objects.items():
    if "auto_map" in json:
      raise InputError(f"{folder / name} asks for code of its own (auto_map), which is never "
                       "run: remove it.")
  _check_types(folder, objects)
  return objects


def _check_types(folder: pathlib.Path, objects: Mapping[str, Json]) -> None:
  """Refuses values that transformers would meet with an error that names no file."""
  for name in (CONFIG, _MAP):
    list(_special_tokens(folder / name, objects.get(name, {})))
  config = Fields(str(folder / CONFIG), objects[CONFIG])
  config.text("tokenizer_class", None)
  for number, token in config.object(_DECODER, {}).items():
    if not (number.isdecimal() and isinstance(token, dict)
            and isinstance(token.get("content"), str)):
      raise InputError(f"{folder / CONFIG} has {shown({number: token})} under {_DECODER!r}, which "
                       "is not an id and its token: take the file that came with the weights.")
  config.number("model_max_length", 0, math.inf, None)
  config.list("model_input_names", [])
  template = config.json.get("chat_template")
  for entry in template if isinstance(template, list) else []:
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), str) for key in ("name", "template")):
      raise InputError(f"{folder / CONFIG} has {shown(entry)} under 'chat_template', which is not "
                       "a name and its template: take the file that came with the weights.")
  added = Fields(str(folder / _ADDED), objects.get(_ADDED, {}))
  for token in added.json:
    added.integer(token, 0)
  tokenizer = Fields(str(folder / TOKENIZER), objects.get(TOKENIZER, {}))
  tokenizer.list("added_tokens", [])


def _special_tokens(path: pathlib.Path, json: Json) -> Iterator[tuple[str, str]]:
  """Yields (key, token) of each special token that a file names."""
  for key, value in json.items():
    # Keys such as add_bos_token are switches, and null stands for the absence of a token.
    single = key in _NAMED or (key.endswith("_token") and isinstance(value, str | dict))
    if value is None or not (single or key in _LISTS):
      continue
    tokens = [value]
    if not single and isinstance(value, list | dict):
      tokens = value.values() if isinstance(value, dict) else value
    for token in tokens:
      text = token
      # transformers reads an object only where it says so, or in these keys of the older file.
      if isinstance(token, dict) and (token.get("__type") == "AddedToken" or (
          path.name == _MAP and key != "additional_special_tokens")):
        text = token.get("content")
      if not isinstance(text, str):
        raise InputError(f"{path} has {shown(token)} under {key!r}, which is not a token: write "
                         "its text, or take the file that came with the weights.")
      yield key, text


def check_tokens(folder: pathlib.Path, objects: Mapping[str, Json],
                 vocabulary: Collection[str]) -> None:
  """Refuses tokens to which no file gives an id.

  Args:
    objects: as `read` returns them.
    vocabulary: the tokens of the tokenizer that transformers made of them.

  Raises:
    InputError: a file names a special token that tokenizer.json lacks, or the tokenizer's class
      adds one.
  """
  # Tokenizers in other formats have no list that could be looked at here.
  if TOKENIZER not in objects:
    return
  with_ids = _tokens_with_ids(objects)
  for name in (CONFIG, _MAP):
    for key, token in _special_tokens(folder / name, objects.get(name, {})):
      if token not in with_ids:
        raise InputError(f"{folder / name} has {shown(token)} under {key!r}, which is not a token "
                         f"of its {TOKENIZER}: correct it, or remove it.")
  added = sorted(set(vocabulary) - with_ids)
  if added:
    raise InputError(f"the tokenizer_class of {folder / CONFIG} adds the token {shown(added[0])}, "
                     f"which is not in {TOKENIZER}: write PreTrainedTokenizerFast there, or take "
                     "the files that came with the weights.")


def _tokens_with_ids(objects: Mapping[str, Json]) -> set[str]:
  """The tokens to which the files give ids."""
  tokenizer = objects[TOKENIZER]
  words = tokenizer["model"]["vocab"]
  # Unigram models list pairs of a token and its score.
  if isinstance(words, list):
    words = [word for word, _ in words]
  entries = [*(tokenizer.get("added_tokens") or []),
             *(objects[CONFIG].get(_DECODER) or {}).values()]
  return {*words, *(entry["content"] for entry in entries), *objects.get(_ADDED, {})}
