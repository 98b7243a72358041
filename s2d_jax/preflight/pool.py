"""Compiles programs on all cores, equal ones once, and reports each on standard error."""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax

from s2d_jax.chips import Chip
from s2d_jax.preflight import costs
from s2d_jax.preflight.costs import Cost, DoesNotFit, Moved, Read


class Request(NamedTuple):
  """A program to compile; the fields that `costs.cost` has too are described there."""
  stage: str
  program: str
  # DoesNotFit where its arrays alone exceed the memory
  lowered: jax.stages.Lowered | DoesNotFit | Moved
  resident: int = 0
  runs: float = 0.0
  trips: int = 1
  tokens: float = 0.0


class Progress:
  """Programs that are compiled already, by their text."""

  def __init__(self) -> None:
    self._found: dict[bytes, futures.Future[Read | DoesNotFit]] = {}
    self._total = 0  # distinct programs that were asked for
    self._done = 0
    self._printing = threading.Lock()

  def costs(self, requests: Sequence[Request], chip: Chip | None) -> Iterator[Cost]:
    """Yields the Cost of each request in order, each as soon as it and those before are compiled.
    """
    # XLA compiles without the interpreter's lock, so threads use all cores.
    pool = futures.ThreadPoolExecutor(os.cpu_count())
    hashes = [_hash(request) for request in requests]
    self._total += len(set(hashes) - self._found.keys() - {None})
    try:
      found = [self._submit(pool, *pair) for pair in zip(requests, hashes, strict=True)]
      for request, program in zip(requests, found, strict=True):
        compiled = program.result() if isinstance(program, futures.Future) else program
        yield costs.cost(request.stage, request.program, compiled, request.resident, request.runs,
                         request.trips, chip, request.tokens)
    finally:
      pool.shutdown(cancel_futures=True)

  def _submit(self, pool: futures.Executor, request: Request,
              key: bytes | None) -> "futures.Future[Read | DoesNotFit] | DoesNotFit | Moved":
    """The result of a request, to come where it is not there yet; `key` is its `_hash`."""
    if key is None:
      return request.lowered
    if key not in self._found:
      self._found[key] = pool.submit(self._compile, request)
    return self._found[key]

  def _compile(self, request: Request) -> Read | DoesNotFit:
    start = time.monotonic()
    found = costs.compile_or_refuse(request.lowered)
    with self._printing:
      self._done += 1
      print(f"{request.stage}: {request.program} compiled in {time.monotonic() - start:.1f} s "
            f"({self._done} of {self._total} programs)", file=sys.stderr, flush=True)
    return found


def _hash(request: Request) -> bytes | None:
  """A hash of a program's text, which has its shapes and layouts; None where there is no program.

  Stages share many programs.
  """
  if isinstance(request.lowered, DoesNotFit | Moved):
    return None
  return hashlib.sha256(request.lowered.as_text().encode()).digest()
