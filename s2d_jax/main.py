"""`s2d-jax run`: trains and scores the arms of a config, and prints the report.

Exit codes:
  0: done.
  1: a stage failed.
  2: the request is wrong; a sentence on standard error says why.
  75: stopped and saved; the same command continues.
"""

import os
import sys
from collections.abc import Sequence

import jax
from absl import flags, logging

from s2d_jax import command, hosts, keys, manifest, recipe, report, sharding, sweep, tasks, walk

_EXAMPLE = "s2d-jax run --config=configs/arithmetic.py:tiny --workdir=runs/tiny"


def main(argv: Sequence[str]) -> None:
  """Runs every arm of the config, or of every config of a sweep, and prints the report.

  Raises:
    ValueError: the request is wrong; the message is one sentence.
    FloatingPointError: a stage failed.
  """
  parser = command.config_parser("run", "Trains and scores the arms of a config.", _EXAMPLE)
  parser.add_argument("--workdir", required=True, help="the folder that keeps what is done")
  parser.add_argument("--plan", action="store_true",
                      help="print the runs and count their stages; train nothing")
  parser.add_argument("--distributed", action="store_true",
                      help="this is one process of several, such as a TPU slice's")
  config, args = command.parse_config(parser, argv)
  # First, because most calls of jax start the devices, and then of this process alone.
  if args.distributed:
    jax.distributed.initialize()
  _set_up_process()
  configs = sweep.expand(config)
  plans = [recipe.plan(one, tasks.get(one)) for one in configs]
  with keys.prefixed("config."):
    mesh = sharding.make_mesh(configs[0].mesh)
  # Every run of a sweep is checked before the first one trains.
  for plan in plans:
    walk.check_folders(plan, args.workdir)
  if args.plan:
    print("\n".join(sweep.outline(plans, config.get("sweep", ({},)), args.workdir)))
    return
  with jax.set_mesh(mesh):
    for plan in plans:
      walk.run(plan, args.workdir)
  if hosts.leader():
    print(report.write([args.workdir]))


def _set_up_process() -> None:
  """Sets up logging, the cache of compiled programs, and the guard against implicit transfers."""
  # absl has flags of its own, of which none is parsed: it would warn of that before a message.
  flags.FLAGS.mark_as_parsed()
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  # Stages of equal shapes, and the same command again, share their compiled programs.
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/s2d_jax/xla"))
  jax.config.update("jax_transfer_guard", "disallow")
  # It is cached: a checkout may change during a long run, and the code that runs does not.
  manifest.revision()


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
