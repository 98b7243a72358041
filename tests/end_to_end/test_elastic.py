"""A run that was stopped in the middle of a stage goes on with other processes or another mesh."""

import json
import os
import shutil
import signal
import socket

import numpy as np
import pytest
from safetensors.numpy import load_file

from s2d_jax import hosts, metrics
from tests import interpreter
from tests.end_to_end import job

ROW = "reverse_kl"  # on policy: the samples of a step depend on the weights before it
# Events in the middle of the stage: a signal in step 1 saves step 2, and a kill loses step 2.
SIGNALLED, KILLED = f"{ROW}:16", f"{ROW}:34"


def run(workdir, mesh, processes=1, devices=1, flags=((),)):
  """The exit statuses of the processes of a run to its end, and what they printed."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  # Those that shorten compilation stay (tests/conftest.py).
  flags_of_xla = os.environ.get("XLA_FLAGS", "")
  environment = os.environ | {
      "XLA_FLAGS": f"{flags_of_xla} --xla_force_host_platform_device_count={devices}"}
  words = ["-m", "tests.end_to_end.job", workdir, workdir.parent / "bases", "--arm", "one_row",
           "--unprobed", "--mesh", mesh]
  joined = [()] if processes == 1 else [
      ("--processes", processes, "--process", i, "--port", port) for i in range(processes)]
  flags = [*flags, *[()] * (processes - len(flags))]
  running = [interpreter.start(*words, *of_process, *extra, env=environment)
             for of_process, extra in zip(joined, flags, strict=True)]
  done = [process.wait(300) for process in running]
  return [one.returncode for one in done], "".join(one.stderr for one in done)


def stopped(workdir):
  """The stage that was stopped: not finished, with a checkpoint."""
  (folder,) = workdir.glob(f"{ROW}-*")
  assert not (folder / "manifest.json").exists()
  assert list((folder / "checksums").glob("0*.json"))
  return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The work folder of one process that nothing stopped; `bases` lies beside it."""
  folder = tmp_path_factory.mktemp("elastic")
  job.bases(folder / "bases")
  statuses, printed = run(folder / "whole", "1,1,1")
  assert statuses == [0], printed
  return folder / "whole"


@pytest.fixture(scope="module")
def of_one(undisturbed):
  """One process, stopped by SIGTERM."""
  workdir = undisturbed.parent / "one"
  statuses, printed = run(workdir, "1,1,1", flags=[("--kill-in", SIGNALLED, "--signal", "TERM")])
  assert statuses == [hosts.RETRY], printed
  stopped(workdir)
  return workdir


@pytest.fixture(scope="module")
def of_two(undisturbed):
  """Two processes, of which process 0 was killed; the other ended by itself."""
  workdir = undisturbed.parent / "two"
  statuses, printed = run(workdir, "1,2,1", processes=2, flags=[("--kill-in", KILLED)])
  assert statuses[0] == -signal.SIGKILL and statuses[1] != 0, printed
  stopped(workdir)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize("start, mesh, processes, devices", [
    ("of_one", "1,2,1", 2, 1), ("of_two", "1,1,1", 1, 1), ("of_one", "1,2,1", 1, 2),
    ("of_one", "1,1,2", 1, 2)],
    ids=["one process to two", "two processes to one", "fsdp", "tensor"])
def test_a_stopped_run_goes_on(undisturbed, request, tmp_path, start, mesh, processes, devices):
  before = request.getfixturevalue(start)
  # Beside the bases; the fixture stays as it is for the other cases.
  workdir = undisturbed.parent / tmp_path.name
  shutil.copytree(before, workdir)
  statuses, printed = run(workdir, mesh, processes, devices)
  assert statuses == [0] * processes, printed
  # Nothing that says where a run takes place is in a folder's name.
  assert sorted(p.name for p in workdir.iterdir()) == sorted(p.name for p in undisturbed.iterdir())
  (one,), (two,) = undisturbed.glob(f"{ROW}-*"), workdir.glob(f"{ROW}-*")
  assert metrics.read(one, "ledger") == metrics.read(two, "ledger")
  logs = [metrics.read(folder, "samples") for folder in (one, two)]
  assert len(logs[0]) == len(logs[1]) == 3 * 16
  for a, b in zip(*logs, strict=True):
    assert (a["prompt_id"], a["tokens"]) == (b["prompt_id"], b["tokens"])
  want, got = (load_file(folder / "hf" / "model.safetensors") for folder in (one, two))
  assert want.keys() == got.keys()
  for name, values in want.items():
    np.testing.assert_allclose(got[name], values, atol=1e-5, rtol=0, err_msg=name)
  starts = [json.loads(path.read_text())["step"]
            for path in sorted(workdir.glob(f"{ROW}-*/starts/*"))]
  assert len(starts) == 2 and 0 < starts[1] < 3
  shutil.rmtree(workdir)
