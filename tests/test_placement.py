"""Arrays that wait on the host: equal bits, memory that is free meanwhile, refusals, accounts."""

import math
import types

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from configs import arithmetic
from s2d_jax import (
  chips,
  keys,
  loop,
  metrics,
  placement,
  recipe,
  sharding,
  stage,
  tasks,
  timing,
)
from s2d_jax.errors import InputError
from s2d_jax.timing import Clock
from tests.preflight import options

# Runs with and without a placement have unequal programs, whose results are compared bit for bit.
pytestmark = pytest.mark.usefixtures("full_compiles")

SLACK = 4096  # bytes of counters, sums and keys


@pytest.mark.parametrize("value", ["teacher", "optimizer;guide", "all", 1, None, ("optimizer",)])
def test_another_value_is_refused_by_its_key(value):
  with pytest.raises(InputError, match=r"^config.offload is .*: name what waits in the host's "
                                       "memory, of optimizer, guide with commas between"):
    keys.check_value("config.offload", value, placement.KEY)


@pytest.mark.parametrize("text, expected", [
    ("", set()), ("guide", {"guide"}), (" optimizer , guide,", {"guide", "optimizer"})])
def test_a_value_names_parts(text, expected):
  keys.check_value("config.offload", text, placement.KEY)
  assert placement.parts(text) == expected


def device(*kinds):
  reached = [types.SimpleNamespace(kind=kind) for kind in kinds]
  return types.SimpleNamespace(device_kind="abacus", addressable_memories=lambda: reached)


def test_devices_without_pinned_memory_are_refused():
  config = {"offload": "guide"}
  placement.check_devices(config, [device("device", "pinned_host")])
  for without in ({}, {"offload": ""}):
    placement.check_devices(without, [device("device")])
  with pytest.raises(InputError, match="^config.offload is 'guide' and a abacus has no pinned_host "
                                       r"memory \(it has device, unpinned_host\): set it to ''"):
    placement.check_devices(config, [device("device", "unpinned_host")])


def test_a_host_with_too_little_memory_is_refused(monkeypatch):
  GiB = 2**30
  held = {"optimizer": 3 * GiB, "guide": GiB, "learner": 99 * GiB}
  monkeypatch.setattr(placement.jax, "local_devices", lambda: ["a", "b"])
  monkeypatch.setattr(chips, "host_memory", lambda: 8 * GiB)
  placement.check_host({"optimizer", "guide"}, held)  # two devices with four
  monkeypatch.setattr(chips, "host_memory", lambda: 8 * GiB - 1)
  sentence = ("config.offload lets 8 GiB wait in the memory of this host, which has 8: name fewer "
              "parts, or use more hosts.")
  with pytest.raises(InputError, match=f"^{sentence}$"):
    placement.check_host({"optimizer", "guide"}, held)
  placement.check_host({"optimizer"}, held)


def test_the_memory_that_jax_pins_is_refused_by_its_variable(monkeypatch):
  held = {"optimizer": 65 * 2**30}
  monkeypatch.setattr(placement.jax, "local_devices", lambda: ["a"])
  monkeypatch.setattr(chips, "host_memory", lambda: 128 * 2**30)
  monkeypatch.delenv(chips.HOST_POOL, raising=False)
  placement.check_host({"optimizer"}, held)  # a CPU has no such pool
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  sentence = ("config.offload lets 65 GiB wait in the memory of this host, and JAX pins 64 GiB of "
              "it: set the environment's XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB to more, below the 128 "
              "that it has.")
  with pytest.raises(InputError, match=f"^{sentence}$"):
    placement.check_host({"optimizer"}, held)
  monkeypatch.setenv(chips.HOST_POOL, "65")
  placement.check_host({"optimizer"}, held)


def test_a_run_is_refused_before_it_writes(tmp_path, monkeypatch):
  config = config_of("optimizer")
  monkeypatch.setattr(placement, "memories", lambda device: {"device"})
  with pytest.raises(InputError, match="has no pinned_host memory"):
    recipe.run(config, tmp_path / "run", tasks.get(config))
  assert not (tmp_path / "run").exists()


def model(name):
  return types.SimpleNamespace(params=name)


@pytest.mark.parametrize("changes, hp, expected", [
    ({}, {}, {"optimizer", "guide"}),
    ({"guide": None}, {}, {"optimizer"}),
    ({"actor": "guide"}, {}, {"optimizer"}),             # the guide samples
    ({"guides": {"": None}}, {}, {"optimizer"}),         # on the host already
    ({}, {"allocate": {"rule": "transfer"}}, {"optimizer"}),  # the guide samples for the probes
])
def test_a_guide_that_samples_stays(changes, hp, expected):
  found = types.SimpleNamespace(guide=model("guide"), actor=model("learner"), guides=None)
  for name, value in changes.items():
    setattr(found, name, found.guide if value == "guide" else value)
  assert placement.away("optimizer,guide", found, ConfigDict(hp)) == expected
  assert placement.away("", found, ConfigDict(hp)) == set()


def test_the_account_of_a_step_by_hand():
  held = {"learner": 7, "optimizer": 100, "guide": 30, "actor": 5}
  assert placement.staying(held, {"optimizer"}) == held | {"optimizer": 0}
  assert placement.staying(held, set()) == held
  # For each of three updates slots go there and back, and the guide's copy is dropped.
  assert placement.bytes_moved(held, {"optimizer"}, 3) == 600
  assert placement.bytes_moved(held, {"optimizer", "guide"}, 3) == 690
  # Without the slots, one copy of the guide serves all three.
  assert placement.bytes_moved(held, {"guide"}, 3) == 30


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_arrays_move_with_their_layout_and_bits(shape):
  mesh = sharding.make_mesh(shape)
  want = {"a": np.arange(64, dtype=np.float32).reshape(8, 8), "b": np.float32(math.pi)}
  where = {"a": jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
           "b": sharding.replicated(mesh)}
  start = jax.tree.map(sharding.put, want, where)
  with jax.transfer_guard("disallow"):
    waiting = placement.to_host(start)
    assert all(x.is_deleted() for x in start.values())
    assert {x.sharding.memory_kind for x in waiting.values()} == {"pinned_host"}
    assert sharding.abstract(waiting) == sharding.abstract(jax.tree.map(sharding.put, want, where))
    found = placement.to_devices(waiting)
    assert not any(x.is_deleted() for x in waiting.values())
    assert placement.to_devices(found) is found
    placement.to_devices(waiting, frees=True)
    assert all(x.is_deleted() for x in waiting.values())
  for name, x in found.items():
    assert x.sharding == where[name]
    np.testing.assert_array_equal(jax.device_get(x), want[name])


def test_a_mover_counts_the_bytes_of_each_device():
  clock = Clock(None)
  slots = {"m": sharding.put(np.zeros((4, 8), np.float32), sharding.replicated(
      sharding.make_mesh((1, 1, 2))))}
  state = loop.TrainState(None, None, slots)
  mover = placement.Mover(frozenset({"optimizer"}), clock)
  state = mover.slots_away(state)
  assert clock.counts["moved_bytes"] == 128  # each of two devices holds all of it
  memory_kinds = []

  def apply(state, totals):
    memory_kinds.append(state.opt_state["m"].sharding.memory_kind)
    return state, totals

  state, values = mover.applied(apply, state, "values")
  assert (values, memory_kinds) == ("values", ["device"])
  assert state.opt_state["m"].sharding.memory_kind == "pinned_host"
  assert mover.guide(types.SimpleNamespace(guide=None)) is None
  assert clock.counts["moved_bytes"] == 3 * 128
  assert set(mover.shown()) == {"moves"}
  entry = timing.step_entry(0, clock)
  assert entry["moved_bytes"] == 384 and 0 < entry["move_seconds"] <= entry["seconds"]
  assert "moved_bytes" not in timing.step_entry(1, clock)
  still = placement.Mover()
  assert still.slots_away(state) is state and still.shown() == {}


def config_of(offload, mesh=(1, 1, 1)):
  """The tiny config's reverse KL, saved in the middle."""
  config = arithmetic.get_config("tiny")
  with config.unlocked():
    config.update({"arms": "raw_bridge", "mesh": mesh, "offload": offload})
    config.probe.problems = 0
    config.stages.forward_kl.steps = 0
    config.stages.reverse_kl.update({"save_every": 2, "minibatches": 2})
  return config.lock()


def run(config, workdir):
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    plan = recipe.run(config, workdir, tasks.get(config))
  (name,) = plan.nodes
  return epath.Path(workdir) / name


def test_no_value_renames_a_stage():
  def names(config):
    return set(recipe.plan(config, tasks.get(config)).nodes)

  config = config_of("")
  without = config.copy_and_resolve_references()
  with without.unlocked():
    del without.offload
  assert names(config) == names(config_of("optimizer,guide")) == names(without)


def live_bytes():
  """{kind of memory: bytes of all live arrays}, of the first device and its host."""
  # By address, because an array and its shards are several arrays of one buffer.
  buffers = {"device": {}, "pinned_host": {}}
  for x in jax.live_arrays():
    for shard in x.addressable_shards:
      if shard.device.id == 0:
        address = shard.data.unsafe_buffer_pointer()
        buffers[x.sharding.memory_kind][address] = shard.data.nbytes
  return {kind: sum(sizes.values()) for kind, sizes in buffers.items()}


class Memory:
  """Bytes of live arrays while a stage samples, on the first device and in its host's memory."""

  def __init__(self, monkeypatch):
    self.found = []
    sample_step = loop.rollouts.sample_step

    def recorded(*args):
      self.found.append(live_bytes())
      return sample_step(*args)

    monkeypatch.setattr(loop.rollouts, "sample_step", recorded)

  def read(self):
    found, self.found = self.found, []
    return found


@pytest.mark.medium
@pytest.mark.parametrize("mesh", [
    (1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_killed_run_with_all_on_the_host(tmp_path, monkeypatch, mesh):
  memory = Memory(monkeypatch)
  held = {}
  resident = stage.resident

  def recorded(*args):
    held.update(resident(*args))
    return dict(held)

  monkeypatch.setattr(stage, "resident", recorded)
  whole = run(config_of("", mesh), tmp_path / "whole")
  without = memory.read()

  applied = placement.Mover.applied
  calls = []

  def killed(*args):
    calls.append(args)
    if len(calls) == 8:  # the last of two updates of each of four steps, behind a checkpoint
      raise SystemExit(137)
    return applied(*args)

  config = config_of("optimizer,guide", mesh)
  monkeypatch.setattr(placement.Mover, "applied", killed)
  with pytest.raises(SystemExit):
    run(config, tmp_path / "killed")
  # The error's traceback holds the arrays of the killed run.
  calls.clear()
  memory.read()
  monkeypatch.setattr(placement.Mover, "applied", applied)
  again = run(config, tmp_path / "killed")
  found = memory.read()
  assert again.name == whole.name
  if mesh != (1, 1, 1):
    # XLA adds up over devices in another order where an update is one program.
    one_program, whole = whole, run(config, tmp_path / "placed")
    for row, expected in zip(metrics.read(whole, "metrics"), metrics.read(one_program, "metrics"),
                             strict=True):
      assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
  for name in ("ledger", "metrics", "samples"):
    assert metrics.read(again, name) == metrics.read(whole, name)
  assert ((again / "hf" / "model.safetensors").read_bytes()
          == (whole / "hf" / "model.safetensors").read_bytes())
  away = held["optimizer"] + held["guide"]
  assert [sizes["pinned_host"] for sizes in found] == [away, away]
  assert [sizes["device"] for sizes in found] == [
      sizes["device"] - away for sizes in without[2:]]
  start, *steps = metrics.read(again, "timing")[-3:]
  assert start["moved_bytes"] == held["optimizer"]
  for entry in steps:
    assert entry["moved_bytes"] == 2 * (2 * held["optimizer"] + held["guide"])  # two updates
    assert 0 < entry["move_seconds"] < entry["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["adapters", "searches"])
def test_a_stage_with_an_option_and_all_on_the_host(tmp_path, monkeypatch, option):
  def config_with(offload):
    config = config_of(offload)
    with config.unlocked():
      if option == "adapters":
        config.stages.reverse_kl.lora.rank = 2
      else:
        config.stages.reverse_kl.foresee = options.config(signal="kl").stages.reverse_kl.foresee
    return config

  expected = run(config_with(""), tmp_path / "whole")
  held, resident = {}, stage.resident
  monkeypatch.setattr(stage, "resident", lambda *args: held.update(resident(*args)) or held)
  live = []
  to_devices = placement.to_devices

  def recorded(params, frees=False):
    if frees:  # the slots, and nothing but the slots
      live.append(live_bytes()["device"])
    return to_devices(params, frees)

  monkeypatch.setattr(placement, "to_devices", recorded)
  found = run(config_with("optimizer,guide"), tmp_path / "placed")
  for name in ("ledger", "metrics", "samples"):
    assert metrics.read(found, name) == metrics.read(expected, name)
  assert ((found / "hf" / "model.safetensors").read_bytes()
          == (expected / "hf" / "model.safetensors").read_bytes())
  # When the slots come: the learner, the gradients of what is trained, and the anchor of searches.
  anchor = held.get("anchors and candidate", 0) // 3
  trained = held["optimizer"] // 2  # of each trained weight Adam has two numbers
  assert len(live) == 8
  for size in live:
    assert abs(size - (held["learner"] + trained + anchor)) < SLACK
