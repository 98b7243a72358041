"""Reads and writes Hugging Face folders: config.json and safetensors.

Nothing is unpickled, and no code of a folder is run.
"""

import functools
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from s2d_jax import json_objects, models, sharding
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Json
from s2d_jax.models import Config, Model, Weight, layout, shards
from s2d_jax.models.shards import Stored
from s2d_jax.sharding import Params

_Path = str | pathlib.Path
_Shape = tuple[int, ...]
_Names = dict[str, tuple[str, Weight, int | None]]  # their name -> (our path, its Weight, layer)

_SUMS = "SHA256SUMS"  # in the format of the command sha256sum
_STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
           "BF16": np.dtype(ml_dtypes.bfloat16)}
_SHARD_BYTES = 5_000_000_000  # at most, in one safetensors file of several
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# Files of a source folder that a model saved from it inherits.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def load(folder: _Path, mesh: jax.sharding.Mesh | None = None,
         dtype: jax.typing.DTypeLike | None = None, run: Mapping[str, Any] | None = None,
         shapes: Callable[[Config], Params] = models.shapes) -> tuple[Model, Params]:
  """(Model, params) of a Hugging Face folder.

  The weights go to the devices one layer of one weight at a time, so the host holds no more than
  that. With a mesh each process reads only the bytes that its own devices hold.

  Args:
    folder: its path.
    mesh: where the weights are laid out; None: whole on the default device.
    dtype: of every loaded weight, whatever the files store; None: the one that `shapes` gives it.
    run: the fields of the Config that say how the model runs, such as
      {"dtype": "bfloat16", "remat": "block"}; by default float32 activations and no remat.
    shapes: gives the parameters' shapes and dtypes; `models.shapes` is float32, and
      `models.frozen_shapes` is what a model that is not trained needs.

  Raises:
    InputError: the folder, its weights or its config are missing; the weights are pickled; the
      folder needs code of its own (`auto_map`); the model is not implemented; a weight is missing,
      left over, stored twice or of a wrong shape; a shard is outside the folder or cut short.
  """
  folder = pathlib.Path(folder)
  model = models.build(models.read_config(read_json(folder), **(run or {})))
  shape_of = layout.flat(shapes(model.config))
  # All headers are checked before the first weight is read, so a wrong folder fails at once.
  stored = _checked(folder, model.config, shape_of)
  params = {}
  for path, weight in models.weights(model.config).items():
    shape = shape_of[path]
    params[path] = _placed(stored, weight, shape.shape, jnp.dtype(dtype or shape.dtype), mesh)
  return model, layout.nest(params)


def check(folder: _Path) -> None:
  """Checks config.json and the headers of the weights, and reads no weight.

  Raises:
    InputError: as `load`.
  """
  folder = pathlib.Path(folder)
  config = models.read_config(read_json(folder))
  # To compare a tied head with the embedding would read both, so they count as equal here.
  _checked(folder, config, layout.flat(models.shapes(config)), equal=lambda a, b: True)


def save(folder: _Path, model: Model, params: Params, source: _Path | None = None,
         lineage: dict[str, Any] | None = None, dtype: str | None = None,
         shard_bytes: int = _SHARD_BYTES) -> pathlib.Path:
  """Writes a folder that `transformers` and `load` read, and returns its path.

  The folder appears only when it is complete. On several hosts all of them call this function and
  the first one writes. Weights are fetched one layer at a time and written file by file.

  Args:
    folder: replaced where a model was saved before.
    model: without adapters.
    params: the model's tree, on devices or in NumPy.
    source: the folder the model descends from; gives its config.json, tokenizer, chat template,
      generation settings, licence and notices.
    lineage: the object of lineage.json.
    dtype: of what is written. None: that of `params`; "source": that of each tensor in `source`.
    shard_bytes: the most that one file holds, where there are several.

  Raises:
    InputError: `params` do not fit the model; it has adapters; `source` is another model; `folder`
      holds something other than a saved model.
  """
  folder = pathlib.Path(folder)
  _check_target(folder, model)
  params = _fitting(model.config, params)
  names = _names(model.config)
  if source is None:
    config = models.config_json(model.config)
  else:
    config = _descend(pathlib.Path(source), model.config)
  types = _types(params, names, source, dtype)
  # The folder's dtype is the one of most tensors; torch_dtype is its former name.
  config.pop("torch_dtype", None)
  config["dtype"] = str(max(set(types.values()), key=list(types.values()).count))

  leader = jax.process_index() == 0
  # In the same file system as the folder, so that the new one appears by a rename.
  partial = folder.with_name(f".{folder.name}.partial")
  if leader:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
  shapes = layout.flat(models.shapes(model.config))
  sizes = {name: math.prod(_layer_shape(shapes[path].shape, weight)) * types[name].itemsize
           for name, (path, weight, _) in names.items()}
  files = _files(sizes, shard_bytes)
  for file, inside in files.items():
    tensors = {}
    for name in inside:
      path, weight, layer = names[name]
      # Every process takes part in the fetch, whether or not it writes.
      array = sharding.fetch_slice(params[path], layer, weight.to_theirs)
      tensors[name] = np.ascontiguousarray(array.astype(types[name]))
    if leader:
      safetensors.numpy.save_file(tensors, partial / file, {"format": "pt"})
  if leader:
    _write_other_files(partial, config, files, sizes, source, lineage)
    _replace(folder, partial)
  return folder


def _check_target(folder: pathlib.Path, model: Model) -> None:
  """Raises InputError, as `save`, where the model or the folder cannot be written."""
  if model.config.lora is not None:
    raise InputError("a model with adapters has no Hugging Face folder: save models.merge(config, "
                     "params) with the model without them.")
  # A saved model is replaced; any other folder may hold what its owner still needs.
  if folder.exists() and any(folder.iterdir()) and not any(
      (folder / name).exists() for name in (shards.WEIGHTS, shards.INDEX)):
    raise InputError(f"{folder} exists and holds no {shards.WEIGHTS}: save to a new folder.")


def _write_other_files(folder: pathlib.Path, config: Json, files: dict[str, list[str]],
                       sizes: dict[str, int], source: _Path | None,
                       lineage: dict[str, Any] | None) -> None:
  """Writes all files of a saved folder except those of the tensors."""
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  # A single file needs no index, because readers look for its fixed name.
  if len(files) > 1:
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / shards.INDEX).write_text(json.dumps(
        {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        indent=2, sort_keys=True) + "\n")
  lines = []
  for file in files:
    with open(folder / file, "rb") as f:
      lines.append(f"{hashlib.file_digest(f, 'sha256').hexdigest()}  {file}\n")
  (folder / _SUMS).write_text("".join(lines))
  for pattern in _COPIED if source is not None else ():
    for path in pathlib.Path(source).glob(pattern):
      shutil.copyfile(path, folder / path.name)
  if lineage is not None:
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=2, sort_keys=True) + "\n")


def _files(sizes: dict[str, int], max_bytes: int) -> dict[str, list[str]]:
  """{file: names}: tensors in order, in files of at most `max_bytes`, or of one larger tensor."""
  groups = [[]]
  group_bytes = 0
  for name, size in sizes.items():
    if groups[-1] and group_bytes + size > max_bytes:
      groups.append([])
      group_bytes = 0
    groups[-1].append(name)
    group_bytes += size
  if len(groups) == 1:
    return {shards.WEIGHTS: groups[0]}
  # Numbered from 1 with five digits, as `transformers` names shards.
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
          for i, names in enumerate(groups, 1)}


def _replace(folder: pathlib.Path, new: pathlib.Path) -> None:
  """Renames `new` to `folder`, and removes the folder that was there."""
  # Aside first, so that a process killed here leaves two complete models and not half of one.
  old = folder.with_name(f".{folder.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  if folder.exists():
    folder.rename(old)
  new.rename(folder)
  shutil.rmtree(old, ignore_errors=True)


def identity(folder: _Path) -> str:
  """A hash that identifies the weights of a folder without reading them.

  It covers config.json, the index and the checksums that `save` wrote. Of each safetensors file it
  covers name, size, header and the checksum that a Hugging Face download recorded.

  Raises:
    InputError: the folder or its weights are missing, or a header is too long to be one.
  """
  folder = pathlib.Path(folder)
  read_json(folder)
  files = shards.files(folder)
  digest = hashlib.sha256((folder / "config.json").read_bytes())
  for name in (shards.INDEX, _SUMS):
    if (folder / name).exists():
      digest.update((folder / name).read_bytes())
  # Weights are too large to be hashed at every start. A header has names, shapes and offsets;
  # values that changed under an equal header are seen by the checksums only.
  for file in files:
    with open(file, "rb") as f:
      length = int.from_bytes(f.read(8), "little")
      if length > shards.HEADER_BYTES:
        raise InputError(f"{file} declares a header of {length} bytes: download it again.")
      header = f.read(length)
    for item in (file.name, str(file.stat().st_size), header, _download_checksum(file)):
      digest.update(item if isinstance(item, bytes) else item.encode())
      digest.update(b"\0")
  return digest.hexdigest()


def read_json(folder: _Path) -> Json:
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


def _checked(folder: pathlib.Path, config: Config, shapes: dict[str, jax.ShapeDtypeStruct],
             equal: Callable[[Stored, Stored], bool] = shards.equal) -> dict[str, Stored]:
  """The headers of a folder whose weights are those that config.json asks for."""
  stored = shards.headers(folder)
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


def _names(config: Config) -> _Names:
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
  names = _names(config)
  missing = sorted(names.keys() - stored.keys())
  extra = sorted(stored.keys() - names.keys())
  if missing:
    raise InputError(f"{folder} lacks the weight {missing[0]} ({len(missing)} in all): "
                     "config.json and weights must come from one model.")
  if extra:
    raise InputError(f"{folder} has the weight {extra[0]} ({len(extra)} in all) that a "
                     f"{config.architecture} of its config.json does not: they must match.")
  for name, (path, weight, _) in names.items():
    found = stored[name]
    want = weight.their_shape(_layer_shape(shapes[path].shape, weight))
    if found.shape != want:
      raise InputError(f"{found.file}: {name} has shape {found.shape} and config.json asks for "
                       f"{want}: they must come from one model.")
    if found.dtype not in _STORED:
      raise InputError(f"{found.file}: {name} is stored as {found.dtype}: convert the model to "
                       f"one of {', '.join(sorted(_STORED))}.")


def _layer_shape(shape: _Shape, weight: Weight) -> _Shape:
  """Our shape of one layer of a weight."""
  return tuple(shape[weight.stacked:])


def _placed(stored: dict[str, Stored], weight: Weight, shape: _Shape, dtype: jnp.dtype,
            mesh: jax.sharding.Mesh | None) -> jax.Array:
  """One of our weights, all its layers, on the devices."""
  layer_shape = _layer_shape(shape, weight)
  axes = weight.axes[weight.stacked:]

  def layer(name: str) -> jax.Array:
    """One layer of the weight, from the tensor called `name`."""
    def part(index: tuple[slice, ...]) -> tuple[np.ndarray, Callable]:
      # An axis that is whole has slice(None), and `their_index` needs numbers.
      index = [slice(*i.indices(size)[:2]) for i, size in zip(index, layer_shape, strict=True)]
      to_ours = _to_ours(weight, tuple(i.stop - i.start for i in index), dtype)
      return shards.read(stored[name], weight.their_index(index, layer_shape)), to_ours
    if mesh is None:
      theirs, to_ours = part((slice(None),) * len(layer_shape))
      return to_ours(jax.device_put(theirs))
    return sharding.from_callback(
        layer_shape, sharding.weight_sharding(mesh, axes, layer_shape), part)

  if not weight.stacked:
    return layer(weight.name)
  where = None if mesh is None else sharding.weight_sharding(mesh, weight.axes, shape)
  # A generator, so that a layer is read only after the one before it is in its place.
  layers = (layer(weight.name.format(index)) for index in range(shape[0]))
  return sharding.stacked(shape, dtype, where, layers)


@functools.cache
def _to_ours(weight: Weight, shape: _Shape, dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
  """Jitted: their part of a weight -> ours."""
  # On the device, because a transpose in NumPy takes nine times as long.
  return jax.jit(lambda theirs: weight.to_ours(theirs, shape).astype(dtype))


def _fitting(config: Config, params: Params) -> dict[str, jax.Array]:
  """The flat parameters, checked against the model's shapes."""
  params = layout.flat(params)
  got = {path: tuple(x.shape) for path, x in params.items()}
  want = {path: tuple(x.shape) for path, x in layout.flat(models.shapes(config)).items()}
  if got != want:
    path = min(path for path, _ in got.items() ^ want.items())
    raise InputError(f"the parameter {path} has shape {got.get(path, 'none')} and the model asks "
                     f"for {want.get(path, 'none')}: save the tree that model.init makes.")
  return params


def _types(params: dict[str, jax.Array], names: _Names, source: _Path | None,
           dtype: str | None) -> dict[str, np.dtype]:
  """{their name: NumPy dtype to write}; `dtype` as `save` takes it."""
  if dtype == "source":
    if source is None:
      raise InputError('dtype="source" asks for the types of a source and none is given: name it.')
    stored = shards.headers(pathlib.Path(source))
    return {name: _STORED[stored[name].dtype] for name in names}
  dtypes = {x.dtype for x in params.values()}
  if dtype is None and len(dtypes) > 1:
    raise InputError(f"parameters of several types, {sorted(map(str, dtypes))}: give save a dtype.")
  return dict.fromkeys(names, jnp.dtype(dtype or dtypes.pop()))


def _descend(source: pathlib.Path, config: Config) -> Json:
  """The config.json of `source`, which must be of the same model."""
  config_json = read_json(source)
  # How a model runs is not in config.json, so it cannot make two models differ.
  run = {key: getattr(config, key) for key in models.RUN}
  if models.read_config(config_json, **run) != config:
    raise InputError(f"{source} is another model than the one to save: give the folder that it "
                     "was loaded from, or leave source out.")
  return config_json


def _download_checksum(file: pathlib.Path) -> str:
  """The checksum that the Hugging Face client recorded for a file; "" where there is none."""
  record = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
  # The client records the revision and then the file's checksum, a line each.
  if record.exists():
    return record.read_text().splitlines()[1]
  # In the client's cache a file is a link to a blob whose name is the checksum.
  target = file.resolve()
  return target.name if target.parent.name == "blobs" else ""
