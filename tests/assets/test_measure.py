"""The shipped base models score as their records say, and the method's preconditions hold."""

import json

import numpy as np
import pytest

from s2d_jax import chat
from s2d_jax.assets import measure, train_base
from s2d_jax.assets.worlds import WORLDS
from s2d_jax.models import hf

RECORDS = {name: json.loads((train_base.FOLDER / name / "record.json").read_text())
           for name in WORLDS}


@pytest.fixture(scope="module", params=sorted(WORLDS))
def name(request):
  return request.param


@pytest.fixture(scope="module")
def world(name):
  return WORLDS[name]


@pytest.fixture(scope="module")
def recorded(name):
  return RECORDS[name]["scores"]


@pytest.fixture(scope="module")
def shared_chat(name):
  return chat.Chat(train_base.FOLDER / name / "student")


@pytest.fixture(scope="module")
def bases(name):
  return {role: hf.load(train_base.FOLDER / name / role) for role in ("teacher", "student")}


def test_the_arithmetic_world_meets_its_preconditions():
  scores = RECORDS["arithmetic"]["scores"]
  assert 0.25 <= scores["teacher"]["avg@8"] <= 0.60
  assert 0.02 <= scores["student"]["avg@8"] <= 0.15


def test_the_bases_are_small_and_far_apart(recorded):
  assert recorded["on the teacher's text"]["kl"] > 0.3  # nats per token: far before the warmup
  assert 450_000 < recorded["teacher"]["parameters"] < 700_000
  assert 150_000 <= recorded["student"]["parameters"] <= 200_000


def test_the_shipped_folders_are_small_and_share_a_tokenizer(name, shared_chat):
  files = [path for path in (train_base.FOLDER / name).rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 4_000_000
  chat.same_tokenizer(chat.Chat(train_base.FOLDER / name / "teacher"), shared_chat)


def test_the_longest_prompt_and_response_fit(world, shared_chat):
  for split in ("labelled", "validation", "test"):
    prompts, rows = measure.prompts(world, shared_chat, split)
    assert max(len(prompt.tokens) for prompt in prompts) == world.prompt_tokens
    solutions = (shared_chat.encode_response(row["solution"]) for row in rows.values())
    assert max(map(len, solutions)) == world.response_tokens


@pytest.mark.medium
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_scores_are_those_of_the_record(world, recorded, shared_chat, bases, role):
  correct_PG, _ = measure.sampled(world, shared_chat, *bases[role], "validation", 8, 1.0,
                                  seed=(12345,))
  # Other samples of the same 256 problems: four standard deviations of the difference of two means
  # of samples, each problem with a pass rate of its own.
  rate_P = correct_PG.mean(axis=1)
  deviation = np.sqrt(2 * (rate_P * (1 - rate_P)).mean() / (correct_PG.size - len(rate_P)))
  assert abs(correct_PG.mean() - recorded[role]["avg@8"]) < 4 * deviation
  greedy_P1, _ = measure.sampled(world, shared_chat, *bases[role], "validation", 1, 0.0, seed=(0,))
  # Greedy has no chance in it; another machine's rounding may turn a tie or two.
  assert abs(greedy_P1.mean() - recorded[role]["greedy"]) <= 3 / len(greedy_P1)


@pytest.mark.medium
def test_overlap_is_that_of_the_record(world, recorded, shared_chat, bases):
  _, rollout = measure.sampled(world, shared_chat, *bases["teacher"], "validation", 8, 1.0,
                               seed=(12345,))
  got = measure.overlap(bases["teacher"], bases["student"], rollout)
  assert got == pytest.approx(recorded["on the teacher's text"], rel=0.1)
  itself = measure.overlap(bases["teacher"], bases["teacher"], rollout)
  assert itself == pytest.approx({"kl": 0.0, "top1": 1.0}, abs=1e-6)
