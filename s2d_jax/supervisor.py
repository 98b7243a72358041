"""The first moments of `s2d-jax run`, and a parent for each process of a run on several hosts.

Importing JAX and the other libraries takes seconds, in which a signal has to end the run as later
ones do. So this module imports none of them, and `begin` comes before they are imported.

Process 0 serves JAX's coordination. Where it is killed, JAX aborts the others before any Python of
theirs runs. Their parents outlive that. They leave out JAX's stack trace, print who is gone, and
exit with the code on which a launcher starts the run again.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import tty
import types
from collections.abc import Sequence

RETRY = 75  # as hosts.RETRY, whose module imports JAX: the parent has no use for it
# A scheduler's, Ctrl-C, and that of a terminal or a connection that was closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Environment variable of the child: the pipe to the parent, and the parent's number.
_PIPE = "S2D_JAX_SUPERVISOR"
_CONNECT_SECONDS = 10.0
_LAST_SECONDS = 5.0  # for what a child has printed, where its own children still hold the stream


def _take_parent() -> tuple[int, int] | None:
  """(the pipe to the parent, the parent's number), which no child of this process inherits."""
  pipe, _, number = os.environ.pop(_PIPE, "").partition(",")
  # Another program may stand between this process and the parent, which ended its own pipe.
  if not number or int(number) != os.getppid():
    return None
  os.set_inheritable(int(pipe), False)
  return int(pipe), int(number)


_parent = _take_parent()


def begin(argv: Sequence[str]) -> None:
  """Call it first in a process of `s2d-jax run`, before libraries are imported.

  A signal then ends the process with a sentence, until `stops.watch` takes signals over. With
  --distributed among the flags a child does the work, and this function does not return.
  """
  for number in SIGNALS:
    # One that was ignored at the start, as by nohup, stays ignored.
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, _end)
  if _parent is not None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # `run` has blocked them
  elif "--distributed" in argv:
    sys.exit(run(command_line(argv), debug="--debug" in argv))


def _end(number: int, frame: types.FrameType | None) -> None:
  # The signal may have come within a call of print, which cannot begin again inside itself.
  with contextlib.suppress(OSError):
    os.write(2, f"s2d_jax: {signal.Signals(number).name}: nothing is unsaved, and the same command "
             "goes on from what was saved.\n".encode())
  os._exit(RETRY)


def command_line(argv: Sequence[str]) -> list[str]:
  """The command line of `s2d-jax run` with these flags, and this interpreter's, such as -u."""
  options = []
  words = sys.argv[1:]
  if sys.orig_argv[len(sys.orig_argv) - len(words):] == words:
    options = sys.orig_argv[1:len(sys.orig_argv) - len(sys.argv)]
  # Of "-m module" and of "-c code" only the second word stands in sys.argv.
  if options[-1:] in (["-m"], ["-c"]):
    options.pop()
  return [sys.executable, *options, "-m", "s2d_jax.main", *argv]


def parent() -> int | None:
  """The number of the process that supervises this one; None where there is none."""
  return None if _parent is None else _parent[1]


def tell(process: int, coordinator: str, host: str = "") -> None:
  """Tells the parent, where there is one, this process's number and where process 0 is.

  Args:
    coordinator: the address of JAX's coordination service, such as "10.0.0.2:8476".
    host: the name of its host; by default that of the address.
  """
  if _parent is not None:
    host = host or coordinator.rpartition(":")[0]
    text = json.dumps({"process": process, "coordinator": coordinator, "host": host})
    # Without a reader the parent is gone, which ends this process in a moment.
    with contextlib.suppress(OSError):
      os.write(_parent[0], text.encode() + b"\n")


def run(words: Sequence[str], debug: bool = False) -> int:
  """Runs a command in a child, to which signals are forwarded; returns its exit code.

  Returns RETRY where the child was aborted and process 0 is gone, and 128 + N after signal N.

  Args:
    words: its command line; the program calls `begin`.
    debug: whether JAX's stack trace is printed.
  """
  reader, writer = os.pipe()
  os.set_blocking(reader, False)
  errors = None if debug else _Errors()
  # They wait until this process forwards them, and the child until it can act on them.
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
  child = subprocess.Popen(
      words, pass_fds=[writer], env=os.environ | {_PIPE: f"{writer},{os.getpid()}"},
      stderr=errors and errors.writer)
  os.close(writer)

  def forward(number: int, frame: types.FrameType | None) -> None:
    child.send_signal(number)

  for number in SIGNALS:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, forward)
  signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
  if errors:
    errors.start()
  code = child.wait()
  reason = errors.finish() if errors else ""
  if code >= 0:
    return code
  # The last line, because the process may have joined anew.
  lines = _everything(reader).decode().splitlines()
  return _explain(-code, json.loads(lines[-1]) if lines else {}, reason)


def _explain(number: int, facts: dict, reason: str) -> int:
  """Prints why a signal ended the child; returns the exit code.

  Args:
    facts: those of `tell`, or none; reason: the message of an abort by JAX, or "".
  """
  here = socket.gethostname()
  if number == signal.SIGABRT and facts and not _answers(facts["coordinator"]):
    _say(f"process {facts['process']} on {here} was aborted, because process 0 on "
         f"{facts['host']} is gone: start all processes again; the same command goes on from what "
         "was saved.")
    return RETRY
  cause = ", as by the system where memory is short" if number == signal.SIGKILL else ""
  cause += f" ({reason})" if reason else ""
  process = f"process {facts['process']}" if facts else "this process"
  _say(f"{process} on {here} was ended by {signal.Signals(number).name}{cause}; the same command "
       "goes on from what was saved.")
  return 128 + number


class _Errors:
  """The child's standard error, which is printed at once, without JAX's stack trace.

  Attributes:
    writer: the child's end; a terminal where this process has one.
  """

  def __init__(self) -> None:
    if os.isatty(2):
      self._reader, self.writer = os.openpty()
      # Bytes pass unchanged, and a progress bar has the width of the window.
      tty.setraw(self.writer)
      termios.tcsetwinsize(self.writer, termios.tcgetwinsize(2))
    else:
      self._reader, self.writer = os.pipe()
    self._filter = Filter()
    self._thread = threading.Thread(target=self._read, daemon=True)

  def start(self) -> None:
    """Begins to print; call it once the child has its end."""
    os.close(self.writer)
    self._thread.start()

  def finish(self) -> str:
    """Prints what is left of a child that has ended; returns the message of JAX's abort, or ""."""
    self._thread.join(_LAST_SECONDS)
    return self._filter.message

  def _read(self) -> None:
    data = b"-"
    while data:
      try:
        data = os.read(self._reader, 2**16)
      except OSError:  # the end of a terminal
        data = b""
      text = self._filter.feed(data) if data else self._filter.end()
      # Without a terminal the child must still get its lines written.
      with contextlib.suppress(OSError):
        while text:
          text = text[os.write(2, text):]


# A message of JAX's coordination. One may follow a progress bar, within a line.
_MESSAGE = (rb"[EF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (?:coordination_service_agent\.cc|client\.h)"
            rb":\d+\] ")
_TRACE = b"*** Check failure stack trace"
_FRAME = re.compile(rb" +@ +(?:0x[0-9a-f]+ |\(nil\))")
# Bytes pass in pieces: lines, or parts of them before such a message.
_PIECES = re.compile(rb"(?<=[\n\r])|(?=" + _MESSAGE + rb")")
# How a message, and a line of a trace, may begin at the end of what has come. A line of a program
# that begins alike waits for its end.
_BEGUN = re.compile(rb"(?:[EF](?:\d{0,3}|\d{4}(?: [\d:. ]*[\w.]*:?\d*\]?)?))?$")
_BEGUN_LINE = re.compile(rb"\*{1,3}(?: .*)?$| +(?:@.*)?$")


class Filter:
  """Drops JAX's fatal messages, and the stack traces of every library in C++, from bytes.

  Attributes:
    message: the first line of the fatal message that was dropped; "" where there was none.
  """

  def __init__(self) -> None:
    self.message = ""
    self._waiting = b""        # it may become what is dropped
    self._within_line = False  # the last byte that passed did not end a line
    self._fatal = False        # within a fatal message, which has several lines

  def feed(self, data: bytes) -> bytes:
    """Takes bytes; returns those, of these and of the waiting ones, that can be printed now."""
    *pieces, last = [piece for piece in _PIECES.split(self._waiting + data) if piece]
    self._waiting = b""
    printed = b"".join(piece for piece in pieces if self._passes(piece))
    if not last.endswith((b"\n", b"\r")):
      whole = self._fatal or not self._within_line and _BEGUN_LINE.match(last)
      begin = 0 if whole or re.match(_MESSAGE, last) else _BEGUN.search(last).start()
      last, self._waiting = last[:begin], last[begin:]
    return printed + (last if last and self._passes(last) else b"")

  def end(self) -> bytes:
    """Returns those bytes that still wait, once no others come."""
    return self._waiting if self._waiting and self._passes(self._waiting) else b""

  def _passes(self, piece: bytes) -> bool:
    if found := re.match(_MESSAGE, piece):
      self._within_line = False
      if piece.startswith(b"F"):
        self._fatal = True
        self.message = piece[found.end():].decode(errors="replace").strip()
      return False
    if not self._within_line:
      if piece.startswith(_TRACE):
        self._fatal = False
        return False
      if self._fatal or _FRAME.match(piece):
        return False
    self._within_line = not piece.endswith((b"\n", b"\r"))
    return True


def _everything(reader: int) -> bytes:
  """All bytes in a pipe whose writers have ended."""
  with open(reader, "rb") as file:
    return file.read() or b""


def _answers(address: str) -> bool:
  """Whether a server listens at "host:port"."""
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
  except OSError:
    return False
  return True


def _say(sentence: str) -> None:
  with contextlib.suppress(OSError):  # a closed terminal
    print(f"s2d_jax: {sentence}", file=sys.stderr, flush=True)
