"""JSON lines of problems: their rows and ids, and one sentence for each kind of bad input."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest

from s2d_jax.data import jsonl
from s2d_jax.errors import InputError

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
    ({"answer": 3.5, "problem": "x"}, r'line 2 has no text under "answer" but 3.5: write a text'),
    ({"answer": True, "problem": "x"}, r'line 2 has no text under "answer" but True: write a'),
    ({"answer": " ", "problem": "x"}, r'line 2 has no text under "answer": give every row problem'),
    ({"answer": "x", "problem": 7}, r'line 2 has no text under "problem" but 7: write a text\.'),
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


LINE = json.dumps(GOOD).encode() + b"\n"


@pytest.mark.parametrize("data, line, complaint", [
    ('{"problem": "né?", "answer": "2"}\n'.encode("latin-1"), 1, "is not UTF-8.*save it as UTF-8"),
    (LINE + '{"problem": "½?", "answer": "2"}\n'.encode("cp1252"), 2, "is not UTF-8"),
    (gzip.compress(LINE, mtime=0), 1, "is compressed with gzip, not JSON: decompress it"),
    (bz2.compress(LINE), 1, "is compressed with bzip2"),
    (lzma.compress(LINE), 1, "is compressed with xz"),
    (b"PK\x03\x04" + LINE, 1, "is a zip archive"),
    (b"PAR1" + LINE + b"PAR1", 1, "is a parquet file"),
    (LINE.decode().encode("utf-16"), 1, "is UTF-16, not JSON: save it as UTF-8"),
    (LINE.decode().encode("utf-16-le"), 1, "has zero bytes, as UTF-16 has: save it as UTF-8"),
    (LINE.decode().encode("utf-32"), 1, "is UTF-32"),
    (LINE.decode().encode("utf-8-sig"), 1, "is UTF-8 with a byte-order mark.*save it without"),
    (b"<!doctype html>\n", 1, "is a page of HTML"),
    (b"version https://git-lfs.github.com/spec/v1\n", 1, "is a Git LFS pointer"),
    (LINE + b'{"problem": "x", "answer": ' + b"7" * 5000 + b"}\n", 2,
     "has an integer of 5000 digits: write a number of at most 300"),
    (LINE + b'{"problem": "x", "answer": "2", "id": -' + b"7" * 5000 + b"}\n", 2,
     "has an integer of 500"),
    (b'{"problem": "x", "answer": 1e999}\n', 1, "has the number .* beyond a float64"),
    (b'{"problem": "x", "answer": NaN}\n', 1, "has NaN, which JSON lacks"),
    (LINE + b'{"problem": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", 2, "is nested too deeply"),
    (b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"\n", 1, "is nested too deeply"),
    (b'{"problem": "x", "answer": "2", "answer": "3"}\n', 1, "has the key 'answer' twice"),
    (b'{"problem": "x", "answer": "2", "more": {"a": 1, "a": 1}}\n', 1, "has the key 'a' twice"),
    (b'{"problem": "\\ud800", "answer": "2"}\n', 1, "has .*half a surrogate pair"),
    (LINE[:-5], 1, "is not JSON"),
    (b"problem,answer\n1+1?,2\n", 1, "is not JSON"),
    (b"[" + LINE.strip() + b"]\n", 1, "is not a JSON object: write one object per line"),
    (b"null\n", 1, "is not a JSON object"),
], ids=lambda part: part if isinstance(part, str) else "")
def test_a_file_of_another_kind_is_one_sentence_with_file_and_line(tmp_path, data, line, complaint):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(data)
  with pytest.raises(InputError, match=rf"rows\.jsonl line {line} {complaint}") as error:
    jsonl.rows(path)
  assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(path))


@pytest.mark.parametrize("number", [True, False, None, -1, 2**63, 1.0, "7", [7], {}])
def test_an_id_is_an_integer(tmp_path, number):
  with pytest.raises(InputError, match=r"rows\.jsonl line 2 has id .*: ids are integers from 0 to"):
    jsonl.rows(write(tmp_path, GOOD, GOOD | {"id": number}))


def test_an_integer_is_an_answer(tmp_path):
  path = write(tmp_path, {"problem": "1+1?", "answer": 2}, {"problem": "1-3?", "answer": -2})
  assert [row["answer"] for row in jsonl.rows(path)] == ["2", "-2"]


@pytest.mark.parametrize("answer", [True, 2.0, None, [2], {"a": 2}, "", " \n"])
def test_another_value_is_no_answer(tmp_path, answer):
  with pytest.raises(InputError, match=r'rows\.jsonl line 1 has no text under "answer"'):
    jsonl.rows(write(tmp_path, {"problem": "x", "answer": answer}))


@pytest.mark.parametrize("sample", ["1", 1.0, True, -1, [0], {}])
def test_a_sample_is_numbered(tmp_path, sample):
  rows = [{"id": 4, "response": "x", "sample": 0}, {"id": 4, "response": "y", "sample": sample}]
  with pytest.raises(InputError, match=r'rows\.jsonl line 2 has .* under "sample": number the'):
    jsonl.solved([GOOD | {"id": 4}], write(tmp_path, *rows))


@pytest.mark.parametrize("first, second", [({}, {"sample": 0}), ({"sample": None}, {}),
                                           ({"sample": 0}, {"sample": None})])
def test_a_response_without_a_sample_is_the_first(tmp_path, first, second):
  rows = [{"id": 4, "response": "x"} | first, {"id": 4, "response": "y"} | second]
  problems = [GOOD | {"id": 4}]
  with pytest.raises(InputError, match="line 2 answers problem 4 again"):
    jsonl.solved(problems, write(tmp_path, *rows))
  later = {"id": 4, "response": "z", "sample": 3}
  found = jsonl.solved(problems, write(tmp_path, later, rows[0]))
  assert found == [problems[0] | {"solution": "x"}]


@pytest.mark.parametrize("number", [True, "4", 4.0, None, -4, [4]])
def test_a_solutions_id_is_an_integer(tmp_path, number):
  with pytest.raises(InputError, match="line 1 lacks an integer id or a response's text"):
    jsonl.solved([], write(tmp_path, {"id": number, "response": "x"}))
