"""Sources of problems: TFDS data sets as sequences, and what is refused."""

import hashlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from s2d_jax.data import sources
from s2d_jax.errors import InputError


def test_tfds_rows_are_a_sequence(tmp_path):
  rows = sources.arithmetic("validation", tmp_path)
  assert rows[-1] == rows[255] == rows[np.int64(255)] and type(rows[0]["id"]) is int
  with pytest.raises(IndexError):
    rows[256]


def test_an_absent_split_and_an_unprepared_folder_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"no rows in split train: choose one of \['labelled'"):
    sources.arithmetic("train", tmp_path)
  with pytest.raises(ValueError, match="algebra is not a prepared TFDS folder"):
    sources.prepared("algebra", "train")


def test_a_path_is_a_folder_of_tfds_or_a_file_of_json_lines(tmp_path):
  rows = sources.arithmetic("test", tmp_path / "data")
  (folder,) = {path.parent for path in tmp_path.rglob("dataset_info.json")}
  assert list(sources.read(folder, "test")) == list(rows)
  path = tmp_path / "rows.jsonl"
  path.write_text('{"id": 7, "problem": "1+1?", "answer": "2"}')
  assert sources.read(path, "test") == [{"id": 7, "problem": "1+1?", "answer": "2"}]


def test_parquet_is_known_by_its_bytes_and_read_as_json_lines_are(tmp_path):
  path = tmp_path / "rows.data"
  pyarrow.parquet.write_table(pyarrow.table({
      "problem": ["1+1?", "1+2?"], "answer": [2, 3], "solution": ["=2", None],
      "other": [[1], [2]]}), path)
  problems = sources.read(path, "test")
  assert [row | {"id": 0} for row in problems] == [
      {"id": 0, "problem": "1+1?", "answer": "2", "solution": "=2"},
      {"id": 0, "problem": "1+2?", "answer": "3"}]
  assert problems.origin == {"file": str(path),
                             "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("columns, said", [
    ({"problem": ["1+1?"], "answer": [2.5]},
     'row 1 has no text under "answer" but 2.5: write a text or an integer.'),
    ({"problem": ["1+1?"], "answer": [["2"]]}, r"""row 1 has no text .* but \['2'\]: """),
    ({"problem": ["1+1?"]}, 'row 1 has no text under "answer"'),
    ({"problem": ["1+1?", None], "answer": ["2", "3"]}, 'row 2 has no text under "problem"'),
    ({"problem": ["1+1?", "1+1?"], "answer": ["2", "2"]}, r"row 2 uses id \d+ again"),
    ({"problem": ["1+1?"], "answer": ["2"], "id": ["a"]}, "row 1 has id 'a'"),
    ({"problem": [], "answer": []}, "has no rows"),
])
def test_a_bad_row_of_parquet_is_named(tmp_path, columns, said):
  path = tmp_path / "rows.parquet"
  pyarrow.parquet.write_table(pyarrow.table(columns), path)
  with pytest.raises(InputError, match=rf"rows\.parquet {said}"):
    sources.read(path, "test")


def test_a_damaged_parquet_file_is_one_sentence(tmp_path):
  path = tmp_path / "rows.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"problem": ["1+1?"], "answer": ["2"]}), path)
  for data in (path.read_bytes()[:-9], b"PAR1", b"PAR1" + b"x" * 50 + b"PAR1"):
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"rows\.parquet is a damaged parquet file .*again\.$"):
      sources.read(path, "test")


def test_a_parquet_text_in_another_encoding_is_one_sentence(tmp_path):
  # Arrow does not look at the bytes of a text when it writes or reads them.
  texts = pyarrow.Array.from_buffers(pyarrow.string(), 1, [
      None, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0"), pyarrow.py_buffer("café".encode("latin-1"))])
  path = tmp_path / "rows.parquet"
  pyarrow.parquet.write_table(pyarrow.table({"problem": texts, "answer": ["2"]}), path)
  with pytest.raises(InputError, match=r"rows\.parquet has a text that is not UTF-8 in the rows 1 "
                                       r"to 1 \(.*0xe9.*\): write it again as UTF-8\.$"):
    sources.read(path, "test")


def test_a_name_that_is_no_file_lists_the_published_sets(tmp_path):
  with pytest.raises(InputError, match="math50 is not a file: .* or name one of dapo_math_17"):
    sources.read("math50", "test", tmp_path)
