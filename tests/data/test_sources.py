"""Sources of problems: what they return, and one sentence for each kind of bad input."""

import json

import numpy as np
import pytest

from s2d_jax.data import sources

GOOD = {"problem": "1+1?", "answer": "2"}


def write(tmp_path, *rows):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
  return path


def test_jsonl_rows(tmp_path):
  path = write(tmp_path, GOOD | {"id": 9, "solution": "1+1=2", "level": 3}, GOOD | {"id": 4})
  assert sources.jsonl(path) == [
    {"id": 9, "problem": "1+1?", "answer": "2", "solution": "1+1=2"},
    {"id": 4, "problem": "1+1?", "answer": "2"},
  ]


def test_an_absent_id_is_a_hash_of_the_problem(tmp_path):
  # printf '1+1?' | b2sum --length=64 and, for "2+2?", the same: 63 bits, so the last one is lost.
  other = {"problem": "2+2?", "answer": "4"}
  ids = [row["id"] for row in sources.jsonl(write(tmp_path, GOOD, "\n", other))]
  assert ids == [0x6a9e606bb00c9d3a >> 1, 0xe3ca948e7ab0e337 >> 1]
  assert [row["id"] for row in sources.jsonl(write(tmp_path, other, GOOD))] == ids[::-1]
  assert np.array(ids, np.int64).min() > 0  # as rollouts keep them


def test_a_problem_without_id_stands_once(tmp_path):
  with pytest.raises(ValueError, match=r"line 2 uses id \d+ again.* without ids every problem"):
    sources.jsonl(write(tmp_path, GOOD, GOOD))


def test_an_absent_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere\.jsonl is no file"):
    sources.jsonl(tmp_path / "nowhere.jsonl")


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
    sources.jsonl(path)


def test_an_empty_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"rows\.jsonl has no rows"):
    sources.jsonl(write(tmp_path, "\n"))


def test_tfds_rows_are_a_sequence(tmp_path):
  rows = sources.arithmetic("validation", tmp_path)
  assert rows[-1] == rows[255] == rows[np.int64(255)] and type(rows[0]["id"]) is int
  with pytest.raises(IndexError):
    rows[256]


def test_an_absent_split_and_an_unprepared_folder_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no rows in split train: choose one of \['labelled'"):
    sources.arithmetic("train", tmp_path)
  with pytest.raises(ValueError, match="algebra is no prepared TFDS folder"):
    sources.prepared("algebra", "train")


def test_a_path_is_a_folder_of_tfds_or_a_file_of_json_lines(tmp_path):
  rows = sources.arithmetic("test", tmp_path / "data")
  (folder,) = {path.parent for path in tmp_path.rglob("dataset_info.json")}
  assert list(sources.read(folder, "test")) == list(rows)
  path = write(tmp_path, GOOD | {"id": 7})
  assert list(sources.read(path, "test")) == [GOOD | {"id": 7}]
