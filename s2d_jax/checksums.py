"""Checksums of a folder's files: recorded when they are written, compared when they are read back.

A record is {path within the folder: {"bytes": size, "sha256": hex digits}}. In the folder
`checksums`, a finished folder has one of all its files, and a stage that runs one of each
checkpoint.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

from etils import epath

from s2d_jax import hosts
from s2d_jax.errors import InputError

FOLDER = "checksums"  # with the records of the folder that it is in
FINISHED = "finished.json"  # of all files of a finished folder, within FOLDER
Record = dict[str, dict[str, Any]]

_CHUNK = 1 << 24  # bytes of a file in memory at once
# Hashing does without the interpreter's lock, and a disk or a store serves several files at once.
_THREADS = min(16, 2 * (os.cpu_count() or 1))


def digest(value: Any) -> str:
  """SHA-256, in hex, of a value made of dicts, lists, strings and numbers."""
  # Keys are sorted, so that the order in which a config was written renames nothing.
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Damage(NamedTuple):
  """A file that is not as it was recorded."""
  name: str   # within its folder
  text: str   # with the whole path, such as "/runs/a/x has 512 bytes and had 1,024"
  unreadable: bool = False  # the disk fails, so nothing is known of the file


def listed(folder: epath.PathLike) -> Iterator[str]:
  """Yields the path of every whole file under a folder, within it, in order of names."""
  folder = epath.Path(folder)
  # A killed write leaves its temporary file behind, whose name begins with a dot.
  for path in sorted(folder.iterdir(), key=lambda p: p.name):
    if path.is_dir():
      yield from (f"{path.name}/{name}" for name in listed(path))
    elif not path.name.startswith("."):
      yield path.name


def record(folder: epath.PathLike, names: Iterable[str]) -> Record:
  """The record of these files of a folder.

  On several processes it is a collective: each process reads its share of the files.

  Raises:
    OSError: a file cannot be read.
  """
  found = _merged(folder, sorted(names), together=True)
  for name, of_file in found.items():
    if "error" in of_file:
      raise OSError(f"{epath.Path(folder) / name} cannot be read ({of_file['error']})")
  return found


def damage(folder: epath.PathLike, recorded: Record, together: bool = True) -> Damage | None:
  """The first file that is not as it was recorded; None where all are.

  Args:
    recorded: a file may lack its size.
    together: on several processes it is a collective, as `record` is; False: this process alone
      reads all files.
  """
  there = [name for name in recorded if (epath.Path(folder) / name).exists()]
  found = _merged(folder, there, together)
  for name, written in sorted(recorded.items()):
    path = epath.Path(folder) / name
    if name not in found:
      return Damage(name, f"{path} is missing")
    if "error" in found[name]:
      return Damage(name, f"{path} cannot be read ({found[name]['error']})", unreadable=True)
    size = found[name]["bytes"]
    if size != written.get("bytes", size):
      return Damage(name, f"{path} has {size:,} bytes and had {written['bytes']:,}")
    if found[name]["sha256"] != written["sha256"]:
      return Damage(name, f"{path} holds other bytes than were written")
  return None


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


def redo(folder: epath.PathLike) -> str:
  """The remedy for a damaged file of a finished folder."""
  name = epath.Path(folder).name
  return f"put the file back, or make {name} again by the command of its run with --redo={name}"


def _merged(folder: epath.PathLike, names: list[str], together: bool) -> Record:
  """The record of the files, of which each process has read its share."""
  first, processes = hosts.share() if together else (0, 1)
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    share = names[first::processes]
    measured = pool.map(lambda name: _measured(epath.Path(folder) / name), share)
    of_share = dict(zip(share, measured, strict=True))
  if not together:
    return of_share
  merged: Record = {}
  for part in hosts.gather("checksums", of_share, hosts.START_SECONDS):
    merged |= part
  return merged


def _measured(path: epath.Path) -> dict[str, Any]:
  """Size and SHA-256 of a file; or the error, which then reaches every process."""
  digest = hashlib.sha256()
  size = 0
  try:
    with path.open("rb") as file:
      while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
  except OSError as error:
    return {"error": error.strerror or str(error)}
  return {"bytes": size, "sha256": digest.hexdigest()}
