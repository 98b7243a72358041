"""Decisions of a stage's shares in tiny runs of the composition world."""

import jax
import numpy as np
import pytest
from etils import epath

from configs import composition
from s2d_jax import allocate, files, metrics, recipe, sharding, tasks
from s2d_jax.errors import InputError

BLOCK = {"interval": 2, "rule": "transfer", "weights": "", "requirement": "", "kappa": 1.0,
         "beta": 0.5, "explore": 1, "problems": 10}


def config_of(row, **changes):
  config = composition.get_config("tiny")
  with config.unlocked():
    config.arms = "raw_bridge"
    config.probe.problems = 0
    for name in ("forward_kl", "reverse_kl"):
      config.stages[name].steps = 6 if name == row else 0
    config.stages[row].save_every = 3
    config.stages[row].allocate = BLOCK | changes
  return config.lock()


def run(config, workdir):
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    plan = recipe.run(config, workdir, tasks.get(config))
  (name,) = plan.nodes
  return epath.Path(workdir) / name


@pytest.mark.medium
@pytest.mark.parametrize("row", ["forward_kl", "reverse_kl"])
def test_a_killed_decision_repeats(tmp_path, row, monkeypatch):
  whole = run(config_of(row), tmp_path / "whole")
  decisions = metrics.read(whole, "allocate")
  assert [decision["step"] for decision in decisions] == [0, 2, 4]
  assert decisions[0]["mean"] is None and decisions[2]["spread"] is not None

  # After step 3 was saved, in the decision at step 4.
  decide = allocate.decide

  def killed(history, step, *args):
    if step == 4:
      raise SystemExit(137)
    return decide(history, step, *args)

  monkeypatch.setattr(allocate, "decide", killed)
  with pytest.raises(SystemExit):
    run(config_of(row), tmp_path / "killed")
  monkeypatch.setattr(allocate, "decide", decide)
  again = run(config_of(row), tmp_path / "killed")
  assert metrics.read(again, "allocate") == decisions
  for name in ("ledger", "samples"):
    assert metrics.read(again, name) == metrics.read(whole, name)
  assert ((again / "hf" / "model.safetensors").read_bytes()
          == (whole / "hf" / "model.safetensors").read_bytes())


@pytest.mark.medium
def test_problems_follow_the_decisions_and_the_probe_is_charged_apart(tmp_path):
  config = config_of("forward_kl")
  folder = run(config, tmp_path)
  task = tasks.get(config)
  rows = task.source("labelled")
  family_of = {rows[i]["id"]: task.family(rows[i]) for i in range(len(rows))}
  entries = metrics.read(folder, "ledger")
  decisions = {row["step"]: row for row in metrics.read(folder, "allocate")}
  for entry in entries:
    shares = decisions[entry["step"] // 2 * 2]["shares"]
    found = [family_of[i] for i in entry["prompts"]]
    want = allocate.counts(np.array([shares[name] for name in sorted(shares)]), 4)
    assert [found.count(name) for name in sorted(shares)] == want
  # Ten responses of the teacher once; the learner reads them at each decision.
  assert [entry.get("allocate", {}).get("sequences") for entry in entries] == [
      10, None, 0, None, 0, None]
  totals = files.read_json(folder / "ledger.json")
  assert totals["allocate"]["sequences"] == 10 and totals["label_uses"] == 0
  assert totals["tokens_sampled"] - totals["allocate"]["tokens_sampled"] == (
      totals["tokens_trained"] + totals["tokens_discarded"])


@pytest.mark.medium
def test_uniform_shares_need_no_probe(tmp_path):
  folder = run(config_of("reverse_kl", rule="uniform"), tmp_path)
  assert set(metrics.read(folder, "allocate")[0]) == {"step", "shares"}
  assert "allocate" not in files.read_json(folder / "ledger.json")


def test_a_run_is_refused_before_anything_is_written(tmp_path):
  config = config_of("forward_kl", requirement="left=0.5,middle=0.5")
  with pytest.raises(InputError, match=r"config.stages.forward_kl.allocate.requirement names the "
                                       "family 'middle'"):
    run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  config = config_of("forward_kl", requirement="left=0.5")
  with pytest.raises(InputError, match="sum to one"):
    run(config, tmp_path / "run")


def test_shares_rename_their_stage_alone():
  def names(config):
    return set(recipe.plan(config, tasks.get(config)).nodes)

  plain = config_of("forward_kl")
  with plain.unlocked():
    del plain.stages.forward_kl.allocate
  assert names(plain) != names(config_of("forward_kl"))
  other = config_of("forward_kl")
  with other.unlocked():
    other.stages.reverse_kl.allocate = BLOCK
  assert names(other) == names(config_of("forward_kl"))
