"""A 0.6 M-parameter teacher and a 0.2 M-parameter student learn chained addition on a laptop CPU.

  s2d-jax run --config=configs/arithmetic.py --workdir=runs/arithmetic

Five arms in five to seven minutes on two CPU cores; results/arithmetic/ has what to expect.
Arguments: `configs/arithmetic.py:seed=1` names the run, `:tiny` shrinks it to seconds. Two controls
have an arm of their own:

  :cold_teacher  the base teacher, without reward, samples and guides at a low temperature
  :same_size     the teacher starts from the student's own base
"""

import pathlib
from typing import NamedTuple

import ml_collections

from configs import common

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "s2d_jax" / "assets"
BLOCK = 16_384  # tokens whose logits exist at once: all of a step's, for the vocabulary is 24
# Temperature of the cold teacher. Greedily it is best, but then all of its samples of a problem are
# equal, and no divergence has the temperature 0. In the composition world it is right in 36.7 %
# greedily, in 35.6 at 0.1 and in 29.1 at 0.3 (s2d_jax/assets/composition/record.json).
COLD = 0.1


class World(NamedTuple):
  """The settings by which embedded worlds differ; the defaults are those of arithmetic."""
  task: str = "arithmetic"         # and the folder of its models under s2d_jax/assets
  prompt_tokens: int = 13
  answer_tokens: int = 21          # of the longest worked answer, its end included
  teacher_samples: int = 8         # of each problem, from which the teacher's GRPO learns
  teacher_steps: int = 40
  student_grpo_lr: float = 1e-3


def parse(arg: str) -> ml_collections.ConfigDict:
  """The config's arguments, for the configs of both embedded worlds.

  Raises:
    ValueError: an argument is unknown, or both controls are given.
  """
  parsed = common.parse_arg(arg, seed=0, cold_teacher=False, same_size=False, tiny=False)
  common.refuse_together(parsed, "cold_teacher", ("same_size",), "each is one control")
  return parsed


def is_control(arg: str) -> bool:
  """Whether the config's arguments name a control."""
  parsed = parse(arg)
  return parsed.cold_teacher or parsed.same_size


def set_control(config: ml_collections.ConfigDict, arg: ml_collections.ConfigDict) -> None:
  """Makes a config the control that its arguments name, if any."""
  if arg.cold_teacher:
    config.arms = "untrained,raw_bridge"
    config.stages.forward_kl.sampling.temperature = COLD
    for name in ("forward_kl", "reverse_kl"):
      config.stages[name].teacher_temperature = COLD
  if arg.same_size:
    config.arms = "untrained,bridge"
    config.teacher = config.student
    # The rate that suits a model of this size: the larger teacher's may make it collapse.
    config.stages.teacher_grpo.optim.lr = config.stages.student_grpo.optim.lr


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config, locked."""
  return world_config(World(), arg)


def world_config(world: World, arg: str) -> ml_collections.ConfigDict:
  """The config of an embedded world, locked; its learning rates were chosen on `validation`."""
  arg = parse(arg)
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.arms = "untrained,cold_grpo,raw_bridge,bridge,half_bridge_grpo_2h"

  config.task = world.task
  config.data = {"dir": "~/.cache/s2d_jax/data"}
  config.label_share = 1.0                  # of the labelled problems, how many an arm may buy
  config.half_seed = 0                      # which labelled problems are 1H and which 2H
  config.teacher = str(ASSETS / world.task / "teacher")
  config.student = str(ASSETS / world.task / "student")
  config.hub = ""                           # owner on huggingface.co of a folder that is absent
  config.student_layers = 0                 # make the student of this many layers of the teacher
  config.template = {}                      # arguments of the chat template
  config.prompt_tokens = world.prompt_tokens
  config.dtype = "float32"
  config.remat = "block"                    # on CPU recomputing a layer beats storing it
  config.attention = "auto"                 # the backend's own kernel
  config.mesh = (1, 1, 1)                   # data, fsdp, tensor
  config.sampler = common.sampler()            # memory and dispatches of every sampler
  config.compilation_cache = "auto"         # compiled programs: "auto", a folder, or "" for none
  config.profile = ""                       # "10:13" traces steps 10, 11 and 12 of each stage
  config.offload = ""                       # "optimizer,guide" wait in the host's memory

  # Rates were chosen on `validation`: results/arithmetic/choice.md, and composition's beside it.
  def answers(samples):
    return common.sampling(samples_per_prompt=samples, max_tokens=world.answer_tokens)

  def stage(lr, samples, **changes):
    return common.stage(sampling=answers(samples), block=BLOCK,
                        optim=common.adamw(lr=lr, warmup=5, decay="linear"), **changes)

  def transfer():
    return stage(4e-3, samples=4, steps=60, prompts=64, minibatches=4)

  config.stages = {
      "teacher_grpo": stage(1e-3, samples=world.teacher_samples, steps=world.teacher_steps,
                            prompts=32) | common.grpo(),
      "teacher_sft": stage(1e-3, samples=1, steps=40, prompts=64),
      "forward_kl": transfer() | common.forward_kl(top_k=4),
      "weighted_fkl": transfer() | common.forward_kl(top_k=4) | {"pass_samples": 8},
      "sft": transfer(),
      "reverse_kl": stage(2e-3, samples=4, steps=30, prompts=64, minibatches=4)
                    | common.reverse_kl(top_k=4),
      "student_grpo": stage(world.student_grpo_lr, samples=8, steps=100, prompts=32,
                            minibatches=2) | common.grpo(),
  }
  config.probe = {"split": "validation", "problems": 64, "prompts": 32, "group": 8, "top_k": 4,
                  "microbatches": 1, "block": BLOCK, "sampling": answers(16)}
  config.evals = {"test": common.evaluation(split="test", sampling=answers(16), ks=(1, 4, 16))}
  set_control(config, arg)
  if arg.tiny:
    common.shrink(config)
    config.stages.teacher_sft.sampling.samples_per_prompt = 1
  return config.lock()
