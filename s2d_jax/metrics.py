"""Logs that survive a kill, event files for TensorBoard, a progress bar, a count of compilations.

A log is a folder of JSON-lines parts. Each part is named for its first step and written whole, just
before the checkpoint that ends it. Resuming at step s deletes the parts that start at s or later.
A killed and resumed run thus leaves the bytes of an undisturbed one. No file is appended to.
"""

import collections
import contextlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from tqdm import tqdm

from s2d_jax import checksums, files, hosts, json_objects
from s2d_jax.errors import InputError


class Log:
  """Entries of one kind (`metrics`, `ledger`, `timing`, `samples`) of one stage.

  Attributes:
    rows: every entry, those of earlier processes first.
  """

  def __init__(self, folder: epath.PathLike, name: str, step: int, tensorboard: bool = False,
               every_step: bool = False) -> None:
    """Opens the log at `step`, dropping every part that starts at it or later.

    Args:
      tensorboard: whether every part is also an event file in the folder `tensorboard`.
      every_step: whether each step before `step` has an entry.

    Raises:
      InputError: such an entry is missing, or `read` refuses a line.
    """
    self._folder = epath.Path(folder) / name
    self._events = epath.Path(folder) / "tensorboard"
    self._has_events = tensorboard
    self._start = step
    self._new: list[dict] = []
    _cut(self._folder, step)
    if tensorboard:
      _cut(self._events, step)
    # No host may read before the leader has cut.
    hosts.barrier(f"{folder}/{name}")
    self.rows = read(folder, name)
    # The checksums would name a part that is gone, but for a folder that has lost them too.
    missing = set(range(step)) - {row.get("step") for row in self.rows} if every_step else ()
    if missing:
      saved = epath.Path(folder) / "checkpoints" / str(step)
      raise InputError(
          f"{self._folder} has no entry of step {min(missing)}, and the checkpoint of step {step} "
          f"counts on it: put its files back, or delete {saved}, and the same command goes on from "
          "the checkpoint before that.")

  def add(self, entry: Mapping[str, Any]) -> None:
    """Appends one entry, a dict of plain values, arrays or numbers."""
    self._new.append(files.plain(entry))
    self.rows.append(self._new[-1])

  def flush(self, step: int) -> list[str]:
    """Writes the entries since the last flush as one part; the next part starts at `step`.

    Returns:
      The paths of the files of the part, within the log's stage; none without entries.
    """
    written = []
    # A part without entries would be a file that a resumed run does not write.
    if self._new and hosts.leader():
      text = "".join(json.dumps(entry, sort_keys=True, allow_nan=False) + "\n"
                     for entry in self._new)
      files.write(self._folder / f"{self._start:08d}.jsonl", text)
      if self._has_events:
        _write_events(self._events, self._start, self._new)
    if self._new:
      written.append(f"{self._folder.name}/{self._start:08d}.jsonl")
    self._start = step
    self._new = []
    return written


def read(folder: epath.PathLike, name: str) -> list[dict]:
  """Every entry of a log, in order; an absent log is empty.

  Raises:
    InputError: a line is damaged; names file and line.
    WriteError: a part cannot be read, so nothing is known of it.
  """
  # Without its whole log a stage's ledger is wrong, so the stage is what has to be made again.
  remedy = f"put the file back, or delete {folder}, and the command of its run makes it again"
  # Parts sort by their first step, which is written with leading zeros.
  return [json_objects.parse(f"{part} line {number}", line, remedy)
          for part in files.finished_files(epath.Path(folder) / name)
          for number, line in enumerate(checksums.read(part).splitlines(), 1)]


def _write_events(folder: epath.Path, start: int, entries: Sequence[dict]) -> None:
  """Writes one event file for one part: every number of every entry against its step."""
  # The writer appends, which an object store cannot: it writes beside, and the whole is copied.
  try:
    with tempfile.TemporaryDirectory() as scratch:
      _append_events(scratch, entries)
      events = next(pathlib.Path(scratch).iterdir())
      data = events.read_bytes()
  except OSError as error:
    # None until a file could be written there.
    target = tempfile.tempdir or "the folder of temporary files"
    raise files.not_written(target, error.strerror) from error
  files.write(folder / f"{start:08d}.{events.name}", data)


def _append_events(scratch: str, entries: Sequence[dict]) -> None:
  """Writes the event file of a part to a local folder."""
  # Imported here: it imports torch where that is installed, seconds of every process's start.
  from tensorboardX import SummaryWriter
  writer = SummaryWriter(scratch)
  file = writer.file_writer.event_writer
  try:
    for entry in entries:
      for name, value in entry.items():
        if name != "step" and isinstance(value, int | float):
          writer.add_scalar(name, value, entry["step"])
    writer.close()
  except OSError:
    # It closes its file again when the process ends, and would print a traceback then.
    file.close = lambda: None
    raise


def _cut(folder: epath.Path, step: int) -> None:
  """Deletes the parts that start at `step` or later."""
  if hosts.leader():
    for part in files.finished_files(folder):
      # "00000012.jsonl", or "00000012.events...": the first step of the part.
      if int(part.name.split(".")[0]) >= step:
        part.unlink()


def bar(name: str, start: int, total: int) -> tqdm:
  """A stage's progress bar on standard error: steps done of `total`, and the time left."""
  return tqdm(desc=name, initial=start, total=total, file=sys.stderr, dynamic_ncols=True,
              mininterval=1.0, disable=not hosts.leader())


def announce(text: str) -> None:
  """Prints a line on standard error before work that has no progress bar."""
  if hosts.leader():
    print(text, file=sys.stderr, flush=True)


class Compilations(NamedTuple):
  """XLA compilations: their number, and seconds, added up where threads compile side by side."""
  count: int = 0
  seconds: float = 0.0   # of compiling, or of reading a program from the persistent cache
  saved: float = 0.0     # by the persistent cache: compiling took this much longer than reading


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], Compilations]]:
  """Counts XLA compilations while open.

  Yields:
    A function that returns the Compilations so far.
  """
  found = collections.Counter()

  def on_event(name: str, seconds: float, **kwargs: Any) -> None:
    del kwargs
    # JAX has no public counter; it times each compilation under these names.
    if name == "/jax/core/compile/backend_compile_duration":
      found["count"] += 1
      found["seconds"] += seconds
    elif name == "/jax/compilation_cache/compile_time_saved_sec":
      found["saved"] += seconds

  jax.monitoring.register_event_duration_secs_listener(on_event)
  try:
    yield lambda: Compilations(**found)
  finally:
    jax.monitoring.unregister_event_duration_listener(on_event)
