"""Shared pieces of configs: the argument string and the blocks most stages have in common."""

import ml_collections


def parse_arg(arg, **defaults):
  """`config.py:seed=1,tiny` -> a ConfigDict of the defaults' types; unknown names are refused.

  Only for what moves several settings at once or names the run; everything else is a flat override
  on the command line, `--config.stages.reverse_kl.optim.lr=1e-4`.
  """
  parsed = ml_collections.ConfigDict(defaults)
  for item in filter(None, (arg or "").split(",")):
    name, given, value = item.partition("=")
    if name not in defaults:
      raise ValueError(f"the config's argument {name!r} is unknown: use {', '.join(defaults)}.")
    kind = type(defaults[name])
    if kind is bool:
      if given and value.lower() not in ("true", "1", "false", "0"):
        raise ValueError(f"the config's argument {name} is {value!r}: use true or false.")
      parsed[name] = not given or value.lower() in ("true", "1")
    elif not value or kind is int and not value.lstrip("-").isdecimal():
      raise ValueError(f"the config's argument {name} is {value!r}: give it as in "
                       f"{name}={defaults[name]}.")
    else:
      parsed[name] = kind(value)
  return parsed


def sampling(samples_per_prompt, max_tokens, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
             min_tokens=0, stop_strings=()):
  """How to sample; the defaults sample the model's own distribution.

  A response ends with the tokenizer's end ids, and with the token that completes a stop string.
  """
  return {"samples_per_prompt": samples_per_prompt, "temperature": temperature, "top_p": top_p,
          "top_k": top_k, "min_p": min_p, "max_tokens": max_tokens, "min_tokens": min_tokens,
          "stop_strings": stop_strings}


def room(cache_gib=4.0, tokens=32, chunk=256, cache="auto", page=0):
  """How samplers use a device; samples depend on it by rounding alone (docs/sampling.md).

  cache_gib: memory of each device for keys and values, which says how many rows are sampled side by
  side. tokens: at most so many of each row between two looks by the host. chunk: tokens of a prompt
  read at a time. cache: "auto" keeps keys and values in the activations' type; in a
  narrower one ("bfloat16", "int8") they are held against the trainer before a stage starts. page:
  tokens of a page (16, 32 or 64), where rows are to hold pages as they fill them (TPU, GPU), or 0.
  """
  return {"cache_gib": cache_gib, "tokens": tokens, "chunk": chunk, "cache": cache,
          "page": page}


def adamw(lr, warmup=0, decay="constant", clip=1.0, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
  """AdamW; warmup counts optimizer updates."""
  return {"lr": lr, "warmup": warmup, "decay": decay, "clip": clip, "weight_decay": weight_decay,
          "b1": b1, "b2": b2, "eps": eps}


def stage(steps, prompts, sampling, optim, epochs=1, minibatches=1, microbatches=1, mean="token",
          block=4096, eval_every=0, save_every=50, log_samples=4, adapters=None):
  """What every row of the recipe reads.

  A step draws `prompts` problems; `mean` is "token", "sequence" or "constant"; `block` is how many
  tokens' logits exist at once on a device; `eval_every` 0 never evaluates on the way; `adapters`
  are arguments of `lora`. The blocks are copied: a ConfigDict keeps a dict that stands in two
  places as one, and an override would change both.
  """
  return {"steps": steps, "prompts": prompts, "sampling": dict(sampling), "optim": dict(optim),
          "epochs": epochs, "minibatches": minibatches, "microbatches": microbatches, "mean": mean,
          "block": block, "eval_every": eval_every, "save_every": save_every,
          "log_samples": log_samples, "lora": lora(**(adapters or {}))}


def lora(rank=0, alpha=32.0, targets=("q", "k", "v", "o", "gate", "up", "down")):
  """Low-rank adapters instead of the weights themselves; rank 0 trains the weights."""
  return {"rank": rank, "alpha": alpha, "targets": targets}


def grpo(advantages="group", surrogate="clipped", clip_low=0.2, clip_high=0.2, clip_most=3.0,
         kl="none", kl_coef=0.0, mismatch="none", mismatch_level="token", mismatch_least=0.5,
         mismatch_most=2.0, rounds=0, overlong="none", overlong_cache=1):
  """What a row with rewards reads besides; the names stand in `objectives`.

  advantages: "group" (divided by its standard deviation) or "centred". surrogate: "clipped",
  "dual_clipped" (bounded by clip_most), "gspo", "cispo". kl: "none", "k2", "k3", "k3_corrected",
  "exact". mismatch of sampler and trainer: "none", "truncate", "mask", by "token" or "sequence".
  rounds: 0 keeps every group; 1 or more drops those whose rewards are equal and draws for others,
  in so many rounds in all. overlong: "none", "mask" (answers cut off are left out) or "soft" (the
  last overlong_cache tokens before the limit are punished). GSPO is surrogate="gspo" with
  mean="sequence", clip_low=3e-4, clip_high=4e-4.
  """
  return {"advantages": advantages, "surrogate": surrogate, "clip_low": clip_low,
          "clip_high": clip_high, "clip_most": clip_most, "kl": kl, "kl_coef": kl_coef,
          "mismatch": mismatch, "mismatch_level": mismatch_level,
          "mismatch_least": mismatch_least, "mismatch_most": mismatch_most, "rounds": rounds,
          "overlong": overlong, "overlong_cache": overlong_cache}


def distil(form="full", top_k=64, support="teacher", student_temperature=1.0,
           teacher_temperature=1.0):
  """What a row with a guide reads besides; "full" is the exact divergence.

  form: "full" or "top_k" (with all the rest as one outcome more); for reverse KL also
  "intersection" and "sampled". support: of the top k, "teacher", "student", "union" or
  "intersection", which is the only one of that form. Temperatures are for "full" alone.
  """
  return {"form": form, "top_k": top_k, "support": support,
          "student_temperature": student_temperature, "teacher_temperature": teacher_temperature}


def reverse(baseline=True, **how):
  """`distil` for reverse KL; the sampled form has the exact divergence as its baseline or none."""
  return distil(**how) | {"baseline": baseline}


def shrink(config):
  """Makes a config small enough to try in seconds: few steps, few samples, short answers."""
  for hp in config.stages.values():
    hp.update({"steps": 4, "prompts": 4, "save_every": 2, "minibatches": 1, "microbatches": 1})
    hp.sampling.update({"samples_per_prompt": 4, "max_tokens": min(32, hp.sampling.max_tokens)})
    hp.optim.warmup = min(1, hp.optim.warmup)
    if "pass_samples" in hp:
      hp.pass_samples = 4
  config.validation.problems = 4
  config.probe.update({"problems": 4, "prompts": 4, "group": 2, "microbatches": 1})
  config.probe.sampling.samples_per_prompt = 2
  config.evaluation.update({"prompts": 16, "draws": 50, "ks": (1, 2)})
  config.evaluation.sampling.samples_per_prompt = 2
  for block in (config.validation, config.probe, config.evaluation):
    block.sampling.max_tokens = min(32, block.sampling.max_tokens)
  config.mesh = (1, 1, 1)


def math(arg):
  """The settings the two mathematics configs share, after the paper's tables 8 and 9 (v4).

  `arg` has seed, data (a folder) and tiny. Printed in the paper: AdamW at 1e-6, clip 0.2, KL
  coefficient 5e-4, gradient clip 1, mini-batches of 8 (GRPO) and 64 (transfer) prompts, one row a
  device in GRPO, 10 epochs (GRPO) and 1 (transfer), read as passes over the prompts, prompts of at
  most 3,072 tokens (GRPO; 2,048 in transfer, where we keep the one window), answers of at most
  16,384, 8 rollouts a prompt at temperature 1 (transfer), bfloat16, 16 devices, avg@16. Not
  printed, so chosen, with the authors' public code as the guide: 8 rollouts a prompt and 64 prompts
  a step in GRPO, k3 as the KL, advantages divided by the group's std, means over tokens, weight
  decay 0.1, no warmup, evaluation at temperature 0.7, top-p 0.8, top-k 20. A half arm makes as many
  updates as a full one, and so twice the passes over its half.
  """
  config = ml_collections.ConfigDict()
  config.seed = arg.seed
  config.arms = "untrained,cold_grpo,raw_bridge,bridge,half_bridge_grpo_2h"
  config.task = "math"
  # Score another set by name: --config.evaluation.split=aime24 (finished stages are kept).
  config.data = {"labelled": f"{arg.data}/dapo_math_17k.jsonl",
                 "validation": f"{arg.data}/validation.jsonl",
                 "math500": f"{arg.data}/math500.jsonl", "aime24": f"{arg.data}/aime24.jsonl",
                 "aime25": f"{arg.data}/aime25.jsonl"}
  # Optional: config.data.solutions, a file of responses (docs/sampling.md), and config.data.grader,
  # "math_verify" instead of the string match.
  config.label_share = 1.0
  config.half_seed = 0
  config.template = {}
  config.prompt_tokens = 3072
  config.dtype = "bfloat16"
  config.remat = "block"
  config.attention = "auto"                 # the backend's own kernel
  config.mesh = (1, 16, 1)
  config.sampler = room(cache_gib=16.0, chunk=512)

  T, epoch = 16_384, 271  # tokens of an answer; steps of 64 in DAPO-Math-17K's 17,398 problems
  optim = adamw(1e-6, weight_decay=0.1)
  def rl():
    return stage(10 * epoch, 64, sampling(8, T), optim, minibatches=8, microbatches=4, block=1024,
                 save_every=10, eval_every=50) | grpo(kl="k3", kl_coef=5e-4)
  def transfer(samples, **memory):
    return stage(epoch, 64, sampling(samples, T), optim, save_every=10, eval_every=50, **memory)
  bridge = {"microbatches": 32, "block": 256}  # two models' logits at once
  config.stages = {
      "teacher_grpo": rl(), "teacher_sft": transfer(1, microbatches=4, block=1024),
      "forward_kl": transfer(8, **bridge) | distil(), "sft": transfer(8, **bridge),
      "weighted_fkl": transfer(8, **bridge) | distil() | {"pass_samples": 8},
      "reverse_kl": transfer(8, **bridge) | reverse(), "student_grpo": rl()}
  decoding = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
  config.validation = {"split": "validation", "problems": 32,
                       "sampling": sampling(1, T, **decoding)}
  config.probe = {"split": "validation", "problems": 64, "prompts": 32, "group": 8, "top_k": 16,
                  "microbatches": 128, "block": 256, "sampling": sampling(16, T)}
  config.evaluation = {"split": "math500", "prompts": 32, "sampling": sampling(16, T, **decoding),
                       "ks": (1, 4, 16), "draws": 2000, "level": 0.95, "log_samples": 64}
  if arg.tiny:
    config.prompt_tokens = 256
    config.dtype = "float32"
    shrink(config)
    config.stages.teacher_sft.sampling.samples_per_prompt = 1
  return config
