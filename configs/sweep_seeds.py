"""The ladder: the arms of the arithmetic world under three training seeds, stages shared.

  s2d-jax run --config=configs/sweep_seeds.py --workdir=runs/ladder [--plan]

With `:cold_teacher` or `:same_size` it is that control of configs/arithmetic.py under three seeds.
"""

from ml_collections import ConfigDict

from configs import arithmetic


def get_config(arg: str = "") -> ConfigDict:
  """configs/arithmetic.py with these arms, and the seeds to run it with."""
  config = arithmetic.get_config(arg)
  with config.unlocked():
    config.sweep = tuple({"seed": config.seed + i} for i in range(3))
    # A control has its own arms.
    if arithmetic.is_control(arg):
      return config
    # All but the halves of a teacher that learned from solutions, which only the paper has, and
    # but sft_bridge and half_sft_opd, which that paper lacks.
    config.arms = ("untrained,cold_grpo,cold_grpo_2h,raw_bridge,bridge,opd_only,sft_only,fkl_only,"
                   "weighted_fkl,sft_teacher_bridge,half_bridge,half_bridge_grpo_2h,"
                   "half_bridge_replay_1h,half_opd_grpo_2h,half_sft_grpo_2h")
  return config
