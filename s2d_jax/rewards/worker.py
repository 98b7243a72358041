"""A checker in a process of its own: limited in seconds, CPU seconds and memory, and killable.

The process reads one JSON line (problem, text) at a time and answers with one number. Where it is
stuck, killed or out of memory, its text gets a reward of 0 and a new process takes its place.
"""

import importlib
import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping

# Imports of the checker, on a busy machine.
_START_SECONDS = 120.0
_ENTRY = "from s2d_jax.rewards import worker; worker.serve()"


class Worker:
  """Calls `check(problem, text) -> float` in a limited process; `close` ends it.

  Attributes:
    timeouts: number of checks that ran out of seconds or CPU seconds.
    failures: number of checks that raised or ended their process.
  """

  def __init__(self, check: str, seconds: float, cpu_seconds: int, memory_bytes: int) -> None:
    """Starts the process.

    Args:
      check: "module:function"; this process does not import it.
      seconds: wall-clock time of one check; cpu_seconds: CPU time of one check.
      memory_bytes: address space of the process.

    Raises:
      RuntimeError: the checker cannot be imported; its trace is on standard error.
    """
    self._command = [sys.executable, "-c", _ENTRY, *check.split(":"), str(cpu_seconds),
                     str(memory_bytes)]
    self._seconds = seconds
    self.timeouts = 0
    self.failures = 0
    self._start()

  def __call__(self, problem: Mapping[str, str], text: str) -> float:
    """The checker's reward; 0.0 where it fails or exceeds a limit.

    Raises:
      RuntimeError: a new process was needed and did not start.
    """
    try:
      self._process.stdin.write(json.dumps([problem, text]).encode() + b"\n")
    except BrokenPipeError:
      # The process has died, which its empty answer says below.
      pass
    line = self._line(self._seconds)
    if line:
      value = json.loads(line)
      self.failures += value is None
      return value or 0.0
    late = line is None
    # A process that ran out of CPU seconds has been ended by this signal.
    timeout = late or self._process.wait() == -signal.SIGXCPU
    self.timeouts += timeout
    self.failures += not timeout
    logging.warning("A reward's check was ended: %d ran out of time and %d failed so far.",
                    self.timeouts, self.failures)
    self.close()
    self._start()
    return 0.0

  def close(self) -> None:
    """Ends the process, also one that is stuck."""
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()

  def _start(self) -> None:
    """Starts a process and waits until it has imported the checker."""
    # The checker may be a module that only this process's path finds.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     env=dict(os.environ, PYTHONPATH=path), bufsize=0)
    if self._line(_START_SECONDS) != b"ready\n":
      self.close()
      raise RuntimeError("a reward worker did not start: see its error above this one.")

  def _line(self, seconds: float) -> bytes | None:
    """The next line of the process's answers; empty where it has ended, None where it is late."""
    with selectors.DefaultSelector() as selector:
      selector.register(self._process.stdout, selectors.EVENT_READ)
      return self._process.stdout.readline() if selector.select(seconds) else None


def serve() -> None:
  """The worker process: imports the checker, sets the limits, answers until its input closes."""
  module, name, cpu_seconds, memory_bytes = sys.argv[1:]
  check = getattr(importlib.import_module(module), name)
  # A checker's own prints must not be taken for answers, so they go to standard error.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  # Checkers warn about every text. The trace of a failed start is still shown.
  logging.disable(logging.CRITICAL)
  # Ctrl-C and a preemption are the parent's to answer: a reward must not become 0 by them.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  # Set after the imports, which may map more memory than a check needs.
  resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  print("ready", file=answers, flush=True)
  _, hard = resource.getrlimit(resource.RLIMIT_CPU)
  for line in sys.stdin:
    # The limit counts from the start of the process, so each check moves it. It is in whole
    # seconds, so one is added.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + int(cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    problem, text = json.loads(line)
    try:
      value = float(check(problem, text))
    # Whatever a checker trips over in a model's text is counted, not raised.
    except Exception:  # noqa: BLE001
      value = None
    print(json.dumps(value), file=answers, flush=True)
