"""A teacher that takes easy steps in the wrong order until rewards find the right one, on a CPU.

  s2d-jax run --config=configs/composition.py --workdir=runs/composition

The second embedded world: its base teacher is wrong systematically, so that reward discovers and
does not only sharpen. Arguments: `configs/composition.py:seed=1` names the run, `:tiny` shrinks it,
and `:cold_teacher` and `:same_size` are the controls that configs/arithmetic.py has. All other
settings are in that file too.
"""

import ml_collections

from configs import arithmetic

# Of a family that is right in 3 % of tries, two groups of 16 in five have a right sample.
WORLD = arithmetic.World("composition", prompt_tokens=12, answer_tokens=26, teacher_samples=16,
                         teacher_steps=80, student_grpo_lr=3e-4)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config, locked."""
  return arithmetic.world_config(WORLD, arg)
