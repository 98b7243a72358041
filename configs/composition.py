"""A teacher that takes easy steps in the wrong order until rewards find the right one, on a CPU.

  s2d-jax run --config=configs/composition.py --workdir=runs/composition

The second embedded world: its base teacher is wrong systematically, so that reward discovers and
does not only sharpen. Arguments: `configs/composition.py:seed=1` names the run, `:tiny` shrinks it,
and `:cold_teacher` and `:same_size` are the controls that configs/arithmetic.py has.
"""

import pathlib

import ml_collections

from configs import arithmetic, common

ASSETS = pathlib.Path(__file__).resolve().parents[1] / "s2d_jax" / "assets" / "composition"
ANSWER = 26     # tokens of the longest worked answer, its end included
BLOCK = 16_384  # tokens whose logits exist at once: all of a step's, for the vocabulary is 24


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config, locked."""
  arg = arithmetic.parse(arg)
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.arms = "untrained,cold_grpo,raw_bridge,bridge,half_bridge_grpo_2h"

  config.task = "composition"
  config.data = {"dir": "~/.cache/s2d_jax/data"}
  config.label_share = 1.0                  # of the labelled problems, how many an arm may buy
  config.half_seed = 0                      # which labelled problems are 1H and which 2H
  config.teacher = str(ASSETS / "teacher")
  config.student = str(ASSETS / "student")
  config.hub = ""                           # owner on huggingface.co of a folder that is absent
  config.student_layers = 0                 # make the student of this many layers of the teacher
  config.template = {}                      # arguments of the chat template
  config.prompt_tokens = 12
  config.dtype = "float32"
  config.remat = "block"                    # on CPU recomputing a layer beats storing it
  config.attention = "auto"                 # the backend's own kernel
  config.mesh = (1, 1, 1)                   # data, fsdp, tensor
  config.sampler = common.sampler()         # memory and dispatches of every sampler
  config.compilation_cache = "auto"         # compiled programs: "auto", a folder, or "" for none
  config.profile = ""                       # "10:13" traces steps 10, 11 and 12 of each stage

  def answers(samples):
    return common.sampling(samples_per_prompt=samples, max_tokens=ANSWER)

  # Rates were chosen on `validation`: results/composition/choice.md.
  def stage(lr, samples, **changes):
    return common.stage(sampling=answers(samples), block=BLOCK,
                        optim=common.adamw(lr=lr, warmup=5, decay="linear"), **changes)

  def transfer():
    return stage(4e-3, samples=4, steps=60, prompts=64, minibatches=4)

  config.stages = {
      # Of a family that is right in 3 % of tries, two groups of 16 in five have a right sample.
      "teacher_grpo": stage(1e-3, samples=16, steps=80, prompts=32) | common.grpo(),
      "teacher_sft": stage(1e-3, samples=1, steps=40, prompts=64),
      "forward_kl": transfer() | common.forward_kl(top_k=4),
      "weighted_fkl": transfer() | common.forward_kl(top_k=4) | {"pass_samples": 8},
      "sft": transfer(),
      "reverse_kl": stage(2e-3, samples=4, steps=30, prompts=64, minibatches=4)
                    | common.reverse_kl(top_k=4),
      "student_grpo": stage(3e-4, samples=8, steps=100, prompts=32, minibatches=2)
                      | common.grpo(),
  }
  config.probe = {"split": "validation", "problems": 64, "prompts": 32, "group": 8, "top_k": 4,
                  "microbatches": 1, "block": BLOCK, "sampling": answers(16)}
  config.evals = {"test": common.evaluation(split="test", sampling=answers(16), ks=(1, 4, 16))}
  # At this temperature more of its answers are right than at any other that was measured.
  arithmetic.set_control(config, arg, temperature=0.1)
  if arg.tiny:
    common.shrink(config)
    config.stages.teacher_sft.sampling.samples_per_prompt = 1
  return config.lock()
