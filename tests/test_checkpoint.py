"""Checkpoints are complete or absent, and load on another mesh."""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath

from s2d_jax import checkpoint, checksums, metrics, sharding
from s2d_jax.errors import InputError, WriteError


def state(value, mesh):
  return {"w": sharding.put(np.full((8, 4), value, np.float32),
                            sharding.weight_sharding(mesh, ("embed", "mlp"), (8, 4)))}


def test_a_state_is_freed_before_another_is_loaded_in_its_layout(tmp_path):
  steps = checkpoint.Checkpoints(tmp_path)
  steps.save(2, state(5, sharding.make_mesh((1, 1, 1))))
  fresh = state(0, sharding.make_mesh((2, 2, 2)))
  layout = fresh["w"].sharding
  found = steps.load_over(fresh)
  steps.close()
  assert fresh["w"].is_deleted() and found["w"].sharding == layout
  np.testing.assert_array_equal(found["w"], np.full((8, 4), 5, np.float32))


def test_a_checkpoint_of_one_mesh_is_restored_on_another(tmp_path):
  one, many = sharding.make_mesh((1, 1, 1)), sharding.make_mesh((2, 2, 2))
  steps = checkpoint.Checkpoints(tmp_path)
  assert steps.latest() is None
  for step in (2, 4, 6):
    steps.save(step, state(step, one))
  assert steps.latest() == 6
  got = steps.load(sharding.abstract(state(0, many)))
  steps.close()
  np.testing.assert_array_equal(got["w"], np.full((8, 4), 6, np.float32))
  assert got["w"].sharding == state(0, many)["w"].sharding
  steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  assert steps == ["4", "6"]
  checkpoint.save_final(tmp_path, state(9, one))
  checkpoint.save_final(tmp_path, state(9, one))  # done again after a kill: replaced
  checkpoint.drop_steps(tmp_path)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["final"]
  final = checkpoint.load_final(tmp_path, sharding.abstract(state(0, many)))
  np.testing.assert_array_equal(final["w"], np.full((8, 4), 9, np.float32))


def test_a_relative_folder_is_accepted(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  mesh = sharding.make_mesh((1, 1, 1))
  steps = checkpoint.Checkpoints("runs/stage")
  steps.save(1, state(3, mesh))
  steps.close()
  checkpoint.save_final("runs/stage", state(4, mesh))
  final = checkpoint.load_final("runs/stage", sharding.abstract(state(0, mesh)))
  np.testing.assert_array_equal(final["w"], np.full((8, 4), 4, np.float32))
  assert sorted(p.name for p in (tmp_path / "runs/stage/checkpoints").iterdir()) == ["1", "final"]


def stage_of(folder):
  """A stage that saved at steps 2 and 4, with a part of a log before each."""
  steps = checkpoint.Checkpoints(folder)
  log = metrics.Log(folder, "ledger", 0)
  for step in (2, 4):
    log.add({"step": step - 1})
    steps.save(step, state(step, sharding.make_mesh((1, 1, 1))), log.flush(step))
  steps.close()


def resumed(folder):
  """The step that a stage goes on from, and the number in its weights."""
  steps = checkpoint.Checkpoints(folder)
  latest = steps.latest()
  value = None
  if latest is not None:
    value = float(steps.load(sharding.abstract(state(0, sharding.make_mesh((1, 1, 1)))))["w"][0, 0])
  steps.close()
  return latest, value


def flip(path, share=0.5):
  """Turns one bit of a file round."""
  data = bytearray(path.read_bytes())
  data[int(share * len(data))] ^= 0x40
  path.write_bytes(bytes(data))


def largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def every_file(folder, change):
  for path in [p for p in folder.rglob("*") if p.is_file()]:
    change(path)


def sums_of(step):
  return step.parents[1] / "checksums" / f"{int(step.name):08d}.json"


@pytest.mark.parametrize("damage", [
    *(lambda step, share=share: flip(largest(step), share) for share in (0.1, 0.3, 0.8, 0.95)),
    lambda step: cut(largest(step)),
    lambda step: largest(step).unlink(),
    lambda step: largest(step).write_bytes(b""),
    lambda step: every_file(step, pathlib.Path.unlink),
    lambda step: cut(step / "_CHECKPOINT_METADATA"),
    *(lambda step, data=data: sums_of(step).write_bytes(data) for data in (
        b"", b"[1", b"\xff", b'{"a": 1, "a": 1}', b'{"a": NaN}', b"<html>")),
    lambda step: cut(sums_of(step)),
    lambda step: sums_of(step).unlink()])
def test_a_damaged_checkpoint_is_not_used_and_the_one_before_is(tmp_path, damage, capsys):
  stage_of(tmp_path)
  assert resumed(tmp_path) == (4, 4.0)
  damage(tmp_path / "checkpoints" / "4")
  assert resumed(tmp_path) == (2, 2.0)
  said = capsys.readouterr().err
  assert said.startswith(f"{tmp_path}/checkpoints/4 is not used (")
  assert said.endswith("): the stage goes on from step 2.\n") and said.count("\n") == 1
  # Another remedy than going on is not needed, and to delete checksums/ would be a loss.
  assert not any(words in said for words in ("restore", "delete", ".)"))
  damage(tmp_path / "checkpoints" / "2")
  assert resumed(tmp_path) == (None, None)
  assert "): the stage starts again.\n" in capsys.readouterr().err


def test_checkpoints_that_are_gone_are_said(tmp_path, capsys):
  stage_of(tmp_path)
  shutil.copytree(tmp_path, tmp_path / "whole")
  gone = "{0}/checkpoints/{1} is gone, though {0}/checksums/0000000{1}.json is there: {2}.\n".format
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  assert resumed(tmp_path) == (2, 2.0)
  assert capsys.readouterr().err == gone(tmp_path, 4, "the stage goes on from step 2")
  shutil.rmtree(tmp_path / "checkpoints")
  assert resumed(tmp_path) == (None, None)
  assert capsys.readouterr().err == (gone(tmp_path, 4, "the stage starts again")
                                     + gone(tmp_path, 2, "the stage starts again"))
  # One that is gone, and the one before is damaged.
  whole = tmp_path / "whole"
  shutil.rmtree(whole / "checkpoints" / "4")
  flip(largest(whole / "checkpoints" / "2"))
  assert resumed(whole) == (None, None)
  first, second = capsys.readouterr().err.splitlines()
  assert f"{first}\n" == gone(whole, 4, "the stage goes on from step 2")
  assert second.startswith(f"{whole}/checkpoints/2 is not used (")


def test_a_checkpoint_that_a_newer_one_replaced_is_not_missed(tmp_path, capsys):
  stage_of(tmp_path)
  mesh = sharding.make_mesh((1, 1, 1))
  # A process that is killed before it writes the checksums leaves those of step 2 there.
  steps = checkpoint.Checkpoints(tmp_path)
  steps._write_checksums = lambda step: None
  steps.save(6, state(6, mesh))
  steps.close()
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
  assert (tmp_path / "checksums" / "00000002.json").exists()
  assert resumed(tmp_path) == (4, 4.0)
  said = capsys.readouterr().err
  assert said.startswith(f"{tmp_path}/checkpoints/6 is not used") and said.count("\n") == 1
  # One that was set aside is not missed at the next start.
  stage_of(tmp_path / "other")
  flip(largest(tmp_path / "other" / "checkpoints" / "4"))
  assert resumed(tmp_path / "other") == (2, 2.0)
  capsys.readouterr()
  assert resumed(tmp_path / "other") == (2, 2.0) and capsys.readouterr().err == ""


def test_a_damaged_checkpoint_is_set_aside_until_the_stage_is_done(tmp_path):
  stage_of(tmp_path)
  flip(largest(tmp_path / "checkpoints" / "4"))
  assert resumed(tmp_path) == (2, 2.0)
  assert (tmp_path / "damaged" / "4" / "_CHECKPOINT_METADATA").exists()
  checkpoint.drop_steps(tmp_path)
  assert not (tmp_path / "damaged").exists()


def test_a_damaged_checkpoint_that_cannot_be_moved_is_one_sentence(tmp_path, monkeypatch):
  stage_of(tmp_path)
  saved = tmp_path / "checkpoints" / "4"
  flip(largest(saved))
  def refused(*_):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
  with monkeypatch.context() as patch:
    patch.setattr(type(epath.Path("/")), "rename", refused)
    with pytest.raises(WriteError) as error:
      resumed(tmp_path)
  assert str(error.value) == (
      f"{saved} is damaged and cannot be moved to {tmp_path}/damaged (Read-only file system): "
      "permit it or mend the disk, or delete the checkpoint, and the same command goes on from the "
      "one before.")
  # The remedy works.
  shutil.rmtree(saved)
  assert resumed(tmp_path) == (2, 2.0)


@pytest.mark.parametrize("name", ["checkpoints/4/_CHECKPOINT_METADATA", "checksums/00000004.json",
                                  "ledger/00000000.jsonl"])
def test_a_disk_that_cannot_be_read_stops_the_stage_and_nothing_is_set_aside(
    tmp_path, name, monkeypatch):
  stage_of(tmp_path)
  failing = tmp_path / name
  assert failing.exists()
  local = type(epath.Path("/"))
  def stale(read):
    def failing_read(path, *args):
      if pathlib.Path(path) == failing:
        raise OSError(errno.ESTALE, "Stale file handle")
      return read(path, *args)
    return failing_read
  for method in ("open", "read_bytes"):
    monkeypatch.setattr(local, method, stale(getattr(local, method)))
  monkeypatch.setattr(checksums.time, "sleep", lambda seconds: None)
  with pytest.raises(WriteError, match=f"^{failing} cannot be read .*Stale file handle.*: "):
    checkpoint.Checkpoints(tmp_path)
  monkeypatch.undo()
  assert resumed(tmp_path) == (4, 4.0)


def of_a_handler(error):
  """The error of Orbax's that hides one of a disk."""
  wrapped = KeyError("Failed to load checkpointable: state due to incompatible handler")
  wrapped.__cause__ = error
  return wrapped


# Orbax leaves coroutines behind where one of its reads fails.
@pytest.mark.filterwarnings("ignore::RuntimeWarning",
                            "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["4", "final"])
def test_a_checkpoint_that_cannot_be_read_is_tried_again_and_then_one_sentence(
    tmp_path, name, monkeypatch):
  stage_of(tmp_path)
  mesh = sharding.make_mesh((1, 1, 1))
  like = sharding.abstract(state(0, mesh))
  checkpoint.save_final(tmp_path, state(4, mesh))
  steps = checkpoint.Checkpoints(tmp_path)
  def load():
    return (steps.load(like) if name == "4" else checkpoint.load_final(tmp_path, like))
  orbax, waits, errors = steps._orbax if name == "4" else checkpoint.ocp, [], []
  load_well = orbax.load
  def load_or_fail(*args):
    if errors:
      raise errors.pop()
    return load_well(*args)
  monkeypatch.setattr(orbax, "load", load_or_fail)
  monkeypatch.setattr(checksums.time, "sleep", waits.append)
  # As Python, TensorStore and a store's library say it.
  for error, said in ((OSError(errno.EIO, "Input/output error"), "Input/output error"),
                      (ValueError("UNKNOWN: Error opening \"d\" [os_error_code='116']"),
                       "Stale file handle"),
                      (ValueError("UNAVAILABLE: no host\nmore"), "UNAVAILABLE: no host")):
    errors += [error, of_a_handler(error)] * 2
    with pytest.raises(WriteError) as refused:
      load()
    assert str(refused.value) == (f"{tmp_path}/checkpoints/{name} cannot be read ({said}): mend "
                                  "the disk, and the same command goes on from there.")
    assert len(waits) == 3 and not errors
    waits.clear()
    # The disk works after the first attempt.
    errors.append(of_a_handler(error))
    np.testing.assert_array_equal(load()["w"], np.full((8, 4), 4, np.float32))
    assert len(waits) == 1
    waits.clear()
  # No wait brings lost bytes back.
  errors.append(of_a_handler(ValueError("DATA_LOSS: Error reading shard entry {0, 0}")))
  with pytest.raises(WriteError, match=f"/checkpoints/{name} cannot be read .DATA_LOSS: .*: mend"):
    load()
  assert not waits
  # A wrong state is a fault of ours, and not the disk's.
  with pytest.raises(Exception, match="tree structures do not match") as mismatch:
    checkpoint.load_final(tmp_path, {"v": like["w"]})
  assert not isinstance(mismatch.value, WriteError)
  steps.close()


def test_checkpoints_without_their_folder_of_checksums_are_used_as_they_are(tmp_path, capsys):
  stage_of(tmp_path)
  shutil.rmtree(tmp_path / "checksums")
  assert resumed(tmp_path) == (4, 4.0)
  said = capsys.readouterr().err
  assert f"{tmp_path}/checkpoints/4 has no checksums, so it is used unchecked. An older" in said


def test_checkpoints_of_a_stage_that_lost_its_checksums_are_not_used(tmp_path, capsys):
  checkpoint.lost_seconds(tmp_path, 0, None)  # as a stage notes its start, before it saves
  stage_of(tmp_path)
  shutil.rmtree(tmp_path / "checksums")
  shutil.copytree(tmp_path, tmp_path / "older")
  assert resumed(tmp_path) == (None, None)
  said = capsys.readouterr().err
  assert f"{tmp_path}/checkpoints/2 is not used ({tmp_path}/checksums/00000002.json is miss" in said
  assert (tmp_path / "damaged" / "4").exists()
  # A version without checksums wrote its starts without a seal; a newer one goes on from it.
  (tmp_path / "older" / "starts" / "00000000.json").write_text('{"at": 1, "step": 0, "lost": 0}')
  checkpoint.lost_seconds(tmp_path / "older", 4, None)
  assert resumed(tmp_path / "older") == (4, 4.0)
  assert "has no checksums, so it is used unchecked." in capsys.readouterr().err


@pytest.mark.parametrize("change", [flip, cut, pathlib.Path.unlink, lambda p: p.write_bytes(b"")])
def test_a_damaged_log_before_a_checkpoint_stops_the_stage_and_is_named(tmp_path, change):
  stage_of(tmp_path)
  change(tmp_path / "ledger" / "00000002.jsonl")
  with pytest.raises(InputError) as refused:
    resumed(tmp_path)
  said = str(refused.value)
  assert said.startswith(f"{tmp_path}/ledger/00000002.jsonl ")
  assert said.endswith(
      f"; it is the log ledger of {tmp_path} from step 2 on, and the checkpoint of step 4 counts "
      f"on it: put the file back, or delete {tmp_path}/checkpoints/4, and the same command goes on "
      "from the checkpoint before that.")
  # The remedy works.
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  assert resumed(tmp_path) == (2, 2.0)


def lose_seal(path):
  """Flips a bit of the key that a file's seal has."""
  text = path.read_text()
  assert text.count('"sha256":') > 0
  before, _, after = text.rpartition('"sha256":')
  path.write_text(f'{before}"sha257":{after}')


def test_a_record_that_has_lost_its_seal_is_not_used(tmp_path, capsys):
  checkpoint.lost_seconds(tmp_path, 0, None)  # the stage's version writes seals
  stage_of(tmp_path)
  lose_seal(tmp_path / "checksums" / "00000004.json")
  assert resumed(tmp_path) == (2, 2.0)
  said = capsys.readouterr().err
  assert f"4 is not used ({tmp_path}/checksums/00000004.json is damaged, or was edited): " in said


def test_a_start_that_has_lost_its_seal_is_named_but_those_of_older_versions_have_none(tmp_path):
  starts = tmp_path / "starts"
  for _ in range(2):
    checkpoint.lost_seconds(tmp_path, 0, None)
  lose_seal(starts / "00000001.json")
  with pytest.raises(InputError, match=f"{starts}/00000001.json is damaged, .*or delete it"):
    checkpoint.lost_seconds(tmp_path, 0, None)
  for name in ("00000000.json", "00000001.json"):
    (starts / name).write_text('{"at": 1, "step": 0, "lost": 2}')
  assert checkpoint.lost_seconds(tmp_path, 0, None) == 4


@pytest.mark.parametrize("clock", [-7200, 7200])
def test_lost_seconds_are_those_of_the_disks_clock(tmp_path, clock, monkeypatch):
  now = time.time()
  # The clock of the host is hours away from that of the disk.
  monkeypatch.setattr(checkpoint.time, "time", lambda: now + clock)
  assert checkpoint.lost_seconds(tmp_path, 0, None) == 0
  os.utime(tmp_path / "starts" / "00000000.json", (1000, 1000))
  # Killed 30 s after the start; then 20 s after the checkpoint of step 4, before another start.
  assert checkpoint.lost_seconds(tmp_path, 0, 1030.0) == 30
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  os.utime(tmp_path / "starts" / "00000001.json", (2000, 2000))
  os.utime(tmp_path / "checkpoints" / "4", (2100, 2100))
  assert checkpoint.lost_seconds(tmp_path, 4, 2120.0) == 30 + 20
  # A stop cuts a step of 5 s, and a kill comes while it saves: the time of the start stays.
  os.utime(tmp_path / "starts" / "00000002.json", (3000, 3000))
  checkpoint.add_lost(tmp_path, 5.0)
  assert checkpoint.lost_seconds(tmp_path, 4, 3040.0) == 30 + 20 + 5 + 40


@contextlib.contextmanager
def files_of_at_most(size):
  """Lets no file of this process grow beyond `size` bytes, as on a disk that is full."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_holds(tmp_path, capfd):
  mesh = sharding.make_mesh((1, 1, 1))
  # Random numbers, which no compression makes small.
  wide = {"w": sharding.put(np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32),
                            sharding.weight_sharding(mesh, ("embed", "mlp"), (256, 256)))}
  steps = checkpoint.Checkpoints(tmp_path)
  steps.save(2, wide)
  with pytest.raises(WriteError) as refused, files_of_at_most(100_000):
    steps.save(4, wide)
  assert str(refused.value) == (
      f"{tmp_path}/checkpoints/4 cannot be written (File too large): free space or mend the disk, "
      "and the same command goes on from what was saved before.")
  with contextlib.suppress(WriteError):  # the error again
    steps.close()
  steps.close()  # closed already, so no error
  assert capfd.readouterr().err == ""
  # With space the stage goes on.
  steps = checkpoint.Checkpoints(tmp_path)
  assert steps.latest() == 2
  steps.save(4, wide)
  steps.close()
  assert checkpoint.Checkpoints(tmp_path).latest() == 4
  with pytest.raises(WriteError, match="checkpoints/final cannot be written"):
    with files_of_at_most(100_000):
      checkpoint.save_final(tmp_path, wide)
  checkpoint.save_final(tmp_path, wide)


class Fields(NamedTuple):
  """The fields that a state has today."""
  step: jax.Array
  params: dict


class MoreFields(NamedTuple):
  """Those of a later version, whose new field is absent by default."""
  step: jax.Array
  params: dict
  anchor: dict | None = None


def test_a_field_that_is_absent_by_default_leaves_older_checkpoints_readable(tmp_path):
  mesh = sharding.make_mesh((1, 1, 1))
  params = state(3, mesh)
  one = sharding.put(np.float32(7), sharding.replicated(mesh))
  steps = checkpoint.Checkpoints(tmp_path)
  steps.save(2, Fields(one, params))
  steps.close()
  steps = checkpoint.Checkpoints(tmp_path)
  found = steps.load(sharding.abstract(MoreFields(one, params)))
  steps.close()
  assert isinstance(found, MoreFields) and found.anchor is None and float(found.step) == 7
  np.testing.assert_array_equal(found.params["w"], params["w"])
