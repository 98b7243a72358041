"""Compiles a config's largest program of each kind, and says what each costs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from s2d_jax import (
  chat,
  compiling,
  doctor,
  evals,
  foresee,
  guides,
  models,
  objectives,
  placement,
  planning,
  prefixes,
  recipe,
  sampler,
  sharding,
  stage,
  training,
)
from s2d_jax.chips import Chip
from s2d_jax.compiling import Programs, Samplers
from s2d_jax.losses.agreement import agreement
from s2d_jax.models import Config, caches, hf
from s2d_jax.preflight.costs import Cost, DoesNotFit, Moved
from s2d_jax.preflight.pool import Progress, Request
from s2d_jax.roles import Role, StageModels, anchor_bytes, resident
from s2d_jax.sampler import decode
from s2d_jax.sharding import Params


class Target(NamedTuple):
  """For which chip and in which detail a config is compiled."""
  chip: Chip | None = None   # None: this machine's devices, whose rates are unknown
  fast: bool = False         # the stages alone, and a sampler's two largest programs
  scores: bool = True        # evaluations and the probe too, unless fast
  # Names of the programs to compile, such as those of UPDATES; None: all. A stage whose sampler has
  # no memory yields its refusal all the same.
  programs: frozenset[str] | None = None

  @property
  def scored(self) -> bool:
    """Whether evaluations and the probe are compiled."""
    return self.scores and not self.fast


LOCAL = Target()
UPDATES = frozenset({"update", "gradients", "apply"})  # in one program, or in parts


def abstract_role(config: ConfigDict, role: str, mesh: Mesh,
                  shapes: Callable[[Config], Params] = models.frozen_shapes) -> Role:
  """A base model with the types, shapes and layouts of its weights, from its config.json alone."""
  run = {key: config[key] for key in models.RUN}
  model = models.build(hf.read_config(guides.folders(config)[role], **run))
  return Role(model, models.laid_out(model.config, mesh, shapes))


def _table() -> dict[str, planning.Stage]:
  """The recipe's stages by name."""
  return {row.name: row for row in recipe.STAGES}


def costs_of(config: ConfigDict, target: Target = LOCAL,
             progress: Progress | None = None) -> Iterator[Cost]:
  """Yields the Cost of the programs of every stage and score of a config, on the current mesh.

  Of a sampler's programs of one kind that with the largest arrays is compiled: the others need
  less of everything.

  Raises:
    InputError: the config is wrong.
  """
  table = _table()
  mesh = sharding.current_mesh()
  # The doctor first: it takes seconds, and a wrong config would waste minutes of compilation.
  doctor.check_config(config, table)
  samplers = compiling.samplers(config, chat.Chat(config.student, **config.template),
                                sampler.Compiler(_uncompiled, largest_only=True),
                                target.chip and target.chip.usable)
  requests: list[Request] = []
  for row, hp, stage_models, optimizer in _stages(config, table):
    held = resident(stage_models, optimizer)
    staying = placement.staying(held, stage_models.away)
    of_stage = samplers._replace(held=sum(staying.values()))
    try:
      programs = compiling.compile_programs(stage_models, hp, row.objective, objectives.logp,
                                            optimizer, of_stage)
    except sampler.Unfit as error:
      # The other stages may fit, so this one is a line like theirs.
      requests.append(Request(row.name, "sample", DoesNotFit(str(error))))
      continue
    # The last token of a sequence is a target only.
    width = config.prompt_tokens + hp.sampling.max_tokens - 1
    requests += _stage(row.name, hp, stage_models, programs, held, target.fast, width)
    if target.scored:
      requests += _between_steps(config, row, stage_models, of_stage)
  if target.scored:
    requests += _scoring(config, mesh, samplers)
  if target.programs is not None:
    requests = [request for request in requests if request.program in target.programs
                or isinstance(request.lowered, DoesNotFit)]
  progress = progress or Progress()
  yield from progress.costs(requests, target.chip)


def _uncompiled(lowered: jax.stages.Lowered) -> jax.stages.Lowered:
  """The program itself: only those that are printed are compiled, and all cores compile them."""
  return lowered


def _stages(config: ConfigDict, table: Mapping[str, planning.Stage]) -> Iterator[
    tuple[planning.Stage, ConfigDict, StageModels, optax.GradientTransformation]]:
  """(stage, block of the config, abstract models, optimizer) of each stage that has steps."""
  mesh = sharding.current_mesh()
  # The base models stand for every role: a stage's weights have the shapes of its base's.
  bases = {"teacher": "teacher", "student": "student"}
  for name, hp in config.stages.items():
    if hp.steps == 0:  # left out
      continue
    row = table[name]
    stage_models = stage.load_models(
        row, hp, planning.parents(row, hp, bases),
        lambda role, shapes: abstract_role(config, role, mesh, shapes),
        lambda model: models.split(model.config, models.laid_out(model.config, mesh))[0],
        config.get("offload", ""))
    yield row, hp, stage_models, stage.optimizer(hp, stage_models.learner.model.config)


def _stage(name: str, hp: ConfigDict, stage_models: StageModels, programs: Programs,
           held: dict[str, int], fast: bool, width: int) -> Iterator[Request]:
  """The programs of a stage, in the order in which a step runs them.

  Args:
    held: as `roles.resident` returns it.
    width: of its batches.
  """
  staying = placement.staying(held, stage_models.away)
  everything = sum(staying.values())
  for program, compiled, samples in (
      ("pass rates", programs.pass_rate_sampler, hp.get("pass_samples", 0)),
      ("sample", programs.sampler, hp.sampling.samples_per_prompt)):
    if compiled is not None:
      sampled = hp.prompts * samples
      if not fast:
        yield from _moving(name, program, compiled, sampled, everything)
      yield from _sampling(name, program, compiled, sampled, everything)
  rows = hp.prompts * hp.sampling.samples_per_prompt
  if programs.token_logps is not None:
    taken = sharding.device_bytes(stage_models.actor.params)
    # Without old log-probabilities it runs once a stage, to check a narrow cache.
    yield Request(name, "token_logps", programs.token_logps, everything - taken,
                  float(programs.scores_first), _blocks(hp, rows // hp.microbatches),
                  _shared(rows * width))
  # The update takes everything but a separate actor and the model behind pass rates.
  others = held.get("actor", 0) + held.get("pass rate model", 0)
  updates = hp.epochs * hp.minibatches
  blocks = _blocks(hp, rows // (hp.minibatches * hp.microbatches))
  tokens = _shared(rows // hp.minibatches * width)
  yield from _options(name, hp, stage_models, programs, staying, width)
  if stage_models.away:
    yield Request(name, "moves", Moved(placement.bytes_moved(held, stage_models.away, updates)),
                  everything, 1)
  if programs.update is not None:
    yield Request(name, "update", programs.update, others, updates, blocks, tokens)
    return
  # The gradients of an update in parts do not take the state's slots and its anchor, and their
  # application takes no guide and no weights that stand still.
  state = anchor_bytes(held)
  state += 0 if "optimizer" in stage_models.away else held["optimizer"]
  still = sharding.device_bytes(stage_models.non_trainable)
  if programs.split is not None:
    guide = 0 if "guide" in stage_models.away else held.get("guide", 0)
    yield Request(name, "gradients", programs.split.totals, others + state, updates, blocks, tokens)
    yield Request(name, "apply", programs.split.apply, others + guide + still, updates)
    return
  # All rows under the guide whose program is the largest: the runs of each are not known here.
  routed = programs.routed
  largest = max(routed.gradients, key=lambda role: sharding.device_bytes(
      stage_models.guides[role].params))
  # Beside the sum of the gradients so far.
  total = sharding.device_bytes(sharding.abstract(stage_models.learner.params))
  yield Request(name, "gradients", routed.gradients[largest], others + state + total,
                updates * hp.microbatches, blocks, tokens / hp.microbatches)
  yield Request(name, "apply", routed.apply, others + still, updates)


def _options(name: str, hp: ConfigDict, stage_models: StageModels, programs: Programs,
             held: dict[str, int], width: int) -> Iterator[Request]:
  """The programs of searches (`foresee`) and of probes by family (`allocate`).

  A search may accept all of its candidates, so these are the most runs that it can have. `held` are
  bytes while the stage samples (`placement.staying`).
  """
  everything = sum(held.values())
  if programs.search is not None:
    ahead = hp.foresee
    rows = ahead.problems * ahead.samples
    searches = hp.steps.bit_length() / hp.steps  # after steps 1, 2, 4, …
    scored = searches * (1 + ahead.candidates) * foresee.scores(ahead)
    for request in _sampling(name, "search", programs.search.sampler, rows, everything):
      yield request._replace(runs=request.runs * scored)
    params = anchor_bytes(held)
    # The candidates, the one that was accepted once more, and the copy that is the next anchor.
    yield Request(name, "search jump", programs.search.jump, everything - 2 * params,
                  searches * (ahead.candidates + 2))
    if programs.search.compare is not None:
      yield Request(name, "search compare", programs.search.compare,
                    everything - params - held["guide"], scored, _blocks(hp, rows),
                    _shared(rows * width))
  if programs.probe is not None:
    rows = hp.allocate.problems
    for request in _sampling(name, "probe", programs.probe.sampler, rows, everything):
      yield request._replace(runs=request.runs / hp.steps)  # once a stage
    learner = stage_models.full(stage_models.learner.params)
    yield Request(name, "probe token_logps", programs.probe.token_logps,
                  everything - sharding.device_bytes(learner), 1 / hp.allocate.interval,
                  _blocks(hp, rows), _shared(rows * width))


def _shared(tokens: int) -> float:
  """Tokens of the whole mesh over the number of its devices."""
  return tokens / sharding.current_mesh().size


def _blocks(hp: ConfigDict, rows: int) -> int:
  """Blocks of the loss for a microbatch of `rows` rows of the longest responses."""
  shards = sharding.shard_count(sharding.current_mesh(), "batch", rows)
  return max(-(-rows // shards * hp.sampling.max_tokens // hp.block), 1)


def _sampling(stage: str, name: str, compiled: sampler.Sampler, rows: int,
              held: int) -> Iterator[Request]:
  """A sampler's two programs with all the work: decoding, and the reading of prompts.

  Args:
    rows: of one call.
    held: bytes that the stage holds beside the sampler.
  """
  programs = compiled.programs
  shapes = programs.shapes
  # Samples that fit at once are one wave, and each token of the longest one is one step.
  waves = -(-rows // shapes.batches[0])
  slots = sharding.device_bytes(programs.slots[shapes.batches[0], shapes.lengths[-1]])
  prompts = rows / compiled.sampling.samples_per_prompt
  # A dispatch decodes some tokens of each row; what it does once it does not do for each token.
  most_tokens = compiled.sampling.max_tokens
  tokens = min(programs.config.tokens, most_tokens)
  # The cache of a prompt that was read stays while its samples wait for a slot.
  prompts_read = sharding.device_bytes(programs.prompts)
  yield Request(stage, name, compiled.decode_program, held + prompts_read,
                waves * -(-most_tokens // tokens), tokens, _shared(shapes.batches[0] * tokens))
  # Prompts are read one layer at a time, a chunk of each.
  layers = len(programs.prompts)
  others = (sharding.device_bytes(programs.weights) + prompts_read
            - sharding.device_bytes((programs.weights.params["layers"][0], programs.prompts[0])))
  reads = prompts / shapes.prompts * (shapes.window // shapes.chunk) * layers
  # Only all layers together have read a token.
  yield Request(stage, f"{name} prefill", programs.prefill, held + slots + others, reads, 1,
                _shared(shapes.prompts * shapes.chunk) / layers)


def _moving(stage: str, name: str, compiled: sampler.Sampler, rows: int,
            held: int) -> Iterator[Request]:
  """A sampler's programs that lay out weights, and copy or resize its cache; see `_sampling`."""
  programs = compiled.programs
  shapes = programs.shapes
  most = shapes.batches[0]
  longest = shapes.lengths[-1]
  # These programs take one layer, and the other layers are in memory too.
  cache = caches.layers(programs.slots[most, longest].cache)
  others = len(cache) - 1
  cache_layer = sharding.device_bytes(cache[0])
  prompts_layer = sharding.device_bytes(programs.prompts[0])
  weights = sharding.device_bytes(programs.weights)
  # The stacked layers that it reads are among the weights that the stage holds.
  stacked = sharding.device_bytes(decode.split_layers(compiled.abstract_params)[1])
  copied = weights - sharding.device_bytes(programs.weights.params["layers"][0])
  yield Request(stage, f"{name} weights", programs.layer_weights, held - stacked + copied, 0, 1)
  reads = rows / compiled.sampling.samples_per_prompt / shapes.prompts
  yield Request(stage, f"{name} admit", programs.admit[longest],
                held + weights + others * (cache_layer + prompts_layer), reads * len(cache), 1)
  # A change of size holds a layer twice.
  held += weights + len(cache) * prompts_layer + others * cache_layer
  if len(shapes.lengths) > 1:
    yield Request(stage, f"{name} grow", programs.grow[most, shapes.lengths[-2]], held, 0, 1)
  if len(shapes.batches) > 1:
    yield Request(stage, f"{name} shrink", programs.shrink[most, longest], held, 0, 1)


def _between_steps(config: ConfigDict, row: planning.Stage, stage_models: StageModels,
                   samplers: Samplers) -> Iterator[Request]:
  """The evaluations between the steps of a stage: of its learner, beside all that it holds."""
  learner = stage_models.learner
  whole = Role(learner.model, stage_models.full(learner.params))
  for name, hp in evals.between_steps(config.evals, row.name).items():
    yield from _evaluation(f"{row.name} {name}", hp, row.learner, whole, samplers)


def _evaluation(block: str, hp: ConfigDict, name: str, role: Role,
                samplers: Samplers) -> Iterator[Request]:
  """The programs of an evaluation of one model; `name`: the model's."""
  for way, change in evals.ways(hp).items():
    program = name if way == "sampled" else f"{name} {way}"
    yield from _score(block, program, hp, evals.batch(hp), role, samplers, change)


def _score(block: str, program: str, hp: ConfigDict, prompts: int, role: Role, samplers: Samplers,
           change: Mapping[str, Any]) -> Iterator[Request]:
  """The programs of a sampler that scores `prompts` prompts a call."""
  try:
    compiled = samplers.compile(role, hp.sampling, prompts, **change)
  except sampler.Unfit as error:
    yield Request(block, program, DoesNotFit(str(error)))
    return
  rows = prompts * compiled.sampling.samples_per_prompt
  yield from _moving(block, program, compiled, rows, samplers.held)
  yield from _sampling(block, program, compiled, rows, samplers.held)


def _scoring(config: ConfigDict, mesh: Mesh, samplers: Samplers) -> Iterator[Request]:
  """The programs that score either model outside of stages: at the end, and of the probe."""
  roles = {role: abstract_role(config, role, mesh) for role in ("teacher", "student")}
  held = {role: sharding.device_bytes(roles[role].params) for role in roles}
  for name, hp in config.evals.items():
    for role in roles:
      if not evals.every(hp):
        yield from _evaluation(name, hp, role, roles[role], samplers._replace(held=held[role]))
  if config.probe.problems:
    # A probe has both models on the device.
    both = samplers._replace(held=sum(held.values()))
    for role in roles:
      yield from _score("probe", role, config.probe, config.probe.prompts, roles[role], both, {})
    if config.probe.get("prefixes", 0):
      chosen = prefixes.settings(both, config.probe)
      yield from _score("probe", "prefixes", config.probe, chosen.batch, roles["teacher"],
                        chosen.samplers, chosen.changes)
    rows = config.probe.prompts * config.probe.sampling.samples_per_prompt
    yield Request("probe", "both", _compare(config, roles, mesh, rows), 0, 1,
                  _blocks(config.probe, rows // config.probe.microbatches),
                  _shared(rows * _probe_width(config)))


def _compare(config: ConfigDict, roles: dict[str, Role], mesh: Mesh,
             rows: int) -> jax.stages.Lowered:
  """The program that compares a probe's two models on the same tokens, lowered."""
  student = roles["student"]
  teacher = roles["teacher"]
  # Both models are scored in one program, so their memory is needed at the same time.
  batch = compiling.abstract_batch(rows, _probe_width(config), mesh)
  compared = training.compare(student.model, teacher.model, agreement, config.probe)
  return compared.lower(sharding.abstract(student.params), sharding.abstract(teacher.params), batch)


def _probe_width(config: ConfigDict) -> int:
  """Tokens of a row that a probe compares."""
  return config.prompt_tokens + config.probe.sampling.max_tokens - 1


def least_bytes(config: ConfigDict) -> int:
  """Bytes on each device that the largest update has at least, whatever its microbatches."""
  found = []
  for _, _, stage_models, optimizer in _stages(config, _table()):
    # Gradients are added up in float32 over the microbatches.
    gradients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding),
        sharding.abstract(stage_models.learner.params))
    held = resident(stage_models, optimizer)
    # An update takes the anchor of searches alone; a candidate is made between updates.
    held["anchors and candidate"] = anchor_bytes(held)
    waits = stage_models.guides is not None or "guide" in stage_models.away
    if "optimizer" in stage_models.away and waits:
      # The slots and the guide are not on the devices together.
      held["guide"] = max(held.get("guide", 0) - held["optimizer"], 0)
    found.append(sum(held.values()) + sharding.device_bytes(gradients))
  return max(found)
