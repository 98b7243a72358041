"""The arithmetic world as a TFDS data set (array_record, written and read without TensorFlow)."""

import numpy as np
import tensorflow_datasets as tfds

from s2d_jax.data.arithmetic import problems


class Builder(tfds.core.GeneratorBasedBuilder):
  """Chained addition modulo 100, two to four operands, with worked solutions."""

  VERSION = tfds.core.Version("1.1.0")
  RELEASE_NOTES = {"1.1.0": "labelled 2048, validation 256, test 512; two-digit operands."}

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          "id": np.int64,
          "problem": tfds.features.Text(),
          "answer": tfds.features.Text(),
          "solution": tfds.features.Text(),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {split: [(row["id"], row) for row in rows] for split, rows in problems.splits().items()}

  def _generate_examples(self, rows):
    yield from rows
