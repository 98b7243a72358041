"""Measures the parts one after another, each with a limit, and prints a table.

  benchmarks/accelerator.sh [--results=FOLDER] [--parts=NAME,NAME] [--seconds=480] [--smoke]

Parts that need the same memory and programs share a process. A part that fails, or is stopped at
its limit, leaves what it has found, and the next one begins in a new process. Parts that cannot
start before the end of the seconds are named as not started. The results of parts that an earlier
run has measured on such a device stay, each with the revision, jax and date of its own run.
"""

import argparse
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

from benchmarks.accelerator import install, plan, store, table
from benchmarks.accelerator.plan import Part
from benchmarks.accelerator.worker import Worker

SMOKE_PATIENCE = 4  # limits are for an accelerator's host, and tests run on a laptop's busy cores


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Runs everything and returns the path of the results."""
  # Everything counts, the installation too.
  start = time.monotonic()
  options = _options(argv)
  if options.serve:
    from benchmarks.accelerator import parts  # jax, which the other process must not start
    return parts.serve(options.smoke)
  chosen = plan.chosen(options.parts)
  install.packages(min(plan.PIP, options.seconds))
  signal.signal(signal.SIGTERM, _stop)
  with tempfile.TemporaryDirectory() as scratch:
    run = Run(pathlib.Path(scratch), options, start + options.seconds - plan.END)
    try:
      for part in chosen:
        run.measure(part)
        run.keep(sys.argv[1:] if argv is None else argv)
    finally:
      run.stop()
      print(table.of(store.read(run.path)), flush=True)
      print(run.path, flush=True)
  return run.path


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="benchmarks/accelerator.sh",
                                   description=__doc__.splitlines()[0])
  parser.add_argument("--results", type=pathlib.Path, help="where the JSON goes",
                      default=install.ROOT / "benchmarks" / "results")
  parser.add_argument("--parts", default="", help="only these, with commas between")
  parser.add_argument("--seconds", type=float,
                      default=float(os.environ.get("SECONDS_LEFT", plan.SECONDS)),
                      help="of the whole command; also the environment's SECONDS_LEFT")
  parser.add_argument("--cache", type=pathlib.Path,
                      help="a folder of compiled programs that stays; by default one for this run")
  parser.add_argument("--smoke", action="store_true", help="tiny sizes: a test that all parts run")
  parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  for name in filter(None, options.parts.split(",")):
    if name not in {part.name for part in plan.PARTS}:
      names = ", ".join(part.name for part in plan.PARTS)
      parser.error(f"there is no part {name!r}: choose from {names}.")
  return options


def _stop(number: int, frame: FrameType | None) -> None:
  raise SystemExit(f"stopped by signal {number}")


class Run:
  """One call of the command: its results, its end, and the process that measures."""

  def __init__(self, scratch: pathlib.Path, options: argparse.Namespace, deadline: float) -> None:
    self.scratch = scratch
    self.options = options
    self.deadline = deadline  # of time.monotonic
    self.path = scratch / "accelerator.json"
    self.worker: Worker | None = None
    self.last: Part | None = None  # that the worker has measured

  def measure(self, part: Part) -> None:
    """Measures a part and stores how that ended."""
    seconds = self.deadline - time.monotonic()
    if seconds < part.least:
      print(f"{part.name}: not started", flush=True)
      # Results of an earlier run stay.
      if not store.read(self.path)["parts"].get(part.name, {}).get("results"):
        store.update(self.path, part.name, status=f"not started: {max(seconds, 0):.0f} s were left",
                     results={})
      return
    limit = min(part.limit * (SMOKE_PATIENCE if self.options.smoke else 1), seconds)
    start = time.monotonic()
    store.update(self.path, part.name, status="not finished: the whole run was stopped", results={})
    worker = self._worker_for(part, start)
    status = worker.measure(part.name, self.path, limit)
    found = store.read(self.path)
    fields = store.origin(found)
    # The error of a rival that has ended is in the output of a part that goes on without it.
    left_out = found["parts"][part.name]["results"].get(table.LEFT_OUT)
    if status != table.FINISHED or left_out:
      fields["output"] = worker.tail()
    if status != table.FINISHED:
      self.stop()
    wall = time.monotonic() - start
    store.update(self.path, part.name, status=status, seconds=wall, expected=part.expected,
                 **fields)
    print(f"{part.name}: {status}, {wall:.0f} s", *fields.get("output", ()), sep="\n  ", flush=True)

  def _worker_for(self, part: Part, start: float) -> Worker:
    """The process of the last part where this one can share it, or a new one."""
    last = self.last
    self.last = part
    if self.worker is not None and not part.fresh and (
        last.environment, last.cache) == (part.environment, part.cache):
      return self.worker
    self.stop()
    programs = (self.options.cache or self.scratch / "cache") / part.cache
    # A smoke measures no start.
    if part.cold and not self.options.smoke:
      shutil.rmtree(programs, ignore_errors=True)
    programs.mkdir(parents=True, exist_ok=True)
    environment = part.environment | {
        "PYTHONUNBUFFERED": "1", "STARTED": str(start), "TF_CPP_MIN_LOG_LEVEL": "2",
        "TEXTS": str(self.scratch / "texts"), "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    arguments = []
    if self.options.smoke:
      arguments = ["--smoke"]
      # Its programs run for microseconds: compiling them well would take most of its time.
      environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    self.worker = Worker(arguments, environment)
    return self.worker

  def stop(self) -> None:
    """Ends the process that measures."""
    if self.worker is not None:
      self.worker.stop()
    self.worker = None

  def keep(self, arguments: Sequence[str]) -> None:
    """Moves the file to the results, once the first part has said which device this is."""
    if self.path.parent == self.options.results:
      return
    found = store.read(self.path)
    device = found.get("machine", {}).get("device", "unknown").lower().replace(" ", "-")
    stored = self.options.results / f"accelerator-{device}.json"
    before = store.read(stored)
    # Parts of an earlier run stay unless they are measured again.
    parts = {name: store.origin(before) | part for name, part in before["parts"].items()
             if name in {part.name for part in plan.PARTS}}
    for name, part in found["parts"].items():
      if part["results"] or name not in parts:
        parts[name] = part
    store.write(stored, before | found | {
        "command": " ".join(["benchmarks/accelerator.sh", *arguments]), "parts": parts})
    self.path = stored


if __name__ == "__main__":
  main()
