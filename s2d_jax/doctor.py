"""What is wrong with this config, these weights, this tokenizer pair, before a chip is rented.

Every check raises ValueError with one sentence that names the thing and the remedy. The recipe
calls them all before it writes anything.

  s2d-jax doctor --config=configs/qwen3_math.py
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from s2d_jax import chat, evals, keys, loop, models, objectives, optim, rollouts, sampler, training
from s2d_jax.keys import Key, Record
from s2d_jax.models import hf

Stage = Any  # a planning.Stage; planning imports this file
Task = Any   # a planning.Task
SEED = Key(lambda seed: 0 <= seed < 2**63, "choose it from 0 to 2**63 - 1")
CONFIG_KEYS: Record = {
    "seed": SEED, "half_seed": SEED,
    "arms": keys.ANY, "task": keys.ANY, "data": keys.ANY,  # read by planning and the task
    "teacher": keys.ANY, "student": keys.ANY, "template": keys.ANY,  # read by `check_pair`
    "dtype": keys.ANY, "remat": keys.ANY, "attention": keys.ANY,     # read by `models`
    "stages": keys.ANY,  # read by `check_config`: their records depend on the table of stages
    "label_share": Key(lambda share: 0 < share <= 1,
                       "choose it above 0, up to 1, which keeps every label"),
    "prompt_tokens": keys.at_least(1),
    "mesh": Key(lambda sizes: len(sizes) == 3 and min(sizes) >= 1,
                "give three sizes of at least 1, for data, fsdp and tensor"),
    "sampler": sampler.Room.KEYS, "validation": evals.VALIDATION_KEYS, "probe": evals.PROBE_KEYS,
    "evaluation": evals.EVALUATION_KEYS}


def stage_keys(stage: Stage) -> Record:
  """The record of a stage's block of config: all keys that the stage reads."""
  if not isinstance(stage.objective, objectives.Objective):
    raise ValueError(f"the objective of the stage {stage.name} is {stage.objective!r}: make it an "
                     "objectives.Objective, which declares the config keys that it reads.")
  record = {**loop.KEYS, **training.KEYS, "lora": models.LORA_KEYS, "optim": optim.KEYS,
            **stage.objective.keys}
  if stage.reward:
    record |= objectives.REWARD_KEYS
  if stage.prompt_weights is not None:
    record |= objectives.PROMPT_WEIGHT_KEYS
  return record


def check_config(config: ConfigDict, stages: Mapping[str, Stage]) -> None:
  """Checks a config's keys against the records of what reads them, then their combinations.

  Args:
    config: the whole config; stages: the table of stages by name.

  Raises:
    ValueError: a key is missing, unknown or out of range, or values do not combine.
  """
  keys.check_block("config", config, CONFIG_KEYS)
  _named("config.sampler", sampler.check_room, loop.room(config.sampler))
  _named("config.probe", evals.check_probe, config.probe)
  _named("config.evaluation", evals.check_evaluation, config.evaluation)
  for name, hp in config.stages.items():
    if name not in stages:
      raise ValueError(f"config.stages.{name} is no row of the recipe: remove it, or choose from "
                       f"{', '.join(stages)}.")
    path = f"config.stages.{name}"
    keys.check_block(path, hp, stage_keys(stages[name]))
    _check_stage(path, hp, stages[name])
  for path, block in _blocks_that_sample(config):
    _named(f"{path}.sampling", sampler.check_sampling, block.sampling)


def _named(path: str, check: Callable[..., None], *args: Any) -> None:
  """Runs a check whose messages begin with a key's name, and puts the block's path before it."""
  try:
    check(*args)
  except ValueError as error:
    raise ValueError(f"{path}.{error}") from error


def _check_stage(path: str, hp: ConfigDict, stage: Stage) -> None:
  """Refuses a stage's values that are in range one by one and do not combine."""
  _named(path, stage.objective.check, hp)
  _named(path, models.lora, hp.lora)
  if stage.reward:
    _named(path, objectives.check_rewards, hp)
  samples = hp.sampling.samples_per_prompt
  if stage.actor == "given" and samples != 1:
    raise ValueError(f"{path}.sampling.samples_per_prompt is {samples} and a problem has one given "
                     "solution: set it to 1.")
  if hp.prompts * samples % (hp.minibatches * hp.microbatches):
    raise ValueError(f"{path} draws {hp.prompts * samples} rows a step, which minibatches x "
                     f"microbatches = {hp.minibatches} x {hp.microbatches} does not divide: change "
                     "one of them.")
  if hp.steps:
    _named(f"{path}.optim", optim.check_warmup, hp.optim, loop.update_count(hp))


def _blocks_that_sample(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """Yields (path, block) of every block that has a sampling block."""
  for name, hp in config.stages.items():
    yield f"config.stages.{name}", hp
  for name in ("validation", "probe", "evaluation"):
    yield f"config.{name}", config[name]


def check_pair(config: ConfigDict) -> tuple[chat.Chat, dict[str, dict[str, str]]]:
  """The pair's shared Chat and each base's identity; tokenizers and vocabularies must agree.

  Raises:
    ValueError: what `hf.load` and `chat.Chat` refuse, two tokenizers or vocabularies, more tokens
      than embeddings, an unknown dtype, remat or attention, a top k beyond the vocabulary.
  """
  bases = {role: {"folder": str(config[role]), "identity": hf.identity(config[role])}
           for role in ("teacher", "student")}
  for role in bases:
    hf.check(config[role])
    models.read_config(hf.read_json(config[role]), **{key: config[key] for key in models.RUN})
  tokenizer = chat.Chat(config.teacher, **config.template)
  chat.same_tokenizer(tokenizer, chat.Chat(config.student, **config.template))
  sizes = [hf.read_json(config[role])["vocab_size"] for role in ("teacher", "student")]
  if sizes[0] != sizes[1]:
    raise ValueError(f"teacher and student embed {sizes[0]} and {sizes[1]} tokens: pad the smaller "
                     "model's vocabulary to the larger's.")
  last = max(tokenizer.vocabulary.values())
  if last >= sizes[0]:
    raise ValueError(f"the tokenizer of {config.teacher} has the token id {last} and its model "
                     f"embeds {sizes[0]} tokens: take the tokenizer that came with the weights.")
  _check_windows(config)
  _check_top_k(config, sizes[0])
  _check_pages(config)
  for path, block in _blocks_that_sample(config):
    try:
      tokenizer.check_stops(block.sampling.stop_strings)
    except ValueError as error:
      raise ValueError(f"{path}.sampling: {error}") from error
  return tokenizer, bases


def _check_pages(config: ConfigDict) -> None:
  """Refuses a paged cache whose mesh does not split each model's key heads."""
  tensor = config.mesh[2]
  for role in ("teacher", "student"):
    heads = models.read_config(hf.read_json(config[role])).kv_heads
    if config.sampler.page and heads % tensor:
      raise ValueError(f"config.sampler.page is {config.sampler.page}, and config.mesh's tensor of "
                       f"{tensor} does not divide the {heads} key heads of the {role}: set page "
                       "to 0.")


def _check_top_k(config: ConfigDict, size: int) -> None:
  """Refuses a top k of more tokens than the models embed."""
  blocks = {f"config.stages.{name}": hp for name, hp in config.stages.items()
            if hp.get("form") in objectives.TOP_K_FORMS}
  for path, block in {**blocks, "config.probe": config.probe}.items():
    if block.top_k > size:
      raise ValueError(f"{path}.top_k is {block.top_k} and the vocabulary has {size} tokens: lower "
                       "it.")


def _check_windows(config: ConfigDict) -> None:
  """Refuses prompts and responses longer than the positions of either model."""
  for role in ("teacher", "student"):
    positions = hf.read_json(config[role]).get("max_position_embeddings")
    for path, block in _blocks_that_sample(config):
      tokens = config.prompt_tokens + block.sampling.max_tokens
      if positions is not None and tokens > positions:
        raise ValueError(f"config.prompt_tokens + {path}.sampling.max_tokens is {tokens} and the "
                         f"{role} has {positions} positions (max_position_embeddings): lower one.")


def check_problems(config: ConfigDict, task: Task, tokenizer: chat.Chat,
                   ) -> tuple[dict[str, list[rollouts.Prompt]], dict[Any, dict]]:
  """Reads and renders every split the config names.

  Returns:
    ({split: [Prompt]}, {id: problem}) over `labelled` and the validation, probe and evaluation
    splits.

  Raises:
    ValueError: an empty split, an id or a problem that two splits share, a prompt longer than
      config.prompt_tokens.
  """
  prompts, problems, seen = {}, {}, {}
  for split in dict.fromkeys(("labelled", config.validation.split, config.probe.split,
                              config.evaluation.split)):
    source = task.source(split)
    if not len(source):
      raise ValueError(f"the split {split!r} of task {config.task!r} is empty: give it problems.")
    prompts[split] = []
    for problem in (source[i] for i in range(len(source))):
      for key in (problem["problem"], problem["id"]):  # an absent id is made from the problem
        if key in seen:
          shown = repr(key) if len(str(key)) <= 80 else repr(key[:80]) + " ..."
          raise ValueError(f"{shown} stands in {seen[key]} and again in {split}: every split needs "
                           "ids and problems of its own.")
        seen[key] = split
      tokens = tuple(tokenizer.render(task.messages(problem)))
      if len(tokens) > config.prompt_tokens:
        raise ValueError(f"problem {problem['id']} of {split} takes {len(tokens)} tokens and its "
                         f"window is {config.prompt_tokens}: raise config.prompt_tokens.")
      problems[problem["id"]] = problem
      prompts[split].append(rollouts.Prompt(problem["id"], tokens))
  held = len(prompts[config.probe.split])
  if config.probe.problems > held:
    raise ValueError(f"config.probe.problems is {config.probe.problems} and the split "
                     f"{config.probe.split} has {held}: lower it.")
  return prompts, problems


def check_solutions(path: str, max_tokens: int, prompts: list[rollouts.Prompt],
                    problems: dict[Any, dict], tokenizer: chat.Chat) -> None:
  """That each of the prompts' problems has a solution, of at most `max_tokens` tokens.

  Args:
    path: names the stage's config; prompts, problems: as `check_problems` returns them.
  """
  for prompt in prompts:
    solution = problems[prompt.id].get("solution")
    if solution is None:
      raise ValueError(f"problem {prompt.id} has no solution and {path} learns from it: add one, "
                       "or drop the arm.")
    tokens = len(tokenizer.encode_response(solution))
    if tokens > max_tokens:
      raise ValueError(f"the solution of problem {prompt.id} takes {tokens} tokens and "
                       f"{path}.sampling.max_tokens is {max_tokens}: raise it.")
