"""Shared pieces of configs: the argument string, and each block's keys with default and remark."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """The argument of `config.py:seed=1,tiny` as a ConfigDict of the defaults' types.

  Only for what moves several settings at once or names the run; everything else is a flat override
  on the command line, `--config.stages.reverse_kl.optim.lr=1e-4`.

  Raises:
    ValueError: an unknown name, one that is given twice, or a value that is not of the default's
      type.
  """
  parsed = ConfigDict(defaults)
  names = set()
  for item in filter(None, (arg or "").split(",")):
    name, equals, value = item.partition("=")
    if name not in defaults:
      raise ValueError(f"the config's argument {name!r} is unknown: use {', '.join(defaults)}.")
    if name in names:
      raise ValueError(f"the config's argument {name} is given twice: give it once.")
    names.add(name)
    kind = type(defaults[name])
    if kind is bool:
      if equals and value.lower() not in ("true", "1", "false", "0"):
        raise ValueError(f"the config's argument {name} is {value!r}: use true or false.")
      parsed[name] = not equals or value.lower() in ("true", "1")
    elif not value or kind is int and not value.lstrip("-").isdecimal():
      raise ValueError(f"the config's argument {name} is {value!r}: give it as in "
                       f"{name}={'NAME' if defaults[name] == '' else defaults[name]}.")
    else:
      parsed[name] = kind(value)
  return parsed


def refuse_together(parsed: ConfigDict, name: str, others: Sequence[str], reason: str) -> None:
  """Refuses an argument beside others that it would overwrite.

  Args:
    parsed: as `parse_arg` returns it; an argument counts as given where its value is not false.
    reason: why they exclude each other, as a clause.

  Raises:
    ValueError: `name` and one of `others` are given; the message names both.
  """
  for other in others:
    if parsed[name] and parsed[other]:
      raise ValueError(f"the config's arguments {name} and {other} exclude each other, because "
                       f"{reason}: leave one of them out.")


REQUIRED = object()  # the default of a key that every config must choose


class Block:
  """A block of a config: its keys with their defaults. A call returns a dict of them with changes.

  Ranges and meanings beyond the remarks stand beside the code that reads a key, in its KEYS.
  """

  def __init__(self, *bases: "Block", **defaults: Any) -> None:
    self.defaults: dict[str, Any] = {}
    for base in bases:
      self.defaults |= base.defaults
    self.defaults |= defaults

  def __call__(self, **changes: Any) -> dict[str, Any]:
    """The block with the named keys changed.

    Raises:
      ValueError: a name that is not a key, or a key without a default that is not named.
    """
    for name in changes:
      if name not in self.defaults:
        raise ValueError(f"{name!r} is not a key of this block: use {', '.join(self.defaults)}.")
    values = self.defaults | changes
    for name, value in values.items():
      if value is REQUIRED:
        raise ValueError(f"the block lacks {name}: give it a value, as in {name}=1.")
    # Copied, because a ConfigDict keeps a dict that stands in two places as one block, and an
    # override would then change both.
    return {name: dict(value) if isinstance(value, dict) else value
            for name, value in values.items()}


sampling = Block(             # how responses are sampled; also ended by the tokenizer's end ids
    samples_per_prompt=REQUIRED,
    temperature=1.0,          # 0 is greedy
    top_p=1.0,                # keep the most probable tokens up to this mass; 1 is off
    top_k=0,                  # keep this many tokens; 0 is off
    min_p=0.0,                # keep tokens of at least this share of the largest probability
    max_tokens=REQUIRED,      # of a response
    min_tokens=0,             # before an end token may be sampled
    stop_strings=(),          # a response ends with the token that completes one of these
)

sampler = Block(              # memory and dispatches; samples depend on them by rounding alone
    cache_gib=0.0,            # of each device for keys and values; 0: what it has left (a CPU: 4)
    tokens=32,                # of each row that are decoded between two looks by the host
    chunk=256,                # tokens of a prompt that are read at a time
    cache="auto",             # type of keys and values; "bfloat16" and "int8" are checked at start
    page=0,                   # tokens of a page of the cache: 16, 32, 64 (TPU, GPU), or 0: no pages
)

adamw = Block(
    lr=REQUIRED,
    warmup=0,                 # optimizer updates
    decay="constant",         # "constant" "linear" "cosine", over the stage's updates
    clip=1.0,                 # global norm of the gradient at most
    weight_decay=0.0,         # on matrices, not on norm scales
    b1=0.9,
    b2=0.999,
    eps=1e-8,
)

lora = Block(
    rank=0,                   # 0 trains the weights themselves, not adapters
    alpha=32.0,               # the adapters' product is scaled by alpha / rank
    targets=("q", "k", "v", "o", "gate", "up", "down"),
)

stage = Block(                # what every stage reads; `|` adds the keys of its objective
    steps=REQUIRED,           # rollout batches; 0 leaves the stage out of every arm
    prompts=REQUIRED,         # problems a step
    sampling=REQUIRED,
    optim=REQUIRED,
    epochs=1,                 # passes over a step's rollouts
    minibatches=1,            # optimizer updates of a pass
    microbatches=1,           # slices of an update, one at a time in memory
    mean="token",             # the loss is a mean over "token" "sequence" or "constant" lengths
    block=4096,               # tokens whose logits exist at once on a device
    save_every=50,            # steps between checkpoints
    log_samples=4,            # samples a step that are logged as text
    lora=lora(),
)

evaluation = Block(           # one benchmark, scored at the end or between the steps of stages
    split=REQUIRED,
    problems=0,               # the first N of the split; 0: all
    prompts=64,               # problems that are sampled side by side
    sampling=REQUIRED,
    statistics="all",         # of stats.STATISTICS, with commas between: "avg,response_length"
    ks=(1,),                  # of pass@k and maj@k, each at most samples_per_prompt
    draws=1000,               # of the bootstrap behind an interval
    level=0.95,               # of an interval
    log_samples=64,           # problems whose first sample is stored as text, at the end
    when="end",               # "end": an arm's finished weights; "every 50": at these steps
    stages="all",             # the stages with such steps, with commas between
)

# GSPO is surrogate="gspo" with mean="sequence", clip_low=3e-4, clip_high=4e-4.
grpo = Block(
    advantages="group",       # "group": (r - mean) / std of a prompt's samples; "centred": no std
    surrogate="clipped",      # "clipped" "dual_clipped" "gspo" "cispo"
    clip_low=0.2,             # the ratio is clipped below 1 - clip_low
    clip_high=0.2,            # and above 1 + clip_high
    clip_most=3.0,            # dual_clipped: bounds the loss of a negative advantage
    kl="none",                # to the stage's start: "none" "k2" "k3" "k3_corrected" "exact"
    kl_coef=0.0,
    mismatch="none",          # corrects for the sampler's numbers: "none" "truncate" "mask"
    mismatch_level="token",   # "token" "sequence"
    mismatch_least=0.5,       # mask: ratios below count as 0
    mismatch_most=2.0,        # truncate: ratios above count as this; mask: as 0
    rounds=0,                 # 0 keeps groups of equal rewards; n samples n rounds to replace them
    overlong="none",          # long responses: "none", "mask" leaves cut ones out, "soft" penalises
    overlong_cache=1,         # soft: tokens before max_tokens over which the penalty grows
)

forward_kl = Block(
    form="full",              # "full", or "top_k": all other tokens count as one outcome
    top_k=64,
    support="teacher",        # whose top k: "teacher" "student" "union" "intersection"
    student_temperature=1.0,  # of the logits, "full" only
    teacher_temperature=1.0,
)

reverse_kl = Block(
    forward_kl,               # form also "intersection" (support too), "generalised" or "sampled"
    baseline=True,            # sampled: subtract the exact divergence
)


def shrink(config: ConfigDict) -> None:
  """Makes a config small enough to try in seconds: few steps, few samples, short answers."""
  for hp in config.stages.values():
    hp.update({"steps": 4, "prompts": 4, "save_every": 2, "minibatches": 1, "microbatches": 1})
    hp.sampling.update({"samples_per_prompt": 4, "max_tokens": min(32, hp.sampling.max_tokens)})
    hp.optim.warmup = min(1, hp.optim.warmup)
    if "pass_samples" in hp:
      hp.pass_samples = 4
  config.probe.update({"problems": 4, "prompts": 4, "group": 2, "microbatches": 1})
  config.probe.sampling.samples_per_prompt = 2
  for evaluation in config.evals.values():
    evaluation.draws = 50
    if evaluation.when == "end":
      evaluation.update({"prompts": 16, "ks": (1, 2)})
      evaluation.sampling.samples_per_prompt = 2
    else:
      evaluation.update({"problems": 4, "prompts": 4})
  for block in (config.probe, *config.evals.values()):
    block.sampling.max_tokens = min(32, block.sampling.max_tokens)
  config.mesh = (1, 1, 1)


# In the blocks below each value says where it is from:
#   printed  in the paper's tables 8 and 9 (arXiv 2605.12483 v4), or its text
#   gap      the paper does not print it; chosen after the authors' public code where that has one
#   ours     what no result depends on but by rounding: memory, logs, how often something is saved


def _answers(samples: int, **decoding: Any) -> dict[str, Any]:
  """The sampling of `math`: at temperature 1 and top-p 1 unless `decoding` has others."""
  return sampling(samples_per_prompt=samples,
                  max_tokens=16_384,   # printed: tokens of a response
                  **decoding)


def _math_rl(epoch: int) -> dict[str, Any]:
  """GRPO, of the teacher or of the student; `epoch` is one pass over the problems, in steps."""
  return stage(
      steps=10 * epoch,           # printed: 10 epochs. gap: passes over all labels; 20 over a half
      prompts=64,                 # gap: problems a step
      sampling=_answers(8),       # gap: rollouts and temperature, as printed for transfer
      optim=adamw(
          lr=1e-6,                # printed, with AdamW and a gradient clip of 1.0
          decay="constant",       # gap: as in the authors' code, without warmup
          weight_decay=0.1),      # gap: as in the authors' code
      epochs=1,                   # gap: passes over a step's rollouts, verl's default
      minibatches=8,              # printed: mini-batches of 8 problems
      microbatches=4,             # printed: one row a device, of 16
      mean="token",               # gap: verl's default
      block=1024,                 # ours
      save_every=10,              # ours
  ) | grpo(
      advantages="group",         # gap: divided by the group's deviation, verl's default
      surrogate="clipped",        # gap: verl also bounds the loss of negative advantages
      clip_low=0.2,               # printed: clip ratio 0.2
      clip_high=0.2,              # printed
      kl="k3",                    # gap: in the loss, verl's default
      kl_coef=5e-4,               # printed
      mismatch="none",            # gap: verl's default
      overlong="none")            # gap


def _math_transfer(epoch: int, samples: int, microbatches: int, block: int) -> dict[str, Any]:
  """Learning from a teacher's or the student's own rollouts, or from given solutions."""
  return stage(
      steps=epoch,                # printed: 1 epoch. gap: of each stage of a bridge; 2 over a half
      prompts=64,                 # printed: mini-batches of 64
      sampling=_answers(samples),  # printed: 8 rollouts, temperature 1.0, top-p 1.0, top-k -1
      optim=adamw(
          lr=1e-6,                # printed. gap: the table is read as that of forward_kl too
          decay="constant",       # gap: as in the authors' code, without warmup
          weight_decay=0.1),      # gap: as in the authors' code
      minibatches=1,              # printed: one update of all rollouts of a step
      microbatches=microbatches,  # ours: printed are 4 rows a device
      mean="token",               # gap: the authors' code averages microbatches' means
      block=block,                # ours
      save_every=10)              # ours


def _math_stages() -> dict[str, dict[str, Any]]:
  """The stages of `math`. AdamW's b1, b2 and eps are gaps: PyTorch's defaults, as in verl."""
  epoch = 271                     # steps of 64 in DAPO-Math-17K's 17,398 problems, whatever is read
  bridge = {"microbatches": 32, "block": 256}  # ours: two models' logits at once
  soft = forward_kl(form="full")  # gap: the teacher's whole distribution, unfiltered rollouts
  return {
      "teacher_grpo": _math_rl(epoch),
      # gap: the paper's SFT'd teachers learn from responses of gpt-oss-120B, by unprinted settings
      "teacher_sft": _math_transfer(epoch, 1, microbatches=4, block=1024),
      "forward_kl": _math_transfer(epoch, 8, **bridge) | soft,  # gap: 8 rollouts, as in OPD
      "sft": _math_transfer(epoch, 8, **bridge),  # gap: budget equal to the bridge's
      # An ablation of ours.
      "weighted_fkl": _math_transfer(epoch, 8, **bridge) | soft | {"pass_samples": 8},
      "reverse_kl": _math_transfer(epoch, 8, **bridge) | reverse_kl(
          form="full"),           # gap: the authors' code has the full divergence
      "student_grpo": _math_rl(epoch)}


def _math_evals() -> dict[str, dict[str, Any]]:
  """The paper's three benchmarks by a stage's last weights (gap), and a curve between steps."""
  # gap: the evaluation script of the authors' code has these
  decoding = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
  benchmarks = {name: evaluation(split=name, prompts=32,
                                 sampling=_answers(16, **decoding),  # printed: avg@16
                                 ks=(1, 4, 16), draws=2000)          # ours
                for name in ("math500", "aime24", "aime25")}         # printed
  return benchmarks | {
      "validation": evaluation(split="validation", problems=32, sampling=_answers(1, **decoding),
                               statistics="avg,response_length", when="every 50")}


def math(arg: ConfigDict) -> ConfigDict:
  """The settings that the mathematics configs share, after the paper; `arg` has seed, data, tiny.

  The paper prints 10 epochs of GRPO and 1 of transfer, and no number of steps for its half splits.
  Here a half arm makes as many updates as the others, which it is compared with, and so twice as
  many passes over its half. `qwen3_math.py:halves` has half arms with the printed passes.
  """
  config = ConfigDict()
  config.seed = arg.seed
  config.arms = "untrained,cold_grpo,raw_bridge,bridge,half_bridge_grpo_2h"
  config.task = "math"
  # Names of published sets (docs/data.md): files in `dir`, downloaded to there where they are not.
  config.data = {"dir": arg.data,
                 "labelled": "dapo_math_17k",  # printed. gap: which of its deduplications
                 "validation": "math_train",   # ours: for curves and probes
                 "math500": "math500", "aime24": "aime24", "aime25": "aime25",  # printed
                 "leave_out": "",  # problems, "labelled:17,aime24:5", or a file of such lines
                 # scored splits that may hold labelled problems, with commas between
                 "overlap": ""}
  # Optional: config.data.solutions, a file of responses (docs/sampling.md).
  config.checker = "verify"                 # gap: "string", or also math-verify
  config.list_order = "any"                 # gap: "fixed" counts a list's order without brackets
  config.label_share = 1.0                  # printed: all labels
  config.half_seed = 0                      # gap: the halves are fixed and random
  config.hub = ""                           # owner on huggingface.co of a folder that is absent
  config.student_layers = 0                 # make the student of this many layers of the teacher
  config.template = {}
  config.prompt_tokens = 3072               # printed for GRPO; for transfer 2,048
  config.dtype = "bfloat16"                 # printed
  config.remat = "block"                    # ours
  config.attention = "auto"                 # ours: the backend's own kernel
  config.mesh = (1, 16, 1)                  # printed: 16 devices
  config.sampler = sampler(chunk=512)
  config.compilation_cache = "auto"         # compiled programs: "auto", a folder, or "" for none
  config.profile = ""                       # "10:13" traces steps 10, 11 and 12 of each stage
  config.offload = ""                       # "optimizer,guide" wait in the host's memory

  config.stages = _math_stages()
  config.probe = {"split": "validation", "problems": 64, "prompts": 32, "group": 8, "top_k": 16,
                  "microbatches": 128, "block": 256, "sampling": _answers(16)}  # ours
  config.evals = _math_evals()
  if arg.tiny:
    config.prompt_tokens = 256
    config.dtype = "float32"
    shrink(config)
    config.stages.teacher_sft.sampling.samples_per_prompt = 1
  return config


# The paper's arms of a teacher, and those whose teacher and bridge use half of the labels.
_ARMS = "untrained,cold_grpo,raw_bridge,bridge,opd_only,sft_only"
_HALVES = ("half_bridge,half_bridge_grpo_2h,half_bridge_replay_1h,half_opd_grpo_2h,"
           "half_sft_grpo_2h")
_SFT_ARMS = "untrained,cold_grpo,sft_teacher_bridge"
_SFT_HALVES = ("half_sft_teacher_bridge,half_sft_teacher_bridge_grpo_2h,"
               "half_sft_teacher_bridge_replay_1h")


def choose_arms(config: ConfigDict, arg: ConfigDict) -> None:
  """Sets the arms that the arguments all_arms, sft_teacher and halves choose, and what they need.

  Raises:
    ValueError: all_arms and halves are both given.
  """
  refuse_together(arg, "halves", ("all_arms",),
                  "all_arms compares the halves with the other arms by equal updates")
  if arg.halves:
    config.arms = f"untrained,{_SFT_HALVES if arg.sft_teacher else _HALVES}"
    for hp in config.stages.values():
      hp.steps //= 2
  elif arg.all_arms or arg.sft_teacher:
    chosen = [_ARMS, _HALVES] if arg.all_arms else []
    if arg.sft_teacher:
      chosen += [_SFT_ARMS, _SFT_HALVES]
    config.arms = ",".join(dict.fromkeys(",".join(chosen).split(",")))
  if arg.sft_teacher:
    config.data.solutions = f"{arg.data}/solutions.jsonl"


def shorten(config: ConfigDict, max_tokens: int) -> None:
  """Makes a config of `math` short enough for one device: answers, steps, problems a step."""
  for hp in config.stages.values():
    hp.prompts = min(16, hp.prompts)
    hp.steps = min(100, hp.steps)
    hp.minibatches = min(2, hp.minibatches)
  for block in (*config.stages.values(), config.probe, *config.evals.values()):
    block.sampling.max_tokens = min(max_tokens, block.sampling.max_tokens)
  samples = min(4, config.probe.sampling.samples_per_prompt)
  config.probe.group = min(samples, config.probe.group)
  for block in (config.probe, *config.evals.values()):
    block.sampling.samples_per_prompt = min(samples, block.sampling.samples_per_prompt)
  for block in config.evals.values():
    block.ks = tuple(k for k in block.ks if k <= samples)


def fit_one_device(config: ConfigDict, adapters: Sequence[str]) -> None:
  """Makes a config of `math` fit one device: one row at a time, and adapters in these stages."""
  config.update({"mesh": (1, 1, 1), "remat": "named"})  # decoding needs more memory than that
  for name, hp in config.stages.items():
    hp.microbatches = hp.prompts * hp.sampling.samples_per_prompt // hp.minibatches
    hp.lora.rank = 32 if name in adapters else 0
  samples = config.probe.prompts * config.probe.sampling.samples_per_prompt
  config.probe.microbatches = samples
