"""Checksums of a folder's files: recorded when they are written, compared when they are read back.

A record is {path within the folder: {"bytes": size, "sha256": hex digits}}. In the folder
`checksums`, a finished folder has one of all its files, and a stage that runs one of each
checkpoint.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

from etils import epath

from s2d_jax import hosts
from s2d_jax.errors import InputError, WriteError

FOLDER = "checksums"  # with the records of the folder that it is in
FINISHED = "finished.json"  # of all files of a finished folder, within FOLDER
SUMS = "SHA256SUMS"  # of a model's folder, in the format of the command sha256sum
Record = dict[str, dict[str, Any]]

# An object store may fail for a minute, and a disk for a moment: seconds before each attempt.
STORE_WAITS = (1, 2, 4, 8, 15, 30)
_DISK_WAITS = (0.5, 1, 2)
# Of a path that holds no file: no further attempt finds one.
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_Read = TypeVar("_Read")
_ESCAPES = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}  # of names, as coreutils writes them
_CHUNK = 1 << 24  # bytes of a file in memory at once
# Hashing does without the interpreter's lock, and a disk or a store serves several files at once.
_THREADS = min(16, 2 * (os.cpu_count() or 1))


def digest(value: Any) -> str:
  """SHA-256, in hex, of a value made of dicts, lists, strings and numbers."""
  # Keys are sorted, so that the order in which a config was written renames nothing.
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Damage(NamedTuple):
  """A file that is not as it was recorded."""
  name: str  # within its folder
  path: epath.Path
  reason: str  # such as "has 512 bytes and had 1,024"

  @property
  def text(self) -> str:
    """The path and the reason, such as "/runs/a/x has 512 bytes and had 1,024"."""
    return f"{self.path} {self.reason}"


def retried(path: epath.PathLike, read: Callable[[], _Read], waits: Sequence[float] | None = None,
            errors: type[Exception] | None = None) -> _Read:
  """The result of `read()`, which is repeated where a disk or a store fails for a while.

  Args:
    path: what is read, for the message.
    waits: seconds before each further attempt; None: few of a disk, and a minute of a store.
    errors: those that are tried again; None: OSError, and of a store all.

  Raises:
    FileNotFoundError, IsADirectoryError, NotADirectoryError: there is no such file.
    WriteError: all attempts failed, or a permission is missing, which is not tried again.
  """
  # Each store's library has exceptions of its own.
  store = "://" in os.fspath(path)
  if waits is None:
    waits = STORE_WAITS if store else _DISK_WAITS
  if errors is None:
    errors = Exception if store else OSError
  for wait in (*waits, None):
    try:
      return read()
    except _ABSENT:
      raise
    except errors as error:
      if wait is None or isinstance(error, PermissionError):
        raise not_read(path, error) from error
    # Behind the block, which ends the error: its frames may hold weights that were read.
    time.sleep(wait)


def read(path: epath.PathLike) -> bytes:
  """The bytes of a file, which is there.

  Raises:
    WriteError: it cannot be read, after several attempts.
  """
  try:
    return retried(path, epath.Path(path).read_bytes)
  except _ABSENT as error:
    raise not_read(path, error) from error


def not_read(path: epath.PathLike, error: Exception) -> WriteError:
  """The error to raise where a disk fails: the file may be whole, so nothing is set aside."""
  remedy = "permit this user to read it" if isinstance(error, PermissionError) else "mend the disk"
  return WriteError(f"{os.fspath(path)} cannot be read ({reason(error)}): {remedy}, and the same "
                    "command goes on from there.")


def reason(error: Exception) -> str:
  """Why a disk or a store failed, in a few words for a message."""
  return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def entries(folder: epath.PathLike) -> list[epath.Path]:
  """The paths in a folder, sorted by name; [] where it does not exist.

  Raises:
    WriteError: it cannot be listed, after several attempts.
  """
  folder = epath.Path(folder)
  try:
    found = retried(folder, lambda: list(folder.iterdir()) if folder.exists() else [])
  except _ABSENT as error:  # a file is in its place
    raise not_read(folder, error) from error
  return sorted(found, key=lambda path: path.name)


def listed(folder: epath.PathLike) -> Iterator[str]:
  """Yields the path of every whole file under a folder, within it, in order of names."""
  # A killed write leaves its temporary file behind, whose name begins with a dot.
  for path in entries(folder):
    if path.is_dir():
      yield from (f"{path.name}/{name}" for name in listed(path))
    elif not path.name.startswith("."):
      yield path.name


def record(folder: epath.PathLike, names: Iterable[str]) -> Record:
  """The record of these files of a folder.

  On several processes it is a collective: each process reads its share of the files.

  Raises:
    WriteError: a file cannot be read.
  """
  found = _merged(folder, sorted(names), together=True)
  for name, of_file in found.items():
    if of_file is None:
      raise not_read(epath.Path(folder) / name, OSError("it is gone"))
  return found


@contextlib.contextmanager
def recording(folder: epath.PathLike, names: Iterable[str]) -> Iterator[Callable[[], Record]]:
  """A block that writes other files, while a thread makes the record of these.

  On several processes it is a collective, as `record` is. The block ends when both are done.

  Yields:
    A function that returns the record, or raises as `record` does.
  """
  with futures.ThreadPoolExecutor(1) as thread:
    yield thread.submit(record, folder, names).result


def damage(folder: epath.PathLike, recorded: Record, together: bool = True) -> Damage | None:
  """The first file that is not as it was recorded; None where all are.

  Args:
    recorded: a file may lack its size.
    together: on several processes it is a collective, as `record` is; False: this process alone
      reads all files.

  Raises:
    WriteError: a file cannot be read, so nothing is known of it.
  """
  found = _merged(folder, sorted(recorded), together)
  for name, written in sorted(recorded.items()):
    difference = _difference(found[name], written)
    if difference is not None:
      return Damage(name, epath.Path(folder) / name, difference)
  return None


def _difference(found: dict[str, Any] | None, written: dict[str, Any]) -> str | None:
  """In what a file differs from its record; None: in nothing."""
  if found is None:
    return "is missing"
  size = found["bytes"]
  if size != written.get("bytes", size):
    return f"has {size:,} bytes and had {written['bytes']:,}"
  return None if found["sha256"] == written["sha256"] else "holds other bytes than were written"


@contextlib.contextmanager
def reading(folder: epath.PathLike, recorded: Record, remedy: str,
            together: bool = True) -> Iterator[None]:
  """A block that reads files of a folder, which are compared with their checksums meanwhile.

  One process hashes them in threads beside the block, so that a disk serves them once. Several
  processes hash a share each, before the block: one that stopped within it would leave the others
  waiting.

  Args:
    remedy: for the message.
    together: as `damage` takes it.

  Raises:
    InputError: a file is damaged, also where the block failed over it; names the file.
    WriteError: a file cannot be read.
  """
  def refuse(found: Damage | None, cause: Exception | None = None) -> None:
    if found is not None:
      raise InputError(f"{found.text}: {remedy}.") from cause

  if together and hosts.share()[1] > 1:
    refuse(damage(folder, recorded))
    yield
    return
  with futures.ThreadPoolExecutor(1) as thread:
    compared = thread.submit(damage, folder, recorded, together=False)
    try:
      yield
    except Exception as error:
      refuse(compared.result(), error)
      raise
    refuse(compared.result())


def published(path: epath.PathLike) -> dict[str, str]:
  """{name of a file: its SHA-256} of a file of the command sha256sum.

  Raises:
    InputError: it is damaged.
    WriteError: it cannot be read, so nothing is known of it.
  """
  found = {}
  # Not splitlines, which ends a line at characters that a name may have.
  text = read(path).decode(errors="replace")
  lines = text.replace("\r\n", "\n").split("\n")
  for line in [line for line in lines if line.strip() and not line.startswith("#")] or [""]:
    # As sha256sum writes it, or with --tag. After a backslash the name has escapes.
    match = re.fullmatch(r"(?P<escaped>\\?)(?:(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>.+)|"
                         r"SHA256 \((?P<tagged>.+)\) = (?P<tag>[0-9a-fA-F]{64}))", line)
    if match is None:
      raise InputError(f"{path} is damaged, or is not of the command sha256sum: get it again, or "
                       "delete it.")
    name = match["name"] or match["tagged"]
    if match["escaped"]:
      name = re.sub(r"\\[\\nr]", lambda escape: _ESCAPES[escape[0]], name)
    found[name.removeprefix("./")] = (match["sum"] or match["tag"]).lower()
  return found


def redo(folder: epath.PathLike) -> str:
  """The remedy for a damaged file of a finished folder."""
  name = epath.Path(folder).name
  return f"put the file back, or make {name} again by the command of its run with --redo={name}"


def _merged(folder: epath.PathLike, names: list[str],
            together: bool) -> dict[str, dict[str, Any] | None]:
  """The record of the files, of which each process has read its share; None of a missing one.

  Raises:
    WriteError: a file cannot be read; on every process, where they read together.
  """
  first, processes = hosts.share() if together else (0, 1)
  share = names[first::processes]
  part: dict[str, Any] = {"record": {}, "error": None}
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    measured = pool.map(lambda name: _measured(epath.Path(folder) / name), share)
    # The first error cancels all files that are still to be read.
    try:
      part["record"] = dict(zip(share, measured, strict=True))
    except WriteError as error:
      if processes == 1:
        raise
      part["error"] = str(error)
  merged = {}
  for other in hosts.gather("checksums", part, hosts.START_SECONDS) if together else [part]:
    if other["error"] is not None:
      raise WriteError(other["error"])
    merged |= other["record"]
  return merged


def _measured(path: epath.Path) -> dict[str, Any] | None:
  """Size and SHA-256 of a file; None where there is no such file.

  Raises:
    WriteError: it cannot be read, after several attempts.
  """
  try:
    return retried(path, lambda: _hashed(path))
  except _ABSENT:
    return None


def _hashed(path: epath.Path) -> dict[str, Any]:
  digest = hashlib.sha256()
  size = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      size += len(chunk)
  return {"bytes": size, "sha256": digest.hexdigest()}
