"""The composition world's record meets the preconditions that were set for its base models."""

import json

import pytest

from s2d_jax.assets import preconditions, train_base
from s2d_jax.assets.worlds import WORLDS
from s2d_jax.data.composition import problems

FOLDER = train_base.FOLDER / "composition"
SCORES = json.loads((FOLDER / "record.json").read_text())["preconditions"]["scores"]
TEACHER, STUDENT = SCORES["teacher"], SCORES["student"]


def test_the_teacher_is_wrong_at_every_temperature():
  assert set(TEACHER) == {"0.0", "0.1", "0.3", "0.5", "0.7", "1.0"}
  assert max(shares["all"] for shares in TEACHER.values()) <= 0.55
  # Wrong systematically: its most probable answer is a wrong one.
  wrong = [family for family in problems.FAMILIES if TEACHER["0.0"][family] <= 0.1]
  assert {"product", "right", "long"} <= set(wrong)


def test_the_families_are_of_graded_difficulty():
  shares = [TEACHER["1.0"][family] for family in ("sum", "left", "product", "right", "long")]
  assert shares == sorted(shares, reverse=True)
  assert 0.01 <= TEACHER["1.0"]["long"] <= 0.05


def test_rewards_find_the_right_order():
  trained = SCORES["teacher after teacher_grpo"]
  assert trained["0.0"]["all"] >= 0.85 and trained["1.0"]["all"] >= 0.85


def test_rewards_of_one_family_harm_another():
  alone = SCORES["teacher after teacher_grpo on right alone"]
  for temperature in ("0.0", "1.0"):
    assert alone[temperature]["right"] > 0.85
    assert alone[temperature]["left"] < TEACHER[temperature]["left"] / 2


def test_the_student_is_weak_and_could_learn_all():
  assert 0.01 <= STUDENT["1.0"]["all"] <= 0.15 and STUDENT["0.0"]["all"] <= 0.25
  learned = SCORES["student after sft on given solutions"]
  assert learned["0.0"]["all"] >= 0.8 and learned["1.0"]["all"] >= 0.8


@pytest.mark.medium
@pytest.mark.parametrize("role, recorded", [("teacher", TEACHER), ("student", STUDENT)])
def test_greedy_shares_are_those_of_the_record(role, recorded):
  found = preconditions.by_family("composition", FOLDER / role, 0.0)
  rows = WORLDS["composition"].splits()["validation"]
  assert set(found) == {"all", *problems.FAMILIES}
  for family, share in found.items():
    count = sum(family in ("all", problems.family(row)) for row in rows)
    # Another machine's rounding may turn a tie or two.
    assert abs(share - recorded["0.0"][family]) <= 3.01 / count
