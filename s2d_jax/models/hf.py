"""Hugging Face folders in and out: config.json and safetensors, nothing pickled, no code run."""

import contextlib
import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from s2d_jax import models, sharding
from s2d_jax.models import layout

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SUMS = "SHA256SUMS"  # as the tool of that name writes and checks them
STORED = {"F32", "F16", "BF16"}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HEADER_BYTES = 100_000_000  # the cap of the safetensors library itself
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json")


def load(folder, mesh=None, dtype=None):
  """(Model, params) of a Hugging Face folder.

  The weights become `dtype`, float32 by default, whatever they are stored in; with a `mesh` each
  device reads its own part. The Model computes in float32: for another type or for remat,
  `models.build(dataclasses.replace(model.config, dtype="bfloat16", remat="block"))`.

  Raises:
    ValueError: no folder, weights or config; pickled weights; code to run (`auto_map`); a model
      that is not implemented; a weight missing, left over or misshapen; a shard outside.
  """
  folder = pathlib.Path(folder)
  model = models.build(models.read_config(read_json(folder)))
  shapes, params = layout.flat(models.shapes(model.config)), {}
  with contextlib.ExitStack() as stack:
    stored = _checked(folder, model.config, shapes, stack)
    for path, weight in models.weights(model.config).items():
      shape = shapes[path].shape
      def part(index, shape=shape, weight=weight):
        return _part(stored, weight, shape, index, jnp.dtype(dtype or "float32"))
      if mesh is None:
        params[path] = jax.device_put(part((slice(None),) * len(shape)))
      else:
        where = sharding.weight_sharding(mesh, weight.axes, shape)
        params[path] = sharding.from_callback(shape, where, part)
  return model, layout.nest(params)


def check(folder):
  """The ValueErrors of `load`, from config.json and the headers of the weights."""
  folder = pathlib.Path(folder)
  config = models.read_config(read_json(folder))
  with contextlib.ExitStack() as stack:
    _checked(folder, config, layout.flat(models.shapes(config)), stack)


def save(folder, model, params, source=None, lineage=None):
  """Writes a folder that `transformers` and `load` read, all of it or nothing; returns its path.

  `params` are stored in the type they have and are replicated or on one host. `source`, the
  folder the model descends from, gives its config.json, tokenizer, chat template and generation
  settings; `lineage`, a dict, becomes lineage.json. Replaces a model saved there before.

  Raises:
    ValueError: `params` do not fit the model; `source` is another model; `folder` is something
      else than a saved model.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and any(folder.iterdir()) and not (folder / WEIGHTS).exists():
    raise ValueError(f"{folder} exists and holds no {WEIGHTS}: save to a new folder.")
  theirs, dtype = _theirs(model.config, params)
  config = models.config_json(model.config)
  if source is not None:
    config = _descend(pathlib.Path(source), model.config)
  config.pop("torch_dtype", None)
  config["dtype"] = str(dtype)

  partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  safetensors.numpy.save_file(theirs, partial / WEIGHTS, {"format": "pt"})
  with open(partial / WEIGHTS, "rb") as f:
    (partial / SUMS).write_text(f"{hashlib.file_digest(f, 'sha256').hexdigest()}  {WEIGHTS}\n")
  for name in COPIED if source is not None else ():
    if (pathlib.Path(source) / name).exists():
      shutil.copyfile(pathlib.Path(source) / name, partial / name)
  if lineage is not None:
    (partial / "lineage.json").write_text(json.dumps(lineage, indent=2, sort_keys=True) + "\n")
  shutil.rmtree(old, ignore_errors=True)
  if folder.exists():
    folder.rename(old)
  partial.rename(folder)
  shutil.rmtree(old, ignore_errors=True)
  return folder


def identity(folder):
  """A hash that tells these weights from others without reading them.

  Covers config.json, the index, the checksums that `save` left, and of each safetensors file its
  name, size, header and the checksum that a Hugging Face download left.
  """
  folder = pathlib.Path(folder)
  read_json(folder)
  files = _files(folder)
  digest = hashlib.sha256((folder / "config.json").read_bytes())
  for name in (INDEX, SUMS):
    if (folder / name).exists():
      digest.update((folder / name).read_bytes())
  for file in files:
    with open(file, "rb") as f:
      length = int.from_bytes(f.read(8), "little")
      if length > HEADER_BYTES:
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
  config = _json(folder / "config.json")
  if "auto_map" in config:
    raise ValueError(f"{folder}/config.json has auto_map, code of its own, which is never run: "
                     "use a model that transformers knows by itself.")
  return config


def _json(path):
  """The object in a JSON file of a model's folder."""
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}): download it again.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} is not a JSON object: download it again.")
  return found


def _files(folder):
  """The safetensors files of a folder, by its index where it has one."""
  if (folder / INDEX).exists():
    names = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
  elif (folder / WEIGHTS).exists():
    names = [WEIGHTS]
  elif any(next(folder.glob(pattern), None) for pattern in PICKLES):
    raise ValueError(f"{folder} has pickled weights only, and unpickling runs code: "
                     "convert them to safetensors.")
  else:
    raise ValueError(f"{folder} has no weights: it needs {WEIGHTS} or {INDEX} and its shards.")
  for name in names:
    if pathlib.PurePath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
      raise ValueError(f"{folder / INDEX} names the shard {name!r}, which is no safetensors file "
                       "of this folder: download the model again.")
    if not (folder / name).exists():
      raise ValueError(f"{folder} lacks the shard {name}: finish its download.")
  return [folder / name for name in names]


def _open(folder, stack):
  """{weight: the open file that holds it}; files are closed with `stack`."""
  stored = {}
  for path in _files(folder):
    try:
      file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except safetensors.SafetensorError as error:
      raise ValueError(f"{path} is not whole ({error}): download it again.") from error
    stored |= dict.fromkeys(file.keys(), file)
  return stored


def _checked(folder, config, shapes, stack):
  """`_open`, of a folder whose weights are those that config.json asks for."""
  stored = _open(folder, stack)
  _drop_copy_of_embedding(stored, config)
  _check(folder, stored, config, shapes)
  return stored


def _names(config):
  """{their name: (path, weight, layer or None)} of every weight the model has."""
  names = {}
  for path, weight in models.weights(config).items():
    for layer in range(config.layers) if weight.stacked else (None,):
      names[weight.name.format(layer)] = path, weight, layer
  return names


def _drop_copy_of_embedding(stored, config):
  """Forgets the head that some tied checkpoints store besides the embedding, if it is equal."""
  head, embedding = "lm_head.weight", "model.embed_tokens.weight"
  if config.tied and head in stored and embedding in stored:
    if not np.array_equal(stored[head].get_tensor(head), stored[embedding].get_tensor(embedding)):
      raise ValueError(f"{head} differs from {embedding} although config.json ties them: "
                       "set tie_word_embeddings to false.")
    del stored[head]


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
    part = stored[name].get_slice(name)
    want = weight.their_shape(shapes[path].shape[weight.stacked:])
    if tuple(part.get_shape()) != want:
      raise ValueError(f"{folder}: {name} has shape {tuple(part.get_shape())} and config.json asks "
                       f"for {want}: they must come from one model.")
    if part.get_dtype() not in STORED:
      raise ValueError(f"{folder}: {name} is stored as {part.get_dtype()}: convert the model to "
                       f"one of {', '.join(sorted(STORED))}.")


def _part(stored, weight, shape, index, dtype):
  """The part `index` of one of our weights, of which nothing else is read."""
  index = [slice(*i.indices(size)[:2]) for i, size in zip(index, shape, strict=True)]
  layers = range(index[0].start, index[0].stop) if weight.stacked else (None,)
  index, shape = index[weight.stacked:], shape[weight.stacked:]
  theirs, sizes = weight.their_index(index, shape), [i.stop - i.start for i in index]
  out = np.empty((len(layers), *sizes), dtype)
  for row, layer in zip(out, layers, strict=True):
    name = weight.name.format(layer)
    row[...] = weight.to_ours(stored[name].get_slice(name)[theirs], sizes).astype(dtype)
  return out if weight.stacked else out[0]


def _theirs(config, params):
  """({their name: array}, the one type of them all) of a parameter tree."""
  params, shapes = layout.flat(params), layout.flat(models.shapes(config))
  got, want = ({path: tuple(x.shape) for path, x in tree.items()} for tree in (params, shapes))
  if got != want:
    path = min(path for path, _ in got.items() ^ want.items())
    raise ValueError(f"the parameter {path} has shape {got.get(path, 'none')} and the model asks "
                     f"for {want.get(path, 'none')}: save the tree that model.init makes.")
  dtypes = {x.dtype for x in params.values()}
  if len(dtypes) > 1:
    raise ValueError(f"parameters of several types, {sorted(map(str, dtypes))}: cast them to one.")
  params = {path: sharding.fetch(x) for path, x in params.items()}
  theirs = {}
  for name, (path, weight, layer) in _names(config).items():
    ours = params[path] if layer is None else params[path][layer]
    theirs[name] = np.ascontiguousarray(weight.to_theirs(ours))
  return theirs, dtypes.pop()


def _descend(source, config):
  """config.json of `source`, which must be of the same model."""
  config_json = read_json(source)
  if models.read_config(config_json, dtype=config.dtype, remat=config.remat) != config:
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
