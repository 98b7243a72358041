"""Tables of the variants of variants.py against their controls, and each study's criterion.

  python results/composition/compare.py runs/methods [runs/methods-unnormalised]

The second folder has the loss that s2d_jax refuses, under the names of the form `generalised`.
The difference of a variant and its control is paired on problems and seeds. A criterion was set
before the runs, and "not met" is a result. Reads finished runs only; a variant without one is left
out.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as distributions

from configs import composition
from results.composition import variants
from s2d_jax import files, intervals, ladder, metrics, report, sweep, targets, tasks, walk
from s2d_jax.data.composition import problems
from s2d_jax.ladder import Contrast, Group

_SCORE = "validation/avg@2"


class Study(NamedTuple):
  """How the variants of one study are compared."""
  title: str
  control: str     # the variant that the others are compared with
  criterion: str


STUDIES = {
    "search": Study("Looking ahead (EffOPD)", "plain", (
        "a search passes where the FLOPs of plain on-policy distillation until plain's last score "
        "− 1 point, divided by its own, have an interval above 1, and its score is not lower by "
        "more than 2 points. *N times fewer steps* needs an interval above 2.5 and a better score "
        "than plain distillation at its best rate.")),
    "forms": Study("Forms of the reverse KL after a warmup", "full", (
        "`generalised_4` and `intersection_4` are within 3 points of `full`; the refused form, "
        "`unnormalised_4`, loses mass and ends at least 10 points lower.")),
    "cold_forms": Study("Forms of the reverse KL without a warmup", "full_cold", (
        "`generalised_4_cold` and `intersection_4_cold` are within 3 points of `full_cold`.")),
    "shares": Study("Shares of families (ReAD)", "uniform_quarter", (
        "a rule passes where its difference to `uniform` of the same budget has an interval above "
        "0 over all problems or on \"long\", it is at most 2 points below the best fixed shares, "
        "no other family loses more than 1 point, and its probes cost at most 6 % of the stage's "
        "FLOPs.")),
    "prefixes": Study("Finishing the student's responses", "prefixes", (
        "the teacher solves fewer problems after the beginning of a student's response than alone, "
        "with an interval above 0; the drop is smaller after the warmup, and smaller again after "
        "on-policy distillation.")),
    "hints": Study("A guide that reads the answer", "untrained", (
        "none was set; the paper finds that hints which differ by problem do not help.")),
    "warmups": Study("Learning from the teacher's samples first", "opd_only", (
        "`sft_bridge` is at least 30 points above `opd_only`.")),
}


def variants_of(rows: Sequence[ladder.Run]) -> dict[str, Group]:
  """The finished runs of each variant, by its name."""
  found = {}
  groups = ladder.groups(rows)
  for name in variants.VARIANTS:
    config = sweep.expand(variants.get_config(f"variant={name}"))[0]
    # As an arm's file has it.
    context = _comparable(ladder.flat({
        key: value for key, value in files.plain(config.to_dict()).items()
        if key not in walk.NO_RESULT}))
    for group in groups:
      contexts = [_comparable(one) for one in group.contexts()]
      if context in contexts and group.label in config.arms.split(","):
        found[name] = group
  return found


def _comparable(context: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
  """A context without the folders of the base models, which depend on where the package is."""
  return frozenset(item for item in context if item[0] not in ("teacher", "student"))


def ratio(control: np.ndarray, variant: np.ndarray) -> tuple[float, float, float]:
  """Geometric mean over seeds of control / variant, and its 95 % interval by Student's t."""
  log_S = np.log(control / variant)
  half = distributions.t.ppf(0.975, len(log_S) - 1) * log_S.std(ddof=1) / np.sqrt(len(log_S))
  return tuple(np.exp([log_S.mean(), log_S.mean() - half, log_S.mean() + half]))


def stage_costs(group: Group, target_of: Mapping[int, float]) -> dict[int, np.ndarray | None]:
  """Of each seed the costs of on-policy distillation alone until its target (`targets.COSTS`)."""
  found = {}
  for seed in sorted(group.runs.keys() & target_of.keys()):
    curve = targets.curve(group.runs[seed], _SCORE)
    cost = targets.cost(curve, target_of[seed])
    # The first score is taken before the first step of the stage.
    found[seed] = None if cost is None else cost - curve.cost_NC[0]
  return found


def cost_cells(group: Group, control: Group) -> list[str]:
  """Ratios of steps and FLOPs, and label uses, until the control's last score − 1 point.

  The mean over seeds is geometric and its interval Student's: a bootstrap of three seeds covers
  too little (`intervals.over_seeds`).
  """
  target_of = {seed: targets.curve(run, _SCORE).score_N[-1] - 0.01
               for seed, run in control.runs.items()}
  costs, base = (stage_costs(one, target_of) for one in (group, control))
  reached = [seed for seed in costs if costs[seed] is not None]
  if len(reached) < len(costs) or len(costs) < 2:
    return [f"reached by {len(reached)} of {len(costs)} seeds", "–", "–"]
  cells = []
  for name in ("steps", "flops"):
    index = targets.COSTS.index(name)
    # A target that was met before the first step costs nothing, and has no ratio.
    pair = [np.array([of_seed[seed][index] for seed in costs]) for of_seed in (base, costs)]
    if min(x.min() for x in pair) <= 0:
      cells.append("at once")
    else:
      value, low, high = ratio(*pair)
      cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
  uses = targets.COSTS.index("label_uses")
  return [*cells, f"{np.mean([costs[seed][uses] for seed in costs]):,.0f}"]


def difference_cell(found: Contrast | None) -> str:
  """Points above the control, with the interval."""
  return "–" if found is None else report.interval(found.difference)


def last_values(group: Group, name: str) -> list[float]:
  """A metric of the last step of each seed's last stage, where it is logged."""
  rows = [metrics.read(run.stages[-1], "metrics")[-1] for run in group.runs.values()]
  return [row[name] for row in rows if name in row]


def control_of(name: str) -> str:
  """The variant that a variant is compared with: of the same budget, and of the same rate."""
  study = study_of(name)
  if study == "shares":
    return "uniform_" + name.rpartition("_")[2]
  for rate in ("tenth", "hundredth", "decay"):
    # A search is compared at one rate, and a plain stage with that of the world's rate.
    if name.startswith("search") and name.endswith(f"_{rate}"):
      return f"plain_{rate}"
  return STUDIES[study].control


def study_of(name: str) -> str:
  """The study of a variant."""
  return variants.VARIANTS[name.replace("unnormalised", "generalised")].study


def probe_cost(totals: Mapping[str, Any]) -> float:
  """The probes' share of a stage's FLOPs, as if no other stage had sampled any of its responses."""
  part = totals.get("allocate")
  if part is None:
    return 0.0
  return (part["flops"] + part["flops_reused"]) / (totals["flops"] + totals["flops_reused"])


def share_cells(group: Group, control: Group) -> list[str]:
  """The difference on "long", the largest loss of another family, and the cost of the probes."""
  config = composition.get_config()
  source = tasks.get(config).source(config.evals.test.split)
  family_P = np.array([problems.family(source[i]) for i in range(len(source))])
  seeds = sorted(group.runs.keys() & control.runs.keys())
  gap_SP = group.of(seeds).value_SP() - control.of(seeds).value_SP()
  gap_of = {name: gap_SP[:, family_P == name] for name in problems.FAMILIES}
  long = intervals.gap_over_seeds(gap_of.pop("long"))
  lost = min(100 * part_SP.mean() for part_SP in gap_of.values())
  totals = [files.read_json(run.stages[-1] / "ledger.json") for run in group.runs.values()]
  cost = np.mean([probe_cost(t) for t in totals])
  return [report.interval(long), f"{lost:+.1f}", f"{100 * cost:.1f} %"]


def section(study: str, found: Mapping[str, Group]) -> list[str]:
  """One study's table, as lines."""
  one = STUDIES[study]
  names = [name for name in found if study_of(name) == study]
  if one.control not in names:
    return []
  extra = {"search": ["control's steps / own", "control's FLOPs / own", "label uses until then"],
           "shares": ["on \"long\"", "largest loss of another family", "cost of probes"],
           }.get(study, ["student's mass", "response tokens"])
  head = ["variant", "seeds", "avg@16", "− control", *extra]
  control = f"`{one.control}`" if study != "shares" else "`uniform` of the same budget"
  lines = [f"## {one.title}", "", f"The control is {control}. Criterion: {one.criterion}", "",
           "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for name in names:
    group = found[name]
    if control_of(name) not in found:
      continue
    control = found[control_of(name)]
    compared = None if group is control else ladder.compare(group, control)
    if study == "shares":
      cells = share_cells(group, control)
    elif study == "search":
      cells = cost_cells(group, control)
    else:
      masses = last_values(group, "student_mass")
      lengths = last_values(group, "response_length")
      cells = [f"{np.mean(masses):.3f}" if masses else "–", f"{np.mean(lengths):.1f}"]
    lines.append("| " + " | ".join([f"`{name}`", group.seeds, report.interval(
        group.score(group.headline)), difference_cell(compared), *cells]) + " |")
  return [*lines, ""]


def main(workdir: str, unnormalised: str = "") -> None:
  """Prints Markdown."""
  rows = ladder.read([workdir])
  found = variants_of(rows)
  if unnormalised:
    found |= {name.replace("generalised", "unnormalised"): group
              for name, group in variants_of(ladder.read([unnormalised])).items()}
  for study in STUDIES:
    print("\n".join(section(study, found)))
  print(report.revisions(rows))


if __name__ == "__main__":
  main(*sys.argv[1:])
