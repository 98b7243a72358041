"""What survives a kill: Orbax checkpoints, files written whole or not at all, one writer a folder.

The only file that imports orbax. A stage folder holds `checkpoints/<step>` while it runs (weights
and optimizer) and `checkpoints/final` once it is done (weights alone, in the stored precision).
"""

import contextlib
import json
import os
import socket
import time

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp


def leader():
  """True on the one process that writes files."""
  return jax.process_index() == 0


def barrier(name):
  """Waits until every process is here; nothing on one process."""
  if jax.process_count() > 1:
    with jax.transfer_guard("allow"):  # it goes through the devices
      multihost_utils.sync_global_devices(name)


def write(path, data):
  """Writes `data` (str or bytes) so that a reader sees all of it or the file that was there before.

  A local file goes through a temporary neighbour and a rename; an object store's put is whole as
  it is, and has no rename.
  """
  path = epath.Path(path)
  data = data.encode() if isinstance(data, str) else data
  path.parent.mkdir(parents=True, exist_ok=True)
  if "://" in os.fspath(path):
    path.write_bytes(data)
    return
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_bytes(data)
  temporary.replace(path)


def parts(folder):
  """The finished files of a folder by name, [] where there is none; a killed write's leftover is
  not one of them."""
  folder = epath.Path(folder)
  if not folder.exists():
    return []
  return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)


def write_json(path, value):
  """`write` of canonical JSON: sorted keys, no NaN, a newline at the end."""
  write(path, json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n")


def read_json(path):
  """The value in a JSON file."""
  return json.loads(epath.Path(path).read_text())


class Steps:
  """A running stage's checkpoints: the newest two, each complete or absent."""

  def __init__(self, folder):
    self._folder = _checkpoints(folder)
    policies = ocp.training.preservation_policies
    self._orbax = ocp.training.Checkpointer(
        self._folder, preservation_policy=policies.LatestN(2), cleanup_tmp_directories=True)

  def latest(self):
    """Step of the newest complete checkpoint, or None."""
    newest = self._orbax.latest
    return None if newest is None else newest.step

  def save(self, step, state):
    """Returns once `state` is on disk; a step that is already there stays as it is."""
    if self.latest() != step:
      with jax.transfer_guard("allow"):  # several hosts meet in it through the devices
        self._orbax.save(step, state, force=True)

  def load(self, abstract):
    """The newest state, laid out as `abstract` says, whatever mesh wrote it."""
    with jax.transfer_guard("allow"):
      return self._orbax.load(self.latest(), abstract)

  def close(self):
    """Waits for what is under way."""
    self._orbax.close()


def save_final(folder, params):
  """Writes `checkpoints/final`; a leftover of an interrupted write is replaced."""
  with jax.transfer_guard("allow"):
    ocp.save(_checkpoints(folder) / "final", params, overwrite=True)


def load_final(folder, abstract):
  """A finished stage's weights, of the types and laid out as `abstract` says."""
  with jax.transfer_guard("allow"):
    return ocp.load(_checkpoints(folder) / "final", abstract)


def drop_steps(folder):
  """Deletes a finished stage's step checkpoints, and with them the optimizer's slots."""
  if leader():
    for path in _checkpoints(folder).iterdir():
      if path.name != "final":
        path.rmtree()


def _checkpoints(folder):
  """Where a stage folder keeps its checkpoints; absolute, for Orbax takes no other path."""
  folder = os.fspath(folder)
  return epath.Path(folder if "://" in folder else os.path.abspath(folder)) / "checkpoints"


@contextlib.contextmanager
def only_writer(folder):
  """Holds the lock of `folder`; yields beat(), to be called now and then, and what the last left.

  Yields:
    (beat, left): `left` is the previous writer's last beat in Unix seconds, or None. The lock of a
    dead process on this host, or of any host silent for an hour, is taken over with a printed
    sentence.

  Raises:
    ValueError: another process that may be alive writes here.
  """
  path = epath.Path(folder) / "writer.lock"
  if not leader():
    yield (lambda: None), None
    return
  mine = {"host": socket.gethostname(), "pid": os.getpid()}
  left = None
  if path.exists():
    other = _lock(path)
    left = other["beat"]
    age, here = int(time.time() - left), other["host"] == mine["host"]
    if age > 3600 or here and not _alive(other["pid"]):
      print(f"{path}: process {other['pid']} on {other['host']} is gone or has been silent for "
            f"{age} s; taking over.", flush=True)
    elif not here or other["pid"] != mine["pid"]:
      raise ValueError(f"{folder} is being written by process {other['pid']} on {other['host']} "
                       f"(last sign of life {age} s ago): wait for it, or delete {path} if that "
                       "process is gone.")
  last = 0.0

  def beat():
    nonlocal last
    if time.time() - last > 1:
      last = time.time()
      write_json(path, {**mine, "beat": last})

  beat()
  try:
    yield beat, left
  except Exception:
    raise  # the lock stays, with its last beat: what the failure cost can still be counted
  except BaseException:
    path.unlink(missing_ok=True)  # told to stop, and stopped in order
    raise
  path.unlink(missing_ok=True)


def _lock(path):
  try:
    return read_json(path)
  except ValueError as error:
    raise ValueError(f"{path} is not a lock this code wrote: delete it if nobody writes "
                     f"{path.parent}.") from error


def _alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
