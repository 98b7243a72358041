"""The report's picture: scores with intervals, the stages' curves, sweeps, how near models came."""

import functools

import numpy as np
from matplotlib.figure import Figure

from s2d_jax import ladder, metrics


def figure(rows, path):
  """Draws one table's rows into a PNG: scores, the stages' curves, the sweeps' curves, C2's change.

  Stages and C2 are those of each arm as it was configured first: a sweep has its own curve.

  Args:
    rows: as `ladder.read` returns them, scored in one way; path: a file, or its name.
  """
  made = ladder.groups(rows)
  below = [functools.partial(_curves, kind, points) for kind, keys in ladder.SWEPT.items()
           if (points := ladder.curves(made, keys))]
  first = [group for group in made if group.name == group.label]
  below += [functools.partial(_nearness, first)] * any(group.distilling() for group in first)
  tall = 2 + len(made) / 4
  heights = [max(4.5, tall), 4.5][: 1 + bool(below)]
  chart = Figure(figsize=(20, sum(heights)), layout="constrained")
  grid = chart.add_gridspec(len(heights), 4, height_ratios=heights)
  axes = [chart.add_subplot(grid[0, i]) for i in range(4)]
  _bars(axes[0], made)
  _stages(axes[1:], [run for group in first for run in group.runs.values()])
  for i, draw in enumerate(below):
    draw(chart.add_subplot(grid[1, i]))
  chart.savefig(path, dpi=120)


def _curves(kind, found, axis):
  """A sweep's curves, of labels spent or of how updates are divided."""
  for label, points in found.items():
    place = [group.mean("labels_distinct") if kind == "labels" else x for x, group in points]
    triples = 100 * np.array([group.score(group.avg) for _, group in points]).T
    reach = np.maximum([triples[0] - triples[1], triples[2] - triples[0]], 0)
    axis.errorbar(place, triples[0], yerr=reach, label=label, marker="o", capsize=3, linewidth=1)
  axis.set_xlabel({"labels": "labels spent, distinct",
                   "division": "share of the updates in the warmup"}[kind])
  axis.set_ylabel("avg@k, %")
  axis.legend(fontsize=7)


def _bars(axis, made):
  # Groups that were scored in unlike ways have an avg@k of their own each.
  triples = 100 * np.array([group.score(group.avg) for group in made]).T
  place = np.arange(len(made))[::-1]
  reach = np.stack([triples[0] - triples[1], triples[2] - triples[0]])
  axis.barh(place, triples[0], xerr=np.maximum(reach, 0), color="#4c78a8", ecolor="#222",
            height=0.6)
  names = [f"{group.name} · seed{'s' * (len(group.runs) > 1)} {group.seeds}" for group in made]
  axis.set_yticks(place, names, parse_math=False, fontsize=7)
  axis.set_xlim(0, 100)
  axis.set_xlabel("avg@k, %")


CURVES = (("reward", ("reward",)),
          ("nats per token: KL, or NLL of supervised rows", ("kl", "loss")),
          ("entropy, nats per token", ("entropy",)))


def _stages(axes, rows):
  """Every stage's curves; of several seeds the first's is named."""
  seen = {folder.name: folder for row in rows for folder in row["stages"]}
  stages = sorted({name.rpartition("-")[0] for name in seen})
  for axis, (title, keys) in zip(axes, CURVES, strict=True):
    named = set()
    for folder in seen.values():
      row, log = folder.name.rpartition("-")[0], metrics.read(folder, "metrics")
      # A rewarded row's loss is a surrogate and no number of nats.
      key = next((k for k in keys if log and k in log[0] and not (
          k == "loss" and "reward" in log[0])), None)
      curve = [(entry["step"], float(entry[key])) for entry in log if key in entry]  # "nan" too
      if curve:
        axis.plot(*zip(*curve, strict=True), label=None if row in named else row,
                  color=f"C{stages.index(row)}", linewidth=0.8, alpha=0.7)
        named.add(row)
    axis.set_xlabel("step")
    axis.set_ylabel(title)
    if axis.lines:
      axis.legend(fontsize=7)
  axes[1].set_yscale("log" if axes[1].lines else "linear")


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
  axis.set_xticks((0, 1, 2))
  axis.legend(fontsize=6, loc="lower left")
