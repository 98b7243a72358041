"""Two processes joined by jax.distributed run every row of `bridge` with the samples of one."""

import json
import socket

import numpy as np
import pytest

from s2d_jax import metrics, rollouts
from tests import interpreter
from tests.end_to_end import job

ROWS = ("teacher_grpo", "forward_kl", "reverse_kl")


def launch(workdir, bases, *flags):
  return interpreter.start("-m", "tests.end_to_end.job", workdir, bases, "--arm", "bridge", *flags)


@pytest.fixture(scope="module", params=[(), ("--options",)], ids=["plain", "options"])
def runs(tmp_path_factory, request):
  """Work folders of one process on (1,1,1), and of two on (1,2,1) with half the weights each."""
  flags = request.param
  folder = tmp_path_factory.mktemp("processes")
  job.bases(folder / "bases")
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  alone = launch(folder / "one", folder / "bases", *flags).wait(600)
  assert alone.returncode == 0, alone.stderr
  both = [launch(folder / "two", folder / "bases", "--mesh", "1,2,1", "--process", i,
                 "--port", port, *flags) for i in "01"]
  for done in [process.wait(600) for process in both]:
    assert done.returncode == 0, done.stderr
  return folder / "one", folder / "two"


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_two_processes_sample_as_one(runs, row):
  logs = [metrics.read(next(run.glob(f"{row}-*")), "samples") for run in runs]
  assert len(logs[0]) == len(logs[1]) == 3 * 16  # every row of every step
  for one, two in zip(*logs, strict=True):
    assert one["tokens"] == two["tokens"] and one["prompt_id"] == two["prompt_id"]
    assert one["reward"] == two["reward"]
    np.testing.assert_allclose(one["logp"], two["logp"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_two_processes_step_as_one_to_rounding(runs, row):
  logs = [metrics.read(next(run.glob(f"{row}-*")), "metrics") for run in runs]
  assert len(logs[0]) == len(logs[1]) == 3
  for one, two in zip(*logs, strict=True):
    for key in ("loss", "grad_norm", "response_length"):
      np.testing.assert_allclose(one[key], two[key], rtol=1e-4, atol=1e-6, err_msg=key)
    assert two["logp_gap_max"] < 1e-5
  ledgers = [metrics.read(next(run.glob(f"{row}-*")), "ledger") for run in runs]
  assert ledgers[0] == ledgers[1]


@pytest.mark.slow
def test_two_processes_store_the_frozen_teachers_rollouts_of_one(runs):
  parts = [sorted(run.glob("rollouts-*/*.npz")) for run in runs]
  assert [p.name for p in parts[0]] == [p.name for p in parts[1]] != []
  for one, two in zip(*parts, strict=True):
    one, two = rollouts.from_bytes(one.read_bytes()), rollouts.from_bytes(two.read_bytes())
    np.testing.assert_array_equal(one.response_BT, two.response_BT)


@pytest.mark.slow
def test_two_processes_decide_as_one(runs):
  """Shares of families, and how far a search moves the weights."""
  shares = [metrics.read(next(run.glob("forward_kl-*")), "allocate") for run in runs]
  for one, two in zip(*shares, strict=True):
    assert one["shares"] == two["shares"]
  moves = [[row.get("foresee_multiple") for row in
            metrics.read(next(run.glob("reverse_kl-*")), "metrics")] for run in runs]
  assert moves[0] == moves[1]


@pytest.mark.slow
def test_two_processes_probe_as_one(runs):
  results = []
  for run in runs:
    found = {path.parent.name: json.loads(path.read_text())
             for path in run.glob("probe-*/result.json")}
    results.append({name: {part: {key: x for key, x in numbers.items()
                                  if part == "prefixes" or key == "pass_rate"}
                           for part, numbers in result.items()}
                    for name, result in found.items()})
  assert results[0] == results[1] != {}
