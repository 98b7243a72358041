"""Llama-3.3-70B teaches Llama-3.1-8B mathematics: the paper's Llama block (arXiv 2605.12483).

  s2d-jax run --config=configs/llama_math.py:models=/models,data=/data --workdir=...

The arms are those of the paper's Llama table, and the untrained models. The paper prints no
hyperparameters for this block, so they are those of the Qwen block (gap), and the template has its
own defaults (gap). Needs the folders Llama-3.3-70B-Instruct and Llama-3.1-8B-Instruct under
`models`, and the data of `common.math`. Not yet run at this size. The arguments `all_arms`,
`sft_teacher` and `halves` add or choose the arms that the paper has for Qwen alone; they and `tiny`
are as in qwen3_math.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  """The config, locked.

  Raises:
    ValueError: the argument is unknown, or two of its parts exclude each other.
  """
  arg = common.parse_arg(arg, seed=0, models="models", data="data", all_arms=False,
                         sft_teacher=False, halves=False, tiny=False)
  config = common.math(arg)
  config.teacher = f"{arg.models}/Llama-3.3-70B-Instruct"
  config.student = f"{arg.models}/Llama-3.1-8B-Instruct"
  config.arms = "untrained,cold_grpo,raw_bridge,bridge"
  common.choose_arms(config, arg)
  return config.lock()
