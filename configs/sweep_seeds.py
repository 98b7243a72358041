"""The ladder: every arm of the arithmetic world under three training seeds, stages shared.

  s2d-jax run --config=configs/sweep_seeds.py --workdir=runs/ladder [--plan]
"""

from ml_collections import ConfigDict

from configs import arithmetic


def get_config(arg: str = "") -> ConfigDict:
  """configs/arithmetic.py with every arm, and the seeds to run it with."""
  config = arithmetic.get_config(arg)
  with config.unlocked():
    config.arms = "all"
    config.sweep = tuple({"seed": config.seed + i} for i in range(3))
  return config
