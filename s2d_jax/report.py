"""Run folders -> the report: the ladder, paired differences with verdicts, sweeps, conditions.

  python -m s2d_jax.report runs/arithmetic [runs/another ...]

Reads only what the stages left behind and writes report.md and report.png into the first folder. A
file choice.md there (how hyperparameters were chosen) becomes the report's last section.
"""

import collections
import functools
import re
import sys

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from s2d_jax import checkpoint, manifest, metrics, stats

# The orders the paper reports (arXiv 2605.12483, tables 1-6): the first arm above the second.
PUBLISHED = (
    ("bridge", "cold_grpo"), ("bridge", "raw_bridge"), ("cold_grpo", "raw_bridge"),
    ("bridge", "sft_teacher_bridge"), ("sft_teacher_bridge", "raw_bridge"),
    ("bridge", "opd_only"), ("bridge", "sft_only"), ("opd_only", "sft_only"),
    ("half_bridge_grpo_2h", "cold_grpo"), ("half_bridge_grpo_2h", "half_bridge"),
    ("half_bridge_grpo_2h", "half_bridge_replay_1h"), ("half_bridge_grpo_2h", "half_opd_grpo_2h"),
    ("half_bridge_grpo_2h", "half_sft_grpo_2h"), ("bridge", "half_bridge_grpo_2h"))
# Controls it has not, so that no order is published.
CONTROLS = (("bridge", "fkl_only"), ("bridge", "weighted_fkl"), ("fkl_only", "sft_only"),
            ("cold_grpo", "cold_grpo_2h"), ("half_bridge_grpo_2h", "cold_grpo_2h"))
SWEPT = {"labels": ("label_share",),  # what a curve may be drawn over: the config keys it moves
         "division": ("stages.forward_kl.steps", "stages.reverse_kl.steps")}
DRAWS, LEVEL = 2000, 0.95


class Group(collections.namedtuple("Group", "label name runs")):
  """One row of the ladder: an arm as one config makes it, and its runs, one a training seed.

  label: the arm's own; name: with what sets it apart from others of that label; runs: {seed: row}.
  """

  def value_SP(self, statistic="avg"):
    """A statistic ("avg", "greedy" or "pass@k") of each seed and problem, seeds in order."""
    return np.stack([_value_P(self.runs[seed]["result"], statistic) for seed in sorted(self.runs)])

  def score(self, name):
    """The Interval of a score over problems, samples and, where there are several, seeds."""
    if len(self.runs) == 1:
      (run,) = self.runs.values()
      return run["result"]["scores"][name]
    return stats.over_seeds(self.value_SP("avg" if name.startswith("avg@") else name), LEVEL)

  def mean(self, name):
    """Mean over seeds of something spent."""
    return np.mean([run["spent"][name] for run in self.runs.values()])

  def probes(self):
    """For each probed stage, in order, its probes over the seeds."""
    return list(zip(*(self.runs[seed]["probes"] for seed in sorted(self.runs)), strict=True))

  def distilling(self):
    """`probes` of the stages that learn from a teacher: they are probed after as well."""
    return [probe for probe in self.probes() if probe[0]["after"]]

  def contexts(self):
    """The flat configs that made these runs, seeds aside, as hashable items."""
    return {items for run in self.runs.values() for items in run["contexts"]}


def _value_P(result, statistic):
  if statistic == "greedy":
    return np.asarray(result["greedy"], float)
  correct_PG = np.asarray(result["correct"])
  if statistic == "avg":
    return stats.avg_at_k(correct_PG)
  return stats.mean_pass_at_k(int(statistic.partition("@")[2]))(correct_PG)


def read(workdirs):
  """Every row of every arm under the folders, as dicts, in the order they were made.

  A row has arm, label, seed, result (scores and the matrix), stages (folders behind it), settings
  (all that determines a score but the weights and the seed), recipe (all that determines the
  weights but the seed), contexts (the configs that asked for it), probes, spent (ledgers added up)
  and revisions.

  Raises:
    ValueError: a folder without any finished arm.
  """
  rows = {}
  for workdir in map(epath.Path, workdirs):
    arms = (workdir / "arms").iterdir() if (workdir / "arms").exists() else ()
    # A kill can leave the beginning of a file behind, under another suffix.
    found = sorted((p for p in arms if p.suffix == ".json"), key=lambda p: (p.stat().mtime, p.name))
    if not found:
      raise ValueError(f"{workdir} has no finished arm: run the recipe with --workdir={workdir}.")
    for path in found:
      entry = checkpoint.read_json(path)
      for row in entry["rows"]:
        made = rows.setdefault((row["label"], entry["seed"], row["score"], *row["stages"]),
                               _row(workdir, entry, row))
        made["contexts"].add(_flat(entry["config"]))
  return list(rows.values())


def _row(workdir, entry, row):
  stages = [workdir / name for name in row["stages"]]
  manifests = [checkpoint.read_json(f / "manifest.json") for f in (*stages, workdir / row["score"])]
  inputs = [m["inputs"] for m in manifests]
  names = set(row["stages"])
  recipe = [[{k: v for k, v in i.items() if k not in ("seed", "parents")},
             {role: parent for role, parent in i.get("parents", {}).items() if parent not in names}]
            for i in inputs[:-1]]
  base = inputs[-1]["weights"] if not stages else None  # an untrained model's own
  probes = [{"stage": probe["stage"],
             **{when: probe[when] and checkpoint.read_json(workdir / probe[when] / "result.json")
                for when in ("before", "after")}}
            for probe in entry["probes"] if probe["stage"] in names]
  return {
      "arm": entry["arm"], "label": row["label"], "seed": entry["seed"], "stages": stages,
      "result": checkpoint.read_json(workdir / row["score"] / "result.json"),
      "settings": {k: v for k, v in inputs[-1].items() if k not in ("weights", "seed")},
      "recipe": manifest.digest([recipe, base]), "contexts": set(), "probes": probes,
      "spent": spent(stages), "revisions": {m["revision"] for m in manifests}}


def _flat(config, prefix=""):
  """A nested config as a frozenset of (dotted key, text of its value)."""
  items = set()
  for key, value in config.items():
    items |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {
        (f"{prefix}{key}", str(value))}
  return frozenset(items)


def groups(rows):
  """The rows of one table as Groups, in order: runs that differ in their seed alone are one.

  Of two runs of one group and seed (scored in two work folders, say), the later is kept.
  """
  kept = {}
  for row in rows:
    kept.setdefault((row["label"], row["recipe"]), {})[row["seed"]] = row
  firsts, made = {}, []
  for (label, _), runs in kept.items():
    context = min(min(run["contexts"], key=sorted) for run in runs.values())
    first = firsts.setdefault(label, context)
    apart = sorted(context - first)
    name = label + (f" ({', '.join(f'{k}={v}' for k, v in apart)})" if apart else "")
    made.append(Group(label, name, runs))
  return made


def spent(stages):
  """The ledgers of several stages added up; a label two of them used is one distinct label."""
  ledgers = [checkpoint.read_json(f / "ledger.json") for f in stages]
  names = ("label_uses", "tokens_sampled", "tokens_trained", "tokens_guide", "flops",
           "device_seconds_used", "device_seconds_lost")
  sums = {name: sum(entry[name] for entry in ledgers) for name in names}
  return {**sums, "labels_distinct": len({i for entry in ledgers for i in entry["labels"]})}


def markdown(rows, choice=""):
  """The whole report as Markdown: a section for each way of scoring, never two in one table."""
  lines = ["# Sparse to dense: what each arm scores and spends", ""]
  for settings in _distinct(row["settings"] for row in rows):
    part = [row for row in rows if row["settings"] == settings]
    how, made = settings["evaluation"], groups(part)
    lines += [f"Split {escaped(how['split'])}, {len(part[0]['result']['correct'])} problems "
              f"({settings['problems'][:8]}), {how['sampling']['samples_per_prompt']} samples each "
              f"at temperature {how['sampling']['temperature']} in {settings['dtype']}; percent, "
              f"with {100 * LEVEL:.0f} % intervals: of one training seed over problems and samples "
              "(nested bootstrap), of several over seeds too (Student's t on their part). Spending "
              "is the mean over seeds; a shared stage counts in every arm that stands on it.", "",
              *ladder(made), "", *differences(made), ""]
    for section in (sweeps(made), conditions(made), starts(made), warnings(made)):
      lines += [*section, ""] * bool(section)
    lines += [revisions(part), ""]
  lines += ["![scores and curves](report.png)", ""]
  if choice:
    lines += ["## How the hyperparameters were chosen", "", choice.strip(), ""]
  return "\n".join(lines)


def escaped(text):
  """Text from a config or a table of arms, so that Markdown shows it and does nothing with it."""
  return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(str(text).split()))


def revisions(rows):
  """Which code made the rows of one table, and whether it was one; "+" is a changed checkout."""
  seen = sorted(set().union(*(row["revisions"] for row in rows)))
  names = ", ".join(r[:12] + "+" * r.endswith("+") for r in seen)
  return f"Code: {names}." + " **This table mixes revisions.**" * (len(seen) > 1)


def _distinct(values):
  """The different ones, in the order they came."""
  found = []
  for value in values:
    if value not in found:
      found.append(value)
  return found


def ladder(made):
  """The table of scores and spending, as lines."""
  some = next(iter(made[0].runs.values()))
  names = sorted(some["result"]["scores"], key=_order)
  head = ["arm", "seeds", *names, "response tokens", "labels: distinct", "uses", "tokens sampled",
          "trained", "by the guide", "TFLOPs", "device-s", "lost"]
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for group in made:
    length = np.mean([run["result"]["response_length"] for run in group.runs.values()])
    counts = [f"{group.mean(name):,.0f}" for name in (
        "labels_distinct", "label_uses", "tokens_sampled", "tokens_trained", "tokens_guide")]
    cells = [escaped(group.name), _seeds(group), *(interval(group.score(n)) for n in names),
             f"{length:.1f}", *counts, f"{group.mean('flops') / 1e12:.1f}",
             f"{group.mean('device_seconds_used'):.0f}", f"{group.mean('device_seconds_lost'):.0f}"]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _seeds(group):
  return " ".join(map(str, sorted(group.runs)))


def _order(name):
  """greedy, then avg@k, then pass@k by k."""
  kind, _, k = name.partition("@")
  return ("greedy", "avg", "pass").index(kind), int(k or 0)


def interval(triple):
  """[0.5, 0.45, 0.55] as "50.0 [45.0, 55.0]", in percent."""
  value, low, high = (100 * x for x in triple)
  return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def compare(a, b):
  """(difference, resolvable, sign of each seed) of avg@k of two Groups, on the seeds of both.

  None where they share no seed. `resolvable` is `stats.resolvable`.
  """
  seeds = sorted(a.runs.keys() & b.runs.keys())
  if not seeds:
    return None
  pairs = [[np.array(group.runs[seed]["result"]["correct"]) for group in (a, b)] for seed in seeds]
  gap_SP = np.stack([stats.gaps(*pair, stats.avg_at_k) for pair in pairs])
  if len(seeds) == 1:
    gap = stats.paired_difference(*pairs[0], stats.avg_at_k, seeds[0], DRAWS, LEVEL)
  else:
    gap = stats.over_seeds(gap_SP, LEVEL, (-1.0, 1.0))
  signs = " ".join("+" if g > 0 else "−" if g < 0 else "0" for g in gap_SP.mean(axis=1))
  return gap, stats.resolvable(gap_SP, LEVEL), signs


def differences(made):
  """Paired differences of avg@k on the same problems and seeds, with verdicts, as lines."""
  lines = []
  for above, below in PUBLISHED + CONTROLS:
    for a in (g for g in made if g.label == above):
      for b in (g for g in made if g.label == below):
        found = compare(a, b) if a.contexts() & b.contexts() else None
        if found is None:
          continue
        gap, least, signs = found
        resolved = gap.low > 0 or gap.high < 0
        if (above, below) in PUBLISHED:
          verdict = "not resolved" if not resolved else "agrees" if gap.low > 0 else "disagrees"
        else:
          verdict = "none published: " + (
              "not resolved" if not resolved else "above" if gap.low > 0 else "below")
        lines.append(f"| {escaped(a.name)} − {escaped(b.name)} | {signs} | {interval(gap)} | "
                     f"{100 * least:.1f} | {verdict} |")
  if not lines:
    return ["No two arms of the paper's contrasts are here."]
  return ["Paired differences of avg@k on the same problems and seeds; the paper has the first arm "
          "above. Each interval stands for itself: of twenty true zeros one is expected to look "
          "resolved. *Resolves* is the smallest true difference that these seeds, problems and "
          "samples would find four times in five.", "",
          "| difference | sign of each seed | points | resolves | the paper's order |",
          "|---|---|---|---|---|", *lines]


def curves(made, keys):
  """{label: [(x, Group)]} of arms that were run with several values of `keys` and all else equal.

  x is the value of one key, or the first one's share of the sum of two.
  """
  found = {}
  for group in made:
    for context in group.contexts():
      values = dict(context)
      if all(key in values for key in keys):
        number = [float(values[key]) for key in keys]
        x = number[0] if len(keys) == 1 else number[0] / max(sum(number), 1)
        same = sum(number) if len(keys) > 1 else None
        rest = frozenset(item for item in context if item[0] not in keys)
        found.setdefault((group.label, rest, same), {})[x] = group
  return {label: sorted(points.items()) for (label, *_), points in found.items()
          if len({id(group) for group in points.values()}) > 1}


def sweeps(made):
  """The curves of `SWEPT`, as tables."""
  lines = []
  titles = {"labels": ("What labels buy", "share of the labels"),
            "division": ("How a bridge's updates are divided", "share in the warmup")}
  for kind, keys in SWEPT.items():
    found = curves(made, keys)
    if found:
      title, axis = titles[kind]
      lines += [f"### {title}", "", f"| arm | {axis} | labels: distinct | avg@k | seeds |",
                "|---|---|---|---|---|"]
      lines += [f"| {escaped(label)} | {100 * x:.0f} % | {group.mean('labels_distinct'):,.0f} | "
                f"{interval(group.score(_avg(group)))} | {_seeds(group)} |"
                for label, points in found.items() for x, group in points]
      lines.append("")
  return lines


def _avg(group):
  """The name of a group's avg@k."""
  (run, *_) = group.runs.values()
  return next(name for name in run["result"]["scores"] if name.startswith("avg@"))


PROBED = (("KL(T‖S)", "forward_kl", "{:.3f}"), ("KL(S‖T)", "reverse_kl", "{:.3f}"),
          ("top-k overlap", "overlap", "{:.3f}"), ("student's mass", "student_mass", "{:.3f}"),
          ("teacher's mass", "teacher_mass", "{:.3f}"),
          ("student's entropy", "student_entropy", "{:.3f}"),
          ("teacher's entropy", "teacher_entropy", "{:.3f}"),
          ("worst 1 %, forward", "forward_kl_gradient_worst", "{:.2f}"),
          ("worst 1 %, reverse", "reverse_kl_gradient_worst", "{:.2f}"),
          ("tokens", "response_length", "{:.1f}"), ("solved", "pass_rate", "{:.3f}"))


def conditions(made):
  """Condition C2 before and after each stage that distils, means over seeds, as lines."""
  lines, seen = [], set()
  for group in made:
    for place, probe in enumerate(group.distilling()):
      # Before a second distilling stage is after the first.
      for when in ("before", "after") if place == 0 else ("after",):
        for text in ("teacher", "student"):
          found = [p[when][text] for p in probe]
          values = [fmt.format(np.mean([f[key] for f in found])) for _, key, fmt in PROBED]
          row = probe[0]["stage"].rpartition("-")[0]
          key = (row, place, when, text, *values)
          if key not in seen:  # arms that share the stage show it once
            seen.add(key)
            lines.append(f"| {escaped(group.name)} | {row} | {when} | {text}'s | "
                         + " | ".join(values) + " |")
  if not lines:
    return []
  return ["### Condition C2: how near student and teacher are", "",
          "On the samples of each for problems of the probe's split; nats a token, shares, tokens. "
          "*Mass* is what a model puts on the tokens among the top k of both; *worst 1 %* is the "
          "share of the summed lengths of the per-token gradients (in the student's logits) that "
          "the worst hundredth of the tokens have. Condition C1, the teachers' own scores, is in "
          "the ladder: the rows of `untrained`. Where arms share a stage it is shown once.", "",
          "| arm | stage | when | text | " + " | ".join(name for name, *_ in PROBED) + " |",
          "|---" * (len(PROBED) + 4) + "|", *lines]


def starts(made):
  """What each GRPO stage begins with: pass rate and mixed groups, means over seeds, as lines."""
  lines, seen = [], set()
  for group in made:
    for probe in group.probes():
      row = probe[0]["stage"].rpartition("-")[0]
      found = [p["before"]["student"] for p in probe]
      if probe[0]["after"] is None and probe[0]["stage"] not in seen:
        seen.add(probe[0]["stage"])
        values = [np.mean([f[key] for f in found]) for key in
                  ("pass_rate", "mixed_groups", "response_length")]
        lines.append(f"| {escaped(group.name)} | {row} | {values[0]:.3f} | {values[1]:.3f} | "
                     f"{values[2]:.1f} |")
  if not lines:
    return []
  return ["### What GRPO begins with", "",
          "A group teaches only where its answers differ: *mixed* is the chance of that, problem "
          "by problem, 1 − p^g − (1 − p)^g, averaged over the probe's problems.", "",
          "| arm | stage | solved | mixed | tokens |", "|---|---|---|---|---|", *lines]


def warnings(made):
  """Where what the method asks for was not there, as lines."""
  lines, seen = [], set()
  raw = next((g for g in made if g.label == "untrained teacher"), None)
  for group in made:
    if raw is not None and group.label.startswith("teacher after"):
      found = compare(group, raw)
      if found is not None and found[0].estimate <= 0:
        lines.append(f"- {escaped(group.name)}: the teacher did not improve "
                     f"({interval(found[0])} points).")
    for probe in group.probes():
      mixed = np.mean([p["before"]["student"]["mixed_groups"] for p in probe])
      if probe[0]["after"] is None and mixed < 0.5 and probe[0]["stage"] not in seen:
        seen.add(probe[0]["stage"])
        lines.append(f"- {escaped(group.name)}: {probe[0]['stage'].rpartition('-')[0]} began with "
                     f"{100 * mixed:.0f} % mixed groups: most are constant and teach nothing.")
  return ["### Warnings", "", *lines] if lines else []


def figure(rows, path):
  """Scores with intervals, the stages' reward and KL, the sweeps' curves, C2's change, as a PNG."""
  made = [group for settings in _distinct(row["settings"] for row in rows)
          for group in groups([row for row in rows if row["settings"] == settings])]
  found = {kind: curves(made, keys) for kind, keys in SWEPT.items()}
  below = [functools.partial(_curves, kind, points) for kind, points in found.items() if points]
  below += [functools.partial(_nearness, made)] * any(group.distilling() for group in made)
  chart = Figure(figsize=(15, 4.5 * (1 + bool(below))), layout="constrained")
  grid = chart.add_gridspec(1 + bool(below), 3)
  axes = [chart.add_subplot(grid[0, i]) for i in range(3)]
  _bars(axes[0], made)
  _stages(axes[1], axes[2], rows)
  for i, draw in enumerate(below):
    draw(chart.add_subplot(grid[1, i]))
  chart.savefig(path, dpi=120)


def _curves(kind, found, axis):
  """A sweep's curves, of labels spent or of how updates are divided."""
  for label, points in found.items():
    place = [group.mean("labels_distinct") if kind == "labels" else x for x, group in points]
    triples = 100 * np.array([group.score(_avg(group)) for _, group in points]).T
    reach = np.maximum([triples[0] - triples[1], triples[2] - triples[0]], 0)
    axis.errorbar(place, triples[0], yerr=reach, label=label, marker="o", capsize=3, linewidth=1)
  axis.set_xlabel({"labels": "labels spent, distinct",
                   "division": "share of the updates in the warmup"}[kind])
  axis.set_ylabel("avg@k, %")
  axis.legend(fontsize=7)


def _bars(axis, made):
  # Groups that were scored in unlike ways have an avg@k of their own each.
  triples = 100 * np.array([group.score(_avg(group)) for group in made]).T
  place = np.arange(len(made))[::-1]
  reach = np.stack([triples[0] - triples[1], triples[2] - triples[0]])
  axis.barh(place, triples[0], xerr=np.maximum(reach, 0), color="#4c78a8", ecolor="#222",
            height=0.6)
  names = [f"{group.name} · seed{'s' * (len(group.runs) > 1)} {_seeds(group)}" for group in made]
  axis.set_yticks(place, names, parse_math=False, fontsize=7)
  axis.set_xlim(0, 100)
  axis.set_xlabel("avg@k, %")


def _stages(reward, kl, rows):
  """Every stage's curves; of several seeds the first's is named."""
  seen, named = {folder.name: folder for row in rows for folder in row["stages"]}, set()
  for folder in seen.values():
    row, log = folder.name.rpartition("-")[0], metrics.read(folder, "metrics")
    colour = f"C{sorted({name.rpartition('-')[0] for name in seen}).index(row)}"
    for key, axis in (("reward", reward), ("kl", kl)):
      curve = [(entry["step"], float(entry[key])) for entry in log if key in entry]  # "nan" too
      if curve:
        axis.plot(*zip(*curve, strict=True), label=None if (row, key) in named else row,
                  color=colour, linewidth=0.8, alpha=0.7)
        named.add((row, key))
  for axis, title in ((reward, "reward"), (kl, "KL, nats per token")):
    axis.set_xlabel("step")
    axis.set_ylabel(title)
    if axis.lines:
      axis.legend(fontsize=7)
  kl.set_yscale("log" if kl.lines else "linear")


def _nearness(made, axis):
  """KL(teacher ‖ student) on the teacher's text along each arm's distilling stages."""
  for group in made:
    if distilling := group.distilling():
      values = [np.mean([p["before"]["teacher"]["forward_kl"] for p in distilling[0]])]
      values += [np.mean([p["after"]["teacher"]["forward_kl"] for p in probe])
                 for probe in distilling]
      axis.plot(range(len(values)), values, marker="o", label=group.name, linewidth=1)
  axis.set_xlabel("distilling stages done")
  axis.set_ylabel("KL(T‖S) on the teacher's text, nats per token")
  axis.set_yscale("log")
  axis.legend(fontsize=6)


def write(workdirs):
  """Writes report.md and report.png into the first folder; returns the Markdown."""
  rows, folder = read(workdirs), epath.Path(workdirs[0])
  choice = folder / "choice.md"
  text = markdown(rows, choice.read_text() if choice.exists() else "")
  with (folder / "report.png").open("wb") as out:
    figure(rows, out)
  checkpoint.write(folder / "report.md", text)
  return text


def main():
  """`python -m s2d_jax.report WORKDIR...` prints the report."""
  try:
    print(write(sys.argv[1:] or ["runs/arithmetic"]))
  except ValueError as error:
    sys.exit(f"s2d_jax: {error}")


if __name__ == "__main__":
  main()
