"""The warnings before a stage begins."""

import json
import logging
import types

import pytest

from s2d_jax import files, walk
from s2d_jax.errors import InputError

# Of three problems 1, 2 and 4 of 4 samples are right.
CORRECT = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("samples, said", [
    # Pairs: 3 of 6 are mixed, 4 of 6, none: 39 %. Of all four samples two problems are mixed.
    (2, "began with 39 % mixed groups"), (4, None)])
def test_mixed_groups_are_those_of_the_stages_samples(samples, said, tmp_path, caplog):
  # config.probe.group is another number, of which the probe stored this share.
  found = {"mixed_groups": 0.9, "mixed_prompts": [0.9] * 3, "correct": CORRECT}
  files.write_json(tmp_path / "probe-0" / "result.json", {"student": found})
  node = types.SimpleNamespace(
      name="student_grpo-0", guide=None, actor=None, stage=types.SimpleNamespace(reward=True),
      hp=types.SimpleNamespace(sampling=types.SimpleNamespace(samples_per_prompt=samples)))
  with caplog.at_level(logging.WARNING):
    walk._warn(types.SimpleNamespace(nodes={}), node, "probe-0", tmp_path)
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == (said is not None) and all(said in line for line in lines)


def test_a_stage_that_was_done_is_not_trained_again_in_silence(tmp_path, monkeypatch, capsys):
  trained = []
  monkeypatch.setattr(walk.stage, "train_node", lambda *args: trained.append(args[1].name))
  node = types.SimpleNamespace(name="sft-0123456789ab", learner="student", stage=(
      types.SimpleNamespace(source=types.SimpleNamespace(probed=False), reward=False)))
  walk._train(None, node, tmp_path, lambda: False)
  assert capsys.readouterr().err == ""
  folder = tmp_path / node.name
  files.write_json(folder / "checksums" / "finished.json", {})
  walk._train(None, node, tmp_path, lambda: False)
  assert capsys.readouterr().err == (
      f"{folder}/manifest.json is missing, though {folder}/checksums/finished.json is there: it "
      "was deleted, or the process ended between both. The stage is trained again, from its newest "
      "checkpoint if it has one.\n")
  assert trained == [node.name] * 2


def test_a_record_of_an_arm_that_has_lost_its_seal_is_named(tmp_path):
  config = types.SimpleNamespace(evals={}, seed=0, to_dict=lambda: {"dtype": "float32", "seed": 0})
  plan = types.SimpleNamespace(config=config, scored={"arm": {}}, arms={"arm": []})
  def score():
    walk._score(plan, "arm", {}, tmp_path, lambda: False)
  score()
  path, = (tmp_path / "arms").iterdir()
  text = path.read_text()
  score()
  assert path.read_text() == text
  path.write_text(text.replace('"sha256":', '"sha257":'))
  with pytest.raises(InputError, match=f"^{path} is damaged, or was edited: delete it, and the"):
    score()
  # As versions before the seal, and before the number, wrote it.
  entry = {key: value for key, value in json.loads(text).items() if key not in ("sha256", "number")}
  for older in (entry, entry | {"number": 0}):
    files.write_json(path, older)
    score()
