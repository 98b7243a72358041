"""Folder names are hashes of all that goes in, and manifests are held against them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types

import jax
import pytest

from s2d_jax import checkpoint, checksums, files, manifest, sharding
from s2d_jax.errors import InputError, WriteError

ROW = {"name": "reverse_kl", "actor": "student", "learner": "student", "guide": "teacher"}
LIST = ["reverse_kl", "student", "student", "teacher"]  # the row as earlier versions wrote it
INPUTS = {"row": ROW, "config": {"steps": 100, "optim": {"lr": 1e-3}},
          "seed": 0, "parents": {"guide": "teacher_grpo-1", "actor": None}}


def test_equal_inputs_give_equal_names():
  name = manifest.name("reverse_kl", INPUTS)
  row, _, digest = name.rpartition("-")
  assert row == "reverse_kl" and len(digest) == 12 and int(digest, 16) >= 0
  backwards = {k: INPUTS[k] for k in reversed(INPUTS)} | {"row": dict(reversed(ROW.items()))}
  assert manifest.name("reverse_kl", backwards) == name
  assert manifest.name("reverse_kl", INPUTS | {"row": tuple(LIST)}) == name
  assert manifest.name("reverse_kl", json.loads(json.dumps(INPUTS))) == name


def test_the_digest_equals_that_of_sha256sum():
  # printf '{"a": [1, 2.5, null], "b": "c"}' | sha256sum
  assert manifest.digest({"b": "c", "a": (1, 2.5, None)}) == (
      "318a0882fd0ef969926a228ba3e44a5fb10f557f377f8be140d8cc0fe3da8659")


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"row": ROW | {"actor": "teacher"}}, {"config": {"steps": 101}}, {"extra": None},
    {"config": {"steps": 100, "optim": {"lr": 1.0001e-3}}}, {"parents": {"guide": None}}])
def test_a_changed_input_changes_the_name(change):
  assert manifest.name("x", INPUTS | change) != manifest.name("x", INPUTS)
  assert manifest.name("y", INPUTS) != manifest.name("x", INPUTS)


def test_a_manifest_is_read_back_and_an_edited_one_refused(tmp_path):
  folder = tmp_path / manifest.name("student_grpo", INPUTS)
  assert manifest.read(folder) is None
  written = {"inputs": INPUTS, "revision": "abc"}
  files.write_json(folder / "manifest.json", written)
  assert manifest.read(folder) == written
  moved = folder.rename(tmp_path / "student_grpo-0123456789ab")
  with pytest.raises(ValueError, match="disagrees with its folder's name"):
    manifest.read(moved)
  folder = moved.rename(folder)
  files.write_json(folder / "manifest.json", {"inputs": INPUTS | {"seed": 1}})
  with pytest.raises(ValueError, match="disagrees with its folder's name") as error:
    manifest.read(folder)
  assert str(folder / "manifest.json") in str(error.value)


def test_a_row_of_an_earlier_version_keeps_its_folder_and_is_read_by_field(tmp_path):
  folder = tmp_path / "reverse_kl-ab1162e03c98"  # as that version named it
  files.write_json(folder / "manifest.json", {"inputs": INPUTS | {"row": LIST}})
  assert manifest.read(folder) == manifest.load(folder) == {"inputs": INPUTS}


def test_provenance_holds_devices_and_versions_and_no_environment(monkeypatch):
  monkeypatch.setenv("API_TOKEN", "a secret value")
  found = manifest.provenance(sharding.make_mesh((2, 2, 2)))
  text = json.dumps(found)
  assert "API_TOKEN" not in text and "a secret" not in text
  assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
  assert (found["devices"], found["platform"], found["processes"]) == (8, "cpu", 1)
  assert found["packages"]["jax"] == jax.__version__
  assert set(found) == {"revision", "python", "packages", "device", "platform", "devices",
                        "processes", "mesh"}
  assert set(found["packages"]) == set(manifest.PACKAGES)


def git(folder, *words):
  identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
              "GIT_COMMITTER_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull}
  done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True,
                        env=os.environ | identity)
  return done.stdout.strip()


def test_the_revision_is_the_commit_and_marks_changes(tmp_path, monkeypatch):
  source = tmp_path / "package" / "manifest.py"
  source.parent.mkdir()
  source.write_text("a = 1\n")
  (tmp_path / "notes.md").write_text("beside the package\n")
  monkeypatch.setattr(manifest, "__file__", str(source))
  monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
  assert manifest.revision.__wrapped__() == "unknown"
  git(tmp_path, "init", "--quiet")
  git(tmp_path, "add", ".")
  git(tmp_path, "commit", "--quiet", "--message", "one")
  commit = git(tmp_path, "rev-parse", "HEAD")
  assert len(commit) == 40 and manifest.revision.__wrapped__() == commit
  (tmp_path / "notes.md").write_text("and no part of it\n")
  assert manifest.revision.__wrapped__() == commit
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "one.py").write_text("b = 1\n")
  git(tmp_path, "add", "configs")
  assert manifest.revision.__wrapped__() == commit + "+"
  git(tmp_path, "commit", "--quiet", "--message", "two")
  commit = git(tmp_path, "rev-parse", "HEAD")
  source.write_text("a = 2\n")
  assert manifest.revision.__wrapped__() == commit + "+"
  monkeypatch.setenv("PATH", "")
  assert manifest.revision.__wrapped__() == "unknown"


def test_the_revision_is_read_once():
  first = manifest.revision()
  assert manifest.revision() is first  # read once: a commit made meanwhile is another's


def lock(folder, pid):
  (folder / "writer.lock").write_text(json.dumps(
      {"host": socket.gethostname(), "pid": pid, "beat": time.time()}))


def finished(workdir):
  """A finished stage's folder, with what a running one leaves behind."""
  folder = workdir / manifest.name("student_grpo", INPUTS)
  for name in ("ledger.json", "ledger/00000000.jsonl", "checkpoints/final/d/weights",
               "hf/model.safetensors", "hf/config.json", "checkpoints/6/d/weights",
               "checksums/00000006.json"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"text of {name}")
  lock(folder, 2**22 + 1)  # no process has this number
  manifest.write(folder, {"inputs": INPUTS, "revision": "abc", "mesh": {"data": 1}})
  return folder


def test_a_manifest_has_the_checksums_of_a_finished_folder(tmp_path):
  folder = finished(tmp_path)
  assert manifest.read(folder) == {"inputs": INPUTS, "revision": "abc", "mesh": {"data": 1}}
  found = files.read_json(folder / "checksums" / "finished.json")
  assert set(found) == {
      "ledger.json", "ledger/00000000.jsonl", "checkpoints/final/d/weights",
      "hf/model.safetensors", "hf/config.json"}
  # printf 'text of ledger.json' | sha256sum
  assert found["ledger.json"] == {"bytes": 19, "sha256": (
      "99233a4c7932c3651d78e2f90de676028aaa41a9214b82e0c20971e19b4ae556")}
  for weights in (False, True):
    manifest.check_files(folder, weights)


def test_exported_weights_are_hashed_once(tmp_path, monkeypatch):
  folder = finished(tmp_path)
  before = files.read_json(folder / "checksums" / "finished.json")
  # As `hf.save` writes it.
  sums = subprocess.run(["sha256sum", "model.safetensors"], cwd=folder / "hf", capture_output=True,
                        check=True).stdout
  (folder / "hf" / "SHA256SUMS").write_bytes(sums)
  hashed, measured = [], checksums._hashed
  monkeypatch.setattr(checksums, "_hashed",
                      lambda path: hashed.append(path.name) or measured(path))
  manifest.write(folder, {"inputs": INPUTS})
  assert "config.json" in hashed and "model.safetensors" not in hashed
  after = files.read_json(folder / "checksums" / "finished.json")
  assert {name: after[name] for name in before} == before


def test_files_that_were_hashed_before_are_not_hashed_again(tmp_path, monkeypatch):
  folder = finished(tmp_path)
  before = files.read_json(folder / "checksums" / "finished.json")
  name = "checkpoints/final/d/weights"
  with checkpoint.recording_final(folder) as final:
    pass
  assert final() == {name: before[name]}
  hashed, measured = [], checksums._hashed
  monkeypatch.setattr(checksums, "_hashed",
                      lambda path: hashed.append(path.name) or measured(path))
  manifest.write(folder, {"inputs": INPUTS}, recorded=final())
  assert "config.json" in hashed and "weights" not in hashed
  assert files.read_json(folder / "checksums" / "finished.json") == before


@pytest.mark.parametrize("name, weights", [
    ("ledger.json", False), ("ledger/00000000.jsonl", False), ("hf/config.json", False),
    ("checkpoints/final/d/weights", True)])
@pytest.mark.parametrize("change", ["flip", "cut", "empty", "unlink"])
def test_a_damaged_file_of_a_finished_folder_is_named_with_the_remedy(
    tmp_path, name, weights, change):
  folder = finished(tmp_path)
  path = folder / name
  data = path.read_bytes()
  if change == "unlink":
    path.unlink()
  else:
    path.write_bytes({"flip": b"T" + data[1:], "cut": data[:5], "empty": b""}[change])
  with pytest.raises(InputError) as refused:
    manifest.check_files(folder, weights)
  said = str(refused.value)
  assert said.startswith(f"{path} ") and said.endswith(
      f": put the file back, or make {folder.name} again by the command of its run with "
      f"--redo={folder.name}.")
  manifest.check_files(folder, not weights)


def test_an_edited_manifest_is_refused_also_where_its_inputs_are_right(tmp_path):
  folder = finished(tmp_path)
  path = folder / "manifest.json"
  path.write_text(path.read_text().replace('"abc"', '"abd"'))
  with pytest.raises(InputError, match="manifest.json"):
    manifest.read(folder)


@pytest.mark.parametrize("name", ["manifest.json", "checksums/finished.json"])
def test_a_file_that_has_lost_its_seal_is_named(tmp_path, name):
  folder = finished(tmp_path)
  path = folder / name
  before, _, after = path.read_text().rpartition('"sha256": ')
  path.write_text(f'{before}"sha257": {after}')  # one bit
  with pytest.raises(InputError, match=f"^{path} is damaged, .*--redo={folder.name}"):
    manifest.read(folder)
    manifest.check_files(folder, weights=False)


@pytest.mark.parametrize("weights", [False, True])
def test_checksums_that_are_missing_are_named_but_a_folder_of_an_older_version_has_none(
    tmp_path, weights):
  folder = finished(tmp_path)
  (folder / "checksums" / "finished.json").unlink()
  with pytest.raises(InputError, match=f"finished.json is missing: .*--redo={folder.name}.$"):
    manifest.check_files(folder, weights)
  files.write_json(folder / "manifest.json", {"inputs": INPUTS})  # as that version wrote it
  manifest.check_files(folder, weights)


def test_a_model_that_was_deleted_as_a_whole_is_not_damaged_nor_is_a_file_that_nothing_reads(
    tmp_path):
  folder = finished(tmp_path)
  (folder / "hf" / "config.json").unlink()
  with pytest.raises(InputError, match="hf/config.json is missing"):
    manifest.check_files(folder, weights=False)
  shutil.rmtree(folder / "hf")
  manifest.check_files(folder, weights=False)
  for name in ("tensorboard/00000000.events", "profile/plugins/trace.pb"):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("a picture")
  manifest.write(folder, {"inputs": INPUTS})
  for name in ("tensorboard", "profile"):
    shutil.rmtree(folder / name)
  manifest.check_files(folder, weights=False)


def test_a_folder_that_cannot_be_set_aside_is_one_sentence(tmp_path):
  name = finished(tmp_path).name
  (tmp_path / "replaced").write_text("a file")
  with pytest.raises(WriteError, match=f"replaced/{name} cannot be written .*: free space or mend"):
    manifest.set_aside(tmp_path, [name])


def test_a_folder_is_set_aside_and_not_deleted(tmp_path):
  name = finished(tmp_path).name
  with pytest.raises(InputError, match=f"--redo=teacher names no folder of .*choose from {name}"):
    manifest.set_aside(tmp_path, ["teacher"])
  for path in ("", ".", "..", f"../{tmp_path.name}/{name}", f"{name}/hf", f"{tmp_path}/{name}"):
    with pytest.raises(InputError, match=f"^--redo={path} names no folder of "):
      manifest.set_aside(tmp_path, [path])
  manifest.set_aside(tmp_path, [name, name])
  assert not (tmp_path / name).exists()
  assert (tmp_path / "replaced" / name / "ledger.json").exists()
  with pytest.raises(InputError, match="--redo=replaced names no folder of "):
    manifest.set_aside(tmp_path, ["replaced"])


def test_a_name_that_redo_cannot_make_again_gets_a_remedy_and_is_not_offered(tmp_path):
  done = finished(tmp_path)
  for name in ("rollouts-0123456789ab/sft-1-00000000-0.npz", "arms/arm-0123456789ab.json",
               "sft-0123456789ab/ledger/00000000.jsonl", "report.md"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("text")
  for name, said in {
      "rollouts-0123456789ab": (
          "names stored samples, which no stage owns: delete the damaged part, such as "
          f"{tmp_path}/rollouts-0123456789ab/sft-1-00000000-0.npz, leave --redo out, and its "
          "responses are sampled again."),
      "arms": (f"names the records of the arms: delete the damaged one in {tmp_path}/arms, leave "
               "--redo out, and the command writes it again."),
      "sft-0123456789ab": (
          f"names a folder that is not finished, as {tmp_path}/sft-0123456789ab has no "
          "manifest.json: leave --redo out, and the command goes on with it."),
      "report.md": f"names no folder of {tmp_path}: choose from {done.name}.",
      "mistyped": f"names no folder of {tmp_path}: choose from {done.name}."}.items():
    with pytest.raises(InputError) as refused:
      manifest.set_aside(tmp_path, [name])
    assert str(refused.value) == f"--redo={name} {said}"
  with pytest.raises(InputError, match="=x names no folder of .*: none is finished, so leave it"):
    manifest.set_aside(tmp_path / "arms", ["x"])


def test_a_folder_in_a_store_is_not_moved_and_the_remedy_is_said(tmp_path, monkeypatch):
  name = finished(tmp_path).name
  # A store is a folder here, whose paths read as addresses.
  monkeypatch.setattr(manifest, "os", types.SimpleNamespace(
      fspath=lambda path: f"gs://bucket{path}"))
  with pytest.raises(InputError) as refused:
    manifest.set_aside(tmp_path, [name])
  assert str(refused.value) == (
      f"--redo={name} cannot move a folder of an object store: delete or copy {tmp_path}/{name} by "
      "the store's own tool, and the command without --redo makes it again.")
  assert (tmp_path / name).exists()


def test_a_folder_that_is_not_finished_or_is_being_written_is_not_set_aside(tmp_path):
  done = finished(tmp_path)
  other = tmp_path / "reverse_kl-0123456789ab"
  shutil.copytree(done, other)
  (other / "manifest.json").unlink()
  with pytest.raises(InputError) as refused:
    manifest.set_aside(tmp_path, [done.name, other.name])
  assert str(refused.value) == (
      f"--redo={other.name} names a folder that is not finished, as {other} has no manifest.json: "
      "leave --redo out, and the command goes on with it.")
  assert done.exists()  # nothing is moved
  sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  lock(done, sleeper.pid)
  try:
    with pytest.raises(InputError, match=f"^{done} is being written by process {sleeper.pid} on "):
      manifest.set_aside(tmp_path, [done.name])
  finally:
    sleeper.kill()
    sleeper.wait()
  manifest.set_aside(tmp_path, [done.name])
  assert not done.exists() and (tmp_path / "replaced" / done.name / "manifest.json").exists()


def test_a_command_that_is_started_twice_moves_a_folder_once(tmp_path, capsys):
  """As a launcher starts it: before the folder is there, unfinished, and finished."""
  name = finished(tmp_path).name
  folder = tmp_path / name
  manifest.set_aside(tmp_path, [name])
  manifest.set_aside(tmp_path, [name])
  (folder / "checkpoints").mkdir(parents=True)
  manifest.set_aside(tmp_path, [name])
  assert (folder / "checkpoints").exists()
  shutil.rmtree(folder)
  finished(tmp_path)
  manifest.set_aside(tmp_path, [name])
  assert folder.exists() and capsys.readouterr().out.count("is of an earlier start, so this") == 3
  # One that is damaged after that is moved too.
  (folder / "ledger.json").write_text("{}")
  manifest.set_aside(tmp_path, [name])
  assert not folder.exists() and (tmp_path / "replaced" / f"{name}+" / "ledger.json").exists()
