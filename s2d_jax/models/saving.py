"""Writes Hugging Face folders that `transformers` and `hf.load` read, whole or not at all."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from s2d_jax import json_objects, models, sharding, writable
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Json
from s2d_jax.models import Config, Model, Weight, digests, folders, layout, shards
from s2d_jax.models.folders import Names, Path
from s2d_jax.sharding import Params

_SHARD_BYTES = 5_000_000_000  # at most, in one safetensors file of several
# Files and folders of a source folder that a model saved from it inherits.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def save(folder: Path, model: Model, params: Params, source: Path | None = None,
         lineage: dict[str, Any] | None = None, dtype: str | None = None,
         shard_bytes: int = _SHARD_BYTES) -> pathlib.Path:
  """Writes a folder that `transformers` and `hf.load` read, and returns its path.

  The folder appears only when it is complete. On several hosts all of them call this function and
  the first one writes. Weights are fetched one layer at a time and written file by file.

  Args:
    folder: replaced where a model was saved before; a symbolic link stays, and its target is
      replaced.
    model: without adapters.
    params: the model's tree, on devices or in NumPy.
    source: the folder the model descends from; gives its config.json, tokenizer, chat templates,
      generation settings, licence and notices.
    lineage: the object of lineage.json.
    dtype: of what is written. None: that of `params`; "source": that of each tensor in `source`.
    shard_bytes: the most that one file holds, where there are several.

  Raises:
    InputError: `hf.load` would refuse the model's config; `params` do not fit the model, or have a
      number that is not finite in the type that is written; the type is not one that `hf.load`
      reads; the model has adapters; `source` is another model, or has a link to nothing;
      `check_target` refuses the folder; `lineage` is not JSON.
  """
  leader = jax.process_index() == 0
  target = _target(folder)
  # The other hosts write nothing, and may have no such place.
  if leader:
    check_target(folder)
  inherited = _inherited(source)
  lineage_text = _lineage_text(lineage)
  params = _fitting(model.config, params)
  names = folders.names(model.config)
  config = _config_json(model.config, source)
  types = _types(model.config, params, names, source, dtype)
  # The folder's dtype is the one of most tensors; torch_dtype is its former name.
  config.pop("torch_dtype", None)
  config["dtype"] = str(max(set(types.values()), key=list(types.values()).count))

  files, total_bytes = _files(model.config, types, shard_bytes)
  partial = _partial(target)
  with _new_folder(partial) if leader else contextlib.nullcontext():
    for file, inside in files.items():
      # Every process takes part in the fetch, whether or not it writes.
      tensors = {name: _fetched(name, params, names[name], types[name]) for name in inside}
      if leader:
        try:
          safetensors.numpy.save_file(tensors, partial / file, {"format": "pt"})
        # The library has an error of its own for a full disk.
        except safetensors.SafetensorError as error:
          raise OSError(f"{partial / file} cannot be written ({error})") from error
    if leader:
      _write_other_files(partial, config, files, total_bytes, inherited, lineage_text)
  # Outside: once the target was moved aside, `partial` may be the only copy in its place.
  if leader:
    _replace(target, partial)
  return pathlib.Path(folder)


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[None]:
  """Makes an empty folder, and removes it where an error ends the block."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  try:
    yield
  # A full disk or an interrupt too would leave many gigabytes behind.
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _fetched(name: str, params: dict[str, jax.Array], entry: tuple[str, Weight, int | None],
             dtype: np.dtype) -> np.ndarray:
  """A tensor in the type that is written; raises InputError where a number is not finite in it."""
  path, weight, layer = entry
  array = sharding.fetch_slice(params[path], layer, weight.to_theirs)
  # NumPy warns of an overflow, which the sentence below names.
  with np.errstate(over="ignore"):
    converted = np.ascontiguousarray(array.astype(dtype))
  if np.isfinite(converted).all():
    return converted
  if np.isfinite(array).all():
    raise InputError(f"the weight {name} has numbers beyond {dtype}: save it as bfloat16 or "
                     "float32.")
  raise InputError(f"the weight {name} has NaN or infinite numbers, which no model can be sampled "
                   "with: save the weights of an earlier step.")


def _lineage_text(lineage: dict[str, Any] | None) -> str:
  """The text of lineage.json, "" for None; raises InputError where it could not be read back."""
  if lineage is None:
    return ""
  try:
    text = json.dumps(lineage, indent=2, sort_keys=True, allow_nan=False) + "\n"
    json_objects.parse("lineage", text)
  except (TypeError, ValueError, RecursionError) as error:
    raise InputError(f"lineage is not a JSON object ({error}): give a dict of texts and finite "
                     "numbers.") from error
  return text


def check_target(folder: Path) -> None:
  """Checks that `save` can write a folder, before a model is loaded for it; leaves nothing behind.

  Raises:
    InputError: the folder cannot be made, is a file, or holds something other than a saved model.
  """
  if "://" in str(folder):
    raise InputError(f"{folder} is an address, and models are saved on this machine: choose a path "
                     "of it.")
  target = _target(folder)
  try:
    # Looking finds a file among the parents, links in a circle, and a name that is too long.
    for path in (target, _partial(target)):
      with contextlib.suppress(FileNotFoundError):
        path.stat()
    exists = target.exists()
    if exists and not target.is_dir():
      raise InputError(f"{target} is a file: save to a new folder.")
    # A saved model is replaced; any other folder may hold what its owner still needs.
    if exists and any(target.iterdir()) and not any(
        (target / name).exists() for name in (shards.WEIGHTS, shards.INDEX)):
      raise InputError(f"{target} exists and holds no {shards.WEIGHTS}: save to a new folder.")
    writable.check_folder(target.parent)
  except OSError as error:
    raise InputError(f"{folder} cannot be written ({error.strerror}): choose another folder."
                     ) from error


def _target(folder: Path) -> pathlib.Path:
  """The folder that is written: of a link its target, which a rename would leave unchanged."""
  return pathlib.Path(os.path.realpath(folder))


def _partial(target: pathlib.Path) -> pathlib.Path:
  """Where a folder is written: in the same file system, so that it appears by a rename."""
  return target.parent / f".{target.name}.partial"


def _inherited(source: Path | None) -> list[pathlib.Path]:
  """The files and folders that a saved model inherits; raises InputError for a link to nothing."""
  found = [path for pattern in _COPIED if source is not None
           for path in pathlib.Path(source).glob(pattern)]
  for path in found:
    if not path.exists():
      raise InputError(f"{path} is a link to a file that is absent: download the file, or remove "
                       "the link.")
  return found


def _write_other_files(folder: pathlib.Path, config: Json, files: dict[str, list[str]],
                       total_bytes: int, inherited: list[pathlib.Path],
                       lineage_text: str) -> None:
  """Writes all files of a saved folder except those of the tensors."""
  (folder / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
  # A single file needs no index, because readers look for its fixed name.
  if len(files) > 1:
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / shards.INDEX).write_text(json.dumps(
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
        indent=2, sort_keys=True) + "\n")
  lines = []
  for file in files:
    with open(folder / file, "rb") as f:
      lines.append(f"{hashlib.file_digest(f, 'sha256').hexdigest()}  {file}\n")
  (folder / digests.SUMS).write_text("".join(lines))
  for path in inherited:
    if path.is_dir():
      shutil.copytree(path, folder / path.name)
    else:
      shutil.copyfile(path, folder / path.name)
  if lineage_text:
    (folder / "lineage.json").write_text(lineage_text)


def _files(config: Config, types: dict[str, np.dtype],
           max_bytes: int) -> tuple[dict[str, list[str]], int]:
  """({file: names}, bytes of all): tensors in order, in files of at most `max_bytes`.

  A file of one tensor may be larger.
  """
  shapes = layout.flat(models.shapes(config))
  sizes = {name: math.prod(folders.layer_shape(shapes[path].shape, weight)) * types[name].itemsize
           for name, (path, weight, _) in folders.names(config).items()}
  groups = [[]]
  group_bytes = 0
  for name, size in sizes.items():
    if groups[-1] and group_bytes + size > max_bytes:
      groups.append([])
      group_bytes = 0
    groups[-1].append(name)
    group_bytes += size
  if len(groups) == 1:
    return {shards.WEIGHTS: groups[0]}, sum(sizes.values())
  # Numbered from 1 with five digits, as `transformers` names shards.
  files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
           for i, names in enumerate(groups, 1)}
  return files, sum(sizes.values())


def _replace(folder: pathlib.Path, new: pathlib.Path) -> None:
  """Renames `new` to `folder`, and removes the folder that was there."""
  # Aside first, so that a process killed here leaves two complete models and not half of one.
  old = folder.with_name(f".{folder.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  if folder.exists():
    folder.rename(old)
  new.rename(folder)
  shutil.rmtree(old, ignore_errors=True)


def _fitting(config: Config, params: Params) -> dict[str, jax.Array]:
  """The flat parameters, checked against the model's shapes; a model with adapters is refused."""
  if config.lora is not None:
    raise InputError("a model with adapters has no Hugging Face folder: save models.merge(config, "
                     "params) with the model without them.")
  params = layout.flat(params)
  got = {path: tuple(x.shape) for path, x in params.items()}
  want = {path: tuple(x.shape) for path, x in layout.flat(models.shapes(config)).items()}
  if got != want:
    path = min(path for path, _ in got.items() ^ want.items())
    raise InputError(f"the parameter {path} has shape {got.get(path, 'none')} and the model asks "
                     f"for {want.get(path, 'none')}: save the tree that model.init makes.")
  return params


def _types(config: Config, params: dict[str, jax.Array], names: Names, source: Path | None,
           dtype: str | None) -> dict[str, np.dtype]:
  """{their name: NumPy dtype to write}; `dtype` as `save` takes it."""
  dtypes = {jnp.dtype(x.dtype) for x in params.values()}
  if not all(jnp.issubdtype(one, jnp.floating) for one in dtypes):
    raise InputError(f"parameters of type {', '.join(sorted(map(str, dtypes)))}: save floating-"
                     "point ones.")
  if dtype == "source":
    if source is None:
      raise InputError('dtype="source" asks for the types of a source and none is given: name it.')
    stored = folders.described(source, config)
    return {name: folders.STORED[stored[name].dtype] for name in names}
  if dtype is None and len(dtypes) > 1:
    raise InputError(f"parameters of several types, {sorted(map(str, dtypes))}: give save a dtype.")
  readable = {str(one): one for one in folders.STORED.values()}
  try:
    written = str(jnp.dtype(dtype or dtypes.pop()))
  except TypeError:  # not the name of a type
    written = str(dtype)
  if written not in readable:
    raise InputError(f"a model is not saved as {written}, which hf.load does not read: give save a "
                     f"dtype of {', '.join(readable)}.")
  return dict.fromkeys(names, readable[written])


def _config_json(config: Config, source: Path | None) -> Json:
  """The config.json of a Config, or that of `source`, which must be of the same model."""
  # How a model runs is not in config.json, so it cannot make two models differ.
  run = {key: getattr(config, key) for key in models.RUN}
  if source is None:
    return _read_back(config, run)
  if folders.read_config(source, **run) != config:
    raise InputError(f"{source} is another model than the one to save: give the folder that it "
                     "was loaded from, or leave source out.")
  return folders.read_json(source)


def _read_back(config: Config, run: dict[str, Any]) -> Json:
  """The config.json of a Config; raises InputError unless `hf.load` reads that Config from it."""
  remedy = "correct the model's config, because hf.load would refuse the folder"
  try:
    json_of = models.config_json(config)
    found = models.read_config(json_of, **run)  # its errors name the key
    json.dumps(json_of, allow_nan=False)
  except (TypeError, ValueError) as error:
    reason = str(error).rstrip(".")
    raise InputError(f"the model cannot be saved ({reason}): {remedy}.") from error
  if found != config:
    raise InputError(f"the model cannot be saved, whose config.json would be of another ({found}): "
                     f"{remedy}.")
  return json_of
