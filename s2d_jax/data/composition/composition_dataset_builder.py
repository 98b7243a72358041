"""The composition world as a TFDS data set (array_record, written and read without TensorFlow)."""

import tensorflow_datasets as tfds

from s2d_jax.data.arithmetic import arithmetic_dataset_builder
from s2d_jax.data.composition import problems


class Builder(arithmetic_dataset_builder.Builder):
  """Chains of sums, differences and products modulo 100, five families, with worked solutions."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "labelled 2048, validation 256, test 512; five families."}
  splits = staticmethod(problems.splits)
