"""Undisturbed runs of the tiny job, and what starts further ones beside them."""

import multiprocessing
import os
import pathlib
import socket
import time
from concurrent import futures
from typing import NamedTuple

from tests import interpreter
from tests.end_to_end import job

RUN_SECONDS = 900
MESHES = {1: "1,1,1", 2: "1,2,1"}  # by the number of processes


class Reference(NamedTuple):
  """A run that nothing disturbed."""
  workdir: pathlib.Path
  first_file: float         # seconds from its start to its first file
  seconds: dict[str, float]   # of each folder, in order of their ends


class World(NamedTuple):
  """The folder and the undisturbed runs with which all others are compared."""
  folder: pathlib.Path      # holds the bases and every work folder
  references: dict[int, Reference]  # by the number of processes
  arm: str = "every_row"


def pool_of(workers):
  """A pool of processes. Threads would share one fork server, which is not safe."""
  return futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def environment(store):
  """The environment of a run: with `store` it stores the programs that it compiles.

  A process that is killed while it stores a program would leave half a file to all others.
  """
  limit = "-1" if store else str(2**62)  # bytes of a program that is stored at least
  return os.environ | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": limit}


def launch(world, workdir, processes, *flags, store=False):
  """Starts the job; returns its processes, `interpreter.Running` each."""
  words = ["-m", "tests.end_to_end.job", workdir, world.folder / "bases",
           "--arm", world.arm, "--mesh", MESHES[processes], *flags]
  if processes == 1:
    return [interpreter.start(*words, env=environment(store))]
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [interpreter.start(*words, "--processes", processes, "--process", i, "--port", port,
                            env=environment(store)) for i in range(processes)]


def finish(running, seconds=RUN_SECONDS):
  """(exit status, what was printed) of processes that are left alone; the worst status counts."""
  done = [process.wait(seconds) for process in running]
  failed = [one for one in done if one.returncode] or done
  return failed[0].returncode, failed[0].stdout + failed[0].stderr


def reference(world, processes, times=2):
  """Runs the job some times, undisturbed; the second run finds all programs stored.

  Raises:
    RuntimeError: a run failed, or two undisturbed runs differ.
  """
  workdirs = [world.folder / f"undisturbed-{processes}-{i}" for i in range(times)]
  for workdir in workdirs:
    started = time.time()
    status, printed = finish(launch(world, workdir, processes, store=True))
    if status:
      raise RuntimeError(f"an undisturbed run failed:\n{printed}")
  last = workdirs[-1]
  if differing(workdirs[0], last):
    raise RuntimeError(f"two undisturbed runs differ: {differing(workdirs[0], last)}")
  ends = sorted((path.stat().st_mtime, path.parent.name)
                for path in last.glob("*/manifest.json"))
  first = min(path.stat().st_mtime for path in last.rglob("*") if path.is_file())
  begins = [first, *(end for end, _ in ends)]
  return Reference(last, first - started,
                   {name: end - begin for (end, name), begin in zip(ends, begins, strict=False)})


def differing(workdir, other):
  """The files of two work folders that are not alike, those of clocks left out."""
  one, two = job.facts(workdir), job.facts(other)
  return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
