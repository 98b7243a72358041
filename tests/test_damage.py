"""Every kind of file of a work folder, damaged in each way: equal results, or a sentence with it.

A run of two stages is damaged while the second one trains, and when all is done. Started again, it
ends in the weights and ledgers of an undisturbed run, or names the file and a remedy. A file that
it did not read is refused by whoever reads it next.
"""

import errno
import json
import os
import re
import shutil

import jax
import pytest
from etils import epath

from s2d_jax import (
  checkpoint,
  ladder,
  manifest,
  program_cache,
  recipe,
  report,
  sharding,
  tasks,
  walk,
)
from s2d_jax.errors import InputError, WriteError
from s2d_jax.models import hf
from s2d_jax.planning import Use
from tests.end_to_end import job

ARM = (Use("weighted_fkl", "all"), Use("reverse_kl", "all"))
REMEDIES = ("put the file back", "put it back", "put the right manifest back", "restore it",
            "delete it", "delete the folder", "--redo=")


class Killed(Exception):
  """Ends a stage at a save."""


def command(plan, workdir):
  """Does after planning what `s2d-jax run` does."""
  walk.check_folders(plan, workdir)
  walk.run(plan, workdir)
  report.markdown(ladder.read([workdir]))


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compiles):
  """(plan, unfinished workdir, finished workdir); programs are compiled once for all runs."""
  folder = tmp_path_factory.mktemp("run")
  job.bases(folder / "bases")
  config = job.config(folder / "bases", "arm", folder / "data")
  with config.unlocked():
    del config.evals.validation
    config.probe.problems = 4
  task = tasks.get(config)._replace(reward=lambda problem, text: float(len(text) % 2))
  plan = recipe.plan(config, task, arms={"arm": ARM})
  save = checkpoint.Checkpoints.save

  def save_or_die(self, step, *args):
    # Checkpoints 1 and 2 are there, and the lock of a process that failed.
    if step == 3 and "reverse_kl" in str(self._folder):
      raise Killed
    save(self, step, *args)

  with jax.set_mesh(sharding.make_mesh((1, 1, 1))), program_cache.opened("auto"):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(checkpoint.Checkpoints, "save", save_or_die)
      with pytest.raises(Killed):
        command(plan, folder / "unfinished")
    shutil.copytree(folder / "unfinished", folder / "finished")
    command(plan, folder / "finished")
    yield plan, folder / "unfinished", folder / "finished"


def results(workdir):
  """{relative path: bytes or values} of what a run is made for."""
  found = {}
  for path in workdir.glob("*/hf/model.safetensors"):
    found[str(path.relative_to(workdir))] = path.read_bytes()
  for path in workdir.glob("*/ledger.json"):
    found[str(path.relative_to(workdir))] = {
        name: value for name, value in json.loads(path.read_bytes()).items()
        if not name.startswith("device_seconds")}
  for path in workdir.glob("*/*/*.jsonl"):
    if path.parent.name in ("ledger", "metrics", "samples"):
      found[str(path.relative_to(workdir))] = path.read_bytes()
  for path in workdir.glob("*/result.json"):
    found[str(path.relative_to(workdir))] = path.read_bytes()
  return found


def one_of_each_kind(workdir, change):
  """A file of each kind, within the workdir: kinds differ in more than digits and hashes.

  Of checkpoints it is one of the newest. Of logs it is the first part, which lies behind it.
  """
  found = {}
  for path in sorted(path for path in workdir.rglob("*") if path.is_file()):
    name = str(path.relative_to(workdir))
    kind = re.sub(r"[0-9a-f]{12,}|[0-9]+", "#", name)
    if kind not in found or "/checkpoints/" in name:
      found[kind] = name
  # All files of a checkpoint are compared in one way, so most changes try two of them.
  few = ("_CHECKPOINT_METADATA", "manifest.ocdbt")
  return [name for kind, name in found.items()
          if change == "delete" or "/checkpoints/#/" not in kind or name.endswith(few)]


def damage(path, change):
  """Turns one bit of a file round, cuts it in half, empties or deletes it; False: it is empty."""
  data = path.read_bytes()
  if change == "delete":
    path.unlink()
    return True
  middle = len(data) // 2
  path.write_bytes({"flip": data[:middle] + bytes(b ^ 0x40 for b in data[middle : middle + 1])
                            + data[middle + 1:],
                    "cut": data[:middle], "empty": b""}[change])
  return bool(data)


def read_next(workdir, name):
  """Reads a file of weights as whoever needs it next."""
  stage = workdir / name.partition("/")[0]
  if "/hf/" in name:
    hf.load(stage / "hf")
  if "/checkpoints/" in name:
    manifest.check_files(stage, weights=True)


def fault(plan, workdir, name, change, expected):
  """The fault of a run that goes on from a damaged file; None where all is right."""
  before = (workdir / name).read_bytes()
  if not damage(workdir / name, change):
    return None
  try:
    command(plan, workdir)
    found = results(workdir)
    # Behind it nothing was lost; the file itself is refused below.
    changed = {key for key in found.keys() | expected.keys()
               if found.get(key) != expected.get(key)} - ({name} if "/hf/" in name else set())
    if changed:
      return f"other results: {sorted(changed)}"
    damaged = not (workdir / name).exists() or (workdir / name).read_bytes() != before
    if damaged and ("/hf/" in name or "/checkpoints/final/" in name):
      read_next(workdir, name)
      return "read in silence"
  except InputError as error:
    text = str(error)
    if name not in text or text.count("\n") or not any(words in text for words in REMEDIES):
      return f"a sentence without file or remedy: {text}"
  except Exception as error:  # noqa: BLE001 - a library's is what must not come
    return repr(error)
  return None


SLOW = pytest.mark.slow


@pytest.mark.medium
@pytest.mark.parametrize("change", [
    "flip", *(pytest.param(change, marks=SLOW) for change in ("cut", "empty", "delete"))])
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_damage_to_any_file_is_found_or_changes_nothing(run, tmp_path, state, change):
  plan, unfinished, finished = run
  source = finished if state == "finished" else unfinished
  expected = results(finished)
  found = {}
  for name in one_of_each_kind(source, change):
    shutil.copytree(source, tmp_path / "work")
    found[name] = fault(plan, tmp_path / "work", name, change, expected)
    shutil.rmtree(tmp_path / "work")
  wrong = {name: text for name, text in found.items() if text}
  assert len(found) > 30 and not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_a_folder_that_is_gone_is_said_or_changes_nothing(run, tmp_path, state, capsys):
  plan, unfinished, finished = run
  source = finished if state == "finished" else unfinished
  wrong, kinds = {}, {}
  for path in sorted(path for path in source.rglob("*") if path.is_dir()):
    name = str(path.relative_to(source))
    kinds[re.sub(r"[0-9a-f]{12,}|[0-9]+", "#", name)] = name  # of checkpoints the newest
  for name in kinds.values():
    shutil.copytree(source, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / name)
    capsys.readouterr()
    try:
      command(plan, tmp_path / "work")
      said = capsys.readouterr().err
      found = results(tmp_path / "work")
      lost = {key for key, value in results(finished).items() if found.get(key) != value}
      if lost and not name.endswith("/hf"):
        wrong[name] = f"other results: {sorted(lost)}"
      if re.search(r"reverse_kl-\w+/checkpoints(/2)?$", name) and state == "unfinished":
        if f"{tmp_path}/work/{name}" not in said or " is gone, though " not in said:
          wrong[name] = f"not said: {said}"
    except InputError as error:
      if name not in str(error) or not any(words in str(error) for words in REMEDIES):
        wrong[name] = str(error)
    shutil.rmtree(tmp_path / "work")
  assert len(kinds) > 15 and not wrong, wrong


def redo(workdir, name):
  manifest.set_aside(workdir, [name.partition("/")[0]])


def delete(workdir, name):
  (workdir / name).unlink()


def delete_checkpoint(workdir, name):
  shutil.rmtree(workdir / name.partition("/")[0] / "checkpoints" / "2")


@pytest.mark.slow
@pytest.mark.parametrize("state, pattern, remedy", [
    ("unfinished", "weighted_fkl-*/checkpoints/final/state/manifest.ocdbt", redo),
    ("unfinished", "weighted_fkl-*/manifest.json", redo),
    ("unfinished", "reverse_kl-*/ledger/00000001.jsonl", delete_checkpoint),
    ("unfinished", "reverse_kl-*/writer.lock", delete),
    ("unfinished", "reverse_kl-*/starts/00000000.json", delete),
    ("finished", "reverse_kl-*/ledger.json", redo),
    ("finished", "reverse_kl-*/hf/config.json", redo),
    ("finished", "probe-*/result.json", redo),
    ("finished", "eval-*/checksums/finished.json", redo),
    ("finished", "arms/*.json", delete)])
def test_the_remedy_of_the_sentence_ends_in_equal_results(run, tmp_path, state, pattern, remedy):
  plan, unfinished, finished = run
  workdir = tmp_path / "work"
  shutil.copytree(finished if state == "finished" else unfinished, workdir)
  name = str(next(workdir.glob(pattern)).relative_to(workdir))
  damage(workdir / name, "cut")
  with pytest.raises(InputError) as refused:
    command(plan, workdir)
  assert name in str(refused.value)
  assert (f"--redo={name.partition('/')[0]}" if remedy is redo else "delete") in str(refused.value)
  remedy(workdir, name)
  command(plan, workdir)
  assert results(workdir) == results(finished)


@pytest.mark.medium
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOENT])
def test_a_disk_that_fails_at_any_moment_loses_nothing(run, tmp_path, monkeypatch, code):
  plan, unfinished, finished = run
  local = type(epath.Path("/"))
  write_bytes = local.write_bytes
  writes = [0]
  # Each start gets some files further than the one before.
  stops = 0
  shutil.copytree(unfinished, tmp_path / "work")
  def write(self, data):
    writes[0] += 1
    if writes[0] == 5 * (stops + 1):
      raise OSError(code, os.strerror(code), str(self))
    return write_bytes(self, data)
  monkeypatch.setattr(local, "write_bytes", write)
  while stops < 20:
    writes[0] = 0
    try:
      command(plan, tmp_path / "work")
      break
    except WriteError as error:
      assert re.fullmatch(r"/\S+ cannot be written \([A-Z][a-z ]+\): free space or mend the disk, "
                          "and the same command goes on from what was saved before.", str(error))
    stops += 1
  assert 2 <= stops < 20
  assert results(tmp_path / "work") == results(finished)
