"""JSON lines of problems: their rows and ids, and one sentence for each kind of bad input."""

import json

import numpy as np
import pytest

from s2d_jax.data import jsonl

GOOD = {"problem": "1+1?", "answer": "2"}


def write(tmp_path, *rows):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
  return path


def test_jsonl_rows(tmp_path):
  path = write(tmp_path, GOOD | {"id": 9, "solution": "1+1=2", "level": 3}, GOOD | {"id": 4})
  assert jsonl.rows(path) == [
    {"id": 9, "problem": "1+1?", "answer": "2", "solution": "1+1=2"},
    {"id": 4, "problem": "1+1?", "answer": "2"},
  ]


def test_an_absent_id_is_a_hash_of_the_problem(tmp_path):
  # printf '1+1?' | b2sum --length=64 and, for "2+2?", the same: 63 bits, so the last one is lost.
  other = {"problem": "2+2?", "answer": "4"}
  ids = [row["id"] for row in jsonl.rows(write(tmp_path, GOOD, "\n", other))]
  assert ids == [0x6a9e606bb00c9d3a >> 1, 0xe3ca948e7ab0e337 >> 1]
  assert [row["id"] for row in jsonl.rows(write(tmp_path, other, GOOD))] == ids[::-1]
  assert np.array(ids, np.int64).min() > 0  # as rollouts keep them


def test_a_problem_without_id_stands_once(tmp_path):
  with pytest.raises(ValueError, match=r"line 2 uses id \d+ again.* without ids every problem"):
    jsonl.rows(write(tmp_path, GOOD, GOOD))


def test_an_absent_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere\.jsonl is not a file"):
    jsonl.rows(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
  "row, complaint",
  [
    ('{"problem": \n', r"line 2 is not JSON"),
    ("[1]\n", r"line 2 is not a JSON object"),
    ({"problem": "x"}, r'line 2 has no text under "answer"'),
    ({"answer": "x", "problem": ""}, r'line 2 has no text under "problem"'),
    ({"answer": 3, "problem": "x"}, r'line 2 has no text under "answer"'),
    (GOOD | {"id": "a"}, r"line 2 has id 'a'"),
    (GOOD | {"solution": 3}, r"line 2 has a solution that is not text"),
    (GOOD | {"id": 7}, r"line 2 uses id 7 again"),
  ],
)
def test_a_bad_line_is_named(tmp_path, row, complaint):
  path = write(tmp_path, GOOD | {"id": 7}, row)
  with pytest.raises(ValueError, match=rf"rows\.jsonl {complaint}"):
    jsonl.rows(path)


def test_an_empty_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"rows\.jsonl has no rows"):
    jsonl.rows(write(tmp_path, "\n"))


SOLUTIONS = [
  {"id": 4, "response": "cut", "finish": "length", "sample": 0},
  {"id": 4, "response": "second", "finish": "stop", "sample": 2},
  {"id": 4, "response": "first", "finish": "stop", "sample": 1},
  {"id": 9, "response": "", "sample": 0},
]


def test_the_first_finished_sample_is_the_solution(tmp_path):
  problems = [GOOD | {"id": 4}, GOOD | {"id": 9}]
  found = jsonl.solved(problems, write(tmp_path, *SOLUTIONS))
  assert found == [GOOD | {"id": 4, "solution": "first"}, GOOD | {"id": 9}]
  assert jsonl.solved(problems, None) is problems


@pytest.mark.parametrize(
  "row, complaint",
  [
    ({"id": "4", "response": "x"}, r"line 5 lacks an integer id or a response's text"),
    ({"id": 4, "response": 3}, r"line 5 lacks an integer id or a response's text"),
    (SOLUTIONS[2], r"line 5 answers problem 4 again"),
    ("[1]", r"line 5 is not a JSON object"),
  ],
)
def test_a_bad_solution_is_named(tmp_path, row, complaint):
  with pytest.raises(ValueError, match=rf"rows\.jsonl {complaint}"):
    jsonl.solved([], write(tmp_path, *SOLUTIONS, row))
