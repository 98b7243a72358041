"""Arrays that wait in the host's pinned memory while a stage samples, scores and evaluates.

`config.offload` names them. The optimizer's slots are on the devices while an update is applied and
at no other time: gradients are formed without them. The guide stays in the host's memory, and a
copy of it is on the devices while programs read it.

Only places change, but with the slots an update is two programs. Results differ by rounding at most
from those of a stage that holds all on its devices.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding
from ml_collections import ConfigDict

from s2d_jax import allocate, chips, metrics, sharding, timing
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.roles import StageModels
from s2d_jax.sharding import HOST, Params
from s2d_jax.training import Metrics, Totals, TrainState

# Names of `roles.resident` that a config may place on the host.
PARTS = ("optimizer", "guide")


def parts(text: str) -> frozenset[str]:
  """The names in a value of config.offload."""
  return frozenset(filter(None, (name.strip() for name in text.split(","))))


# Not hashed, as mesh and remat are not: a value changes numbers by rounding at most.
KEY = Key(lambda text: isinstance(text, str) and parts(text) <= set(PARTS),
          f"name what waits in the host's memory, of {', '.join(PARTS)} with commas between, or '' "
          "for nothing", neutral="", hashed=False, optional=True)


def memories(device: jax.Device) -> set[str]:
  """Kinds of the memories that a device reaches."""
  return {memory.kind for memory in device.addressable_memories()}


def check_devices(config: ConfigDict, devices: Iterable[jax.Device]) -> None:
  """Refuses `config.offload` where a device does not reach pinned memory of its host.

  Raises:
    InputError: names the device's kind and its memories.
  """
  offload = config.get("offload", "")
  for device in devices if parts(offload) else ():
    found = memories(device)
    if HOST not in found:
      raise InputError(
          f"config.offload is {offload!r} and a {device.device_kind} has no {HOST} memory (it has "
          f"{', '.join(sorted(found)) or 'none that is named'}): set it to '', or use devices that "
          "have it.")


def check_host(waiting: Collection[str], held: Mapping[str, int]) -> None:
  """Refuses arrays that the memory of this host does not hold.

  Args:
    waiting: as `away` returns it; held: as `roles.resident` returns it.

  Raises:
    InputError: names the bytes and the remedy.
  """
  need = len(jax.local_devices()) * sum(held[name] for name in waiting)
  sentence = f"config.offload lets {need / 2**30:,.3g} GiB wait in the memory of this host, "
  size = chips.host_memory()
  if need > size:
    raise InputError(f"{sentence}which has {size / 2**30:,.3g}: name fewer parts, or use more "
                     "hosts.")
  pool = int(os.environ.get(chips.HOST_POOL, chips.HOST_POOL_DEFAULT))
  if sharding.platform() == "gpu" and need > pool * 2**30:
    raise InputError(f"{sentence}and JAX pins {pool} GiB of it: set the environment's "
                     f"{chips.HOST_POOL} to more, below the {size / 2**30:,.3g} that it has.")


def away(offload: str, models: StageModels, hp: ConfigDict) -> frozenset[str]:
  """Names, of `roles.resident`, of what is on the host while a stage samples.

  Args:
    offload: config.offload; hp: the stage's config.
  """
  waiting = parts(offload)
  # An actor that is the guide samples. Probes of `allocate` sample the guide. Several guides wait
  # in the host's memory in any case (`guides`).
  if (models.guide is None or models.guide is models.actor or models.guides is not None
      or allocate.probes(hp)):
    waiting -= {"guide"}
  return waiting


def staying(held: Mapping[str, int], waiting: Collection[str]) -> dict[str, int]:
  """`roles.resident` while a stage samples: what waits on the host has no bytes on a device."""
  return {name: 0 if name in waiting else size for name, size in held.items()}


def bytes_moved(held: Mapping[str, int], waiting: Collection[str], updates: int) -> int:
  """Bytes that one step moves between each device and its host.

  For each update the slots go both ways. The guide goes one way, because it does not change: once
  for all updates, or, with the slots, once for each, because the two may not fit together.

  Args:
    held: as `roles.resident` returns it; waiting: as `away` returns it.
    updates: of a step.
  """
  if "optimizer" not in waiting:
    return sum(held[name] for name in waiting)
  return updates * sum((2 if name == "optimizer" else 1) * held[name] for name in waiting)


def to_host(params: Params) -> Params:
  """Arrays in the host's pinned memory, laid out as before; of shapes their layout alone changes.

  The device's arrays are deleted, so that their memory is free at once.
  """
  if all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding.with_memory_kind(HOST)), params)
  return _moved(params, HOST, frees=True)


def to_devices(params: Params, frees: bool = False) -> Params:
  """Arrays of the host's pinned memory on their devices; others stay as they are.

  Args:
    frees: whether the host's arrays are deleted.
  """
  if all(x.sharding.memory_kind != HOST for x in jax.tree.leaves(params)):
    return params
  return _moved(params, None, frees)


def _moved(params: Params, kind: str | None, frees: bool) -> Params:
  """Arrays in a memory of their devices, None for the devices' own; returns once they are there."""
  leaves, tree = jax.tree.flatten(params)
  # Each process moves what its own devices hold. `jax.device_put` of an array that several
  # processes share would compile a program.
  shards = [[shard.data for shard in x.addressable_shards] for x in leaves]
  targets = [[SingleDeviceSharding(shard.device, memory_kind=kind)
              for shard in x.addressable_shards] for x in leaves]
  moved = [
      jax.make_array_from_single_device_arrays(
          x.shape, NamedSharding(x.sharding.mesh, x.sharding.spec, memory_kind=kind), parts)
      for x, parts in zip(leaves, jax.device_put(shards, targets), strict=True)]
  jax.block_until_ready(moved)
  for x in leaves if frees else ():
    x.delete()
  return tree.unflatten(moved)


class Mover:
  """Moves what waits before and after the programs that read it; counts bytes and seconds."""

  def __init__(self, waiting: frozenset[str] = frozenset(),
               clock: timing.Clock | None = None) -> None:
    """Starts to count.

    Args:
      waiting: as `away` returns it; where it is empty nothing moves.
      clock: gets the seconds as the phase `move`, and `moved_bytes`, of each device.
    """
    self._waiting = waiting
    self._clock = clock
    self._seconds = 0.0

  def guide(self, models: StageModels) -> Params | None:
    """The guide's weights on the devices; None for a stage without a guide.

    A copy of weights that wait is on the devices until the caller drops it.
    """
    if models.guide is None:
      return None
    if "guide" not in self._waiting:
      return models.guide.params
    return self._counted(to_devices, models.guide.params)

  def applied(self, apply: Callable[..., tuple[TrainState, Metrics]], state: TrainState,
              totals: Totals) -> tuple[TrainState, Metrics]:
    """apply(state, totals): the end of an update, with the slots on the devices while it runs.

    Args:
      apply: as `training.jit_apply`; totals: as it takes them.
    """
    if "optimizer" not in self._waiting:
      return apply(state, totals)
    # The programs before this one may need the memory that the slots will take.
    jax.block_until_ready(totals)
    state = state._replace(opt_state=self._counted(to_devices, state.opt_state, True))
    state, values = apply(state, totals)
    jax.block_until_ready(state.step)  # or the moves' seconds would have the program's in them
    return self.slots_away(state), values

  def slots_away(self, state: TrainState) -> TrainState:
    """The state with its slots where they wait."""
    if "optimizer" not in self._waiting:
      return state
    return state._replace(opt_state=self._counted(to_host, state.opt_state))

  def shown(self) -> dict[str, str]:
    """Seconds of all moves so far, for the line of a stage's progress; {} where nothing waits."""
    return {"moves": f"{self._seconds:.1f}s"} if self._waiting else {}

  def _counted(self, move: Callable[..., Params], *args: Any) -> Params:
    start = time.monotonic()
    with self._clock.phase("move"):
      moved = move(*args)
    self._seconds += time.monotonic() - start
    self._clock.counts["moved_bytes"] += sharding.device_bytes(moved)
    return moved


def announce(name: str, waiting: Collection[str], held: Mapping[str, int], updates: int) -> None:
  """Prints what waits on the host while a stage samples, and what a step moves for it.

  Args:
    name: of the stage; others: as `bytes_moved`.
  """
  if waiting:
    of_part = ", ".join(f"{part} {held[part] / 1e9:,.3g} GB" for part in sorted(waiting))
    metrics.announce(f"{name}: in the host's memory until a program reads it: {of_part} of each "
                     "device; a step moves "
                     f"{bytes_moved(held, waiting, updates) / 1e9:,.3g} GB of each")
