"""The shipped base models score as their record says, and the method's preconditions hold."""

import json

import numpy as np
import pytest

from s2d_jax import chat
from s2d_jax.assets import measure, train_base
from s2d_jax.models import hf

RECORD = json.loads((train_base.FOLDER / "record.json").read_text())["scores"]


@pytest.fixture(scope="module")
def shared_chat():
  return chat.Chat(train_base.FOLDER / "student")


@pytest.fixture(scope="module")
def bases():
  return {name: hf.load(train_base.FOLDER / name) for name in ("teacher", "student")}


def test_the_record_meets_the_preconditions():
  assert 0.25 <= RECORD["teacher"]["avg@8"] <= 0.60
  assert 0.02 <= RECORD["student"]["avg@8"] <= 0.15
  assert RECORD["on the teacher's text"]["kl"] > 0.3  # nats per token: far apart before the warmup
  assert 450_000 < RECORD["teacher"]["parameters"] < 700_000
  assert 150_000 <= RECORD["student"]["parameters"] <= 200_000


def test_the_shipped_folders_are_small_and_share_a_tokenizer(shared_chat):
  files = [path for path in train_base.FOLDER.rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 4_000_000
  chat.same_tokenizer(chat.Chat(train_base.FOLDER / "teacher"), shared_chat)


def test_the_longest_prompt_and_response_fit(shared_chat):
  for split in ("labelled", "validation", "test"):
    prompts, rows = measure.prompts(shared_chat, split)
    assert max(len(prompt.tokens) for prompt in prompts) == measure.PROMPT_TOKENS
    solutions = (shared_chat.encode_response(row["solution"]) for row in rows.values())
    assert max(map(len, solutions)) == measure.RESPONSE_TOKENS


@pytest.mark.medium
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_scores_are_those_of_the_record(shared_chat, bases, name):
  model, params = bases[name]
  correct_PG, _ = measure.sampled(shared_chat, model, params, "validation", 8, 1.0, seed=(12345,))
  # Other samples of the same 256 problems: four standard deviations of the difference of two means
  # of samples, each problem with a pass rate of its own.
  rate_P = correct_PG.mean(axis=1)
  deviation = np.sqrt(2 * (rate_P * (1 - rate_P)).mean() / (correct_PG.size - len(rate_P)))
  assert abs(correct_PG.mean() - RECORD[name]["avg@8"]) < 4 * deviation
  greedy_P1, _ = measure.sampled(shared_chat, model, params, "validation", 1, 0.0, seed=(0,))
  # Greedy has no chance in it; another machine's rounding may turn a tie or two.
  assert abs(greedy_P1.mean() - RECORD[name]["greedy"]) <= 3 / len(greedy_P1)


@pytest.mark.medium
def test_overlap_is_that_of_the_record(shared_chat, bases):
  _, rollout = measure.sampled(shared_chat, *bases["teacher"], "validation", 8, 1.0, seed=(12345,))
  got = measure.overlap(bases["teacher"], bases["student"], rollout)
  assert got == pytest.approx(RECORD["on the teacher's text"], rel=0.1)
  itself = measure.overlap(bases["teacher"], bases["teacher"], rollout)
  assert itself == pytest.approx({"kl": 0.0, "top1": 1.0}, abs=1e-6)
