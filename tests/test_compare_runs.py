"""`tests.compare_runs` finds a changed bit in each kind of result, and a missing file or field."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import compare_runs

STAGE = "forward_kl-0123"
PROBE = {"student": {"pass_rate": 0.5, "correct": [[1, 0]]}, "teacher": {"forward_kl": 0.25}}
EVALUATION = {
    "samples": {"sampled": {"correct_PG": [[1, 0]], "length_PG": [[3, 4]]},
                "greedy": {"correct_PG": [[1]], "length_PG": [[2]]}},
    "scores": {"avg@2": [0.5, 0.25, 0.75], "response_length": [3.5, 3.0, 4.0]}}
SAMPLE = {"step": 0, "prompt_id": 7, "sample_index": 0, "tokens": [1, 2], "text": "3",
          "logp": [-0.5, -0.25], "finish_reason": "stop", "reward": None}
ROWS = {
    "prompt_id_B": np.array([7, 3]), "sample_index_B": np.array([0, 1], np.int32),
    "prompt_BT": np.array([[4, 5], [6, 7]], np.int32),
    "prompt_length_B": np.array([2, 2], np.int32),
    "response_BT": np.array([[5, 6, 0], [5, 0, 0]], np.int32),
    "response_length_B": np.array([2, 1], np.int32),
    "sampler_logp_BT": np.array([[-0.5, -1, 0], [-2, 0, 0]], np.float32),
    "behaviour_logp_BT": np.array([[-0.5, -2, 0], [-3, 0, 0]], np.float32),
    "finish_reason_B": np.array([0, 1], np.int32), "weight_version": np.array(0)}


def write(path: pathlib.Path, value: object) -> None:
  """Writes a JSON file, and its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def write_lines(path: pathlib.Path, *entries: object) -> None:
  """Writes a file of JSON lines, and its folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def edit(path: pathlib.Path, *keys: object, value: object = None) -> None:
  """Sets one entry of a JSON file, or deletes it where `value` is None."""
  found = json.loads(path.read_text())
  inner = found
  for key in keys[:-1]:
    inner = inner[key]
  if value is None:
    del inner[keys[-1]]
  else:
    inner[keys[-1]] = value
  path.write_text(json.dumps(found))


@pytest.fixture
def workdir(tmp_path):
  """A work folder with one result of each kind, and an unfinished stage."""
  folder = tmp_path / "a"
  stage = folder / STAGE
  (stage / "hf").mkdir(parents=True)
  save_file({"w": np.arange(4, dtype=np.float32)}, stage / "hf" / "model.safetensors")
  write(stage / "hf" / "config.json", {"hidden_size": 4})
  write_lines(stage / "metrics" / "00000000.jsonl", {"step": 0, "loss": 0.5, "kl": 0.25})
  write_lines(stage / "ledger" / "00000000.jsonl",
              {"step": 0, "labels": [7], "tokens_trained": 9, "flops": 2.0})
  write_lines(stage / "samples" / "00000000.jsonl", SAMPLE)
  write(stage / "ledger.json", {"labels": [7], "prompts": [7, 3], "flops": 2.0,
                                "device_seconds_used": 1.5, "device_seconds_lost": 0.0})
  write(stage / "manifest.json", {"config": {"stages": {"forward_kl": {"log_samples": 1}}}})
  for kind in compare_runs.STORES:
    (folder / f"{kind}-0123").mkdir()
    np.savez(folder / f"{kind}-0123" / f"{STAGE}-00000000-0.npz", **ROWS)
  inputs = {"weights": STAGE, "guide": "base", "problems": "9", "seed": 0, "dtype": "float32"}
  for kind, result in (("eval", EVALUATION), ("probe", PROBE)):
    write(folder / f"{kind}-0123" / "result.json", result)
    write(folder / f"{kind}-0123" / "manifest.json", {"inputs": inputs})
  write(folder / "eval-0123" / "samples.json", [{"prompt_id": 7, "text": "3", "reward": 1.0}])
  row = {"label": "bridge", "evaluation": "test", "stages": [STAGE], "score": "eval-0123"}
  probes = [{"stage": STAGE, "before": None, "after": "probe-0123"}]
  write(folder / "arms" / "bridge-0123.json",
        {"arm": "bridge", "seed": 0, "rows": [row], "probes": probes})
  (folder / "teacher_grpo-0123").mkdir()
  return folder


def other(workdir: pathlib.Path) -> pathlib.Path:
  """A copy in which the folders have other names, and clocks other times."""
  copy = workdir.with_name("b")
  shutil.copytree(workdir, copy)
  for path in list(copy.rglob("*.json")):
    path.write_text(path.read_text().replace("0123", "4567"))
  for path in [*copy.iterdir(), copy / "arms" / "bridge-0123.json"]:
    path.rename(path.with_name(path.name.replace("0123", "4567")))
  edit(copy / "forward_kl-4567" / "ledger.json", "device_seconds_used", value=9.0)
  write(copy / "forward_kl-4567" / "timing" / "00000000.jsonl", {"seconds": 3.0})
  return copy


def unequal(workdir: pathlib.Path, copy: pathlib.Path) -> set[tuple[str, str, str]]:
  """(kind, field, verdict) of every field that is not equal."""
  rows = compare_runs.compare(workdir, copy)
  return {(row.kind, row.field, row.verdict) for row in rows if row.verdict != "equal"}


def test_equal_results_are_equal_under_other_names(workdir, capsys):
  copy = other(workdir)
  rows = compare_runs.compare(workdir, copy)
  assert {row.kind for row in rows} == {"arm bridge", "evaluation", "probe", "stage forward_kl",
                                        "stored passes", "stored rollouts"}
  assert {row.verdict for row in rows} == {"equal"}
  compare_runs.main([str(workdir), str(copy)])
  assert f"not finished, not compared: {workdir / 'teacher_grpo-0123'}" in capsys.readouterr().out


def change_log(name: str, **change: object):
  """A change of the first entry of a log."""
  def changed(copy: pathlib.Path) -> None:
    path = copy / "forward_kl-4567" / name / "00000000.jsonl"
    write_lines(path, json.loads(path.read_text()) | change)
  return changed


def change_json(path: str, *keys: object, value: object):
  """A change of one value of a JSON file."""
  return lambda copy: edit(copy / path, *keys, value=value)


def change_weights(change):
  """A change of the one tensor of the stage."""
  def changed(copy: pathlib.Path) -> None:
    path = copy / "forward_kl-4567" / "hf" / "model.safetensors"
    save_file({"w": change(load_file(path)["w"])}, path)
  return changed


def change_rows(kind: str, name: str, values: np.ndarray):
  """A change of one array of a store."""
  return lambda copy: np.savez(copy / f"{kind}-4567" / f"{STAGE}-00000000-0.npz",
                               **ROWS | {name: values})


def last_bit(values: np.ndarray) -> np.ndarray:
  """A copy whose first number differs in its last bit."""
  values = values.copy()
  values.flat[0] = np.nextafter(values.flat[0], values.dtype.type(9))
  return values


WEIGHTS = ("stage forward_kl", "weights w")
CHANGES = {
    "a bit of a weight": (WEIGHTS, change_weights(last_bit)),
    "a shape": (WEIGHTS, change_weights(lambda w: w.reshape(2, 2))),
    # The bytes are equal: only the header says that they are integers.
    "a type": (WEIGHTS, change_weights(lambda w: w.view(np.int32))),
    "a model's config": (("stage forward_kl", "hf/config.json"), change_json(
        "forward_kl-4567/hf/config.json", "hidden_size", value=8)),
    "a metric": (("stage forward_kl", "metrics.kl"), change_log("metrics", kl=0.2500001)),
    "a step's ledger": (("stage forward_kl", "ledger.flops"), change_log("ledger", flops=3.0)),
    "a sample's log-probability": (("stage forward_kl", "samples.logp"), change_log(
        "samples", logp=[-0.5, -0.2500001])),
    "a ledger's total": (("stage forward_kl", "ledger.json prompts"), change_json(
        "forward_kl-4567/ledger.json", "prompts", value=[7])),
    "a stored token": (("stored rollouts", "response_BT"), change_rows(
        "rollouts", "response_BT", ROWS["response_BT"] + 1)),
    "a stored log-probability": (("stored rollouts", "sampler_logp_BT"), change_rows(
        "rollouts", "sampler_logp_BT", last_bit(ROWS["sampler_logp_BT"]))),
    "a stored behaviour": (("stored rollouts", "behaviour_logp_BT"), change_rows(
        "rollouts", "behaviour_logp_BT", last_bit(ROWS["behaviour_logp_BT"]))),
    "a version of the weights": (("stored rollouts", "weight_version"), change_rows(
        "rollouts", "weight_version", np.array(1))),
    "a stored type": (("stored rollouts", "response_BT"), change_rows(
        "rollouts", "response_BT", ROWS["response_BT"].astype(np.uint32))),
    "a pass": (("stored passes", "response_BT"), change_rows(
        "passes", "response_BT", ROWS["response_BT"] + 1)),
    "an evaluation's sample": (("evaluation", "sampled length_PG"), change_json(
        "eval-4567/result.json", "samples", "sampled", "length_PG", value=[[3, 5]])),
    "a score": (("evaluation", "score avg@2"), change_json(
        "eval-4567/result.json", "scores", "avg@2", 0, value=0.5000001)),
    "an interval": (("evaluation", "interval avg@2"), change_json(
        "eval-4567/result.json", "scores", "avg@2", 2, value=0.7500001)),
    "an evaluation's text": (("evaluation", "samples.json"), change_json(
        "eval-4567/samples.json", 0, "text", value="4")),
    "an evaluation's model": (("evaluation", "weights"), change_json(
        "eval-4567/manifest.json", "inputs", "weights", value="base")),
    "an arm's seed": (("arm bridge", "seed"), change_json(
        "arms/bridge-4567.json", "seed", value=1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_found(workdir, name):
  copy = other(workdir)
  (kind, field), change = CHANGES[name]
  change(copy)
  found = unequal(workdir, copy)
  assert (kind, field, "differs") in found
  # Other results differ only where they name the changed one: a model's weights.
  assert {entry for entry in found if entry[0] == kind} == {(kind, field, "differs")}
  with pytest.raises(SystemExit) as exit_:
    compare_runs.main([str(workdir), str(copy)])
  assert exit_.value.code == 1


def test_a_changed_probe_is_found_in_its_arm_too(workdir):
  copy = other(workdir)
  edit(copy / "probe-4567" / "result.json", "teacher", "forward_kl", value=0.2500001)
  assert unequal(workdir, copy) == {("probe", "teacher forward_kl", "differs"),
                                    ("arm bridge", "probes", "differs")}


def test_a_field_or_result_of_one_folder_is_found(workdir):
  copy = other(workdir)
  edit(copy / "eval-4567" / "result.json", "scores", "response_length")
  shutil.rmtree(copy / "rollouts-4567")
  change_log("metrics", entropy=1.0)(copy)
  assert unequal(workdir, copy) == {
      ("evaluation", "score response_length", "not in B"),
      ("evaluation", "interval response_length", "not in B"),
      ("stored rollouts", "whole result", "not in B"),
      ("stage forward_kl", "metrics.entropy", "not in A")}


MISSING = {
    "hf": lambda folder: shutil.rmtree(folder / STAGE / "hf"),
    "no weights": lambda folder: (folder / STAGE / "hf" / "model.safetensors").unlink(),
    "metrics": lambda folder: shutil.rmtree(folder / STAGE / "metrics"),
    "samples": lambda folder: shutil.rmtree(folder / STAGE / "samples"),
    "ledger.json": lambda folder: (folder / STAGE / "ledger.json").unlink(),
    "'flops'": lambda folder: edit(folder / STAGE / "ledger.json", "flops"),
    "'reward'": lambda folder: edit(folder / STAGE / "samples" / "00000000.jsonl", "reward"),
    "'loss'": lambda folder: edit(folder / STAGE / "metrics" / "00000000.jsonl", "loss"),
    "result.json": lambda folder: (folder / "eval-0123" / "result.json").unlink(),
    "samples.json": lambda folder: (folder / "eval-0123" / "samples.json").unlink(),
    "'scores'": lambda folder: edit(folder / "eval-0123" / "result.json", "scores"),
    "'student'": lambda folder: edit(folder / "probe-0123" / "result.json", "student"),
    "'sampler_logp_BT'": lambda folder: np.savez(
        folder / "rollouts-0123" / f"{STAGE}-00000000-0.npz",
        **{name: values for name, values in ROWS.items() if name != "sampler_logp_BT"}),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_file_or_field_that_both_folders_lack_is_named(workdir, name):
  MISSING[name](workdir)
  with pytest.raises(SystemExit) as exit_:
    compare_runs.main([str(workdir), str(workdir)])
  assert name in exit_.value.code and str(workdir) in exit_.value.code


def test_names_of_an_older_revision_are_read(workdir):
  copy = other(workdir)
  rows = dict(ROWS)
  rows["drawn_logp_BT"] = rows.pop("behaviour_logp_BT")
  np.savez(workdir / "rollouts-0123" / f"{STAGE}-00000000-0.npz", **rows)
  write(workdir / "eval-0123" / "result.json",
        {"correct": [[1, 0]], "greedy": [1], "response_length": 3.5,
         "scores": {"avg@2": [0.5, 0.25, 0.75]}})
  edit(workdir / "arms" / "bridge-0123.json", "rows", 0, "evaluation")
  # A field that the older one has no name for is listed, and never taken for equal.
  assert unequal(workdir, copy) == {
      ("evaluation", "sampled length_PG", "not in A"),
      ("evaluation", "greedy length_PG", "not in A"),
      ("evaluation", "interval response_length", "not in A"),
      ("arm bridge", "bridge evaluation", "not in A")}
  edit(workdir / "eval-0123" / "result.json", "greedy", value=[0])
  assert ("evaluation", "greedy correct_PG", "differs") in unequal(workdir, copy)


def test_an_empty_folder_is_no_proof(tmp_path):
  with pytest.raises(SystemExit):
    compare_runs.main([str(tmp_path), str(tmp_path)])
