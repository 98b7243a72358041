"""The report's picture: scores with intervals, the stages' curves, sweeps, divergences."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s2d_jax import ladder, metrics, stats
from s2d_jax.ladder import Group, Run


def figure(rows: Sequence[Run], path: epath.PathLike) -> None:
  """Draws one table's rows into a PNG: scores, the stages' curves, sweeps, KL to the teacher.

  Args:
    rows: as `ladder.read` returns them, scored in one way.
    path: a file, or its name.
  """
  groups = ladder.groups(rows)
  below = [functools.partial(_curves, kind, points) for kind, keys in ladder.SWEPT.items()
           if (points := ladder.curves(groups, keys))]
  # Of a swept arm only its first config has stage curves and a KL: the sweep has its own curve.
  first = [group for group in groups if group.name == group.label]
  if any(group.distilling() for group in first):
    below.append(functools.partial(_divergences, first))
  # The bars need a line of text for each group.
  heights = [max(4.5, 2 + len(groups) / 4)]
  if below:
    heights.append(4.5)
  chart = Figure(figsize=(20, sum(heights)), layout="constrained")
  grid = chart.add_gridspec(len(heights), 4, height_ratios=heights)
  axes = [chart.add_subplot(grid[0, i]) for i in range(4)]
  _bars(axes[0], groups)
  _stages(axes[1:], [run for group in first for run in group.runs.values()])
  for i, plot in enumerate(below):
    plot(chart.add_subplot(grid[1, i]))
  chart.savefig(path, dpi=120)


def _curves(kind: str, curves: Mapping[str, Sequence[tuple[float, Group]]], axis: Axes) -> None:
  """Draws a sweep's curves over the labels spent, or over the share of updates in the warmup."""
  for label, points in curves.items():
    # A share of the labels is a limit; the ledger says how many were spent within it.
    x_values = [group.mean("labels_distinct") if kind == "labels" else x for x, group in points]
    triples = 100 * np.array([group.score(group.headline) for _, group in points]).T
    reach = np.maximum([triples[0] - triples[1], triples[2] - triples[0]], 0)
    axis.errorbar(x_values, triples[0], yerr=reach, label=label, marker="o", capsize=3, linewidth=1)
  axis.set_xlabel({"labels": "labels spent, distinct",
                   "division": "share of the updates in the warmup"}[kind])
  axis.set_ylabel(f"{stats.HEADLINE}@k, %")
  axis.legend(fontsize=7)


def _bars(axis: Axes, groups: Sequence[Group]) -> None:
  """Draws each group's avg@k as a bar with its interval."""
  # Groups that were scored differently have different k, so each names its own avg@k.
  triples = 100 * np.array([group.score(group.headline) for group in groups]).T
  y_values = np.arange(len(groups))[::-1]
  reach = np.stack([triples[0] - triples[1], triples[2] - triples[0]])
  axis.barh(y_values, triples[0], xerr=np.maximum(reach, 0), color="#4c78a8", ecolor="#222",
            height=0.6)
  names = []
  for group in groups:
    word = "seeds" if len(group.runs) > 1 else "seed"
    names.append(f"{group.name} · {word} {group.seeds}")
  axis.set_yticks(y_values, names, parse_math=False, fontsize=7)
  axis.set_xlim(0, 100)
  axis.set_xlabel(f"{stats.HEADLINE}@k, %")


# (title, the metrics that may give the curve: the first that a stage's log has).
CURVES = (("reward", ("reward",)),
          ("nats per token: KL, or NLL of supervised rows", ("kl", "loss")),
          ("entropy, nats per token", ("entropy",)))


def _stages(axes: Sequence[Axes], rows: Sequence[Run]) -> None:
  """Draws every stage's curves; of several seeds only the first is in the legend."""
  folders = {folder.name: folder for row in rows for folder in row.stages}
  stages = sorted({name.rpartition("-")[0] for name in folders})
  for axis, (title, names) in zip(axes, CURVES, strict=True):
    named = set()
    for folder in folders.values():
      stage = folder.name.rpartition("-")[0]
      log = metrics.read(folder, "metrics")
      name = _curve_metric(log, names)
      # A value that is not finite is stored as text, such as "nan".
      curve = [(entry["step"], float(entry[name])) for entry in log if name in entry]
      if curve:
        steps, values = zip(*curve, strict=True)
        axis.plot(steps, values, label=None if stage in named else stage,
                  color=f"C{stages.index(stage)}", linewidth=0.8, alpha=0.7)
        named.add(stage)
    axis.set_xlabel("step")
    axis.set_ylabel(title)
    if axis.lines:
      axis.legend(fontsize=7)
  axes[1].set_yscale("log" if axes[1].lines else "linear")


def _curve_metric(log: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str | None:
  """The first of `names` that a stage's log has, or None."""
  for name in names:
    # The loss of a stage with rewards is a surrogate, which is not measured in nats.
    surrogate = name == "loss" and log and "reward" in log[0]
    if log and name in log[0] and not surrogate:
      return name
  return None


def _divergences(groups: Sequence[Group], axis: Axes) -> None:
  """Draws KL(teacher ‖ student) on the teacher's text along each arm's distilling stages."""
  for group in groups:
    if distilling := group.distilling():
      # The first stage's probe before it stands for the start; then one after each stage.
      values = [np.mean([p["before"]["teacher"]["forward_kl"] for p in distilling[0]])]
      values += [np.mean([p["after"]["teacher"]["forward_kl"] for p in probe])
                 for probe in distilling]
      axis.plot(range(len(values)), values, marker="o", label=group.name, linewidth=1)
  axis.set_xlabel("distilling stages done")
  axis.set_ylabel("KL(T‖S) on the teacher's text, nats per token")
  axis.set_yscale("log")
  axis.set_xticks((0, 1, 2))
  axis.legend(fontsize=6, loc="lower left")
