"""The report's table of the costs of searches (`foresee`) and of probes by family (`allocate`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from s2d_jax import files
from s2d_jax.ladder import Group

# Parts of a stage's ledger, and their names in the table.
_PARTS = {"foresee": "searches", "allocate": "probes by family"}
_HEAD = ("arm", "stage", "part", "sequences", "tokens sampled", "GFLOPs", "of the stage's FLOPs",
         "label uses")


def section(groups: Sequence[Group], escaped: Callable[[str], str]) -> list[str]:
  """The table, as lines, with means over seeds; none where no stage has such a part.

  Args:
    escaped: makes a name harmless in a cell.
  """
  lines = []
  for group in groups:
    runs = list(group.runs.values())
    # The runs of a group have the same stages, in one order.
    for folders in zip(*(run.stages for run in runs), strict=True):
      ledgers = [files.read_json(folder / "ledger.json") for folder in folders]
      stage = folders[0].name.rpartition("-")[0]
      for part, text in _PARTS.items():
        if all(part in entry for entry in ledgers):
          lines.append(f"| {escaped(group.name)} | {stage} | {text} | "
                       + " | ".join(_cells(ledgers, part)) + " |")
  if not lines:
    return []
  return ["### What searches and probes by family cost", "",
          "Means over seeds of one stage. The counts are contained in those of the first table; an "
          "update learns from none of the sequences. Responses that another stage sampled count "
          "as if they had been sampled here.", "",
          "| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|", *lines]


def _cells(ledgers: Sequence[Mapping[str, Any]], part: str) -> list[str]:
  """A row's numbers."""
  def mean(name: str) -> float:
    return float(np.mean([entry[part].get(name, 0) for entry in ledgers]))

  flops = mean("flops") + mean("flops_reused")
  whole = float(np.mean([entry["flops"] + entry["flops_reused"] for entry in ledgers]))
  return [f"{mean('sequences'):,.0f}", f"{mean('tokens_sampled') + mean('tokens_reused'):,.0f}",
          f"{flops / 1e9:,.1f}", f"{100 * flops / whole:.1f} %", f"{mean('label_uses'):,.0f}"]
