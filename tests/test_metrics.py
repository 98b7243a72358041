"""Logs are cut back to the checkpoint's step, and compilations are counted."""

import errno
import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from s2d_jax import checksums, files, metrics
from s2d_jax.errors import InputError, WriteError


def test_a_killed_log_is_cut_back_and_ends_with_equal_bytes(tmp_path):
  def steps(log, start, stop, every):
    for step in range(start, stop):
      if step % every == 0 and step > start:
        log.flush(step)
      log.add({"step": step, "x": np.float32(step) / 3})
  whole = metrics.Log(tmp_path / "a", "metrics", 0)
  steps(whole, 0, 6, 2)
  whole.flush(6)
  killed = metrics.Log(tmp_path / "b", "metrics", 0)
  steps(killed, 0, 6, 2)  # the last flush never came; parts 0 and 2 are there
  resumed = metrics.Log(tmp_path / "b", "metrics", 2)  # and the checkpoint of step 4 was lost
  assert [r["step"] for r in resumed.rows] == [0, 1]
  steps(resumed, 2, 6, 2)
  resumed.flush(6)
  files = [sorted(p.name for p in (tmp_path / d / "metrics").iterdir()) for d in "ab"]
  assert files[0] == files[1] == ["00000000.jsonl", "00000002.jsonl", "00000004.jsonl"]
  for name in files[0]:
    assert (tmp_path / "a/metrics" / name).read_bytes() == \
        (tmp_path / "b/metrics" / name).read_bytes()
  assert metrics.read(tmp_path / "b", "metrics") == resumed.rows


@pytest.mark.parametrize("part, first", [("00000000.jsonl", 0), ("00000002.jsonl", 2)])
def test_a_log_that_lacks_a_step_is_named_with_the_checkpoint(part, first, tmp_path):
  log = metrics.Log(tmp_path, "ledger", 0)
  for step in range(4):
    log.add({"step": step})
    if step % 2:
      log.flush(step + 1)
  assert len(metrics.Log(tmp_path, "ledger", 4, every_step=True).rows) == 4
  (tmp_path / "ledger" / part).unlink()
  with pytest.raises(InputError) as refused:
    metrics.Log(tmp_path, "ledger", 4, every_step=True)
  assert str(refused.value) == (
      f"{tmp_path}/ledger has no entry of step {first}, and the checkpoint of step 4 counts on it: "
      f"put its files back, or delete {tmp_path}/checkpoints/4, and the same command goes on from "
      "the checkpoint before that.")


def test_numbers_that_json_cannot_hold_become_strings():
  assert files.plain({"a": [float("inf"), np.float32(1)], "b": np.arange(2)}) == {
      "a": ["inf", 1.0], "b": [0, 1]}


@pytest.mark.parametrize("line, sentence", [
    (b'{"step": 1', "is not JSON .*: put the file back, or delete {0}, and the "),
    (b'{"step": NaN}', "has NaN"),
    (b"[1]", "is not a JSON object: put the file back"), (b"\xff{}", "is not UTF-8"),
    (b'{"step": 1, "step": 2}', "has the key 'step' twice")])
def test_a_damaged_line_of_a_log_is_named(line, sentence, tmp_path):
  log = metrics.Log(tmp_path, "metrics", 0)
  log.add({"step": 0})
  log.flush(1)
  part = tmp_path / "metrics" / "00000000.jsonl"
  part.write_bytes(part.read_bytes() + line + b"\n")
  with pytest.raises(InputError, match=f"^{part} line 2 {sentence.format(tmp_path)}"):
    metrics.read(tmp_path, "metrics")


def test_a_part_that_cannot_be_read_is_tried_again_and_then_one_sentence(tmp_path, monkeypatch):
  log = metrics.Log(tmp_path, "metrics", 0)
  log.add({"step": 0})
  log.flush(1)
  local = type(epath.Path("/"))
  read_bytes, waits, failures = local.read_bytes, [], []
  def broken(self):
    if failures.pop():
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return read_bytes(self)
  monkeypatch.setattr(local, "read_bytes", broken)
  monkeypatch.setattr(checksums.time, "sleep", waits.append)
  failures[:] = [0, 1]
  assert metrics.read(tmp_path, "metrics") == [{"step": 0}] and len(waits) == 1
  failures[:] = [1] * 9
  with pytest.raises(WriteError, match="00000000.jsonl cannot be read .Input/output error.: mend"):
    metrics.read(tmp_path, "metrics")


def test_tensorboard_files_are_written_and_cut(tmp_path):
  log = metrics.Log(tmp_path, "metrics", 0, tensorboard=True)
  log.add({"step": 0, "loss": 1.0})
  log.flush(2)
  log.add({"step": 2, "loss": 0.5})
  log.flush(4)
  assert len(list((tmp_path / "tensorboard").iterdir())) == 2
  metrics.Log(tmp_path, "metrics", 2, tensorboard=True)
  remaining = list((tmp_path / "tensorboard").iterdir())
  assert [p.name[:8] for p in remaining] == ["00000000"] and b"loss" in remaining[0].read_bytes()


FULL = """
import pathlib, resource, sys, tempfile
from s2d_jax import metrics
from s2d_jax.errors import WriteError
tempfile.gettempdir()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
try:
  metrics._write_events(pathlib.Path(sys.argv[1]), 0, [{"step": 0, "loss": 1.0}])
except WriteError as error:
  said = str(error)
sys.exit(said)
"""


def test_a_full_disk_is_one_sentence_for_event_files(tmp_path):
  # A pipe takes the sentence, and all that the writer prints when the process ends.
  done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], text=True,
                        capture_output=True, check=False)
  assert done.stderr == (
      f"{tempfile.gettempdir()} cannot be written (File too large): free space or mend the disk, "
      "and the same command goes on from what was saved before.\n")


def test_compilations_are_counted():
  x = jnp.ones(3)
  with metrics.compilations() as count:
    f = jax.jit(lambda x: x * 3 + 1)
    f(x)
    assert count().count == 1
    f(x)
    assert count().count == 1
  jax.jit(lambda x: x * 5)(x)
  assert count().count == 1  # closed
