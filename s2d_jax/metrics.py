"""Logs that survive a kill: one part per checkpoint, cut back on resume; progress; compile count.

A log is a folder of JSON-lines parts, each named for its first step and written whole just before
the checkpoint that ends it. Resuming at step s deletes the parts that start at s or later, so a
killed and resumed run leaves the bytes of an undisturbed one. Nothing is appended or renamed.
"""

import contextlib
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from s2d_jax import files, hosts


def plain(value):
  """Python numbers and lists for JSON; NaN and infinities as strings, which JSON lacks."""
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, float) and not np.isfinite(value):
    return str(value)
  return value


class Log:
  """Rows of one kind (`metrics`, `ledger`, `timing`, `samples`) of one stage."""

  def __init__(self, folder, name, step):
    """Opens the log at `step`, dropping every part that speaks of it or of a later one."""
    self._folder, self._start, self._new = epath.Path(folder) / name, step, []
    _cut(self._folder, step)
    hosts.barrier(f"{folder}/{name}")
    self.rows = read(folder, name)

  def add(self, row):
    """Appends one row, a dict of plain values, arrays or numbers."""
    self._new.append(plain(row))
    self.rows.append(self._new[-1])

  def flush(self, step):
    """Writes what was added since the last flush as one part; `step` starts the next."""
    new, self._new, start, self._start = self._new, [], self._start, step
    if new and hosts.leader():
      text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in new)
      files.write(self._folder / f"{start:08d}.jsonl", text)
    return start, new


def read(folder, name):
  """Every row of a log, in order; an absent log is empty."""
  return [json.loads(line) for part in files.finished_files(epath.Path(folder) / name)
          for line in part.read_text().splitlines()]


def write_tensorboard(folder, start, rows):
  """One event file for one part: every number of every row against its step."""
  if not (rows and hosts.leader()):
    return
  with tempfile.TemporaryDirectory() as scratch:
    with SummaryWriter(scratch) as writer:
      for row in rows:
        for name, value in row.items():
          if name != "step" and isinstance(value, int | float):
            writer.add_scalar(name, value, row["step"])
    events = next(pathlib.Path(scratch).iterdir())
    files.write(epath.Path(folder) / "tensorboard" / f"{start:08d}.{events.name}",
                     events.read_bytes())


def cut_tensorboard(folder, step):
  """Drops the event files of `step` and later; called where the logs are cut."""
  _cut(epath.Path(folder) / "tensorboard", step)


def _cut(folder, step):
  """Deletes the parts that start at `step` or later."""
  if hosts.leader():
    for part in files.finished_files(folder):
      if int(part.name.split(".")[0]) >= step:
        part.unlink()


def bar(name, start, total):
  """A stage's progress bar on standard error: steps, time left, and what `set_postfix` is told."""
  return tqdm(desc=name, initial=start, total=total, file=sys.stderr, dynamic_ncols=True,
              mininterval=1.0, disable=not hosts.leader())


@contextlib.contextmanager
def compilations():
  """Counts XLA compilations while open: yields count() -> int."""
  seen = 0

  def on_event(name, seconds, **kwargs):
    del seconds, kwargs
    nonlocal seen
    seen += name == "/jax/core/compile/backend_compile_duration"

  jax.monitoring.register_event_duration_secs_listener(on_event)
  try:
    yield lambda: seen
  finally:
    jax.monitoring.unregister_event_duration_listener(on_event)
