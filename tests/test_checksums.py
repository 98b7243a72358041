"""Checksums of files against `sha256sum`, and every kind of damage to a file."""

import errno
import os

import pytest
from etils import epath

from s2d_jax import checksums, hosts
from s2d_jax.errors import InputError


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
  assert found.name == "a/x" and found.text == f"{folder}/{said}"


def test_a_file_that_cannot_be_read_is_damage_and_is_not_recorded(folder, monkeypatch):
  recorded = checksums.record(folder, ["a/x"])
  local = type(epath.Path("/"))
  def broken(self, mode):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
  monkeypatch.setattr(local, "open", broken)
  assert checksums.damage(folder, recorded).text == (
      f"{folder}/a/x cannot be read (Input/output error)")
  with pytest.raises(OSError, match="a/x cannot be read .Input/output error."):
    checksums.record(folder, ["a/x"])


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
  monkeypatch.setattr(hosts, "gather", lambda name, of_share, seconds: [of_share, other])
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
