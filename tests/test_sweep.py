"""Sweeps are lists of flat overrides, and arms that are compared train by equal budgets."""

import json

import numpy as np
import pytest

from configs import arithmetic, sweep_bridge_split, sweep_label_budget, sweep_seeds
from s2d_jax import budget, recipe, sweep
from tests.test_doctor import SPLITS, base, task


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  folder = tmp_path_factory.mktemp("bases")
  return {role: str(base(folder / role)) for role in ("teacher", "student")}


@pytest.fixture
def config(folders):
  config = arithmetic.get_config("tiny").unlock()
  config.update(folders)
  return config


def every_arm(config):
  config.arms = ",".join(recipe.COMPARED)
  return config


def test_a_sweep_has_one_config_for_each_override():
  config = sweep_label_budget.get_config("tiny,seed=5")
  runs = sweep.expand(config)
  assert [run.label_share for run in runs] == [0.25, 0.5, 1.0]
  assert all("sweep" not in run and run.is_locked and run.seed == 5 for run in runs)
  assert sweep.expand(runs[0]) == [runs[0]]


def test_configs_of_the_shipped_sweeps(config):
  runs = sweep.expand(sweep_bridge_split.get_config())
  total = {run.stages.forward_kl.steps + run.stages.reverse_kl.steps for run in runs}
  assert total == {90} and [run.stages.forward_kl.steps for run in runs] == [0, 22, 45, 68, 90]
  seeds = sweep.expand(sweep_seeds.get_config("seed=4"))
  assert [run.seed for run in seeds] == [4, 5, 6]
  config.arms = seeds[0].arms
  # The halves of a teacher that learned from solutions are in the paper's tables alone. Two arms
  # that begin with SFT and one without a teacher are not in the ladder's.
  left_out = {arm for arm in recipe.ARMS if arm.startswith("half_sft_teacher")}
  left_out |= {"sft_bridge", "half_sft_opd", "self_distilled"}
  assert len(left_out) == 6
  assert set(recipe.plan(config, task()).arms) == set(recipe.ARMS) - left_out


@pytest.mark.parametrize("change, message", [
    ({"sede": 1}, "config.sweep has {'sede': 1}, which does not fit the config"),
    ({"seed": "one"}, "config.sweep has {'seed': 'one'}, which does not fit"),
    ({"stages.sft.optim.lrr": 1.0}, "which does not fit"),
    ({"mesh": (2, 1, 1)}, "config.sweep has several meshes and a process has one"),
    (None, "config.sweep is empty: list some overrides")])
def test_an_override_that_does_not_fit_is_refused_by_name(config, change, message):
  config.sweep = () if change is None else ({}, change)
  with pytest.raises(ValueError) as error:
    sweep.expand(config)
  assert str(error.value).startswith(message) or message in str(error.value)


def test_the_outline_counts_shared_stages(config, tmp_path):
  config.arms = "bridge"
  plans = [recipe.plan(config, task())]
  config.stages.reverse_kl.steps = 3  # the teacher and the warmup are shared
  plans.append(recipe.plan(config, task()))
  lines = sweep.outline(plans, ({}, {"x": 3}), tmp_path)
  assert lines[0].startswith("as configured: arms bridge; 3 stages") and "shared" not in lines[0]
  assert lines[1].startswith("{'x': 3}: arms bridge; 3 stages, 2 of them shared")
  assert lines[2] == f"2 runs, 4 distinct stages, 0 of them finished in {tmp_path}"
  # A line for each distinct stage. Tiny: four steps of four problems, of the task's 64 labels.
  teacher = plans[0].arms["bridge"][0]
  assert len(lines) == 3 + 4
  assert lines[3] == f"{teacher}: 4 steps of 4 problems, 0.25 passes over the 64 of all, for bridge"


def test_the_outline_says_that_a_half_is_passed_over_more_often(config, tmp_path):
  config.arms = "half_bridge_grpo_2h"
  config.stages.student_grpo.rounds = 2
  plan = recipe.plan(config, task())
  size = {split: len(plan.prompts[split]) for split in ("1h", "2h")}
  lines = sweep.outline([plan], ({},), tmp_path)
  assert lines[2].endswith(f"{16 / size['1h']:.2f} passes over the {size['1h']} of 1h, "
                           "for half_bridge_grpo_2h")
  # Two rounds a step draw twice as many problems.
  assert lines[-1].endswith(f"{32 / size['2h']:.2f} passes over the {size['2h']} of 2h, "
                            "for half_bridge_grpo_2h")


def test_every_arm_of_the_paper_is_planned_with_its_teachers(config):
  plan = recipe.plan(every_arm(config), task())
  rows = {arm: [(plan.nodes[n].stage.name, plan.nodes[n].split, plan.nodes[n].hp.steps)
                for n in names] for arm, names in plan.arms.items()}
  # Tiny: four steps a row, so eight where one row takes both of the bridge's.
  assert rows["opd_only"] == [("teacher_grpo", "all", 4), ("reverse_kl", "all", 8)]
  assert rows["half_sft_grpo_2h"] == [("teacher_grpo", "1h", 4), ("sft", "1h", 8),
                                      ("student_grpo", "2h", 4)]
  assert rows["half_bridge_replay_1h"][:3] == rows["half_bridge"]
  assert plan.arms["half_bridge_replay_1h"][:3] == plan.arms["half_bridge"]  # shared
  # Two teachers by reward and two by solutions.
  teachers = [n for n in plan.nodes.values() if n.stage.learner == "teacher"]
  assert sorted((n.stage.name, n.split) for n in teachers) == [
      ("teacher_grpo", "1h"), ("teacher_grpo", "all"), ("teacher_sft", "1h"),
      ("teacher_sft", "all")]
  for arm, names in plan.arms.items():
    if arm.startswith("half_"):  # no ancestor of the student uses the second half
      assert {plan.nodes[n].split for n in plan.ancestors(names[-1])[:-1]} == {"1h"}


def test_configured_budgets_by_hand(config):
  plan = recipe.plan(every_arm(config), task())
  found = budget.configured(plan)
  # Four steps of four prompts by four samples.
  assert found["bridge"] == found["opd_only"] == ((8, 128), (0, 0))
  assert found["cold_grpo_2h"] == ((0, 0), (4, 64))
  assert found["half_opd_grpo_2h"] == ((8, 128), (4, 64))
  assert found["untrained"] == budget.Budget()


def test_unequal_budgets_are_refused_from_the_config_and_from_the_ledgers(config, tmp_path):
  config.arms = "bridge,sft_only"
  plan = recipe.plan(config, task())
  config.stages.sft.sampling.samples_per_prompt = 8
  with pytest.raises(ValueError, match=r"bridge and sft_only are compared and have unequal "
                     r"dense budgets \(Part\(updates=8, sequences=128\) and .* by their config: "
                     "give them equal"):
    recipe.plan(config, task())
  for name, node in plan.nodes.items():
    (tmp_path / name).mkdir()
    spent = {"updates": node.hp.steps - (node.stage.name == "sft"), "sequences": 16 * node.hp.steps}
    (tmp_path / name / "ledger.json").write_text(json.dumps(spent))
  with pytest.raises(ValueError, match="updates=7.* by their ledgers: delete"):
    budget.check_equal(budget.spent(plan, tmp_path), recipe.COMPARED, "by their ledgers: delete")


def configured_budget(config, arm):
  config.arms = arm
  return budget.configured(recipe.plan(config, task()))[arm]


@pytest.mark.parametrize("row, arms, part", [
    ("student_grpo", ("cold_grpo", "half_bridge_grpo_2h"), "rewarded"),
    ("forward_kl", ("bridge", "half_bridge_grpo_2h"), "dense")])
def test_a_budget_part_that_two_arms_share_must_be_equal(row, arms, part, config):
  budgets = {arm: configured_budget(config, arm) for arm in arms}
  budget.check_equal(budgets, arms, "here")
  config.stages[row].steps += 1
  budgets[arms[0]] = configured_budget(config, arms[0])
  with pytest.raises(ValueError, match=f"{arms[0]} and {arms[1]} .* have unequal {part} budgets"):
    budget.check_equal(budgets, arms, "here")


def test_a_stage_of_0_steps_is_left_out(config):
  config.arms = "bridge,opd_only"
  config.stages.forward_kl.steps, config.stages.reverse_kl.steps = 0, 8
  plan = recipe.plan(config, task())
  assert plan.arms["bridge"] == plan.arms["opd_only"]
  assert [plan.nodes[n].stage.name for n in plan.arms["bridge"]] == ["teacher_grpo", "reverse_kl"]


def test_labels_of_a_smaller_share_are_a_subset_of_those_of_a_larger(config):
  ids = {}
  for share in (0.5, 1.0):
    config.label_share = share
    plan = recipe.plan(config, task())
    ids[share] = {split: {p.id for p in plan.prompts[split]} for split in ("all", "1h", "2h")}
  assert (len(ids[0.5]["all"]), len(ids[1.0]["all"])) == (32, 64)
  for split in ("all", "1h", "2h"):
    assert ids[0.5][split] < ids[1.0][split]
  assert ids[0.5]["1h"] | ids[0.5]["2h"] == ids[0.5]["all"]
  assert np.isin(list(ids[1.0]["all"]), [row["id"] for row in SPLITS["labelled"]]).all()
