"""The controls of an embedded world against the arms of its ladder, paired on seeds and problems.

  python -m results.controls LADDER COLD_TEACHER SAME_SIZE

The three are work folders: of the ladder, and of the config's arguments `:cold_teacher` and
`:same_size`. Sharpening explains a bridge where the cold teacher's, which spends no label, is as
good.
"""

import sys

import numpy as np

from configs import arithmetic
from s2d_jax import ladder, report

# (first, second): arms of the ladder, or a control's.
PAIRS = (("bridge", "cold teacher"), ("bridge", "same size"), ("cold teacher", "raw_bridge"),
         ("cold teacher", "cold_grpo"), ("same size", "cold_grpo"), ("same size", "raw_bridge"),
         ("sft_teacher_bridge", "cold teacher"), ("half_bridge", "cold teacher"),
         ("half_bridge_grpo_2h", "cold teacher"), ("bridge", "raw_bridge"),
         ("bridge", "cold_grpo"))
NO_INTERVALS = "Overlaps are means over seeds, without intervals."


def groups(runs: list[ladder.Run]) -> dict[str, ladder.Group]:
  """The groups of a work folder that were configured first, by their arm."""
  return {group.label: group for group in ladder.groups(runs) if group.name == group.label}


def main(ladder_folder: str, cold_teacher: str, same_size: str) -> None:
  """Prints a table of scores, one of differences, and one of the teachers."""
  runs = [[run for run in ladder.read([folder]) if run.settings["evaluation"]["split"] == "test"]
          for folder in (ladder_folder, cold_teacher, same_size)]
  of_ladder, of_cold, of_same = map(groups, runs)
  found = of_ladder | {"cold teacher": of_cold["raw_bridge"], "same size": of_same["bridge"]}
  print("| arm | seeds | avg@k | labels: distinct |")
  print("|---|---|---|---|")
  for name in dict.fromkeys(name for pair in PAIRS for name in pair):
    if name in found:
      group = found[name]
      print(f"| {name} | {group.seeds} | {score(group)} | {group.mean('labels_distinct'):,.0f} |")
  print("\n| difference | sign of each seed | points | resolves |")
  print("|---|---|---|---|")
  for first, second in PAIRS:
    if first in found and second in found:
      contrast = ladder.compare(found[first], found[second])
      print(f"| {first} − {second} | {contrast.signs} | {report.interval(contrast.difference)} | "
            f"{100 * contrast.resolvable:.1f} |")
  rewarded = "teacher after teacher_grpo (all)"
  print("\nOverlap: the share that student and teacher share of their likeliest tokens "
        "(`config.probe.top_k`), on the student's samples. The cold teacher samples and guides "
        f"at {arithmetic.COLD}. {NO_INTERVALS}\n")
  print("| bridge | its teacher's avg@k at temperature 1 | overlap before | overlap after | "
        "its student's avg@k |")
  print("|---|---|---|---|---|")
  for name, teacher in (("bridge", of_ladder[rewarded]), ("same size", of_same[rewarded]),
                        ("cold teacher", of_cold["untrained teacher"])):
    probes = found[name].distilling()
    overlaps = [f"{np.mean([probe['student']['overlap'] for probe in of_seeds]):.2f}"
                for of_seeds in ([one["before"] for one in probes[0]],
                                 [one["after"] for one in probes[-1]])]
    print(f"| {name} | {score(teacher)} | {' | '.join(overlaps)} | {score(found[name])} |")
  print(f"\n{report.revisions([run for of_folder in runs for run in of_folder])}")


def score(group: ladder.Group) -> str:
  """The headline score of a group, with its interval."""
  return report.interval(group.score(group.headline))


if __name__ == "__main__":
  main(*sys.argv[1:])
