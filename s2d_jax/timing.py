"""Where a stage's seconds go: a clock by phase, a trace of some steps, and a summary of both.

The phases of a step:

  draw: the sampler, from its first program until the host has the last token; less `reward`.
  reward: the host is in the task's reward. The device decodes other rows meanwhile.
  score: the actor's log-probabilities, until the host has them.
  update: the optimizer updates, until the host has their metrics.
  evaluate: the evaluations between steps. save: logs and checkpoints.
  move: arrays that wait in the host's memory go to the devices or back (`placement`).
  host: all else, such as batches and the ledger.

A moment belongs to one phase, so the phases of a step add up to its wall time. Nothing waits for
the device for the clock's sake: each phase ends where the host needs the phase's result.
"""

import collections
import contextlib
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from s2d_jax import chips, files, hosts, manifest, metrics
from s2d_jax.keys import Key

STEP = ("draw", "reward", "score", "update", "host")
BETWEEN = ("evaluate", "save", "move")
PHASES = (*STEP, *BETWEEN)


class Clock:
  """Wall seconds by phase since the last reading, and the compilations since the start."""

  def __init__(self, compiled: Callable[[], metrics.Compilations]) -> None:
    """Starts the clock, in the phase `host`; `compiled` is as `metrics.compilations` yields it."""
    self.compiled = compiled
    self.counts: collections.Counter[str] = collections.Counter()  # since the last reading
    self._seconds: collections.Counter[str] = collections.Counter()
    self._open = ["host"]
    self._since = time.monotonic()

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts seconds to a phase, less those of phases that are opened within it."""
    self._count()
    self._open.append(name)
    try:
      # A profile shows the phases by these names.
      with jax.profiler.TraceAnnotation(name):
        yield
    finally:
      self._count()
      self._open.pop()

  def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose calls count to a phase."""
    def counted(*args: Any) -> Any:
      with self.phase(name):
        return function(*args)
    return counted

  def read(self) -> dict[str, float]:
    """Seconds by phase since the last reading."""
    self._count()
    found = dict(self._seconds)
    self._seconds.clear()
    return found

  def read_counts(self) -> dict[str, int]:
    """The counts since the last reading; {} where nothing was counted."""
    found = dict(self.counts)
    self.counts.clear()
    return found

  def _count(self) -> None:
    """Counts the seconds since the last call to the innermost open phase."""
    now = time.monotonic()
    self._seconds[self._open[-1]] += now - self._since
    self._since = now


@contextlib.contextmanager
def clock() -> Iterator[Clock]:
  """Yields a Clock that has just started."""
  with metrics.compilations() as compiled:
    yield Clock(compiled)


def start_entry(step: int, reading: Clock) -> dict[str, float]:
  """The entry of the timing log for a stage's start: loading, compiling, restoring."""
  compiled = reading.compiled()
  return {"step": step, "seconds": sum(reading.read().values()),
          "programs_compiled": compiled.count, "compile_seconds": compiled.seconds,
          "compile_seconds_saved": compiled.saved, **reading.read_counts()}


def step_entry(step: int, reading: Clock) -> dict[str, float]:
  """The entry of the timing log for a step: its seconds, whole and by phase."""
  seconds = reading.read()
  return {"step": step, "seconds": sum(seconds.values()),
          **{f"{phase}_seconds": seconds.get(phase, 0.0) for phase in PHASES},
          **reading.read_counts()}


def steps_of(text: str) -> range:
  """The steps that config.profile names: "10:13" is 10, 11 and 12, and "" is an empty range."""
  first, _, end = text.partition(":")
  return range(int(first), int(end)) if text else range(0)


# The doctor compares the steps with those of each stage.
PROFILE_KEY = Key(lambda text: text == "" or (re.fullmatch(r"[0-9]+:[0-9]+", text) is not None
                                              and len(steps_of(text)) > 0),
                  "give the first step and the one after the last, such as '10:13', or '' for no "
                  "trace", hashed=False)


@contextlib.contextmanager
def trace(folder: epath.Path, steps: range) -> Iterator[Callable[[int], None]]:
  """Writes a trace of some steps by JAX's profiler to `folder`/profile; the first host writes.

  A trace that an error or a stop cuts short is written as far as it goes.

  Yields:
    A function to be called with each step as the step begins.
  """
  # One writer per folder; the other hosts of a run do the same in these steps.
  traced = steps if hosts.leader() else range(0)
  with contextlib.ExitStack() as running:
    active = False
    # A resumed run may begin within the range, so each step is compared with all of it.
    def begin(step: int) -> None:
      nonlocal active
      if (step in traced) == active:
        return
      active = not active
      if active:
        running.enter_context(_stored_profile(folder / "profile"))
      else:
        running.close()
    yield begin


def profiler(folder: str) -> contextlib.AbstractContextManager[None]:
  """JAX's profiler, which writes to a local folder when it is closed."""
  options = jax.profiler.ProfileOptions()
  # Events of every Python call would slow what is measured; phases have names already.
  options.python_tracer_level = 0
  return jax.profiler.trace(folder, profiler_options=options)


@contextlib.contextmanager
def _stored_profile(folder: epath.Path) -> Iterator[None]:
  """JAX's profiler while open; its files are then in `folder`."""
  # The profiler writes local files only, and a work folder may be in an object store.
  with tempfile.TemporaryDirectory() as scratch:
    try:
      with profiler(scratch):
        yield
    finally:
      for path in pathlib.Path(scratch).rglob("*"):
        if path.is_file():
          files.write(folder / path.relative_to(scratch), path.read_bytes())


class Usage(NamedTuple):
  """A finished stage's wall seconds, and the shares of them that were of use."""
  start: float              # loading, restoring, compiling, of every start
  compile: float            # of compiling, threads added up
  saved: float              # compilation that the persistent cache saved
  phases: dict[str, float]  # of PHASES
  lost: float               # done again after kills
  goodput: float            # the seconds of STEP, of all seconds
  mfu: float | None         # the ledger's FLOPs, of the devices' peak in the seconds of STEP


def usage(folder: epath.Path) -> Usage | None:
  """The Usage of a finished stage; None where an earlier version wrote its log."""
  entries = metrics.read(folder, "timing")
  steps = [entry for entry in entries if "host_seconds" in entry]
  if not steps:
    return None
  starts = [entry for entry in entries if "compile_seconds" in entry]
  # Earlier versions had no moves.
  phases = {phase: sum(entry.get(f"{phase}_seconds", 0.0) for entry in steps) for phase in PHASES}
  recorded = manifest.load(folder)
  totals = files.read_json(folder / "ledger.json")
  devices = math.prod(recorded["mesh"].values())
  lost = totals["device_seconds_lost"] / devices
  useful = sum(phases[phase] for phase in STEP)
  chip = chips.of_kind(recorded["device"])
  return Usage(
      sum(entry["seconds"] for entry in starts), sum(entry["compile_seconds"] for entry in starts),
      sum(entry["compile_seconds_saved"] for entry in starts), phases, lost,
      goodput=useful / (sum(entry["seconds"] for entry in entries) + lost),
      mfu=chip and totals["flops"] / (useful * devices * chip.flops))
