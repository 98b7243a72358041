"""Checksums of files against `sha256sum`, and every kind of damage to a file."""

import pytest

from s2d_jax import checksums


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
