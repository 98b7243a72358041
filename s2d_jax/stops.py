"""Early ends of a run: by a signal, or by a process of the run that fails or vanishes.

Threads watch, because the main thread may be inside a compilation, or wait for another process.

- The first SIGTERM, SIGHUP or Ctrl-C, where unsaved work is under way (`deferred`): `stop()`
  becomes true on all processes at one call, and the caller saves. Elsewhere it exits at once.
- A second one, a second later, exits at once everywhere.
- A process that fails, or says nothing for LOST_SECONDS, ends all others with a sentence.

JAX's coordinator is in process 0. Where that process is killed, JAX ends the others within a
second by SIGABRT, which `supervisor` turns into a sentence. So process 0 ends last in all other
cases.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from jax._src import distributed  # its client has no public name (jax 0.10 to 0.12)

from s2d_jax import hosts, supervisor

LOST_SECONDS = 60.0    # without a word of a process, until the others end
START_SECONDS = 300.0  # until all processes must have been started
_TICK_SECONDS = 1.0
_ONE_SIGNAL_SECONDS = 1.0  # signals that come within it are one
_GRACE_SECONDS = 10.0  # in which processes may end by themselves when another one has failed
_GOES_ON = "the same command goes on from what was saved"
# Messages of a collective whose other end is gone.
_CONNECTION = re.compile("UNAVAILABLE|[Cc]onnection|[Ss]ocket|[Gg]loo|NCCL|DEADLINE")


class _Peer(NamedTuple):
  """The state of a process, which it publishes once a second."""
  alive: int                    # counts up while the process lives
  host: str
  # Calls of `stop` before the process heard of a signal, where it saves first; else None.
  calls: int | None = None
  signal: str = ""              # that signal, and where it came
  code: int | None = None       # with which it ends; None while it runs
  reason: str = ""              # why it ends, where the code is not 0


class Watch:
  """The signals of this process, and the other processes of the run."""

  def __init__(self) -> None:
    self._process, self._processes = 0, 1
    self._parent = supervisor.parent()
    self._changed = threading.Condition()  # guards all of the following
    self._deferred = False
    self._first_signal: float | None = None  # when it came to this process
    self._calls = 0                  # of `stop`
    self._stop_at: int | None = None  # the call of `stop` at which all processes stop
    self._me = _Peer(0, socket.gethostname())
    self._peers: dict[int, _Peer] = {}
    self._silent: dict[int, int] = {}  # ticks without a sign of life of each process
    self._no_answer = 0              # ticks since the coordinator has answered
    self._failed = 0                 # ticks since another process failed
    self._publishing = threading.Lock()
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
      # The others may have called more often: a thread agrees with them on the next call of all.
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
  def running(self, outcome: Callable[[BaseException], tuple[int, str]],
              joins: bool) -> Iterator[None]:
    """`watch`. Signals need the main thread; from another one only processes are watched."""
    before = {}
    if threading.current_thread() is threading.main_thread():
      # The system writes a signal's number to the pipe, whatever the main thread does.
      former = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
      # One that was ignored at the start, as by nohup, stays ignored.
      before = {number: signal.signal(number, lambda *_: None) for number in supervisor.SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN}
    threads = [threading.Thread(target=self._watch_signals, daemon=True)]
    threads[0].start()
    stopped = False
    try:
      if joins:
        connect()
      if distributed.global_state.client is not None:
        # Not by `hosts.share`, which starts the devices.
        self._process = distributed.global_state.process_id
        self._processes = distributed.global_state.num_processes
        self._silent = dict.fromkeys(range(self._processes), 0)
        # At once: process 0 may be killed before it has published the name of its host.
        supervisor.tell(self._process, distributed.global_state.coordinator_address)
        threads.append(threading.Thread(target=self._watch_processes, daemon=True))
        threads[1].start()
      try:
        yield
      except BaseException as error:
        stopped = isinstance(error, SystemExit) and error.code == hosts.RETRY
        if self._processes > 1:
          self._fail(error, *outcome(error))
        raise
      if self._processes > 1:
        self._leave(0, "")
    finally:
      self._closed.set()
      os.write(self._writer, b"\0")  # wakes the thread up
      for thread in threads:
        thread.join()
      if before:
        signal.set_wakeup_fd(former)
      # After a stop a further signal must not end a process that has saved with another code.
      for number, handler in before.items() if not stopped else ():
        signal.signal(number, handler)
      os.close(self._reader)
      os.close(self._writer)

  def _fail(self, error: BaseException, code: int, reason: str) -> None:
    """Prints why this process ends, and `_leave`."""
    if isinstance(error, jax.errors.JaxRuntimeError) and _CONNECTION.search(str(error)):
      # Another process is gone, and a thread will name it: until then, this one says nothing.
      time.sleep(LOST_SECONDS + 2 * _GRACE_SECONDS)
    if not isinstance(error, SystemExit):  # which has printed its sentence
      _say(reason)
    self._leave(code, reason)

  def _leave(self, code: int, reason: str) -> None:
    """Publishes that this process ends, waits until all others have done so, and exits.

    The interpreter's own end would wait in JAX's barrier, which knows no process that failed.
    """
    with self._changed:
      self._me = self._me._replace(code=code, reason=reason)
    self._publish()
    while not self._have_codes(self._peers):
      time.sleep(_TICK_SECONDS / 4)
    if self._process == 0:
      time.sleep(3 * _TICK_SECONDS)  # the coordinator ends last
    _flush()
    os._exit(code)

  def _watch_signals(self) -> None:
    """The work of the thread that calls no other process, until `running` ends."""
    while not self._closed.is_set():
      # A launcher that starts the run again must not meet the process of a killed parent.
      if self._parent is not None and os.getppid() != self._parent:
        self._exit(hosts.RETRY, f"process {self._parent}, which supervised process "
                   f"{self._process} on {self._me.host}, was killed; {_GOES_ON}")
      if select.select([self._reader], [], [], _TICK_SECONDS)[0]:
        for number in os.read(self._reader, 64):
          if number in supervisor.SIGNALS:
            self._signalled(signal.Signals(number))
      elif self._processes > 1:
        self._no_answer += 1
        if self._no_answer * _TICK_SECONDS >= LOST_SECONDS:
          host = self._peers[0].host if 0 in self._peers else "an unknown host"
          self._exit(hosts.RETRY, f"process 0 on {host} has not answered for {LOST_SECONDS:.0f} s, "
                     f"so it or the network is gone: start all processes again; {_GOES_ON}")

  def _watch_processes(self) -> None:
    """The work of the thread that exchanges states with the other processes."""
    while not self._closed.is_set():
      try:
        self._publish()
        heard = self._hear()
      # The other thread counts how long the coordinator does not answer.
      except jax.errors.JaxRuntimeError:
        heard = None
      if heard is not None:
        self._no_answer = 0
        self._compare(heard)
      self._closed.wait(_TICK_SECONDS)

  def _signalled(self, number: signal.Signals) -> None:
    """Acts on a signal to this process."""
    now = time.monotonic()
    if self._first_signal is None:
      self._first_signal = now
    # Schedulers may signal a process twice at once, or every process of a run that stops already.
    if now - self._first_signal > _ONE_SIGNAL_SECONDS:
      _say(f"a second signal, {number.name}, ended process {self._process} on {self._me.host} "
           f"without saving; {_GOES_ON}.")
      _flush()
      os._exit(128 + number)
    if not self._me.signal:
      self._begin_stop(f"{number.name} came to process {self._process} on {self._me.host}")

  def _begin_stop(self, name: str) -> None:
    """Lets `stop` become true, or ends the process where nothing is unsaved."""
    with self._changed:
      waits = self._deferred
      self._me = self._me._replace(calls=self._calls if waits else None, signal=name)
    if not waits and self._me.code is None:
      self._exit(hosts.RETRY, f"{name}: nothing is unsaved, and {_GOES_ON}")
    elif waits:
      _say(f"{name}: the run saves, then exits with code {hosts.RETRY}. A second signal exits at "
           "once, without saving.")

  def _compare(self, heard: dict[int, _Peer]) -> None:
    """Acts on the states of all processes."""
    for process in self._silent:
      # A process that has ended publishes no more.
      finished = process in heard and heard[process].code is not None
      silent = heard.get(process) == self._peers.get(process) and not finished
      self._silent[process] = self._silent[process] + 1 if silent else 0
    if 0 in heard and 0 not in self._peers:
      supervisor.tell(self._process, distributed.global_state.coordinator_address, heard[0].host)
    self._peers = heard
    self._check_finished()
    self._check_silent()
    self._agree_on_stop()

  def _check_finished(self) -> None:
    """Ends this process where another one has failed, or has stopped, and this one goes on."""
    if self._me.code is not None:
      return
    for process, peer in self._peers.items():
      # After an agreed stop each process ends once it has saved.
      if not peer.code or peer.code == hosts.RETRY and self._stop_at is not None:
        continue
      # It took part in no save, so a stop of this process can save nothing either.
      alone = peer.calls is None and self._me.signal
      self._failed += 1
      if alone or self._failed * _TICK_SECONDS >= _GRACE_SECONDS:
        self._exit(peer.code, f"process {process} on {peer.host} ended with code {peer.code} "
                   f"({peer.reason}); {_GOES_ON}")
      return

  def _check_silent(self) -> None:
    """Ends this process where another one has vanished."""
    for process, ticks in self._silent.items():
      if ticks * _TICK_SECONDS < LOST_SECONDS:
        continue
      host = f" on {self._peers[process].host}" if process in self._peers else ""
      # A launcher starts all processes again, as after a stop.
      self._exit(hosts.RETRY, f"process {process}{host} has been silent for {LOST_SECONDS:.0f} s, "
                 f"so it or its network is gone: start all processes again; {_GOES_ON}")

  def _agree_on_stop(self) -> None:
    """Chooses the call of `stop` at which all processes stop, once all have heard of a signal."""
    signals = [peer.signal for peer in self._peers.values() if peer.signal]
    if not signals:
      return
    if not self._me.signal:
      self._begin_stop(signals[0])
    with self._changed:
      calls = [peer.calls for peer in self._peers.values()]
      # Every process computes this once from equal numbers: a number of calls never changes.
      if self._stop_at is None and len(calls) == self._processes and None not in calls:
        self._stop_at = 1 + max(calls)
        self._changed.notify_all()

  def _publish(self) -> None:
    """Publishes this process's state. One thread at a time, so that no older state comes last."""
    with self._publishing:
      with self._changed:
        self._me = self._me._replace(alive=self._me.alive + 1)
        text = json.dumps(self._me)
      # Without an answer the state may still arrive.
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.key_value_set(f"watch/{self._process}", text,
                                                      allow_overwrite=True)

  def _hear(self) -> dict[int, _Peer]:
    """The states that all processes have published."""
    found = distributed.global_state.client.key_value_dir_get("watch")
    return {int(key.rpartition("/")[2]): _Peer(*json.loads(text)) for key, text in found}

  def _exit(self, code: int, sentence: str) -> None:
    """Ends the process from a thread, whatever the main thread does."""
    if self._me.code is None:
      _say(f"{sentence}.")
      with self._changed:
        self._me = self._me._replace(code=code, reason=sentence)
    code = self._me.code
    if self._processes > 1:
      # In a thread, because the coordinator may not answer.
      last = threading.Thread(target=self._publish, daemon=True)
      last.start()
      last.join(_GRACE_SECONDS)
      self._wait_as_coordinator()
    _flush()
    os._exit(code)

  def _have_codes(self, peers: Mapping[int, _Peer]) -> bool:
    """Whether every process has published a code."""
    return len(peers) == self._processes and all(p.code is not None for p in peers.values())

  def _wait_as_coordinator(self) -> None:
    """In process 0: until the others have ended too, or had the time to."""
    deadline = time.monotonic() + 2 * _GRACE_SECONDS
    while self._process == 0 and time.monotonic() < deadline:
      time.sleep(_TICK_SECONDS)
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        if self._have_codes(self._hear()):
          time.sleep(3 * _TICK_SECONDS)
          return


_current: Watch | None = None  # signals are a process's, so one watch at a time


@contextlib.contextmanager
def watch(outcome: Callable[[BaseException], tuple[int, str]],
          joins: bool = False) -> Iterator[None]:
  """Watches signals and processes within; for a command, which may end its process.

  With several processes this ends the process itself, once the others end too.

  Args:
    outcome: (exit code, sentence) of what ends the block, which the other processes get.
    joins: first join the other processes of the run, by `connect`.
  """
  global _current
  _current = Watch()
  try:
    with _current.running(outcome, joins):
      yield
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
  """`hosts.join`, which ends the process where not all others start in time."""
  seconds = START_SECONDS

  def late() -> None:
    _say(f"on {socket.gethostname()}: not all processes were started within {seconds:.0f} s. Start "
         "all of them with one command, and look at the hosts without this sentence.")
    _flush()
    os._exit(1)

  timer = threading.Timer(seconds, late)
  timer.daemon = True
  timer.start()
  try:
    # JAX waits longer, because it ends the process with a message of its own.
    hosts.join(int(seconds) + 60)
  finally:
    timer.cancel()


def _say(sentence: str) -> None:
  with contextlib.suppress(OSError):  # a closed terminal
    print(f"s2d_jax: {sentence}", file=sys.stderr, flush=True)


def _flush() -> None:
  # os._exit runs nothing else of the interpreter.
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(ValueError, OSError):
      stream.flush()
