"""A process that runs a checker in limited copies of itself, one for each answer.

It imports the checker, and then reads one JSON line (problem, text) at a time. A forked copy
checks the text within its limits, and the process answers with one line. A copy that is stuck or
takes too much memory ends, and the process is ready for the next text at once: nothing has to
start anew. Every copy begins in one state, so that no verdict depends on the texts before it.
"""

import gc
import importlib
import json
import logging
import os
import resource
import selectors
import signal
import sys
from collections.abc import Callable, Mapping

Check = Callable[[Mapping[str, object], str], float]
# Answers of a line without a verdict: the reason.
TIME, FAILED = "time", "failed"


def serve() -> None:
  """Answers lines of standard input until it closes; arguments: module, name and three limits."""
  module, name, seconds, cpu_seconds, memory_bytes = sys.argv[1:]
  # A checker's own prints must not be taken for answers, so they go to standard error.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  imported = importlib.import_module(module)
  # Checkers warn about every text. The trace of a failed start is still shown.
  logging.disable(logging.CRITICAL)
  getattr(imported, "prepare", lambda: None)()
  # Ctrl-C and a preemption are the parent's to answer: a reward must not become 0 by them. The
  # parent has them ignored already, and a library may have changed that.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  # A collection in a copy would write to every object, and so copy all memory.
  gc.collect()
  gc.freeze()
  print("ready", file=answers, flush=True)
  for line in sys.stdin:
    problem, text = json.loads(line)
    found = _checked(getattr(imported, name), problem, text, float(seconds), float(cpu_seconds),
                     int(memory_bytes))
    print(json.dumps(found), file=answers, flush=True)


def _checked(check: Check, problem: Mapping[str, object], text: str, seconds: float,
             cpu_seconds: float, memory_bytes: int) -> float | str:
  """The verdict of a copy of this process, or TIME or FAILED."""
  reading, writing = os.pipe()
  child = os.fork()
  if child == 0:
    # Of the parent's files only this pipe and standard error: a copy that outlives its parent must
    # not keep the parent's answers open.
    os.dup2(writing, 0)
    os.closerange(3, 64)
    # A copy that outlives its parent is ended by the clock, also where it only waits.
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    _check_and_exit(check, problem, text, cpu_seconds, memory_bytes, pipe=0)
  os.close(writing)
  with selectors.DefaultSelector() as selector, os.fdopen(reading, "rb") as pipe:
    selector.register(pipe, selectors.EVENT_READ)
    # A verdict, or the end of the pipe where the copy has ended without one.
    late = not selector.select(seconds)
    if late:
      os.kill(child, signal.SIGKILL)
    line = b"" if late else pipe.read()
  _, status = os.waitpid(child, 0)
  if late or os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU):
    return TIME
  return json.loads(line) if line else FAILED


def _check_and_exit(check: Check, problem: Mapping[str, object], text: str, cpu_seconds: float,
                    memory_bytes: int, pipe: int) -> None:
  """Sets the limits, sends the verdict through a pipe and ends the process."""
  try:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # The timer counts the process's CPU time from now, and ends it wherever it is.
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 2, hard))
    os.write(pipe, json.dumps(float(check(problem, text))).encode())
  # Whatever a checker trips over in a model's text is counted by the parent, not raised.
  finally:
    os._exit(0)
