"""Run folders -> the ladder: scores with intervals, what each arm spent, paired differences.

  python -m s2d_jax.report runs/arithmetic

Reads only what the stages left behind and writes report.md and report.png into the first folder.
"""

import re
import sys

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from s2d_jax import checkpoint, metrics, stats

# The orders the paper reports (arXiv 2605.12483, tables 1-6): the first arm above the second.
CONTRASTS = (("bridge", "cold_grpo"), ("bridge", "raw_bridge"), ("cold_grpo", "raw_bridge"),
             ("half_bridge_grpo_2h", "cold_grpo"), ("bridge", "half_bridge_grpo_2h"))
DRAWS, LEVEL = 2000, 0.95


def read(workdirs):
  """Every row of every arm under the folders, as dicts, in the order they were made.

  A row has arm, label, seed, result (scores and the matrix), stages (folders behind it), settings
  (all that determines a score but the weights and the seed), spent (ledgers added up) and
  revisions.

  Raises:
    ValueError: a folder without any finished arm.
  """
  rows = []
  for workdir in map(epath.Path, workdirs):
    arms = (workdir / "arms").iterdir() if (workdir / "arms").exists() else ()
    # A kill can leave the beginning of a file behind, under another suffix.
    found = sorted((p for p in arms if p.suffix == ".json"), key=lambda p: (p.stat().mtime, p.name))
    if not found:
      raise ValueError(f"{workdir} has no finished arm: run the recipe with --workdir={workdir}.")
    for path in found:
      entry = checkpoint.read_json(path)
      for row in entry["rows"]:
        stages = [workdir / name for name in row["stages"]]
        evaluation = workdir / row["score"]
        manifests = [checkpoint.read_json(f / "manifest.json") for f in (*stages, evaluation)]
        rows.append({
            "arm": entry["arm"], "label": row["label"], "seed": entry["seed"], "stages": stages,
            "result": checkpoint.read_json(evaluation / "result.json"),
            "settings": {k: v for k, v in manifests[-1]["inputs"].items()
                         if k not in ("weights", "seed")},
            "spent": spent(stages), "revisions": {m["revision"] for m in manifests}})
  return rows


def spent(stages):
  """The ledgers of several stages added up; a label two of them used is one distinct label."""
  ledgers = [checkpoint.read_json(f / "ledger.json") for f in stages]
  names = ("label_uses", "tokens_sampled", "tokens_trained", "tokens_guide", "flops",
           "device_seconds_used", "device_seconds_lost")
  sums = {name: sum(entry[name] for entry in ledgers) for name in names}
  return {**sums, "labels_distinct": len({i for entry in ledgers for i in entry["labels"]})}


def markdown(rows):
  """The whole report as Markdown: a section for each way of scoring, never two in one table."""
  lines = ["# Sparse to dense: what each arm scores and spends", ""]
  for settings in _distinct(row["settings"] for row in rows):
    part = [row for row in rows if row["settings"] == settings]
    how = settings["evaluation"]
    lines += [f"Split {escaped(how['split'])}, {len(part[0]['result']['correct'])} problems "
              f"({settings['problems'][:8]}), {how['sampling']['samples_per_prompt']} samples each "
              f"at temperature {how['sampling']['temperature']} in {settings['dtype']}; percent, "
              f"with {100 * how['level']:.0f} % nested-bootstrap intervals over problems and "
              "samples of one training seed.", "",
              *ladder(part), "", *differences(part), "", revisions(part), ""]
  return "\n".join([*lines, "![scores and curves](report.png)", ""])


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


def ladder(rows):
  """The table of scores and spending, as lines."""
  names = sorted(rows[0]["result"]["scores"], key=_order)
  head = ["arm", "seed", *names, "response tokens", "labels: distinct", "uses", "tokens sampled",
          "trained", "by the guide", "TFLOPs", "device-s", "lost"]
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for row in rows:
    scores, cost = row["result"]["scores"], row["spent"]
    cells = [escaped(row["label"]), str(row["seed"]), *(interval(scores[n]) for n in names),
             f"{row['result']['response_length']:.1f}", f"{cost['labels_distinct']:,}",
             f"{cost['label_uses']:,}", f"{cost['tokens_sampled']:,}",
             f"{cost['tokens_trained']:,}", f"{cost['tokens_guide']:,}",
             f"{cost['flops'] / 1e12:.1f}", f"{cost['device_seconds_used']:.0f}",
             f"{cost['device_seconds_lost']:.0f}"]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def _order(name):
  """greedy, then avg@k, then pass@k by k."""
  kind, _, k = name.partition("@")
  return ("greedy", "avg", "pass").index(kind), int(k or 0)


def interval(triple):
  """[0.5, 0.45, 0.55] as "50.0 [45.0, 55.0]", in percent."""
  value, low, high = (100 * x for x in triple)
  return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def differences(rows):
  """Paired differences of avg@k on the same problems, against the paper's orders, as lines.

  Where a label comes twice with one seed, the later row is compared.
  """
  found = {(row["seed"], row["label"]): row for row in rows}
  lines = []
  for seed in sorted({row["seed"] for row in rows}):
    for above, below in CONTRASTS:
      a, b = found.get((seed, above)), found.get((seed, below))
      if a is None or b is None:
        continue
      gap = stats.paired_difference(np.array(a["result"]["correct"]),
                                    np.array(b["result"]["correct"]), stats.avg_at_k, seed, DRAWS,
                                    LEVEL)
      verdict = "agrees" if gap.low > 0 else "disagrees" if gap.high < 0 else "not resolved"
      lines.append(f"| {above} − {below} | {seed} | {interval(gap)} | {verdict} |")
  if not lines:
    return ["No two arms of the paper's contrasts are here."]
  return ["Paired differences of avg@k on the same problems; the paper has the first arm above.",
          "", "| difference | seed | points | the paper's order |", "|---|---|---|---|", *lines]


def figure(rows, path):
  """Scores with intervals, and every stage's reward or KL against its steps, as a PNG."""
  chart = Figure(figsize=(15, 4.5), layout="constrained")
  left, right, far = chart.subplots(1, 3)
  # Rows that were scored in unlike ways have an avg@k of their own each.
  triples = np.array([next(v for n, v in row["result"]["scores"].items() if n.startswith("avg@"))
                      for row in rows]).T * 100
  labels = [f"{row['label']} · seed {row['seed']}" for row in rows]
  place = np.arange(len(rows))[::-1]
  reach = np.stack([triples[0] - triples[1], triples[2] - triples[0]])
  left.barh(place, triples[0], xerr=np.maximum(reach, 0), color="#4c78a8", ecolor="#222",
            height=0.6)
  left.set_yticks(place, labels, parse_math=False)
  left.set_xlim(0, 100)
  left.set_xlabel("avg@k, %")
  seen = {folder.name: folder for row in rows for folder in row["stages"]}
  for folder in seen.values():
    log = metrics.read(folder, "metrics")
    for key, axis in (("reward", right), ("kl", far)):
      curve = [(row["step"], float(row[key])) for row in log if key in row]  # "nan" too
      if curve:
        axis.plot(*zip(*curve, strict=True), label=folder.name, linewidth=1)
  for axis, title in ((right, "reward"), (far, "KL, nats per token")):
    axis.set_xlabel("step")
    axis.set_ylabel(title)
    if axis.lines:
      axis.legend(fontsize=7)
  far.set_yscale("log" if far.lines else "linear")
  chart.savefig(path, dpi=120)


def write(workdirs):
  """Writes report.md and report.png into the first folder; returns the Markdown."""
  rows, folder = read(workdirs), epath.Path(workdirs[0])
  text = markdown(rows)
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
