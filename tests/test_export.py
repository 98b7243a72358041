"""`s2d-jax export`: a stage's weights are written whole, from its hf/ folder or its checkpoint."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import arithmetic
from s2d_jax import checkpoint, command, export, files, manifest, models
from s2d_jax.errors import InputError
from s2d_jax.models import hf


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A work folder with two finished stages of the arithmetic student: weights w + 1 and w + 2."""
  folder = tmp_path_factory.mktemp("run")
  config = arithmetic.get_config()
  model, params = hf.load(config.student)
  for name, seed in (("sft", 0), ("sft", 1), ("reverse_kl", 1)):
    inputs = {"row": [name, "teacher", "student", None], "seed": seed}
    stage = folder / manifest.name(name, inputs)
    moved = jax.tree.map(lambda x, seed=seed: x + np.float32(1 + seed), params)
    checkpoint.save_final(stage, moved)
    hf.save(stage / "hf", model, moved, config.student, {"stage": stage.name})
    bases = {role: {"folder": config[role], "identity": role} for role in ("teacher", "student")}
    files.write_json(stage / "manifest.json",
                     {"inputs": inputs, "bases": bases, "revision": "abc"})
  (folder / "student_grpo-0123456789ab").mkdir()  # not finished
  return folder


def weights(folder):
  return jax.tree.leaves(hf.load(folder)[1])


def test_the_stages_hf_folder_is_copied(workdir, tmp_path):
  (stage,) = workdir.glob("reverse_kl-*")
  out = export.export(workdir, "reverse_kl", tmp_path / "out")
  for name in ("config.json", "tokenizer.json", "lineage.json"):
    assert (out / name).read_bytes() == (stage / "hf" / name).read_bytes()
  for a, b in zip(weights(out), weights(stage / "hf"), strict=True):
    assert (a == b).all()


def test_without_an_hf_folder_the_final_checkpoint_is_exported(workdir, tmp_path):
  (stage,) = workdir.glob("reverse_kl-*")
  (stage / "hf").rename(tmp_path / "aside")
  try:
    out = export.export(workdir, stage.name, tmp_path / "out")
  finally:
    (tmp_path / "aside").rename(stage / "hf")
  assert json.loads((out / "lineage.json").read_text())["stage"] == stage.name
  base = weights(arithmetic.get_config().student)
  for a, b in zip(weights(out), base, strict=True):
    assert (a == b + np.float32(2)).all()


@pytest.mark.parametrize("name", ["hf/model.safetensors", "hf/config.json", "hf/lineage.json"])
def test_a_damaged_model_is_not_exported(workdir, tmp_path, name):
  (stage,) = workdir.glob("reverse_kl-*")
  shutil.copytree(stage, tmp_path / stage.name)
  stage = tmp_path / stage.name
  manifest.write(stage, manifest.load(stage))
  assert export.export(tmp_path, stage.name, tmp_path / "out").exists()
  path = stage / name
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(InputError) as refused:
    export.export(tmp_path, stage.name, tmp_path / "out2")
  assert str(refused.value).startswith(f"{path} has ")
  assert str(refused.value).endswith(f"with --redo={stage.name}.")
  assert not (tmp_path / "out2").exists()


def test_weights_are_written_in_the_dtype_of_the_flag(workdir, tmp_path):
  out = export.export(workdir, "reverse_kl", tmp_path / "out", "bfloat16")
  assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
  base = weights(arithmetic.get_config().student)
  for a, b in zip(weights(out), base, strict=True):
    assert (a == (b + np.float32(2)).astype(jnp.bfloat16).astype(jnp.float32)).all()


@pytest.mark.parametrize("stage, message", [
    ("sft", r"has several finished stages 'sft': choose --stage from sft-\w{12}, sft-\w{12}\."),
    ("student_grpo", r"no finished stage 'student_grpo': choose --stage from reverse_kl-\w{12}, "),
])
def test_an_ambiguous_or_absent_stage_is_refused(workdir, tmp_path, capsys, stage, message):
  argv = ["--workdir", str(workdir), "--stage", stage, "--out", str(tmp_path / "out")]
  with pytest.raises(SystemExit):
    command.call(export.main, argv)
  assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_the_exported_config_is_that_of_the_stages_base(workdir, tmp_path):
  out = export.export(workdir, "reverse_kl", tmp_path / "out")
  exported = models.read_config(hf.read_json(out))
  assert exported == models.read_config(hf.read_json(arithmetic.get_config().student))


@pytest.fixture
def occupied(tmp_path):
  """A folder with a file, a folder of notes, and two links in a circle."""
  (tmp_path / "file").write_text("1")
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes" / "a.txt").write_text("1")
  (tmp_path / "circle").symlink_to(tmp_path / "other")
  (tmp_path / "other").symlink_to(tmp_path / "circle")
  return tmp_path


@pytest.mark.parametrize("out, reason", [
    ("file", "file is a file: save to a new folder."),
    ("file/student", "file/student cannot be written (Not a directory): choose another folder."),
    ("file/a/b", "file/a/b cannot be written (Not a directory): choose another folder."),
    ("notes", "notes exists and holds no model.safetensors: save to a new folder."),
    ("x" * 300, "cannot be written (File name too long): choose another folder."),
    # Long enough only with what the unfinished folder's name adds.
    ("x" * 250, "cannot be written (File name too long): choose another folder."),
    ("circle", "circle cannot be written (Too many levels of symbolic links): choose another"),
    ("/proc/student", "/proc/student cannot be written"), ("/proc/a/b", "/proc/a/b cannot be writ"),
    ("/dev/null", "/dev/null is a file"), ("/", "/ exists and holds no model.safetensors"),
    ("gs://bucket/student", "gs://bucket/student is an address, and models are saved on this "
                            "machine: choose a path of it."),
])
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    workdir, occupied, monkeypatch, capsys, out, reason):
  monkeypatch.setattr(hf, "load", None)
  before = sorted(occupied.rglob("*"))
  path = out if "://" in out or out.startswith("/") else occupied / out
  with pytest.raises(SystemExit):
    command.call(export.main, ["--workdir", str(workdir), "--stage=reverse_kl", f"--out={path}"])
  (sentence,) = capsys.readouterr().err.splitlines()
  assert reason in sentence and sorted(occupied.rglob("*")) == before


def test_an_export_follows_links_and_makes_new_folders(workdir, tmp_path):
  (tmp_path / "link").symlink_to(tmp_path / "real")
  for name, written in (("link", "real"), ("new/a/b", "new/a/b"), ("link", "real")):
    out = export.export(workdir, "reverse_kl", tmp_path / name)
    assert out == tmp_path / name and (tmp_path / written / "model.safetensors").is_file()
  assert (tmp_path / "link").is_symlink()


def test_a_dangling_link_among_the_copied_files_is_refused_before_anything_is_written(
    workdir, tmp_path):
  (stage,) = workdir.glob("reverse_kl-*")
  source = shutil.copytree(stage / "hf", tmp_path / "source")
  (source / "LICENSE").symlink_to(tmp_path / "absent")
  model, params = hf.load(source)
  with pytest.raises(InputError, match="source/LICENSE is a link to a file that is absent: "):
    hf.save(tmp_path / "out" / "student", model, params, source)
  assert not (tmp_path / "out").exists()
