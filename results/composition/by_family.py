"""avg@k of each arm by family of problems, from the finished scores of a work folder.

  python -m results.composition.by_family runs/composition

Percent on the test split: the mean over training seeds, and the lowest and highest of them.
"""

import sys

import numpy as np

from configs import composition
from s2d_jax import ladder, tasks
from s2d_jax.data.composition import problems


def main(workdir: str) -> None:
  """Prints a Markdown table."""
  config = composition.get_config()
  split = config.evals.test.split
  source = tasks.get(config).source(split)
  family_P = np.array([problems.family(source[i]) for i in range(len(source))])
  print("| arm | seeds | " + " | ".join(problems.FAMILIES) + " |")
  print("|---" * (2 + len(problems.FAMILIES)) + "|")
  for group in ladder.groups(ladder.read([workdir])):
    if group.name == group.label:
      value_SP = 100 * group.value_SP()
      value_SF = np.stack([value_SP[:, family_P == name].mean(axis=1)
                           for name in problems.FAMILIES], axis=1)
      cells = [f"{s.mean():.1f} [{s.min():.1f}, {s.max():.1f}]" for s in value_SF.T]
      print(f"| {group.label} | {len(value_SP)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main(sys.argv[1])
