"""Checkers in worker processes that can be killed: limits on seconds, CPU seconds and memory.

A worker reads one JSON line (problem, text) at a time and answers with one number. One that is
stuck, killed or out of memory costs its text a reward of 0 and is replaced; it never blocks.
"""

import collections
import contextlib
import importlib
import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
import time

START_SECONDS = 120.0  # imports of the checker, on a busy machine
ENTRY = "from s2d_jax.rewards import pool; pool.work()"


class Pool:
  """`workers` processes that each run `check(problem, text) -> float`, a module-level function.

  seconds: wall-clock time of one check; cpu_seconds: CPU time of one check; memory_bytes: address
  space of a worker. `timeouts` counts checks that ran out of time, `failures` those that raised or
  ended their worker. Use it as a context manager.
  """

  def __init__(self, check, workers, seconds, cpu_seconds, memory_bytes):
    if workers < 1:
      raise ValueError(f"a reward pool of {workers} workers scores nothing: ask for at least 1.")
    self._command = [sys.executable, "-c", ENTRY, check.__module__, check.__qualname__]
    self._command += [str(int(cpu_seconds)), str(int(memory_bytes))]
    self._seconds = seconds
    self._workers = []
    self.timeouts = self.failures = 0
    try:
      self._workers = [Worker(self._command) for _ in range(workers)]
      for worker in self._workers:
        worker.wait_until_ready()
    except BaseException:
      self.close()
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Ends every worker, stuck ones included."""
    for worker in self._workers:
      worker.kill()
    self._workers = []

  def score(self, problems, texts):
    """Rewards, one float per text, in order."""
    rewards = [0.0] * len(texts)
    todo = collections.deque(enumerate(zip(problems, texts, strict=True)))
    busy = {}  # place in self._workers -> (index of the text, deadline)
    while todo or busy:
      for place in range(len(self._workers)):
        if todo and place not in busy:
          index, pair = todo.popleft()
          self._workers[place].send(pair)
          busy[place] = index, time.monotonic() + self._seconds
      first = min(deadline for _, deadline in busy.values())
      answered = self._wait(busy, max(first - time.monotonic(), 0.0))
      now = time.monotonic()  # read once: replacing a worker takes time the others must not pay for
      for place, (index, deadline) in list(busy.items()):
        late = place not in answered and now >= deadline
        if place in answered or late:
          rewards[index] = self._settle(place, late)
          del busy[place]
    return rewards

  def _wait(self, busy, seconds):
    with selectors.DefaultSelector() as selector:
      for place in busy:
        selector.register(self._workers[place].answers, selectors.EVENT_READ, place)
      return {key.data for key, _ in selector.select(seconds)}

  def _settle(self, place, late):
    """The reward of a worker that answered, died or is late; a worker lost is replaced."""
    line = b"" if late else self._workers[place].answers.readline()
    if line:
      value = json.loads(line)
      self.failures += value is None
      return value or 0.0
    spent = self._workers[place].kill()
    self.timeouts += late or spent
    self.failures += not (late or spent)
    self._workers[place] = Worker(self._command)
    self._workers[place].wait_until_ready()
    return 0.0


class Worker:
  """One process; `answers` is the stream its lines come back on."""

  def __init__(self, command):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path))
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
    )
    self.answers = self._process.stdout

  def wait_until_ready(self):
    """Returns once the checker is imported; RuntimeError, with its trace on stderr, if it fails."""
    with selectors.DefaultSelector() as selector:
      selector.register(self.answers, selectors.EVENT_READ)
      if not selector.select(START_SECONDS) or self.answers.readline() != b"ready\n":
        self.kill()
        raise RuntimeError("a reward worker did not start: see its error above this one.")

  def send(self, pair):
    """Hands over one (problem, text); a worker that has died is noticed when it is read from."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(json.dumps(pair).encode() + b"\n")

  def kill(self):
    """Ends the process; True where it had already ended by running out of CPU seconds."""
    if self._process.poll() is None:
      self._process.kill()
    code = self._process.wait()
    self._process.stdin.close()
    self.answers.close()
    return code == -signal.SIGXCPU


def work():
  """A worker's life: import the checker, set the limits, answer lines until the pipe closes."""
  module, name, cpu_seconds, memory_bytes = sys.argv[1:]
  check = getattr(importlib.import_module(module), name)
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what a checker prints must not be taken for an answer
  logging.disable(logging.CRITICAL)  # checkers warn about every text; the start-up trace stays
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
  resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  print("ready", file=answers, flush=True)
  _, hard = resource.getrlimit(resource.RLIMIT_CPU)
  for line in sys.stdin:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + int(cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    problem, text = json.loads(line)
    try:
      value = float(check(problem, text))
    except Exception:  # noqa: BLE001 - whatever a checker trips over in a model's text is counted
      value = None
    print(json.dumps(value), file=answers, flush=True)
