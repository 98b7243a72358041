"""Orbax checkpoints that survive a kill, and damaged disks. The only file that imports orbax.

A stage folder holds `checkpoints/<step>` while it runs (weights and optimizer) and
`checkpoints/final` once it is done (weights alone, in the stored precision). With each step's goes
a file of checksums, of the checkpoint and of the logs until then.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent import futures

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from s2d_jax import checksums, files, hosts, metrics, orbax_errors, sharding
from s2d_jax.errors import InputError, WriteError
from s2d_jax.sharding import Params

DAMAGED = "damaged"  # the folder of checkpoints that are not used, within a stage's
_STARTS = "starts"  # the folder with a file of each start, within a stage's
# No result depends on a start, so a damaged one may be deleted.
_REMEDY_OF_START = "restore it, or delete it: the seconds lost before are in it"

# Every call allows transfers, because on several hosts orbax synchronizes through the devices.


class Checkpoints:
  """A running stage's checkpoints: the newest two, each complete and undamaged, or absent."""

  def __init__(self, folder: epath.PathLike) -> None:
    """Opens the checkpoints of a stage's folder, and moves damaged ones to its folder `damaged`.

    Raises:
      InputError: a log is damaged that belongs to the newest checkpoint; names both.
      WriteError: a file cannot be read, so nothing is known of it.
    """
    self._stage = epath.Path(folder)
    self._folder = _checkpoints(folder)
    # The checksums of all parts of logs that the newest checkpoint counts on.
    self._logs = _drop_damaged(self._stage, self._folder)
    self._new_logs: list[str] = []  # parts that have none yet
    self._thread = futures.ThreadPoolExecutor(1)
    self._unfinished: futures.Future | None = None
    # The last but one stays until a newer one is complete.
    policies = ocp.training.preservation_policies
    self._orbax = ocp.training.Checkpointer(
        self._folder, preservation_policy=policies.LatestN(2), cleanup_tmp_directories=True)
    # They run in reverse order, each even if another raised.
    self._at_close = contextlib.ExitStack()
    for end in (self._close_orbax, self._thread.shutdown, self._wait):
      self._at_close.callback(end)

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    newest = self._orbax.latest
    return None if newest is None else newest.step

  def save(self, step: int, state: Params, logs: Iterable[str] = ()) -> None:
    """Returns once `state` is on disk; a step that is already there stays as it is.

    Its checksums are computed while the stage goes on. Until they are written, the checkpoint
    before this one counts as the newest.

    Args:
      logs: paths, within the stage's folder, of the parts of logs that were written since the last
        call.
    """
    self._wait()
    self._new_logs += logs
    if self.latest() == step:
      return
    with orbax_errors.writing(self._folder / str(step)):
      self._orbax.save(step, _named(state), force=True)
    self._unfinished = self._thread.submit(self._write_checksums, step)

  def _write_checksums(self, step: int) -> None:
    saved = self._folder / str(step)
    self._logs |= checksums.record(self._stage, self._new_logs)
    self._new_logs = []
    found = checksums.record(saved, checksums.listed(saved))
    if hosts.leader():
      files.write_json(_sums(self._stage, step), {"checkpoint": found, "logs": self._logs},
                       sealed=True)
      for path in files.finished_files(_sums(self._stage, step).parent):
        if path.stem.isdigit() and not (self._folder / str(int(path.stem))).exists():
          path.unlink()

  def _wait(self) -> None:
    """Returns once the checksums of the last checkpoint are on disk."""
    unfinished, self._unfinished = self._unfinished, None
    if unfinished is not None:
      unfinished.result()

  def load(self, abstract: Params) -> Params:
    """The newest state, laid out as `abstract` says, whatever mesh wrote it.

    Raises:
      WriteError: it cannot be read, after several attempts.
    """
    step = self.latest()
    found = orbax_errors.read(self._folder / str(step),
                              lambda: self._orbax.load(step, _named(abstract)))
    return abstract._replace(**found) if isinstance(abstract, tuple) else found

  def load_over(self, state: Params) -> Params:
    """The newest state in the layout of `state`, whose arrays are freed first.

    Two states may not fit the devices. The caller's models also have the weights of `state`.
    """
    layout = sharding.abstract(state)
    for x in jax.tree.leaves(state):
      x.delete()
    return self.load(layout)

  def close(self) -> None:
    """Waits for unfinished writes; a second call does nothing."""
    self._at_close.close()

  def _close_orbax(self) -> None:
    with orbax_errors.writing(self._folder):
      self._orbax.close()


def _named(state: Params) -> Params:
  """A state's fields by name, without absent ones: a later version may have further ones."""
  if not isinstance(state, tuple):
    return state
  return {name: value for name, value in state._asdict().items() if value is not None}


def _drop_damaged(stage: epath.Path, folder: epath.Path) -> checksums.Record:
  """Sets the newest checkpoints aside until one is undamaged; the record of the logs until it."""
  there = _steps(files.finished_files(folder))
  recorded = _steps(path.with_suffix("")
                    for path in files.finished_files(stage / checksums.FOLDER))
  # All processes have listed the folders before one of them changes them.
  hosts.barrier(f"checkpoints of {stage}")
  if there and not (stage / checksums.FOLDER).exists() and not _writes_checksums(stage):
    metrics.announce(f"{folder / str(max(there))} has no checksums, so it is used unchecked. An "
                     f"older version wrote it, or {checksums.FOLDER}/ and {_STARTS}/ were not "
                     "copied.")
    return {}
  # Those before the newest undamaged one were deleted on purpose, so the loop ends there.
  for step in sorted(there | recorded, reverse=True):
    logs, reason = _undamaged(stage, step) if step in there else ({}, "")
    if reason is None:
      return logs
    older = max((other for other in there if other < step), default=None)
    then = "the stage starts again" if older is None else f"the stage goes on from step {older}"
    saved = folder / str(step)
    if step in there:
      metrics.announce(f"{saved} is not used ({reason}): {then}.")
      if hosts.leader():
        _set_aside(stage, step)
    else:
      metrics.announce(f"{saved} is gone, though {_sums(stage, step)} is there: {then}.")
    hosts.barrier(f"checkpoint {step} of {stage}")
  return {}


def _steps(paths: Iterable[epath.Path]) -> set[int]:
  """The numbers among the names of paths."""
  return {int(path.name) for path in paths if path.name.isdigit()}


def _undamaged(stage: epath.Path, step: int) -> tuple[checksums.Record, str | None]:
  """(record of the logs until an undamaged checkpoint, None), or ({}, why it is not used)."""
  recorded, reason = _recorded(stage, step)
  if reason is not None:
    return {}, reason
  damage = checksums.damage(_checkpoints(stage) / str(step), recorded["checkpoint"])
  if damage is not None:
    return {}, damage.text
  _check_logs(stage, step, recorded["logs"])
  return recorded["logs"], None


def _writes_checksums(stage: epath.Path) -> bool:
  """Whether a stage began with a version that writes checksums of its checkpoints."""
  # The first start is written before the first checkpoint. It has a seal if its version wrote
  # checksums too. Later starts may be of a newer version.
  starts = files.finished_files(stage / _STARTS)
  return bool(starts) and files.has_seal(starts[0], _REMEDY_OF_START)


def _set_aside(stage: epath.Path, step: int) -> None:
  """Moves a damaged checkpoint out of the way with its checksums, until the stage is done.

  Raises:
    WriteError: the disk or the store does not let it go.
  """
  saved, sums = _checkpoints(stage) / str(step), _sums(stage, step)
  target = stage / DAMAGED / saved.name
  try:
    if "://" in os.fspath(saved):  # a store cannot rename a folder
      saved.rmtree()
      sums.unlink(missing_ok=True)
      return
    if target.exists():
      target.rmtree()
    target.parent.mkdir(parents=True, exist_ok=True)
    saved.rename(target)
    if sums.exists():  # else the next start would miss the checkpoint
      sums.replace(target.parent / sums.name)
  # Each store's library has exceptions of its own.
  except Exception as error:
    raise WriteError(
        f"{saved} is damaged and cannot be moved to {target.parent} ({checksums.reason(error)}): "
        "permit it or mend the disk, or delete the checkpoint, and the same command goes on from "
        "the one before.") from error


def _recorded(stage: epath.Path, step: int) -> tuple[dict[str, checksums.Record], str | None]:
  """The checksums that belong to a checkpoint, or the reason for which there are none."""
  path = _sums(stage, step)
  if not path.exists():
    return {}, f"{path} is missing; the process may have ended while it saved"
  try:
    return files.read_json(path, sealed=_writes_checksums(stage)), None
  except InputError as error:
    # Without the remedy, which is of other files: there is a checkpoint before this one.
    return {}, str(error).rpartition(": ")[0]


def _check_logs(stage: epath.Path, step: int, recorded: checksums.Record) -> None:
  """Raises InputError where a part of a log is damaged that was written before a checkpoint."""
  damage = checksums.damage(stage, recorded)
  if damage is not None:
    log, _, part = damage.name.partition("/")
    saved = _checkpoints(stage) / str(step)
    raise InputError(
        f"{damage.text}; it is the log {log} of {stage} from step {int(part.split('.')[0])} on, "
        f"and the checkpoint of step {step} counts on it: put the file back, or delete {saved}, "
        "and the same command goes on from the checkpoint before that.")


def _sums(stage: epath.Path, step: int) -> epath.Path:
  """The file with the checksums of a checkpoint."""
  return stage / checksums.FOLDER / f"{step:08d}.json"


def save_final(folder: epath.PathLike, params: Params) -> None:
  """Writes `checkpoints/final`; a leftover of an interrupted write is replaced."""
  final = _checkpoints(folder) / "final"
  with orbax_errors.writing(final):
    ocp.save(final, params, overwrite=True)


def recording_final(
    folder: epath.PathLike) -> contextlib.AbstractContextManager[Callable[[], checksums.Record]]:
  """A block beside which `checkpoints/final` is hashed, as `checksums.recording` has it.

  A stage has no further step that its hashing could run beside.
  """
  names = checksums.listed(_checkpoints(folder) / "final")
  return checksums.recording(folder, [f"checkpoints/final/{name}" for name in names])


def load_final(folder: epath.PathLike, abstract: Params) -> Params:
  """A finished stage's weights, of the types and laid out as `abstract` says.

  Raises:
    WriteError: they cannot be read, after several attempts.
  """
  final = _checkpoints(folder) / "final"
  return orbax_errors.read(final, lambda: ocp.load(final, abstract))


def drop_steps(folder: epath.PathLike) -> None:
  """Deletes a finished stage's step checkpoints, and with them the optimizer's slots."""
  # Other processes may still see the steps for a moment; nothing reads them after `final`.
  if hosts.leader():
    for path in files.finished_files(_checkpoints(folder)):
      if path.name != "final":
        path.rmtree()
    if (epath.Path(folder) / DAMAGED).exists():
      (epath.Path(folder) / DAMAGED).rmtree()
    for path in files.finished_files(epath.Path(folder) / checksums.FOLDER):
      if path.stem.isdigit():
        path.unlink()


def lost_seconds(folder: epath.PathLike, start: int, last_heartbeat: float | None) -> float:
  """Seconds of work that kills have cost this stage so far; notes this start for the next one.

  The time from the newest checkpoint, or from the killed writer's start where that is later, to
  the writer's last heartbeat is lost: its work is done again.

  Args:
    last_heartbeat: as `files.only_writer` yields it, by the clock of the disk.
  """
  folder = epath.Path(folder)
  starts = _read_starts(folder)
  lost = 0.0
  if last_heartbeat is not None and starts:
    # A store dates no folders, so there the checksums count, which are written soon after.
    saved = (_sums(folder, start) if "://" in os.fspath(folder)
             else folder / "checkpoints" / str(start))
    # A checkpoint's modification time is when the work behind it was safe. All times are those of
    # files, which one clock dates; where a store tells none, nothing counts as lost.
    since = max(files.modified([*starts][-1]), files.modified(saved) if saved.exists() else 0.0)
    lost = max(0.0, last_heartbeat - since)
  if hosts.leader():
    files.write_json(folder / _STARTS / f"{len(starts):08d}.json",
                     {"at": time.time(), "step": start, "lost": lost}, sealed=True)
  return lost + sum(s["lost"] + s.get("cut", 0.0) for s in starts.values())


def _read_starts(folder: epath.Path) -> dict[epath.Path, dict[str, float]]:
  """{file: its entry} of the starts of a stage, in order."""
  # Those behind one with a seal have one too: older versions wrote theirs before.
  sealed = _writes_checksums(folder)
  return {path: files.read_json(path, _REMEDY_OF_START, sealed)
          for path in files.finished_files(folder / _STARTS)}


def add_lost(folder: epath.PathLike, seconds: float) -> None:
  """Notes the seconds of a step that a stop cut, with the start that they belong to."""
  if hosts.leader():
    path = files.finished_files(epath.Path(folder) / _STARTS)[-1]
    started = files.modified(path)
    files.write_json(path, files.read_json(path, _REMEDY_OF_START) | {"cut": seconds}, sealed=True)
    # `lost_seconds` takes the file's time for the start's. In a store that is now the stop's: a
    # kill during its save counts less.
    if "://" not in os.fspath(path):
      os.utime(path, (started, started))


def _checkpoints(folder: epath.PathLike) -> epath.Path:
  """The folder of a stage's checkpoints, as an absolute path or an address."""
  # Orbax takes absolute paths only, and an address in a store has no absolute form.
  folder = os.fspath(folder)
  return epath.Path(folder if "://" in folder else os.path.abspath(folder)) / "checkpoints"
