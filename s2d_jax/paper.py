"""The paper's tables (arXiv 2605.12483) beside the scores of runs, and each contrast's verdict.

`assets/paper_tables.json` has every published number. A run fills a cell by its arm, by the names
of its model folders, such as Qwen3-8B, and by the split that it was scored on, such as math500.
Further settings that are not the paper's are marked, and several runs of one cell are all shown.
"""

import functools
import importlib.resources
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from s2d_jax import intervals, ladder
from s2d_jax.ladder import Contrast, Group, Run

MISSING = "missing"
SEVERAL = "several runs"  # and no single one of them has the paper's settings
UNSET = "not set"
_NAMES = {"math500": "MATH-500", "aime24": "AIME 2024", "aime25": "AIME 2025"}


# The settings of the paper's runs, by the keys of this config. The paper prints the labelled set,
# the answers' length, problems a step, learning rate and epochs; the config says what it does not.
_CONFIG = "`configs/qwen3_math.py`"
_LABELLED = "dapo_math_17k"
_STAGE = {"sampling.max_tokens": 16_384, "sampling.temperature": 1.0, "prompts": 64,
          "optim.lr": 1e-6, "lora.rank": 0}
_STEPS = {"teacher_grpo": 2710, "student_grpo": 2710, "teacher_sft": 271, "forward_kl": 271,
          "reverse_kl": 271, "sft": 271}
_TRANSFER = {"forward_kl", "reverse_kl"}
_DECODING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 16_384}
# Of keys that a config or a score may lack, by their last word.
_NEUTRAL = {"temperature": "1.0", "top_p": "1.0", "top_k": "0", "rank": "0", "student_layers": "0",
            "leave_out": ""}
_MOST = 6  # keys by which a line distinguishes two runs

Unlike = dict[str, tuple[str, str]]  # a setting -> its value here, and the one it should have


class Filling(NamedTuple):
  """A group of runs that has a row's arm and models."""
  group: Group
  score: intervals.Interval
  config: dict[str, str]   # flat
  unlike: Unlike           # settings that are not the paper's


class Cells(NamedTuple):
  """One row of a table."""
  arm: str
  teacher: str | None          # None where the row has no teacher
  published: dict[str, tuple[float, float] | None]  # by benchmark: percent, and what is behind +-
  groups: dict[str, list[Filling]]  # by benchmark, where a run has the row's arm and models


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
          "models of the row. † marks a score of other than all problems, of another number of "
          f"samples, or with a setting that {_CONFIG} does not have: the lines below a table say "
          "which. A cell of several runs numbers them. A *difference* is one row minus another, on "
          "the same problems and seeds. Its verdict says whether the interval agrees with the "
          "paper's sign.", ""]


def _cells(row: Mapping[str, Any], groups: Mapping[str, Sequence[Group]]) -> Cells:
  """One row of a table with the groups of runs that fill it."""
  scores = dict(zip(published()["benchmarks"], row["scores"], strict=True))
  filled = {}
  for name, printed in scores.items():
    found = [_filling(row, name, group) for group in groups.get(name, ())]
    # All of them: nothing says which of two runs with unequal steps is the paper's.
    found = [filling for filling in found if filling is not None]
    if printed is not None and found:
      filled[name] = found
  return Cells(row["arm"], row["teacher"], scores, filled)


def _filling(row: Mapping[str, Any], benchmark: str, group: Group) -> Filling | None:
  """A row's score by a group of runs; None where they lack its arm, models or a label."""
  score = group.score(group.headline) if group.label == row["arm"] else None
  if score is None:
    return None
  found = []
  for values in map(dict, sorted(group.contexts(), key=sorted)):
    names = {role: pathlib.PurePath(values.get(role, "")).name.lower()
             for role in ("student", "teacher")}
    # The size of a model that trains or teaches in no stage of the row is open.
    if all(row[role] in (None, name) for role, name in names.items()) and float(
        values.get("label_share", 1)) == 1:
      unlike = _unlike_training(row, group, values) | _unlike_scoring(benchmark, group)
      found.append(Filling(group, score, values, unlike))
  # A shared stage has several configs, of which the one nearest to the paper asked for it too.
  return min(found, key=lambda filling: len(filling.unlike), default=None)


def _stages(group: Group) -> set[str]:
  """The stages behind a group's weights, and those whose steps they take."""
  names = {folder.name.partition("-")[0] for run in group.runs.values() for folder in run.stages}
  # One kind of transfer alone makes the steps of both.
  return names | (_TRANSFER if names & {*_TRANSFER, "sft"} else set())


def _unlike_training(row: Mapping[str, Any], group: Group, values: Mapping[str, str]) -> Unlike:
  """The keys of a run's flat config that `_CONFIG` has otherwise, of the row's stages alone."""
  found = {}
  expected = {"student_layers": 0, "data.leave_out": ""}
  for stage in sorted(_stages(group) & _STEPS.keys()):
    expected |= {f"stages.{stage}.{key}": value for key, value in _STAGE.items()}
    # The stage sft makes the steps of others. The paper prints no steps of a half split.
    halved = row["arm"].startswith("half_") and _equal(
        values.get(f"stages.{stage}.steps"), _STEPS[stage] // 2)
    if stage != "sft" and not halved:
      expected[f"stages.{stage}.steps"] = _STEPS[stage]
  # A score of untrained weights depends on no labelled set.
  if any(run.stages for run in group.runs.values()):
    expected["data.labelled"] = _LABELLED
  template = {key: value for key, value in values.items()
              if key.startswith("template.") and key != "template.date_string"}
  # Llama's template has no thinking, so its argument is not asked for.
  if (row["student"] or row["teacher"]).startswith("qwen"):
    expected["template.enable_thinking"] = False
  expected |= {key: UNSET for key in template.keys() - expected.keys()}
  for key, value in expected.items():
    text = values.get(key, _NEUTRAL.get(key.rpartition(".")[2], UNSET))
    here = text.partition(":")[0] if key == "data.labelled" else text
    if not _equal(here, value):
      found[key] = (text, str(value) or UNSET)
  return found


def _unlike_scoring(benchmark: str, group: Group) -> Unlike:
  """How a group was scored otherwise than the paper, or than `_CONFIG` where it does not say."""
  run = next(iter(group.runs.values()))
  problems, samples = run.samples()["sampled"].correct_PG.shape
  sampling = run.settings["evaluation"]["sampling"]
  here = {key: sampling.get(key, _NEUTRAL.get(key, UNSET)) for key in _DECODING}
  here |= {"problems": problems, "samples": samples}
  expected = _DECODING | {"problems": published()["benchmarks"][benchmark],
                        "samples": published()["samples"]}
  return {f"scored with {key}": (str(here[key]), str(value)) for key, value in expected.items()
          if not _equal(str(here[key]), value)}


def _equal(text: str | None, value: Any) -> bool:
  """Whether the text of a config's value is a value: 1 and 1.0 are one number."""
  if isinstance(value, (bool, str)) or text is None:
    return text == str(value)
  try:
    return float(text) == value
  except ValueError:
    return False


def _table(table: Mapping[str, Any], found: Sequence[Cells]) -> list[str]:
  """A table of the paper's scores and those of runs, and the settings of its marked cells."""
  names = [name for name in published()["benchmarks"]
           if any(cells.published[name] is not None for cells in found)]
  head = ["row", *(f"{_NAMES[name]}: {of}" for name in names for of in ("paper", "here"))]
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  marked: dict[str, list[str]] = {}  # a setting -> the cells that have it
  several = []
  for row, cells in zip(table["rows"], found, strict=True):
    texts = [row["row"]]
    for name in names:
      value, spread = cells.published[name]
      fillings = cells.groups.get(name, ())
      texts += [f"{value:.1f} ± {spread:.1f}", _here(fillings)]
      cell = f"{row['row']} ({_NAMES[name]})"
      for number, filling in enumerate(fillings, 1):
        label = f"{cell} ({number})" if len(fillings) > 1 else cell
        for key, (here, expected) in filling.unlike.items():
          marked.setdefault(f"{_code(f'{key}={here}')}, not {_code(expected)}", []).append(label)
      several += _apart(cell, fillings)
    lines.append("| " + " | ".join(texts) + " |")
  notes = [f"- † {setting}: {'; '.join(labels)}" for setting, labels in marked.items()] + several
  return [*lines, *([""] if notes else []), *notes]


def _here(fillings: Sequence[Filling]) -> str:
  """The scores of a cell's runs, or that there is none."""
  texts = [f"{_percent(filling.score)}{' †' if filling.unlike else ''}" for filling in fillings]
  if len(texts) > 1:
    texts = [f"{text} ({number})" for number, text in enumerate(texts, 1)]
  return "; ".join(texts) or MISSING


def _apart(cell: str, fillings: Sequence[Filling]) -> list[str]:
  """The line that says by which keys the several runs of a cell differ; [] for fewer than two."""
  if len(fillings) < 2:
    return []
  stages = set().union(*(_stages(filling.group) for filling in fillings))
  keys = [key for key in sorted(set().union(*(filling.config for filling in fillings)))
          if len({filling.config.get(key) for filling in fillings}) > 1
          and (not key.startswith("stages.") or key.split(".")[1] in stages)]
  shown = [f"({number}) " + ", ".join(_code(f"{key}={filling.config.get(key, UNSET)}")
                                      for key in keys[:_MOST])
           for number, filling in enumerate(fillings, 1)]
  omitted = f"; and {len(keys) - _MOST} more keys" if len(keys) > _MOST else ""
  said = "; ".join(shown) + omitted if keys else "their configs are equal, their inputs are not"
  return [f"- {cell} has {len(fillings)} runs that differ: {said}"]


def _code(text: str) -> str:
  """A text of a config as code in Markdown, in one line."""
  return "`" + " ".join(text.replace("`", "'").split()) + "`"


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
  teacher = a.teacher or b.teacher or "–"
  start = f"| `{above}` − `{below}` | {teacher} | {_NAMES[benchmark]} | {printed:+.1f} |"
  cells = [cells.groups.get(benchmark, ()) for cells in (a, b)]
  pair = [_chosen(fillings) for fillings in cells]
  if all(cells) and None in pair:
    return f"{start} {SEVERAL} | {SEVERAL} |"
  found = None if None in pair else ladder.compare(*(filling.group for filling in pair))
  if found is None:
    return f"{start} {MISSING} | {MISSING} |"
  mark = " †" if any(filling.unlike for filling in pair) else ""
  return f"{start} {_percent(found.difference)}{mark} | {verdict(found, printed)} |"


def _chosen(fillings: Sequence[Filling]) -> Filling | None:
  """The only runs of a cell, or the only ones with the paper's settings; None where it is open."""
  if len(fillings) == 1:
    return fillings[0]
  alike = [filling for filling in fillings if not filling.unlike]
  return alike[0] if len(alike) == 1 else None


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
