"""Checksums of files against `sha256sum`, and every kind of damage to a file."""

import errno
import pathlib
import threading

import pytest

from s2d_jax import checksums, files, hosts
from s2d_jax.errors import InputError, WriteError


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "x").write_bytes(b"hello\n")
  (tmp_path / "y").write_bytes(b"")
  (tmp_path / ".z.123").write_bytes(b"half a file of a killed process")
  return tmp_path


def test_a_record_by_hand(folder):
  names = list(checksums.listed(folder))
  assert names == ["a/x", "y"]
  # echo hello | sha256sum; sha256sum /dev/null
  assert checksums.record(folder, names) == {
      "a/x": {"bytes": 6,
              "sha256": "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"},
      "y": {"bytes": 0,
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}


@pytest.mark.parametrize("change, said", [
    (lambda path: path.unlink(), "a/x is missing"),
    (lambda path: path.write_bytes(b"hell"), "a/x has 4 bytes and had 6"),
    (lambda path: path.write_bytes(b""), "a/x has 0 bytes and had 6"),
    # One bit: h is 0x68, and i 0x69.
    (lambda path: path.write_bytes(b"iello\n"), "a/x holds other bytes than were written")])
def test_damage_is_found_and_named(folder, change, said):
  recorded = checksums.record(folder, checksums.listed(folder))
  assert checksums.damage(folder, recorded) is None
  change(folder / "a" / "x")
  found = checksums.damage(folder, recorded)
  assert (found.name, found.path, found.text) == ("a/x", folder / "a" / "x", f"{folder}/{said}")
  assert f"a/x {found.reason}" == said


def test_a_file_that_cannot_be_read_is_tried_again_and_then_one_sentence(folder, failing_disk):
  recorded = checksums.record(folder, ["a/x"])
  waits = failing_disk("open", 3, errno.EIO, name="x")
  assert checksums.damage(folder, recorded) is None
  assert len(waits) == 3 and 1 <= sum(waits) <= 10
  for read in (lambda: checksums.damage(folder, recorded),
               lambda: checksums.record(folder, ["a/x"])):
    failing_disk("open", 99, errno.EIO, name="x")
    with pytest.raises(WriteError) as refused:
      read()
    assert str(refused.value) == (f"{folder}/a/x cannot be read (Input/output error): mend the "
                                  "disk, and the same command goes on from there.")
    assert len(waits) == 3
  # No wait changes a missing permission or file.
  failing_disk("open", 1, errno.EACCES, name="x")
  with pytest.raises(WriteError, match="a/x cannot be read .Permission denied.: permit this user"):
    checksums.damage(folder, recorded)
  failing_disk("open", 1, errno.ENOENT, name="x")
  assert checksums.damage(folder, recorded).reason == "is missing"
  assert waits == []


def test_a_folder_in_the_place_of_a_file_is_damage(folder):
  recorded = checksums.record(folder, ["a/x"])
  (folder / "a" / "x").unlink()
  (folder / "a" / "x").mkdir()
  assert checksums.damage(folder, recorded).reason == "is missing"
  (folder / "a" / "x").rmdir()
  (folder / "a").rmdir()
  (folder / "a").write_text("")
  assert checksums.damage(folder, recorded).reason == "is missing"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_file_that_one_process_cannot_read_stops_all_of_them(
    folder, failing, failing_disk, monkeypatch):
  recorded = checksums.record(folder, checksums.listed(folder))
  sentence = f"{folder}/a/x cannot be read (Input/output error): mend the disk, and"
  monkeypatch.setattr(hosts, "share", lambda: (failing, 2))
  gathered = []
  def gather(name, part, seconds):
    # The other process has failed where this one reads well.
    other = {"record": {}, "error": f"{sentence} theirs"} if failing else part
    gathered.append(part)
    return [part, other]
  monkeypatch.setattr(hosts, "gather", gather)
  failing_disk("open", 99, errno.EIO, name="x")
  with pytest.raises(WriteError) as refused:
    checksums.damage(folder, recorded)
  assert str(refused.value).startswith(sentence)
  assert len(gathered) == 1 and bool(gathered[0]["error"]) == (failing == 0)


def test_a_store_is_tried_again_for_a_minute_whatever_its_errors_are(monkeypatch):
  waits = []
  monkeypatch.setattr(checksums.time, "sleep", waits.append)
  def read():
    if len(waits) < 5:
      raise RuntimeError("503 Service Unavailable\nmore")
    return b"x"
  assert checksums.retried("gs://bucket/a", read) == b"x" and waits == [1, 2, 4, 8, 15]
  waits.clear()
  def refused():
    raise RuntimeError("403 Forbidden\nmore")
  with pytest.raises(WriteError, match="gs://bucket/a cannot be read .403 Forbidden.: mend the d"):
    checksums.retried("gs://bucket/a", refused)
  assert sum(waits) == 60


class Store:
  """A folder of an object store that fails at the first lists, or at all of them."""

  def __init__(self, failures):
    self.failures = failures

  def __fspath__(self):
    return "gs://bucket/a"

  def exists(self):
    return True

  def iterdir(self):
    if self.failures:
      self.failures -= 1
      raise RuntimeError("503 Service Unavailable\nmore")
    return map(pathlib.Path, ("a/y", "a/x", "a/.z"))


def test_a_store_that_cannot_be_listed_is_tried_again(monkeypatch):
  waits = []
  monkeypatch.setattr(checksums.time, "sleep", waits.append)
  monkeypatch.setattr(checksums.epath, "Path", lambda path: path)
  for lists, found in ((checksums.entries, [".z", "x", "y"]), (files.finished_files, ["x", "y"])):
    waits.clear()
    assert [path.name for path in lists(Store(3))] == found and waits == [1, 2, 4]
    with pytest.raises(WriteError, match="gs://bucket/a cannot be read .503 Service Unavailable.:"):
      lists(Store(99))
  assert list(checksums.listed(Store(3))) == ["x", "y"]


def test_a_disk_that_cannot_be_listed_is_tried_again(folder, failing_disk):
  waits = failing_disk("iterdir", 1, errno.EIO)
  assert list(checksums.listed(folder)) == ["a/x", "y"] and len(waits) == 1
  failing_disk("iterdir", 9, errno.EIO)
  with pytest.raises(WriteError, match=f"{folder} cannot be read .Input/output error.: mend"):
    list(checksums.listed(folder))
  failing_disk("iterdir", 0, errno.EIO)
  assert checksums.entries(folder / "none") == []
  with pytest.raises(WriteError, match="y cannot be read .Not a directory.: mend the disk"):
    checksums.entries(folder / "y")


@pytest.mark.parametrize("error", [None, KeyError("a library's"), InputError("a header")])
def test_a_block_that_reads_a_damaged_file_ends_in_a_sentence_with_the_remedy(folder, error):
  recorded = checksums.record(folder, checksums.listed(folder))
  def read():
    with checksums.reading(folder, recorded, "buy a new disk"):
      if error:
        raise error
      return "read"
  if error is None:
    assert read() == "read"
  else:
    with pytest.raises(type(error)) as raised:  # nothing is damaged
      read()
    assert raised.value is error
  (folder / "a" / "x").write_bytes(b"iello\n")
  with pytest.raises(InputError) as refused:
    read()
  assert str(refused.value) == (
      f"{folder}/a/x holds other bytes than were written: buy a new disk.")


@pytest.mark.parametrize("process", [0, 1])
def test_each_process_hashes_its_share_and_all_of_them_refuse_before_the_block(
    folder, process, monkeypatch):
  (folder / "b").write_bytes(b"b")
  recorded = checksums.record(folder, checksums.listed(folder))
  (folder / "a" / "x").write_bytes(b"iello\n")
  opened = []
  shares = {0: ["a/x", "y"], 1: ["b"]}
  measured = checksums._measured
  monkeypatch.setattr(checksums, "_measured",
                      lambda path: opened.append(str(path.relative_to(folder))) or measured(path))
  monkeypatch.setattr(hosts, "share", lambda: (process, 2))
  other = {name: measured(folder / name) for name in shares[1 - process]}
  monkeypatch.setattr(hosts, "gather", lambda name, part, seconds: [
      part, {"record": other, "error": None}])
  with pytest.raises(InputError, match="a/x holds other bytes than were written: buy a new disk."):
    with checksums.reading(folder, recorded, "buy a new disk"):
      pytest.fail("the block was entered")
  assert sorted(opened) == shares[process]
  # One process alone reads all.
  opened.clear()
  with pytest.raises(InputError, match="a/x holds other bytes"):
    with checksums.reading(folder, recorded, "buy a new disk", together=False):
      pass
  assert sorted(opened) == ["a/x", "b", "y"]


def test_published_sums_that_cannot_be_read_are_tried_again(tmp_path, failing_disk):
  digest = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
  (tmp_path / "SHA256SUMS").write_text(f"{digest}  x\n")
  waits = failing_disk("read_bytes", 1, errno.ESTALE)
  assert checksums.published(tmp_path / "SHA256SUMS") == {"x": digest} and len(waits) == 1
  (tmp_path / "SHA256SUMS").unlink()
  with pytest.raises(WriteError, match="SHA256SUMS cannot be read .No such file or directory.: "):
    checksums.published(tmp_path / "SHA256SUMS")


def test_files_are_hashed_while_a_block_writes_others(folder, failing_disk, monkeypatch):
  names = list(checksums.listed(folder))
  hashed, begun = checksums._hashed, threading.Event()
  def slow(path):
    assert begun.wait(60)  # until the block runs
    return hashed(path)
  monkeypatch.setattr(checksums, "_hashed", slow)
  with checksums.recording(folder, names) as recorded:
    begun.set()
  assert recorded() == checksums.record(folder, names)
  # The block's error is the one to see; otherwise that of the disk.
  failing_disk("open", 99, errno.EIO, name="x")
  with pytest.raises(KeyError, match="the block's"), checksums.recording(folder, names):
    raise KeyError("the block's")
  with checksums.recording(folder, names) as recorded:
    pass
  with pytest.raises(WriteError, match="a/x cannot be read .Input/output error.: mend the disk"):
    recorded()
