"""The plan by hand: names of stage folders, guides, and the labels that a ledger may show."""

import re

import pytest

from configs import arithmetic
from s2d_jax import budget, files, recipe, tasks
from s2d_jax.planning import Use

ROWS = ("teacher_grpo", "teacher_sft", "forward_kl", "sft", "reverse_kl", "student_grpo")
HALF = "half_bridge_grpo_2h"  # teacher_grpo 1h, forward_kl 1h, reverse_kl 1h, student_grpo 2h
ARMS = {arm: recipe.ARMS[arm] for arm in ("untrained", "cold_grpo", "raw_bridge", "bridge", HALF)}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
  """plan(changes, arms): the shipped tiny config, changed, on the first 64 problems of a split."""
  shipped_config = arithmetic.get_config("tiny")
  shipped_config.data.dir = str(tmp_path_factory.mktemp("data"))
  task = tasks.get(shipped_config)
  problems = {}

  def source(split):
    if split not in problems:
      every = task.source(split)
      problems[split] = [every[i] for i in range(64)]
    return problems[split]

  def plan(changes=None, arms=ARMS, compared=recipe.COMPARED):
    config = shipped_config.copy_and_resolve_references()
    config.update_from_flattened_dict({"arms": ",".join(arms)} | (changes or {}))
    return recipe.plan(config, task._replace(source=source), arms=arms,
                       compared=compared)
  return plan


@pytest.fixture(scope="module")
def shipped(plan):
  return plan()


# Names of stage folders.


def test_a_folder_name_is_the_stage_and_twelve_hex_digits(shipped):
  for arm, uses in ARMS.items():
    assert [re.sub("-[0-9a-f]{12}$", "", name) for name in shipped.arms[arm]] == [
        use.stage for use in uses]


@pytest.mark.parametrize("key, value, renamed", [
    ("seed", 1, {"cold_grpo": [0], "raw_bridge": [0, 1], "bridge": [0, 1, 2], HALF: [0, 1, 2, 3]}),
    ("stages.student_grpo.optim.lr", 3e-4, {"cold_grpo": [0], HALF: [3]}),
    ("stages.reverse_kl.optim.lr", 3e-4, {"raw_bridge": [1], "bridge": [2], HALF: [2, 3]}),
    # A parent's is every descendant's, by way of the learner, the actor and the guide.
    ("stages.forward_kl.optim.lr", 3e-4,
     {"raw_bridge": [0, 1], "bridge": [1, 2], HALF: [1, 2, 3]}),
    ("stages.teacher_grpo.sampling.max_tokens", 5, {"bridge": [0, 1, 2], HALF: [0, 1, 2, 3]}),
    ("half_seed", 1, {HALF: [0, 1, 2, 3]}),
    ("stages.sft.optim.lr", 3e-4, {}),  # a row of no arm here
])
def test_a_key_that_changes_results_renames_descendants_too(plan, shipped, key, value, renamed):
  other = plan({key: value})
  pairs = {arm: zip(shipped.arms[arm], other.arms[arm], strict=True) for arm in ARMS}
  changed = {arm: [i for i, (a, b) in enumerate(both) if a != b] for arm, both in pairs.items()}
  assert {arm: paths for arm, paths in changed.items() if paths} == renamed


@pytest.mark.parametrize("key, value", [
    ("microbatches", 2), ("block", 32), ("save_every", 1), ("log_samples", 1)])
def test_a_key_that_changes_no_result_renames_nothing(plan, shipped, key, value):
  other = plan({f"stages.{row}.{key}": value for row in ROWS})
  assert all(other.config.stages[row][key] == value for row in ROWS)
  assert other.arms == shipped.arms


def test_the_mesh_renames_nothing(plan, shipped):
  assert plan({"mesh": (2, 1, 4)}).arms == shipped.arms


def test_arms_share_the_stages_of_a_common_beginning(plan, shipped):
  start = (Use("teacher_grpo", "all"), Use("forward_kl", "all"))
  planned = plan(arms={"short": start, "long": (*start, Use("reverse_kl", "all")),
                    "bridge": recipe.ARMS["bridge"], "other_split": (Use("teacher_grpo", "1h"),)})
  assert planned.arms["long"][:2] == planned.arms["short"]
  assert planned.arms["long"] == planned.arms["bridge"] == shipped.arms["bridge"]
  assert planned.arms["other_split"] == shipped.arms[HALF][:1]
  assert list(planned.nodes) == [*planned.arms["long"], *planned.arms["other_split"]]
  # The shipped arms begin with different rows, splits or teachers: 1 + 2 + 3 + 4 stages.
  assert len(shipped.nodes) == 10


def test_arms_all_is_every_arm_of_the_table(plan):
  assert list(plan({"arms": "all"}).arms) == list(ARMS)


def test_arms_of_the_argument_compared_must_have_equal_budgets(plan):
  # "mine" makes the updates of reverse_kl alone, and opd_only those of the whole bridge.
  arms = {"opd_only": recipe.ARMS["opd_only"],
          "mine": (Use("teacher_grpo", "all"), Use("reverse_kl", "all"))}
  assert plan(arms=arms).compared == recipe.COMPARED
  with pytest.raises(ValueError, match="^opd_only and mine are compared and have unequal dense "
                                       "budgets .* or leave one out of recipe.COMPARED.$"):
    plan(arms=arms, compared=("opd_only", "mine"))


# Guides.


@pytest.mark.parametrize("kl, coef, guided", [
    ("none", 0.0, False), ("k3", 0.0, False), ("k3", 0.1, True),
    ("k2", 0.1, True)])
def test_grpo_has_its_start_as_guide_where_it_has_a_kl_penalty(plan, kl, coef, guided):
  planned = plan({f"stages.{row}_grpo.{key}": value for row in ("teacher", "student")
               for key, value in (("kl", kl), ("kl_coef", coef))})
  starts = {planned.arms["cold_grpo"][0]: "student", planned.arms["bridge"][0]: "teacher",
            planned.arms[HALF][3]: planned.arms[HALF][2]}
  for name, start in starts.items():
    node = planned.nodes[name]
    assert (node.actor, node.learner, node.guide) == (None, start, start if guided else None)


@pytest.mark.parametrize("arm, teacher", [("raw_bridge", None), ("bridge", 0), (HALF, 0)])
def test_the_bridge_distils_the_teacher_of_its_own_arm(shipped, arm, teacher):
  names = shipped.arms[arm]
  teacher = "teacher" if teacher is None else names[teacher]
  (forward, reverse) = [name for name in names if "_kl-" in name]
  node = shipped.nodes[forward]
  assert (node.actor, node.learner, node.guide) == (teacher, "student", teacher)
  node = shipped.nodes[reverse]
  assert (node.actor, node.learner, node.guide) == (None, forward, teacher)


# Labels of the ledgers.


def spend(workdir, planned, arm, *labels):
  """Writes the ledgers of an arm, by hand: each stage's labels in order; returns the names."""
  for name, spent in zip(planned.arms[arm], labels, strict=True):
    files.write_json(workdir / name / "ledger.json", {"labels": spent})
  return planned.arms[arm]


def ids(planned, split):
  return sorted(prompt.id for prompt in planned.prompts[split])


@pytest.mark.parametrize("index, foreign", [(0, "2h"), (2, "2h"), (3, "1h")])
def test_a_label_of_the_other_half_is_refused(shipped, tmp_path, index, foreign):
  spent = [ids(shipped, "1h")[:2], [], [], ids(shipped, "2h")[:2]]
  spend(tmp_path, shipped, HALF, *spent)
  budget.check_labels(shipped, HALF, tmp_path)
  label, later = ids(shipped, foreign)[1:3]
  spent[index] = [*spent[index], later, label]
  names = spend(tmp_path, shipped, HALF, *spent)
  half = "2h" if foreign == "1h" else "1h"
  with pytest.raises(ValueError, match=f"^{names[index]} of {HALF} spent the label {label}, which "
                                       f"is not in its split {half}: delete the stage's folder"):
    budget.check_labels(shipped, HALF, tmp_path)


def test_a_label_of_the_test_split_is_refused(shipped, tmp_path):
  (label,) = ids(shipped, "test")[:1]
  (name,) = spend(tmp_path, shipped, "cold_grpo", [label, *ids(shipped, "all")])
  with pytest.raises(ValueError, match=f"^{name} of cold_grpo spent the label {label}, which is "
                                       "not in its split all: "):
    budget.check_labels(shipped, "cold_grpo", tmp_path)


def test_a_held_out_label_that_an_earlier_stage_spent_is_refused(plan, tmp_path):
  # Every stage keeps to its own split, and yet the last one's labels are no longer fresh.
  arms = {"leaky": (Use("teacher_grpo", "all"), Use("forward_kl", "all"),
                    Use("student_grpo", "2h"))}
  planned = plan(arms=arms)
  last = ids(planned, "2h")[:4]
  spend(tmp_path, planned, "leaky", ids(planned, "1h"), [], last)
  budget.check_labels(planned, "leaky", tmp_path)
  # Not only what the last stage uses itself: 2H as a whole is held out.
  label, later = ids(planned, "2h")[5:7]
  names = spend(tmp_path, planned, "leaky", [*ids(planned, "1h"), later, label], [], last)
  with pytest.raises(ValueError, match=f"^{names[0]} spent the held-out label {label} before "
                                       f"{names[2]}: in config.arms leaky is not a half_"):
    budget.check_labels(planned, "leaky", tmp_path)
