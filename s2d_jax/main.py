"""Flags, hosts, mesh; then `recipe.run`, and the report.

  python -m s2d_jax.main --config=configs/arithmetic.py --workdir=runs/arithmetic

Exit codes: 0 done; 2 something is wrong with what was asked, in one sentence; 1 a stage failed;
75 told to stop and saved: start the same command again.
"""

import os
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from s2d_jax import cli, manifest, recipe, report, sharding, sweep, tasks, walk

CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config().",
                                         lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where runs are kept.")
PLAN = flags.DEFINE_bool("plan", False, "Print the runs and count their stages; train nothing.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One process of several (a TPU slice).")


def main(argv):
  """Runs every arm of the config, or of every config of a sweep, and writes the report."""
  del argv
  if DISTRIBUTED.value:
    jax.distributed.initialize()
  logging.set_verbosity(logging.WARNING)
  if jax.config.jax_compilation_cache_dir is None:  # stages of equal shapes share their programs
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/s2d_jax/xla"))
  jax.config.update("jax_transfer_guard", "disallow")
  config, workdir = CONFIG.value, WORKDIR.value
  manifest.revision()  # of the code as it starts
  try:
    configs = sweep.expand(config)
    plans = [recipe.plan(one, tasks.get(one)) for one in configs]
    mesh = sharding.make_mesh(configs[0].mesh)
    for made in plans:
      walk.check_folders(made, workdir)
    if PLAN.value:
      print("\n".join(sweep.outline(plans, config.get("sweep", ({},)), workdir)))
      return
    with jax.set_mesh(mesh):
      for made in plans:
        walk.run(made, workdir)
  except (ValueError, FloatingPointError) as error:
    print(f"s2d_jax: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, ValueError) else 1)
  if jax.process_index() == 0:
    print(report.write([workdir]))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=cli.parse)
