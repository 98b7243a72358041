"""Errors of Orbax: a disk's are one sentence, and those of a wrong request stay what they are."""

import errno
import logging
import sys
import types

import pytest

from s2d_jax import checksums, orbax_errors
from s2d_jax.errors import WriteError


def test_threads_of_a_failed_save_print_nothing(monkeypatch, tmp_path, caplog):
  shown = []
  monkeypatch.setattr(sys, "unraisablehook", shown.append)
  log = logging.getLogger("absl")
  monkeypatch.setattr(log, "filters", list(log.filters))
  with pytest.raises(WriteError, match="cannot be written .No space left on device.: free"):
    with orbax_errors.writing(tmp_path):
      raise ValueError("RESOURCE_EXHAUSTED: Error writing \"d\" [os_error_code='28']")
  # Closing may succeed after that, and the threads go on.
  with orbax_errors.writing(tmp_path):
    pass
  # As TensorStore's and Orbax's threads do, at a moment that no test can choose.
  for text in ("Event loop is closed", "another error"):
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
  assert [str(one.exc_value) for one in shown] == ["another error"]
  for path in ("orbax/checkpoint/futures.py", "s2d_jax/metrics.py"):
    log.handle(logging.LogRecord("absl", logging.ERROR, path, 1, path, None, None))
  assert [record.pathname for record in caplog.records] == ["s2d_jax/metrics.py"]


def test_a_save_that_succeeds_hides_no_later_error(monkeypatch, tmp_path):
  hook, log = sys.__unraisablehook__, logging.getLogger("absl")
  monkeypatch.setattr(sys, "unraisablehook", hook)
  monkeypatch.setattr(log, "filters", [])
  with orbax_errors.writing(tmp_path):
    assert sys.unraisablehook is not hook and log.filters
  assert sys.unraisablehook is hook and log.filters == []


def while_handling(error, cause=None, hidden=False):
  """A KeyError that was raised while `error` was handled."""
  later = KeyError("state")
  later.__context__, later.__cause__ = error, cause
  later.__suppress_context__ = hidden
  return later


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error, said", [
    # As TensorStore, Orbax and Python say it.
    (ValueError("UNKNOWN: Error opening \"d\" [os_error_code='5']"), "Input/output error"),
    (ValueError("RESOURCE_EXHAUSTED: write\nfile [os_error_code='28']"), NO_SPACE.strerror),
    (ValueError("UNAVAILABLE: no host"), "UNAVAILABLE: no host"),
    (ValueError("DEADLINE_EXCEEDED: 60 s"), "DEADLINE_EXCEEDED: 60 s"),
    (ValueError("PERMISSION_DENIED: 403"), "PERMISSION_DENIED: 403"),
    (ValueError("DATA_LOSS: Error reading shard entry"), "DATA_LOSS: Error reading shard entry"),
    (ValueError("NOT_FOUND: Error opening"), "NOT_FOUND: Error opening"),
    (ValueError("OUT_OF_RANGE: Error reading shard"), "OUT_OF_RANGE: Error reading shard"),
    (NO_SPACE, NO_SPACE.strerror),
    (while_handling(None, cause=NO_SPACE), NO_SPACE.strerror),
    (while_handling(NO_SPACE), NO_SPACE.strerror),
    # Of a wrong request, or of a library.
    (ValueError("INVALID_ARGUMENT: expected shape [4] but got [8]"), None),
    (ValueError("FAILED_PRECONDITION: Expected dtype float32"), None),
    (ValueError("OUT_OF_RANGE: Index 5 is outside valid range [0, 4)"), None),
    (ValueError("RESOURCE_EXHAUSTED: out of memory"), None),
    (while_handling(NO_SPACE, hidden=True), None),
    (KeyError("state"), None)])
def test_errors_of_a_disk_are_those_of_the_system_and_few_of_tensorstores(error, said):
  found = orbax_errors.failure_of_disk(error)
  assert (found and checksums.reason(found)) == said


def written(path, fail):
  with orbax_errors.writing(path):
    fail()


@pytest.mark.parametrize("block", [orbax_errors.read, written])
def test_an_error_of_a_wrong_request_is_not_the_disks(block, tmp_path, monkeypatch):
  waits = []
  monkeypatch.setattr(checksums.time, "sleep", waits.append)
  log = logging.getLogger("absl")
  monkeypatch.setattr(log, "filters", list(log.filters))
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  def fail():
    raise ValueError("INVALID_ARGUMENT: expected shape [4] but got [8]")
  with pytest.raises(ValueError, match="^INVALID_ARGUMENT: expected shape"):
    block(tmp_path, fail)
  assert waits == []
