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
MARKS = ("<!-- entries of benchmarks/results/sizes.json -->\n", "<!-- end -->\n")
PROMPT_TOKENS = 2048  # an answer has at most 16,384, as in the configs
# The stages with the largest programs, one of each kind. teacher_sft samples nothing. sft and
# weighted_fkl sample the teacher, as forward_kl does; the latter holds the student's start too.
STAGES = ("teacher_grpo", "forward_kl", "reverse_kl", "student_grpo")
KEY_HEADS = 8  # of all models here: at most as many devices split the heads
RANK = 32  # of adapters, as in configs/qwen3_math.py:one_gpu
# The programs that most settings fail by: the sampler's cache follows from the memory.
UPDATES = frozenset({"update", "gradients", "apply"})


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
  adapters: bool = False  # the stage trains adapters in place of its model's weights


def settings(pair: Pair, devices: int) -> Iterator[Setting]:
  """The settings of a stage in the order in which they are tried, cheap ones first.

  All on the devices, then optimizer and guide on the host. Then heads over twice as many devices:
  each token's step adds up features over those. Adapters come last, because they learn otherwise
  than whole weights do.
  """
  for adapters in (False, True):
    tensor = pair.tensor
    while tensor <= KEY_HEADS and devices % tensor == 0:
      for offload in ("", "optimizer,guide"):
        yield Setting((1, devices // tensor, tensor), offload, adapters)
      tensor *= 2


def fitting(pair: Pair, topology: str, stage: str, folder: pathlib.Path,
            progress: Progress) -> Json:
  """One entry: of the first setting that fits, or of the first where none does.

  The programs of updates are compiled before the others: where they do not fit, nothing else of the
  setting is compiled.
  """
  tried = list(settings(pair, len(topologies.devices(topology))))
  for setting in tried:
    entry = compiled(pair, topology, stage, setting, folder, progress, UPDATES)
    if entry["fits"]:
      entry = compiled(pair, topology, stage, setting, folder, progress)
    print(f"  {setting}: {entry['verdict']}", file=sys.stderr, flush=True)
    if entry["fits"]:
      return entry
  return compiled(pair, topology, stage, tried[0], folder, progress)


def compiled(pair: Pair, topology: str, stage: str, setting: Setting, folder: pathlib.Path,
             progress: Progress, names: frozenset[str] | None = None) -> Json:
  """A stage's programs in one setting, as preflight compiles them.

  Args:
    progress: has earlier programs.
    names: of the programs to compile; None: all.
  """
  start = time.monotonic()
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
  if setting.adapters:
    config.stages[stage].lora.rank = RANK
  entry = {"student": pair.student, "teacher": pair.teacher, "topology": topology, "stage": stage,
           "mesh": list(config.mesh), "offload": setting.offload, "adapters": setting.adapters,
           "microbatches": config.stages[stage].microbatches, "revision": manifest.revision(),
           "jax": jax.__version__, "memory": chip.usable}
  target = programs.Target(chip, scores=False, programs=names)
  with jax.set_mesh(sharding.make_mesh(config.mesh, devices)):
    found = list(preflight.costs_of(config, target, progress))
  return entry | {"seconds": time.monotonic() - start, **facts(found, chip)}


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
      mesh = " × ".join(map(str, entry["mesh"]))
      if entry.get("offload"):
        mesh += f", offload {entry['offload']}"
      if entry.get("adapters"):
        mesh += f", adapters of rank {RANK}"
      lines.append(f"| {entry['topology']} | {mesh} | {entry['stage']} | {entry['verdict']} | "
                   f"{_step(entry)} | {entry['revision'][:7]}, {entry['jax']} |")
    lines.append("")
  return "\n".join(lines)


def _step(entry: Json) -> str:
  """The least seconds of a step, and of each program with its bound."""
  parts = entry.get("step")
  # Without a program that the compiler refused the sum would be too short.
  if not parts or entry["bytes"] is None:
    return "–"
  total = sum(part["seconds"] for part in parts.values())
  each = ", ".join(f"{name} {part['seconds']:,.0f} ({part['bound']})"
                   for name, part in parts.items())
  return f"{total:,.0f}: {each}"


def page(text: str, stored: Sequence[Json]) -> str:
  """The page with the table of the entries between its marks."""
  before, old = text.split(MARKS[0])
  _, after = old.split(MARKS[1])
  return f"{before}{MARKS[0]}\n{table(stored)}{MARKS[1]}{after}"


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
