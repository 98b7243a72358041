"""JSON lines of problems and answers as a TFDS data set (array_record, no TensorFlow)."""

import dataclasses
import hashlib
import json

import numpy as np
import tensorflow_datasets as tfds

from s2d_jax.data import sources


@dataclasses.dataclass(eq=False)
class Rows(tfds.core.BuilderConfig):
  """Checked rows per split; the name carries a hash of them, so other rows go elsewhere."""

  splits: dict = dataclasses.field(default_factory=dict, repr=False)


def config(paths):
  """The builder's config for {split: path of a JSONL file}, each checked by `sources.jsonl`."""
  splits = {split: sources.jsonl(path) for split, path in paths.items()}
  digest = hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
  return Rows(name=f"rows_{digest[:16]}", splits=splits)


class Builder(tfds.core.GeneratorBasedBuilder):
  """Problems with checkable answers; "solution" is empty where a row has none."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "id, problem, answer, solution."}

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
    splits = self.builder_config.splits
    return {split: self._generate_examples(rows) for split, rows in splits.items()}

  def _generate_examples(self, rows):
    for place, row in enumerate(rows):  # the key is what TFDS orders by
      yield place, {"solution": ""} | row
