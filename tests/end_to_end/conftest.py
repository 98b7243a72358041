"""Undisturbed runs of the tiny job, each made once for all files and all of pytest's workers."""

import fcntl
import os

import pytest

from tests import interpreter
from tests.end_to_end import job


@pytest.fixture(scope="session")
def run_alone(tmp_path_factory):
  """A function (arm, *flags) -> the work folder of one process on the mesh (1,1,1), for reading.

  `bases` lies beside it, and `counts.0`, the counts of its reads and writes. The first caller runs
  the job; another worker that needs the folder at this moment waits.
  """
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent  # of all workers

  def run(arm, *flags):
    folder = root / "-".join(("alone", arm, *flags))
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not (folder / "ended").exists():
        job.bases(folder / "bases")
        done = interpreter.run("-m", "tests.end_to_end.job", folder / "work", folder / "bases",
                               "--arm", arm, "--counts", folder / "counts", *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "ended").touch()
    return folder / "work"

  return run
