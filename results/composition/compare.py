"""Tables of the variants of variants.py against their controls, and each study's criterion.

  python -m results.composition.compare runs/methods [runs/methods-unnormalised]

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
  variants: tuple[str, ...]  # what each is, a line each; a suffix such as `_tenth` has its own
  criterion: str
  limits: str      # where criterion and table are not as they were specified first
  columns: tuple[str, ...] = ("student's mass", "response tokens")


_FORM_LINES = (
    "`full`: KL(student ‖ teacher) over the whole vocabulary of 24 tokens",
    "`top_2`, `top_4`: over the student's k likeliest tokens, and all others as one outcome",
    "`intersection_2`, `intersection_4`: both models renormalised on the tokens that are in the k "
    "likeliest of both",
    "`generalised_2`, `generalised_4`: Σ p log p/q − p + q over the student's k likeliest tokens",
    "`sampled`: the policy-gradient form from the sampled token alone",
    "`unnormalised_2`, `unnormalised_4`: Σ p log p/q over the student's k likeliest tokens, the "
    "form that s2d_jax refuses (docs/losses.md)")

INTRODUCTION = (
    "# Options of a stage against their controls, in the composition world\n\n"
    "`python -m results.composition.study --workdir runs/methods` trained the variants, and "
    "`python -m results.composition.compare runs/methods runs/methods-unnormalised` printed "
    "this page.\n\n"
    "avg@16 is the mean of 16 samples of each of the 512 problems of `test`, in percent. "
    "*− control* is a variant's score less its control's, in points, on the same seeds and "
    "problems. Brackets hold 95 % intervals over seeds, problems and samples.\n\n"
    "Every criterion was set before its runs, but for one: that of the warmups first spoke of "
    "all problems, where `opd_only` leaves no 30 points to gain. It was corrected before the "
    "scores were seen. Where a criterion or a table is not as it was specified, the text before "
    "the table says so.\n\n"
    "`full_cold` and `opd_only` are one training. The world's report has this arm too, trained "
    "on two cores and not on one, and its score differs (results/README.md says by how much). "
    "So only numbers of one page are compared.")

REVISIONS = (
    "The manifests of the runs, which had each stage's revision, are no longer stored. The "
    "changelog and git say this: the variants were trained at ad67c1e, c60d6d7 and 6473718, and "
    "the teachers of seeds 0 to 2, which are the ladder's, at db54c6f. `opd_only`, which is "
    "`full_cold`, is of c60d6d7. `_hundredth`, `search_chance_tenth` and the numbers of `prefixes` "
    "are of c60d6d7 at the earliest, and `_tenfold`, `_decay`, `largest_gap` and the hints of "
    "ad67c1e. Which study has 9f4042c, and which of the three revisions the other variants have, "
    "is not known.")

STUDIES = {
    "search": Study("Looking ahead (EffOPD)", "plain", (
        "`plain`: 30 steps of on-policy distillation at the world's learning rate, 2e-3, here "
        "constant, without a search",
        "`search_reward`: with EffOPD's search, whose candidates are scored by reward; at most 5, "
        "at 2, 4, … times the last displacement",
        "`search_kl`: the candidates are scored by minus the reverse KL to the teacher",
        "`search_jump`: the first candidate is taken without a score",
        "`search_chance`: each candidate is taken with chance 3/18, as often as "
        "`search_reward_tenth` took one, without a score. `search_chance_hundredth` has 24/39, as "
        "often as `search_kl_hundredth` took one, and was not run",
        "`_third`, `_triple`, `_tenfold`, `_tenth`, `_hundredth`: the learning rate times 1/3, 3, "
        "10, 1/10 and 1/100",
        "`_decay`: the rate warms up over 5 updates, then decays to 0, as in the world's config"), (
        "let s be the control's score on `validation` after its last step, less 1 point, and F the "
        "FLOPs of on-policy distillation until a variant first reaches s. A search passes where "
        "the interval of F(control) / F(search) is above 1, and its avg@16 is at most 2 points "
        "below the control's. *N times fewer steps* may be claimed where the interval of the "
        "steps' ratio is above 2.5, and avg@16 above that of plain distillation at its best "
        "constant rate."),
        ("Every variant follows a warmup of 20 steps by forward KL, where the world's own bridge "
         "has 60. The criterion was specified with the median of the seeds' ratios and a "
         "bootstrap. Here it is their geometric mean and Student's t, because a bootstrap of three "
         "seeds covers too little. The variants `_hundredth` were added after searches at a tenth "
         "had been run. The search that passes has no random gate at its rate beside it."),
        ("− plain at its best rate", "control's steps / own", "control's FLOPs / own",
         "label uses until then", "candidates taken, of", "reward before, of the first candidate")),
    "forms": Study("Forms of the reverse KL after a warmup", "full", _FORM_LINES, (
        "`generalised_4` and `intersection_4` are at most 3 points below `full`; the refused form, "
        "`unnormalised_4`, loses mass and ends at least 10 points lower."),
        ("The criterion was first written \"within 3 points\", which changes no verdict. An "
         "interval that holds the bar is *not resolved*. The bar was set for two forms; by it "
         "`top_2`, `top_4` and `generalised_2` are not resolved. The refused form could also have "
         "met the criterion by ending below its start, which is not computed.")),
    "cold_forms": Study("Forms of the reverse KL without a warmup", "full_cold", (
        "`_cold`: the loss of that name above, in 90 steps from the untrained student",), (
        "`generalised_4_cold` and `intersection_4_cold` are at most 3 points below `full_cold`."),
        "The refused form was given no criterion without a warmup, so its last column is empty."),
    "shares": Study("Shares of families (ReAD)", "uniform_quarter", (
        "`_quarter`, `_half`: a warmup of 22 or 45 steps, a quarter or a half of the 90 of "
        "`fkl_only`, with about twenty decisions",
        "`uniform`: equal shares of the five families in each step",
        "`as_drawn`: the problems as they come, without shares",
        "`largest_gap`: each step's problems are from the family with the largest gap to the "
        "teacher",
        "`ensemble`: the paper's rule, five networks that predict each action's reward, with a "
        "bonus for their spread; `ensemble_greedy`: without the bonus",
        "`transfer`: a linear model in their place; `transfer_for_long`: its reward counts the "
        "family \"long\" alone",
        "`fixed_long`: \"long\" alone; `fixed_hard`: long 0.5, right 0.25, product 0.25; "
        "`fixed_graded`: sum and left 0.1, product and right 0.2, long 0.4"), (
        "a rule passes where its difference to `uniform` of the same budget has an interval above "
        "0 over all problems or on \"long\", it is at most 2 points below the best fixed shares, "
        "no other family loses more than 1 point, and its probes cost at most 6 % of the stage's "
        "FLOPs."),
        ("A rule could also have passed by reaching the last score of `uniform` with at most 0.8 "
         "times its tokens. This was not computed, because no scores were taken between steps. Not "
         "in the table are the decisions that a rule took, the teacher's tokens, and the cost of "
         "finding the best fixed shares, which took three trainings a budget under five seeds."),
        ("− control, on \"long\"", "− control, lowest other family", "cost of probes")),
    "prefixes": Study("Finishing the student's responses", "prefixes", (
        "`prefixes`: the arm `bridge`, probed on all 256 problems of `validation`: the teacher's "
        "score alone, less its score after the beginning of a student's response",), (
        "the teacher solves fewer problems after the beginning of a student's response than alone, "
        "with an interval above 0; the drop is smaller after the warmup, and smaller again after "
        "on-policy distillation."),
        "That a drop is smaller is read from the means; no interval of their difference is taken.",
        ("drop before", "after the warmup", "at the end")),
    "hints": Study("A guide that reads the answer", "untrained", (
        "`untrained`: the base student",
        "`self_distilled`: 90 steps of on-policy distillation from its own start, which reads the "
        "problem's answer as a hint"), (
        "none was set; the paper finds that hints which differ by problem do not help."), "",
        ("labels: distinct", "uses")),
    "warmups": Study("Learning from the teacher's samples first", "opd_only", (
        "`opd_only`: 90 steps of on-policy distillation, no warmup",
        "`sft_bridge`: 60 steps of `sft` on the teacher's samples, then 30 of on-policy "
        "distillation",
        "`sft_bridge_kept`: `sft` learns from samples alone that are right, whole and without "
        "repetitions",
        "`half_sft_opd`: `sft` on one half of the labels' problems, distillation on the other"), (
        "on \"right\" and \"long\", which `opd_only` does not learn, `sft_bridge` is at least "
        "30 points above it."),
        ("The criterion is read from the mean. No interval is taken of the difference between "
         "`sft_bridge` and `sft_bridge_kept`."),
        ("− control, on \"right\" and \"long\"", "labels: distinct", "uses")),
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
      costs = [f"reached by {cost.reached} of {cost.seeds} seeds", "–", "–"]
    else:
      costs = [*(_times(ratio) for ratio in (cost.steps, cost.flops)), f"{cost.label_uses:,.0f}"]
    return [against, *costs, *_searched(criteria.searches(group))]
  if study == "shares":
    if group is control:
      return ["–"] * 3
    by_family = criteria.shares(group, control)
    return [report.interval(by_family.long), report.with_minus(f"{by_family.lost:+z.1f}"),
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


def _searched(found: criteria.Searches) -> list[str]:
  """Cells of a variant's searches: candidates taken of those tried, and their rewards."""
  if not found.tried:
    return ["–", "–"]
  # A score below 0 is minus a divergence; a candidate that is taken by chance has none.
  rewards = "–"
  if found.before and min(found.before) >= 0:
    spans = [f"{100 * min(x):.0f} to {100 * max(x):.0f}" for x in (found.before, found.first)]
    rewards = ", ".join(spans)
  return [f"{found.taken} of {found.tried}", rewards]


def _times(ratio: Interval | None) -> str:
  return "at once" if ratio is None else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)


def lead(study: str) -> list[str]:
  """The text before a study's table, as lines."""
  one = STUDIES[study]
  control = f"`{one.control}`" if study != "shares" else "`uniform` of the same budget"
  if study == "search":
    control += ", and for a search plain distillation at its own rate"
  lines = [f"## {one.title}", "", *(f"- {line}." for line in one.variants), "",
           f"The control is {control}. Criterion: {one.criterion}", ""]
  return [*lines, one.limits, ""] if one.limits else lines


def section(study: str, found: Mapping[str, Group]) -> list[str]:
  """One study's table, as lines."""
  names = [name for name in found if study_of(name) == study and control_of(name) in found]
  if not names:
    return []
  head = ["variant", "seeds", "avg@16", "− control", *STUDIES[study].columns, "criterion"]
  lines = [*lead(study), "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
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
  print(f"{INTRODUCTION}\n")
  rows = ladder.read([workdir])
  found = variants_of(rows)
  if unnormalised:
    found |= {name.replace("generalised", "unnormalised"): group
              for name, group in variants_of(ladder.read([unnormalised])).items()
              if name.startswith("generalised")}
  for study in STUDIES:
    print("\n".join(section(study, found)))
  print(f"{report.revisions(rows)}\n\n{REVISIONS}")


if __name__ == "__main__":
  main(*sys.argv[1:])
