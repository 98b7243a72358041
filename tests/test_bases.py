"""Base folders: a student of fewer layers, and a download where a folder is absent."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from s2d_jax import bases, chat, models
from s2d_jax.assets import tokenizer
from s2d_jax.errors import InputError
from s2d_jax.models import hf, layout

SHAPE = {"model_type": "llama", "vocab_size": len(tokenizer.VOCABULARY), "hidden_size": 8,
         "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 12, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "head_dim": 4,
         "tie_word_embeddings": True, "max_position_embeddings": 64}


@pytest.fixture
def teacher(tmp_path):
  """A random model of five layers, in bfloat16, with a tokenizer."""
  model = models.get(SHAPE)
  rng = np.random.default_rng(0)
  params = {}
  for path, shape in layout.flat(models.shapes(model.config)).items():
    params[path] = rng.normal(0, 0.3, shape.shape).astype(np.float32)
  folder = hf.save(tmp_path / "models" / "Teacher", model, layout.nest(params), dtype="bfloat16")
  tokenizer.write(folder, 64)
  return folder


def config(teacher, student, layers=0, hub=""):
  return ConfigDict({"teacher": str(teacher), "student": str(student), "student_layers": layers,
                     "hub": hub})


def tensors(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def test_layers_are_spaced_evenly_between_the_first_and_the_last():
  assert bases.chosen(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
  assert bases.chosen(5, 3) == [0, 2, 4]
  assert bases.chosen(4, 2) == [0, 3]
  assert bases.chosen(7, 1) == [6]
  for count in range(2, 40):
    for layers in range(1, count):
      indices = bases.chosen(count, layers)
      assert len(set(indices)) == layers and sorted(indices) == indices
      assert 0 <= indices[0] and indices[-1] == count - 1


def test_the_student_has_the_teachers_layers_and_all_else(teacher, tmp_path):
  student = tmp_path / "work" / "student"
  bases.prepare(config(teacher, student, 3))
  theirs = tensors(teacher)
  ours = tensors(student)
  for name, array in ours.items():
    parts = name.split(".")
    if "layers" in parts:
      index = parts.index("layers") + 1
      parts[index] = str({0: 0, 1: 2, 2: 4}[int(parts[index])])
    assert array.dtype == theirs[name].dtype
    np.testing.assert_array_equal(array.view(np.uint16), theirs[".".join(parts)].view(np.uint16))
  assert len(ours) == len(theirs) - 2 * sum("layers.0." in name for name in theirs)
  assert chat.Chat(student).fingerprint() == chat.Chat(teacher).fingerprint()
  expected = json.loads((teacher / "config.json").read_text()) | {"num_hidden_layers": 3}
  assert json.loads((student / "config.json").read_text()) == expected
  model, _ = hf.load(student)
  assert model.config.layers == 3


def test_layer_types_are_cut_with_the_layers(teacher, tmp_path):
  path = teacher / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {
      "layer_types": ["full_attention"] * 5}))
  bases.thin(teacher, tmp_path / "student", 2)
  written = json.loads((tmp_path / "student" / "config.json").read_text())
  assert written["layer_types"] == ["full_attention"] * 2


def test_the_students_identity_is_the_teachers_and_the_number(teacher, tmp_path):
  copy = shutil.copytree(teacher, tmp_path / "copy")
  for source, folder, layers in ((teacher, "a", 3), (copy, "b", 3), (teacher, "c", 2)):
    bases.thin(source, tmp_path / folder, layers)
  identities = [hf.identity(tmp_path / name) for name in "abc"]
  assert identities[0] == identities[1] != identities[2]


def test_a_second_call_writes_nothing(teacher, tmp_path):
  bases.prepare(config(teacher, tmp_path / "student", 3))
  files = {path: path.stat().st_mtime_ns for path in (tmp_path / "student").iterdir()}
  bases.prepare(config(teacher, tmp_path / "student", 3))
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "student").iterdir()} == files


@pytest.mark.parametrize("layers, message", [
    (5, "config.student_layers is 5 and .* has 5 layers: choose fewer"),
    (2, "student is not the student of 2 layers of .*: remove it, or name another folder"),
])
def test_a_folder_that_is_no_thinned_teacher_is_refused(teacher, tmp_path, layers, message):
  bases.thin(teacher, tmp_path / "student", 3)
  with pytest.raises(InputError, match=message):
    bases.prepare(config(teacher, tmp_path / "student", layers))


def test_a_model_of_the_users_is_not_replaced(teacher, tmp_path):
  student = shutil.copytree(teacher, tmp_path / "student")
  with pytest.raises(InputError, match="is not the student of 3 layers of"):
    bases.prepare(config(teacher, student, 3))
  assert tensors(student).keys() == tensors(teacher).keys()


def test_a_folder_that_cannot_be_written_is_named(teacher, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="file/student cannot be written .*: name a folder else"):
    bases.prepare(config(teacher, tmp_path / "file" / "student", 3))


def test_an_absent_folder_is_downloaded_and_a_present_one_is_not(teacher, tmp_path, monkeypatch):
  calls = []

  def download(repository, local_dir, allow_patterns):
    calls.append(repository)
    assert "*.safetensors" in allow_patterns and not any("bin" in x for x in allow_patterns)
    shutil.copytree(teacher, local_dir)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  absent = tmp_path / "elsewhere" / "Student"
  bases.prepare(config(teacher, absent))
  assert calls == [] and not absent.exists()
  bases.prepare(config(teacher, absent, hub="Owner"))
  bases.prepare(config(teacher, absent, hub="Owner"))
  assert calls == ["Owner/Student"]
  assert hf.identity(absent) == hf.identity(teacher)


def test_without_a_network_the_message_says_where_to_place_the_folder(tmp_path, monkeypatch):
  def download(*args, **kwargs):
    raise huggingface_hub.errors.LocalEntryNotFoundError("no network.\nAn error happened")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  with pytest.raises(InputError) as error:
    bases.prepare(config(tmp_path / "T", tmp_path / "S", hub="Owner"))
  assert str(error.value) == (
      f"{tmp_path}/T is absent and Owner/T could not be downloaded (no network): where there is a "
      f"network, run hf download Owner/T --local-dir T, and copy the folder to {tmp_path}.")
