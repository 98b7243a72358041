"""Errors of Orbax and TensorStore, turned into one sentence where a disk or a store has failed."""

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from s2d_jax import checksums, files
from s2d_jax.sharding import Params

# In a ValueError TensorStore says this of a disk or a store. The other statuses, such as
# INVALID_ARGUMENT, are of a wrong request. Those of the system carry its error code.
_CODE = re.compile(r"[A-Z_]+: .*os_error_code='(\d+)'", re.DOTALL)
_STATUS = re.compile("(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|UNAUTHENTICATED|PERMISSION_DENIED): ")
# Of a file that is damaged or gone, which no further attempt changes. OUT_OF_RANGE without "Error
# reading" is an index of ours beyond an array's end.
_DAMAGED = re.compile("(DATA_LOSS|NOT_FOUND): |OUT_OF_RANGE: Error reading ")


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
  """A block in which Orbax writes; hides the tracebacks that its threads print.

  Raises:
    WriteError: in the place of Orbax's error, where the disk or the store has failed.
  """
  log = logging.getLogger("absl")
  hook = sys.unraisablehook
  # Once a save has failed both stay, because further threads of it fail a moment later.
  failed = getattr(hook, "func", None) is _hide_closed_loop
  log.addFilter(_is_not_of_orbax)  # once, however often it is added
  if not failed:
    sys.unraisablehook = functools.partial(_hide_closed_loop, hook)
  try:
    with jax.transfer_guard("allow"):
      yield
  # TensorStore's errors are ValueErrors; those of the metadata's files are OSErrors.
  except (ValueError, OSError) as error:
    failure = failure_of_disk(error)
    if failure is None:
      raise
    raise files.not_written(path, checksums.reason(failure)) from error
  if not failed:
    log.removeFilter(_is_not_of_orbax)
    sys.unraisablehook = hook


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname


def _hide_closed_loop(hook: Callable[[Any], None], unraisable: Any) -> None:
  """`sys.unraisablehook`, but for the error of TensorStore's threads after a failed save."""
  if str(unraisable.exc_value) != "Event loop is closed":
    hook(unraisable)


def read(path: epath.Path, load: Callable[[], Params]) -> Params:
  """The result of `load()`, in which Orbax reads.

  Raises:
    WriteError: the disk or the store fails at each attempt.
  """
  def attempt() -> Params:
    try:
      with jax.transfer_guard("allow"):
        return load()
    except Exception as error:
      failure = failure_of_disk(error)
      if failure is None:
        raise
      if _DAMAGED.match(str(failure)):
        raise checksums.not_read(path, failure) from error
      raise failure from error

  try:
    # All processes load together: one that began again alone would wait for the others for ever.
    return checksums.retried(path, attempt, () if jax.process_count() > 1 else None, OSError)
  except OSError as error:  # a file of it is gone
    raise checksums.not_read(path, error) from error


def failure_of_disk(error: BaseException | None) -> OSError | None:
  """A new OSError for that behind an error of Orbax's, or for TensorStore's; None: it has neither.
  """
  while error is not None:
    if isinstance(error, OSError):
      return OSError(error.errno, error.strerror) if error.errno else OSError(str(error))
    if isinstance(error, ValueError):
      text = str(error)
      code = _CODE.match(text)
      if code:
        return OSError(int(code[1]), os.strerror(int(code[1])))
      if _STATUS.match(text) or _DAMAGED.match(text):
        return OSError(text)
    # As Python prints them: `from None` hides the error that was handled meanwhile.
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
  return None
