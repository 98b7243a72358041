"""How often a run's programs run, counted by hand from the arms of the recipe, and their hours."""

import pytest

from configs import arithmetic
from s2d_jax import planning, recipe, sweep
from s2d_jax.preflight import costs, hlo, runs

ONE = 3600.0  # seconds of one run of each program, so that hours are its runs


@pytest.fixture
def config():
  """The five arms, with a block of steps that differs in every stage."""
  config = arithmetic.get_config("tiny")
  config.arms = "untrained,cold_grpo,raw_bridge,bridge,half_bridge_grpo_2h"
  for name, steps in {"teacher_grpo": 7, "forward_kl": 100, "reverse_kl": 3000,
                      "student_grpo": 20_000, "teacher_sft": 5, "sft": 5}.items():
    config.stages[name].steps = steps
  return config


def plans(config):
  return [planning.without_problems(one, recipe.STAGES, recipe.ARMS)
          for one in sweep.expand(config)]


def program(stage, name, seconds=ONE):
  return costs.Cost(stage, name, costs.Account(1, 0, 0, 0), 0, 2.0, hlo.total(()),
                    costs.Least(seconds, 0.0, 0.0, 0.0))


STAGES = [program(stage.name, "update") for stage in recipe.STAGES]


def test_a_stage_counts_as_often_as_the_arms_train_it(config):
  found = runs.total(plans(config), [STAGES])
  # teacher_grpo of all labels and of 1h; both stages of the bridge from the untrained teacher and
  # from those two; student_grpo of all labels, and of 2h from the half bridge.
  assert found.counts == {"stage": 2 + 3 + 3 + 2}
  assert found.hours == pytest.approx(2 * (2 * 7 + 3 * 100 + 3 * 3000 + 2 * 20_000))
  assert found.left_out == ("probe (not compiled)", "test (not compiled)")


def test_an_arm_without_steps_is_skipped(config):
  # A run refuses such an arm; preflight leaves stages out by giving them 0 steps.
  config.arms = "cold_grpo,raw_bridge"
  config.stages.student_grpo.steps = 0
  found = runs.total(plans(config), [STAGES])
  assert found.counts == {"stage": 2}
  assert found.hours == pytest.approx(2 * (100 + 3000))


def test_steps_of_other_stages_are_those_that_the_arm_makes(config):
  config.arms = "sft_only"
  found = runs.total(plans(config), [STAGES])
  # teacher_grpo, and sft with the steps of both stages of the bridge.
  assert found.counts == {"stage": 2}
  assert found.hours == pytest.approx(2 * (7 + 100 + 3000))


def test_runs_of_a_sweep_add_up_and_shared_stages_count_once(config):
  config.arms = "bridge"
  (one,) = plans(config)
  alone = runs.total([one], [STAGES]).hours
  with config.unlocked():
    config.sweep = ({"seed": 1}, {"seed": 2}, {"seed": 2, "stages.reverse_kl.steps": 500})
  found = runs.total(plans(config), [STAGES] * 3)
  # The third run shares two stages with the second.
  assert found.counts == {"stage": 3 + 3 + 1}
  assert found.hours == pytest.approx(2 * alone + 2 * 500)


def test_stages_of_fewer_labels_are_stages_of_their_own(config):
  config.arms = "cold_grpo"
  with config.unlocked():
    config.sweep = ({"label_share": 0.5}, {"label_share": 1.0}, {"half_seed": 3})
  # Without halves and with all labels, the seed of the halves changes nothing.
  assert runs.total(plans(config), [STAGES] * 3).counts == {"stage": 2}


def test_every_finished_model_is_evaluated_once(config):
  config.evals.test.problems = 64
  config.evals.test.prompts = 16
  found = runs.total(plans(config), [[*STAGES, program("test", "teacher"),
                                      program("test", "student"), program("test", "student greedy"),
                                      program("test", "student greedy prefill")]])
  stages = 2 * (2 * 7 + 3 * 100 + 3 * 3000 + 2 * 20_000)
  # The untrained teacher and two trained ones; the untrained student and those of four arms. One
  # evaluation has four times the 16 problems of a call.
  assert found.counts["evaluation"] == 3 + 5
  assert found.hours - stages == pytest.approx(2 * 4 * (3 + 5 * 3))


def test_an_evaluation_of_an_unknown_number_of_problems_is_named(config):
  found = runs.total(plans(config), [[*STAGES, program("test", "student")]])
  assert "evaluation" not in found.counts
  assert "test (its problems are not here)" in found.left_out


def test_problems_in_a_file_are_counted(config, tmp_path):
  path = tmp_path / "test.jsonl"
  path.write_text("".join(f'{{"problem": "{i}", "answer": "1"}}\n' for i in range(40)))
  config.arms = "cold_grpo"
  with config.unlocked():
    config.data = {"test": str(path)}
  config.evals.test.prompts = 16
  found = runs.total(plans(config), [[program("test", "student")]])
  assert found.hours == pytest.approx(2 * 40 / 16)


def test_evaluations_between_steps_count_from_step_0(config):
  config.arms = "cold_grpo"
  config.stages.student_grpo.steps = 101
  with config.unlocked():
    config.evals.during = config.evals.test.copy_and_resolve_references()
  config.evals.during.update({"when": "every 50", "problems": 16, "prompts": 16})
  found = runs.total(plans(config), [[program("student_grpo during", "student"),
                                      program("student_grpo during", "teacher"),
                                      program("sft during", "student")]])
  # At steps 0, 50 and 100, of the student of this stage alone.
  assert found.hours == pytest.approx(2 * 3) and found.counts == {"evaluation": 1}


def test_probes_around_a_stage_count_once_for_equal_weights(config):
  config.probe.update({"problems": 64, "prompts": 32})
  probe = [program("probe", "student"), program("probe", "teacher"), program("probe", "both")]
  found = runs.total(plans(config), [probe])
  # cold_grpo: its start. raw_bridge: the start, between the stages, the end, each beside the
  # teacher. bridge: the untrained teacher alone, then three again. The half: three, and the
  # start of its GRPO. The untrained teacher is probed once.
  assert found.counts == {"probe": 1 + 3 + 4 + 4}
  pairs = 9
  alone = 3
  # Two calls for each model; both models score the text of either.
  assert found.hours == pytest.approx(2 * 2 * (alone + pairs * (2 + 2)))
  assert "teacher_grpo (not compiled)" in found.left_out


def test_a_prefix_probe_is_two_calls_of_the_guide_for_each_batch(config):
  config.arms = "raw_bridge"
  config.probe.update({"problems": 64, "prompts": 32})
  config.unlock()
  config.probe.prefixes = 64
  parts = [program("probe", "prefixes"), program("probe", "prefixes prefill")]
  # raw_bridge has three probes beside the teacher.
  assert runs.total(plans(config), [parts]).hours == pytest.approx(2 * 2 * 3 * 2 * 2)
  config.probe.prefixes = 8  # fewer than one call takes
  assert runs.total(plans(config), [parts]).hours == pytest.approx(2 * 2 * 3 * 2)
  del config.probe.prefixes
  assert runs.total(plans(config), [parts]).hours == 0


def test_one_part_is_named_in_the_singular():
  found = runs.Total(1.0, {"stage": 1, "evaluation": 2, "probe": 1}, ())
  assert str(found) == "1 stage, 2 evaluations, 1 probe, every response of max_tokens"
