"""Sums and word problems as a TFDS data set (array_record, written and read without TensorFlow)."""

import tensorflow_datasets as tfds

from s2d_jax.data.arithmetic import arithmetic_dataset_builder
from s2d_jax.data.word_problems import problems


class Builder(arithmetic_dataset_builder.Builder):
  """Sums and word problems of small whole numbers, with solutions of one line."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "labelled 2048, validation 256, test 512; six kinds."}
  splits = staticmethod(problems.splits)
