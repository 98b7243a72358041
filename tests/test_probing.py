"""Decisions of a stage's shares in tiny runs of the composition world."""

import types

import jax
import numpy as np
import pytest
from etils import epath

from configs import composition
from s2d_jax import (
  allocate,
  files,
  ledger,
  metrics,
  models,
  recipe,
  rollouts,
  sharding,
  stage,
  tasks,
)
from s2d_jax.errors import InputError
from s2d_jax.roles import Role, StageModels
from s2d_jax.rollouts import Prompt

CONFIG = models.get({
    "model_type": "qwen3", "vocab_size": 16, "hidden_size": 8, "head_dim": 4,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": True, "max_position_embeddings": 64}).config

BLOCK = {"interval": 2, "rule": "transfer", "weights": "", "requirement": "", "kappa": 1.0,
         "beta": 0.5, "explore": 1, "problems": 10}


def config_of(row, **changes):
  config = composition.get_config("tiny")
  with config.unlocked():
    config.arms = "raw_bridge"
    config.probe.problems = 0
    for name in ("forward_kl", "reverse_kl"):
      config.stages[name].steps = 6 if name == row else 0
    config.stages[row].save_every = 3
    config.stages[row].allocate = BLOCK | changes
  return config.lock()


def run(config, workdir):
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    plan = recipe.run(config, workdir, tasks.get(config))
  (name,) = plan.nodes
  return epath.Path(workdir) / name


@pytest.mark.medium
@pytest.mark.parametrize("row", ["forward_kl", "reverse_kl"])
def test_a_killed_decision_repeats(tmp_path, row, monkeypatch):
  whole = run(config_of(row), tmp_path / "whole")
  decisions = metrics.read(whole, "allocate")
  assert [decision["step"] for decision in decisions] == [0, 2, 4]
  assert decisions[0]["mean"] is None and decisions[2]["spread"] is not None

  # After step 3 was saved, in the decision at step 4.
  decide = allocate.decide

  def killed(history, step, *args):
    if step == 4:
      raise SystemExit(137)
    return decide(history, step, *args)

  monkeypatch.setattr(allocate, "decide", killed)
  with pytest.raises(SystemExit):
    run(config_of(row), tmp_path / "killed")
  monkeypatch.setattr(allocate, "decide", decide)
  again = run(config_of(row), tmp_path / "killed")
  assert metrics.read(again, "allocate") == decisions
  for name in ("ledger", "samples"):
    assert metrics.read(again, name) == metrics.read(whole, name)
  assert ((again / "hf" / "model.safetensors").read_bytes()
          == (whole / "hf" / "model.safetensors").read_bytes())


@pytest.mark.medium
def test_problems_follow_the_decisions_and_the_probe_is_charged_apart(tmp_path):
  config = config_of("forward_kl")
  folder = run(config, tmp_path)
  task = tasks.get(config)
  rows = task.source("labelled")
  family_of = {rows[i]["id"]: task.family(rows[i]) for i in range(len(rows))}
  entries = metrics.read(folder, "ledger")
  decisions = {row["step"]: row for row in metrics.read(folder, "allocate")}
  for entry in entries:
    shares = decisions[entry["step"] // 2 * 2]["shares"]
    found = [family_of[i] for i in entry["prompts"]]
    want = allocate.counts(np.array([shares[name] for name in sorted(shares)]), 4)
    assert [found.count(name) for name in sorted(shares)] == want
  # Ten responses of the teacher once; the learner reads them at each decision.
  assert [entry.get("allocate", {}).get("sequences") for entry in entries] == [
      10, None, 0, None, 0, None]
  totals = files.read_json(folder / "ledger.json")
  assert totals["allocate"]["sequences"] == 10 and totals["label_uses"] == 0
  assert totals["tokens_sampled"] - totals["allocate"]["tokens_sampled"] == (
      totals["tokens_trained"] + totals["tokens_discarded"])


@pytest.mark.medium
def test_uniform_shares_need_no_probe(tmp_path):
  folder = run(config_of("reverse_kl", rule="uniform"), tmp_path)
  assert set(metrics.read(folder, "allocate")[0]) == {"step", "shares"}
  assert "allocate" not in files.read_json(folder / "ledger.json")


def test_a_run_is_refused_before_anything_is_written(tmp_path):
  config = config_of("forward_kl", requirement="left=0.5,middle=0.5")
  with pytest.raises(InputError, match=r"config.stages.forward_kl.allocate.requirement names the "
                                       "family 'middle'"):
    run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  config = config_of("forward_kl", requirement="left=0.5")
  with pytest.raises(InputError, match="sum to one"):
    run(config, tmp_path / "run")


@pytest.mark.medium
def test_shares_rename_their_stage_alone_and_those_that_go_on_from_it():
  def renamed(row):
    """Whether a block of `row` renames (forward_kl, reverse_kl), which goes on from it."""
    config = config_of(row)
    with config.unlocked():
      config.stages.forward_kl.steps = config.stages.reverse_kl.steps = 6
      found = [list(recipe.plan(config, tasks.get(config)).nodes)]
      del config.stages[row].allocate
      found.append(list(recipe.plan(config, tasks.get(config)).nodes))
    return [one != two for one, two in zip(*found, strict=True)]

  assert renamed("forward_kl") == [True, True]
  assert renamed("reverse_kl") == [False, True]


def a_role(name):
  return Role(types.SimpleNamespace(name=name, config=CONFIG), None)


# The frozen actor, whether the learner samples, the guide; whose responses are scored.
@pytest.mark.parametrize("actor, on_policy, guide, want", [
    ("teacher", False, None, "teacher"), ("teacher", False, "start", "teacher"),
    ("learner", True, "teacher", "teacher"), (None, False, "teacher", "teacher")])
def test_the_teacher_is_the_frozen_actor_or_else_the_guide(actor, on_policy, guide, want):
  role = lambda name: name and a_role(name)
  models = StageModels(a_role("learner"), None, role(actor), on_policy, role(guide))
  assert models.teacher.model.name == want


def test_a_learners_own_start_is_no_teacher(tmp_path):
  config = composition.get_config("tiny")
  with config.unlocked():
    config.arms = "cold_grpo"
    # With a penalty it has a guide, which is its own start.
    config.stages.student_grpo.update(kl="k3", kl_coef=0.1)
    config.stages.student_grpo.allocate = BLOCK
  with pytest.raises(InputError, match="compares with a teacher, and this stage has none"):
    run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_responses_that_another_stage_sampled_are_counted_as_reused_once():
  # Responses of two tokens and of one, after prompts of one; the second row is another stage's.
  rollout = rollouts.given_solutions([Prompt(0, (1,)), Prompt(1, (1,))], [[1, 2], [3]], 3, 2)
  models = StageModels(a_role("learner"), None, a_role("teacher"), False, None)
  flops = ledger.forward_flops
  scored = flops(CONFIG, [3, 2], [2, 1])
  assert ledger.probe_part(rollout, np.array([True, False]), True, models) == {
      "sequences": 1, "tokens_sampled": 2, "tokens_reused": 1,
      "flops": flops(CONFIG, [3], [2]) + scored, "flops_reused": flops(CONFIG, [2], [1])}
  # A later probe samples nothing and finds what was counted before.
  assert ledger.probe_part(rollout, np.array([False, False]), False, models) == {
      "sequences": 0, "tokens_sampled": 0, "tokens_reused": 0, "flops": scored, "flops_reused": 0}


def test_responses_to_other_probed_problems_have_a_store_of_their_own(monkeypatch):
  config = config_of("forward_kl")
  plan = recipe.plan(config, tasks.get(config))
  (node,) = plan.nodes.values()
  monkeypatch.setattr(rollouts, "Store", lambda folder: folder.name)

  def store(plan):
    order = types.SimpleNamespace(families=["left"])
    models = types.SimpleNamespace(teacher=a_role("teacher"), guide=a_role("teacher"))
    return stage._allocation(plan, node, models, order, epath.Path("w")).teacher(None).store

  prompts = plan.prompts["validation"]
  others = [prompts[0]._replace(tokens=(*prompts[0].tokens, 5)), *prompts[1:]]
  assert store(plan) == store(plan._replace(prompts=dict(plan.prompts)))
  assert store(plan) != store(plan._replace(prompts=plan.prompts | {"validation": others}))
