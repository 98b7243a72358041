"""Run folders -> the report: the ladder, paired differences with verdicts, sweeps, conditions.

  s2d-jax report runs/arithmetic [runs/another ...]

Reads only what the stages left behind and writes report.md and report.png (report-2.png for a
second way of scoring) into the first folder. A file choice.md there (how hyperparameters were
chosen) becomes the report's last section.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from s2d_jax import (
  command,
  figures,
  files,
  intervals,
  ladder,
  metrics,
  option_costs,
  paper,
  probe_table,
  stats,
  targets,
  timing,
)
from s2d_jax.ladder import Contrast, Group, Run

# The orders the paper reports, the first arm above the second, and in how many of six comparisons
# they hold: its RL'd 8B and 14B teachers on three benchmarks (arXiv 2605.12483v1, tables 2-6).
PUBLISHED = {
    ("bridge", "cold_grpo"): 6, ("bridge", "raw_bridge"): 6, ("cold_grpo", "raw_bridge"): 6,
    ("bridge", "sft_teacher_bridge"): 6, ("sft_teacher_bridge", "raw_bridge"): 6,
    ("sft_teacher_bridge", "cold_grpo"): 6,
    ("bridge", "opd_only"): 6, ("bridge", "sft_only"): 6, ("opd_only", "sft_only"): 5,
    ("bridge", "half_bridge"): 6, ("half_bridge_grpo_2h", "cold_grpo"): 6,
    ("half_bridge_grpo_2h", "half_bridge"): 6, ("half_bridge_grpo_2h", "half_bridge_replay_1h"): 6,
    ("half_bridge_grpo_2h", "half_opd_grpo_2h"): 5, ("half_bridge_grpo_2h", "half_sft_grpo_2h"): 6,
    ("half_opd_grpo_2h", "half_sft_grpo_2h"): 5, ("bridge", "half_bridge_grpo_2h"): 5}
# Controls it has not, and one on which it is split: no order is published.
CONTROLS = (("bridge", "fkl_only"), ("bridge", "weighted_fkl"), ("fkl_only", "sft_only"),
            ("fkl_only", "weighted_fkl"), ("cold_grpo", "cold_grpo_2h"),
            ("half_bridge_grpo_2h", "cold_grpo_2h"), ("half_bridge_replay_1h", "half_bridge"))


def markdown(rows: Sequence[Run], choice: str = "", command: str = "",
             target: tuple[str, float] | None = None) -> str:
  """The whole report as Markdown: a section for each way of scoring, never two in one table."""
  lines = ["# Sparse to dense: what each arm scores and spends", ""]
  if command:
    lines += [f"Written by `{command.replace('`', '')}`.", ""]
  shown: list[list[str]] = []
  for index, (settings, part) in enumerate(ladder.tables(rows)):
    groups = ladder.groups(part)
    lines += [scored_as(settings, part), "", *table(groups), "", *differences(groups), ""]
    # Another benchmark of the same runs has the same conditions: they are shown once.
    reached = targets.section(groups, *target) if target else []
    for section in (option_costs.section(groups, escaped), sweeps(groups), conditions(groups),
                    probe_table.section(groups, escaped),
                    starts(groups), reached, seconds(groups), warnings(groups)):
      if section and section not in shown:
        shown.append(section)
        lines += [*section, ""]
    lines += [revisions(part), "", f"![scores and curves]({picture(index)})", ""]
  lines += paper.section(rows)
  if choice:
    lines += ["## How the hyperparameters were chosen", "", choice.strip(), ""]
  return "\n".join(lines)


def scored_as(settings: dict[str, Any], rows: Sequence[Run]) -> str:
  """The paragraph above a table: the benchmark, and the meaning of intervals and spending."""
  evaluation = settings["evaluation"]
  sampling = evaluation["sampling"]
  problems = len(rows[0].samples()["sampled"].correct_PG)
  return (f"Split {escaped(evaluation['split'])}, {problems} problems "
          f"({settings['problems'][:8]}), {sampling['samples_per_prompt']} samples each "
          # A key at its neutral value is not among the settings that name a score.
          f"at temperature {sampling.get('temperature', 1.0)} in {settings['dtype']}; "
          f"percent, with {100 * evaluation['level']:.0f} % intervals: of one training seed over "
          "problems and samples (nested bootstrap), of several over seeds too (Student's t on "
          "their part). "
          "Spending is the mean over seeds; a stage or sample that arms share counts in each, "
          "device-seconds only where they were used. docs/run.md explains every column, under "
          "\"The report\".")


def picture(index: int) -> str:
  """The file of a section's figure: report.png, report-2.png, ..."""
  return f"report-{index + 1}.png" if index else "report.png"


def escaped(text: Any) -> str:
  """Text from a config or a table of arms, so that Markdown shows it and does nothing with it."""
  # A name may come from a user's table of arms: it must not end a cell or become HTML.
  return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(str(text).split()))


def revisions(rows: Iterable[Run]) -> str:
  """The revisions of the code behind a table, "+" for a changed checkout; several are warned of."""
  found = sorted(set().union(*(run.revisions for run in rows)))
  names = ", ".join(revision[:12] + "+" * revision.endswith("+") for revision in found)
  if len(found) > 1:
    return f"Code: {names}. **This table mixes revisions.**"
  return f"Code: {names}."


def table(groups: Sequence[Group]) -> list[str]:
  """The table of scores and spending, as lines."""
  # The union over rows: a run that was scored before a statistic joined the table has it as well.
  names = stats.ordered({name for group in groups for run in group.runs.values()
                         for name in run.result["scores"]})
  head = ["arm", "seeds", *(stats.statistic(name)[0].label or name for name in names),
          "labels: distinct", "uses", "tokens sampled", "trained", "by the guide", "TFLOPs",
          "device-s", "lost"]
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for group in groups:
    counts = [f"{group.mean(name):,.0f}" for name in (
        "labels_distinct", "label_uses", "tokens_sampled", "tokens_trained", "tokens_guide")]
    scores = [_cell(group.score(name), stats.statistic(name)[0].unit) for name in names]
    cells = [escaped(group.name), group.seeds, *scores, *counts,
             f"{group.mean('flops') / 1e12:.1f}",
             f"{group.mean('device_seconds_used'):.0f}", f"{group.mean('device_seconds_lost'):.0f}"]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _cell(score: intervals.Interval | None, unit: str) -> str:
  """A score's cell in the table; a dash where the samples of a run do not give it."""
  return "–" if score is None else interval(score, unit)


def interval(triple: Iterable[float], unit: str = "rate") -> str:
  """[0.5, 0.45, 0.55] as "50.0 [45.0, 55.0]": a rate in percent, tokens as they are."""
  scale = 100 if unit == "rate" else 1
  value, low, high = (scale * x for x in triple)
  return with_minus(f"{value:z.1f} [{low:z.1f}, {high:z.1f}]")


def with_minus(number: str) -> str:
  """A number's text with the minus sign of the names of differences, in place of a hyphen."""
  return number.replace("-", "−")


def differences(groups: Sequence[Group]) -> list[str]:
  """Paired differences of avg@k on the same problems and seeds, with verdicts, as lines."""
  # Published orders first, then controls: a reader looks for the paper's claims.
  lines = []
  for above, below in (*PUBLISHED, *CONTROLS):
    for a in (g for g in groups if g.label == above):
      for b in (g for g in groups if g.label == below):
        # Only arms of one config are compared: runs of a sweep differ by more than the arm.
        found = ladder.compare(a, b) if a.contexts() & b.contexts() else None
        if found is not None:
          pair = [group.of(found.seeds) for group in (a, b)]
          labels = " : ".join(f"{g.mean('labels_distinct'):,.0f}" for g in pair)
          updates = " : ".join(f"{g.mean('dense'):.0f}+{g.mean('rewarded'):.0f}" for g in pair)
          least = f"{100 * found.resolvable:.1f}" if len(found.seeds) > 1 else "–"
          lines.append(f"| {escaped(a.name)} − {escaped(b.name)} | {labels} | {updates} | "
                       f"{found.signs} | {interval(found.difference)} | {least} | "
                       f"{verdict(found, PUBLISHED.get((above, below)))} |")
  if not lines:
    return ["No two arms of the paper's contrasts are here."]
  return ["Paired differences of avg@k on the same problems and seeds. The last column compares "
          "with the paper, where the first arm is above: in brackets, in how many of the paper's "
          "six comparisons (two RL'd teachers, three benchmarks). Each interval holds for one row: "
          "of twenty true zeros one is expected to look resolved. The interval of one seed says "
          "nothing of other seeds, so it has no verdict. *Labels* are distinct ones, with the "
          "teacher's. *Updates* are the student's, under a teacher + under reward; where both arms "
          "have a part, it is equal. *Resolves* is the true difference that these seeds, problems "
          "and samples would find four times in five.", "",
          "| difference | labels | updates | sign of each seed | points | resolves | the paper's "
          "order |", "|---|---|---|---|---|---|---|", *lines]


def verdict(contrast: Contrast, published: int | None) -> str:
  """A Contrast against the paper's order, which holds in `published` of six, or None."""
  if contrast.difference.low > 0:
    order = "above"
  elif contrast.difference.high < 0:
    order = "below"
  else:
    order = "not resolved"
  of_six = "" if published is None else f" ({published}/6)"
  # The interval of one seed says nothing of other seeds, so it gets no verdict on the order.
  if len(contrast.seeds) == 1:
    return f"{order} in this seed{of_six}"
  if published is None:
    return f"none published: {order}"
  # The paper has the first arm above.
  return {"above": "agrees", "below": "disagrees"}.get(order, order) + of_six


def sweeps(groups: Sequence[Group]) -> list[str]:
  """The curves of `SWEPT`, as tables."""
  lines = []
  titles = {"labels": ("What labels buy", "share of the labels"),
            "division": ("How a bridge's updates are divided", "share in the warmup")}
  for kind, keys in ladder.SWEPT.items():
    found = ladder.curves(groups, keys)
    if found:
      title, axis = titles[kind]
      lines += [f"### {title}", "", f"| arm | {axis} | labels: distinct | avg@k | seeds |",
                "|---|---|---|---|---|"]
      lines += [f"| {escaped(label)} | {100 * x:.0f} % | {group.mean('labels_distinct'):,.0f} | "
                f"{interval(group.score(group.headline))} | {group.seeds} |"
                for label, points in found.items() for x, group in points]
      lines.append("")
  return lines


PROBED = (("KL(T‖S)", "forward_kl", "{:.3f}"), ("KL(S‖T)", "reverse_kl", "{:.3f}"),
          ("top-k overlap", "overlap", "{:.3f}"), ("same first token", "same_first", "{:.3f}"),
          ("student's mass", "student_mass", "{:.3f}"),
          ("teacher's mass", "teacher_mass", "{:.3f}"),
          ("student's entropy", "student_entropy", "{:.3f}"),
          ("teacher's entropy", "teacher_entropy", "{:.3f}"),
          ("worst 1 %, forward", "forward_kl_gradient_worst", "{:.2f}"),
          ("worst 1 %, reverse", "reverse_kl_gradient_worst", "{:.2f}"),
          ("tokens", "response_length", "{:.1f}"), ("solved", "pass_rate", "{:.3f}"))


def conditions(groups: Sequence[Group]) -> list[str]:
  """Condition C2 before and after each stage that distils, means over seeds, as lines."""
  lines = []
  shown = set()
  for group, probe, index, when, text in probe_table.samples(groups):
    found = [p[when][text] for p in probe]
    values = [fmt.format(np.mean([f[key] for f in found])) for _, key, fmt in PROBED]
    stage = probe_table.stage_name(probe)
    key = (stage, index, when, text, *values)
    if key not in shown:  # arms that share the stage show it once
      shown.add(key)
      lines.append(f"| {escaped(group.name)} | {stage} | {when} | {text}'s | "
                   + " | ".join(values) + " |")
  if not lines:
    return []
  return ["### Condition C2: how near student and teacher are", "",
          "docs/arms.md defines the conditions C1 and C2. On the samples of each for problems of "
          "the probe's split, whose labels no arm buys and which stand for the student's prompts; "
          "nats a token, shares, tokens. *Overlap* is the share of one's k likeliest tokens that "
          "are among the other's; *mass* is what a model puts on those of both; *worst 1 %* is "
          "the share of the summed lengths of the per-token gradients of the two divergences (in "
          "the student's logits) that the worst hundredth of "
          "the tokens have, whatever the stage's own loss. Condition C1, the teachers' own scores, "
          "is in the ladder: the rows of `untrained`. Where arms share a stage it is shown once.",
          "",
          "| arm | stage | when | text | " + " | ".join(name for name, *_ in PROBED) + " |",
          "|---" * (len(PROBED) + 4) + "|", *lines]


def starts(groups: Sequence[Group]) -> list[str]:
  """Pass rate and mixed groups at the start of each GRPO stage, means over seeds, as lines."""
  lines = []
  shown = set()
  for group in groups:
    for probe in group.probes():
      found = [p["before"]["student"] for p in probe]
      # Only a stage under reward has no probe after it.
      if probe[0]["after"] is None and probe[0]["stage"] not in shown:
        shown.add(probe[0]["stage"])
        solved, entropy, tokens = (np.mean([f[key] for f in found]) for key in (
            "pass_rate", "entropy", "response_length"))
        mixed_SP = _mixed_SP(probe)
        lines.append(f"| {escaped(group.name)} | {probe_table.stage_name(probe)} | "
                     f"{probe[0]['group'] or '–'} | {solved:.3f} | {mixed_SP.mean():.3f} | "
                     f"{np.mean(mixed_SP > 0.5):.2f} | {entropy:.3f} | {tokens:.1f} |")
  if not lines:
    return []
  return ["### What GRPO begins with", "",
          "A group is the *g* samples of one problem in a step (the stage's "
          "`sampling.samples_per_prompt`), and it teaches only where some are right and some "
          "wrong. *Mixed* is the chance of that, 1 − p^g − (1 − p)^g for the share p of the "
          "problem's samples that the probe found right, averaged over the probe's problems; "
          "*above ½* is the share of the problems for which it is.", "",
          "| arm | stage | g | solved | mixed | above ½ | entropy, nats | tokens |",
          "|---|---|---|---|---|---|---|---|", *lines]


def _mixed_SP(probe: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """`ladder.mixed_P` of each seed's learner, at the start of a stage under reward."""
  return np.stack([ladder.mixed_P(p["before"]["student"], p["group"]) for p in probe])


def seconds(groups: Sequence[Group]) -> list[str]:
  """Wall seconds of each stage by phase, with goodput and MFU, means over seeds, as lines."""
  lines = []
  shown = set()
  for group in groups:
    runs = [group.runs[seed] for seed in sorted(group.runs)]
    for folders in zip(*(run.stages for run in runs), strict=True):
      used = [found for folder in folders if (found := timing.usage(folder)) is not None]
      # Arms that share a stage show it once; a stage of an earlier version has no such log.
      if folders in shown or not used:
        continue
      shown.add(folders)
      parts = [[u.start, u.compile, u.saved, *u.phases.values(), u.lost] for u in used]
      # JAX counts a program that was slower to read than to compile as saved seconds below zero.
      cells = [f"{x:z.1f}" for x in np.mean(parts, axis=0)]
      mfu = "–" if used[0].mfu is None else f"{100 * np.mean([u.mfu for u in used]):.1f} %"
      lines.append(f"| {escaped(group.name)} | {folders[0].name.rpartition('-')[0]} | "
                   + " | ".join(cells)
                   + f" | {100 * np.mean([u.goodput for u in used]):.0f} % | {mfu} |")
  if not lines:
    return []
  head = ("arm", "stage", "start", "compile", "saved", *timing.PHASES, "lost", "goodput", "MFU")
  return ["### Where the seconds went", "",
          "Wall seconds of each stage, means over seeds. *Start* is loading, restoring and "
          "compiling; *compile* is XLA's part of it, threads added up, and *saved* what the "
          "persistent cache spared. *Draw* is sampling; *reward* is the host in the reward, while "
          "the device may decode other rows; *score* is the pass for old log-probabilities; *move* "
          "is between the devices' and the host's memory. "
          "*Goodput* is the share of draw, reward, score, update and host in all seconds, those "
          "lost by kills included. *MFU* is the ledger's FLOPs over those five, as a share of the "
          "devices' bfloat16 peak; – where the peak is not known.", "",
          "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]


def warnings(groups: Sequence[Group]) -> list[str]:
  """The preconditions of the method that do not hold, as lines."""
  lines = []
  untrained = next((g for g in groups if g.label == "untrained teacher"), None)
  for group in groups:
    name = escaped(group.name)
    gain = None
    if untrained is not None and group.label.startswith("teacher after"):
      found = ladder.compare(group, untrained)
      gain = found and (found.difference.estimate, interval(found.difference))
    shaped = not group.distilling() or any(run.shaped for run in group.runs.values())
    lines += [f"- {name}: {sentence}."
              for sentence in ladder.warnings(teacher_trained=shaped, teacher_gain=gain)]
    for probe in group.probes():
      if probe[0]["after"] is None:
        lines += [f"- {name}: {probe_table.stage_name(probe)} {sentence}."
                  for sentence in ladder.warnings(mixed_groups=_mixed_SP(probe).mean())]
    for run in group.runs.values():
      lines += _few_weighted(name, run)
  return ["### Warnings", "", *dict.fromkeys(lines)] if lines else []


def _few_weighted(name: str, run: Run) -> Iterator[str]:
  """Yields a line for each stage of a run whose prompt weights left most sequences out."""
  for folder in run.stages:
    share = [entry["weighted"] for entry in metrics.read(folder, "metrics") if "weighted" in entry]
    if share and np.mean(share) < ladder.FEW_WEIGHTED:
      yield (f"- {name}, seed {run.seed}: {folder.name.rpartition('-')[0]} gave "
             f"{100 * np.mean(share):.0f} % of its sequences any weight, so it learned from fewer "
             "than the arms it is compared with.")


def write(workdirs: Sequence[epath.PathLike], target: str = "") -> str:
  """Writes report.md and its figures into the first folder; returns the Markdown.

  Args:
    target: as `targets.parse` takes it, or "".
  """
  rows = ladder.read(workdirs)
  folder = epath.Path(workdirs[0])
  choice = folder / "choice.md"
  text = markdown(rows, choice.read_text() if choice.exists() else "",
                  " ".join(["s2d-jax report", *map(str, workdirs),
                            *([f"--target {target}"] if target else [])]),
                  targets.parse(target) if target else None)
  # Figures first: the Markdown names them, and is there only when they are.
  for index, (_, part) in enumerate(ladder.tables(rows)):
    with (folder / picture(index)).open("wb") as out:
      figures.figure(part, out)
  files.write(folder / "report.md", text)
  return text


def main(argv: Sequence[str]) -> None:
  """`s2d-jax report`: writes the report of work folders and prints it."""
  parser = command.Parser("report", "Writes report.md into the first folder and prints it.",
                          "s2d-jax report runs/arithmetic", "WORKDIR ... ")
  parser.add_argument("workdirs", nargs="*", metavar="WORKDIR", default=["runs/arithmetic"],
                      help="work folders of one or several seeds; runs/arithmetic if none is named")
  parser.add_argument("--target", default="", metavar="NAME=RATE",
                      help="adds the cost until a score between steps, validation/avg@1=0.6")
  args = parser.parse_args(argv)
  print(write(args.workdirs, args.target))


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
