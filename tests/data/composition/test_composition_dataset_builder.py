"""The composition data set on disk is read as it was generated."""

from s2d_jax.data import sources
from s2d_jax.data.composition import problems


def test_rows_are_read_as_they_were_generated(tmp_path):
  rows = problems.splits()
  for split in rows:
    assert list(sources.composition(split, tmp_path)) == rows[split]
