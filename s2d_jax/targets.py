"""A section of the report: the spending of each arm until its student first reaches a score.

The scores are those of an evaluation between steps, such as "validation/avg@1". Between two of
them costs and scores are interpolated along a line, and nothing is extrapolated: a score that no
evaluation reaches is "not reached".
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from s2d_jax import files, metrics
from s2d_jax.errors import InputError
from s2d_jax.ladder import Group, Run

# The student's steps and training sequences; then everything that the arm has spent, its teacher's
# stages included.
COSTS = ("steps", "sequences", "tokens", "flops", "labels_distinct", "label_uses", "seconds")
_HEADS = ("steps", "sequences", "tokens sampled", "GFLOPs", "labels: distinct", "uses", "seconds")
_UNITS = np.array([1, 1, 1, 1e9, 1, 1, 1])


class Curve(NamedTuple):
  """The scores of an arm's student between steps, and the costs so far."""
  score_N: np.ndarray
  cost_NC: np.ndarray   # of each score, in the order of COSTS


def curve(run: Run, name: str) -> Curve | None:
  """The curve of one run, over all stages that trained its student; None without such scores.

  Args:
    name: of the score, such as "validation/avg@1".
  """
  spent = np.zeros(len(COSTS))
  labels: set[int] = set()
  scores = []
  costs = []
  for folder in run.stages:
    learns = _trains_student(folder)
    score_of = {row["step"]: row[name] for row in metrics.read(folder, "metrics") if name in row}
    # The first entry of `timing` is the stage's start.
    seconds = _by_step(metrics.read(folder, "timing"))
    for entry in metrics.read(folder, "ledger"):
      step = entry["step"]
      # Scored before the step is made.
      if learns and step in score_of:
        scores.append(score_of[step])
        costs.append([*spent[:4], len(labels), *spent[5:]])
      labels |= set(entry["labels"])
      spent += [learns, learns * entry["sequences"],
                entry["tokens_sampled"] + entry["tokens_reused"],
                entry["flops"] + entry["flops_reused"], 0, entry["label_uses"],
                seconds.get(step, 0.0)]
  return Curve(np.array(scores), np.array(costs)) if scores else None


def _names(groups: Sequence[Group]) -> list[str]:
  """The names of all scores between the steps of a student's stage, in alphabetical order."""
  found = set()
  for group in groups:
    for run in group.runs.values():
      for folder in filter(_trains_student, run.stages):
        # No other metric's name has a slash: an evaluation's begins with its key in config.evals.
        found |= {name for row in metrics.read(folder, "metrics") for name in row if "/" in name}
  return sorted(found)


def _trains_student(folder: epath.Path) -> bool:
  return files.read_json(folder / "manifest.json")["inputs"]["row"]["learner"] == "student"


def _by_step(entries: Sequence[Mapping[str, Any]]) -> dict[int, float]:
  """Seconds of each step, those of starts with the step that they lead to."""
  found: dict[int, float] = {}
  for entry in entries:
    # An evaluation that only watches the run costs an arm nothing.
    cost = entry["seconds"] - entry.get("evaluate_seconds", 0.0)
    found[entry["step"]] = found.get(entry["step"], 0.0) + cost
  return found


def cost(found: Curve, target: float) -> np.ndarray | None:
  """The costs at which a curve first reaches `target`, interpolated; None where it never does."""
  reached = np.flatnonzero(found.score_N >= target)
  if not len(reached):
    return None
  n = reached[0]
  if n == 0:
    return found.cost_NC[0]
  low, high = found.score_N[n - 1 : n + 1]
  share = (target - low) / (high - low)
  return found.cost_NC[n - 1] + share * (found.cost_NC[n] - found.cost_NC[n - 1])


def parse(text: str) -> tuple[str, float]:
  """("validation/avg@1", 0.6) of "validation/avg@1=0.6".

  Raises:
    InputError: it is not a name and a rate.
  """
  name, equals, value = text.partition("=")
  try:
    target = float(value)
  except ValueError:
    target = -1.0
  if not equals or "/" not in name or not 0 < target <= 1:
    raise InputError(f"--target is {text!r}: write a score between steps and a rate above 0, up to "
                     "1, as in validation/avg@1=0.6.")
  return name, target


def section(groups: Sequence[Group], name: str, target: float) -> list[str]:
  """The table of one target, as lines; costs are means over the seeds.

  Raises:
    InputError: no run has such scores.
  """
  curves = [[curve(group.runs[seed], name) for seed in sorted(group.runs)] for group in groups]
  if not any(found for of_group in curves for found in of_group):
    found = _names(groups)
    remedy = (f"choose it from {', '.join(found)}" if found else
              "give config.evals an entry with when='every 2', as docs/losses.md shows")
    raise InputError(f"no stage of these runs has the score {name}: {remedy}.")
  lines = []
  for group, found in zip(groups, curves, strict=True):
    if not all(found):  # a row without a trained student, such as a base model's
      continue
    costs = [cost(one, target) for one in found]
    reached = [one for one in costs if one is not None]
    cells = ["–"] * len(COSTS)
    if len(reached) == len(costs):
      cells = [f"{value:,.0f}" for value in np.mean(reached, axis=0) / _UNITS]
    said = "all" if len(reached) == len(costs) else f"{len(reached)} of {len(costs)}"
    best = max(one.score_N.max() for one in found)
    lines.append(f"| {group.name} | {group.seeds} | {said if reached else 'not reached'} | "
                 f"{100 * best:.1f} | " + " | ".join(cells) + " |")
  head = ["arm", "seeds", "reached by", "best", *_HEADS]
  return [f"### Cost until {name} is {100 * target:.0f} %", "",
          "Of the student's first crossing, interpolated between evaluations: a mean over seeds, "
          "and – where a seed never reached it. *Best* is the highest score of any seed. *Steps* "
          "and *sequences* are the student's. The other columns count everything so far, with the "
          "teacher's stages and with searches. Seconds are without evaluations.", "",
          "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]
