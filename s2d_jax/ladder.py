"""What run folders hold, as the rows of a ladder: arms over training seeds, and their contrasts.

Reads only what the stages left behind. `report` turns it into Markdown, `figures` into a picture.
"""

import collections
from typing import NamedTuple

import numpy as np
from etils import epath

from s2d_jax import files, manifest, stats

SWEPT = {"labels": ("label_share",),  # what a curve may be drawn over: the config keys it moves
         "division": ("stages.forward_kl.steps", "stages.reverse_kl.steps")}
DRAWS = 2000  # of a paired difference under one seed


class Group(collections.namedtuple("Group", "label name runs")):
  """One row of the ladder: an arm as one config makes it, and its runs, one a training seed.

  label: the arm's own; name: with what sets it apart from others of that label; runs: {seed: row}.
  """

  def value_SP(self, statistic="avg"):
    """A statistic ("avg", "greedy" or "pass@k") of each seed and problem, seeds in order."""
    return np.stack([_value_P(self.runs[seed]["result"], statistic) for seed in sorted(self.runs)])

  def score(self, name):
    """The Interval of a score over problems, samples and, where there are several, seeds."""
    if len(self.runs) == 1:
      (run,) = self.runs.values()
      return run["result"]["scores"][name]
    return stats.over_seeds(self.value_SP("avg" if name.startswith("avg@") else name), self.level)

  @property
  def level(self):
    """The share of its intervals that should hold the truth."""
    return next(iter(self.runs.values()))["settings"]["evaluation"]["level"]

  @property
  def avg(self):
    """The name of its avg@k."""
    (run, *_) = self.runs.values()
    return next(name for name in run["result"]["scores"] if name.startswith("avg@"))

  @property
  def seeds(self):
    """Its training seeds, as text."""
    return " ".join(map(str, sorted(self.runs)))

  def of(self, seeds):
    """The Group of some of its seeds."""
    return self._replace(runs={seed: self.runs[seed] for seed in seeds})

  def mean(self, name):
    """Mean over seeds of something spent."""
    return np.mean([run["spent"][name] for run in self.runs.values()])

  def probes(self):
    """For each probed stage, in order, its probes over the seeds that have them."""
    probed = [self.runs[seed]["probes"] for seed in sorted(self.runs) if self.runs[seed]["probes"]]
    return list(zip(*probed, strict=True))

  def distilling(self):
    """`probes` of the stages that learn from a teacher: they are probed after as well."""
    return [probe for probe in self.probes() if probe[0]["after"]]

  def contexts(self):
    """The flat configs that made these runs, seeds aside, as hashable items."""
    return {items for run in self.runs.values() for items in run["contexts"]}


def _value_P(result, statistic):
  if statistic == "greedy":
    return np.asarray(result["greedy"], float)
  correct_PG = np.asarray(result["correct"])
  if statistic == "avg":
    return stats.avg_at_k(correct_PG)
  return stats.mean_pass_at_k(int(statistic.partition("@")[2]))(correct_PG)


def read(workdirs):
  """Every row of every arm under the folders, as dicts, in the order they were made.

  A row has arm, label, seed, result (scores and the matrix), stages (folders behind it), settings
  (all that determines a score but the weights and the seed), recipe (all that determines the
  weights but the seed), shaped (a stage trained the teacher), contexts (the configs that asked for
  it), probes, spent (ledgers added up, and the student's updates) and revisions.

  Raises:
    ValueError: a folder without any finished arm.
  """
  rows = {}
  for workdir in map(epath.Path, workdirs):
    arms = (workdir / "arms").iterdir() if (workdir / "arms").exists() else ()
    # A kill can leave the beginning of a file behind, under another suffix.
    found = sorted((p for p in arms if p.suffix == ".json"), key=lambda p: (p.stat().mtime, p.name))
    if not found:
      raise ValueError(f"{workdir} has no finished arm: run the recipe with --workdir={workdir}.")
    for path in found:
      entry = files.read_json(path)
      for row in entry["rows"]:
        new = _row(workdir, entry, row)
        made = rows.setdefault((row["label"], entry["seed"], row["score"], *row["stages"]), new)
        made["contexts"].add(_flat(entry["config"]))
        made["probes"] = made["probes"] or new["probes"]  # one run may have left them out
  return list(rows.values())


def _row(workdir, entry, row):
  stages = [workdir / name for name in row["stages"]]
  manifests = [files.read_json(f / "manifest.json") for f in (*stages, workdir / row["score"])]
  inputs = [m["inputs"] for m in manifests]
  names = set(row["stages"])
  recipe = [[{k: v for k, v in i.items() if k not in ("seed", "parents")},
             {role: parent for role, parent in i.get("parents", {}).items() if parent not in names}]
            for i in inputs[:-1]]
  base = inputs[-1]["weights"] if not stages else None  # an untrained model's own
  probes = [{"stage": probe["stage"],
             **{when: probe[when] and files.read_json(workdir / probe[when] / "result.json")
                for when in ("before", "after")}}
            for probe in entry["probes"] if probe["stage"] in names]
  return {
      "arm": entry["arm"], "label": row["label"], "seed": entry["seed"], "stages": stages,
      "result": files.read_json(workdir / row["score"] / "result.json"),
      "settings": {k: v for k, v in inputs[-1].items() if k not in ("weights", "seed")},
      "shaped": any(made["row"][2] == "teacher" for made in inputs[:-1]),
      "recipe": manifest.digest([recipe, base]), "contexts": set(), "probes": probes,
      "spent": spent(stages) | _updates(stages, inputs),
      "revisions": {m["revision"] for m in manifests}}


def _updates(stages, inputs):
  """Optimizer updates of the student: under a teacher ("dense"), and under reward ("rewarded")."""
  found = {"dense": 0, "rewarded": 0}
  for folder, made in zip(stages, inputs[:-1], strict=True):
    if made["row"][2] == "student":
      kind = "rewarded" if "advantages" in made["config"] else "dense"
      found[kind] += files.read_json(folder / "ledger.json")["updates"]
  return found


def _flat(config, prefix=""):
  """A nested config as a frozenset of (dotted key, text of its value)."""
  items = set()
  for key, value in config.items():
    items |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {
        (f"{prefix}{key}", str(value))}
  return frozenset(items)


def groups(rows):
  """The rows of one table as Groups, in order: runs that differ in their seed alone are one.

  Of two runs of one group and seed (scored in two work folders, say), the later is kept.
  """
  kept = {}
  for row in rows:
    kept.setdefault((row["label"], row["recipe"]), {})[row["seed"]] = row
  firsts, made = {}, []
  for (label, _), runs in kept.items():
    context = min((c for run in runs.values() for c in run["contexts"]), key=sorted)
    first = firsts.setdefault(label, context)
    apart = sorted(context - first)
    name = label + (f" ({', '.join(f'{k}={v}' for k, v in apart)})" if apart else "")
    made.append(Group(label, name, runs))
  return made


def spent(stages):
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
  return {**sums, "labels_distinct": len({i for entry in ledgers for i in entry["labels"]})}


def tables(rows):
  """(settings, their rows) of each way of scoring: unlike settings never share a table."""
  return [(settings, [row for row in rows if row["settings"] == settings])
          for settings in distinct(row["settings"] for row in rows)]


def distinct(values):
  """The different ones, in the order they came."""
  found = []
  for value in values:
    if value not in found:
      found.append(value)
  return found


class Contrast(NamedTuple):
  """avg@k of one Group less another's, on the same problems and seeds."""
  gap: stats.Interval
  resolvable: float  # `stats.resolvable`
  signs: str         # of each seed
  seeds: tuple


def compare(a, b):
  """The Contrast of two Groups on the seeds they share, or None where they share none."""
  seeds = sorted(a.runs.keys() & b.runs.keys())
  if not seeds:
    return None
  pairs = [[np.array(group.runs[seed]["result"]["correct"]) for group in (a, b)] for seed in seeds]
  gap_SP = np.stack([stats.gaps(*pair, stats.avg_at_k) for pair in pairs])
  if len(seeds) == 1:
    gap = stats.paired_difference(*pairs[0], stats.avg_at_k, seeds[0], DRAWS, a.level)
  else:
    gap = stats.gap_over_seeds(gap_SP, a.level)
  signs = " ".join("+" if g > 0 else "−" if g < 0 else "0" for g in gap_SP.mean(axis=1))
  return Contrast(gap, stats.resolvable(gap_SP, a.level), signs, tuple(seeds))


def curves(made, keys):
  """{label: [(x, Group)]} of arms that were run with several values of `keys` and all else equal.

  x is the value of one key, or the first one's share of the sum of two. The points of a curve have
  the same seeds: those that all of them were run with, where there are any.
  """
  found = {}
  for group in made:
    for context in group.contexts():
      values = dict(context)
      if all(key in values for key in keys):
        number = [float(values[key]) for key in keys]
        x = number[0] if len(keys) == 1 else number[0] / max(sum(number), 1)
        same = sum(number) if len(keys) > 1 else None
        rest = frozenset(item for item in context if item[0] not in keys)
        found.setdefault((group.label, rest, same), {})[x] = group
  return {label: sorted(_alike(points).items()) for (label, *_), points in found.items()
          if len({id(group) for group in points.values()}) > 1}


def _alike(points):
  shared = set.intersection(*(set(group.runs) for group in points.values()))
  return {x: group.of(shared) if shared else group for x, group in points.items()}
