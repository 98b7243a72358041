"""The device mesh, the layout of arrays on it, and transfers between host and devices.

No other file names a mesh axis. Models and losses use logical axes ("batch", "heads", "vocab"), and
the two tables below map each of them to a mesh axis. To try another layout, change a table.
Parameters are split over `fsdp` and `tensor`. Activations are split over `data` and `fsdp` (rows)
and `tensor` (heads, vocabulary).
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from s2d_jax.errors import InputError

Params = Any  # a pytree of arrays: a model's weights, their shapes or their layouts

HOST = "pinned_host"  # JAX's name of the host's memory that a device reads and writes itself

_Names = tuple[str, ...]  # a logical name for each axis of an array
_Shape = tuple[int, ...]

_AXES = ("data", "fsdp", "tensor")

# Two tables, because a weight's "embed" is split over fsdp and an activation's must not be:
# its batch already uses that axis. None is replication, written down, so a misspelt name raises.
_WEIGHT_RULES = {
    "layer": None, "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "head": None,
    "mlp": "tensor", "vocab": "tensor", "rank": None,
}
_ACTIVATION_RULES = {
    "batch": ("data", "fsdp"), "time": None, "context": "tensor", "embed": None, "heads": "tensor",
    "kv_heads": "tensor", "head": None, "mlp": "tensor", "vocab": "tensor",
    "cache": None, "layer": None, "pages": ("data", "fsdp"),
}


def make_mesh(shape: tuple[int, ...] = (1, 1, 1),
              devices: list[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp, tensor) mesh of Auto axes over `devices`, by default the first that suffice.

  Raises:
    InputError: `shape` is not three sizes of 1 or more, or asks for more devices than there are.
  """
  # Devices may be described and absent, as those of a TPU topology that is compiled for.
  devices = jax.devices() if devices is None else devices
  need = int(np.prod(shape))
  if len(shape) != len(_AXES) or min(shape) < 1 or need > len(devices):
    raise InputError(
        f"mesh is {tuple(shape)}, which needs {need} devices on the axes {_AXES}, and "
        f"there are {len(devices)}: choose three sizes whose product is at most that.")
  # A process without devices in the mesh could not take part in its programs.
  if jax.process_count() > 1 and need != len(devices):
    raise InputError(
        f"mesh is {tuple(shape)}, which leaves {len(devices) - need} of {len(devices)} devices "
        "idle, and every process needs its own in it: choose sizes that use all.")
  slices = {getattr(device, "slice_index", 0) for device in devices[:need]}
  # On GPUs JAX calls each host a slice, and hosts may be joined.
  if len(slices) > 1 and devices[0].platform == "tpu":
    raise InputError(f"mesh is {tuple(shape)}, whose devices belong to {len(slices)} TPU slices: "
                     "choose a mesh of one slice.")
  # Auto: XLA chooses the layouts between the arrays that `constrain` fixes.
  auto = (jax.sharding.AxisType.Auto,) * len(_AXES)
  # `jax.make_mesh` would refuse (1, 8, 8) of 4x4x4 chips, because 8 is not a product of 4s.
  placed = mesh_utils.create_device_mesh(tuple(shape), devices[:need],
                                         allow_split_physical_axes=True)
  return Mesh(placed, _AXES, axis_types=auto)


def _fits(size: int, axis: str | _Names | None, mesh_shape: dict[str, int]) -> str | _Names | None:
  """The mesh axis if it divides `size`, else None: fewer key heads than `tensor` are replicated."""
  names = (axis,) if isinstance(axis, str) else axis or ()
  return axis if size % int(np.prod([mesh_shape[n] for n in names])) == 0 else None


def _spec(rules: dict[str, str | _Names | None], names: _Names, shape: _Shape,
          mesh_shape: dict[str, int]) -> PartitionSpec:
  """PartitionSpec of an array of `shape` whose axes are called `names`."""
  return PartitionSpec(*(_fits(s, rules[n], mesh_shape) for n, s in zip(names, shape, strict=True)))


def constrain(x: jax.Array, *names: str) -> jax.Array:
  """Fixes an activation's layout inside `jit`; without a mesh (`jax.set_mesh`) it returns `x`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  where = _spec(_ACTIVATION_RULES, names, x.shape, mesh.shape)
  if mesh.manual_axes:  # inside `per_device`, where an array cannot be split over those axes
    where = PartitionSpec(*(axes if axes not in (*mesh.manual_axes, mesh.manual_axes) else None
                            for axes in where))
  return jax.lax.with_sharding_constraint(x, where)


def look_up(table_VD: jax.Array, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array | None:
  """The weight's rows of these ids in `dtype`, [B, T, D], while the weight stays where it is.

  Each device takes the part that it has of the vectors of all tokens of the devices that share
  `fsdp`, and an all-to-all makes whole vectors of its own rows from the parts. The gradient takes
  the way back, and is added up in the weight's dtype. None where the sizes do not divide the mesh.

  Args:
    table_VD: laid out as weights with the names "vocab" and "embed".
    ids_BT: int32, at least 0 and less than V.
  """
  mesh = jax.sharding.get_abstract_mesh()
  vocab, embed = _WEIGHT_RULES["vocab"], _WEIGHT_RULES["embed"]
  rows = _ACTIVATION_RULES["batch"]
  if mesh.empty or mesh.manual_axes or mesh.shape[vocab] == mesh.shape[embed] == 1:
    return None
  (V, D), (B, T) = table_VD.shape, ids_BT.shape
  if not all(_fits(*pair, mesh.shape) for pair in ((V, vocab), (D, embed), (B, rows), (T, vocab))):
    return None

  def local(table_vd: jax.Array, ids_bT: jax.Array) -> jax.Array:
    ids_BT = jax.lax.all_gather(ids_bT, embed, axis=0, tiled=True) - (
        jax.lax.axis_index(vocab) * table_vd.shape[0])
    # Ids of other devices' words are too large: 0 is read, and no gradient is added. From the end
    # negative ones would be counted.
    ids_BT = jnp.where(ids_BT < 0, V, ids_BT)
    x_BTd = jnp.take(table_vd, ids_BT, axis=0, mode="fill", fill_value=0).astype(dtype)
    # One of the devices that share the vocabulary has the word, so the sum is not rounded.
    x_Btd = jax.lax.psum_scatter(x_BTd, vocab, scatter_dimension=1, tiled=True)
    return jax.lax.all_to_all(x_Btd, embed, 0, 2, tiled=True)

  return jax.shard_map(local, in_specs=(PartitionSpec(vocab, embed), PartitionSpec(rows)),
                       out_specs=PartitionSpec(rows, vocab), check_vma=False)(table_VD, ids_BT)


def per_head_shard(f: Callable[..., jax.Array], args: tuple[jax.Array, ...],
                   names: tuple[_Names, ...]) -> jax.Array:
  """f(index, *args) on each device's shards of the arrays, for a kernel that XLA cannot split.

  Args:
    f: sees local shapes. `index` is the device's place along the mesh axis that splits "heads". Its
      result is laid out as the first array.
    args: arrays; the first one has the axis "heads".
    names: the logical names of each array's axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  heads = args[0].shape[names[0].index("heads")]
  # Where the axis does not divide the heads every device has them all, and all have index 0.
  axis = None if mesh.empty else _fits(heads, _ACTIVATION_RULES["heads"], mesh.shape)

  def local(*args: jax.Array) -> tuple[jax.Array]:
    return (f(0 if axis is None else jax.lax.axis_index(axis), *args),)

  return per_shard(local, args, names, (0,))[0]


def per_shard(f: Callable[..., tuple[jax.Array, ...]], args: tuple[jax.Array, ...],
              names: tuple[_Names, ...], out_like: tuple[int, ...]) -> tuple[jax.Array, ...]:
  """f(*args) on each device's shards of the arrays.

  Args:
    f: sees local shapes; returns a tuple.
    args: arrays.
    names: the logical names of each array's axes.
    out_like: for each result, the index of the argument whose layout it has.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f(*args)
  specs = tuple(_spec(_ACTIVATION_RULES, n, x.shape, mesh.shape)
                for n, x in zip(names, args, strict=True))
  # The check is off, because a kernel's results do not say over which axes they vary.
  return jax.shard_map(f, in_specs=specs, out_specs=tuple(specs[i] for i in out_like),
                       check_vma=False)(*args)


def per_device(
    f: Callable[[Params, Params], tuple[Params, Params]], per_row: Params,
    replicated: Params) -> tuple[Params, Params]:
  """f(per_row, replicated) -> (outputs, totals) on each device's own rows.

  The totals are added up over devices once, after f. It is for a loop whose running total would
  otherwise be added up over devices in each iteration.

  Args:
    f: sees a device's rows alone; XLA still splits over `tensor` inside it.
    per_row: a tree of arrays whose first axis is the batch, as the outputs are.
    replicated: a tree of arrays that are equal on every device, as the totals are.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = _ACTIVATION_RULES["batch"]
  size = jax.tree.leaves(per_row)[0].shape[0]
  # With rows that are whole on each device, adding up would count them several times.
  if mesh.empty or _fits(size, axes, mesh.shape) is None or all(mesh.shape[a] == 1 for a in axes):
    return f(per_row, replicated)

  def local(per_row: Params, replicated: Params) -> tuple[Params, Params]:
    outputs, totals = f(per_row, replicated)
    return outputs, jax.lax.psum(totals, axes)

  return jax.shard_map(
      local, axis_names=set(axes), in_specs=(PartitionSpec(axes), PartitionSpec()),
      out_specs=(PartitionSpec(axes), PartitionSpec()), check_vma=False)(per_row, replicated)


def splits_heads() -> bool:
  """Whether the mesh splits the heads of activations over devices."""
  return shards("heads", None) > 1


def splits_weights() -> bool:
  """Whether each device has a part of the weights, and gathers the whole for a product."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.shape[_WEIGHT_RULES["embed"]] > 1


def max_over_devices(x: jax.Array) -> jax.Array:
  """The largest x of any device inside `per_device`; outside of it x itself."""
  axes = jax.sharding.get_abstract_mesh().manual_axes
  return jax.lax.pmax(x, axes) if axes else x


def platform() -> str:
  """"cpu", "gpu" or "tpu": that of the mesh's devices, which may be described but absent."""
  mesh = jax.sharding.get_abstract_mesh()  # inside `jit` the concrete mesh is not known
  device = None if mesh.empty else mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
  """JAX's name of the kind of the mesh's devices, which may be described but absent."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def current_mesh() -> Mesh | None:
  """The mesh of `with jax.set_mesh(...)`, or None."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def abstract(tree: Params) -> Params:
  """Shapes, dtypes and layouts of arrays, for which a program can be compiled without them.

  Programs read arrays in the devices' memory, so that is the layout also of those on the host.
  """
  def where(x: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    on_host = x.sharding is not None and x.sharding.memory_kind == HOST
    return NamedSharding(x.sharding.mesh, x.sharding.spec) if on_host else x.sharding

  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), tree)


def device_bytes(tree: Params) -> int:
  """Bytes of arrays, or of abstract arrays, on each device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
             * x.dtype.itemsize for x in jax.tree.leaves(tree))


def laid_out(shapes: Params, shardings: Params) -> Params:
  """The shapes and dtypes of `shapes` with the layouts of `shardings`."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      shapes, shardings)


def weight_sharding(mesh: Mesh, names: _Names, shape: _Shape) -> NamedSharding:
  """The layout of one weight whose axes have the logical `names`."""
  return NamedSharding(mesh, _spec(_WEIGHT_RULES, names, shape, mesh.shape))


def decode_sharding(mesh: Mesh, names: _Names, shape: _Shape) -> NamedSharding:
  """The layout of one weight while tokens are decoded: `weight_sharding`, but whole over `fsdp`."""
  # Otherwise each token would gather all weights from the other devices.
  rules = {name: None if axis == "fsdp" else axis for name, axis in _WEIGHT_RULES.items()}
  return NamedSharding(mesh, _spec(rules, names, shape, mesh.shape))


def weight_shardings(mesh: Mesh, axes: Params, shapes: Params) -> Params:
  """`weight_sharding` of every parameter; `axes` has the logical names, `shapes` the shapes."""
  return jax.tree.map(lambda s, a: weight_sharding(mesh, a, s.shape), shapes, axes)


def batch_sharding(mesh: Mesh, shape: _Shape, names: _Names = ("batch",)) -> NamedSharding:
  """The layout of a batch array of `shape`; axes beyond `names` are whole on every device."""
  names = tuple(names) + ("time",) * (len(shape) - len(names))
  return NamedSharding(mesh, _spec(_ACTIVATION_RULES, names, shape, mesh.shape))


def shard_count(mesh: Mesh | jax.sharding.AbstractMesh, name: str, size: int | None) -> int:
  """Number of shards of an activation's axis `name` of `size`; None is a size that all divide."""
  axes = _fits(size or 0, _ACTIVATION_RULES[name], mesh.shape)  # all of them divide 0
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return int(np.prod([mesh.shape[a] for a in axes]))


def shards(name: str, size: int | None) -> int:
  """`shard_count` on the mesh of the program that is traced; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else shard_count(mesh, name, size)


def replicated(mesh: Mesh) -> NamedSharding:
  """The layout in which every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def put(x: np.typing.ArrayLike, sharding: NamedSharding) -> jax.Array:
  """A global array from a host value that is equal on every process."""
  x = np.asarray(x)
  if jax.process_count() == 1:
    return jax.device_put(x, sharding)
  # Each process copies only to its own devices; it cannot reach the others.
  return from_callback(x.shape, sharding, lambda index: (x[index], lambda shard: shard))


def from_callback(
    shape: _Shape, sharding: NamedSharding,
    part: Callable[[tuple[slice, ...]], tuple[np.ndarray, Callable]]) -> jax.Array:
  """A global array of which each process makes only what its own devices hold.

  Args:
    shape: of the array.
    sharding: its layout.
    part: part(index) is a NumPy array and a function. The function turns that array, once it is on
      the device, into the shard at `index`.
  """
  parts = {}
  arrays = []
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    key = str(index)  # several devices may hold the same shard, which is read once
    if key not in parts:
      parts[key] = part(index)
    host, finish = parts[key]
    # Under a mesh of this device alone, or `finish` would be compiled for all devices.
    with jax.set_mesh(make_mesh((1, 1, 1), [device])):
      arrays.append(finish(jax.device_put(host, device)))
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def stacked(shape: _Shape, dtype: jnp.dtype, where: NamedSharding | None,
            layers: Iterable[jax.Array]) -> jax.Array:
  """An array whose first axis comes from an iterable.

  Args:
    shape: of the array.
    dtype: of the array.
    where: its layout; None: whole on the default device.
    layers: arrays of shape[1:]. Each is copied into its place before the next one is made, so that
      at most one exists in addition to the result.
  """
  # The index is an array, because a Python number would compile a program for each layer. The wait
  # keeps later layers from the device until this one is written, since dispatch is asynchronous.
  make, write = _stacker(shape, dtype, where)
  whole = make()
  for index, layer in enumerate(layers):
    index = np.int32(index)
    index = jax.device_put(index) if where is None else put(index, replicated(where.mesh))
    whole = jax.block_until_ready(write(whole, layer, index))
  return whole


@functools.cache
def _stacker(shape: _Shape, dtype: jnp.dtype,
             where: NamedSharding | None) -> tuple[Callable, Callable]:
  """Jitted: zeros of a shape, and writing one layer into them in place."""
  def write(whole: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, layer, index, 0)
  # Donated, so that the write is in place and the array is in memory once.
  return (jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where),
          jax.jit(write, donate_argnums=0, out_shardings=where))


def fetch_slice(x: jax.Array | np.ndarray, index: int | None = None,
                convert: Callable[[jax.Array], jax.Array] = lambda x: x) -> np.ndarray:
  """convert(x), or convert(x[index]), as a whole NumPy array on every process.

  All processes must call it, since parts of x may be on devices of another process.
  """
  if not isinstance(x, jax.Array):
    return np.asarray(convert(x if index is None else x[index]))
  # A process can read only its own devices, so every device first gets the whole slice.
  where = replicated(x.sharding.mesh) if isinstance(x.sharding, NamedSharding) else None
  take = _taker(where, index is None, convert)
  index = np.int32(index or 0)
  index = jax.device_put(index) if where is None else put(index, where)
  return jax.device_get(take(x, index))


@functools.cache
def _taker(where: NamedSharding | None, whole: bool, convert: Callable) -> Callable:
  """Jitted: convert(x), or convert(x[index]), laid out as `where`."""
  # Cached by its arguments, because a new closure would be compiled again for every layer.
  def take(x: jax.Array, index: jax.Array) -> jax.Array:
    return convert(x if whole else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False))
  return jax.jit(take, out_shardings=where)


def put_batch(tree: Params, mesh: Mesh) -> Params:
  """`put` of every leaf, with rows split over `data` and `fsdp`."""
  return jax.tree.map(lambda x: put(x, batch_sharding(mesh, np.shape(x))), tree)
