"""The walk over a plan: trains its nodes, probes the weights around them, scores every arm.

A finished folder is skipped and an unfinished one resumed, so a second walk continues where the
first one ended. A folder is finished when it has a manifest, which is written last.
"""

from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from s2d_jax import (
  budget,
  checkpoint,
  checksums,
  evals,
  files,
  hosts,
  ladder,
  manifest,
  metrics,
  scoring,
  stage,
  stops,
)
from s2d_jax.errors import InputError
from s2d_jax.planning import Node, Plan

# Keys that name no result: arms that differ in them alone are one in the report.
NO_RESULT = ("arms", "seed", "mesh", "compilation_cache", "profile", "offload")


def check_folders(plan: Plan, workdir: epath.PathLike) -> None:
  """Compares every folder of the plan that exists, and every score, with its manifest.

  Weights are compared where a stage loads them.

  Raises:
    InputError: a manifest cannot be read, or does not match its folder's name, or a file differs
      from its checksum.
  """
  workdir = epath.Path(workdir)
  # The plan has no nodes for scores and probes, so all that exist are checked.
  existing = [path.name for path in checksums.entries(workdir)]
  for name in (*plan.nodes, *(n for n in existing if n.startswith(("eval-", "probe-")))):
    if manifest.read(workdir / name) is not None:
      manifest.check_files(workdir / name, weights=False)


def run(plan: Plan, workdir: epath.PathLike) -> None:
  """Trains unfinished nodes, checks budgets and labels, scores every line of every arm's table.

  Raises:
    InputError: ledgers of finished stages break a budget or a label split.
    SystemExit: code `hosts.RETRY` after a stop signal, with everything saved.
  """
  workdir = epath.Path(workdir)
  # A stop is acted on between folders, where all that was done is already on disk. An array that
  # moved between host and devices unnoticed could cost more than a step.
  with stops.requests() as stop, jax.transfer_guard("disallow"):
    probes = {name: _train(plan, node, workdir, stop) for name, node in plan.nodes.items()}
    # The configured budgets are equal; the ledgers show what was in fact spent.
    budget.check_equal(budget.spent(plan, workdir), plan.compared,
                       "by their ledgers: delete the stages of one and run it again")
    for arm in plan.arms:
      budget.check_labels(plan, arm, workdir)
      _score(plan, arm, probes, workdir, stop)
    hosts.barrier("arms")


def _train(plan: Plan, node: Node, workdir: epath.Path, stop: Callable[[], bool]) -> dict:
  """Trains a node where it is not finished; returns the names of its probes' folders."""
  before = _probe(plan, node, node.learner, workdir)
  _warn(plan, node, before, workdir)
  if manifest.read(workdir / node.name) is not None:
    # A kill may have come after the manifest was written and before the steps were deleted.
    checkpoint.drop_steps(workdir / node.name)
  else:
    _say_if_done(workdir / node.name)
    stage.train_node(plan, node, workdir, stop)
  # Only a distilled student is compared with its teacher again afterwards.
  after = None if node.stage.reward else _probe(plan, node, node.name, workdir)
  _exit_if_stopped(stop)
  return {"stage": node.name, "before": before, "after": after}


def _say_if_done(folder: epath.Path) -> None:
  """Says where a stage is trained again although it was done, as its manifest is gone."""
  recorded = folder / checksums.FOLDER / checksums.FINISHED
  if recorded.exists():
    metrics.announce(f"{folder / manifest.NAME} is missing, though {recorded} is there: it was "
                     "deleted, or the process ended between both. The stage is trained again, from "
                     "its newest checkpoint if it has one.")


def _score(plan: Plan, arm: str, probes: dict, workdir: epath.Path,
           stop: Callable[[], bool]) -> None:
  """Scores the weights in an arm's part of the table, and records the arm as done.

  Raises:
    InputError: its record is there and damaged.
  """
  rows = []
  for label, role in plan.scored[arm].items():
    for name, evaluation in plan.config.evals.items():
      if evals.every(evaluation):
        continue  # it ran between the steps
      rows.append({"label": label, "evaluation": name, "stages": plan.ancestors(role),
                   "score": scoring.evaluate(plan, role, name, workdir)})
      _exit_if_stopped(stop)
  entry = {"arm": arm, "seed": plan.config.seed, "rows": rows,
           "config": {k: v for k, v in plan.config.to_dict().items() if k not in NO_RESULT},
           "probes": [probes[name] for name in plan.arms[arm] if probes[name]["before"]]}
  path = workdir / "arms" / f"{manifest.name(arm, entry)}.json"
  # An existing entry stays, with its number: the report orders arms by it.
  if path.exists():
    remedy = "delete it, and the same command writes it again"
    # Those of earlier versions have no seal, and some no number. In another one that has lost its
    # seal there is a key that no version wrote.
    if set(files.read_json(path, remedy)) - {"number"} != set(entry):
      raise InputError(f"{path} is damaged, or was edited: {remedy}.")
  elif hosts.leader():
    number = len(files.finished_files(path.parent))
    files.write_json(path, files.plain(entry | {"number": number}), sealed=True)


def _exit_if_stopped(stop: Callable[[], bool]) -> None:
  # The exit code tells a launcher that the same command continues.
  if stop():
    raise SystemExit(hosts.RETRY)


def _probe(plan: Plan, node: Node, role: str, workdir: epath.Path) -> str | None:
  """The folder of a probe of a role's weights; with the node's teacher where it distils one."""
  if not node.stage.source.probed:
    return None
  return scoring.probe(plan, role, probe_guide(node), workdir)


def probe_guide(node: Node) -> str | None:
  """The role that a node's learner is compared with in its probes, or None."""
  # Under reward the guide is the learner's own start, whose divergence from it is 0.
  return None if node.stage.reward else node.guide or node.actor


def _warn(plan: Plan, node: Node, before: str | None, workdir: epath.Path) -> None:
  """Warns before a stage begins where the method's preconditions do not hold."""
  if before is None:
    return
  found = files.read_json(workdir / before / "result.json")
  # A group whose rewards are all equal has advantage 0, and so no gradient.
  mixed = None
  if node.stage.reward:
    group = node.hp.sampling.samples_per_prompt
    mixed = float(ladder.mixed_P(found["student"], group).mean())
  guide = node.guide or node.actor
  gain = None
  if "teacher" in found and guide in plan.nodes:
    # Distilling a teacher that reward has not improved is the failure the recipe is to prevent.
    untrained = scoring.probe(plan, "teacher", None, workdir)
    rates = [found["teacher"]["pass_rate"],
             files.read_json(workdir / untrained / "result.json")["student"]["pass_rate"]]
    gain = (rates[0] - rates[1], f"{100 * (rates[0] - rates[1]):.1f}")
  teacher_trained = not ("teacher" in found and guide == "teacher")
  for sentence in ladder.warnings(mixed, teacher_trained, gain):
    logging.warning("%s: %s.", node.name, sentence)
