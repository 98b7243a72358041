"""Qwen3 teaches Qwen3-1.7B mathematics: the paper's Qwen block (arXiv 2605.12483).

  s2d-jax run --config=configs/qwen3_math.py:teacher=8b,models=/models,data=/data --workdir=...

Needs the folders Qwen3-1.7B and the teacher's under `models`, and the sets of docs/data.md, which
are downloaded to `data`. Not yet run at this size; `s2d-jax preflight` says what it needs, and
docs/sizes.md has a command for one H200.

  teacher=8b    the default; or 14b; or 1.7b, the same size, with the three arms that the paper has
  all_arms      every arm of the paper's tables, beyond the five that show its claim
  sft_teacher   the arms of a teacher that learned from given solutions: the file solutions.jsonl
                under `data` (docs/sampling.md; the paper's are responses of gpt-oss-120B)
  halves        the arms of half of the labels alone, with half of the steps: as many passes over
                a half as the others make over all labels
  one_gpu       1.7B from 8B on one card of 80 GB: adapters for the teacher and no KL of its GRPO,
                answers of 4,096 tokens, at most 100 steps of 16 problems, four samples a score
  colab         0.6B from 1.7B on one card of 16 GB: adapters, answers of 1,024 tokens, GSM8K's
                problems, at most 100 steps of 16 problems
  tiny          the folders and the data as they are, and everything else small

Arguments combine, as in `teacher=14b,all_arms,sft_teacher`; those that would overwrite each other
are refused.
"""

from ml_collections import ConfigDict

from configs import common

_TEACHERS = {"8b": "Qwen3-8B", "14b": "Qwen3-14B", "1.7b": "Qwen3-1.7B"}


def get_config(arg: str = "") -> ConfigDict:
  """The config, locked.

  Raises:
    ValueError: the argument is unknown, or two of its parts exclude each other.
  """
  arg = common.parse_arg(arg, seed=0, models="models", data="data", teacher="", all_arms=False,
                         sft_teacher=False, halves=False, one_gpu=False, colab=False, tiny=False)
  _check(arg)
  config = common.math(arg)
  config.teacher = f"{arg.models}/{_TEACHERS[arg.teacher or '8b']}"
  config.student = f"{arg.models}/Qwen3-1.7B"
  # The paper's scores can only be non-thinking ones; its code hard-wires this.
  config.template = {"enable_thinking": False}  # gap: the paper does not say
  if arg.teacher == "1.7b":
    config.arms = "untrained,cold_grpo,bridge,opd_only,sft_only"
  if arg.one_gpu:
    _one_gpu(config)
  # one_gpu bounds the steps, and halves takes half of what that leaves.
  common.choose_arms(config, arg)
  if arg.colab:
    _colab(config, arg)
  return config.lock()


def _check(arg: ConfigDict) -> None:
  """Raises ValueError for an unknown teacher, and for arguments that exclude each other."""
  if arg.teacher and arg.teacher not in _TEACHERS:
    raise ValueError(f"the config's argument teacher is {arg.teacher!r}: use "
                     f"{', '.join(_TEACHERS)}.")
  common.refuse_together(arg, "colab", ("teacher", "one_gpu", "all_arms", "sft_teacher", "halves"),
                         "colab has models, arms and problems of its own")
  common.refuse_together(arg, "one_gpu", ("teacher",), "one_gpu is for the teacher of 8B")
  if arg.teacher == "1.7b":
    common.refuse_together(arg, "teacher", ("all_arms", "sft_teacher", "halves"),
                           "the paper has three arms of a teacher of the student's size")


def _one_gpu(config: ConfigDict) -> None:
  """Makes the config fit a card of 80 GB: with the printed lengths a step takes hours there.

  Every value here is ours. Learning rates of whole weights, clips and samples a prompt are kept.
  """
  common.shorten(config, max_tokens=4096)
  adapted = ("teacher_grpo", "teacher_sft")  # the weights of 8B, with their moments, are 98 GB
  common.fit_one_device(config, adapted)
  # The start that a KL compares with is 16 GB more.
  config.stages.teacher_grpo.update({"kl": "none", "kl_coef": 0.0})
  for name in adapted:
    config.stages[name].optim.lr = 1e-5  # adapters take larger steps than weights


def _colab(config: ConfigDict, arg: ConfigDict) -> None:
  """Makes the config fit a card of 16 GB: nothing of it is the paper's but the recipe."""
  config.teacher = f"{arg.models}/Qwen3-1.7B"
  config.student = f"{arg.models}/Qwen3-0.6B"
  config.arms = "untrained,cold_grpo,bridge"
  # Short problems and short answers; the held-out set is scored, and no choice depends on it.
  config.data.update({"labelled": "gsm8k_train", "validation": "gsm8k"})
  config.prompt_tokens = min(512, config.prompt_tokens)
  # A few rows, so that caches do not take all that a larger card has.
  config.sampler.cache_gib = 1.0
  config.evals = {"gsm8k": config.evals.math500, "validation": config.evals.validation}
  config.evals.gsm8k.update({"split": "validation", "problems": 200})
  common.shorten(config, max_tokens=1024)
  for name, hp in config.stages.items():
    hp.optim.lr = 1e-5 if name in ("forward_kl", "reverse_kl", "sft") else 5e-6
  common.fit_one_device(config, tuple(config.stages))
  for name in ("teacher_grpo", "student_grpo"):
    config.stages[name].update({"kl": "none", "kl_coef": 0.0})
