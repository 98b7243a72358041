"""The tasks that a config names: where problems come from, and what checks the answers."""

import importlib.metadata
import json

import ml_collections
import pytest

from s2d_jax import planning, tasks
from s2d_jax.data.word_problems import problems as word_problems
from s2d_jax.errors import InputError
from s2d_jax.rewards import math


@pytest.fixture
def data(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps({"id": 7, "problem": "1+1?", "answer": "\\frac{4}{2}"}) + "\n")
  return ml_collections.ConfigDict({"data": {"labelled": str(path)}})


def test_the_default_checker_of_math_asks_math_verify(data):
  task = tasks.math(data)
  assert task.source("labelled") == [{"id": 7, "problem": "1+1?", "answer": "\\frac{4}{2}"}]
  assert task.reward({"answer": "2"}, "\\boxed{2}") == 1.0
  assert task.reward is math.verified
  data.checker = "string"
  assert tasks.math(data).reward is math.reward


def test_another_checker_has_another_identity(data):
  first = planning.identity_of(tasks.math(data).reward)
  data.checker = "verify"
  assert planning.identity_of(tasks.math(data).reward) == first
  # Its version, and that of the library that decides with it.
  assert first[2] == f"{math.VERSION} with math-verify {importlib.metadata.version('math-verify')}"
  found = [first]
  for checker, order in (("verify", "fixed"), ("string", "any"), ("string", "fixed")):
    data.checker = checker
    data.list_order = order
    found.append(planning.identity_of(tasks.math(data).reward))
  assert len(set(map(str, found))) == 4
  assert planning.identity_of(math.reward) == ["s2d_jax.rewards.math", "reward", math.VERSION]


def test_the_order_of_a_list_is_a_key_of_the_config(data):
  data.checker = "string"
  assert tasks.math(data).reward({"answer": "1, 2"}, "\\boxed{2, 1}") == 1.0
  data.list_order = "fixed"
  assert tasks.math(data).reward({"answer": "1, 2"}, "\\boxed{2, 1}") == 0.0
  assert tasks.math(data).answer("\\boxed{2, 1}") == "2, 1"


def test_word_problems_take_the_keys_of_the_checker(tmp_path):
  config = ml_collections.ConfigDict({"data": {"dir": str(tmp_path)}})
  assert tasks.word_problems(config).reward is math.reward
  config.list_order = "fixed"
  assert tasks.word_problems(config).reward is math.reward_in_order
  config.list_order = "banana"
  with pytest.raises(InputError, match="config.list_order is 'banana': choose it from any, fixed"):
    tasks.word_problems(config)


@pytest.mark.medium
def test_math_verify_accepts_answers_that_string_match_rejects(data):
  problem, text = tasks.math(data).source("labelled")[0], "\\boxed{2}"
  assert math.reward(problem, text) == 0.0
  assert tasks.math(data).reward(problem, text) == 1.0
  data.list_order = "fixed"
  assert tasks.math(data).reward(problem, text) == 1.0
  assert tasks.math(data).reward({"answer": "\\sqrt{4}, 1"}, "\\boxed{1, 2}") == 0.0


def test_an_unknown_checker_and_an_absent_library_are_refused(data, monkeypatch):
  data.checker = "sympy"
  with pytest.raises(InputError, match="config.checker is 'sympy': choose it from string, verify"):
    tasks.math(data)
  data.checker = "verify"
  data.list_order = "sorted"
  with pytest.raises(InputError, match="config.list_order is 'sorted': choose it from any, fixed"):
    tasks.math(data)
  data.list_order = "any"
  monkeypatch.setattr(math, "INSTALLED", False)
  with pytest.raises(InputError, match=r"not installed: pip install -e '\.\[math\]', or set "
                                       "config.checker to 'string'"):
    tasks.math(data)


def test_the_key_of_an_earlier_version_names_its_replacement(data):
  data.data.grader = "math_verify"
  with pytest.raises(InputError, match="config.data.grader was replaced by config.checker"):
    tasks.math(data)


def test_a_task_refuses_the_keys_of_another(tmp_path):
  config = ml_collections.ConfigDict({"data": {"dir": str(tmp_path)}, "checker": "string"})
  with pytest.raises(InputError, match="config.checker is not read by the task arithmetic"):
    tasks.arithmetic(config)
  config.task = "composition"
  with pytest.raises(InputError, match="config.checker is not read by the task composition"):
    tasks.composition(config)


@pytest.mark.parametrize("name, problem, answer, family", [
    ("arithmetic", "12+34+57", "03", "3"), ("composition", "12-34-57#", "35", "right")])
def test_an_embedded_world_has_problems_answers_and_families(tmp_path, name, problem, answer,
                                                             family):
  task = tasks.TASKS[name](ml_collections.ConfigDict({"data": {"dir": str(tmp_path)}}))
  row = {"problem": problem, "answer": answer}
  assert task.family(row) == family
  assert task.messages(row) == [{"role": "user", "content": problem}]
  assert task.reward(row, f"12+34={answer}") == 1.0 and task.answer(f"12+34={answer}") == answer
  assert len(task.source("validation")) == 256
  with pytest.raises(InputError, match="config.data lacks the key 'dir'"):
    tasks.TASKS[name](ml_collections.ConfigDict({"data": {}}))


def test_a_problem_of_mathematics_has_the_family_of_its_first_column_that_names_one(data):
  family_of = tasks.math(data).family
  problem = {"id": 7, "level": "Level 5", "subject": "Algebra", "family": "linear equations"}
  for name in ("linear equations", "Algebra", "Level 5"):
    assert family_of(problem) == name
    del problem[next(key for key in problem if problem[key] == name)]
  with pytest.raises(InputError, match="problem 7 names no family: give every problem a text under "
                                       "family or subject or level"):
    family_of(problem)


def test_word_problems_have_the_families_of_their_sampling(data, monkeypatch):
  kind_of = {}
  for name, make in word_problems.KINDS.items():
    def recorded(rng, make=make, name=name):
      found = make(rng)
      kind_of.setdefault(found[0], name)
      return found
    monkeypatch.setitem(word_problems.KINDS, name, recorded)
  rows = word_problems.splits({"test": 300})["test"]
  config = ml_collections.ConfigDict({"data": {"dir": "data"}})
  family_of = tasks.word_problems(config).family
  assert [family_of(row) for row in rows] == [kind_of[row["problem"]] for row in rows]
  assert {*kind_of.values()} == set(word_problems.KINDS)


def test_a_task_without_families_has_none():
  assert planning.Task(list, list, float).family is None


def test_an_absent_split_is_refused(data):
  with pytest.raises(ValueError, match="config.data names no split 'test': add its file"):
    tasks.math(data).source("test")
