"""`s2d-jax run`: trains and scores the arms of a config, and prints the report.

`s2d-jax doctor` plans a config as `run` does, and prints the plan's facts. Exit codes of a run:

  0: done.
  1: a stage failed.
  2: the request is wrong; a sentence on standard error says why.
  75: stopped and saved, or another process vanished; the same command continues.
  128 + N: ended by signal N. 130, 143: by a second Ctrl-C or SIGTERM, without saving. 137: killed,
    as by the system where memory is short. 134: aborted by a library.
"""

import sys

from s2d_jax import supervisor

if __name__ == "__main__":
  supervisor.begin(sys.argv[1:])  # before the imports below, which take seconds

import argparse
import importlib.metadata
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from s2d_jax import (
  checksums,
  command,
  hosts,
  keys,
  manifest,
  program_cache,
  recipe,
  report,
  sharding,
  stops,
  sweep,
  tasks,
  walk,
)
from s2d_jax.errors import InputError
from s2d_jax.planning import Plan


def main(argv: Sequence[str]) -> None:
  """Runs every arm of the config, or of every config of a sweep, and prints the report.

  Raises:
    InputError: the request is wrong; the message is one sentence.
    FloatingPointError: a stage failed.
  """
  parser = command.config_parser(
      "run", "Trains and scores the arms of a config.",
      "s2d-jax run --config=configs/arithmetic.py:tiny --workdir=runs/tiny")
  parser.add_argument("--workdir", required=True, help="the folder that keeps what is done")
  parser.add_argument("--plan", action="store_true",
                      help="print the runs and count their stages; train nothing")
  parser.add_argument("--redo", metavar="NAME", action="append", default=[],
                      help="a folder of the workdir to make again, because its files are damaged")
  parser.add_argument("--distributed", action="store_true",
                      help="this is one process of several, such as a TPU slice's")
  config, args = command.parse_config(parser, argv)
  # Joined first, because most calls of jax start the devices, and then of this process alone.
  with stops.watch(command.outcome, joins=args.distributed):
    _run(config, args)


def _run(config: ConfigDict, args: argparse.Namespace) -> None:
  """`main` behind its flags, while signals and the other processes are watched."""
  _set_up_process()
  if hosts.leader() and not args.plan:
    command.check_workdir(args.workdir)
  configs = sweep.expand(config)
  plans = [recipe.plan(one, tasks.get(one)) for one in configs]
  with keys.prefixed("config."):
    mesh = sharding.make_mesh(configs[0].mesh)
  hosts.check_start(_facts(config, plans, args))
  # A plan writes and moves nothing.
  if not args.plan:
    recipe.check_devices(configs[0])
    hosts.check_shared(args.workdir)
    manifest.set_aside(args.workdir, args.redo)
  # Every run of a sweep is checked before the first one trains.
  for plan in plans:
    walk.check_folders(plan, args.workdir)
  if args.plan:
    print("\n".join(sweep.outline(plans, config.get("sweep", ({},)), args.workdir)))
    return
  # Runs of a sweep share programs too.
  with jax.set_mesh(mesh), program_cache.opened(configs[0].compilation_cache):
    for plan in plans:
      walk.run(plan, args.workdir)
  if hosts.leader():
    print(report.write([args.workdir]))


def _facts(config: ConfigDict, plans: Sequence[Plan], args: argparse.Namespace) -> dict[str, str]:
  """All that must be equal on every process, by name, as texts."""
  facts = {f"config.{key}": str(value) for key, value in config.to_dict().items()
           if key != "stages"}
  for name, hp in config.stages.items():
    facts |= {f"config.stages.{name}.{key}": str(value) for key, value in hp.to_dict().items()}
  facts |= {"--workdir": str(args.workdir), "--plan": str(args.plan),
            "--redo": ", ".join(args.redo)}
  for split in sorted({split for plan in plans for split in plan.sets}):
    # The runs of a sweep may have different problems.
    digests = [plan.sets[split]["sha256"] for plan in plans if split in plan.sets]
    facts[f"data.{split}"] = ", ".join(digests)
  # A stage's name is a hash of its models too.
  facts["stages"] = ", ".join(name for plan in plans for name in plan.nodes)
  facts["packages"] = str({name: importlib.metadata.version(name) for name in manifest.PACKAGES})
  facts["python"] = platform.python_version()
  return facts | {"revision": manifest.revision(), "source": _source()}


def _source() -> str:
  """SHA-256 of the package's source files: two edited checkouts may have one revision."""
  package = pathlib.Path(__file__).parent
  return checksums.digest({path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
                           for path in package.rglob("*.py")})


def _set_up_process() -> None:
  """Sets up logging and the guard against implicit transfers."""
  # absl has flags of its own, of which none is parsed: it would warn of that before a message.
  flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  jax.config.update("jax_transfer_guard", "disallow")
  # It is cached: a checkout may change during a long run, and the code that runs does not.
  manifest.revision()


def doctor(argv: Sequence[str]) -> None:
  """Prints the diagnosis of a config.

  Raises:
    InputError: the config is wrong; the message names the first mistake.
  """
  parser = command.config_parser(
      "doctor", "Checks a config, its models, tokenizers and data; writes nothing.",
      "s2d-jax doctor --config=configs/arithmetic.py")
  config, _ = command.parse_config(parser, argv)
  print(diagnosis(config))


def diagnosis(config: ConfigDict) -> str:
  """A config's models, problems and arms, in lines; of a sweep, those of its first run.

  Raises:
    InputError: a run is wrong; the message names the first mistake.
  """
  # Planning a run checks it, so every run of a sweep is planned and the first one printed.
  configs = sweep.expand(config)
  plan = [recipe.plan(one, tasks.get(one)) for one in configs][0]
  lines = [f"{role}: {base['folder']} ({base['identity'][:12]})"
           for role, base in plan.bases.items()]
  for split, prompts in plan.prompts.items():
    longest = max(len(p.tokens) for p in prompts)
    lines.append(f"{split}: {len(prompts)} problems, prompts of at most {longest} tokens; the "
                 f"window is {config.prompt_tokens}")
  lines += [_set_line(split, facts) for split, facts in plan.sets.items()]
  for arm, names in plan.arms.items():
    lines.append(f"{arm}: {' -> '.join(names) or 'nothing to train'}")
  try:
    with keys.prefixed("config."):
      sharding.make_mesh(configs[0].mesh)
    recipe.check_devices(configs[0])
  except InputError as error:  # no mistake: the run may start on another machine
    lines.append(f"s2d-jax run would stop on this machine: {error}")
  return "\n".join(lines)


def _set_line(split: str, facts: Mapping[str, Any]) -> str:
  """A split's content hash, its file, and its overlap with the labelled problems."""
  words = [f"content {facts['sha256'][:12]}"]
  origin = facts["origin"]
  if origin is not None:
    words.append(f"from {origin['file']} (SHA-256 {origin['sha256'][:12]})")
    if origin.get("is_published"):
      words.append(f"the published file of {origin['set']} at {origin['revision'][:7]}")
    elif "set" in origin:
      words.append(f"not the published file of {origin['set']}, which has "
                   f"{origin['published_rows']:,} rows")
  if facts["left_out"]:
    words.append(f"{facts['left_out']} problems left out by config.data.leave_out")
  if split != "labelled":
    words.append(f"{facts['among_labelled']} of {facts['problems']} problems are labelled ones")
  return f"{split}: {', '.join(words)}"


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
