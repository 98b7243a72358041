"""Checks a config, its models and its problems before anything runs.

Every check raises an InputError of one sentence that names the thing and the remedy. The recipe
calls all of them before it writes anything.

  s2d-jax doctor --config=configs/qwen3_math.py
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from s2d_jax import (
  bases,
  chat,
  combinations,
  evals,
  keys,
  loop,
  models,
  objectives,
  optim,
  options,
  placement,
  program_cache,
  rollouts,
  sampler,
  selection,
  timing,
)
from s2d_jax.data import golds, leave_out, overlap
from s2d_jax.errors import InputError
from s2d_jax.keys import Key, Record
from s2d_jax.models import Config, hf


class Stage(Protocol):
  """The fields of a `planning.Stage` that are checked; planning imports this file."""
  name: str
  actor: str
  learner: str
  guide: str | None
  objective: objectives.Objective
  reward: bool
  prompt_weights: Callable[[np.ndarray], np.ndarray] | None
  source: rollouts.Source


SEED = Key(lambda seed: 0 <= seed < 2**63, "choose it from 0 to 2**63 - 1")
CONFIG_KEYS: Record = {
    "seed": SEED, "half_seed": SEED,
    # Planning, the task, `check_pair` and `models` check these where they read them.
    "arms": keys.ANY, "task": keys.ANY, "data": keys.ANY,
    "teacher": keys.ANY, "student": keys.ANY, "template": keys.ANY,
    "dtype": keys.ANY, "remat": keys.ANY, "attention": keys.ANY,
    # The records of the stages depend on the table of stages, so `check_config` reads them.
    "stages": keys.ANY,
    "label_share": Key(lambda share: 0 < share <= 1,
                       "choose it above 0, up to 1, which keeps every label"),
    "prompt_tokens": keys.at_least(1),
    "mesh": Key(lambda sizes: len(sizes) == 3 and min(sizes) >= 1,
                "give three sizes of at least 1, for data, fsdp and tensor"),
    "sampler": sampler.SamplerConfig.KEYS, "probe": evals.PROBE_KEYS,
    "compilation_cache": program_cache.KEY, "profile": timing.PROFILE_KEY,
    "offload": placement.KEY,
    **bases.KEYS,
    "evals": keys.ANY}  # read by `check_config`: blocks of evals.EVALUATION_KEYS, by name

# Keys that some tasks read, each task its own; the task itself checks their values.
TASK_KEYS = ("checker", "list_order")
# Keys of earlier versions -> what replaced them.
_REPLACED = {"evaluation": "an entry of config.evals with when='end'",
             "validation": "an entry of config.evals with when='every 50'",
             "eval_every": "the key `when` of an entry of config.evals: when='every 50'"}

# The names that a stage may use, beside its actor: a name of rollouts.SOURCES.
ROLES = {"learner": ("teacher", "student"), "guide": (None, "teacher", "student", "reference")}


def stage_keys(stage: Stage) -> Record:
  """The record of a stage's block of config: all keys that the stage reads."""
  if not isinstance(stage.objective, objectives.Objective):
    raise InputError(f"the objective of the stage {stage.name} is {stage.objective!r}: make it an "
                     "objectives.Objective, which declares the config keys that it reads.")
  # The keys of one stage are read in several places: each contributes its own record.
  record = {**loop.KEYS, **options.KEYS, "lora": models.LORA_KEYS, "optim": optim.KEYS,
            **stage.objective.keys}
  if stage.reward:
    record |= objectives.REWARD_KEYS
  else:
    record |= selection.LENGTH_KEYS
    # Whether the actor exists is checked later.
    source = rollouts.SOURCES.get(stage.actor)
    if source is not None and source.model not in (None, stage.learner):
      record |= selection.KEEP_KEYS
  if stage.prompt_weights is not None:
    record |= objectives.PROMPT_WEIGHT_KEYS
  return record


def check_config(config: ConfigDict, stages: Mapping[str, Stage]) -> None:
  """Checks a config's keys against the records of what reads them, then their combinations.

  Args:
    config: the whole config; stages: the table of stages by name.

  Raises:
    InputError: a key is missing, unknown or out of range, or values do not combine.
  """
  # Names and ranges come first: the checks of combinations may then read any key.
  check_names(config)
  keys.check_block("config", {name: config[name] for name in config if name not in TASK_KEYS},
                   CONFIG_KEYS)
  with keys.prefixed("config.sampler."):
    sampler.check_config(sampler.SamplerConfig(**config.sampler))
  with keys.prefixed("config.probe."):
    evals.check_probe(config.probe)
  _check_evals(config)
  for name, hp in config.stages.items():
    if name not in stages:
      raise InputError(f"config.stages.{name} is not a stage of the recipe: remove it, or "
                       f"choose from {', '.join(stages)}.")
    path = f"config.stages.{name}"
    _refuse_replaced(path, hp)
    keys.check_block(path, hp, stage_keys(stages[name]))
    _check_stage(path, hp, stages[name])
  for path, block in _blocks_that_sample(config):
    with keys.prefixed(f"{path}.sampling."):
      sampler.check_sampling(block.sampling)


def check_names(config: ConfigDict) -> None:
  """Raises InputError unless a config has exactly the keys that are read, its blocks aside."""
  # Before a missing key is named: a config of an earlier version lacks the new one too.
  _refuse_replaced("config", config)
  keys.check_names("config", [name for name in config if name not in TASK_KEYS],
                   keys.present(config, CONFIG_KEYS))


def _refuse_replaced(path: str, block: ConfigDict) -> None:
  """Refuses a key of an earlier version, and names what replaced it."""
  for name, new in _REPLACED.items():
    if name in block:
      raise InputError(f"{path}.{name} was replaced by {new} (configs/common.py has the block "
                       "`evaluation`): move its values there.")


def _check_evals(config: ConfigDict) -> None:
  """Checks the blocks of config.evals; at least one runs at the end."""
  for name, hp in config.evals.items():
    path = f"config.evals.{name}"
    keys.check_block(path, hp, evals.EVALUATION_KEYS)
    with keys.prefixed(f"{path}."):
      evals.check_evaluation(hp)
    stages = () if hp.stages == "all" else hp.stages.split(",")
    for stage in stages:
      if stage not in config.stages:
        raise InputError(f"{path}.stages names {stage!r}: choose 'all', or several of "
                         f"{', '.join(config.stages)}.")
  if all(evals.every(hp) for hp in config.evals.values()):
    raise InputError("config.evals has no evaluation with when='end', so no arm gets a score: add "
                     "one.")


def _check_stage(path: str, hp: ConfigDict, stage: Stage) -> None:
  """Refuses a stage that names an unknown role, and values in range that do not combine."""
  for field, roles in {"actor": tuple(rollouts.SOURCES), **ROLES}.items():
    role = getattr(stage, field)
    if role not in roles:
      raise InputError(f"the {field} of the stage {stage.name} is {role!r}: choose it from "
                       f"{', '.join(map(str, roles))}.")
  try:
    stage.objective.check(hp)
  except ValueError as error:  # a user's check may raise a plain one
    raise InputError(f"{path}.{error}") from error
  if stage.guide is None and stage.objective.uses_guide(hp):
    raise InputError(f"{path}: its objective compares with a guide and the stage has none: name "
                     "one in its row.")
  with keys.prefixed(f"{path}."):
    models.lora(hp.lora)
    selection.check(hp)
    options.check(hp, stage)
    if stage.reward:
      combinations.check_rewards(hp)
      combinations.check_policy(hp)
  # An optimizer update takes an equal slice of the samples, a microbatch one of the update.
  samples = hp.sampling.samples_per_prompt
  fitting = stage.source.samples_per_prompt
  if fitting not in (None, samples):
    raise InputError(f"{path}.sampling.samples_per_prompt is {samples} and the source "
                     f"{stage.actor!r} has {fitting} for each problem: set it to {fitting}.")
  if hp.prompts * samples % (hp.minibatches * hp.microbatches):
    raise InputError(f"{path} draws {hp.prompts * samples} rows a step, which minibatches x "
                     f"microbatches = {hp.minibatches} x {hp.microbatches} does not divide: change "
                     "one of them.")
  # A stage of 0 steps is in no arm, and its warmup is never made.
  if hp.steps:
    with keys.prefixed(f"{path}.optim."):
      optim.check_warmup(hp.optim, loop.update_count(hp))


def check_profile(config: ConfigDict, stage: str, steps: int) -> None:
  """Refuses a profile of steps that a stage does not make."""
  if timing.steps_of(config.profile).stop > steps:
    raise InputError(f"config.profile is {config.profile!r} and the stage {stage} makes {steps} "
                     "steps: choose steps that every stage makes.")


def _blocks_that_sample(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """Yields (path, block) of every block that has a sampling block."""
  for name, hp in config.stages.items():
    yield f"config.stages.{name}", hp
  yield from _blocks_that_score(config)


def _blocks_that_score(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """Yields (path, block) of the probe and of every evaluation."""
  yield "config.probe", config.probe
  for name, hp in config.evals.items():
    yield f"config.evals.{name}", hp


def check_pair(config: ConfigDict, teacher: tuple[Config, chat.Chat],
               student: tuple[Config, chat.Chat]) -> None:
  """Refuses a teacher and a student that do not fit each other, or the config.

  Args:
    teacher, student: as `sampler.read_folder` returns them.

  Raises:
    InputError: two tokenizers or vocabularies, a prompt and response beyond a model's positions, a
      top k beyond the vocabulary, a stop string that no token makes.
  """
  tokenizer = teacher[1]
  # A guide scores the tokens that the other model sampled, so an id must mean one thing to both.
  chat.same_tokenizer(tokenizer, student[1])
  sizes = [model_config.vocab_size for model_config, _ in (teacher, student)]
  if sizes[0] != sizes[1]:
    raise InputError(f"teacher and student embed {sizes[0]} and {sizes[1]} tokens: pad the smaller "
                     "model's vocabulary to the larger's.")
  _check_windows(config)
  _check_top_k(config, sizes[0])
  _check_pages(config)
  for path, block in _blocks_that_sample(config):
    with keys.prefixed(f"{path}.sampling: "):
      tokenizer.check_stops(block.sampling.stop_strings)


def _check_pages(config: ConfigDict) -> None:
  """Refuses a paged cache whose mesh does not split each model's key heads."""
  # A device holds whole pages of whole heads.
  tensor = config.mesh[2]
  for role in ("teacher", "student"):
    heads = hf.read_config(config[role]).kv_heads
    if config.sampler.page and heads % tensor:
      raise InputError(f"config.sampler.page is {config.sampler.page}, and config.mesh's tensor of "
                       f"{tensor} does not divide the {heads} key heads of the {role}: set page "
                       "to 0.")


def _check_top_k(config: ConfigDict, size: int) -> None:
  """Refuses a top k of more tokens than the models embed."""
  # The full and the sampled form do not read top_k, so their value may be anything.
  blocks = {f"config.stages.{name}": hp for name, hp in config.stages.items()
            if hp.get("form") in objectives.TOP_K_FORMS}
  for path, block in {**blocks, "config.probe": config.probe}.items():
    if block.top_k > size:
      raise InputError(f"{path}.top_k is {block.top_k} and the vocabulary has {size} tokens: lower "
                       "it.")


def _check_windows(config: ConfigDict) -> None:
  """Refuses prompts and responses longer than the positions of either model."""
  for role in ("teacher", "student"):
    positions = hf.read_config(config[role]).max_positions
    for path, block in _blocks_that_sample(config):
      tokens = config.prompt_tokens + block.sampling.max_tokens
      if tokens > positions:
        raise InputError(f"config.prompt_tokens + {path}.sampling.max_tokens is {tokens} and the "
                         f"{role} has {positions} positions (max_position_embeddings): lower one.")


def check_splits(config: ConfigDict, splits: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
  """Refuses an empty split, a problem or an id that two splits share, and too small a probe split.

  A scored split that `config.data.overlap` names may share problems with others.

  Args:
    splits: the problems of every split that the config names.

  Returns:
    The problems of each scored split that are among the labelled ones, by normalised text.
  """
  allowed = _allowed_overlap(config, splits)
  scored = {split: problems for split, problems in splits.items() if split != "labelled"}
  shared = overlap.shared(splits["labelled"], scored)
  for split, problems in splits.items():
    if not problems:
      raise InputError(f"the split {split!r} of task {config.task!r} is empty: give it problems.")
  overlap.check(splits, shared, allowed, config.data.get("leave_out", ""))
  for path, hp in _blocks_that_score(config):
    size = len(splits[hp.split])
    if hp.problems > size:
      raise InputError(f"{path}.problems is {hp.problems} and the split {hp.split} has {size}: "
                       "lower it.")
  return shared


def _allowed_overlap(config: ConfigDict, splits: Mapping[str, list[dict]]) -> set[str]:
  """The scored splits that may share problems with others, by config.data.overlap."""
  names = set(filter(None, config.data.get("overlap", "").split(",")))
  for name in sorted(names):
    # Entries of config.data that this run does not score may be named too.
    if name not in {*splits, *config.data} - {"labelled"}:
      raise InputError(f"config.data.overlap names {name!r}: choose scored splits, such as "
                       f"{', '.join(s for s in splits if s != 'labelled')}.")
  return names


def check_answers(reward: Callable[[dict, str], float], respond: Callable[[str], str],
                  splits: Mapping[str, list[dict]], left_out: str = "") -> None:
  """Refuses answers that no response can match, or that an empty response matches.

  Args:
    left_out: the value of config.data.leave_out, which the message extends; others as `unmatched`.
  """
  wrong = unmatched(reward, respond, splits)
  if wrong:
    counts = ", ".join(f"{count} of {split}" for split, count in
                       collections.Counter(split for split, _ in wrong).items())
    raise InputError(f"no response matches the answers of some problems ({counts}): correct them, "
                     f"or {leave_out.remedy(left_out, wrong)} to leave them out.")


def unmatched(reward: Callable[[dict, str], float], respond: Callable[[str], str],
              splits: Mapping[str, Iterable[dict]]) -> list[leave_out.Entry]:
  """The problems whose answers no response can match, or an empty one matches, by split and id.

  Args:
    reward: (problem, response) -> 1 where the response is right.
    respond: answer -> the response that gives it.
  """
  # Another form of response may well hold JSON or lines of text.
  boxed = "\\boxed{" in respond("")
  return [(split, problem["id"]) for split, problems in splits.items() for problem in problems
          if not _can_be_matched(reward, respond, problem, boxed)]


def _can_be_matched(reward: Callable[[dict, str], float], respond: Callable[[str], str],
                    problem: dict, boxed: bool) -> bool:
  """Whether a response gives a problem's answer, and an empty one does not."""
  answer = problem["answer"]
  if reward(problem, respond(answer)) != 1 or reward(problem, respond("")):
    return False
  bare = golds.bare(answer) if boxed else None
  # The checker may itself read the answer inside.
  return bare is None or bare != "" and reward(problem, respond(bare)) == 1


def check_prompts(config: ConfigDict, prompts: Mapping[str, list[rollouts.Prompt]]) -> None:
  """Refuses a prompt of more than config.prompt_tokens tokens."""
  long = [(split, prompt) for split, of_split in prompts.items() for prompt in of_split
          if len(prompt.tokens) > config.prompt_tokens]
  if long:
    split, prompt = long[0]
    remedy = _or_leave_out(config.data.get("leave_out"), [(name, one.id) for name, one in long])
    raise InputError(f"problem {prompt.id} of {split} takes {len(prompt.tokens)} tokens and its "
                     f"window is {config.prompt_tokens}: raise config.prompt_tokens{remedy}.")


def check_texts(path: str, key: str, max_tokens: int, prompts: list[rollouts.Prompt],
                problems: dict[Any, dict], tokenizer: chat.Chat, left_out: str | None) -> None:
  """Refuses labelled problems that lack a text, or have one of more than `max_tokens` tokens.

  Args:
    path: names the stage's config; key: of the text in a problem; problems: by id.
    left_out: the value of config.data.leave_out; None where the config lacks it.
  """
  absent = [("labelled", prompt.id) for prompt in prompts if problems[prompt.id].get(key) is None]
  if absent:
    raise InputError(f"problem {absent[0][1]} has no {key} and {path} learns from it: add one, "
                     f"or drop the arm{_or_leave_out(left_out, absent)}.")
  tokens = {prompt.id: len(tokenizer.encode_response(
      problems[prompt.id][key], f"the {key} of problem {prompt.id}")) for prompt in prompts}
  long = [("labelled", number) for number, count in tokens.items() if count > max_tokens]
  if long:
    number = long[0][1]
    raise InputError(f"the {key} of problem {number} takes {tokens[number]} tokens and "
                     f"{path}.sampling.max_tokens is {max_tokens}: raise it"
                     f"{_or_leave_out(left_out, long)}.")


def _or_leave_out(left_out: str | None, entries: Sequence[leave_out.Entry]) -> str:
  """The end of a message: to leave out all problems that have a fault; "" where none can be."""
  if left_out is None:
    return ""
  return f", or {leave_out.remedy(left_out, entries)} to leave out such problems ({len(entries)})"
