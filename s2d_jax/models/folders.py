"""A Hugging Face folder before its weights are read: config.json and the headers of the tensors."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from s2d_jax import json_objects, models
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Json
from s2d_jax.models import Config, Weight, layout, shards
from s2d_jax.models.shards import Stored

Path = str | pathlib.Path
Names = dict[str, tuple[str, Weight, int | None]]  # their name -> (our path, its Weight, layer)

# The types of weights that are read and written, by their names in safetensors.
STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# Old Llama checkpoints store what RoPE computes from config.json; `transformers` passes it over.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def read_json(folder: Path) -> Json:
  """The object of a folder's config.json.

  Raises:
    InputError: there is no such folder or file, or the model needs code of its own.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise InputError(f"{folder} is not a folder: give the path of a downloaded model, or run "
                     f"hf download OWNER/NAME --local-dir {folder}.")
  if not (folder / "config.json").exists():
    raise InputError(f"{folder} has no config.json: give the folder of a Hugging Face model.")
  config = json_objects.read(folder / "config.json")
  # The folder's own Python would define the model, so config.json alone does not describe it.
  if "auto_map" in config:
    raise InputError(f"{folder}/config.json has auto_map, code of its own, which is never run: "
                     "use a model that transformers knows by itself.")
  return config


def read_config(folder: Path, **run: Any) -> Config:
  """The Config of a folder's config.json; `run` as `models.read_config` takes it.

  Raises:
    InputError: as `read_json` and `models.read_config`; names the folder.
  """
  json = read_json(folder)
  try:
    return models.read_config(json, **run)
  except InputError as error:
    # The families name the file alone, because a dict of its keys has no folder.
    if str(error).startswith("config.json"):
      raise InputError(f"{folder}/{error}") from error
    raise


def checked(folder: pathlib.Path, config: Config, shapes: dict[str, jax.ShapeDtypeStruct],
            equal: Callable[[Stored, Stored], bool] = shards.equal) -> dict[str, Stored]:
  """The headers of a folder whose weights are those that config.json asks for."""
  stored = _aliased(folder, shards.headers(folder), config)
  head = stored.get(_HEAD)
  embedding = stored.get(_EMBEDDING)
  if config.tied and head and embedding:  # some tied checkpoints store the head too
    if not equal(head, embedding):
      raise InputError(f"{_HEAD} differs from {_EMBEDDING} although config.json ties them: "
                       "set tie_word_embeddings to false.")
    # Otherwise the copy would be refused as a weight that the model does not have.
    del stored[_HEAD]
  _check(folder, stored, config, shapes)
  return stored


def described(folder: Path, config: Config) -> dict[str, Stored]:
  """The checked headers of a folder's weights, by name; no weight is read.

  Raises:
    InputError: as `hf.load`, for a model of this config.
  """
  # To compare a tied head with the embedding would read both, so they count as equal here.
  return checked(pathlib.Path(folder), config, layout.flat(models.shapes(config)),
                 equal=lambda a, b: True)


def _aliased(folder: pathlib.Path, stored: dict[str, Stored], config: Config) -> dict[str, Stored]:
  """The stored tensors by the names that the table of weights has.

  As in `transformers`, a checkpoint of the model without its head lacks the prefix "model.", a tied
  model may have stored its head alone, and what RoPE computes is passed over.
  """
  expected = names(config)
  found = {}
  for name, tensor in stored.items():
    if name.endswith(_COMPUTED):
      continue
    full = f"model.{name}"
    ours = full if name not in expected and full in expected else name
    if ours in found:
      raise InputError(f"{folder} has the weight {ours} twice, as {found[ours].name} and as "
                       f"{tensor.name}: download the model again.")
    found[ours] = tensor
  if config.tied and _HEAD in found and _EMBEDDING not in found:
    found[_EMBEDDING] = found.pop(_HEAD)
  return found


def names(config: Config) -> Names:
  """{their name: (path, weight, layer or None)} of every weight of the model."""
  names = {}
  for path, weight in models.weights(config).items():
    for layer in range(config.layers) if weight.stacked else (None,):
      names[weight.name.format(layer)] = path, weight, layer
  return names


def _check(folder: pathlib.Path, stored: dict[str, Stored], config: Config,
           shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
  """Checks that every weight is there, in a shape and a type that fit, and that no other is."""
  # Names come first: with a wrong config.json they say more than a shape.
  expected = names(config)
  missing = sorted(expected.keys() - stored.keys())
  extra = sorted(stored.keys() - expected.keys())
  if missing:
    raise InputError(f"{folder} lacks the weight {missing[0]} ({len(missing)} in all): "
                     "config.json and weights must come from one model.")
  if extra:
    raise InputError(f"{folder} has the weight {extra[0]} ({len(extra)} in all) that a "
                     f"{config.architecture} of its config.json does not: they must match.")
  for name, (path, weight, _) in expected.items():
    found = stored[name]
    want = weight.their_shape(layer_shape(shapes[path].shape, weight))
    if found.shape != want:
      raise InputError(f"{found.file}: {name} has shape {found.shape} and config.json asks for "
                       f"{want}: they must come from one model.")
    if found.dtype not in STORED:
      raise InputError(f"{found.file}: {name} is stored as {found.dtype}: convert the model to "
                       f"one of {', '.join(sorted(STORED))}.")


def layer_shape(shape: tuple[int, ...], weight: Weight) -> tuple[int, ...]:
  """Our shape of one layer of a weight."""
  return tuple(shape[weight.stacked:])
