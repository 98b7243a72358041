"""The console entry point: `s2d-jax COMMAND [flags]`."""

import importlib
import sys

from s2d_jax import supervisor

# Modules are imported when called: a report then needs no training code and no checkpoint library.
COMMANDS = {  # name -> (module, its function of the flags, description)
    "run": ("s2d_jax.main", "main", "train and score the arms of a config"),
    "sample": ("s2d_jax.sampler.__main__", "main", "sample a model's answers to a file of prompts"),
    "eval": ("s2d_jax.evaluate", "main", "score a model on sets of checked problems"),
    "report": ("s2d_jax.report", "main", "print the table of finished work folders"),
    "preflight": ("s2d_jax.preflight", "main",
                  "compile the largest program of each kind and print its memory"),
    "doctor": ("s2d_jax.main", "doctor", "check a config, its models, tokenizers and data"),
    "export": ("s2d_jax.export", "main", "write a finished stage as a Hugging Face folder"),
}


def usage() -> str:
  """The list of commands."""
  lines = [f"  {name:<10} {description}" for name, (_, _, description) in COMMANDS.items()]
  return "\n".join(["usage: s2d-jax COMMAND [flags]", *lines, "",
                    "With --debug an unexpected error prints its traceback.", "",
                    "example: s2d-jax run --help"])


def main() -> None:
  """Runs the command that the command line names, with the flags that follow it."""
  name, *argv = sys.argv[1:] or [""]
  if name == "run":
    supervisor.begin(argv)
  from s2d_jax import command  # after `begin`, as all libraries
  if name in ("-h", "--help"):
    print(usage())
  elif name not in COMMANDS:
    print(usage(), file=sys.stderr)
    command.fail(f"there is no command {name!r}: choose one of these." if name else
                 "no command was given: choose one of these.")
  else:
    module, function, _ = COMMANDS[name]
    # Imported within, so that Ctrl-C during an import is a sentence too.
    command.call(lambda argv: getattr(importlib.import_module(module), function)(argv), argv)
