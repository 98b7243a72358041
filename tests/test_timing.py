"""The clock's phases add up, a profile is of the steps that were asked for, usage by hand."""

import json

import jax
import numpy as np
import pytest

from s2d_jax import files, hosts, keys, metrics, timing


@pytest.fixture
def time(monkeypatch):
  """The time that the clock reads, to be set by hand."""
  class Time:
    now = 100.0
  monkeypatch.setattr(timing.time, "monotonic", lambda: Time.now)
  return Time


def test_a_moment_belongs_to_the_innermost_phase(time):
  clock = timing.Clock(metrics.Compilations)
  time.now += 1

  def reward(x):
    time.now += 4
    return 2 * x

  with clock.phase("draw"):
    time.now += 2
    assert clock.timed("reward", reward)(3) == 6
    time.now += 8
  time.now += 16
  assert clock.read() == {"host": 17, "draw": 10, "reward": 4}
  with pytest.raises(ZeroDivisionError), clock.phase("update"):
    time.now += 32
    raise ZeroDivisionError
  time.now += 64
  entry = timing.step_entry(5, clock)
  assert entry == {"step": 5, "seconds": 96, "draw_seconds": 0, "reward_seconds": 0,
                   "score_seconds": 0, "update_seconds": 32, "host_seconds": 64,
                   "evaluate_seconds": 0, "save_seconds": 0, "move_seconds": 0}


def test_the_start_has_the_compilations(time):
  clock = timing.Clock(lambda: metrics.Compilations(7, 3.5, 20.25))
  time.now += 5
  assert timing.start_entry(2, clock) == {
      "step": 2, "seconds": 5, "programs_compiled": 7, "compile_seconds": 3.5,
      "compile_seconds_saved": 20.25}
  assert clock.read() == {"host": 0}


@pytest.mark.parametrize("text, steps", [("", []), ("10:13", [10, 11, 12]), ("0:1", [0])])
def test_a_profile_names_steps(text, steps):
  keys.check_value("config.profile", text, timing.PROFILE_KEY)
  assert list(timing.steps_of(text)) == steps


@pytest.mark.parametrize("text", ["10", "10:", ":13", "13:10", "3:3", "-1:2", "a:b", "1:2:3",
                                  "1.5:2", "1: 2", None, 3])
def test_a_malformed_profile_is_refused(text):
  with pytest.raises(ValueError, match="^config.profile is .*: give the first step and the one"):
    keys.check_value("config.profile", text, timing.PROFILE_KEY)


@pytest.fixture
def sessions(monkeypatch):
  """Replaces JAX's profiler: the steps begun while it ran, a list for each of its sessions."""
  found = []

  class Session:
    def __init__(self, folder, profiler_options):
      assert profiler_options.python_tracer_level == 0
      self.folder = folder

    def __enter__(self):
      found.append([])

    def __exit__(self, *error):
      (files.epath.Path(self.folder) / "plugins").mkdir()
      (files.epath.Path(self.folder) / "plugins" / f"{len(found)}.xplane.pb").write_text("trace")
      found[-1].append("written")

  monkeypatch.setattr(jax.profiler, "trace", Session)
  return found


@pytest.mark.parametrize("steps, run, traced", [
    (range(2, 4), range(6), [2, 3, "written"]),
    (range(0, 6), range(6), [0, 1, 2, 3, 4, 5, "written"]),
    (range(2, 4), range(3, 6), [3, "written"]),        # resumed within the range
    (range(2, 4), range(3), [2, "written"])])          # stopped within it
def test_the_steps_of_a_profile(tmp_path, sessions, steps, run, traced):
  with timing.trace(files.epath.Path(tmp_path), steps) as begin:
    for step in run:
      begin(step)
      if sessions and "written" not in sessions[-1]:
        sessions[-1].append(step)
  assert sessions == [traced]
  assert (tmp_path / "profile" / "plugins" / "1.xplane.pb").read_text() == "trace"


def test_a_trace_that_an_error_cuts_short_is_written(tmp_path, sessions):
  with pytest.raises(SystemExit), timing.trace(files.epath.Path(tmp_path), range(4)) as begin:
    begin(0)
    raise SystemExit(75)
  assert sessions == [["written"]] and list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_steps_without_a_profile_and_other_hosts_write_no_trace(tmp_path, sessions, monkeypatch):
  for steps, leader in ((range(0), True), (range(1, 3), False)):
    monkeypatch.setattr(hosts, "leader", lambda leader=leader: leader)
    with timing.trace(files.epath.Path(tmp_path), steps) as begin:
      for step in range(4):
        begin(step)
  assert sessions == [] and list(tmp_path.iterdir()) == []


@pytest.mark.medium
def test_jaxs_profiler_writes_a_trace_with_the_phases(tmp_path):
  clock = timing.Clock(metrics.Compilations)
  product = jax.jit(lambda x: x @ x)
  with timing.trace(files.epath.Path(tmp_path), range(1, 2)) as begin:
    for step in range(3):
      begin(step)
      with clock.phase(f"update{step}"):
        jax.block_until_ready(product(np.ones((8, 8), np.float32)))
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  data = trace.read_bytes()
  assert b"update1" in data and b"update0" not in data and b"update2" not in data


def entry(step, **seconds):
  """An entry of a step's log; phases that are not named take no time."""
  phases = {f"{phase}_seconds": 0.0 for phase in timing.PHASES} | {
      f"{phase}_seconds": value for phase, value in seconds.items()}
  return {"step": step, "seconds": sum(seconds.values()), **phases}


def stage(folder, entries, device, flops=6e14, lost=0.0):
  files.write(folder / "timing" / "00000000.jsonl", "".join(json.dumps(e) + "\n" for e in entries))
  files.write_json(folder / "ledger.json", {"flops": flops, "device_seconds_lost": lost})
  files.write_json(folder / "manifest.json", {
      "inputs": {}, "device": device, "mesh": {"data": 2, "fsdp": 1, "tensor": 2}})


def test_usage_by_hand(tmp_path):
  folder = files.epath.Path(tmp_path)
  start = {"step": 0, "seconds": 20.0, "programs_compiled": 3, "compile_seconds": 12.0,
           "compile_seconds_saved": 5.0}
  entries = [start, entry(0, draw=4.0, reward=1.0, host=0.5, evaluate=7.0),
             start | {"step": 1, "seconds": 6.0, "compile_seconds": 1.0,
                      "compile_seconds_saved": 9.0},
             entry(1, draw=3.0, score=0.5, update=2.5, host=0.5, save=1.0)]
  # Four devices lost 40 device-seconds, so 10 seconds; 12 of 56 seconds were of use.
  stage(folder, entries, "TPU v5p", lost=40.0)
  used = timing.usage(folder)
  assert used == timing.Usage(
      start=26.0, compile=13.0, saved=14.0,
      phases={"draw": 7.0, "reward": 1.0, "score": 0.5, "update": 2.5, "host": 1.0, "evaluate": 7.0,
              "save": 1.0, "move": 0.0}, lost=10.0, goodput=pytest.approx(12 / 56),
      # 4 devices at 459 TFLOP/s for 12 s could have made 2.2e16.
      mfu=pytest.approx(6e14 / (4 * 459e12 * 12)))
  stage(folder, entries, "cpu", lost=40.0)
  assert timing.usage(folder) == used._replace(mfu=None)
  # Written by an earlier version: the seconds are not split.
  stage(folder, [{"step": 0, "seconds": 3.0}, {"step": 0, "seconds": 1.0, "tokens_per_second": 5}],
        "cpu")
  assert timing.usage(folder) is None
