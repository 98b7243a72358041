"""The numbers behind the tables of compare.py, and whether each criterion is met.

Every function takes the runs of a variant as a `ladder.Group`, and those of its control.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as distributions

from configs import composition
from s2d_jax import files, intervals, ladder, metrics, probe_table, targets, tasks
from s2d_jax.data.composition import problems
from s2d_jax.intervals import Interval
from s2d_jax.ladder import Group

_SCORE = "validation/avg@2"
MOST_PROBES = 0.06  # of a stage's FLOPs


class Cost(NamedTuple):
  """Costs of on-policy distillation until the control's last score − 1 point."""
  seeds: int               # all of them, and those that reached it
  reached: int
  steps: Interval | None   # the control's divided by the variant's; None where a seed has no ratio
  flops: Interval | None
  label_uses: float | None


class Shares(NamedTuple):
  """Differences by family, and the probes' part of the FLOPs."""
  long: Interval           # on the family "long"
  lost: float              # the lowest difference on another family, in points
  probes: float


class Searches(NamedTuple):
  """The searches of a variant's last stage, over all seeds."""
  taken: int           # candidates that became the weights
  tried: int           # candidates in all
  before: list[float]  # the score of the weights of each search before it, where one was taken
  first: list[float]   # and of its first candidate


class Verdict(NamedTuple):
  """Whether a criterion is met; None: not resolved, or it does not apply. `why` names the part."""
  met: bool | None
  why: str = ""


def ratio(control: np.ndarray, variant: np.ndarray) -> Interval:
  """Geometric mean over seeds of control / variant, and its 95 % interval by Student's t.

  A bootstrap of three seeds covers too little (`intervals.over_seeds`).
  """
  log_S = np.log(control / variant)
  half = distributions.t.ppf(0.975, len(log_S) - 1) * log_S.std(ddof=1) / np.sqrt(len(log_S))
  return Interval(*np.exp([log_S.mean(), log_S.mean() - half, log_S.mean() + half]))


def stage_costs(group: Group, target_of: Mapping[int, float]) -> dict[int, np.ndarray | None]:
  """Of each seed the costs of on-policy distillation alone until its target (`targets.COSTS`)."""
  found = {}
  for seed in sorted(group.runs.keys() & target_of.keys()):
    curve = targets.curve(group.runs[seed], _SCORE)
    cost = targets.cost(curve, target_of[seed])
    # The first score is taken before the first step of the stage.
    found[seed] = None if cost is None else cost - curve.cost_NC[0]
  return found


def cost(group: Group, control: Group) -> Cost:
  """The Cost of a variant, each seed with the target of its own control."""
  target_of = {seed: targets.curve(run, _SCORE).score_N[-1] - 0.01
               for seed, run in control.runs.items()}
  costs, base = (stage_costs(one, target_of) for one in (group, control))
  reached = [seed for seed in costs if costs[seed] is not None]
  if len(reached) < len(costs) or len(costs) < 2:
    return Cost(len(costs), len(reached), None, None, None)
  ratios = {}
  for name in ("steps", "flops"):
    index = targets.COSTS.index(name)
    pair = [np.array([of_seed[seed][index] for seed in costs]) for of_seed in (base, costs)]
    # A target that was met before the first step costs nothing, and has no ratio.
    ratios[name] = ratio(*pair) if min(x.min() for x in pair) > 0 else None
  uses = targets.COSTS.index("label_uses")
  return Cost(len(costs), len(reached), ratios["steps"], ratios["flops"],
              float(np.mean([costs[seed][uses] for seed in costs])))


def logged(group: Group, name: str, index: int = -1) -> list[float]:
  """A metric of one step of each seed's last stage, by default the last, where it is logged."""
  rows = [metrics.read(run.stages[-1], "metrics")[index] for run in group.runs.values()]
  return [row[name] for row in rows if name in row]


def searches(group: Group) -> Searches:
  """The Searches of a variant, from its logs."""
  rows = [row for run in group.runs.values() for row in metrics.read(run.stages[-1], "metrics")
          if "foresee_multiple" in row]
  stages = [files.read_json(run.stages[-1] / "manifest.json")["inputs"]["config"]
            for run in group.runs.values()]
  taken = tried = 0
  for row in rows:
    accepted = round(row["foresee_multiple"] / stages[0]["foresee"]["stride"])
    scored = sum(name.startswith("foresee_score_") for name in row) - 1
    taken += accepted
    # A search without scores tries a candidate more than it takes, up to their number.
    tried += scored if scored >= 0 else min(accepted + 1, stages[0]["foresee"]["candidates"])
  scores = [[row[f"foresee_score_{k}"] for row in rows if f"foresee_score_{k}" in row]
            for k in (0, 1)]
  return Searches(taken, tried, *scores)


def probe_cost(totals: Mapping[str, Any]) -> float:
  """The probes' share of a stage's FLOPs, as if no other stage had sampled any of its responses."""
  part = totals.get("allocate")
  if part is None:
    return 0.0
  return (part["flops"] + part["flops_reused"]) / (totals["flops"] + totals["flops_reused"])


@functools.cache
def families_of_test() -> np.ndarray:
  """The family of each problem of `test`, read once for all variants."""
  config = composition.get_config()
  source = tasks.get(config).source(config.evals.test.split)
  return np.array([problems.family(source[i]) for i in range(len(source))])


def family_difference(group: Group, control: Group, families: Sequence[str]) -> Interval:
  """The difference of two variants on problems of some families, over the seeds of both."""
  is_of_P = np.isin(families_of_test(), families)
  seeds = sorted(group.runs.keys() & control.runs.keys())
  gap_SP = group.of(seeds).value_SP() - control.of(seeds).value_SP()
  return intervals.difference(gap_SP[:, is_of_P], 0, ladder.DRAWS)


def shares(group: Group, control: Group) -> Shares:
  """The Shares of a variant."""
  others = [name for name in problems.FAMILIES if name != "long"]
  lost = min(100 * family_difference(group, control, [name]).estimate for name in others)
  totals = [files.read_json(run.stages[-1] / "ledger.json") for run in group.runs.values()]
  return Shares(family_difference(group, control, ["long"]), lost,
                float(np.mean([probe_cost(t) for t in totals])))


def drops(group: Group) -> list[Interval]:
  """The prefix probe's drop before a bridge, between its two stages, and after it."""
  first, second = group.distilling()
  return [probe_table.drop([one[when]["prefixes"]["drop"] for one in probe])
          for probe, when in ((first, "before"), (first, "after"), (second, "after"))]


def difference(group: Group, control: Group) -> Interval:
  """The score's difference from the control's."""
  return ladder.compare(group, control).difference


def search_verdict(group: Group, control: Group) -> Verdict:
  """Cheaper than its control with confidence, and not lower by more than 2 points."""
  found = cost(group, control)
  if found.reached == found.seeds and found.flops is None:
    return Verdict(None, "met before the first step")
  if found.flops is None or found.flops.low <= 1:
    return Verdict(False, "cost")
  return Verdict(difference(group, control).estimate >= -0.02, "score")


def form_verdict(found: Interval) -> Verdict:
  """At most 3 points below the control; an interval that holds the bound resolves nothing."""
  if found.low < -0.03 <= found.high:
    return Verdict(None, "not resolved")
  return Verdict(found.low >= -0.03)


def refused_form_verdict(group: Group, control: Group) -> Verdict:
  """The student loses mass on the support, and ends at least 10 points below the control."""
  mass = [np.mean(logged(group, "student_mass", index)) for index in (0, -1)]
  if mass[1] >= mass[0]:
    return Verdict(False, "mass")
  return Verdict(difference(group, control).estimate <= -0.1, "score")


def shares_verdict(group: Group, control: Group, fixed: Sequence[Group]) -> Verdict:
  """Above equal shares with confidence, near the best fixed shares, no family harmed, cheap."""
  found = shares(group, control)
  parts = {
      "no gain": difference(group, control).low > 0 or found.long.low > 0,
      "below fixed": all(difference(group, one).estimate >= -0.02 for one in fixed),
      "harm": found.lost >= -1, "cost": found.probes <= MOST_PROBES}
  return Verdict(all(parts.values()), ", ".join(name for name, fits in parts.items() if not fits))


def drops_verdict(group: Group) -> Verdict:
  """A drop with confidence at the start, and a smaller one after each stage."""
  start, between, end = drops(group)
  return Verdict(start.low > 0 and start.estimate > between.estimate > end.estimate)
