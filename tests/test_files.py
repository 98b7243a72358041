"""Files are written whole, and one process writes a folder."""

import json
import os
import resource
import socket
import subprocess
import sys
import time

import pytest

from s2d_jax import files
from s2d_jax.errors import InputError, WriteError
from tests import interpreter


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "deep" / "x.json"
  files.write_json(path, {"b": 1, "a": [2]})
  assert path.read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'
  with pytest.raises(ValueError):
    files.write_json(path, {"a": float("nan")})
  assert files.read_json(path) == {"a": [2], "b": 1}
  assert [p.name for p in path.parent.iterdir()] == ["x.json"]  # no temporary is left


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b'{"a": Infinity}', b"\x1f\x8b\x08", b"\xe9",
                                  b'{"a": 1, "a": 1}', b"[" * 3000])
def test_a_damaged_file_is_named(data, tmp_path):
  (tmp_path / "result.json").write_bytes(data)
  with pytest.raises(InputError, match=f"^{tmp_path}/result.json (is|has) "):
    files.read_json(tmp_path / "result.json")


def test_a_second_writer_is_refused_and_a_dead_one_replaced(tmp_path, capsys):
  path = tmp_path / "writer.lock"
  sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  other = {"host": socket.gethostname(), "pid": sleeper.pid, "beat": time.time() - 5}
  path.write_text(json.dumps(other))
  try:
    with pytest.raises(ValueError, match=rf"process {sleeper.pid} .*delete .*writer.lock"):
      with files.only_writer(tmp_path):
        pass
  finally:
    sleeper.kill()
    sleeper.wait()
  with files.only_writer(tmp_path) as (heartbeat, last):
    assert last == other["beat"]
    assert files.read_json(path)["pid"] == os.getpid()
    heartbeat()
  assert "taking over" in capsys.readouterr().out
  assert not path.exists()


@pytest.mark.parametrize("stale", [False, True])
def test_of_two_writers_that_start_at_once_one_is_refused(tmp_path, stale):
  if stale:
    (tmp_path / "writer.lock").write_text(json.dumps(
        {"host": socket.gethostname(), "pid": 2**22 + 1, "beat": 0.0}))
  # All of them wait for one moment, hold the lock for a while, and say who had it.
  script = """
import sys, time
from s2d_jax import files
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
try:
  with files.only_writer(sys.argv[1]):
    time.sleep(3)
    print("held")
except ValueError as error:
  print("refused", error)
"""
  moment = str(time.time() + 20)
  started = [interpreter.start("-c", script, tmp_path, moment) for _ in range(4)]
  printed = [process.wait(90).stdout.splitlines()[-1] for process in started]
  assert sum(line == "held" for line in printed) == 1, printed
  assert sum("is being written by process" in line for line in printed) == 3, printed


def test_a_lock_of_another_host_is_valid_for_an_hour(tmp_path):
  path = tmp_path / "writer.lock"
  path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": time.time() - 600}))
  with pytest.raises(ValueError, match="elsewhere"):
    with files.only_writer(tmp_path):
      pass
  path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": time.time() - 4000}))
  with files.only_writer(tmp_path):
    pass


def test_a_failure_leaves_the_lock_and_an_orderly_stop_does_not(tmp_path):
  with pytest.raises(FloatingPointError):
    with files.only_writer(tmp_path):
      raise FloatingPointError
  assert (tmp_path / "writer.lock").exists()
  with pytest.raises(SystemExit):
    with files.only_writer(tmp_path):
      raise SystemExit(75)
  assert not (tmp_path / "writer.lock").exists()


def test_a_sealed_object_is_read_back_and_any_change_is_named(tmp_path):
  path = tmp_path / "a.json"
  value = {"b": [1, 2.5, None], "c": {"é": "x"}}
  files.write_json(path, value, sealed=True)
  assert files.read_json(path) == value
  text = path.read_text()
  assert "sha256" in json.loads(text)
  path.write_text(text.replace("2.5", "3.5"))
  with pytest.raises(InputError, match=f"{path} is damaged, or was edited: buy a new disk."):
    files.read_json(path, "buy a new disk")


def test_a_folder_that_takes_no_file_is_one_sentence(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(WriteError, match="file/a.json cannot be written .File exists.: "):
    files.write_json(tmp_path / "file" / "a.json", {})
  path = tmp_path / "a.json"
  path.write_text("before")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
  try:
    with pytest.raises(WriteError, match="a.json cannot be written .File too large.: free space"):
      files.write(path, "x" * 100)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  # The file before holds, and nothing is left behind.
  assert path.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == [
      "a.json", "file"]


def test_a_store_that_fails_for_a_while_is_tried_again(monkeypatch):
  waits, attempts = [], []
  class Address:
    """An address whose first four puts fail."""
    parent = property(lambda self: self)
    def __fspath__(self):
      return "gs://bucket/a"
    def mkdir(self, **_):
      pass
    def write_bytes(self, data):
      attempts.append(data)
      if len(attempts) < 5:
        raise RuntimeError("503 Service Unavailable\nmore")
  monkeypatch.setattr(files.time, "sleep", waits.append)
  monkeypatch.setattr(files.epath, "Path", lambda path: path)
  files.write(Address(), "x")
  assert attempts == [b"x"] * 5 and waits == [1, 2, 4, 8]
  def refused(self, data):
    raise RuntimeError("403 Forbidden\nmore")
  Address.write_bytes = refused
  with pytest.raises(WriteError, match="gs://bucket/a cannot be written .403 Forbidden.: free"):
    files.write(Address(), "x")
  assert sum(waits[4:]) == 60
