"""Coordination of the processes of one run: one writer, barriers, sums, a common stop.

On one process every function here returns at once.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax._src import distributed  # its client has no public name (jax 0.10, 0.11)
from jax.experimental import multihost_utils

from s2d_jax.errors import InputError

# Collectives go through the devices, so the functions that make them allow the transfers that the
# rest of a run forbids.

RETRY = 75  # exit code EX_TEMPFAIL: stopped and saved, so the same command goes on
AGREE_SECONDS = 60
START_SECONDS = 600  # where a process may still compile, or load weights
SHARED_SECONDS = 60  # a network disk may show a new file to other hosts so late
_ROUNDS: dict[str, int] = {}  # name -> number of its last round in `gather`


def join(seconds: int) -> None:
  """`jax.distributed.initialize`, which finds the other processes by their cluster's environment.

  Args:
    seconds: how long to wait for the others.

  Raises:
    InputError: there is no cluster.
  """
  # `stops` agrees on stops; JAX's own service would take the signals away from it.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(initialization_timeout=seconds)
  except ValueError as error:
    if "be defined" not in str(error):
      raise
    raise InputError(
        "--distributed finds no cluster on this machine: leave it out where one process does all "
        "the work, or start all processes by a launcher, such as launch/slurm.sh.") from error


def leader() -> bool:
  """True on the one process that writes files."""
  return jax.process_index() == 0


def share() -> tuple[int, int]:
  """(this process's number, the number of processes): it takes items[number::processes]."""
  return jax.process_index(), jax.process_count()


def barrier(name: str) -> None:
  """Returns once every process has called it with this name."""
  if jax.process_count() > 1:
    with jax.transfer_guard("allow"):
      multihost_utils.sync_global_devices(name)


def sum_over_hosts(own_B: np.ndarray) -> np.ndarray:
  """The sum of the arrays of all processes, on each; all must call it, with equal shapes."""
  if jax.process_count() == 1:
    return own_B
  with jax.transfer_guard("allow"):
    return multihost_utils.process_allgather(own_B).sum(axis=0)


def join_shares(share: Mapping[int, float], count: int) -> np.ndarray:
  """float32 [count] of values by index, of which each process has a share; all must call it."""
  # Values of other processes stay 0, so that the sum has each one's.
  own_B = np.zeros(count, np.float32)
  for index, value in share.items():
    own_B[index] = value
  return sum_over_hosts(own_B)


def local_memory() -> int | None:
  """Bytes of the memory of a device of this process; None where it is unknown, as on a CPU."""
  stats = jax.local_devices()[0].memory_stats()
  return stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def device_memory() -> int | None:
  """Bytes of a device's memory, the least of all processes; None where it is unknown, as on a CPU.

  On several processes this is a collective: all must call it.
  """
  size = local_memory()
  if size is None:
    return None
  # In MiB, because JAX sums whole numbers of 32 bits.
  own_P = np.zeros(jax.process_count(), np.int32)
  own_P[jax.process_index()] = size // 2**20
  return int(sum_over_hosts(own_P).min()) * 2**20


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
  """Yields a function that is true once a SIGTERM has come, on all processes at the same call.

  On several processes every call is a collective: all must make it.
  """
  if jax.process_count() > 1:
    # jax's own service catches the signal and picks the call at which all processes see it.
    calls = itertools.count()
    yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
    return
  # A handler only takes a note: the work stops where all of its state can be saved.
  signals: list[bool] = []
  before = signal.signal(signal.SIGTERM, lambda *_: signals.append(True))
  try:
    yield lambda: bool(signals)
  finally:
    signal.signal(signal.SIGTERM, before)


def agree(name: str, digest: str, seconds: int | None = None) -> None:
  """Compares a short text over processes before they dispatch the same program.

  Args:
    name: of the comparison, counted in rounds; digest: the text, equal on every process.
    seconds: how long to wait for each process, AGREE_SECONDS where None.

  Raises:
    RuntimeError: a process has another text, or sends none in time; the message names it.
      Without this check the processes' collectives would wait for each other for ever.
  """
  for other, theirs in enumerate(gather(name, digest, seconds)):
    if theirs != digest:
      raise RuntimeError(
          f"processes {jax.process_index()} and {other} differ in round {_ROUNDS[name]} of the "
          f"{name}: they must run one program on the same data; start again from the checkpoint.")


def check_start(facts: Mapping[str, Any]) -> None:
  """Compares the facts that all processes were started with, before any of them does work.

  Args:
    facts: by name, made of what JSON has.

  Raises:
    InputError: two processes differ; names the first fact, the processes, and both values.
  """
  process = jax.process_index()
  for other, theirs in enumerate(gather("start", dict(facts), START_SECONDS)):
    for name in sorted(facts.keys() | theirs.keys()):
      if facts.get(name) != theirs.get(name):
        raise InputError(
            f"process {process} has {name} = {facts.get(name)!r} and process {other} has "
            f"{theirs.get(name)!r}: start all processes with one command, code and data.")


def check_shared(workdir: epath.PathLike) -> None:
  """Checks that all processes have one work folder: each reads a file that the leader writes there.

  On several processes it is a collective, which creates the folder and leaves nothing in it.

  Raises:
    InputError: a process cannot read the file; every process raises it, and names that one.
  """
  if jax.process_count() == 1:
    return
  nonce = gather("workdir", uuid.uuid4().hex, START_SECONDS)[0]
  path = epath.Path(workdir) / f".shared-{nonce}"
  if leader():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nonce)
  gather("workdir", "written", START_SECONDS)
  found = gather("workdir", [socket.gethostname(), _unread(path, nonce)],
                 START_SECONDS + SHARED_SECONDS)
  if leader():
    path.unlink()
  for process, (host, error) in enumerate(found):
    if error:
      raise InputError(
          f"process {process} on {host} cannot read what process 0 on {found[0][0]} wrote to "
          f"--workdir={os.fspath(workdir)} ({error}): choose a folder that all hosts reach, such "
          "as one on a network disk.")


def _unread(path: epath.Path, text: str) -> str:
  """Why a file cannot be read, or has another text; "" where it has this one."""
  deadline = time.monotonic() + SHARED_SECONDS
  while True:
    try:
      if path.read_text() == text:
        return ""
      error = "it has another text"
    except OSError as failure:
      error = failure.strerror or str(failure)
    if time.monotonic() >= deadline:
      return error
    time.sleep(0.5)


def gather(name: str, value: Any, seconds: int | None = None) -> list[Any]:
  """The values that all processes give, in the order of the processes; all must call it.

  Args:
    name: of what is gathered, counted in rounds; value: made of what JSON has.
    seconds: how long to wait for each process, AGREE_SECONDS where None.

  Raises:
    RuntimeError: a process sends none in time; the message names it.
  """
  if jax.process_count() == 1:
    return [value]
  # The values go through the coordinator's key-value store: a device program that gathered them
  # would itself wait for ever where the processes differ.
  client = distributed.global_state.client
  seconds = seconds or AGREE_SECONDS
  current = _ROUNDS.get(name, -1) + 1
  _ROUNDS[name] = current
  process = jax.process_index()
  client.key_value_set(f"{name}/{current}/{process}", json.dumps(value))
  found = []
  for other in range(jax.process_count()):
    try:
      theirs = client.blocking_key_value_get(f"{name}/{current}/{other}", 1000 * seconds)
    except jax.errors.JaxRuntimeError as error:
      raise RuntimeError(f"process {other} has not reached round {current} of the {name} within "
                         f"{seconds} s: look for its error, and start again.") from error
    found.append(json.loads(theirs))
  # A process that is in this round has read all of the last but one, so its key can go.
  if current > 1:
    client.key_value_delete(f"{name}/{current - 2}/{process}")
  return found
