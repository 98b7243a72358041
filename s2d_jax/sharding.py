"""The mesh, and the only file that knows its axes.

Models and losses speak of logical axes ("batch", "heads", "vocab"); the two tables below say
which mesh axis carries each. To try another layout, change a table. Parameters are split over
`fsdp` and `tensor`, activations over `data` and `fsdp` (rows) and `tensor` (heads, vocabulary).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Params = Any  # a pytree of arrays: a model's weights, their shapes or their layouts

AXES = ("data", "fsdp", "tensor")

# Two tables, because a weight's "embed" is split over fsdp and an activation's must not be:
# its batch already uses that axis. None is replication, written down, so a misspelt name raises.
WEIGHT_RULES = {
    "layer": None, "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "head": None,
    "mlp": "tensor", "vocab": "tensor", "rank": None,
}
ACTIVATION_RULES = {
    "batch": ("data", "fsdp"), "time": None, "embed": None, "heads": "tensor",
    "kv_heads": "tensor", "head": None, "mlp": "tensor", "vocab": "tensor",
    "cache": None, "layer": None, "pages": ("data", "fsdp"),
}


def make_mesh(shape=(1, 1, 1), devices=None):
  """A (data, fsdp, tensor) mesh of Auto axes over `devices`, by default the first that suffice.

  Raises:
    ValueError: `shape` is not three sizes of 1 or more, or asks for more devices than there are.
  """
  devices = jax.devices() if devices is None else devices
  need = int(np.prod(shape))
  if len(shape) != len(AXES) or min(shape) < 1 or need > len(devices):
    raise ValueError(
        f"mesh {tuple(shape)} needs {need} devices on the axes {AXES} and {len(devices)} are here: "
        "set config.mesh to three sizes whose product is at most that.")
  if jax.process_count() > 1 and need != len(devices):
    raise ValueError(f"mesh {tuple(shape)} leaves {len(devices) - need} of {len(devices)} devices "
                     "idle, and every process needs its own in it: set config.mesh to use all.")
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(shape), AXES, axis_types=auto, devices=devices[:need])


def _fits(size, axis, mesh_shape):
  """The mesh axis where it divides `size`, else None: fewer KV heads than `tensor` replicate."""
  names = (axis,) if isinstance(axis, str) else axis or ()
  return axis if size % int(np.prod([mesh_shape[n] for n in names])) == 0 else None


def spec(rules, names, shape, mesh_shape):
  """PartitionSpec of an array of `shape` whose axes are called `names`."""
  return PartitionSpec(*(_fits(s, rules[n], mesh_shape) for n, s in zip(names, shape, strict=True)))


def constrain(x, *names):
  """Pins an activation's layout inside `jit`; without a mesh (`jax.set_mesh`) it is `x`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  where = spec(ACTIVATION_RULES, names, x.shape, mesh.shape)
  if mesh.manual_axes:  # inside `per_device`: those axes are not there to be split over
    where = PartitionSpec(*(axes if axes not in (*mesh.manual_axes, mesh.manual_axes) else None
                            for axes in where))
  return jax.lax.with_sharding_constraint(x, where)


def on_shards(f, axis, args, names):
  """f(index, *args) on each device's own parts of the arrays, for a kernel that XLA cannot split.

  Args:
    f: sees local shapes; `index` is the device's place along the mesh axis that carries `axis`. Its
      one result is laid out as the first array is.
    args: arrays; names: a tuple of logical names for each.
  """
  mesh = jax.sharding.get_abstract_mesh()
  carrier = None if mesh.empty else _fits(
      args[0].shape[names[0].index(axis)], ACTIVATION_RULES[axis], mesh.shape)
  def local(*args):
    return (f(0 if carrier is None else jax.lax.axis_index(carrier), *args),)
  return on_parts(local, args, names, (0,))[0]


def on_parts(f, args, names, outs):
  """f(*args) on each device's own parts of the arrays, where no array is split but as it lies.

  Args:
    names: a tuple of logical names for each argument; outs: for each result, the place of the
      argument that it is laid out as.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return f(*args)
  specs = tuple(spec(ACTIVATION_RULES, n, x.shape, mesh.shape)
                for n, x in zip(names, args, strict=True))
  return jax.shard_map(f, in_specs=specs, out_specs=tuple(specs[at] for at in outs),
                       check_vma=False)(*args)


def per_device(
    f: Callable, per_row: Params, replicated: Params) -> tuple[Params, Params]:
  """f(per_row, replicated) -> (outputs, totals) on each device's own rows.

  The totals are added up over devices once, after f. It is for a loop whose running total would
  otherwise be added up over devices in each iteration.

  Args:
    f: sees a device's rows alone; XLA still splits over `tensor` inside it.
    per_row: a tree of arrays whose first axis is the batch, as the outputs are.
    replicated: a tree of arrays that are equal on every device, as the totals are.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = ACTIVATION_RULES["batch"]
  size = jax.tree.leaves(per_row)[0].shape[0]
  if mesh.empty or _fits(size, axes, mesh.shape) is None or all(mesh.shape[a] == 1 for a in axes):
    return f(per_row, replicated)

  def local(per_row: Params, replicated: Params) -> tuple[Params, Params]:
    outputs, totals = f(per_row, replicated)
    return outputs, jax.lax.psum(totals, axes)

  return jax.shard_map(
      local, axis_names=set(axes), in_specs=(PartitionSpec(axes), PartitionSpec()),
      out_specs=(PartitionSpec(axes), PartitionSpec()), check_vma=False)(per_row, replicated)


def max_over_devices(x):
  """The largest x of any device inside `per_device`; outside of it x itself."""
  axes = jax.sharding.get_abstract_mesh().manual_axes
  return jax.lax.pmax(x, axes) if axes else x


def platform():
  """"cpu", "gpu" or "tpu": of the mesh's devices, which may be described and not here."""
  mesh = jax.sharding.get_abstract_mesh()  # the concrete one is out of sight inside `jit`
  device = None if mesh.empty else mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def current_mesh():
  """The mesh of `with jax.set_mesh(...)`, or None."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def abstract(tree):
  """Shapes, dtypes and layouts of arrays, to compile for before, or without, having them."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def laid_out(shapes, shardings):
  """Shapes and dtypes of `shapes` with the layouts of `shardings`."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      shapes, shardings)


def weight_sharding(mesh, names, shape):
  """Where one weight lives: logical `names` (a tuple, one per axis of `shape`) -> NamedSharding."""
  return NamedSharding(mesh, spec(WEIGHT_RULES, names, shape, mesh.shape))


def decode_sharding(mesh, names, shape):
  """Where one weight lives while tokens are decoded: `weight_sharding`, but whole over `fsdp`."""
  rules = {name: None if axis == "fsdp" else axis for name, axis in WEIGHT_RULES.items()}
  return NamedSharding(mesh, spec(rules, names, shape, mesh.shape))


def weight_shardings(mesh, axes, shapes):
  """`weight_sharding` over a parameter tree; `axes` holds the names, `shapes` the shapes."""
  return jax.tree.map(lambda s, a: weight_sharding(mesh, a, s.shape), shapes, axes)


def batch_sharding(mesh, shape, names=("batch",)):
  """Where a batch array of `shape` lives; axes beyond `names` are whole on every device."""
  names = tuple(names) + ("time",) * (len(shape) - len(names))
  return NamedSharding(mesh, spec(ACTIVATION_RULES, names, shape, mesh.shape))


def slot_sharding(mesh, shape, pages):
  """Where an array of a sampler's slots lives: rows, and behind them the key heads of a cache.

  A cache in pages has its key heads first, and behind them the pages.
  """
  names = ("batch",)
  if len(shape) > 2:
    names = ("kv_heads", "pages") if pages else ("batch", "kv_heads")
  return batch_sharding(mesh, shape, names)


def shard_count(mesh, name, size):
  """Into how many parts an activation's axis of `size` is split; None asks for those of any size.
  """
  axes = ACTIVATION_RULES[name]
  axes = axes if size is None else _fits(size, axes, mesh.shape)
  return int(np.prod([mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())]))


def replicated(mesh):
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def put(x, sharding):
  """A global array from a host value that is the same on every process."""
  x = np.asarray(x)
  if jax.process_count() == 1:
    return jax.device_put(x, sharding)
  return from_callback(x.shape, sharding, lambda index: (x[index], lambda own: own))


def from_callback(shape, sharding, part):
  """A global array of which each process makes what its own devices hold, and nothing else.

  part(index) gives a NumPy array and what makes the device's own part of it, once it is there.
  """
  made, arrays = {}, []
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    key = str(index)  # replicas are made once
    if key not in made:
      made[key] = part(index)
    host, finish = made[key]
    with jax.set_mesh(make_mesh((1, 1, 1), [device])):  # `finish` knows of this device alone
      arrays.append(finish(jax.device_put(host, device)))
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def stacked(shape, dtype, where, layers):
  """An array of `shape` laid out as `where` (None: one device), its first axis from an iterable.

  The layers are arrays of shape[1:]; each is copied into its place before the next is asked for, so
  that no more than one exists beside the whole.
  """
  make, write = _stacker(shape, dtype, where)
  whole = make()
  for at, layer in enumerate(layers):
    at = np.int32(at)
    at = jax.device_put(at) if where is None else put(at, replicated(where.mesh))
    whole = jax.block_until_ready(write(whole, layer, at))
  return whole


@functools.cache
def _stacker(shape, dtype, where):
  def write(whole, layer, at):
    return jax.lax.dynamic_update_index_in_dim(whole, layer, at, 0)
  return (jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where),
          jax.jit(write, donate_argnums=0, out_shardings=where))


def fetch_slice(x, at=None, turn=lambda x: x):
  """NumPy copy of turn(x), or of turn(x[at]), whole on every process, wherever and however x lies.
  """
  if not isinstance(x, jax.Array):
    return np.asarray(turn(x if at is None else x[at]))
  mesh = x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None
  taken = _taker(None if mesh is None else replicated(mesh), at is None, turn)
  at = np.int32(at or 0)
  return jax.device_get(taken(x, jax.device_put(at) if mesh is None else put(at, replicated(mesh))))


@functools.cache
def _taker(where, all_of_it, turn):
  def take(x, at):
    return turn(x if all_of_it else jax.lax.dynamic_index_in_dim(x, at, 0, keepdims=False))
  return jax.jit(take, out_shardings=where)


def put_batch(tree, mesh):
  """`put` of every leaf, rows split over `data` and `fsdp`."""
  return jax.tree.map(lambda x: put(x, batch_sharding(mesh, np.shape(x))), tree)


def fetch(tree):
  """NumPy copies of replicated (or single-host) arrays; every process gets the same."""
  return jax.device_get(tree)
