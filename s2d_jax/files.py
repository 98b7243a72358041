"""Files that are written whole or not at all, JSON, and the lock that lets one process write.

Paths may be local or in an object store. Everything read back (reports, ledgers, manifests) goes
through here, so that a report needs no checkpoint library.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from s2d_jax import checksums, hosts, json_objects
from s2d_jax.errors import InputError, WriteError

REMEDY = "restore it, or delete the folder that it belongs to"  # where a file is damaged
LOCK = "writer.lock"
_HEARTBEAT_SECONDS = 10     # between the heartbeats of a lock
_SILENT_SECONDS = 120  # a lock whose last heartbeat is older belongs to a dead process


def write(path: epath.PathLike, data: str | bytes) -> None:
  """Writes a file so that a reader sees all of it, or the file that was there before.

  Raises:
    WriteError: it cannot be written, in an object store after several attempts.
  """
  path = epath.Path(path)
  data = data.encode() if isinstance(data, str) else data
  if "://" in os.fspath(path):
    _put(path, data)
    return
  # The process id keeps the temporary files of two processes apart.
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(data)
    temporary.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise not_written(path, error.strerror) from error


def _put(path: epath.Path, data: bytes) -> None:
  """Writes a file of an object store, whose put is whole as it is."""
  for wait in (*checksums.STORE_WAITS, None):
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
      return
    # Each store's library has exceptions of its own.
    except Exception as error:
      if wait is None:
        raise not_written(path, str(error).partition("\n")[0]) from error
      time.sleep(wait)


def not_written(path: epath.PathLike, reason: str | None) -> WriteError:
  """The error to raise where a file or a folder cannot be written."""
  return WriteError(f"{os.fspath(path)} cannot be written ({reason}): free space or mend the disk, "
                    "and the same command goes on from what was saved before.")


def finished_files(folder: epath.PathLike) -> list[epath.Path]:
  """A folder's whole files, sorted by name; [] where the folder does not exist."""
  # A killed `write` leaves its temporary file behind, whose name begins with a dot.
  return [path for path in checksums.entries(folder) if not path.name.startswith(".")]


def plain(value: Any) -> Any:
  """Python numbers and lists for JSON; NaN and infinities as strings, which JSON lacks."""
  # First, so that the numbers and lists that arrays become are handled below.
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  # json.dumps would write a bare NaN, which other readers of JSON refuse.
  if isinstance(value, float) and not np.isfinite(value):
    return str(value)
  return value


def write_json(path: epath.PathLike, value: Any, sealed: bool = False) -> None:
  """Writes canonical JSON: sorted keys, a newline at the end.

  Args:
    sealed: adds to an object its own SHA-256, which `read_json` compares and takes away again.

  Raises:
    InputError: the value holds a NaN or an infinity, which JSON cannot represent.
  """
  if sealed:
    value = value | {"sha256": checksums.digest(value)}
  write(path, json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n")


def read_json(path: epath.PathLike, remedy: str = REMEDY, sealed: bool = False) -> Any:
  """The value in a JSON file.

  Args:
    sealed: whether it was written with a seal. One that is there is always compared; without this
      argument, a bit that flips within its key would take it away unnoticed.

  Raises:
    InputError: the file is missing or damaged; names it, with the remedy.
    WriteError: it cannot be read, after several attempts.
  """
  try:
    data = checksums.retried(path, epath.Path(path).read_bytes)
  except OSError as error:  # there is no such file
    raise InputError(f"{os.fspath(path)} cannot be read ({error.strerror}): {remedy}.") from error
  value = json_objects.value(os.fspath(path), data, remedy)
  written = value.pop("sha256", None) if isinstance(value, dict) else None
  if sealed if written is None else checksums.digest(value) != written:
    raise InputError(f"{os.fspath(path)} is damaged, or was edited: {remedy}.")
  return value


def has_seal(path: epath.PathLike, remedy: str = REMEDY) -> bool:
  """Whether a JSON object has a seal, as those of earlier versions have not.

  Raises:
    InputError: it holds something else.
    WriteError: it cannot be read.
  """
  return "sha256" in json_objects.parse(os.fspath(path), checksums.read(path), remedy)


@contextlib.contextmanager
def only_writer(folder: epath.PathLike) -> Iterator[tuple[Callable[[], None], float | None]]:
  """Holds the lock of a folder, so that one process writes it.

  A thread keeps the lock alive. The lock of a dead process on this host, or of a host that has been
  silent for two minutes, is taken over with a printed sentence; this waits until they are over.
  Silence is counted by the clock of the disk, because those of hosts differ.

  Yields:
    (heartbeat, last). Call `heartbeat()` at every step: it raises WriteError once the lock is gone
    or another process's. `last` is the previous writer's last heartbeat as `modified` dates it, or
    None where the folder was not locked.

  Raises:
    InputError: another process that may be alive writes here.
  """
  # Only the leader writes, so only it needs the lock.
  path = epath.Path(folder) / LOCK
  if not hosts.leader():
    yield (lambda: None), None
    return
  process = {"host": socket.gethostname(), "pid": os.getpid()}
  written: float | None = None  # by a clock that never steps back
  one_thread = threading.Lock()
  closed = threading.Event()

  def heartbeat() -> None:
    nonlocal written
    # Each step looks whether the folder is there. One write a second costs a store little.
    with one_thread:
      if written is not None:
        _check_lock(path, process)
      if written is None or time.monotonic() - written > 1:
        written = time.monotonic()
        write_json(path, {**process, "beat": time.time()})

  def renew() -> None:
    # A step may take longer than another host waits.
    while not closed.wait(_HEARTBEAT_SECONDS):
      # The heartbeat of the next step raises whatever went wrong here.
      with contextlib.suppress(WriteError):
        heartbeat()

  with _one_at_a_time(path.parent):
    last = _take_over(path, process) if path.exists() else None
    heartbeat()
  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  # After an error the lock stays: its last heartbeat tells the next run how many seconds were lost.
  # A stop on request has saved everything, so the next run loses no time.
  failed = False
  try:
    yield heartbeat, last
  except Exception:
    failed = True
    raise
  finally:
    closed.set()
    thread.join()
    if not failed:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def without_writer(folder: epath.PathLike) -> Iterator[None]:
  """A block, such as one that moves a folder, which begins only where no live process writes it.

  Raises:
    InputError: as `only_writer`, which also says when this waits.
  """
  path = epath.Path(folder) / LOCK
  with _one_at_a_time(path.parent):
    if path.exists():
      _take_over(path, {"host": socket.gethostname(), "pid": os.getpid()})
    yield


@contextlib.contextmanager
def _one_at_a_time(folder: epath.Path) -> Iterator[None]:
  """Lets one process of several look at a lock and write it, where the disk has file locks.

  An object store has none, and some network disks: there two that start at once are not noticed.
  """
  if "://" in os.fspath(folder):
    yield
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    guard = open(folder / ".writer", "w")
  except OSError as error:
    raise not_written(folder, error.strerror) from error
  with guard:
    # The system lets go of it when the file is closed, also by a kill.
    try:
      fcntl.flock(guard, fcntl.LOCK_EX)
    except OSError as error:
      if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
        raise not_written(folder, error.strerror) from error
    yield


def _check_lock(path: epath.Path, process: dict[str, Any]) -> None:
  """Raises WriteError unless the lock is still of this process."""
  try:
    lock = json.loads(checksums.retried(path, path.read_bytes))
    if {name: lock.get(name) for name in process} == process:
      return
    reason = f"process {lock.get('pid')} on {lock.get('host')} writes it now"
  # A file that is gone, or damaged: the folder is not as this process left it.
  except (OSError, ValueError, AttributeError) as error:
    reason = f"its {LOCK} is gone or damaged: {error}"
  raise WriteError(f"{path.parent} was deleted, moved or taken over while process {process['pid']} "
                   f"wrote it ({reason}): put it back, and the same command goes on from what was "
                   "saved before.")


def _silence(path: epath.Path) -> int | None:
  """Seconds since a file was written, by the clock that dates the files of its disk; None: gone."""
  now = path.with_name(f".now.{os.getpid()}")
  try:
    write(now, b"")
    return int(now.stat().mtime - path.stat().mtime)
  except FileNotFoundError:
    return None
  finally:
    with contextlib.suppress(OSError):
      now.unlink(missing_ok=True)


def modified(path: epath.PathLike) -> float:
  """Unix seconds at which a file was written, by the clock of its disk; 0 where that is unknown.

  The clocks of two hosts may differ by hours, and that of the disk dates the files of both. Of an
  object store these are full seconds, and some stores tell no times.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if "://" in os.fspath(path):
    return float(epath.Path(path).stat().mtime)
  return os.stat(path).st_mtime


def _holder(path: epath.Path) -> tuple[str, int, float] | None:
  """(host, process, last heartbeat by the host's clock) of a lock; None where there is none."""
  try:
    lock = read_json(path)
    return lock["host"], int(lock["pid"]), float(lock["beat"])
  except (ValueError, KeyError, TypeError) as error:
    if not path.exists():
      return None
    raise InputError(f"{path} is not a lock this code wrote: delete it if no process "
                     f"writes {path.parent}.") from error


def _take_over(path: epath.Path, process: dict[str, Any]) -> float | None:
  """The last heartbeat of a lock that this process may take over; None where there is no lock.

  The process of another host cannot be asked. So this waits until the lock has been renewed, or has
  been silent for long enough.
  """
  found = _holder(path)
  age = _silence(path)
  if found is None or age is None:
    return None
  holder, pid, _ = found
  last = _last_heartbeat(path)
  here = holder == process["host"]
  lives = here and _alive(pid)
  if not here and age <= _SILENT_SECONDS:
    print(f"{path}: process {pid} on {holder} wrote it {age} s ago; waiting for a heartbeat, or "
          f"for {_SILENT_SECONDS} s without one.", flush=True)
    while age <= _SILENT_SECONDS and not lives:
      time.sleep(min(_HEARTBEAT_SECONDS, _SILENT_SECONDS - age + 1))
      now = _holder(path)
      age = _silence(path)
      if now is None or age is None:  # the other writer has finished
        return None
      lives = now != found
  # The number of a process that is gone may be another program's by now.
  if not lives or age > _SILENT_SECONDS:
    print(f"{path}: process {pid} on {holder} is gone or has been silent for {age} s; taking over.",
          flush=True)
  elif not here or pid != process["pid"]:
    raise InputError(f"{path.parent} is being written by process {pid} on {holder} (last sign of "
                     f"life {age} s ago): wait for it, or delete {path} if that process is gone.")
  return last


def _last_heartbeat(path: epath.Path) -> float | None:
  """The time of a lock's last heartbeat, by the clock of the disk; None: it is gone."""
  try:
    return modified(path)
  except FileNotFoundError:
    return None


def _alive(pid: int) -> bool:
  """Whether a process of this machine exists."""
  # Signal 0 is checked and not sent.
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    # It exists, and belongs to another user.
    return True
  return True
