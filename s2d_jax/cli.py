"""The console entry point: `s2d-jax run | report | preflight | doctor`, each with its own flags."""

import os
import re
import runpy
import sys

from absl import app, flags
from ml_collections import config_flags

from s2d_jax import recipe, sweep, tasks

COMMANDS = {
    "run": "train and score the arms of a config",
    "report": "print the table of finished run folders",
    "preflight": "compile every program and say what memory it needs",
    "doctor": "check a config, its models, tokenizers and data",
}
MODULES = {"run": "s2d_jax.main", "report": "s2d_jax.report", "preflight": "s2d_jax.preflight"}


def parse(argv):
  """absl's flag parsing with one sentence, and code 2, where a flag or a config key is wrong."""
  try:
    rest = flags.FLAGS(argv)
    flags.FLAGS.config.keys()  # a config file that did not load says so when it is first read
    if len(rest) == 1:
      return rest
    what = f"{rest[1]!r} is no flag: write --config.KEY=VALUE."
  except (AttributeError, KeyError) as error:  # ml_collections, of a key that the file has not
    key = re.search(r"\w+", str(error.args[0]))[0]
    what = f"config has no key {key!r}: --config.KEY=VALUE takes a key of the config file."
  except (flags.Error, ValueError, OSError) as error:
    what = str(error).strip().splitlines()[-1].strip() + ": correct the command line."
  print(f"s2d_jax: {what}", file=sys.stderr)
  sys.exit(2)


def main():
  """Runs a command with the rest of the command line."""
  if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    sys.exit("usage: s2d-jax COMMAND [flags]\n" +
             "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items()))
  command = sys.argv.pop(1)
  sys.path.insert(0, os.getcwd())  # config files import their neighbours, as with python -m
  if command in MODULES:
    runpy.run_module(MODULES[command], run_name="__main__", alter_sys=True)
  else:
    config = config_flags.DEFINE_config_file("config", None, "A file with get_config().")
    flags.mark_flags_as_required(["config"])
    app.run(lambda argv: print(diagnosis(config.value)), flags_parser=parse)


def diagnosis(config):
  """What `recipe.plan` finds of a config, in words; exits with the first thing that is wrong.

  Of a sweep every run is checked, and the first is told.
  """
  try:
    made, *_ = [recipe.plan(one, tasks.get(one)) for one in sweep.expand(config)]
  except ValueError as error:
    print(f"s2d_jax: {error}", file=sys.stderr)
    sys.exit(2)
  lines = [f"{role}: {base['folder']} ({base['identity'][:12]})"
           for role, base in made.bases.items()]
  for split, prompts in made.prompts.items():
    longest = max(len(p.tokens) for p in prompts)
    lines.append(f"{split}: {len(prompts)} problems, prompts of at most {longest} tokens; the "
                 f"window is {config.prompt_tokens}")
  for arm, names in made.arms.items():
    lines.append(f"{arm}: {' -> '.join(names) or 'nothing to train'}")
  return "\n".join(lines)
