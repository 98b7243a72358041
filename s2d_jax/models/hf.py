"""Reads and writes Hugging Face folders: config.json and safetensors.

Nothing is unpickled, and no code of a folder is run.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax import models, sharding
from s2d_jax.models import Config, Model, Weight, digests, folders, layout, shards
from s2d_jax.models.digests import identity
from s2d_jax.models.folders import Path, layer_shape, read_config, read_json
from s2d_jax.models.saving import save
from s2d_jax.models.shards import Stored
from s2d_jax.sharding import Params

__all__ = ["check", "identity", "load", "read_config", "read_json", "save"]


def load(folder: Path, mesh: jax.sharding.Mesh | None = None,
         dtype: jax.typing.DTypeLike | None = None, run: Mapping[str, Any] | None = None,
         shapes: Callable[[Config], Params] = models.shapes) -> tuple[Model, Params]:
  """(Model, params) of a Hugging Face folder.

  The weights go to the devices one layer of one weight at a time, so the host holds no more than
  that. With a mesh each process reads only the bytes that its own devices hold. Where the folder
  has checksums (`digests.reading`), its files are compared with them; on a mesh of several
  processes, which all call this function, each hashes a share of the files.

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
      left over, stored twice or of a wrong shape; a shard is outside the folder or cut short; a
      file is not that of its checksum.
  """
  with digests.reading(folder, together=mesh is not None and mesh.is_multi_process):
    return _loaded(pathlib.Path(folder), mesh, dtype, run, shapes)


def _loaded(folder: pathlib.Path, mesh: jax.sharding.Mesh | None,
            dtype: jax.typing.DTypeLike | None, run: Mapping[str, Any] | None,
            shapes: Callable[[Config], Params]) -> tuple[Model, Params]:
  """`load` without the checksums."""
  model = models.build(read_config(folder, **(run or {})))
  shape_of = layout.flat(shapes(model.config))
  # All headers are checked before the first weight is read, so a wrong folder fails at once.
  stored = folders.checked(folder, model.config, shape_of)
  params = {}
  for path, weight in models.weights(model.config).items():
    shape = shape_of[path]
    params[path] = _placed(stored, weight, shape.shape, jnp.dtype(dtype or shape.dtype), mesh)
  return model, layout.nest(params)


def check(folder: Path) -> None:
  """Checks config.json, the headers of the weights and the small files; reads no weight.

  Raises:
    InputError: as `load`.
  """
  with digests.reading(folder, weights=False):
    folders.described(folder, read_config(folder))


def _placed(stored: dict[str, Stored], weight: Weight, shape: tuple[int, ...], dtype: jnp.dtype,
            mesh: jax.sharding.Mesh | None) -> jax.Array:
  """One of our weights, all its layers, on the devices."""
  one_shape = layer_shape(shape, weight)
  axes = weight.axes[weight.stacked:]

  def layer(name: str) -> jax.Array:
    """One layer of the weight, from the tensor called `name`."""
    def part(index: tuple[slice, ...]) -> tuple[np.ndarray, Callable]:
      # An axis that is whole has slice(None), and `their_index` needs numbers.
      index = [slice(*i.indices(size)[:2]) for i, size in zip(index, one_shape, strict=True)]
      to_ours = _to_ours(weight, tuple(i.stop - i.start for i in index), dtype)
      return shards.read(stored[name], weight.their_index(index, one_shape)), to_ours
    if mesh is None:
      theirs, to_ours = part((slice(None),) * len(one_shape))
      return to_ours(jax.device_put(theirs))
    return sharding.from_callback(
        one_shape, sharding.weight_sharding(mesh, axes, one_shape), part)

  if not weight.stacked:
    return layer(weight.name)
  where = None if mesh is None else sharding.weight_sharding(mesh, weight.axes, shape)
  # A generator, so that a layer is read only after the one before it is in its place.
  layers = (layer(weight.name.format(index)) for index in range(shape[0]))
  return sharding.stacked(shape, dtype, where, layers)


@functools.cache
def _to_ours(weight: Weight, shape: tuple[int, ...],
             dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
  """Jitted: their part of a weight -> ours."""
  # On the device, because a transpose in NumPy takes nine times as long.
  return jax.jit(lambda theirs: weight.to_ours(theirs, shape).astype(dtype))
