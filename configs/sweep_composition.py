"""The ladder of the composition world: its arms under three training seeds, stages shared.

  s2d-jax run --config=configs/sweep_composition.py --workdir=runs/composition [--plan]

With `:cold_teacher` or `:same_size` it is that control under three seeds.
"""

from ml_collections import ConfigDict

from configs import arithmetic, composition, sweep_seeds


def get_config(arg: str = "") -> ConfigDict:
  """configs/composition.py with the arms and seeds of configs/sweep_seeds.py."""
  config = composition.get_config(arg)
  ladder = sweep_seeds.get_config(arg)
  with config.unlocked():
    config.sweep = ladder.sweep
    if not arithmetic.is_control(arg):
      config.arms = ladder.arms
  return config
