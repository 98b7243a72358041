"""Scores by label budget: a quarter, a half and all of them, for direct GRPO, the bridge, and both.

  s2d-jax run --config=configs/sweep_label_budget.py --workdir=runs/ladder [--plan]
"""

from ml_collections import ConfigDict

from configs import arithmetic


def get_config(arg: str = "") -> ConfigDict:
  """configs/arithmetic.py with three arms, and the shares of the labelled problems to run."""
  config = arithmetic.get_config(arg)
  with config.unlocked():
    config.arms = "untrained,cold_grpo,bridge,half_bridge_grpo_2h"
    config.sweep = tuple({"label_share": share} for share in (0.25, 0.5, 1.0))
  return config
