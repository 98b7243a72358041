"""How a fixed number of updates is best divided between warmup and on-policy distillation.

  s2d-jax run --config=configs/sweep_bridge_split.py --workdir=runs/ladder [--plan]
"""

from ml_collections import ConfigDict

from configs import arithmetic


def get_config(arg: str = "") -> ConfigDict:
  """configs/arithmetic.py with the bridge, 0 to 100 % of its updates in the forward-KL warmup."""
  config = arithmetic.get_config(arg)
  total = config.stages.forward_kl.steps + config.stages.reverse_kl.steps
  with config.unlocked():
    config.arms = "bridge"
    config.sweep = tuple(
        {"stages.forward_kl.steps": round(share * total),
         "stages.reverse_kl.steps": total - round(share * total)}
        for share in (0.0, 0.25, 0.5, 0.75, 1.0))
  return config
