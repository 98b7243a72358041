"""The report's table of what probes say of samples: repetition, the teacher's view, prefixes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from s2d_jax import intervals
from s2d_jax.ladder import DRAWS, Group

# (head, name in a probe's result.json, format) of a model's samples, and of the prefix probe.
SAMPLES = (("repeated 3-grams", "repetition", "{:.3f}"),
           ("teacher's rank", "teacher_rank", "{:.1f}"),
           ("in teacher's top k", "teacher_rank_in_top_k", "{:.3f}"),
           ("Δlogp, repeated", "delta_logp_repeated", "{:.3f}"),
           ("Δlogp, other", "delta_logp_other", "{:.3f}"))
PREFIXES = (("teacher alone", "guide", "{:.3f}"), ("after prefix", "after_prefix", "{:.3f}"),
            ("drop, points", "drop", ""),
            ("right→wrong", "right_to_wrong", "{:.1f}"),
            ("wrong→right", "wrong_to_right", "{:.1f}"),
            ("of problems", "problems", "{:.0f}"),
            ("alone, readable", "guide_well_formed", "{:.3f}"),
            ("after prefix, readable", "after_prefix_well_formed", "{:.3f}"))
_LEGEND = (
    "On the samples of each model, means over seeds; – where nothing was measured. *Repeated "
    "3-grams* is the share of runs of three tokens that a response had before: it rises where a "
    "student falls into loops. *Teacher's rank* is the median place of the sampled tokens by the "
    "teacher's probability, 1 the likeliest, and *in teacher's top k* is the share of places up to "
    "k: where few are, a loss over the top k says little of them. *Δlogp* is the mean of teacher − "
    "student log-probability, in nats, of tokens that end a repeated run and of all others: where "
    "that of repeated tokens is the higher, the teacher rewards loops.")
_PREFIX_LEGEND = (
    " *Teacher alone* and *after prefix* are the shares of problems that the teacher solves from "
    "the prompt and after the beginning of a student's response: the lower the second, the more "
    "the student's text misleads it. *Drop* is their difference with its 95 % interval. "
    "*Right→wrong* and *wrong→right* are the numbers of problems whose result the beginning "
    "changed so. *Readable* is the share of responses in which the task can read an answer.")


def stage_name(probe: Sequence[Mapping[str, Any]]) -> str:
  """The stage of a probe, by the name of its folder without the hash."""
  return probe[0]["stage"].rpartition("-")[0]


def samples(groups: Sequence[Group]) -> Iterator[tuple[Group, tuple, int, str, str]]:
  """Yields (group, probes of a stage over seeds, index of the stage, when, whose samples)."""
  for group in groups:
    for index, probe in enumerate(group.distilling()):
      # Before a second distilling stage is after the first.
      for when in ("before", "after") if index == 0 else ("after",):
        for text in ("teacher", "student"):
          yield group, probe, index, when, text


def section(groups: Sequence[Group], escaped: Callable[[str], str]) -> list[str]:
  """The table before and after each stage that distils, as lines; none without such numbers.

  Args:
    escaped: makes a name harmless in a cell.
  """
  prefixed = any(when in p and "prefixes" in (p[when] or {})
                 for group in groups for probe in group.distilling()
                 for p in probe for when in ("before", "after"))
  columns = len(SAMPLES) + len(PREFIXES) * prefixed
  lines: list[str] = []
  shown = set()
  for group, probe, index, when, text in samples(groups):
    found = [p[when][text] for p in probe]
    # It is the student's responses that are cut.
    of_prefixes = [p[when].get("prefixes", {}) for p in probe] if text == "student" else []
    cells = [*_cells(found, SAMPLES), *_cells(of_prefixes, PREFIXES)][:columns]
    key = (stage_name(probe), index, when, text, *cells)
    if {*cells} != {"–"} and key not in shown:  # arms that share the stage show it once
      shown.add(key)
      lines.append(f"| {escaped(group.name)} | {stage_name(probe)} | {when} | {text}'s | "
                   + " | ".join(cells) + " |")
  if not lines:
    return []
  head = ["arm", "stage", "when", "text",
          *(name for name, *_ in (*SAMPLES, *PREFIXES)[:columns])]
  return ["### What the samples are like", "",
          _LEGEND + (_PREFIX_LEGEND if prefixed else ""), "",
          "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]


def _cells(found: Sequence[Mapping[str, float]],
           columns: Sequence[tuple[str, str, str]]) -> list[str]:
  """The mean of each column over the seeds that have it, or a dash."""
  cells = []
  for _, name, form in columns:
    values = [one[name] for one in found if name in one]
    if not values:
      cells.append("–")
    elif name == "drop":
      cells.append("{:z.1f} [{:z.1f}, {:z.1f}]".format(*(100 * x for x in drop(values))))
    else:
      cells.append(form.format(np.mean(values)))
  # The minus sign of the report's other tables.
  return [cell.replace("-", "−") for cell in cells]


def drop(value_SP: Sequence[Sequence[int]]) -> intervals.Interval:
  """The mean drop of a prefix probe, with its interval over seeds and problems."""
  return intervals.difference(np.array(value_SP), 0, DRAWS)
