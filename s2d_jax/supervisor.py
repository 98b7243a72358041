"""A parent for each process of a run on several hosts, which outlives an abort of that process.

Process 0 serves JAX's coordination. Where it is killed, JAX aborts the others before any Python of
theirs runs. Their parents then print who is gone, and exit with the code on which a launcher starts
the run again.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Sequence

RETRY = 75  # as hosts.RETRY, whose module imports JAX: the parent has no use for it
# Environment variable of the child: the pipe to the parent, and the parent's number.
_PIPE = "S2D_JAX_SUPERVISOR"
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CONNECT_SECONDS = 10.0


def is_needed(argv: Sequence[str]) -> bool:
  """Whether the flags of `s2d-jax run` ask for one process of several, and no parent watches it."""
  # A process further up may have a parent of this kind: children inherit the environment.
  return "--distributed" in argv and parent() != os.getppid()


def command_line(argv: Sequence[str]) -> list[str]:
  """The command line of `s2d-jax run` with these flags."""
  return [sys.executable, "-m", "s2d_jax.main", *argv]


def parent() -> int | None:
  """The number of the process that supervises this one; None where there is none."""
  number = os.environ.get(_PIPE, "").partition(",")[2]
  return int(number) if number else None


def tell(process: int, coordinator: str, host: str) -> None:
  """Tells the parent, where there is one, this process's number and where process 0 is.

  Args:
    coordinator: the address of JAX's coordination service, such as "10.0.0.2:8476".
    host: the name of its host.
  """
  pipe = os.environ.get(_PIPE, "").partition(",")[0]
  if pipe:
    text = json.dumps({"process": process, "coordinator": coordinator, "host": host})
    # Without a reader the parent is gone, which ends this process in a moment.
    with contextlib.suppress(OSError):
      os.write(int(pipe), text.encode() + b"\n")


def run(words: Sequence[str]) -> int:
  """Runs a command in a child, to which signals are forwarded; returns its exit code.

  Returns RETRY where the child was aborted and process 0 is gone, and 128 + N after signal N.
  """
  reader, writer = os.pipe()
  os.set_blocking(reader, False)
  child = subprocess.Popen(
      words, pass_fds=[writer], env=os.environ | {_PIPE: f"{writer},{os.getpid()}"})
  os.close(writer)

  def forward(number: int, frame: types.FrameType | None) -> None:
    child.send_signal(number)

  for number in _FORWARDED:
    # One that was ignored at the start, as by nohup, stays ignored.
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, forward)
  code = child.wait()
  if code >= 0:
    return code
  name = signal.Signals(-code).name
  # The last line, because the process may have joined anew.
  lines = _everything(reader).decode().splitlines()
  facts = json.loads(lines[-1]) if lines else {}
  if -code == signal.SIGABRT and facts and not _answers(facts["coordinator"]):
    _say(f"process {facts['process']} on {socket.gethostname()} was aborted, because process 0 on "
         f"{facts['host']} is gone: start all processes again; the same command goes on from what "
         "was saved.")
    return RETRY
  cause = ", as by the system where memory is short" if -code == signal.SIGKILL else ""
  process = f"process {facts['process']}" if facts else "this process"
  _say(f"{process} on {socket.gethostname()} was ended by {name}{cause}; the same command goes on "
       "from what was saved.")
  return 128 - code


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
  print(f"s2d_jax: {sentence}", file=sys.stderr, flush=True)
