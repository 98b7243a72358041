"""Sources of problems: TFDS data sets as sequences, and what is refused."""

import numpy as np
import pytest

from s2d_jax.data import sources


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
