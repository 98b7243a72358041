"""A JSONL file becomes a TFDS data set with the same rows; other rows get another folder."""

import json

from s2d_jax.data import sources
from s2d_jax.data.math import math_dataset_builder


def builder(tmp_path, answer):
  path = tmp_path / "train.jsonl"
  rows = [
    {"id": 7, "problem": "½ + ½?", "answer": answer},
    {"id": 3, "problem": "x", "answer": "2"},
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  config = math_dataset_builder.config({"train": path})
  return math_dataset_builder.Builder(
    config=config, data_dir=str(tmp_path / "tfds"), file_format="array_record"
  )


def test_rows_come_back_in_order(tmp_path):
  folder = sources.prepare(builder(tmp_path, "1"))
  expected = [
    {"id": 7, "problem": "½ + ½?", "answer": "1", "solution": ""},
    {"id": 3, "problem": "x", "answer": "2", "solution": ""},
  ]
  assert list(sources.tfds_source(folder, "train")) == expected


def test_other_rows_go_to_another_folder(tmp_path):
  assert builder(tmp_path, "1").data_dir == builder(tmp_path, "1").data_dir
  assert builder(tmp_path, "1").data_dir != builder(tmp_path, "11").data_dir
