"""The tasks that a config names: where problems come from, and what checks the answers."""

import json

import ml_collections
import pytest

from s2d_jax import planning, tasks
from s2d_jax.rewards import math


@pytest.fixture
def data(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps({"id": 7, "problem": "1+1?", "answer": "\\frac{4}{2}"}) + "\n")
  return ml_collections.ConfigDict({"data": {"labelled": str(path)}})


def test_the_default_grader_of_math_is_string_match(data):
  task = tasks.math(data)
  assert task.source("labelled") == [{"id": 7, "problem": "1+1?", "answer": "\\frac{4}{2}"}]
  assert task.reward({"answer": "2"}, "\\boxed{2}") == 1.0
  assert task.reward is math.reward


def test_another_grader_has_another_identity(data):
  first = planning.identity_of(tasks.math(data).reward)
  data.data.grader = "string_match"
  assert planning.identity_of(tasks.math(data).reward) == first
  data.data.grader = "math_verify"
  assert tasks.math(data).reward is math.verified
  assert planning.identity_of(math.verified) != first


@pytest.mark.medium
def test_math_verify_accepts_answers_that_string_match_rejects(data):
  data.data.grader = "math_verify"
  problem, text = tasks.math(data).source("labelled")[0], "\\boxed{2}"
  assert math.reward(problem, text) == 0.0
  try:
    assert tasks.math(data).reward(problem, text) == 1.0
  finally:
    math._verifier().close()
    math._verifier.cache_clear()


def test_an_unknown_grader_and_an_absent_library_are_refused(data, monkeypatch):
  data.data.grader = "sympy"
  with pytest.raises(ValueError, match="config.data.grader is 'sympy': choose string_match or ma"):
    tasks.math(data)
  data.data.grader = "math_verify"
  monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="not installed: pip install math-verify"):
    tasks.math(data)


def test_an_absent_split_is_refused(data):
  with pytest.raises(ValueError, match="config.data names no split 'test': add its file"):
    tasks.math(data).source("test")
