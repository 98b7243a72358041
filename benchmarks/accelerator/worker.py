"""A process that measures parts one after another, and can be stopped at any time."""

import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from benchmarks.accelerator.install import ROOT
from benchmarks.accelerator.table import FINISHED

TAIL = 15  # lines of a failed part's output that are kept


class Worker:
  """A process that measures the parts that it is asked for."""

  def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Starts `python -m benchmarks.accelerator --serve` with further arguments."""
    # Messages go to a file, because a pipe that is not read would stop the process.
    self.messages = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    self.process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.accelerator", "--serve", *arguments], cwd=ROOT,
        env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=self.messages, start_new_session=True, text=True)
    self.begin = 0  # of the messages of the part that runs

  def measure(self, name: str, path: pathlib.Path, seconds: float) -> str:
    """Measures a part into the file `path`, and returns how that ended.

    Unless that is FINISHED, the process has ended too.
    """
    # The process writes at the offset that it shares with this file, so that is not moved.
    self.begin = os.fstat(self.messages.fileno()).st_size
    try:
      self.process.stdin.write(json.dumps([name, str(path)]) + "\n")
      self.process.stdin.flush()
    except BrokenPipeError:  # it ended after its last part, and says so below
      pass
    if not select.select([self.process.stdout], [], [], seconds)[0]:
      self._kill()
      return f"not finished: stopped after {seconds:.0f} s"
    if self.process.stdout.readline():
      return FINISHED
    status = self.process.wait()
    self._kill()
    return f"failed with exit status {status}"

  def tail(self) -> list[str]:
    """The last lines of what the last part has written, without the checkout's own place."""
    self.messages.seek(self.begin)
    return self.messages.read().replace(f"{ROOT}/", "").splitlines()[-TAIL:]

  def stop(self) -> None:
    """Ends the process, after which there is no tail."""
    self._kill()
    self.process.stdout.close()
    self.messages.close()
    try:
      self.process.stdin.close()
    except BrokenPipeError:  # a request that it has not read
      pass

  def _kill(self) -> None:
    """Ends the process and the rivals that it has started."""
    try:
      os.killpg(self.process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    self.process.wait()
