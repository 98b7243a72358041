"""Rows that `keep` and `longest` leave out: their weights, labels, tokens, names and refusals."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from s2d_jax import doctor, recipe, rollouts, selection
from s2d_jax.rollouts import Prompt
from tests.configs import test_stage_names as names

# Repeated runs of three: none; 4 of 6 (1 2 1 2 1 2 1 2); none; none of no run at all.
RESPONSES = [[5, 6, 7, 8, 1], [1, 2, 1, 2, 1, 2, 1, 2], [3, 4, 5, 6, 7, 8], [9, 1]]
STOPPED = [1, 1, 0, 1]


def found():
  rollout = rollouts.given_solutions([Prompt(i, (2, 3)) for i in range(4)], RESPONSES, 2, 9)
  rollout = rollout._replace(finish_reason_B=np.array(STOPPED, np.int32))
  return rollouts.StepRollouts([Prompt(i, (2, 3)) for i in range(4)], rollout, np.ones(4, bool))


def hp(**changes):
  return ConfigDict({"sampling": {"max_tokens": 9}} | changes)


def parity(prompt_id, ids):
  return float(prompt_id % 2)


def test_repetition_by_hand():
  assert [rollouts.repetition(ids) for ids in RESPONSES] == [0, 4 / 6, 0, 0]
  np.testing.assert_array_equal(rollouts.repeated(RESPONSES[1]), [0, 0, 0, 0, 1, 1, 1, 1])
  assert rollouts.repetition([]) == 0


@pytest.mark.parametrize("options, weight_B", [
    ({"keep": "right"}, [0, 1, 0, 1]), ({"keep": "stopped"}, [1, 1, 0, 1]),
    ({"keep": "unrepetitive"}, [1, 0, 1, 1]), ({"longest": 5}, [1, 0, 0, 1]),
    ({"keep": "right,unrepetitive"}, [0, 0, 0, 1]),
    ({"keep": "stopped", "longest": 6}, [1, 0, 0, 1])])
def test_rows_that_are_left_out_keep_their_place_with_weight_0(options, weight_B):
  got = selection.selected(found(), hp(**options), parity)
  np.testing.assert_array_equal(got.weight_B, weight_B)
  assert got.metrics["kept"] == np.mean(weight_B)
  jax.tree.map(np.testing.assert_array_equal, got.rollout, found().rollout)
  batch = rollouts.batch(got.rollout, row_weight_B=got.weight_B)
  trained = (batch.weight_BT > 0).sum(axis=1)
  np.testing.assert_array_equal(trained, np.multiply(weight_B, [len(ids) for ids in RESPONSES]))


def test_absent_options_change_nothing():
  before = found()
  assert selection.selected(before, hp(), None) is before


def test_weights_multiply():
  before = found()._replace(weight_B=np.array([0.5, 0.5, 0.5, 0], np.float32))
  got = selection.selected(before, hp(keep="stopped"), None)
  np.testing.assert_array_equal(got.weight_B, [0.5, 0.5, 0, 0])


# Names of stages, and the doctor.


def test_absent_options_rename_nothing_and_given_ones_the_stage():
  assert names.renamed(names.plan()) == set()
  for key, value in (("longest", 5), ("keep", "stopped"), ("keep", "right")):
    config = names.shipped()
    config.stages.sft[key] = value
    assert names.renamed(names.plan(config)) == {"sft"}
    config.stages.sft[key] = {"longest": 0, "keep": ""}[key]
    if key == "keep":
      assert names.renamed(names.plan(config)) == set()


def test_right_reads_the_labels_of_the_stage():
  def split(value):
    config = names.shipped()
    config.stages.sft.keep = value
    planned = names.plan(config)
    return planned.nodes[planned.arms["sft_only"][-1]].inputs
  assert split("stopped")["task"] is None and split("right")["task"] is not None
  assert split("stopped")["split"] != split("right")["split"]


@pytest.mark.parametrize("stage, key, value, said", [
    ("sft", "keep", "good", "keep is 'good': choose several of right,stopped,unrepetitive"),
    ("reverse_kl", "keep", "right", "has the key 'keep', which nothing reads"),
    ("teacher_sft", "keep", "right", "has the key 'keep', which nothing reads"),
    ("student_grpo", "longest", 5, "has the key 'longest', which nothing reads"),
    ("reverse_kl", "longest", 0, "longest is 0: set it to a whole number of at least 1"),
    ("reverse_kl", "longest", 21, "longest is 21 and no response has more than sampling.max_tok")])
def test_values_that_do_not_fit_are_refused(stage, key, value, said):
  config = names.shipped()
  config.stages[stage][key] = value
  with pytest.raises(ValueError, match=f"config.stages.{stage}.*{said}"):
    doctor.check_config(config, names.STAGES)


def test_names_may_have_blanks_between():
  config = names.shipped()
  config.stages.sft.keep = "right, stopped"
  assert selection.conditions(config.stages.sft) == ("right", "stopped")
  doctor.check_config(config, names.STAGES)


def test_right_without_a_reward_is_refused():
  config = names.shipped()
  config.stages.sft.keep = "right"
  with pytest.raises(ValueError, match="config.stages.sft.keep has .* the task has no reward: le"):
    names.plan(config, reward=None)


def test_the_arms_train_the_students_as_much_as_the_bridge():
  config = names.shipped()
  config.arms = "bridge,sft_bridge,half_sft_opd"
  planned = recipe.plan_without_problems(config)
  assert [planned.nodes[name].hp.steps for name in planned.arms["half_sft_opd"]] == [4, 4, 4]
  config.stages.sft.prompts = 8
  with pytest.raises(ValueError, match="bridge and sft_bridge are compared and have unequal dense"):
    recipe.plan_without_problems(config)
