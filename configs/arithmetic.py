"""A 0.6 M-parameter teacher and a 0.2 M-parameter student learn chained addition on a laptop CPU.

  python -m s2d_jax.main --config=configs/arithmetic.py --workdir=runs/arithmetic

Five arms in under 10 minutes on two CPU cores; results/arithmetic/ has what to expect.
Arguments: `configs/arithmetic.py:seed=1` names the run, `:tiny` shrinks it to seconds.
"""

import pathlib

import ml_collections

from configs import common

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "s2d_jax" / "assets" / "arithmetic"


def get_config(arg=""):
  """The config, locked."""
  arg = common.parse_arg(arg, seed=0, tiny=False)
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.arms = "untrained,cold_grpo,raw_bridge,bridge,half_bridge_grpo_2h"

  config.task = "arithmetic"
  config.data = {"dir": "~/.cache/s2d_jax/data"}
  config.label_share = 1.0                  # of the labelled problems, how many an arm may buy
  config.half_seed = 0                      # which labelled problems are 1H and which 2H
  config.teacher = str(ASSETS / "teacher")
  config.student = str(ASSETS / "student")
  config.template = {}                      # arguments of the chat template
  config.prompt_tokens = 13
  config.dtype = "float32"
  config.remat = "block"                    # on CPU recomputing a layer beats storing it
  config.attention = "auto"                 # the backend's own kernel
  config.mesh = (1, 1, 1)                   # data, fsdp, tensor
  config.sampler = common.room()            # memory and dispatches of every sampler

  # Rates were chosen on `validation`: results/arithmetic/choice.md.
  T = 21      # tokens of the longest worked answer, its end included
  B = 16_384  # tokens whose logits exist at once: all of a step's, for the vocabulary is 24
  rl, four, given = common.sampling(8, T), common.sampling(4, T), common.sampling(1, T)
  optim = {lr: common.adamw(lr, warmup=5, decay="linear") for lr in (1e-3, 2e-3, 4e-3)}
  config.stages = {
      "teacher_grpo": common.stage(40, 32, rl, optim[1e-3], block=B) | common.grpo(),
      "teacher_sft": common.stage(40, 64, given, optim[1e-3], block=B),
      "forward_kl": common.stage(60, 64, four, optim[4e-3], minibatches=4, block=B)
                    | common.distil(top_k=4),
      "weighted_fkl": common.stage(60, 64, four, optim[4e-3], minibatches=4, block=B)
                      | common.distil(top_k=4) | {"pass_samples": 8},
      "sft": common.stage(60, 64, four, optim[4e-3], minibatches=4, block=B),
      "reverse_kl": common.stage(30, 64, four, optim[2e-3], minibatches=4, block=B)
                    | common.reverse(top_k=4),
      "student_grpo": common.stage(100, 32, rl, optim[1e-3], minibatches=2, block=B)
                      | common.grpo(),
  }
  config.validation = {"split": "validation", "problems": 64, "sampling": common.sampling(4, T)}
  config.probe = {"split": "validation", "problems": 64, "prompts": 32, "group": 8, "top_k": 4,
                  "microbatches": 1, "block": B, "sampling": common.sampling(16, T)}
  config.evaluation = {"split": "test", "prompts": 64, "sampling": common.sampling(16, T),
                       "ks": (1, 4, 16), "draws": 1000, "level": 0.95, "log_samples": 64}
  if arg.tiny:
    common.shrink(config)
    config.stages.teacher_sft.sampling.samples_per_prompt = 1
  return config.lock()
