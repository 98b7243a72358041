"""Qwen3-8B teaches Qwen3-1.7B mathematics: the paper's Qwen block (arXiv 2605.12483).

  s2d-jax run --config=configs/qwen3_math.py:models=/models,data=/data --workdir=...

Needs the folders Qwen3-8B and Qwen3-1.7B under `models`, and JSON lines of problem and answer under
`data` (`common.math` names them). Not yet run at this size; `s2d-jax preflight` says what it needs.
`:tiny` keeps the two folders and the data and shrinks everything else.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  """The config, locked."""
  arg = common.parse_arg(arg, seed=0, models="models", data="data", tiny=False)
  config = common.math(arg)
  config.teacher = f"{arg.models}/Qwen3-8B"
  config.student = f"{arg.models}/Qwen3-1.7B"
  # The paper's scores can only be non-thinking ones; its code hard-wires this.
  config.template = {"enable_thinking": False}
  return config.lock()
