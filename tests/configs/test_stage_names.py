"""The names of finished stages are stored: they change with a result's meaning, and only then."""

import dataclasses
import functools
import inspect
import json
from pathlib import Path

import pytest

from configs import arithmetic
from s2d_jax import keys, objectives, optim, planning, recipe, rollouts, tasks
from s2d_jax.data.arithmetic import problems
from s2d_jax.planning import Plan
from s2d_jax.rewards import arithmetic as arithmetic_reward
from s2d_jax.sampler import Sampling

STORED = Path(__file__).with_name("stage_names.json")
ARMS = {arm: recipe.ARMS[arm] for arm in ("cold_grpo", "sft_teacher_bridge", "half_bridge_grpo_2h",
                                          "weighted_fkl", "sft_only")}
STAGES = {stage.name: stage for stage in recipe.STAGES}
NEW_KEY = keys.at_least(0, neutral=0)


def plan(config=None, stages=recipe.STAGES, reward=arithmetic_reward.reward,
         answer=arithmetic_reward.answer) -> Plan:
  """The plan of the tiny shipped config, on problems that are made here."""
  config = config or shipped()
  splits = problems.splits(sizes={"labelled": 64, "validation": 8, "test": 8})
  config.data.dir = "unused"
  task = tasks.get(config)._replace(source=splits.__getitem__, reward=reward, answer=answer)
  return recipe.plan(config, task, stages=stages, arms=ARMS, compared=())


def shipped():
  """The tiny shipped config, unlocked, with the arms of this test."""
  config = arithmetic.get_config("tiny").unlock()
  config.arms = ",".join(ARMS)
  return config


def renamed(other: Plan) -> set[str]:
  """The stages whose names differ from the stored ones, in any arm."""
  stored = json.loads(STORED.read_text())
  return {old.rpartition("-")[0] for arm in ARMS
          for old, new in zip(stored[arm], other.arms[arm], strict=True) if old != new}


EVERY = {use.stage for uses in ARMS.values() for use in uses}


def test_the_names_are_the_stored_ones():
  assert plan().arms == json.loads(STORED.read_text()), (
      "finished stages would train anew: if the meaning of their results changed, rewrite the names"
      " with `PYTHONPATH=. python tests/configs/test_stage_names.py`; if not, give a new key a "
      "neutral value")


def test_a_new_key_at_its_neutral_value_renames_nothing(monkeypatch):
  config = shipped()
  monkeypatch.setitem(optim.KEYS, "new", NEW_KEY)
  monkeypatch.setitem(Sampling.KEYS, "new", NEW_KEY)
  monkeypatch.setitem(objectives.REWARD_KEYS, "new_reward_key", NEW_KEY)
  changed = dataclasses.replace(objectives.FORWARD_KL,
                            keys=objectives.FORWARD_KL.keys | {"new_form_key": NEW_KEY})
  stages = tuple(stage._replace(objective=changed) if stage.objective is objectives.FORWARD_KL
                 else stage for stage in recipe.STAGES)
  for name, hp in config.stages.items():
    hp.optim.new = 0
    hp.sampling.new = 0
    if STAGES[name].reward:
      hp.new_reward_key = 0
    if STAGES[name].objective is objectives.FORWARD_KL:
      hp.new_form_key = 0
  for block in (config.probe, *config.evals.values()):
    block.sampling.new = 0
  assert renamed(plan(config, stages)) == set()
  # At another value each of them renames.
  config.stages.forward_kl.new_form_key = 1
  assert "forward_kl" in renamed(plan(config, stages))
  config.stages.forward_kl.new_form_key = 0
  for hp in config.stages.values():
    hp.optim.new = 1
  assert renamed(plan(config, stages)) == EVERY


def test_a_key_without_a_neutral_value_renames(monkeypatch):
  monkeypatch.setitem(optim.KEYS, "new", keys.at_least(0))
  config = shipped()
  for hp in config.stages.values():
    hp.optim.new = 0
  assert renamed(plan(config)) == EVERY


@pytest.mark.parametrize("key, value, stages", [
    ("stages.sft.optim.weight_decay", 0.1, {"sft"}),
    ("stages.sft.optim.lr", 0.1, {"sft"}),
    ("stages.sft.epochs", 2, {"sft"}),
    ("stages.sft.lora.rank", 2, {"sft"}),
    ("stages.weighted_fkl.top_k", 3, {"weighted_fkl"}),
    ("stages.weighted_fkl.sampling.top_p", 0.9, {"weighted_fkl"}),
    ("stages.student_grpo.clip_high", 0.3, {"student_grpo"}),
])
def test_another_value_renames(key, value, stages):
  config = shipped()
  config.update_from_flattened_dict({key: value})
  assert renamed(plan(config)) == stages


def test_another_wording_of_our_source_renames_nothing(monkeypatch):
  assert renamed(plan()) == set()
  monkeypatch.setattr(inspect, "getsource", lambda function: '"""Another docstring."""')
  assert renamed(plan()) == set()


def test_a_raised_version_renames(monkeypatch):
  changed = dataclasses.replace(objectives.FORWARD_KL, version=2)
  stages = tuple(stage._replace(objective=changed) if stage.name == "weighted_fkl" else stage
                 for stage in recipe.STAGES)
  assert renamed(plan(stages=stages)) == {"weighted_fkl"}
  monkeypatch.setattr(objectives.learnable, "version", 2, raising=False)
  assert renamed(plan()) == {"weighted_fkl"}
  monkeypatch.setattr(arithmetic_reward.reward, "version", 2, raising=False)
  assert renamed(plan()) >= {"teacher_grpo", "student_grpo"}


def test_a_users_function_enters_by_its_source(monkeypatch):
  def reward(problem, text):
    return float(text == problem["answer"])
  found = plan(reward=reward)
  assert renamed(found) >= {"teacher_grpo", "student_grpo"}
  assert plan(reward=reward).arms == found.arms
  assert planning.identity_of(reward)[2] == inspect.getsource(reward)
  monkeypatch.setattr(inspect, "getsource", lambda function: "def reward(problem, text): ...")
  assert plan(reward=reward).arms != found.arms


@pytest.mark.parametrize("field", ["reward", "answer"])
def test_a_function_that_carries_an_object_is_refused_before_anything_runs(field):
  function = functools.partial(lambda scale, *inputs: 0.0, object())
  with pytest.raises(ValueError, match="carries a builtins.object, which has no text that is"):
    plan(**{field: function})


class Reversed(rollouts.GivenSolutions):
  """A user's source of samples."""


def test_a_users_source_enters_by_the_source_text_of_its_class(monkeypatch):
  source = rollouts.SOURCES["given"]
  monkeypatch.setitem(rollouts.SOURCES, "given", source._replace(make=Reversed.for_stage))
  found = plan()
  # Stages that descend from it are renamed too.
  assert renamed(found) == {"teacher_sft", "forward_kl", "reverse_kl"}
  assert plan().arms == found.arms
  monkeypatch.setattr(inspect, "getsource", lambda function: "class Reversed: ...")
  assert plan().arms != found.arms


if __name__ == "__main__":
  STORED.write_text(json.dumps(plan().arms, indent=1) + "\n")
