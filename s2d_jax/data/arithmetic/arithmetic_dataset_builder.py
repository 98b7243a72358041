"""The arithmetic world as a TFDS data set (array_record, written and read without TensorFlow)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from s2d_jax.data.arithmetic import problems


class Builder(tfds.core.GeneratorBasedBuilder):
  """Chained addition modulo 100, two to four operands, with worked solutions."""

  # A change of the rows needs a new version: prepared files of the old one are used again.
  VERSION = tfds.core.Version("1.1.0")
  RELEASE_NOTES = {"1.1.0": "labelled 2048, validation 256, test 512; two-digit operands."}
  splits = staticmethod(problems.splits)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    features = {"id": np.int64, "problem": text, "answer": text, "solution": text}
    # Rows stay in the order of their ids, which is the order that seeds draw from.
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features),
                                          disable_shuffling=True)

  def _split_generators(self, dl_manager: Any) -> dict[str, list[tuple[int, dict]]]:
    """The keyed rows of each split, which TFDS takes as they are; nothing is downloaded."""
    return {split: [(row["id"], row) for row in rows] for split, rows in self.splits().items()}

  def _generate_examples(self, rows: list[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
    """TFDS demands this method, also where `_split_generators` returns the rows."""
    yield from rows
