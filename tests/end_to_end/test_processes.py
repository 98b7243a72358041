"""Several processes joined by jax.distributed run every row with the samples of one."""

import json
import os
import pathlib
import socket

import numpy as np
import pytest
from safetensors.numpy import load_file

from s2d_jax import metrics, rollouts
from tests import interpreter
from tests.end_to_end import job

# Every row on four processes takes ten minutes on two cores, so it runs on demand:
#   S2D_ARM_OF_FOUR=every_row python -m pytest -m slow tests/end_to_end/test_processes.py
ARM_OF_FOUR = os.environ.get("S2D_ARM_OF_FOUR", "bridge")
# (processes, their mesh, arm, flags). Two have half the weights each, and four half of each
# matrix's rows and columns.
SEVERAL = {"plain": (2, "1,2,1", "every_row", ()),
           "options": (2, "1,2,1", "bridge", ("--options",)),
           "four": (4, "1,2,2", ARM_OF_FOUR, ())}


def together(workdir, bases, processes, mesh, arm, flags):
  """Runs the job to its end on several processes."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  running = [interpreter.start("-m", "tests.end_to_end.job", workdir, bases, "--arm", arm,
                               "--counts", f"{workdir}.counts", "--mesh", mesh, "--processes",
                               processes, "--process", i, "--port", port, *flags)
             for i in range(processes)]
  for done in [process.wait(600) for process in running]:
    assert done.returncode == 0, done.stderr


def counts(name, processes):
  """The counts of reads and writes of a run: {name: number of each process}."""
  found = [json.loads(pathlib.Path(f"{name}.{i}").read_text()) for i in range(processes)]
  return {name: [one[name] for one in found] for name in found[0]}


@pytest.fixture(scope="module", params=list(SEVERAL))
def runs(run_alone, tmp_path_factory, request):
  """Work folders of one process and of several."""
  processes, mesh, arm, flags = SEVERAL[request.param]
  alone = run_alone(arm, *flags)
  several = tmp_path_factory.mktemp("processes") / "several"
  together(several, alone.with_name("bases"), processes, mesh, arm, flags)
  return alone, several


@pytest.fixture
def rows(request):
  """The rows of the arm that the case of `runs` trains."""
  arm = SEVERAL[request.node.callspec.params["runs"]][2]
  return [use.stage for use in job.ARMS[arm]]


@pytest.mark.slow
def test_processes_sample_as_one(runs, rows):
  for row in rows:
    logs = [metrics.read(next(run.glob(f"{row}-*")), "samples") for run in runs]
    # Every row of every step; the given solutions of teacher_sft are 4 a step.
    assert len(logs[0]) == len(logs[1]) == 3 * (4 if row == "teacher_sft" else 16), row
    for one, two in zip(*logs, strict=True):
      assert one["tokens"] == two["tokens"] and one["prompt_id"] == two["prompt_id"], row
      assert one["reward"] == two["reward"], row
      if row == "teacher_sft":  # nothing was sampled
        assert one["logp"] is two["logp"] is None
      else:
        np.testing.assert_allclose(one["logp"], two["logp"], atol=1e-5, err_msg=row)


@pytest.mark.slow
def test_processes_step_as_one_to_rounding(runs, rows):
  for row in rows:
    logs = [metrics.read(next(run.glob(f"{row}-*")), "metrics") for run in runs]
    assert len(logs[0]) == len(logs[1]) == 3, row
    for one, two in zip(*logs, strict=True):
      for key in ("loss", "grad_norm", "response_length"):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-4, atol=1e-6,
                                   err_msg=f"{row} {key}")
      assert row == "teacher_sft" or two["logp_gap_max"] < 1e-5, row
    ledgers = [metrics.read(next(run.glob(f"{row}-*")), "ledger") for run in runs]
    assert ledgers[0] == ledgers[1], row


@pytest.mark.slow
def test_processes_store_the_frozen_teachers_rollouts_of_one(runs):
  parts = [sorted(run.glob("rollouts-*/*.npz")) for run in runs]
  assert [p.name for p in parts[0]] == [p.name for p in parts[1]] != []
  for one, two in zip(*parts, strict=True):
    one, two = rollouts.from_bytes(one.read_bytes()), rollouts.from_bytes(two.read_bytes())
    np.testing.assert_array_equal(one.response_BT, two.response_BT)


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["options"], indirect=True)
def test_processes_decide_as_one(runs):
  """Shares of families, and how far a search moves the weights."""
  shares = [metrics.read(next(run.glob("forward_kl-*")), "allocate") for run in runs]
  assert [row["step"] for row in shares[0]] == [0, 1, 2]
  for one, two in zip(*shares, strict=True):
    assert one["shares"] == two["shares"]
  moves = [[row.get("foresee_multiple") for row in
            metrics.read(next(run.glob("reverse_kl-*")), "metrics")] for run in runs]
  # A search follows the first two steps of three.
  assert moves[0] == moves[1] and min(moves[0][:2]) > 0 and moves[0][2] is None


@pytest.mark.slow
def test_processes_probe_as_one(runs):
  results = []
  for run in runs:
    found = {path.parent.name: json.loads(path.read_text())
             for path in run.glob("probe-*/result.json")}
    results.append({name: {part: {key: x for key, x in numbers.items()
                                  if part == "prefixes" or key == "pass_rate"}
                           for part, numbers in result.items()}
                    for name, result in found.items()})
  assert results[0] == results[1] != {}


@pytest.mark.slow
def test_processes_end_in_the_weights_of_one(runs, rows):
  for row in rows:
    one, several = (load_file(next(run.glob(f"{row}-*")) / "hf" / "model.safetensors")
                    for run in runs)
    assert one.keys() == several.keys(), row
    for name, values in one.items():
      np.testing.assert_allclose(several[name], values, atol=1e-5, rtol=0, err_msg=f"{row} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["four"], indirect=True)
def test_each_of_four_processes_does_its_share(runs):
  alone, of_four = counts(runs[0].with_name("counts"), 1), counts(f"{runs[1]}.counts", 4)
  # A fourth of each matrix, and all of each vector.
  assert max(of_four["weight_bytes"]) < 0.5 * alone["weight_bytes"][0]
  # Each row is scored on one process, and the rows are dealt out in turn.
  assert sum(of_four["rewards"]) == alone["rewards"][0] > 0
  assert max(of_four["rewards"]) <= 1.05 * min(of_four["rewards"])
  assert max(of_four["checked"]) < 0.3 * sum(of_four["checked"])
  # Process 0 alone writes logs, results and stores: as many as one process.
  assert of_four["written"] == [of_four["written"][0], 0, 0, 0] and of_four["written"][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["four"], indirect=True)
def test_two_runs_of_four_processes_are_equal_bit_for_bit(runs):
  again = runs[1].with_name("again")
  together(again, runs[0].with_name("bases"), *SEVERAL["four"])
  want, got = job.facts(runs[1]), job.facts(again)
  assert want.keys() == got.keys() and any("safetensors" in name for name in want)
  assert [name for name in want if want[name] != got[name]] == []
