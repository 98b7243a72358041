"""Files are written whole, and one process writes a folder."""

import errno
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from s2d_jax import command, files
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


def test_a_file_that_cannot_be_read_is_named(tmp_path):
  (tmp_path / "folder.json").mkdir()
  for name, said in {"none.json": "No such file or directory", "folder.json": "Is a directory"
                     }.items():
    with pytest.raises(InputError) as refused:
      files.read_json(tmp_path / name, "buy a new disk")
    assert str(refused.value) == f"{tmp_path}/{name} cannot be read ({said}): buy a new disk."


def test_a_file_that_cannot_be_read_for_a_moment_is_tried_again(tmp_path, failing_disk):
  path = tmp_path / "a.json"
  files.write_json(path, {"a": 1})
  waits = failing_disk("read_bytes", 2, errno.EIO)
  assert files.read_json(path) == {"a": 1} and len(waits) == 2
  failing_disk("read_bytes", 99, errno.EIO)
  with pytest.raises(WriteError) as refused:
    files.read_json(path)
  assert str(refused.value) == (f"{path} cannot be read (Input/output error): mend the disk, and "
                                "the same command goes on from there.")
  assert 1 <= sum(waits) <= 10
  failing_disk("read_bytes", 1, errno.EACCES)
  with pytest.raises(WriteError, match="a.json cannot be read .Permission denied.: permit this us"):
    files.read_json(path)
  assert waits == []


def test_a_second_writer_is_refused_and_a_dead_one_replaced(tmp_path, capsys):
  path = tmp_path / "writer.lock"
  sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  other = {"host": socket.gethostname(), "pid": sleeper.pid, "beat": time.time() - 5}
  path.write_text(json.dumps(other))
  dated = float(int(time.time()) - 60) + 0.5
  os.utime(path, (dated, dated))  # by the clock of the disk
  try:
    with pytest.raises(ValueError, match=rf"process {sleeper.pid} .*delete .*writer.lock"):
      with files.only_writer(tmp_path):
        pass
  finally:
    sleeper.kill()
    sleeper.wait()
  with files.only_writer(tmp_path) as (heartbeat, last):
    assert last == dated
    assert files.read_json(path)["pid"] == os.getpid()
    heartbeat()
  assert "taking over" in capsys.readouterr().out
  assert not path.exists()


@pytest.mark.medium
@pytest.mark.parametrize("stale", [False, True])
def test_of_two_writers_that_start_at_once_one_is_refused(tmp_path, stale):
  if stale:
    (tmp_path / "writer.lock").write_text(json.dumps(
        {"host": socket.gethostname(), "pid": 2**22 + 1, "beat": 0.0}))
  # All of them wait for one moment, hold the lock for a while, and say who had it.
  script = """
import sys, time
from s2d_jax import command, files
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


@pytest.mark.parametrize("clock", [0, -5 * 3600, 5 * 3600])
def test_a_lock_of_another_host_is_taken_over_once_it_is_silent_whatever_its_clock(
    tmp_path, clock, capsys, monkeypatch):
  monkeypatch.setattr(files, "_SILENT_SECONDS", 4)
  monkeypatch.setattr(files, "_HEARTBEAT_SECONDS", 1)
  path = tmp_path / "writer.lock"
  path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": time.time() - 2 + clock}))
  os.utime(path, (time.time() - 2,) * 2)  # as the disk dates it
  start = time.monotonic()
  written = path.stat().st_mtime
  with files.only_writer(tmp_path) as (_, last):
    assert last == written
  assert time.monotonic() - start > 1
  assert re.fullmatch(
      rf"{path}: process 1 on elsewhere wrote it [23] s ago; waiting for a heartbeat, or for 4 s "
      rf"without one.\n{path}: process 1 on elsewhere is gone or has been silent for [5-9] s; "
      "taking over.\n", capsys.readouterr().out)
  assert sorted(p.name for p in tmp_path.iterdir()) == [".writer"]


@pytest.mark.parametrize("clock", [-5 * 3600, 5 * 3600])
@pytest.mark.parametrize("silent, every", [(5, 3.0), (0, 0.2)])
def test_a_lock_of_another_host_that_is_renewed_is_not_taken_over(
    tmp_path, clock, silent, every, monkeypatch):
  monkeypatch.setattr(files, "_SILENT_SECONDS", 10)
  monkeypatch.setattr(files, "_HEARTBEAT_SECONDS", 1)
  path = tmp_path / "writer.lock"
  lock = {"host": "elsewhere", "pid": 1, "beat": time.time() + clock}
  path.write_text(json.dumps(lock))
  os.utime(path, (time.time() - silent,) * 2)
  closed = threading.Event()

  def other():
    while not closed.wait(every):
      files.write_json(path, lock | {"beat": time.time() + clock})

  thread = threading.Thread(target=other)
  thread.start()
  with pytest.raises(InputError) as refused, files.only_writer(tmp_path):
    pass
  closed.set()
  thread.join()
  assert re.fullmatch(
      rf"{tmp_path} is being written by process 1 on elsewhere \(last sign of life \d s "
      rf"ago\): wait for it, or delete {path} if that process is gone.", str(refused.value))


def test_a_lock_that_goes_while_another_process_waits_is_no_lock(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_HEARTBEAT_SECONDS", 0.2)
  path = tmp_path / "writer.lock"
  path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "beat": time.time()}))
  other = threading.Timer(0.5, path.unlink)
  other.start()
  with files.only_writer(tmp_path) as (_, last):
    assert last is None and files.read_json(path)["pid"] == os.getpid()
  other.join()


def test_a_disk_without_file_locks_can_be_written(tmp_path, monkeypatch):
  def flock(file, kind):
    raise OSError(errno.ENOSYS, "Function not implemented")

  monkeypatch.setattr(files.fcntl, "flock", flock)
  with files.only_writer(tmp_path):
    assert (tmp_path / "writer.lock").exists()


def test_a_clock_that_steps_back_does_not_stop_the_renewal(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_HEARTBEAT_SECONDS", 0.2)
  path = tmp_path / "writer.lock"
  with files.only_writer(tmp_path):
    before = path.stat().st_mtime_ns
    now = time.time() - 3600
    monkeypatch.setattr(files.time, "time", lambda: now)
    time.sleep(2.5)
    assert path.stat().st_mtime_ns > before


def test_a_lock_is_renewed_while_the_writer_is_within_a_step(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_HEARTBEAT_SECONDS", 0.2)
  path = tmp_path / "writer.lock"
  with files.only_writer(tmp_path):
    first = files.read_json(path)["beat"]
    time.sleep(2.5)
    assert files.read_json(path)["beat"] > first + 1


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"host": "a"}',
                                  '{"host": "a", "pid": null, "beat": 1}'])
def test_a_damaged_lock_is_named_with_the_remedy(text, tmp_path):
  (tmp_path / "writer.lock").write_text(text)
  with pytest.raises(InputError) as refused, files.only_writer(tmp_path):
    pass
  assert str(refused.value) == (f"{tmp_path}/writer.lock is not a lock this code wrote: delete it "
                                f"if no process writes {tmp_path}.")


@pytest.mark.parametrize("change, said", [
    (lambda folder: shutil.rmtree(folder), "its writer.lock is gone or damaged: .*No such file"),
    (lambda folder: folder.rename(folder.with_name("moved")), "its writer.lock is gone"),
    (lambda folder: (folder / "writer.lock").write_text("{"), "its writer.lock is gone or damag"),
    (lambda folder: (folder / "writer.lock").write_text('{"host": "b", "pid": 7, "beat": 1}'),
     "process 7 on b writes it now")])
def test_a_writer_stops_once_its_folder_is_gone_or_is_another_writers(
    change, said, tmp_path, monkeypatch):
  folder = tmp_path / "stage"
  now = time.monotonic()
  monkeypatch.setattr(files.time, "monotonic", lambda: now)
  with pytest.raises(WriteError) as refused:
    with files.only_writer(folder) as (heartbeat, _):
      now += 2
      heartbeat()
      change(folder)  # and the next step begins at once
      heartbeat()
  assert re.fullmatch(
      rf"{folder} was deleted, moved or taken over while process {os.getpid()} wrote it "
      rf"\({said}.*\): put it back, and the same command goes on from what was saved before.",
      str(refused.value))
  # It leaves alone what another process may hold.
  assert not folder.exists() or (folder / "writer.lock").exists()


def test_a_writer_continues_where_its_lock_cannot_be_read_for_a_moment(tmp_path, monkeypatch):
  local = type(epath.Path("/"))
  read_bytes, failures = local.read_bytes, []
  def broken(self):
    if failures:
      raise failures.pop()
    return read_bytes(self)
  now = time.monotonic()
  monkeypatch.setattr(files.time, "monotonic", lambda: now)
  with files.only_writer(tmp_path) as (heartbeat, _):
    monkeypatch.setattr(local, "read_bytes", broken)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    failures.append(OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
    now += 2
    heartbeat()
    assert not failures


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


@pytest.mark.parametrize("value", [{"a": 1}, {"a": 1, "sha257": "0" * 64}, [1], None])
def test_a_seal_that_is_gone_is_named_where_there_was_one(tmp_path, value):
  path = tmp_path / "a.json"
  files.write_json(path, value)  # as an earlier version wrote it, or with a bit of the key flipped
  assert files.read_json(path) == value
  with pytest.raises(InputError, match=f"^{path} is damaged, or was edited: buy a new disk.$"):
    files.read_json(path, "buy a new disk", sealed=True)
  if isinstance(value, dict):
    assert not files.has_seal(path)
    files.write_json(path, value, sealed=True)
    assert files.has_seal(path) and files.read_json(path, sealed=True) == value


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


@pytest.mark.parametrize("target, said", [
    ("file", r"is a file: choose a folder."),
    ("file/deep/work", r"cannot be written \(Not a directory\): choose another folder."),
    ("/proc/work", r"cannot be written \([A-Z][a-z ]+\): choose another folder."),
    ("/proc/cpuinfo", r"is a file: choose a folder."),
    ("loop/work", r"cannot be written \(Too many levels of symbolic .*\): choose another folder."),
    ("x" * 300, r"cannot be written \(File name too long\): choose another folder.")])
def test_a_work_folder_that_takes_no_file_is_refused(target, said, tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "loop").symlink_to("loop")
  path = tmp_path / target
  with pytest.raises(InputError, match=f"^--workdir={path} {said}$"):
    command.check_workdir(path)
  command.check_workdir(tmp_path / "new" / "work")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("code, said", [
    (errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded"),
    (errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file system"),
    (errno.EIO, "Input/output error"), (errno.ESTALE, "Stale file handle")])
@pytest.mark.parametrize("moment", ["mkdir", "write_bytes", "replace"])
def test_every_error_of_a_disk_is_one_sentence_and_the_file_before_holds(
    code, said, moment, tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  files.write_json(path, {"a": 1})
  def refused(*_, **__):
    raise OSError(code, os.strerror(code))
  local = type(epath.Path("/"))
  with monkeypatch.context() as patch:
    patch.setattr(local, moment, refused)
    with pytest.raises(WriteError) as error:
      files.write_json(path, {"a": 2})
  assert str(error.value) == (
      f"{path} cannot be written ({said}): free space or mend the disk, and the same command goes "
      "on from what was saved before.")
  assert files.read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]
  files.write_json(path, {"a": 2})
  assert files.read_json(path) == {"a": 2}


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
