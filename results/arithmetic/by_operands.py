"""avg@k of each arm by the number of operands, from the finished scores of a work folder.

  python -m results.arithmetic.by_operands runs/ladder

Percent on the test split: the mean over training seeds, and the lowest and highest of them,
of each arm as it was configured first.
"""

import sys

import numpy as np

from configs import arithmetic
from s2d_jax import ladder, tasks


def main(workdir: str) -> None:
  """Prints a Markdown table."""
  config = arithmetic.get_config()
  split = config.evals.test.split
  source = tasks.get(config).source(split)
  operands_P = np.array([source[i]["problem"].count("+") + 1 for i in range(len(source))])
  kinds = sorted(set(operands_P.tolist()))
  print("| arm | seeds | " + " | ".join(f"{n} operands" for n in kinds) + " |")
  print("|---" * (2 + len(kinds)) + "|")
  # A work folder may have scores on other benchmarks, whose problems have no operands to count.
  runs = [run for run in ladder.read([workdir]) if run.settings["evaluation"]["split"] == split]
  for group in ladder.groups(runs):
    if group.name == group.label:
      value_SP = 100 * group.value_SP()
      value_SK = np.stack([value_SP[:, operands_P == n].mean(axis=1) for n in kinds], axis=1)
      cells = [f"{s.mean():.1f} [{s.min():.1f}, {s.max():.1f}]" for s in value_SK.T]
      print(f"| {group.label} | {len(value_SP)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main(sys.argv[1])
