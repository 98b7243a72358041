"""The ladder of the composition world: its arms under three training seeds, stages shared.

Two more seeds train the arms of the headline contrasts alone.

  s2d-jax run --config=configs/sweep_composition.py --workdir=runs/composition [--plan]

With `:cold_teacher` or `:same_size` it is that control under five seeds.
"""

from ml_collections import ConfigDict

from configs import arithmetic, composition, sweep_seeds

HEADLINE = "untrained,cold_grpo,raw_bridge,bridge,half_bridge,half_bridge_grpo_2h"


def get_config(arg: str = "") -> ConfigDict:
  """configs/composition.py with the arms and seeds of configs/sweep_seeds.py."""
  config = composition.get_config(arg)
  ladder = sweep_seeds.get_config(arg)
  with config.unlocked():
    further = tuple({"seed": config.seed + i} for i in (3, 4))
    if not arithmetic.is_control(arg):
      config.arms = ladder.arms
      further = tuple(changes | {"arms": HEADLINE} for changes in further)
    config.sweep = (*ladder.sweep, *further)
  return config
