"""Published sets of mathematics problems as TFDS data sets (array_record, without TensorFlow)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from s2d_jax.data import published

# TFDS has no optional feature: an empty text stands for none.
_TEXTS = ("problem", "answer", "solution", "subject")


class Builder(tfds.core.GeneratorBasedBuilder):
  """The distinct problems of one file of `published.SOURCES`, each with its answer."""

  # A change of the rows needs a new version: prepared files of the old one are used again.
  VERSION = tfds.core.Version("1.2.0")
  RELEASE_NOTES = {"1.0.0": "Seven sets: DAPO, MATH, MATH-500, AIME 2024 and 2025, GSM8K.",
                   "1.1.0": "The id of every row is a hash of its text, whatever its columns.",
                   "1.2.0": "The subject of a problem of MATH and MATH-500."}

  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in published.SOURCES]

  def __init__(self, *, name: str, file: Path, data_dir: str) -> None:
    """The builder of the set `name` from its file."""
    self._file = file
    super().__init__(data_dir=data_dir, config=name, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    features = {"id": np.int64} | dict.fromkeys(_TEXTS, text)
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features),
                                          disable_shuffling=True)

  def _split_generators(self, dl_manager: Any) -> dict[str, list[tuple[int, dict]]]:
    """The keyed rows of the only split, which TFDS takes as they are."""
    rows = published.rows(self.builder_config.name, self._file)
    return {"problems": [(index, {"id": row["id"]} | {name: row.get(name, "") for name in _TEXTS})
                         for index, row in enumerate(rows)]}

  def _generate_examples(self, rows: list[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
    """TFDS demands this method, also where `_split_generators` returns the rows."""
    yield from rows
