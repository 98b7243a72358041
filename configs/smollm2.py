"""SmolLM2-360M teaches SmolLM2-135M sums and word problems: a real language model on one card.

  s2d-jax run --config=configs/smollm2.py --workdir=runs/smollm2

Fits a card of 16 GB. The two folders are downloaded to `models/` from huggingface.co/HuggingFaceTB
where they are absent. Without a network, place them there. Arguments:

  :models=FOLDER             where the models are
  :teacher=NAME,student=NAME any two folders of one tokenizer, in `models` or by their paths
  :layers=27                 the student is 27 of the teacher's layers, so that one folder suffices
  :tiny                      a few steps with short answers: minutes on two cores
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from configs import common

ANSWER = 16  # tokens of a response: "9 * 12 = \\boxed{108}" and its end take 14


def _answers(samples: int) -> dict[str, Any]:
  """The sampling of every stage and score."""
  return common.sampling(samples_per_prompt=samples, max_tokens=ANSWER)


def _stages() -> dict[str, dict[str, Any]]:
  """The seven stages."""
  def stage(lr, samples, **changes):
    return common.stage(sampling=_answers(samples), block=2048, save_every=20,
                        optim=common.adamw(lr=lr, warmup=5, decay="linear"), **changes)

  def rl():
    return stage(1e-5, samples=8, steps=100, prompts=16, minibatches=2) | common.grpo()

  def transfer():
    return stage(1e-4, samples=4, steps=60, prompts=16, minibatches=2)

  return {
      "teacher_grpo": rl(),
      "teacher_sft": stage(2e-5, samples=1, steps=60, prompts=32),
      "forward_kl": transfer() | common.forward_kl(),
      "weighted_fkl": transfer() | common.forward_kl() | {"pass_samples": 4},
      "sft": transfer(),
      "reverse_kl": transfer() | common.reverse_kl(),
      "student_grpo": rl(),
  }


def _folder(models: pathlib.Path, name: str) -> str:
  """The folder of a model: a path of its own where it has a slash, or a name in `models`."""
  return name if "/" in name else str(models / name)


def get_config(arg: str = "") -> ConfigDict:
  """The config, locked.

  Raises:
    ValueError: the argument is unknown, or two of its parts exclude each other.
  """
  arg = common.parse_arg(arg, seed=0, models="models", teacher="SmolLM2-360M-Instruct", student="",
                         layers=0, tiny=False)
  common.refuse_together(arg, "layers", ("student",), "layers makes the student of the teacher")
  models = pathlib.Path(arg.models)
  config = ConfigDict()
  config.seed = arg.seed
  config.arms = "untrained,cold_grpo,raw_bridge,bridge,half_bridge_grpo_2h"
  config.task = "word_problems"
  config.data = {"dir": "~/.cache/s2d_jax/data"}
  config.label_share = 1.0
  config.half_seed = 0
  config.teacher = _folder(models, arg.teacher)
  config.student = _folder(models, arg.student or "SmolLM2-135M-Instruct")
  config.hub = "HuggingFaceTB"              # owner on huggingface.co of a folder that is absent
  config.student_layers = arg.layers
  if arg.layers:
    config.student = str(models / f"{pathlib.Path(arg.teacher).name}-{arg.layers}-layers")
  config.template = {}
  config.prompt_tokens = 160
  config.dtype = "bfloat16"
  config.remat = "block"
  config.attention = "auto"
  config.mesh = (1, 1, 1)
  config.sampler = common.sampler(tokens=16, chunk=160)
  config.compilation_cache = "auto"         # compiled programs: "auto", a folder, or "" for none
  config.profile = ""                       # "10:13" traces steps 10, 11 and 12 of each stage
  config.offload = ""                       # "optimizer,guide" wait in the host's memory

  config.stages = _stages()
  config.probe = {"split": "validation", "problems": 64, "prompts": 32, "group": 8, "top_k": 16,
                  "microbatches": 4, "block": 2048, "sampling": _answers(8)}
  config.evals = {"test": common.evaluation(split="test", problems=512, sampling=_answers(4),
                                            ks=(1, 4))}
  if arg.tiny:
    config.dtype = "float32"
    common.shrink(config)
    # A step of a real model takes some twenty seconds on two cores.
    for hp in config.stages.values():
      hp.steps = 2
    config.evals.test.problems = 16
    config.stages.teacher_sft.sampling.samples_per_prompt = 1
  return config.lock()
