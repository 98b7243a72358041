"""Scores of a finished run against those of its start: paired differences, and by operation.

  python -m results.smollm2.gains runs/smollm2/run
"""

import collections
import sys

import numpy as np

from s2d_jax import intervals, ladder
from s2d_jax.data.word_problems import problems

PAIRS = (("teacher after teacher_grpo (all)", "untrained teacher"), ("bridge", "untrained student"),
         ("opd_only", "untrained student"))


def main(workdir: str) -> None:
  """Prints a line for each pair, and one for each model and operation."""
  correct_PG = {run.label: np.array(run.samples()["sampled"].correct_PG)
                for run in ladder.read([workdir])}
  for after, before in PAIRS:
    found = intervals.paired_difference(correct_PG[after].mean(axis=1),
                                        correct_PG[before].mean(axis=1), 0, 1000)
    print(f"{after} - {before}: " + "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in found)))
  rows = problems.splits()["test"]
  for label, right_PG in correct_PG.items():
    rates = collections.defaultdict(list)
    for row, right_G in zip(rows, right_PG, strict=False):
      rates[row["solution"].split()[1]].append(right_G.mean())
    print(label, {sign: f"{100 * np.mean(rate):.1f}" for sign, rate in rates.items()})


if __name__ == "__main__":
  main(sys.argv[1])
