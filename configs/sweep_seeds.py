"""The ladder: every arm of the arithmetic world under three training seeds, stages shared.

  python -m s2d_jax.main --config=configs/sweep_seeds.py --workdir=runs/ladder [--plan]
"""

from configs import arithmetic

ARMS = ("untrained", "cold_grpo", "cold_grpo_2h", "raw_bridge", "bridge", "opd_only", "sft_only",
        "fkl_only", "weighted_fkl", "sft_teacher_bridge", "half_bridge", "half_bridge_grpo_2h",
        "half_bridge_replay_1h", "half_opd_grpo_2h", "half_sft_grpo_2h")


def get_config(arg=""):
  """configs/arithmetic.py with every arm, and the seeds to run it with."""
  config = arithmetic.get_config(arg)
  with config.unlocked():
    config.arms = ",".join(ARMS)
    config.sweep = tuple({"seed": config.seed + i} for i in range(3))
  return config
