"""The controls of an embedded world against the arms of its ladder, paired on seeds and problems.

  python results/controls.py LADDER COLD_TEACHER SAME_SIZE

The three are work folders: of the ladder, and of the config's arguments `:cold_teacher` and
`:same_size`. Sharpening explains a bridge where the cold teacher's, which spends no label, is as
good.
"""

import sys

from s2d_jax import ladder, report

# (first, second): arms of the ladder, or a control's.
PAIRS = (("bridge", "cold teacher"), ("bridge", "same size"), ("cold teacher", "raw_bridge"),
         ("cold teacher", "cold_grpo"), ("same size", "cold_grpo"), ("same size", "raw_bridge"),
         ("sft_teacher_bridge", "cold teacher"), ("half_bridge", "cold teacher"),
         ("half_bridge_grpo_2h", "cold teacher"), ("bridge", "raw_bridge"),
         ("bridge", "cold_grpo"))


def groups(workdir: str) -> dict[str, ladder.Group]:
  """The groups of a work folder that were configured first, by their arm."""
  runs = [run for run in ladder.read([workdir]) if run.settings["evaluation"]["split"] == "test"]
  return {group.label: group for group in ladder.groups(runs) if group.name == group.label}


def main(ladder_folder: str, cold_teacher: str, same_size: str) -> None:
  """Prints a table of scores and one of differences."""
  found = groups(ladder_folder)
  found["cold teacher"] = groups(cold_teacher)["raw_bridge"]
  found["same size"] = groups(same_size)["bridge"]
  print("| arm | seeds | avg@k | labels: distinct |")
  print("|---|---|---|---|")
  for name in dict.fromkeys(name for pair in PAIRS for name in pair):
    if name in found:
      group = found[name]
      print(f"| {name} | {group.seeds} | {report.interval(group.score(group.headline))} | "
            f"{group.mean('labels_distinct'):,.0f} |")
  print("\n| difference | sign of each seed | points | resolves |")
  print("|---|---|---|---|")
  for first, second in PAIRS:
    if first in found and second in found:
      contrast = ladder.compare(found[first], found[second])
      print(f"| {first} − {second} | {contrast.signs} | {report.interval(contrast.difference)} | "
            f"{100 * contrast.resolvable:.1f} |")


if __name__ == "__main__":
  main(*sys.argv[1:])
