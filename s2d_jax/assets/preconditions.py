"""Measures what the composition world promises of its base models, and adds it to their record.

  python -m s2d_jax.assets.preconditions --config=configs/composition.py --workdir=runs/bases

It samples the base models at several temperatures, then trains: the teacher by the rewards of all
labelled problems, the teacher by those of one family, and the student on the given solutions. All
scores are shares of right answers on `validation`, of every family and over all.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from s2d_jax import (
  command,
  manifest,
  objectives,
  program_cache,
  recipe,
  sharding,
  stage,
  tasks,
)
from s2d_jax.assets import measure, train_base
from s2d_jax.assets.worlds import WORLDS
from s2d_jax.chat import Chat
from s2d_jax.models import hf
from s2d_jax.planning import Stage, Task, Use

TEMPERATURES = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
# Rewards of this family alone harm the family "left", which looks alike and needs another order.
ALONE = "right"
# Samples of each problem: enough to tell a share of 1 % from one of 5 %.
_SAMPLES = 16
_STAGES = (
  *(row for row in recipe.STAGES if row.name == "teacher_grpo"),
  # The row `sft` of the config on given solutions, as a bound of the student.
  Stage("sft", "given", "student", None, objectives.NEGATIVE_LOG_LIKELIHOOD),
)


def by_family(name: str, folder: str | Path, temperature: float) -> dict[str, float]:
  """Shares of right answers of the model in a folder.

  Args:
    name: of the world; temperature: 0 takes one greedy sample of each problem.

  Returns:
    {"all": over the whole split, and the share of each family}.
  """
  world = WORLDS[name]
  correct_PG, _ = measure.sampled(world, Chat(folder), *hf.load(folder), "validation",
                                  _SAMPLES if temperature else 1, temperature, (0,))
  family_P = np.array([world.family(row) for row in world.splits()["validation"]])
  found = {family: correct_PG[family_P == family].mean() for family in sorted(set(family_P))}
  return {key: round(float(x), 4) for key, x in {"all": correct_PG.mean(), **found}.items()}


def trained(config: ConfigDict, workdir: str, task: Task, row: str) -> epath.Path:
  """Trains one row of the config from the base models, unless that is done; returns its model."""
  with config.unlocked():
    config.arms = row
    config.stages = {row: config.stages[row]}
    if row == "sft":
      hp = config.stages.sft
      # The row has several samples of each problem, and this one solution: equally many sequences.
      hp.steps *= hp.sampling.samples_per_prompt
      hp.sampling.samples_per_prompt = 1
  plan = recipe.plan(config, task, _STAGES, {row: (Use(row, "all"),)}, compared=())
  (node,) = plan.nodes.values()
  folder = epath.Path(workdir) / node.name
  if manifest.read(folder) is None:
    with jax.set_mesh(sharding.make_mesh()), program_cache.opened(config.compilation_cache):
      stage.train_node(plan, node, epath.Path(workdir), lambda: False)
  return folder / "hf"


def of_family(task: Task, family: str) -> Task:
  """The task with the labelled problems of one family alone."""
  def source(split: str) -> Sequence[dict]:
    rows = task.source(split)
    return [row for row in rows if task.family(row) == family] if split == "labelled" else rows

  return task._replace(source=source)


def measured(config: ConfigDict, workdir: str) -> dict[str, Mapping]:
  """The scores of the base models, of the two trained teachers and of the trained student."""
  task = tasks.get(config)
  def at(folder: str, temperatures: Sequence[float]) -> dict[str, dict[str, float]]:
    return {str(t): by_family(config.task, folder, t) for t in temperatures}

  copies = [ConfigDict(config.to_dict()) for _ in range(3)]
  return {
    "teacher": at(config.teacher, TEMPERATURES),
    "student": at(config.student, TEMPERATURES),
    "teacher after teacher_grpo": at(
      trained(copies[0], workdir, task, "teacher_grpo"), (0.0, 1.0)),
    f"teacher after teacher_grpo on {ALONE} alone": at(
      trained(copies[1], workdir, of_family(task, ALONE), "teacher_grpo"), (0.0, 1.0)),
    "student after sft on given solutions": at(
      trained(copies[2], workdir, task, "sft"), (0.0, 1.0)),
  }


def main(argv: Sequence[str]) -> None:
  """Measures, prints, and writes the record."""
  parser = command.config_parser("preconditions", __doc__.splitlines()[0],
                                 "python -m s2d_jax.assets.preconditions "
                                 "--config=configs/composition.py --workdir=runs/bases")
  parser.add_argument("--workdir", required=True, help="the folder of the trained models")
  config, args = command.parse_config(parser, argv)
  path = train_base.FOLDER / config.task / "record.json"
  record = json.loads(path.read_text())
  record["preconditions"] = {
    "command": "python -m s2d_jax.assets.preconditions --config=configs/composition.py "
               "--workdir=runs/bases",
    "stages": {name: config.stages[name].to_dict() for name in ("teacher_grpo", "sft")},
    "scores": measured(config, args.workdir)}
  path.write_text(json.dumps(record, indent=2) + "\n")
  print(json.dumps(record["preconditions"]["scores"], indent=2))


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
