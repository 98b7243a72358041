"""The table of docs/sizes.md: which stages fit which chips, by compiled programs.

  python -m benchmarks.sizes                 every entry that this environment compiles for
  python -m benchmarks.sizes --only=h100:8   those of one topology
  python -m benchmarks.sizes --refused       all but the stored ones that fit
  python -m benchmarks.sizes --render        the page again, from the stored entries

An entry is one stage on one topology, with the first of `settings` that fits. It is stored when it
is finished, and one of this revision is not compiled again without --again. GPUs and TPUs need an
environment each (docs/run.md).
"""

import argparse
import collections
import json
import math
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from benchmarks import measure
from benchmarks.measure import Json
from configs import arithmetic, llama_math, qwen3_math
from s2d_jax import chips, files, manifest, models, preflight, sharding
from s2d_jax.errors import InputError
from s2d_jax.preflight import programs, topologies, verdicts
from s2d_jax.preflight.costs import Cost
from s2d_jax.preflight.pool import Progress

RESULT = measure.RESULTS / "sizes.json"
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "sizes.md"
SUMMARY = "<!-- summary of benchmarks/results/sizes.json -->\n"
ENTRIES = "<!-- entries of benchmarks/results/sizes.json -->\n"
END = "<!-- end -->\n"
PROMPT_TOKENS = 2048  # an answer has at most 16,384, as in the configs
# The stages with the largest programs, one of each kind. teacher_sft samples nothing. sft and
# weighted_fkl sample the teacher, as forward_kl does; the latter holds the student's start too.
STAGES = ("teacher_grpo", "forward_kl", "reverse_kl", "student_grpo")
KEY_HEADS = 8  # of all models here: at most as many devices split the heads
RANK = 32  # of adapters, as in configs/qwen3_math.py:one_gpu


class Pair(NamedTuple):
  """A student and its teacher, by names of `models.PUBLISHED`."""
  student: str
  teacher: str
  topologies: tuple[str, ...]  # in the order of their worth
  # Devices that the heads are split over where the teacher is sampled: the copy for decoding is
  # whole on each device of `fsdp`, and 70 B parameters do not fit one.
  tensor: int = 1

  def config(self, folder: pathlib.Path) -> ConfigDict:
    """The published recipe on folders with config.json and a tokenizer alone."""
    module = llama_math if self.student.startswith("llama") else qwen3_math
    config = module.get_config(f"models={folder},data={folder}")
    for role, name in (("student", self.student), ("teacher", self.teacher)):
      config[role] = str(folder / name)
      if not (folder / name).exists():
        shutil.copytree(arithmetic.get_config().teacher, folder / name,
                        ignore=shutil.ignore_patterns("*.safetensors"))
        files.write_json(str(folder / name / "config.json"), models.PUBLISHED[name])
        # An argument that a template does not read is refused, and this one's is Qwen3's.
        with open(folder / name / "chat_template.jinja", "a", encoding="utf-8") as template:
          template.write("{%- if enable_thinking is defined %}{% endif -%}")
    config.prompt_tokens = PROMPT_TOKENS
    return config


_QWEN = ("h100:8", "v5p:2x2x4", "h200", "h200:8", "v6e:4x4", "v5e:4x4", "h100", "v5e:8x8")
PAIRS = (
    Pair("qwen3-1.7b", "qwen3-8b", _QWEN), Pair("qwen3-1.7b", "qwen3-14b", _QWEN),
    Pair("llama-3.1-8b", "llama-3.3-70b",
         ("h100:8", "v5p:4x4x4", "h100:64", "v5p:2x2x4", "v6e:8x8", "v6e:4x4"), tensor=8))


class Setting(NamedTuple):
  """How a stage is placed on a topology."""
  mesh: tuple[int, int, int]
  offload: str  # config.offload
  adapters: int = 0  # the rank of adapters that the stage trains; 0: the model's weights


def settings(pair: Pair, devices: int) -> Iterator[Setting]:
  """The settings of a stage in the order in which they are tried.

  All on the devices, then optimizer and guide on the host. Then both again with heads over twice as
  many devices: each token's step adds up features over those. Adapters come last, because they are
  another experiment.
  """
  for adapters in (0, RANK):
    tensor = pair.tensor
    while tensor <= KEY_HEADS and devices % tensor == 0:
      for offload in ("", "optimizer,guide"):
        yield Setting((1, devices // tensor, tensor), offload, adapters)
      tensor *= 2


def fitting(pair: Pair, topology: str, stage: str, folder: pathlib.Path,
            progress: Progress) -> Json:
  """One entry: of the first setting that fits, or of the first where none does.

  The programs of updates are compiled before the others. A sampler without memory for its cache is
  refused without compilation, and one that has memory takes what is free, so an update is what may
  still fail. Where no setting fits, all programs of the first are compiled, and its verdict names
  the largest.
  """
  start = time.monotonic()
  tried = list(settings(pair, len(topologies.devices(topology))))
  for setting in tried:
    entry = compiled(pair, topology, stage, setting, folder, progress, programs.UPDATES)
    if entry["fits"]:
      entry = compiled(pair, topology, stage, setting, folder, progress)
    print(f"  {setting}: {entry['verdict']}", file=sys.stderr, flush=True)
    if entry["fits"]:
      break
  else:
    entry = compiled(pair, topology, stage, tried[0], folder, progress)
  return entry | {"tried": tried.index(setting) + 1, "seconds": time.monotonic() - start}


def compiled(pair: Pair, topology: str, stage: str, setting: Setting, folder: pathlib.Path,
             progress: Progress, names: frozenset[str] | None = None) -> Json:
  """A stage's programs in one setting, as preflight compiles them.

  Args:
    progress: has earlier programs.
    names: of the programs to compile; None: all.
  """
  config = pair.config(folder)
  devices = topologies.devices(topology)
  chip = topologies.chip(topology)
  config.mesh = setting.mesh
  config.offload = setting.offload
  shards = setting.mesh[0] * setting.mesh[1]
  for name, hp in config.stages.items():
    if name != stage:
      hp.steps = 0
    # One row of a microbatch for each shard, or as many as there are.
    rows = hp.prompts * hp.sampling.samples_per_prompt // hp.minibatches
    hp.microbatches = max(rows // shards, 1)
  config.stages[stage].lora.rank = setting.adapters
  entry = {"student": pair.student, "teacher": pair.teacher, "topology": topology, "stage": stage,
           "mesh": list(config.mesh), "offload": setting.offload, "adapters": setting.adapters,
           "microbatches": config.stages[stage].microbatches, "revision": manifest.revision(),
           "jax": jax.__version__, "memory": chip.usable}
  target = programs.Target(chip, scores=False, programs=names)
  with jax.set_mesh(sharding.make_mesh(config.mesh, devices)):
    found = list(preflight.costs_of(config, target, progress))
  return entry | facts(found, chip)


def facts(found: Sequence[Cost], chip: chips.Chip) -> Json:
  """The verdict on a stage's programs, the largest, and the least seconds of each in a step."""
  largest = max(found, key=lambda cost: cost.bytes if cost.account else math.inf)
  return {
      "fits": verdicts.fits(found, chip.usable), "verdict": verdicts.verdict(found, chip.usable),
      "program": largest.program, "bytes": largest.bytes if largest.account else None,
      "step": {cost.program: {"seconds": cost.runs * cost.least.seconds, "bound": cost.least.bound}
               for cost in found if cost.least is not None and cost.runs}}


def missing(stored: Sequence[Json], only: str, again: bool,
            refused: bool = False) -> Iterator[tuple[Pair, str, str]]:
  """The entries that are still to be compiled, of topologies whose name matches `only`.

  Args:
    again: finished ones of this revision too.
    refused: leaves out the stored ones that fit.
  """
  revision = manifest.revision()
  names = ("student", "teacher", "topology", "stage")
  finished = {tuple(entry[name] for name in names) for entry in stored
              if entry["fits"] and refused or entry["revision"] == revision and not again}
  for pair in PAIRS:
    for topology in pair.topologies:
      for stage in STAGES:
        key = (pair.student, pair.teacher, topology, stage)
        if re.fullmatch(only or ".*", topology) and key not in finished:
          yield pair, topology, stage


def stored_with(stored: Sequence[Json], entry: Json) -> list[Json]:
  """The entries with a new one in the place of an older one of the same stage and topology."""
  def order(entry: Json) -> tuple[int, ...]:
    (pair,) = [pair for pair in PAIRS
               if (pair.student, pair.teacher) == (entry["student"], entry["teacher"])]
    return (PAIRS.index(pair), pair.topologies.index(entry["topology"]),
            STAGES.index(entry["stage"]))

  others = [old for old in stored if order(old) != order(entry)]
  return sorted([*others, entry], key=order)


def table(stored: Sequence[Json]) -> str:
  """The entries as Markdown, a table for each pair of models."""
  lines: list[str] = []
  for pair in PAIRS:
    found = [entry for entry in stored
             if (entry["student"], entry["teacher"]) == (pair.student, pair.teacher)]
    if not found:
      continue
    lines += [f"## {pair.student} from {pair.teacher}", "",
              "| chips | setting | stage | verdict | least seconds of a step | revision, jax |",
              "|---|---|---|---|---|---|"]
    for entry in found:
      lines.append(f"| {entry['topology']} | {_setting(entry)} | {entry['stage']} | "
                   f"{_verdict(entry)} | {_step(entry)} | {_revision(entry)}, {entry['jax']} |")
    lines.append("")
  return "\n".join(lines)


def _setting(entry: Json) -> str:
  """A setting in words."""
  words = [" × ".join(map(str, entry["mesh"]))]
  if entry.get("offload"):
    words.append(f"offload {entry['offload']}")
  if entry.get("adapters"):
    words.append(f"adapters of rank {entry['adapters']}")
  return ", ".join(words)


def _verdict(entry: Json) -> str:
  """The verdict; where it is that of the first of several settings, their number too."""
  if entry["fits"]:
    return entry["verdict"]
  return f"none of {entry['tried']} settings fits. The first {entry['verdict']}"


def _revision(entry: Json) -> str:
  """The first digits of a revision, with the mark of an edited checkout."""
  return entry["revision"][:7] + "+" * entry["revision"].endswith("+")


def summary(stored: Sequence[Json]) -> str:
  """A Markdown table of chips and pairs: the setting and least seconds of each stage."""
  cells = collections.defaultdict(list)
  for entry in stored:
    cells[entry["topology"], entry["student"], entry["teacher"]].append(entry)
  found = {topology for topology, _, _ in cells}
  names = [name for name in dict.fromkeys(name for pair in PAIRS for name in pair.topologies)
           if name in found]
  lines = ["| chips | " + " | ".join(f"{pair.student} from {pair.teacher}" for pair in PAIRS)
           + " |", "|---" * (1 + len(PAIRS)) + "|"]
  for topology in names:
    row = [_cell(cells[topology, pair.student, pair.teacher]) for pair in PAIRS]
    lines.append(f"| {topology} | " + " | ".join(row) + " |")
  return "\n".join(lines)


def _cell(entries: Sequence[Json]) -> str:
  """Stages with their least seconds by setting; a dash where nothing was compiled."""
  stages = collections.defaultdict(list)
  for entry in entries:
    if entry["fits"]:
      stages[_setting(entry)].append(f"{entry['stage']} ({_seconds(entry):,.0f})")
    else:
      stages["**no setting**"].append(entry["stage"])
  return "<br>".join(f"{', '.join(names)}: {setting}" for setting, names in stages.items()) or "–"


def _seconds(entry: Json) -> float:
  """The least seconds of a step."""
  return sum(part["seconds"] for part in entry["step"].values())


def _step(entry: Json) -> str:
  """The least seconds of a step, and of each program with its bound."""
  parts = entry.get("step")
  # Without a program that the compiler refused the sum would be too short.
  if not parts or entry["bytes"] is None:
    return "–"
  each = ", ".join(f"{name} {part['seconds']:,.0f} ({part['bound']})"
                   for name, part in parts.items())
  return f"{_seconds(entry):,.0f}: {each}"


def page(text: str, stored: Sequence[Json]) -> str:
  """The page with the summary and the table of the entries, each between its mark and an end."""
  for mark, new in ((SUMMARY, summary(stored) + "\n\n"), (ENTRIES, table(stored))):
    before, old = text.split(mark)
    text = f"{before}{mark}\n{new}{END}{old.split(END, 1)[1]}"
  return text


def main(argv: Sequence[str] | None = None) -> None:
  """Compiles the missing entries, stores each, and renders the page."""
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument("--only", default="", help="a topology, or a regular expression of several")
  flags.add_argument("--again", action="store_true", help="compile stored entries too")
  flags.add_argument("--refused", action="store_true", help="leave out stored entries that fit")
  flags.add_argument("--render", action="store_true", help="compile nothing")
  args = flags.parse_args(argv)
  stored = json.loads(RESULT.read_text()) if RESULT.exists() else []
  # Entries of a topology share programs, such as the student's samplers. The text of a program does
  # not name the chip.
  progress = collections.defaultdict(Progress)
  with tempfile.TemporaryDirectory() as folder:
    for pair, topology, stage in (
        () if args.render else missing(stored, args.only, args.again, args.refused)):
      try:
        topologies.devices(topology)
      except InputError as error:  # a package of the other environment
        print(f"{topology}: {error}", file=sys.stderr)
        continue
      print(f"{pair.student} from {pair.teacher}, {topology}, {stage}", file=sys.stderr, flush=True)
      entry = fitting(pair, topology, stage, pathlib.Path(folder), progress[topology])
      stored = stored_with(stored, entry)
      RESULT.write_text(json.dumps(stored, indent=1) + "\n")
  PAGE.write_text(page(PAGE.read_text(), stored))


if __name__ == "__main__":
  main()
