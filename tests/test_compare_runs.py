"""`tests.compare_runs` finds a changed bit in each kind of result, and equal results equal."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import compare_runs


@pytest.fixture
def workdir(tmp_path):
  """A work folder with a stage, a store of rollouts and an evaluation, and an unfinished stage."""
  folder = tmp_path / "a"
  stage = folder / "forward_kl-0123"
  for part in ("hf", "samples"):
    (stage / part).mkdir(parents=True)
  save_file({"w": np.arange(4, dtype=np.float32)}, stage / "hf" / "model.safetensors")
  (stage / "ledger.json").write_text(json.dumps({"labels": 3, "device_seconds": 1.5}))
  (stage / "samples" / "0").write_text(json.dumps({"step": 0, "tokens": [1, 2]}) + "\n")
  (stage / "manifest.json").write_text("{}")
  store = folder / "rollouts-0123"
  store.mkdir()
  np.savez(store / "part.npz", prompt_id_B=[7], sample_index_B=[0], response_length_B=[2],
           response_BT=[[5, 6, 0]])
  evaluation = folder / "eval-0123"
  evaluation.mkdir()
  (evaluation / "manifest.json").write_text("{}")
  (evaluation / "result.json").write_text(json.dumps(
      {"samples": {"sampled": {"correct_PG": [[1, 0]]}}, "scores": {"avg@2": [0.5, 0.2, 0.8]}}))
  (folder / "teacher_grpo-0123").mkdir()
  return folder


def other(workdir: pathlib.Path) -> pathlib.Path:
  """A copy in which the folders of stages have other names, and clocks other times."""
  copy = shutil.copytree(workdir, workdir.with_name("b"))
  stage = (copy / "forward_kl-0123").rename(copy / "forward_kl-4567")
  (stage / "ledger.json").write_text(json.dumps({"labels": 3, "device_seconds": 9.0}))
  return copy


KINDS = ["evaluations", "forward_kl ledger", "forward_kl samples", "forward_kl weights",
         "stored rollouts"]


def test_equal_results_are_equal_under_other_names(workdir):
  assert compare_runs.compare(workdir, other(workdir)) == dict.fromkeys(KINDS, (1, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_number_is_found(workdir, kind):
  copy = other(workdir)
  stage = copy / "forward_kl-4567"
  if kind == "evaluations":
    (copy / "eval-0123" / "result.json").write_text(json.dumps(
        {"samples": {"sampled": {"correct_PG": [[1, 1]]}}, "scores": {"avg@2": [0.5, 0.2, 0.8]}}))
  elif kind == "forward_kl ledger":
    (stage / "ledger.json").write_text(json.dumps({"labels": 4, "device_seconds": 1.5}))
  elif kind == "forward_kl samples":
    (stage / "samples" / "0").write_text(json.dumps({"step": 0, "tokens": [1, 3]}) + "\n")
  elif kind == "forward_kl weights":
    changed = np.arange(4, dtype=np.float32)
    changed[3] = np.nextafter(changed[3], 4)
    save_file({"w": changed}, stage / "hf" / "model.safetensors")
  else:
    np.savez(copy / "rollouts-0123" / "part.npz", prompt_id_B=[7], sample_index_B=[0],
             response_length_B=[2], response_BT=[[5, 9, 0]])
  assert compare_runs.compare(workdir, copy) == dict.fromkeys(KINDS, (1, 0)) | {kind: (0, 2)}
  with pytest.raises(SystemExit):
    compare_runs.main([str(workdir), str(copy)])
