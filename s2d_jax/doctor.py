"""What is wrong with this config, these weights, this tokenizer pair, before a chip is rented.

Every check raises ValueError with one sentence that names the thing and the remedy. The recipe
calls them all before it writes anything.

  s2d-jax doctor --config=configs/qwen3_math.py
"""

import math

from s2d_jax import chat, loop, models, objectives, optim, rollouts, sampler, training
from s2d_jax.models import hf

TOP = ("seed", "arms", "task", "data", "label_share", "half_seed", "teacher", "student", "template",
       "prompt_tokens", "dtype", "remat", "attention", "mesh", "sampler", "stages", "validation",
       "probe", "evaluation")
TRAINED = ("labelled", "all", "1h", "2h")  # a split of the data by one of these names is not scored
SAMPLING = ("samples_per_prompt", "temperature", "top_p", "top_k", "min_p", "max_tokens",
            "min_tokens", "stop_strings")
VALIDATION = ("split", "problems", "sampling")
PROBE = ("split", "problems", "prompts", "sampling", "group", "top_k", "microbatches", "block")
EVALUATION = ("split", "prompts", "sampling", "ks", "draws", "level", "log_samples")


def check_config(config, stages):
  """Holds a config's keys against those that are read: none missing, none unknown.

  Args:
    config: the ConfigDict; stages: {row name: planning.Stage}.
  """
  check_keys("config", config, TOP)
  check_keys("config.sampler", config.sampler, sampler.Room._fields)
  sampler.check_room(loop.room(config.sampler))
  for place, wanted in (("validation", VALIDATION), ("probe", PROBE), ("evaluation", EVALUATION)):
    check_keys(f"config.{place}", config[place], wanted)
    _check_sampling(f"config.{place}.sampling", config[place].sampling)
  if len(config.mesh) != 3 or min(config.mesh) < 1:
    raise ValueError(f"config.mesh is {tuple(config.mesh)}: give three sizes of at least 1, for "
                     "data, fsdp and tensor.")
  for place, key in (("seed", config.seed), ("half_seed", config.half_seed)):
    if not 0 <= key < 2**63:
      raise ValueError(f"config.{place} is {key}: choose it from 0 to 2**63 - 1.")
  for block in ("validation", "probe", "evaluation"):
    if config[block].split in TRAINED:
      raise ValueError(f"config.{block}.split is {config[block].split!r}, which arms learn from: "
                       "choose another split.")
  _positive("config.validation", config.validation, "problems")
  _positive("config.probe", config.probe, "prompts", "group", "top_k", "microbatches", "block")
  _positive("config.evaluation", config.evaluation, "prompts", "draws")
  if not 0 < config.label_share <= 1:
    raise ValueError(f"config.label_share is {config.label_share}: choose it above 0, up to 1, "
                     "which keeps every label.")
  _check_probe(config.probe)
  if not 0 < config.evaluation.level < 1:
    raise ValueError(f"config.evaluation.level is {config.evaluation.level}: choose it between 0 "
                     "and 1.")
  samples = config.evaluation.sampling.samples_per_prompt
  if not all(1 <= k <= samples for k in config.evaluation.ks):
    raise ValueError(f"config.evaluation.ks is {tuple(config.evaluation.ks)} and {samples} samples "
                     "are drawn: choose each k between 1 and "
                     "config.evaluation.sampling.samples_per_prompt.")
  for name, hp in config.stages.items():
    if name not in stages:
      raise ValueError(f"config.stages.{name} is no row of the recipe: remove it, or choose from "
                       f"{', '.join(stages)}.")
    _check_stage(f"config.stages.{name}", hp, stages[name])


def _check_probe(probe):
  """That a probe's samples fill its groups, and its batches split."""
  samples = probe.sampling.samples_per_prompt
  if probe.group > samples:
    raise ValueError(f"config.probe.group is {probe.group} and {samples} samples are drawn: raise "
                     "config.probe.sampling.samples_per_prompt, or lower the group.")
  if probe.problems < 0 or probe.problems % probe.prompts:
    raise ValueError(f"config.probe.problems is {probe.problems}: make it a multiple of "
                     f"config.probe.prompts = {probe.prompts}, or 0 to measure nothing.")
  if probe.prompts * samples % probe.microbatches:
    raise ValueError(f"config.probe scores {probe.prompts * samples} rows at once, which "
                     f"microbatches = {probe.microbatches} does not divide: change one of them.")


def _check_stage(place, hp, stage):
  """One stage's block: its keys, and that its numbers divide."""
  reads = objectives.READS.get(stage.objective)
  if reads is not None:  # a user's own objective reads what it likes
    more = objectives.REWARD_READS * stage.reward + ("pass_samples",) * bool(stage.prompt_weights)
    check_keys(place, hp, (*loop.READS, *training.READS, *reads, *more, "optim"))
  check_keys(f"{place}.lora", hp.lora, ("rank", "alpha", "targets"))
  try:
    models.lora(hp.lora)
  except ValueError as error:
    raise ValueError(f"{place}.{error}") from error
  check_keys(f"{place}.optim", hp.optim, [k for k in optim.READS if k != "steps"])
  _check_sampling(f"{place}.sampling", hp.sampling)
  _positive(place, hp, "prompts", "epochs", "minibatches", "microbatches", "save_every",
            *(("block",) if reads is not None else ()),
            *(("pass_samples",) if stage.prompt_weights else ()))
  if hp.steps < 0:
    raise ValueError(f"{place}.steps is {hp.steps}: set it to 1 or more, or to 0 to leave the row "
                     "out of every arm.")
  if hp.eval_every < 0:
    raise ValueError(f"{place}.eval_every is {hp.eval_every}: choose 0 (never) or more.")
  rollouts.token_weights((1,), hp.mean, 1)  # its own check
  if stage.reward and hp.advantages not in objectives.ADVANTAGES:
    raise ValueError(f"{place}.advantages is {hp.advantages!r}: choose one of "
                     f"{', '.join(objectives.ADVANTAGES)}.")
  if stage.objective is objectives.clipped_surrogate:
    objectives.check_penalty(hp)
  if stage.reward and reads is not None:
    objectives.check_rewards(place, hp)
  if stage.objective in (objectives.forward_kl, objectives.reverse_kl, objectives.jsd):
    objectives.check_form(stage.objective, hp)
  if stage.actor == "given" and hp.sampling.samples_per_prompt != 1:
    raise ValueError(f"{place}.sampling.samples_per_prompt is {hp.sampling.samples_per_prompt} and "
                     "a problem has one given solution: set it to 1.")
  rows = hp.prompts * hp.sampling.samples_per_prompt
  if rows % (hp.minibatches * hp.microbatches):
    raise ValueError(f"{place} draws {rows} rows a step, which minibatches x microbatches = "
                     f"{hp.minibatches} x {hp.microbatches} does not divide: change one of them.")
  if hp.steps:
    optim.make(loop.optim_config(hp), {})  # its own checks


def _check_sampling(place, sampling):
  """A sampling block: its keys, and that something can be sampled that way."""
  check_keys(place, sampling, SAMPLING)
  _positive(place, sampling, "samples_per_prompt", "max_tokens")
  ranges = {"temperature": (0 <= sampling.temperature < math.inf, "0 (greedy) or more"),
            "top_p": (0 < sampling.top_p <= 1, "above 0, up to 1 (off)"),
            "top_k": (sampling.top_k >= 0, "0 (off) or more"),
            "min_p": (0 <= sampling.min_p <= 1, "0 (off) to 1"),
            "min_tokens": (0 <= sampling.min_tokens <= sampling.max_tokens, "0 to max_tokens")}
  for key, (fits, wanted) in ranges.items():
    if not fits:
      raise ValueError(f"{place}.{key} is {sampling[key]}: choose {wanted}.")
  strings = sampling.stop_strings
  if not isinstance(strings, tuple) or not all(isinstance(s, str) and s for s in strings):
    raise ValueError(f"{place}.stop_strings is {strings!r}: give a tuple of texts, none of them "
                     "empty.")


def _positive(place, block, *keys):
  for key in keys:
    if block[key] < 1:
      raise ValueError(f"{place}.{key} is {block[key]}: set it to 1 or more.")


def check_keys(place, got, wanted):
  """That a block has the keys that are wanted and no others; `place` names it."""
  missing, extra = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
  if missing:
    raise ValueError(f"{place} lacks the key {missing[0]!r}: add it (configs/arithmetic.py has "
                     "them all).")
  if extra:
    raise ValueError(f"{place} has the key {extra[0]!r}, which nothing reads: remove it, or "
                     "correct its spelling.")


def check_pair(config):
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
  talk = chat.Chat(config.teacher, **config.template)
  chat.same_tokenizer(talk, chat.Chat(config.student, **config.template))
  sizes = [hf.read_json(config[role])["vocab_size"] for role in ("teacher", "student")]
  if sizes[0] != sizes[1]:
    raise ValueError(f"teacher and student embed {sizes[0]} and {sizes[1]} tokens: pad the smaller "
                     "model's vocabulary to the larger's.")
  last = max(talk.vocabulary.values())
  if last >= sizes[0]:
    raise ValueError(f"the tokenizer of {config.teacher} has the token id {last} and its model "
                     f"embeds {sizes[0]} tokens: take the tokenizer that came with the weights.")
  _check_windows(config)
  _check_tops(config, sizes[0])
  _check_pages(config)
  for place, block in _samplings(config).items():
    try:
      talk.check_stops(block.stop_strings)
    except ValueError as error:
      raise ValueError(f"config.{place}.sampling: {error}") from error
  return talk, bases


def _samplings(config):
  """{its place in the config: a sampling block}, all of them."""
  blocks = {f"stages.{name}": hp for name, hp in config.stages.items()}
  blocks |= {name: config[name] for name in ("validation", "probe", "evaluation")}
  return {place: block.sampling for place, block in blocks.items()}


def _check_pages(config):
  """That the mesh splits each model's key heads, where a cache in pages is to lie on it."""
  if not config.sampler.page:
    return
  tensor = config.mesh[2]
  for role in ("teacher", "student"):
    heads = models.read_config(hf.read_json(config[role])).kv_heads
    if heads % tensor:
      raise ValueError(f"config.sampler.page is {config.sampler.page}, and config.mesh's tensor of "
                       f"{tensor} does not divide the {heads} key heads of the {role}: set page "
                       "to 0.")


def _check_tops(config, size):
  """That no top k asks for more tokens than the models embed."""
  tops = {f"stages.{name}": hp.top_k for name, hp in config.stages.items()
          if "form" in hp and hp.form in objectives.TOPS}
  for place, k in {**tops, "probe": config.probe.top_k}.items():
    if k > size:
      raise ValueError(f"config.{place}.top_k is {k} and the vocabulary has {size} tokens: lower "
                       "it.")


def _check_windows(config):
  """That a prompt and its answer fit in the positions both models were made for."""
  for role in ("teacher", "student"):
    held = hf.read_json(config[role]).get("max_position_embeddings")
    for place, block in _samplings(config).items():
      need = config.prompt_tokens + block.max_tokens
      if held is not None and need > held:
        raise ValueError(f"config.prompt_tokens + config.{place}.sampling.max_tokens is {need} and "
                         f"the {role} has {held} positions (max_position_embeddings): lower one.")


def check_problems(config, task, talk):
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
      tokens = tuple(talk.render(task.messages(problem)))
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


def check_solutions(place, max_tokens, prompts, problems, talk):
  """That each of the prompts' problems has a solution, of at most `max_tokens` tokens.

  Args:
    place: the stage's config, by name; prompts, problems: as `check_problems` returns them.
  """
  for prompt in prompts:
    solution = problems[prompt.id].get("solution")
    if solution is None:
      raise ValueError(f"problem {prompt.id} has no solution and {place} learns from it: add one, "
                       "or drop the arm.")
    tokens = len(talk.encode_response(solution))
    if tokens > max_tokens:
      raise ValueError(f"the solution of problem {prompt.id} takes {tokens} tokens and "
                       f"{place}.sampling.max_tokens is {max_tokens}: raise it.")
