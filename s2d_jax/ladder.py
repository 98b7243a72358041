"""Run folders as the rows of a ladder: arms over training seeds, and their contrasts.

Reads only finished folders. `report` turns the rows into Markdown, `figures` into a picture.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from s2d_jax import files, intervals, manifest, stats
from s2d_jax.errors import InputError

# The config keys that a curve is drawn over.
SWEPT = {"labels": ("label_share",),
         "division": ("stages.forward_kl.steps", "stages.reverse_kl.steps")}
# Blocks of a config that train nothing; "eval_every" of a stage and the last two are of old runs.
_SCORING = ("evals", "evaluation", "validation")
DRAWS = 2000  # of a bootstrap that the report itself makes
FEW_MIXED_GROUPS = 0.5  # below this share of groups with both right and wrong answers, warn
FEW_WEIGHTED = 0.5  # below this share of sequences with any weight, warn


class Run(NamedTuple):
  """One line of one arm's table, of one training seed and one evaluation."""
  arm: str
  label: str
  seed: int
  result: dict[str, Any]      # the scores and the samples behind them
  stages: list[epath.Path]    # folders behind the weights
  settings: dict[str, Any]    # all that determines a score but the weights and the seed
  recipe: str                 # a hash of all that determines the weights but the seed
  shaped: bool                # whether a stage trained the teacher, or no stage learns from one
  contexts: set[frozenset]    # the flat configs that asked for it, evaluations left out
  # of each probed stage: its name, its samples of a problem ("group"), "before" and "after"
  probes: list[dict[str, Any]]
  spent: dict[str, float]     # the stages' ledgers added up, and the student's updates
  revisions: set[str]         # of the code

  def samples(self) -> dict[str, stats.Samples]:
    """The samples behind the scores, by way of sampling."""
    if "samples" not in self.result:
      # Written by an earlier version: the two matrices of right and wrong, and nothing else.
      greedy_P1 = np.array(self.result["greedy"])[:, None]
      return {"sampled": stats.Samples(np.array(self.result["correct"])),
              "greedy": stats.Samples(greedy_P1)}
    return {way: stats.Samples(**{field: np.array(rows) for field, rows in fields.items()})
            for way, fields in self.result["samples"].items()}


class Group(NamedTuple):
  """One row of the ladder: an arm of one config, and its runs, one a training seed."""
  label: str             # the arm's own
  name: str              # the label with the keys that set it apart from others of that label
  runs: dict[int, Run]   # by seed

  def value_SP(self, name: str | None = None) -> np.ndarray:
    """A score of each seed and problem, seeds in order; by default the headline's."""
    name = name or self.headline
    return np.stack([stats.value_P(name, self.runs[seed].samples()) for seed in sorted(self.runs)])

  def score(self, name: str) -> intervals.Interval | None:
    """The Interval of a score over problems, samples and, where there are several, seeds.

    None where a run was scored before the samples had what the statistic reads.
    """
    if not all(stats.computable(name, run.samples()) for run in self.runs.values()):
      return None
    if len(self.runs) > 1:
      return stats.score_over_seeds(name, self.value_SP(name), self.level)
    (run,) = self.runs.values()
    stored = intervals.Interval(*run.result["scores"].get(name, (0, 0, 0)))
    if stored.low < stored.high:
      return stored
    # A statistic that joined the table after the run was scored, or equal values of all problems,
    # to whose interval an older rule gave no width.
    return stats.score(name, run.samples(), run.seed, DRAWS, self.level)

  @property
  def level(self) -> float:
    """The share of its intervals that should hold the truth."""
    return next(iter(self.runs.values())).settings["evaluation"]["level"]

  @property
  def headline(self) -> str:
    """The name of its headline score, avg@k."""
    return stats.headline(next(iter(self.runs.values())).result["scores"])

  @property
  def seeds(self) -> str:
    """Its training seeds, as text."""
    return " ".join(map(str, sorted(self.runs)))

  def of(self, seeds: Iterable[int]) -> "Group":
    """The Group of some of its seeds."""
    return self._replace(runs={seed: self.runs[seed] for seed in seeds})

  def mean(self, name: str) -> float:
    """Mean over seeds of one kind of spending."""
    return np.mean([run.spent[name] for run in self.runs.values()])

  def probes(self) -> list[tuple[dict[str, Any], ...]]:
    """For each probed stage, in order, its probes over the seeds that have them."""
    probed = [self.runs[seed].probes for seed in sorted(self.runs) if self.runs[seed].probes]
    return list(zip(*probed, strict=True))

  def distilling(self) -> list[tuple[dict[str, Any], ...]]:
    """`probes` of the stages that learn from a teacher: they are probed after as well."""
    return [probe for probe in self.probes() if probe[0]["after"]]

  def contexts(self) -> set[frozenset]:
    """The flat configs that made these runs, seeds aside, as hashable items."""
    return {items for run in self.runs.values() for items in run.contexts}


def read(workdirs: Iterable[epath.PathLike]) -> list[Run]:
  """Every Run of every arm under the folders, in the order in which they finished.

  Raises:
    InputError: a folder that is not there, or that has no finished arm, or a damaged file.
  """
  rows: dict[tuple, Run] = {}
  manifests: dict[epath.Path, dict] = {}
  def checked(folder: epath.Path) -> dict:
    # Arms share stages, whose files are compared once. The report is the work of one process.
    if folder not in manifests:
      manifests[folder] = manifest.load(folder)
      manifest.check_files(folder, weights=False, together=False)
    return manifests[folder]

  for workdir in map(epath.Path, workdirs):
    if not workdir.is_dir():
      raise InputError(f"{workdir} is not a folder: name the --workdir of a run.")
    # A kill can leave the beginning of a file behind, under another suffix.
    found = [p for p in files.finished_files(workdir / "arms") if p.suffix == ".json"]
    if not found:
      raise InputError(f"{workdir} has no finished arm: run the recipe with --workdir={workdir}.")
    remedy = "delete it, and the command of its run writes it again"
    entries = {path: files.read_json(path, remedy) for path in found}
    # In the order of finishing: the first run of an arm names it, later ones by their differences.
    # An entry of an earlier version has no number, and its file's age is all there is.
    for path in sorted(found, key=lambda p: (entries[p].get("number", -1), p.stat().mtime, p.name)):
      entry = entries[path]
      for row in entry["rows"]:
        new = _run(workdir, entry, row, checked)
        key = (new.label, new.seed, row["score"], *row["stages"])
        run = rows.setdefault(key, new)
        run.contexts.add(flat(entry["config"]))
        if not run.probes:  # one run may have left them out
          rows[key] = run._replace(probes=new.probes)
  return list(rows.values())


def _run(workdir: epath.Path, entry: dict[str, Any], row: dict[str, Any],
         checked: Callable[[epath.Path], dict]) -> Run:
  """The Run of a row of an arm's file; `checked` reads a folder's manifest and compares its files.
  """
  stages = [workdir / name for name in row["stages"]]
  manifests = [checked(folder) for folder in (*stages, workdir / row["score"])]
  *inputs, scored = [m["inputs"] for m in manifests]
  names = set(row["stages"])
  # Two seeds of one recipe differ in the names of their parents, which are hashes of the seed too.
  recipe = [[{k: v for k, v in i.items() if k not in ("seed", "parents")},
             {role: parent for role, parent in i.get("parents", {}).items() if parent not in names}]
            for i in inputs]
  base = None if stages else scored["weights"]  # an untrained model's own
  sizes = {folder.name: i["config"].get("sampling", {}).get("samples_per_prompt")
           for folder, i in zip(stages, inputs, strict=True)}
  probes = [{"stage": probe["stage"], "group": sizes[probe["stage"]],
             **{when: probe[when] and _probe_result(workdir / probe[when], checked)
                for when in ("before", "after")}}
            for probe in entry["probes"] if probe["stage"] in names]
  return Run(
      arm=entry["arm"], label=row["label"], seed=entry["seed"], stages=stages,
      result=files.read_json(workdir / row["score"] / "result.json"),
      settings={k: v for k, v in scored.items() if k not in ("weights", "seed")},
      shaped=(any(i["row"]["learner"] == "teacher" for i in inputs)
              or not any("teacher" in (i["row"]["actor"], i["row"]["guide"]) for i in inputs)),
      recipe=manifest.digest([recipe, base]), contexts=set(), probes=probes,
      spent=spent(stages) | _updates(stages, inputs),
      revisions={m["revision"] for m in manifests})


def _probe_result(folder: epath.Path, checked: Callable[[epath.Path], dict]) -> dict[str, Any]:
  checked(folder)
  return files.read_json(folder / "result.json")


def _updates(stages: Sequence[epath.Path], inputs: Sequence[dict[str, Any]]) -> dict[str, int]:
  """Optimizer updates of the student: under a teacher ("dense"), and under reward ("rewarded")."""
  found = {"dense": 0, "rewarded": 0}
  for folder, stage_inputs in zip(stages, inputs, strict=True):
    if stage_inputs["row"]["learner"] == "student":
      kind = "rewarded" if "advantages" in stage_inputs["config"] else "dense"
      found[kind] += files.read_json(folder / "ledger.json")["updates"]
  return found


def flat(config: Mapping[str, Any], prefix: str = "") -> frozenset[tuple[str, str]]:
  """A nested config as a frozenset of (dotted key, text of its value), evaluations left out."""
  items = set()
  for key, value in config.items():
    name = f"{prefix}{key}"
    # `Run.settings` has all that a score depends on: a further benchmark sets no arm apart.
    if name in _SCORING or key == "eval_every":
      continue
    if isinstance(value, dict):
      items |= flat(value, f"{name}.")
    else:
      items.add((name, str(value)))
  return frozenset(items)


def groups(rows: Iterable[Run]) -> list[Group]:
  """The runs of one table as Groups, in order: runs that differ in their seed alone are one.

  Of two runs of one group and seed (scored in two work folders, say), the later is taken.
  """
  by_recipe: dict[tuple[str, str], dict[int, Run]] = {}
  # The label and the hash of the recipe, and not the arm: "untrained" has rows of several weights.
  for run in rows:
    by_recipe.setdefault((run.label, run.recipe), {})[run.seed] = run
  firsts: dict[str, frozenset] = {}
  found = []
  for (label, _), runs in by_recipe.items():
    # A shared stage has several contexts: the least one, so that the name is always the same.
    context = min((c for run in runs.values() for c in run.contexts), key=sorted)
    first = firsts.setdefault(label, context)
    apart = ", ".join(f"{key}={value}" for key, value in sorted(context - first))
    found.append(Group(label, f"{label} ({apart})" if apart else label, runs))
  return found


def spent(stages: Iterable[epath.Path]) -> dict[str, float]:
  """The ledgers of several stages added up, as if nothing outside them had been shared.

  A label that two of them used is one distinct label. Samples that a stage found there already,
  drawn for another arm, count as its own; only the device-seconds are those that were used.
  """
  ledgers = [files.read_json(f / "ledger.json") for f in stages]
  names = ("label_uses", "tokens_sampled", "tokens_trained", "tokens_guide", "flops",
           "device_seconds_used", "device_seconds_lost")
  sums = {name: sum(entry[name] for entry in ledgers) for name in names}
  sums["tokens_sampled"] += sum(entry["tokens_reused"] for entry in ledgers)
  sums["flops"] += sum(entry["flops_reused"] for entry in ledgers)
  # A set, because a label that two stages read is one label that somebody had to check.
  return {**sums, "labels_distinct": len({i for entry in ledgers for i in entry["labels"]})}


def tables(rows: Sequence[Run]) -> list[tuple[dict[str, Any], list[Run]]]:
  """(settings, their runs) of each way of scoring: unlike settings never share a table."""
  return [(settings, [run for run in rows if run.settings == settings])
          for settings in distinct(run.settings for run in rows)]


def distinct(values: Iterable[Any]) -> list[Any]:
  """The values without repetitions, in order."""
  found = []
  for value in values:
    if value not in found:
      found.append(value)
  return found


class Contrast(NamedTuple):
  """The headline score of one Group minus another's, on the same problems and seeds."""
  difference: intervals.Interval
  resolvable: float  # `intervals.resolvable`
  signs: str         # of each seed
  seeds: tuple[int, ...]


def compare(a: Group, b: Group) -> Contrast | None:
  """The Contrast of two Groups on the seeds they share, or None where they share no seed."""
  seeds = sorted(a.runs.keys() & b.runs.keys())
  if not seeds:
    return None
  # Problem by problem and seed by seed: what both arms share cancels in the difference.
  pairs = list(zip(a.of(seeds).value_SP(), b.of(seeds).value_SP(), strict=True))
  gap_SP = np.stack([intervals.gaps(*pair) for pair in pairs])
  difference = intervals.difference(gap_SP, seeds[0], DRAWS, a.level)
  signs = " ".join("+" if g > 0 else "−" if g < 0 else "0" for g in gap_SP.mean(axis=1))
  return Contrast(difference, intervals.resolvable(gap_SP, a.level), signs, tuple(seeds))


def curves(rows: Iterable[Group], keys: Sequence[str]) -> dict[str, list[tuple[float, Group]]]:
  """{label: [(x, Group)]} of arms that were run with several values of `keys`, all else equal.

  x is the value of one key, or the first one's share of the sum of two. The points of a curve have
  the same seeds: those that all of them were run with, where there are any.
  """
  found = {}
  for group in rows:
    for context in group.contexts():
      values = dict(context)
      if all(key in values for key in keys):
        numbers = [float(values[key]) for key in keys]
        x = numbers[0]
        total = None
        # Two keys divide a sum, and a curve is of one sum.
        if len(keys) > 1:
          total = sum(numbers)
          x = numbers[0] / max(total, 1)
        others = frozenset(item for item in context if item[0] not in keys)
        found.setdefault((group.label, others, total), {})[x] = group
  return {label: sorted(_alike(points).items()) for (label, *_), points in found.items()
          if len({id(group) for group in points.values()}) > 1}


def _alike(points: Mapping[float, Group]) -> dict[float, Group]:
  """The points of a curve, each of the seeds that all of them have, where there are any."""
  shared = set.intersection(*(set(group.runs) for group in points.values()))
  return {x: group.of(shared) if shared else group for x, group in points.items()}


def mixed_P(found: Mapping[str, Any], group: int | None) -> np.ndarray:
  """The chance that `group` samples of a problem are neither all right nor all wrong, [P].

  1 − p^g − (1 − p)^g for the share p of right samples: unbiased where the probe has g samples of a
  problem, and with the probe's own share where it has fewer.

  Args:
    found: a probe's measurements of the learner; group: g, the samples of a problem in its stage.
      Where g or the single answers are not there, g is `config.probe.group`.
  """
  if group is None or "correct" not in found:
    return np.array(found["mixed_prompts"])
  correct_PG = np.array(found["correct"])
  G = correct_PG.shape[1]
  right_P = correct_PG.sum(axis=1)
  if group > G:
    p_P = right_P / G
    return 1 - p_P**group - (1 - p_P)**group
  # At least one is right and at least one is wrong, unless all are alike.
  return stats.pass_at_k(G, right_P, group) + stats.pass_at_k(G, G - right_P, group) - 1


def warnings(mixed_groups: float | None = None, teacher_trained: bool = True,
             teacher_gain: tuple[float, str] | None = None) -> Iterator[str]:
  """Yields a sentence for each precondition of the method that does not hold.

  Args:
    mixed_groups: the mean of `mixed_P` over the probe's problems, at the start of a rewarded stage.
    teacher_trained: whether a reward or solutions have changed the teacher, if there is one.
    teacher_gain: the trained teacher's pass rate minus the untrained one's, and its text.
  """
  if mixed_groups is not None and mixed_groups < FEW_MIXED_GROUPS:
    yield (f"began with {100 * mixed_groups:.0f} % mixed groups, which have right and wrong "
           "answers: all others teach nothing")
  if not teacher_trained:
    yield ("its teacher is the untouched one, which no reward or solution has trained: nothing "
           "brings it nearer to condition C1 (docs/arms.md)")
  if teacher_gain is not None and teacher_gain[0] <= 0:
    yield f"the teacher did not improve ({teacher_gain[1]} points)"
