"""Qwen3 teaches Qwen3-1.7B mathematics: the paper's Qwen block (arXiv 2605.12483).

  s2d-jax run --config=configs/qwen3_math.py:teacher=8b,models=/models,data=/data --workdir=...

Needs the folders Qwen3-1.7B and the teacher's under `models`, and the sets of docs/data.md, which
are downloaded to `data`. Not yet run at this size; `s2d-jax preflight` says what it needs.

  teacher=8b    the default; or 14b; or 1.7b, the same size, with the three arms that the paper has
  all_arms      every arm of the paper's tables, beyond the five that show its claim
  sft_teacher   the arms of a teacher that learned from given solutions: the file solutions.jsonl
                under `data` (docs/sampling.md; the paper's are responses of gpt-oss-120B)
  halves        the arms of half of the labels alone, with half of the steps: as many passes over
                a half as the others make over all labels
  one_gpu       1.7B from 8B on one card of 80 GB: adapters for the teacher, no KL of its GRPO
  colab         0.6B from 1.7B on one card of 16 GB: adapters, short answers, GSM8K's problems
  tiny          the folders and the data as they are, and everything else small

Arguments combine, as in `teacher=14b,all_arms,sft_teacher`; those that would overwrite each other
are refused.
"""

from ml_collections import ConfigDict

from configs import common

_TEACHERS = {"8b": "Qwen3-8B", "14b": "Qwen3-14B", "1.7b": "Qwen3-1.7B"}
# The paper's arms of a teacher, and those whose teacher and bridge use half of the labels.
_ARMS = "untrained,cold_grpo,raw_bridge,bridge,opd_only,sft_only"
_HALVES = ("half_bridge,half_bridge_grpo_2h,half_bridge_replay_1h,half_opd_grpo_2h,"
           "half_sft_grpo_2h")
_SFT_ARMS = "untrained,cold_grpo,sft_teacher_bridge"
_SFT_HALVES = ("half_sft_teacher_bridge,half_sft_teacher_bridge_grpo_2h,"
               "half_sft_teacher_bridge_replay_1h")


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
  config.arms = _arms(arg) or config.arms
  if arg.sft_teacher:
    config.data.solutions = f"{arg.data}/solutions.jsonl"
  if arg.halves:
    for hp in config.stages.values():
      hp.steps //= 2
  if arg.one_gpu:
    common.fit_one_device(config, ("teacher_grpo", "teacher_sft"))
    # The start that a KL compares with is 16 GB more.
    config.stages.teacher_grpo.update({"kl": "none", "kl_coef": 0.0})
    for name in ("teacher_grpo", "teacher_sft"):
      config.stages[name].optim.lr = 1e-5  # ours: adapters take larger steps than weights
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
  common.refuse_together(arg, "halves", ("all_arms",),
                         "all_arms compares the halves with the other arms by equal updates")
  if arg.teacher == "1.7b":
    common.refuse_together(arg, "teacher", ("all_arms", "sft_teacher", "halves"),
                           "the paper has three arms of a teacher of the student's size")


def _arms(arg: ConfigDict) -> str:
  """The arms that the arguments choose, with commas between; "" for the config's own five."""
  if arg.teacher == "1.7b":
    return "untrained,cold_grpo,bridge,opd_only,sft_only"
  if arg.halves:
    return f"untrained,{_SFT_HALVES if arg.sft_teacher else _HALVES}"
  chosen = [_ARMS, _HALVES] if arg.all_arms else []
  if arg.sft_teacher:
    chosen += [_SFT_ARMS, _SFT_HALVES]
  return ",".join(dict.fromkeys(",".join(chosen).split(",")))


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
  samples = min(4, config.evals.gsm8k.sampling.samples_per_prompt)
  config.evals.gsm8k.update({"split": "validation", "problems": 200, "ks": (1, samples)})
  for name, hp in config.stages.items():
    hp.prompts = min(16, hp.prompts)
    hp.steps = min(100, hp.steps)
    hp.minibatches = min(2, hp.minibatches)
    hp.optim.lr = 1e-5 if name in ("forward_kl", "reverse_kl", "sft") else 5e-6
  for hp in (*config.stages.values(), config.probe, *config.evals.values()):
    hp.sampling.max_tokens = min(1024, hp.sampling.max_tokens)
  for block in (config.probe, config.evals.gsm8k):
    block.sampling.samples_per_prompt = samples
  config.probe.group = min(samples, config.probe.group)
  common.fit_one_device(config, tuple(config.stages))
  for name in ("teacher_grpo", "student_grpo"):
    config.stages[name].update({"kl": "none", "kl_coef": 0.0})
