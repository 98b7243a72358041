"""Early ends of a run: by a signal, or by a process of the run that fails or vanishes.

A thread watches, because the main thread may be inside a compilation, or wait for another process.

- The first SIGTERM, SIGHUP or Ctrl-C, where unsaved work is under way (`deferred`): `stop()`
  becomes true on all processes at one call, and the caller saves. Elsewhere it exits at once.
- A second one, a second later, exits at once everywhere.
- A process that fails, or says nothing for LOST_SECONDS, ends all others with a sentence.

JAX's coordinator is in process 0. Where that process is killed, JAX ends the others within a
second, by SIGABRT and with a message of JAX. An error of process 0 reaches the others first.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax._src import distributed  # its client has no public name (jax 0.10 to 0.12)

from s2d_jax import hosts

LOST_SECONDS = 60.0    # without a word of a process, until the others end
START_SECONDS = 300.0  # until all processes must have been started
_TICK_SECONDS = 1.0
_ONE_SIGNAL_SECONDS = 1.0  # signals that come within it are one
_GRACE_SECONDS = 10.0  # in which processes may end by themselves when another one has failed
# A scheduler's, Ctrl-C, and that of a terminal or a connection that was closed.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_GOES_ON = "the same command goes on from what was saved"


class _Peer(NamedTuple):
  """The state of a process, which it publishes once a second."""
  alive: int                     # counts up while the process lives
  host: str
  # Calls of `stop` before the process heard of a signal; None: it has heard of none.
  calls: int | None = None
  signal: str = ""              # that signal, and where it came
  code: int | None = None       # with which it ends; None while it runs
  reason: str = ""              # why it ends, where the code is not 0


class Watch:
  """The signals of this process, and the other processes of the run."""

  def __init__(self) -> None:
    self._process, self._processes = hosts.share()
    self._changed = threading.Condition()
    self._deferred = False
    self._first_signal: float | None = None  # when it came to this process
    self._calls = 0                  # of `stop`
    self._stop_at: int | None = None  # the call of `stop` at which all processes stop
    self._me = _Peer(0, socket.gethostname())
    self._peers: dict[int, _Peer] = {}
    self._silent = dict.fromkeys(range(self._processes), 0.0)  # seconds without a new count
    self._failed_seconds = 0.0       # since another process failed
    self._closed = threading.Event()
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)

  def stop(self) -> bool:
    """Whether to save and stop now. With several processes all must call it equally often."""
    with self._changed:
      self._calls += 1
      if self._processes == 1:
        return bool(self._me.signal)
      if self._me.calls is None:
        return False
      # The others may have called more often: the thread agrees with them on the next call of all.
      self._changed.wait_for(lambda: self._stop_at is not None)
      return self._calls >= self._stop_at

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Within, a signal waits for the next `stop()`, because there is work to save."""
    with self._changed:
      self._deferred = True
    try:
      yield
    finally:
      with self._changed:
        self._deferred = False
    # A signal that no call of `stop` has seen: everything within is saved.
    if self._me.signal:
      raise SystemExit(hosts.RETRY)

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Watches within. Signals need the main thread; from another one only processes are watched."""
    before = {}
    if threading.current_thread() is threading.main_thread():
      # The system writes a signal's number to the pipe, whatever the main thread does.
      former = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
      # One that was ignored at the start, as by nohup, stays ignored.
      before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN}
    thread = threading.Thread(target=self._watch, daemon=True)
    thread.start()
    try:
      yield
    finally:
      self._closed.set()
      os.write(self._writer, b"\0")  # wakes the thread up
      thread.join()
      for number, handler in before.items():
        signal.signal(number, handler)
      if before:
        signal.set_wakeup_fd(former)
      os.close(self._reader)
      os.close(self._writer)

  def leave(self, code: int, reason: str) -> None:
    """Tells the others that this process ends, which they may do too."""
    if self._processes > 1:
      self._me = self._me._replace(code=code, reason=reason)
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._tell()
      self._wait_for_others()

  def fail(self, error: BaseException, code: int, reason: str) -> None:
    """`leave`; with several processes and an error, this one exits here with the sentence `reason`.

    JAX's end of a process waits for the others, which wait for this one.
    """
    if self._processes == 1:
      return
    if isinstance(error, jax.errors.JaxRuntimeError):
      # Perhaps because another process is gone: then the thread ends this one, and names that.
      time.sleep(LOST_SECONDS + 2 * _GRACE_SECONDS)
    if code != hosts.RETRY and not isinstance(error, SystemExit):  # which has printed its sentence
      _say(reason)
    self.leave(code, reason)
    if code != hosts.RETRY:
      _flush()
      os._exit(code)

  def _wait_for_others(self) -> None:
    """Where this process has JAX's coordinator: until the others know that it ends."""
    deadline = time.monotonic() + 2 * _GRACE_SECONDS
    while self._process == 0 and time.monotonic() < deadline:
      # Also after the last answer, because a process has some work left when it says that it ends.
      time.sleep(_TICK_SECONDS)
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        finished = [peer for peer in self._hear().values() if peer.code is not None]
        if len(finished) == self._processes:
          time.sleep(_TICK_SECONDS)
          return

  def _watch(self) -> None:
    """The thread's work, until `running` ends."""
    last = 0.0
    while not self._closed.is_set():
      wait = _TICK_SECONDS if last else 0.0  # the first exchange is at once
      if select.select([self._reader], [], [], wait)[0]:
        for number in os.read(self._reader, 64):
          if number in _SIGNALS:
            self._signalled(signal.Signals(number))
      if time.monotonic() - last >= _TICK_SECONDS:
        last = time.monotonic()
        if self._processes > 1:
          self._compare()

  def _signalled(self, number: signal.Signals) -> None:
    """Acts on a signal to this process."""
    now = time.monotonic()
    if self._first_signal is None:
      self._first_signal = now
    # Schedulers may signal a process twice at once, or every process of a run that stops already.
    if now - self._first_signal > _ONE_SIGNAL_SECONDS:
      self._exit(128 + number, f"a second signal, {number.name}, ended process {self._process} on "
                 f"{self._me.host} without saving; {_GOES_ON}")
    if not self._me.signal:
      self._begin_stop(f"{number.name} came to process {self._process} on {self._me.host}")

  def _begin_stop(self, name: str) -> None:
    """Lets `stop` become true, or ends the process where nothing is unsaved."""
    with self._changed:
      waits = self._deferred
      self._me = self._me._replace(calls=self._calls, signal=name)
    if not waits:
      self._exit(hosts.RETRY, f"{name}: nothing is unsaved, and {_GOES_ON}")
    _say(f"{name}: the run saves, then exits with code {hosts.RETRY}. A second signal exits at "
         "once, without saving.")

  def _compare(self) -> None:
    """One exchange with the other processes, and what follows from it."""
    self._me = self._me._replace(alive=self._me.alive + 1)
    heard: dict[int, _Peer] = {}
    # Without an answer of the coordinator, all others count as silent.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._tell()
      heard = self._hear()
    for process in self._silent:
      peer = self._peers.get(process)
      silent = heard.get(process) is None or heard[process] == peer
      self._silent[process] = self._silent[process] + _TICK_SECONDS if silent else 0.0
    self._peers |= heard
    self._check_failed()
    self._check_silent()
    self._agree_on_stop()

  def _check_failed(self) -> None:
    """Ends this process where another one has failed, or stopped, and this one goes on."""
    for process, peer in self._peers.items():
      # After an agreed stop each process ends once it has saved.
      stops_too = peer.code == hosts.RETRY and self._me.signal
      if peer.code and not stops_too and self._me.code is None:
        self._failed_seconds += _TICK_SECONDS
        if self._failed_seconds >= _GRACE_SECONDS:
          self._exit(peer.code, f"process {process} on {peer.host} ended with code {peer.code} "
                     f"({peer.reason}); {_GOES_ON}")
        return

  def _check_silent(self) -> None:
    """Ends this process where another one has vanished."""
    for process, seconds in self._silent.items():
      peer = self._peers.get(process)
      if seconds < LOST_SECONDS or peer is not None and peer.code is not None:
        continue
      host = "" if peer is None else f" on {peer.host}"
      # A launcher starts all processes again, as after a stop.
      self._exit(hosts.RETRY, f"process {process}{host} has been silent for {seconds:.0f} s, so "
                 f"it or its network is gone: start all processes again; {_GOES_ON}")

  def _agree_on_stop(self) -> None:
    """Chooses the call of `stop` at which all processes stop, once all have heard of a signal."""
    signals = [peer.signal for peer in self._peers.values() if peer.signal]
    if not signals or self._me.code is not None:
      return
    if not self._me.signal:
      self._begin_stop(signals[0])
    with self._changed:
      if self._stop_at is None and len(self._peers) == self._processes:
        # Every process computes this once from equal numbers: a number of calls never changes. One
        # that ended before the signal has none.
        counted = [p.calls for p in self._peers.values() if p.calls is not None or p.code is None]
        if None not in counted:
          self._stop_at = 1 + max(counted)
          self._changed.notify_all()

  def _tell(self) -> None:
    distributed.global_state.client.key_value_set(
        f"watch/{self._process}", json.dumps(self._me), allow_overwrite=True)

  def _hear(self) -> dict[int, _Peer]:
    found = distributed.global_state.client.key_value_dir_get("watch")
    return {int(key.rpartition("/")[2]): _Peer(*json.loads(text)) for key, text in found}

  def _exit(self, code: int, sentence: str) -> None:
    """Ends the process from the thread, whatever the main thread does."""
    if self._me.code is None:
      _say(f"{sentence}.")
      self._me = self._me._replace(code=code, reason=sentence)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      if self._processes > 1:
        self._tell()
        self._wait_for_others()
    _flush()
    os._exit(code)


_current: Watch | None = None  # signals are a process's, so one watch at a time


@contextlib.contextmanager
def watch(outcome: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
  """Watches signals and processes within; for a command, which may end its process.

  Args:
    outcome: (exit code, sentence) of what ends the block, which the other processes get.
  """
  global _current
  _current = Watch()
  try:
    with _current.running():
      try:
        yield
      except BaseException as error:
        _current.fail(error, *outcome(error))
        raise
      _current.leave(0, "")
  finally:
    _current = None


def deferred() -> contextlib.AbstractContextManager:
  """`Watch.deferred` of the current watch; without one, nothing."""
  return contextlib.nullcontext() if _current is None else _current.deferred()


@contextlib.contextmanager
def requests() -> Iterator[Callable[[], bool]]:
  """Yields `Watch.stop` of the current watch; without one, `hosts.stop_signal`."""
  if _current is not None:
    yield _current.stop
    return
  with hosts.stop_signal() as stop:
    yield stop


def connect() -> None:
  """`jax.distributed.initialize`, which ends the process where not all others start in time."""
  # The watch agrees on stops; JAX's own service would take the signals away from it.
  jax.config.update("jax_enable_preemption_service", False)
  seconds = START_SECONDS

  def late() -> None:
    _say(f"on {socket.gethostname()}: not all processes were started within {seconds:.0f} s. Start "
         "all of them with one command, and look at the hosts without this sentence.")
    _flush()
    os._exit(1)

  timer = threading.Timer(seconds, late)
  timer.daemon = True
  timer.start()
  # JAX waits longer, because it ends the process with a message of its own.
  jax.distributed.initialize(initialization_timeout=int(seconds) + 60)
  timer.cancel()


def _say(sentence: str) -> None:
  print(f"s2d_jax: {sentence}", file=sys.stderr, flush=True)


def _flush() -> None:
  # os._exit runs nothing else of the interpreter.
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(ValueError, OSError):
      stream.flush()
