"""Tables of the variants of variants.py against their controls, and each study's criterion.

  python results/composition/compare.py runs/methods [runs/methods-unnormalised]

The second folder has the loss that s2d_jax refuses, under the names of the form `generalised`.
The difference of a variant and its control is paired on problems and seeds. A criterion was set
before the runs, and "not met" is a result. Reads finished runs only; a variant without one is left
out.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from results.composition import criteria, variants
from s2d_jax import files, ladder, report, sweep, walk
from s2d_jax.intervals import Interval
from s2d_jax.ladder import Group


class Study(NamedTuple):
  """How the variants of one study are compared."""
  title: str
  control: str     # the variant that the others are compared with
  criterion: str
  columns: tuple[str, ...] = ("student's mass", "response tokens")


STUDIES = {
    "search": Study("Looking ahead (EffOPD)", "plain", (
        "a search passes where the FLOPs of plain on-policy distillation until plain's last score "
        "− 1 point, divided by its own, have an interval above 1, and its score is not lower by "
        "more than 2 points. *N times fewer steps* needs an interval above 2.5 and a better score "
        "than plain distillation at its best rate."),
        ("− plain at its best rate", "control's steps / own", "control's FLOPs / own",
         "label uses until then")),
    "forms": Study("Forms of the reverse KL after a warmup", "full", (
        "`generalised_4` and `intersection_4` are at most 3 points below `full`; the refused form, "
        "`unnormalised_4`, loses mass and ends at least 10 points lower.")),
    "cold_forms": Study("Forms of the reverse KL without a warmup", "full_cold", (
        "`generalised_4_cold` and `intersection_4_cold` are at most 3 points below `full_cold`.")),
    "shares": Study("Shares of families (ReAD)", "uniform_quarter", (
        "a rule passes where its difference to `uniform` of the same budget has an interval above "
        "0 over all problems or on \"long\", it is at most 2 points below the best fixed shares, "
        "no other family loses more than 1 point, and its probes cost at most 6 % of the stage's "
        "FLOPs."), ("on \"long\"", "lowest of the other families", "cost of probes")),
    "prefixes": Study("Finishing the student's responses", "prefixes", (
        "the teacher solves fewer problems after the beginning of a student's response than alone, "
        "with an interval above 0; the drop is smaller after the warmup, and smaller again after "
        "on-policy distillation."), ("drop before", "after the warmup", "at the end")),
    "hints": Study("A guide that reads the answer", "untrained", (
        "none was set; the paper finds that hints which differ by problem do not help."),
        ("labels: distinct", "uses")),
    "warmups": Study("Learning from the teacher's samples first", "opd_only", (
        "on \"right\" and \"long\", which `opd_only` does not learn, `sft_bridge` is at least 30 "
        "points above it."), ("on \"right\" and \"long\"", "labels: distinct", "uses")),
}
_SEARCHES = ("search_reward", "search_kl")
_FORMS = ("generalised_4", "intersection_4")
_RULES = ("largest_gap", "ensemble", "transfer")
HARD = ("right", "long")  # the families that on-policy distillation alone does not learn


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
    labels = ["untrained student" if arm == "untrained" else arm for arm in config.arms.split(",")]
    for group in groups:
      contexts = [_comparable(one) for one in group.contexts()]
      if context in contexts and group.label in labels:
        found[name] = group
  return found


def _comparable(context: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
  """A context without the folders of the base models, which depend on where the package is."""
  return frozenset(item for item in context if item[0] not in ("teacher", "student"))


def study_of(name: str) -> str:
  """The study of a variant."""
  return variants.VARIANTS[name.replace("unnormalised", "generalised")].study


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


def verdict(name: str, found: Mapping[str, Group]) -> criteria.Verdict | None:
  """Whether a variant meets its study's criterion; None where the criterion is for others."""
  group, control = found[name], found[control_of(name)]
  if name.startswith(_SEARCHES):
    return criteria.search_verdict(group, control)
  if name.startswith(_FORMS):
    return criteria.form_verdict(criteria.difference(group, control))
  if name == "unnormalised_4":
    return criteria.refused_form_verdict(group, control)
  if name.startswith(_RULES):
    budget = name.rpartition("_")[2]
    fixed = [found[one] for one in found if one.startswith("fixed_") and one.endswith(budget)]
    return criteria.shares_verdict(group, control, fixed)
  if name == "sft_bridge":
    return criteria.Verdict(criteria.family_difference(group, control, HARD).estimate >= 0.3)
  return criteria.drops_verdict(group) if study_of(name) == "prefixes" else None


def _said(found: criteria.Verdict | None) -> str:
  if found is None:
    return "–"
  if found.met is None:
    return found.why
  return "met" if found.met else f"not met: {found.why}" if found.why else "not met"


def best_plain(found: Mapping[str, Group]) -> Group:
  """Plain on-policy distillation at the constant rate that scores best."""
  return max((found[name] for name in found if name.startswith("plain") and name != "plain_decay"),
             key=lambda group: group.score(group.headline)[0])


def cells(study: str, group: Group, control: Group, found: Mapping[str, Group]) -> list[str]:
  """The cells of a study's own columns."""
  if study == "search":
    best = best_plain(found)
    against = "–" if group is best else report.interval(criteria.difference(group, best))
    cost = criteria.cost(group, control)
    if cost.label_uses is None:
      return [against, f"reached by {cost.reached} of {cost.seeds} seeds", "–", "–"]
    return [against, *(_times(ratio) for ratio in (cost.steps, cost.flops)),
            f"{cost.label_uses:,.0f}"]
  if study == "shares":
    by_family = criteria.shares(group, control)
    return [report.interval(by_family.long), f"{by_family.lost:+.1f}",
            f"{100 * by_family.probes:.1f} %"]
  if study == "prefixes":
    return [report.interval(drop) for drop in criteria.drops(group)]
  if study in ("hints", "warmups"):
    labels = [f"{group.mean(name):,.0f}" for name in ("labels_distinct", "label_uses")]
    if study == "hints":
      return labels
    hard = criteria.family_difference(group, control, HARD)
    return ["–" if group is control else report.interval(hard), *labels]
  masses = criteria.logged(group, "student_mass")
  lengths = criteria.logged(group, "response_length")
  return [f"{np.mean(masses):.3f}" if masses else "–", f"{np.mean(lengths):.1f}"]


def _times(ratio: Interval | None) -> str:
  return "at once" if ratio is None else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)


def section(study: str, found: Mapping[str, Group]) -> list[str]:
  """One study's table, as lines."""
  one = STUDIES[study]
  names = [name for name in found if study_of(name) == study and control_of(name) in found]
  if not names:
    return []
  head = ["variant", "seeds", "avg@16", "− control", *one.columns, "criterion"]
  control = f"`{one.control}`" if study != "shares" else "`uniform` of the same budget"
  if study == "search":
    control += ", and for a search plain distillation at its own rate"
  lines = [f"## {one.title}", "", f"The control is {control}. Criterion: {one.criterion}", "",
           "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for name in names:
    group, control = found[name], found[control_of(name)]
    difference = "–" if group is control else report.interval(
        ladder.compare(group, control).difference)
    row = [f"`{name}`", group.seeds, report.interval(group.score(group.headline)), difference,
           *cells(study, group, control, found),
           _said(verdict(name, found))]
    lines.append("| " + " | ".join(row) + " |")
  return [*lines, ""]


def main(workdir: str, unnormalised: str = "") -> None:
  """Prints Markdown."""
  print("# Options of a stage against their controls, in the composition world\n\n"
        "Written by `python results/composition/compare.py runs/methods "
        "runs/methods-unnormalised`, of runs by `python results/composition/study.py --workdir "
        "runs/methods`. avg@16 is on the 512 problems of `test`, in percent. 95 % intervals are "
        "over seeds, problems and samples, and differences in points are paired on seeds and "
        "problems. Every criterion was set before its runs, but that of the warmups, which was "
        "corrected before they were seen: over all problems `opd_only` leaves no 30 points.\n")
  rows = ladder.read([workdir])
  found = variants_of(rows)
  if unnormalised:
    found |= {name.replace("generalised", "unnormalised"): group
              for name, group in variants_of(ladder.read([unnormalised])).items()
              if name.startswith("generalised")}
  for study in STUDIES:
    print("\n".join(section(study, found)))
  print(report.revisions(rows))


if __name__ == "__main__":
  main(*sys.argv[1:])
