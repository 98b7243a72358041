"""The paper's tables (arXiv 2605.12483) beside the scores of runs, and each contrast's verdict.

`assets/paper_tables.json` has every published number. A run fills a cell by its arm, by the names
of its model folders, such as Qwen3-8B, and by the split that it was scored on, such as math500.
"""

import functools
import importlib.resources
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from s2d_jax import ladder
from s2d_jax.ladder import Contrast, Group, Run

MISSING = "missing"
_NAMES = {"math500": "MATH-500", "aime24": "AIME 2024", "aime25": "AIME 2025"}


class Cells(NamedTuple):
  """One row of a table."""
  arm: str
  teacher: str | None          # None where the row has no teacher
  published: dict[str, tuple[float, float] | None]  # by benchmark: percent, and what is behind +-
  groups: dict[str, Group]     # by benchmark, where a run has the row's arm and models


@functools.cache
def published() -> dict[str, Any]:
  """The published numbers: "benchmarks" with their sizes, "samples", and "tables"."""
  file = importlib.resources.files("s2d_jax").joinpath("assets/paper_tables.json")
  return json.loads(file.read_text(encoding="utf-8"))


def section(rows: Sequence[Run]) -> list[str]:
  """The paper's tables with the cells that runs fill, as lines; [] where none is filled.

  Runs that were scored in unlike ways fill tables of their own.
  """
  lines: list[str] = []
  for settings, groups in _alike(rows):
    tables = [(table, [_cells(row, groups) for row in table["rows"]])
              for table in published()["tables"]]
    if any(cells.groups for _, found in tables for cells in found):
      lines += _introduction(settings)
      for table, found in tables:
        lines += [f"### {table['title']} ({table['where']})", "", *_table(table, found), "",
                  *_contrasts(table, found)]
  return lines


def _alike(rows: Sequence[Run]) -> Iterator[tuple[dict[str, Any], dict[str, list[Group]]]]:
  """(settings, groups by benchmark) of the runs that were scored alike, benchmark aside."""
  found: list[tuple[dict[str, Any], dict[str, list[Group]]]] = []
  for settings, part in ladder.tables(rows):
    evaluation = dict(settings["evaluation"])
    split = evaluation.pop("split")
    # How many problems were scored is marked in the cell.
    evaluation.pop("problems", None)
    others = {k: v for k, v in settings.items() if k != "problems"} | {"evaluation": evaluation}
    if split in published()["benchmarks"]:
      alike = next((groups for earlier, groups in found if earlier == others), None)
      if alike is None:
        alike = {}
        found.append((others, alike))
      alike[split] = [*alike.get(split, ()), *ladder.groups(part)]
  yield from found


def _introduction(settings: Mapping[str, Any]) -> list[str]:
  """The heading, and what the cells and verdicts mean."""
  sampling = settings["evaluation"]["sampling"]
  temperature = sampling.get("temperature", 1.0)
  return ["## The paper's tables", "",
          f"Percent. *Paper* is the published avg@{published()['samples']} with the number behind "
          "its ±, whose meaning it does not say. *Here* is the score of a run, sampled at "
          f"temperature {temperature}, with its interval; {MISSING} where no run has the arm and "
          "models of the row. † marks a score of other than all problems, or of another number of "
          "samples. A *difference* is one row minus another, on the same problems and seeds. Its "
          "verdict says whether the interval agrees with the paper's sign.", ""]


def _cells(row: Mapping[str, Any], groups: Mapping[str, Sequence[Group]]) -> Cells:
  """One row of a table with the groups of runs that fill it."""
  scores = dict(zip(published()["benchmarks"], row["scores"], strict=True))
  filled = {}
  for name, printed in scores.items():
    group = next((group for group in groups.get(name, ()) if _fits(row, group)), None)
    if printed is not None and group is not None:
      filled[name] = group
  return Cells(row["arm"], row["teacher"], scores, filled)


def _fits(row: Mapping[str, Any], group: Group) -> bool:
  """Whether runs have a row's arm and models, and all labels."""
  if group.label != row["arm"]:
    return False
  for context in group.contexts():
    values = dict(context)
    names = {role: pathlib.PurePath(values.get(role, "")).name.lower()
             for role in ("student", "teacher")}
    # The size of a model that trains or teaches in no stage of the row is open.
    if all(row[role] in (None, name) for role, name in names.items()) and float(
        values.get("label_share", 1)) == 1:
      return True
  return False


def _table(table: Mapping[str, Any], found: Sequence[Cells]) -> list[str]:
  """A table of the paper's scores and those of runs."""
  names = [name for name in published()["benchmarks"]
           if any(cells.published[name] is not None for cells in found)]
  head = ["row", *(f"{_NAMES[name]}: {of}" for name in names for of in ("paper", "here"))]
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for row, cells in zip(table["rows"], found, strict=True):
    texts = [row["row"]]
    for name in names:
      value, spread = cells.published[name]
      texts += [f"{value:.1f} ± {spread:.1f}", _here(name, cells.groups.get(name))]
    lines.append("| " + " | ".join(texts) + " |")
  return lines


def _here(benchmark: str, group: Group | None) -> str:
  """The score of a group's runs, or that it is missing."""
  if group is None:
    return MISSING
  score = group.score(group.headline)
  if score is None:
    return MISSING
  correct_PG = next(iter(group.runs.values())).samples()["sampled"].correct_PG
  whole = correct_PG.shape == (published()["benchmarks"][benchmark], published()["samples"])
  return f"{_percent(score)}{'' if whole else ' †'}"


def _percent(values: Iterable[float]) -> str:
  """[0.5, 0.45, 0.55] as "50.0 [45.0, 55.0]"."""
  value, low, high = (100 * x for x in values)
  return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _contrasts(table: Mapping[str, Any], found: Sequence[Cells]) -> list[str]:
  """The table of differences between the rows of one teacher, with verdicts."""
  if not table["contrasts"]:
    return []
  lines = ["| difference | teacher | benchmark | paper | here | verdict |", "|---" * 6 + "|"]
  for above, below in table["contrasts"]:
    for a in (cells for cells in found if cells.arm == above):
      # A row without a teacher is compared with those of every teacher.
      b = next((cells for cells in found if cells.arm == below
                and (cells.teacher == a.teacher or None in (cells.teacher, a.teacher))), None)
      if b is not None:
        lines += [_contrast(above, below, name, a, b) for name, printed in a.published.items()
                  if printed is not None]
  return [*dict.fromkeys(lines), ""]


def _contrast(above: str, below: str, benchmark: str, a: Cells, b: Cells) -> str:
  """The line of one difference on one benchmark."""
  printed = a.published[benchmark][0] - b.published[benchmark][0]
  pair = [cells.groups.get(benchmark) for cells in (a, b)]
  found = None if None in pair else ladder.compare(*pair)
  here = MISSING if found is None else _percent(found.difference)
  teacher = a.teacher or b.teacher or "–"
  return (f"| `{above}` − `{below}` | {teacher} | {_NAMES[benchmark]} | {printed:+.1f} | {here} | "
          f"{verdict(found, printed)} |")


def verdict(contrast: Contrast | None, printed: float) -> str:
  """A Contrast against the sign of the paper's difference, in points."""
  if contrast is None:
    return MISSING
  low, high = contrast.difference.low, contrast.difference.high
  if low <= 0 <= high:
    return "not resolved"
  order = "above" if low > 0 else "below"
  # The interval of one seed says nothing of other seeds.
  if len(contrast.seeds) == 1:
    return f"{order} in this seed"
  # A printed difference of 0.0 has no sign to agree with.
  if abs(printed) < 0.05:
    return f"{order}; the paper has no order"
  return "agrees" if (printed > 0) == (low > 0) else "disagrees"
