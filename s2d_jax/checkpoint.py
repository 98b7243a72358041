"""Orbax checkpoints that survive a kill. The only file that imports orbax.

A stage folder holds `checkpoints/<step>` while it runs (weights and optimizer) and
`checkpoints/final` once it is done (weights alone, in the stored precision).
"""

import os
import time

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from s2d_jax import files, hosts
from s2d_jax.sharding import Params

# Every call allows transfers, because on several hosts orbax synchronizes through the devices.


class Checkpoints:
  """A running stage's checkpoints: the newest two, each complete or absent."""

  def __init__(self, folder: epath.PathLike) -> None:
    self._folder = _checkpoints(folder)
    # The last but one stays until a newer one is complete.
    policies = ocp.training.preservation_policies
    self._orbax = ocp.training.Checkpointer(
        self._folder, preservation_policy=policies.LatestN(2), cleanup_tmp_directories=True)

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    newest = self._orbax.latest
    return None if newest is None else newest.step

  def save(self, step: int, state: Params) -> None:
    """Returns once `state` is on disk; a step that is already there stays as it is."""
    if self.latest() != step:
      with jax.transfer_guard("allow"):
        self._orbax.save(step, state, force=True)

  def load(self, abstract: Params) -> Params:
    """The newest state, laid out as `abstract` says, whatever mesh wrote it."""
    with jax.transfer_guard("allow"):
      return self._orbax.load(self.latest(), abstract)

  def close(self) -> None:
    """Waits for unfinished writes."""
    self._orbax.close()


def save_final(folder: epath.PathLike, params: Params) -> None:
  """Writes `checkpoints/final`; a leftover of an interrupted write is replaced."""
  with jax.transfer_guard("allow"):
    ocp.save(_checkpoints(folder) / "final", params, overwrite=True)


def load_final(folder: epath.PathLike, abstract: Params) -> Params:
  """A finished stage's weights, of the types and laid out as `abstract` says."""
  with jax.transfer_guard("allow"):
    return ocp.load(_checkpoints(folder) / "final", abstract)


def drop_steps(folder: epath.PathLike) -> None:
  """Deletes a finished stage's step checkpoints, and with them the optimizer's slots."""
  # Other processes may still see the steps for a moment; nothing reads them after `final`.
  if hosts.leader():
    for path in _checkpoints(folder).iterdir():
      if path.name != "final":
        path.rmtree()


def lost_seconds(folder: epath.PathLike, start: int, last_heartbeat: float | None) -> float:
  """Seconds of work that kills have cost this stage so far; notes this start for the next one.

  The time from the newest checkpoint, or from the killed writer's start where that is later, to
  the writer's last heartbeat is lost: its work is done again.
  """
  folder = epath.Path(folder)
  starts = [files.read_json(path) for path in files.finished_files(folder / "starts")]
  lost = 0.0
  if last_heartbeat is not None and starts:
    saved = folder / "checkpoints" / str(start)
    # A checkpoint's modification time is when the work behind it was safe.
    since = max(starts[-1]["at"], saved.stat().mtime if saved.exists() else 0.0)
    lost = max(0.0, last_heartbeat - since)
  if hosts.leader():
    files.write_json(folder / "starts" / f"{len(starts):08d}.json",
                     {"at": time.time(), "step": start, "lost": lost})
  return lost + sum(s["lost"] for s in starts)


def _checkpoints(folder: epath.PathLike) -> epath.Path:
  """The folder of a stage's checkpoints, as an absolute path or an address."""
  # Orbax takes absolute paths only, and an address in a store has no absolute form.
  folder = os.fspath(folder)
  return epath.Path(folder if "://" in folder else os.path.abspath(folder)) / "checkpoints"
