"""Hugging Face folders in and out: config.json and safetensors, nothing pickled, no code run."""

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from s2d_jax import models, sharding
from s2d_jax.models import layout, shards

SUMS = "SHA256SUMS"  # as the tool of that name writes and checks them
STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5_000_000_000  # of one safetensors file
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def load(folder, mesh=None, dtype=None):
  """(Model, params) of a Hugging Face folder.

  The weights become `dtype`, one for all or a tree of the parameters' structure, float32 by
  default, whatever they are stored in; with a `mesh` each device gets its own part, and each
  process reads no other. They go to the devices one layer of one weight at a time: the host never
  holds more. The Model computes in float32: for another type
  or for remat, `models.build(dataclasses.replace(model.config, dtype="bfloat16", remat="block"))`.

  Raises:
    ValueError: no folder, weights or config; pickled weights; code to run (`auto_map`); a model
      that is not implemented; a weight missing, left over, there twice or misshapen; a shard
      outside the folder or cut short.
  """
  folder = pathlib.Path(folder)
  _recover(folder)
  model = models.build(models.read_config(read_json(folder)))
  shapes = layout.flat(models.shapes(model.config))
  stored = _checked(folder, model.config, shapes)
  types = layout.flat(dtype) if isinstance(dtype, dict) else dict.fromkeys(shapes, dtype)
  return model, layout.nest({
      path: _placed(stored, weight, shapes[path].shape, jnp.dtype(types[path] or "float32"), mesh)
      for path, weight in models.weights(model.config).items()})


def check(folder):
  """The ValueErrors of `load` that config.json and the headers of the weights give."""
  folder = pathlib.Path(folder)
  config = models.read_config(read_json(folder))
  _checked(folder, config, layout.flat(models.shapes(config)), same=lambda a, b: True)


def save(folder, model, params, source=None, lineage=None, dtype=None, shard_bytes=SHARD_BYTES):
  """Writes a folder that `transformers` and `load` read, all of it or nothing; returns its path.

  On several hosts all of them call it, and the first writes: the folder is there once that one is
  done. Weights are fetched one layer at a
  time and written file by file, of at most `shard_bytes` where there are several.

  Args:
    folder: replaced where a model was saved before.
    params: the model's tree, on devices or in NumPy.
    source: the folder the model descends from; gives its config.json, tokenizer, chat template,
      generation settings, licence and notices.
    lineage: a dict that becomes lineage.json.
    dtype: of what is written; None is that of `params`, "source" each tensor's own in `source`.

  Raises:
    ValueError: `params` do not fit the model; it has adapters; `source` is another model; `folder`
      is something else than a saved model.
  """
  folder = pathlib.Path(folder)
  if model.config.lora is not None:
    raise ValueError("a model with adapters has no Hugging Face folder: save models.merge(config, "
                     "params) with the model without them.")
  _recover(folder)
  if folder.exists() and any(folder.iterdir()) and not any(
      (folder / name).exists() for name in (shards.WEIGHTS, shards.INDEX)):
    raise ValueError(f"{folder} exists and holds no {shards.WEIGHTS}: save to a new folder.")
  params, names = _fitting(model.config, params), _names(model.config)
  config = models.config_json(model.config)
  if source is not None:
    config = _descend(pathlib.Path(source), model.config)
  types = _types(params, names, source, dtype)
  config.pop("torch_dtype", None)
  config["dtype"] = str(max(set(types.values()), key=list(types.values()).count))

  leader = jax.process_index() == 0
  partial = folder.with_name(f".{folder.name}.partial")
  if leader:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
  shapes = layout.flat(models.shapes(model.config))
  sizes = {name: math.prod(_our_shape(shapes[path].shape, weight)) * types[name].itemsize
           for name, (path, weight, _) in names.items()}
  files = _shards(sizes, shard_bytes)
  for file, inside in files.items():
    theirs = {}
    for name in inside:
      path, weight, layer = names[name]
      found = sharding.fetch_slice(params[path], layer, weight.to_theirs)
      theirs[name] = np.ascontiguousarray(found.astype(types[name]))
    if leader:
      safetensors.numpy.save_file(theirs, partial / file, {"format": "pt"})
  if leader:
    _write_rest(partial, config, files, sizes, source, lineage)
    _swap(partial, folder)
  return folder


def _write_rest(folder, config, files, sizes, source, lineage):
  """Everything of a saved folder but its tensors."""
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  if len(files) > 1:
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / shards.INDEX).write_text(json.dumps(
        {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        indent=2, sort_keys=True) + "\n")
  lines = []
  for file in files:
    with open(folder / file, "rb") as f:
      lines.append(f"{hashlib.file_digest(f, 'sha256').hexdigest()}  {file}\n")
  (folder / SUMS).write_text("".join(lines))
  for pattern in COPIED if source is not None else ():
    for path in pathlib.Path(source).glob(pattern):
      shutil.copyfile(path, folder / path.name)
  if lineage is not None:
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=2, sort_keys=True) + "\n")


def _shards(sizes, most):
  """{file: names}: tensors in order, in files of at most `most` bytes, or of one tensor."""
  groups, held = [[]], 0
  for name, size in sizes.items():
    if groups[-1] and held + size > most:
      groups.append([])
      held = 0
    groups[-1].append(name)
    held += size
  if len(groups) == 1:
    return {shards.WEIGHTS: groups[0]}
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
          for i, names in enumerate(groups, 1)}


def _swap(new, folder):
  """Puts `new` in the place of `folder`: a kill leaves one or the other there, whole."""
  if folder.exists() and not _exchanged(new, folder):
    old = _old(folder)  # no such call here: after a kill in between, `_recover` puts it back
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)
  elif new.exists() and not folder.exists():
    new.rename(folder)
  shutil.rmtree(new, ignore_errors=True)


def _old(folder):
  return folder.with_name(f".{folder.name}.old")


def _recover(folder):
  """Puts back what a save that was killed between its two renames had moved aside."""
  if not folder.exists():
    with contextlib.suppress(FileNotFoundError):  # nothing aside, or another process was first
      _old(folder).rename(folder)


def _exchanged(a, b):
  """Whether Linux has exchanged two folders in one step (renameat2 with RENAME_EXCHANGE)."""
  call = getattr(ctypes.CDLL(None), "renameat2", None)
  here = -100  # AT_FDCWD: relative to the working folder
  return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), 2) == 0


def identity(folder):
  """A hash that tells these weights from others without reading them.

  Covers config.json, the index, the checksums that `save` left, and of each safetensors file its
  name, size, header and the checksum that a Hugging Face download left.
  """
  folder = pathlib.Path(folder)
  read_json(folder)
  files = shards.files(folder)
  digest = hashlib.sha256((folder / "config.json").read_bytes())
  for name in (shards.INDEX, SUMS):
    if (folder / name).exists():
      digest.update((folder / name).read_bytes())
  for file in files:
    with open(file, "rb") as f:
      length = int.from_bytes(f.read(8), "little")
      if length > shards.HEADER_BYTES:
        raise ValueError(f"{file} declares a header of {length} bytes: download it again.")
      header = f.read(length)
    for item in (file.name, str(file.stat().st_size), header, _download_checksum(file)):
      digest.update(item if isinstance(item, bytes) else item.encode())
      digest.update(b"\0")
  return digest.hexdigest()


def read_json(folder):
  """config.json of a folder as a dict; a model that brings its own code is refused."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder: give the path of a model downloaded before.")
  if not (folder / "config.json").exists():
    raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face model.")
  config = shards.json_object(folder / "config.json")
  if "auto_map" in config:
    raise ValueError(f"{folder}/config.json has auto_map, code of its own, which is never run: "
                     "use a model that transformers knows by itself.")
  return config


def _checked(folder, config, shapes, same=shards.same):
  """The headers of a folder whose weights are those that config.json asks for."""
  stored = shards.headers(folder)
  head, embedding = (stored.get(name) for name in (HEAD, EMBEDDING))
  if config.tied and head and embedding:  # some tied checkpoints store the head besides
    if not same(head, embedding):
      raise ValueError(f"{HEAD} differs from {EMBEDDING} although config.json ties them: "
                       "set tie_word_embeddings to false.")
    del stored[HEAD]
  _check(folder, stored, config, shapes)
  return stored


def _names(config):
  """{their name: (path, weight, layer or None)} of every weight the model has."""
  names = {}
  for path, weight in models.weights(config).items():
    for layer in range(config.layers) if weight.stacked else (None,):
      names[weight.name.format(layer)] = path, weight, layer
  return names


def _check(folder, stored, config, shapes):
  """Every weight is there, of the right shape and a type we read, and nothing is left over."""
  names = _names(config)
  missing, extra = sorted(names.keys() - stored.keys()), sorted(stored.keys() - names.keys())
  if missing:
    raise ValueError(f"{folder} lacks the weight {missing[0]} ({len(missing)} in all): "
                     "config.json and weights must come from one model.")
  if extra:
    raise ValueError(f"{folder} has the weight {extra[0]} ({len(extra)} in all) that a "
                     f"{config.architecture} of its config.json does not: they must match.")
  for name, (path, weight, _) in names.items():
    found, want = stored[name], weight.their_shape(_our_shape(shapes[path].shape, weight))
    if found.shape != want:
      raise ValueError(f"{found.file}: {name} has shape {found.shape} and config.json asks for "
                       f"{want}: they must come from one model.")
    if found.dtype not in STORED:
      raise ValueError(f"{found.file}: {name} is stored as {found.dtype}: convert the model to "
                       f"one of {', '.join(sorted(STORED))}.")


def _our_shape(shape, weight):
  """The shape of one layer of a weight."""
  return tuple(shape[weight.stacked:])


def _placed(stored, weight, shape, dtype, mesh):
  """One of our weights on the devices."""
  one, axes = _our_shape(shape, weight), weight.axes[weight.stacked:]
  def layer(name):
    def part(index):
      index = [slice(*i.indices(size)[:2]) for i, size in zip(index, one, strict=True)]
      turn = _turned(weight, tuple(i.stop - i.start for i in index), dtype)
      return shards.read(stored[name], weight.their_index(index, one)), turn
    if mesh is None:
      theirs, turn = part((slice(None),) * len(one))
      return turn(jax.device_put(theirs))
    return sharding.from_callback(one, sharding.weight_sharding(mesh, axes, one), part)
  if not weight.stacked:
    return layer(weight.name)
  where = None if mesh is None else sharding.weight_sharding(mesh, weight.axes, shape)
  return sharding.stacked(shape, dtype, where,
                          (layer(weight.name.format(at)) for at in range(shape[0])))


@functools.cache
def _turned(weight, shape, dtype):
  """Jitted: their part of a weight -> ours. On the device: NumPy transposes nine times slower."""
  return jax.jit(lambda theirs: weight.to_ours(theirs, shape).astype(dtype))


def _fitting(config, params):
  """The flat parameters, of the model's own shapes."""
  params, shapes = layout.flat(params), layout.flat(models.shapes(config))
  got, want = ({path: tuple(x.shape) for path, x in tree.items()} for tree in (params, shapes))
  if got != want:
    path = min(path for path, _ in got.items() ^ want.items())
    raise ValueError(f"the parameter {path} has shape {got.get(path, 'none')} and the model asks "
                     f"for {want.get(path, 'none')}: save the tree that model.init makes.")
  return params


def _types(params, names, source, dtype):
  """{their name: NumPy type to write}; `dtype` as `save` takes it."""
  if dtype == "source":
    if source is None:
      raise ValueError('dtype="source" asks for the types of a source and none is given: name it.')
    stored = shards.headers(pathlib.Path(source))
    return {name: STORED[stored[name].dtype] for name in names}
  dtypes = {x.dtype for x in params.values()}
  if dtype is None and len(dtypes) > 1:
    raise ValueError(f"parameters of several types, {sorted(map(str, dtypes))}: give save a dtype.")
  return dict.fromkeys(names, jnp.dtype(dtype or dtypes.pop()))


def _descend(source, config):
  """config.json of `source`, which must be of the same model."""
  config_json = read_json(source)
  run = {key: getattr(config, key) for key in models.RUN}
  if models.read_config(config_json, **run) != config:
    raise ValueError(f"{source} is another model than the one to save: give the folder that it "
                     "was loaded from, or none.")
  return config_json


def _download_checksum(file):
  """What the Hugging Face client recorded of a file's content, or nothing."""
  record = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
  if record.exists():
    return record.read_text().splitlines()[1]
  target = file.resolve()
  return target.name if target.parent.name == "blobs" else ""
