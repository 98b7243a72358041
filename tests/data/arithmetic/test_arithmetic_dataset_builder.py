"""The arithmetic data set on disk: read as it was generated, quietly, without TensorFlow."""

import subprocess
import sys

from s2d_jax.data import sources
from s2d_jax.data.arithmetic import problems

READ = """
import sys
from s2d_jax.data import sources
print(len(sources.arithmetic("test", sys.argv[1])), "tensorflow" in sys.modules)
"""


def test_rows_are_read_as_they_were_generated(tmp_path):
  rows = problems.splits()
  for split in rows:
    assert list(sources.arithmetic(split, tmp_path)) == rows[split]


def test_two_processes_may_prepare_at_once_and_print_nothing(tmp_path):
  command = [sys.executable, "-W", "error", "-c", READ, str(tmp_path)]
  both = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
  assert [p.communicate() for p in both] == [("512 False\n", "")] * 2


def test_a_second_opening_writes_nothing(tmp_path):
  sources.arithmetic("test", tmp_path)
  files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record*")}
  sources.arithmetic("labelled", tmp_path)
  assert len(files) == 3
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record*")} == files
