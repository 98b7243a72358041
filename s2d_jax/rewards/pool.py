"""Checkers of answers in several processes with limits; none of them can hold up the caller.

Each process is a `worker`: it checks one text at a time, in a copy of itself that ends where it
exceeds a limit. Such a text gets a reward of 0, and the other texts theirs.
"""

import atexit
import collections
import contextlib
import json
import logging
import os
import queue
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import NamedTuple

from s2d_jax.rewards import worker

_START_SECONDS = 120.0  # imports of the checker, on a busy machine
_GRACE_SECONDS = 30.0   # beyond a check's own limit, for a process that answers no more
_MOST_PROCESSES = 8     # where no number is given
_ENTRY = "from s2d_jax.rewards import worker; worker.serve()"
# Ctrl-C and a preemption are this process's to answer, also while a worker still starts.
_IGNORING_STOPS = ["/bin/sh", "-c", 'trap "" INT TERM HUP; exec "$@"', "sh"]


class Unchecked(NamedTuple):
  """Numbers of checks without a verdict, whose answers got a reward of 0."""
  check_timeouts: int   # they ran out of seconds or CPU seconds
  check_failures: int   # they raised, ran out of memory or ended their process


_LOCK = threading.Lock()  # of the counts
_unchecked: collections.Counter[str] = collections.Counter()


def unchecked() -> Unchecked:
  """The checks without a verdict of all pools of this process since it started."""
  return Unchecked(_unchecked["timeouts"], _unchecked["failures"])


class Pool:
  """Calls `check(problem, text) -> float` in limited processes; `close` ends them.

  Attributes:
    timeouts: number of checks that ran out of seconds or CPU seconds.
    failures: number of checks that raised, ran out of memory or ended their process.
  """

  def __init__(self, check: str, seconds: float, cpu_seconds: float, memory_bytes: int,
               processes: int | None = None) -> None:
    """Starts the processes, and does not wait until they are ready.

    Args:
      check: "module:function"; this process does not import it. A function `prepare` of the
        module is called once before the first check.
      seconds: wall-clock time of one check; cpu_seconds: CPU time of one check.
      memory_bytes: address space of a check's process.
      processes: None: one for each CPU of this process, at most 8.
    """
    # The checker may be a module that only this process's path finds. A salted hash would order
    # the terms of an expression differently in every process, and verdicts have to repeat.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    self._environment = dict(os.environ, PYTHONPATH=path, PYTHONHASHSEED="0")
    limits = [str(limit) for limit in (seconds, cpu_seconds, memory_bytes)]
    self._command = [*_IGNORING_STOPS, sys.executable, "-c", _ENTRY, *check.split(":"), *limits]
    self._seconds = seconds
    self._closing = False
    self._jobs: queue.SimpleQueue[tuple[Future, str] | None] = queue.SimpleQueue()
    self.timeouts = 0
    self.failures = 0
    count = processes or min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    self._processes = [self._started() for _ in range(count)]
    # Daemons: an interpreter that exits does not wait for a check.
    self._threads = [threading.Thread(target=self._serve, args=(k,), daemon=True)
                     for k in range(count)]
    for thread in self._threads:
      thread.start()
    atexit.register(self.close)

  def submit(self, problem: Mapping[str, object], text: str) -> Future[float]:
    """A future of the checker's reward; 0.0 where the check fails or exceeds a limit.

    The future raises RuntimeError where no process could be started.
    """
    future: Future[float] = Future()
    self._jobs.put((future, json.dumps([problem, text])))
    return future

  def __call__(self, problem: Mapping[str, object], text: str) -> float:
    """As `submit`, and waits for the reward."""
    return self.submit(problem, text).result()

  def close(self) -> None:
    """Ends the processes, also one that is stuck; checks that wait are cancelled."""
    atexit.unregister(self.close)
    self._closing = True
    with contextlib.suppress(queue.Empty):
      while job := self._jobs.get_nowait():
        job[0].cancel()
    for _ in self._threads:
      self._jobs.put(None)
    for process in self._processes:
      process.kill()
    for thread in self._threads:
      thread.join()
    for process in self._processes:
      _end(process)

  def _started(self) -> subprocess.Popen:
    return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            env=self._environment, bufsize=0)

  def _serve(self, k: int) -> None:
    """Gives jobs to process k, one at a time, until there is None."""
    ready = False
    while (job := self._jobs.get()) is not None:
      future, line = job
      if not future.set_running_or_notify_cancel():
        continue
      ready = ready or _line(self._processes[k], _START_SECONDS) == b"ready\n"
      if not ready:
        future.set_exception(RuntimeError("a reward worker did not start: see its error above this "
                                          "one."))
        continue
      found = self._verdict(self._processes[k], line)
      if found is None and self._closing:
        future.set_exception(RuntimeError("the pool of reward workers was closed."))
        continue
      if found is None:
        # The process itself has ended, as when the machine is out of memory.
        ready = False
        _end(self._processes[k])
        self._processes[k] = self._started()
        found = worker.FAILED
      future.set_result(found if isinstance(found, float) else self._counted(found))

  def _verdict(self, process: subprocess.Popen, line: str) -> float | str | None:
    """A process's verdict on a line, or worker.TIME or worker.FAILED; None where it has ended."""
    try:
      process.stdin.write(line.encode() + b"\n")
    except (BrokenPipeError, ValueError):
      return None
    found = _line(process, self._seconds + _GRACE_SECONDS)
    return json.loads(found) if found else None

  def _counted(self, why: str) -> float:
    """The reward of a check without a verdict, which is counted and warned of."""
    with _LOCK:
      name = "timeouts" if why == worker.TIME else "failures"
      _unchecked[name] += 1
      self.timeouts += name == "timeouts"
      self.failures += name == "failures"
      count = self.timeouts + self.failures
      # At 1, 2, 4, 8 and so on: a policy may write thousands of such answers.
      if count & (count - 1) == 0:
        logging.warning("A reward's check was ended: %d ran out of time and %d failed so far.",
                        self.timeouts, self.failures)
    return 0.0


def _end(process: subprocess.Popen) -> None:
  """Ends a process, also one that is stuck."""
  process.kill()
  process.wait()
  process.stdin.close()
  process.stdout.close()


def _line(process: subprocess.Popen, seconds: float) -> bytes:
  """The next line of a process's answers; empty where it has ended or is late."""
  with selectors.DefaultSelector() as selector:
    selector.register(process.stdout, selectors.EVENT_READ)
    return process.stdout.readline() if selector.select(seconds) else b""
