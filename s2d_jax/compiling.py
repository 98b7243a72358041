"""A stage's models, and every program that is compiled for them before its first step."""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from s2d_jax import (
  allocate,
  foresee,
  hints,
  hosts,
  program_cache,
  remat,
  rollouts,
  sampler,
  sharding,
  training,
)
from s2d_jax.chat import Chat
from s2d_jax.rewards import pool
from s2d_jax.roles import Role, StageModels, resident
from s2d_jax.rollouts import Batch
from s2d_jax.sharding import Params


class Samplers(NamedTuple):
  """The settings that all samplers of a run share."""
  config: sampler.SamplerConfig
  prompt_tokens: int
  stop_ids: tuple[int, ...]
  decode: Callable[[np.ndarray], str]
  compiler: sampler.Compiler = sampler.RUN_COMPILER  # of a stage's other programs too
  memory: int | None = None  # bytes of a device; None: unknown
  held: int = 0  # bytes on each device that are in use while a sampler runs
  vocabulary: int = 0  # ids that have a token, as Sampling takes it

  def compile(self, role: Role, sampling_config: ConfigDict, batch: int, narrow: bool = False,
              **changes: Any) -> sampler.Sampler:
    """A sampler of `role` for `batch` prompts a call, compiled.

    Args:
      narrow: may use a cache of fewer bits than the activations, where the config asks for one.
      changes: fields of the Sampling that differ from the config's.

    Raises:
      sampler.Unfit: the memory holds not one row of the cache, or the mesh cannot split it.
    """
    role_sampling = sampler.Sampling(stop_ids=self.stop_ids, vocabulary=self.vocabulary,
                                     **sampling_config.to_dict())
    # Only a stage compares its sampler with the trainer first, so only it may lose bits.
    config = self.config if narrow else self.config.exact()
    role_sampling = role_sampling._replace(**changes)
    config = sampler.fitted(config, role.model, role.params, self.memory, self.held)
    try:
      return sampler.Sampler(role.model, role_sampling, batch, self.prompt_tokens, config,
                             self.decode, role.params, self.compiler)
    # The doctor has checked every field, but it does not know the model that must fit the memory.
    except sampler.Unfit as error:
      raise sampler.Unfit(f"config.sampler.{error}") from error


class Programs(NamedTuple):
  """Everything that a stage runs on the devices, compiled before its first step."""
  sampler: sampler.Sampler | None
  pass_rate_sampler: sampler.Sampler | None
  token_logps: jax.stages.Compiled | None
  update: jax.stages.Compiled | None  # None: `routed` or `split` is the update
  scores_first: bool          # whether `token_logps` runs before the updates of each step
  search: "Search | None" = None
  probe: "Probe | None" = None
  routed: "RoutedUpdate | None" = None
  split: "SplitUpdate | None" = None


class Search(NamedTuple):
  """The programs of `foresee`."""
  sampler: sampler.Sampler    # of the problems that score candidates
  jump: jax.stages.Compiled   # (params, anchor, multiple) -> candidate
  compare: jax.stages.Compiled | None  # (params, guide_params, batch) -> reverse KL_BT; signal "kl"


class SplitUpdate(NamedTuple):
  """The programs of an update whose optimizer slots wait on the host (`placement`)."""
  totals: jax.stages.Compiled  # (params, non_trainable, guide_params, batch) -> gradients, sums
  apply: jax.stages.Compiled   # (state, gradients and sums) -> state, metrics


class RoutedUpdate(NamedTuple):
  """The programs of an update that several guides share (`guides`)."""
  gradients: dict[str, jax.stages.Compiled]  # by the guide's role
  add: jax.stages.Compiled
  apply: jax.stages.Compiled
  rows: int                                  # of a batch of `gradients`


class Probe(NamedTuple):
  """The programs of `allocate`."""
  sampler: sampler.Sampler          # of the teacher's responses
  token_logps: jax.stages.Compiled  # (params, batch) -> the learner's log-probabilities of them


def samplers(config: ConfigDict, chat: Chat, compiler: sampler.Compiler = sampler.RUN_COMPILER,
             memory: int | None = None) -> Samplers:
  """The settings of all samplers of a run, whose responses `chat` ends and decodes.

  Args:
    memory: bytes of a device that is not here; None: a device of this machine.
  """
  settings = sampler.SamplerConfig(**config.sampler)
  return Samplers(settings, config.prompt_tokens, chat.eos_ids, chat.decode, compiler,
                  memory or hosts.device_memory(), vocabulary=chat.size)


def compile_programs(models: StageModels, hp: ConfigDict, objective: training.Loss,
                     logp: training.Logp, optimizer: optax.GradientTransformation,
                     samplers: Samplers) -> Programs:
  """Every program of a stage, ahead of time, for shapes that never change.

  Stages of one run share the programs that are equal.

  Args:
    models: the weights may be abstract (`sharding.abstract`).
    logp: as `training.token_logps` takes it.
  """
  mesh = sharding.current_mesh()
  scores_first = needs_old_logps(models, hp)
  samples = hp.prompts * hp.sampling.samples_per_prompt
  # The last token of a sequence is a target only, so a batch is one shorter than its rollout.
  width = samplers.prompt_tokens + hp.sampling.max_tokens - 1
  actor_sampler = None
  if models.actor is not None:
    actor_sampler = samplers.compile(models.actor, hp.sampling, hp.prompts, narrow=True)
  # Rewards are added over hosts in every step by a program of this shape.
  hosts.sum_over_hosts(np.zeros(samples, np.float32))  # compiles on its first call
  rollouts.unchecked_since(pool.unchecked())  # so does this
  pass_rate_sampler = None
  if models.pass_rate_model is not None:
    pass_rate_sampler = samplers.compile(models.pass_rate_model, hp.sampling, hp.prompts,
                                         samples_per_prompt=hp.pass_samples)
    hosts.sum_over_hosts(np.zeros(hp.prompts * hp.pass_samples, np.float32))
  # Shapes suffice to compile for, so preflight needs no weights.
  state = training.abstract(optimizer, mesh, models.learner.params, models.anchored)
  # A narrow cache needs the pass too: `loop` compares the two once before the first step.
  token_logps = None
  if scores_first or narrow_cache(models, samplers):
    batch = abstract_batch(samples, width, mesh)
    token_logps = _compile(
        ("token_logps", models.actor.model, logp), hp,
        lambda: training.token_logps(models.actor.model, logp, hp),
        (sharding.abstract(models.actor.params), batch), samplers.compiler)
  # A minibatch has old log-probabilities, or those of the sampler alone, or, given, none.
  batch = abstract_batch(samples // hp.minibatches, width, mesh, old_logps=scores_first,
                         sampled=models.actor is not None,
                         guide_width=hints.width(hp, hp.sampling.max_tokens))
  update = routed = split = None
  if models.guides is not None:
    routed = _routed_update(models, hp, objective, optimizer, state, batch, samplers)
  elif "optimizer" in models.away:
    split = _split_update(models, hp, objective, optimizer, state, batch, samplers)
  else:
    update = _update(models, hp, objective, optimizer, state, batch, samplers)
  search = _search_programs(models, hp, state.params, samplers) if models.anchored else None
  probe = _probe_programs(models, hp, logp, samplers) if allocate.probes(hp) else None
  return Programs(actor_sampler, pass_rate_sampler, token_logps, update, scores_first, search,
                  probe, routed, split)


def _other_models(models: StageModels, optimizer: optax.GradientTransformation) -> int:
  """Bytes on each device that a stage holds and an update does not take."""
  held = resident(models, optimizer)
  return held.get("actor", 0) + held.get("pass rate model", 0)


def _update(models: StageModels, hp: ConfigDict, objective: training.Loss,
            optimizer: optax.GradientTransformation, state: training.TrainState, batch: Batch,
            samplers: Samplers) -> jax.stages.Compiled:
  """The update in one program; `state` and `batch` are shapes, of a minibatch."""
  guide = models.guide and models.guide.model
  arguments = (state, models.guide and sharding.abstract(models.guide.params), batch,
               models.non_trainable and sharding.abstract(models.non_trainable))

  def update_of(model: Any) -> jax.stages.Compiled:
    update = functools.partial(training.jit_update, model, guide, objective, optimizer, hp,
                               training.shardings(state))
    return _compile(("update", model, guide, objective, optimizer), hp, update, arguments,
                    samplers.compiler)

  return remat.fitting(models.learner.model, update_of, samplers.memory,
                       _other_models(models, optimizer))


def _split_update(models: StageModels, hp: ConfigDict, objective: training.Loss,
                  optimizer: optax.GradientTransformation, state: training.TrainState,
                  batch: Batch, samplers: Samplers) -> SplitUpdate:
  """The programs of an update in two parts; `state` and `batch` are shapes, of a minibatch."""
  layout = training.shardings(state)
  guide = models.guide and models.guide.model
  arguments = (state.params, models.non_trainable and sharding.abstract(models.non_trainable),
               models.guide and sharding.abstract(models.guide.params), batch)

  def totals_of(model: Any) -> jax.stages.Compiled:
    totals = functools.partial(training.jit_totals, model, guide, objective, hp, layout)
    return _compile(("totals", model, guide, objective), hp, totals, arguments, samplers.compiler)

  # The anchor of searches is an argument of `apply` alone.
  totals = remat.fitting(models.learner.model, totals_of, samplers.memory,
                         _other_models(models, optimizer) + sharding.device_bytes(state.anchor))
  # The policy of recomputation changes no shape.
  shapes = jax.eval_shape(
      training.jit_totals(models.learner.model, guide, objective, hp, layout), *arguments)
  return SplitUpdate(totals, _apply(hp, optimizer, state, shapes, samplers))


def _routed_update(models: StageModels, hp: ConfigDict, objective: training.Loss,
                   optimizer: optax.GradientTransformation, state: training.TrainState,
                   batch: Batch, samplers: Samplers) -> RoutedUpdate:
  """The programs of an update under several guides; `state` and `batch` are shapes, of a minibatch.
  """
  layout = training.shardings(state)
  learner = models.learner.model
  rows = batch.inputs_BT.shape[0] // hp.microbatches
  mesh = sharding.current_mesh()
  part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (rows, x.shape[1]), x.dtype, sharding=sharding.batch_sharding(mesh, (rows, x.shape[1]))),
                      batch)
  non_trainable = models.non_trainable and sharding.abstract(models.non_trainable)
  gradients = {}
  # The sum of the gradients so far, the anchor of searches, and the optimizer's slots, unless they
  # wait on the host.
  others = _other_models(models, optimizer) + sharding.device_bytes(
      (state.params, state.anchor, None if "optimizer" in models.away else state.opt_state))
  for role, guide in models.guides.items():
    jitted = training.jit_gradients(learner, guide.model, objective, hp, layout)
    arguments = (state.params, non_trainable, sharding.abstract(guide.params), part)

    def gradients_of(model: Any, guide: Role = guide,
                     arguments: tuple = arguments) -> jax.stages.Compiled:
      return _compile(
          ("gradients", model, guide.model, objective), hp,
          lambda: training.jit_gradients(model, guide.model, objective, hp, layout), arguments,
          samplers.compiler)

    gradients[role] = remat.fitting(learner, gradients_of, samplers.memory, others)
    # All have one learner and one objective, so their results have one shape.
    shapes = jax.eval_shape(jitted, *arguments)
  total = _totals(shapes, layout)
  add = _compile(("add", learner, objective), hp, lambda: training.jit_add(layout), (total, total),
                 samplers.compiler)
  return RoutedUpdate(gradients, add, _apply(hp, optimizer, state, shapes, samplers), rows)


def _totals(shapes: tuple[Any, Any], layout: training.TrainState) -> tuple[Any, Any]:
  """(gradients, sums) of shapes, as they are laid out; `layout` is of the state."""
  grads, sums = shapes
  return (sharding.laid_out(grads, layout.params),
          sharding.laid_out(sums, jax.tree.map(lambda _: layout.step, sums)))


def _apply(hp: ConfigDict, optimizer: optax.GradientTransformation, state: training.TrainState,
           shapes: tuple[Any, Any], samplers: Samplers) -> jax.stages.Compiled:
  """The program that ends an update in parts; `shapes` are of its totals."""
  layout = training.shardings(state)
  return _compile(("apply", optimizer), hp, lambda: training.jit_apply(optimizer, layout),
                  (state, _totals(shapes, layout)), samplers.compiler)


def _probe_programs(models: StageModels, hp: ConfigDict, logp: training.Logp,
                    samplers: Samplers) -> Probe:
  """The programs of the stage's probes."""
  rows = hp.allocate.problems
  sampled = samplers.compile(models.teacher, hp.sampling, min(hp.prompts, rows),
                             samples_per_prompt=1)
  whole = sharding.abstract(models.full(models.learner.params))
  batch = abstract_batch(rows, samplers.prompt_tokens + hp.sampling.max_tokens - 1,
                         sharding.current_mesh())
  split = _sliced(hp, rows)
  token_logps = _compile(
      ("token_logps", models.learner.model, logp), split,
      lambda: training.token_logps(models.learner.model, logp, split), (whole, batch),
      samplers.compiler)
  return Probe(sampled, token_logps)


def _sliced(hp: ConfigDict, rows: int) -> ConfigDict:
  """The config with microbatches for another number of rows: at most those of an update at once."""
  update_rows = hp.prompts * hp.sampling.samples_per_prompt // hp.minibatches // hp.microbatches
  split = hp.copy_and_resolve_references().unlock()
  split.microbatches = rows // math.gcd(rows, update_rows)
  return split


def _search_programs(models: StageModels, hp: ConfigDict, params: Params,
                     samplers: Samplers) -> Search:
  """The programs of the stage's searches; `params` are shapes."""
  ahead = hp.foresee
  mesh = sharding.current_mesh()
  multiple = jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(mesh))
  jump = _compile(
      ("jump",), hp, lambda: jax.jit(functools.partial(foresee.extrapolate, leaves=ahead.leaves),
                                     out_shardings=training.shardings(params)),
      (params, params, multiple), samplers.compiler)
  prompts = min(hp.prompts, ahead.problems)
  sampled = samplers.compile(models.actor, hp.sampling, prompts, samples_per_prompt=ahead.samples)
  hosts.sum_over_hosts(np.zeros(ahead.problems * ahead.samples, np.float32))
  compare = None
  if ahead.signal == "kl":
    rows = ahead.problems * ahead.samples
    split = _sliced(hp, rows)
    batch = abstract_batch(rows, samplers.prompt_tokens + hp.sampling.max_tokens - 1, mesh,
                           guide_width=hints.width(hp, hp.sampling.max_tokens))
    compare = _compile(
        ("foresee", models.learner.model, models.guide.model), split,
        lambda: training.compare(models.learner.model, models.guide.model, foresee.reverse_kl,
                                 split),
        (params, sharding.abstract(models.guide.params), batch), samplers.compiler)
  return Search(sampled, jump, compare)


def _compile(name: tuple[Hashable, ...], hp: ConfigDict, jitted: Callable[[], Any],
             arguments: tuple[Any, ...], compiler: sampler.Compiler) -> jax.stages.Compiled:
  """The program of `jitted()` for abstract arguments, or an equal one of the run.

  Args:
    name: the kind of program, and what it is made of beside hp and the arguments.
  """
  # All of hp, though a program reads a part of it: which part, only the objective can say.
  description = (*name, FrozenConfigDict(hp.to_dict()), sharding.current_mesh(),
                 program_cache.shapes_of(arguments), compiler)
  return program_cache.shared(description,
                              lambda: compiler.compile(jitted().lower(*arguments)))


def narrow_cache(models: StageModels, samplers: Samplers) -> bool:
  """Whether the stage samples with a cache of fewer bits than its activations."""
  return models.actor is not None and samplers.config.narrow(models.learner.model.config.dtype)


def needs_old_logps(models: StageModels, hp: ConfigDict) -> bool:
  """Whether the actor's log-probabilities are taken in a pass of their own before the update.

  A learner that makes one update on its own samples computes them in that update: they are the old
  ones of its ratio, and the sampler's are compared with them. Given solutions need none. A guide
  whose vocabulary is padded to another size leaves the update only the tokens that both have.
  """
  if models.actor is None:
    return False
  # From the second update on, the learner is no longer the model that sampled.
  updates = hp.epochs * hp.minibatches
  # Both heads are then cut to the tokens they share, and the log-probabilities differ.
  padded_otherwise = models.guide is not None and (
      models.guide.model.config.vocab_size != models.learner.model.config.vocab_size)
  return not models.on_policy or updates > 1 or padded_otherwise


def abstract_batch(rows: int, width: int, mesh: Mesh, old_logps: bool = False,
                   sampled: bool = True, guide_width: int = 0) -> Batch:
  """A `rollouts.Batch` of shapes, laid out on the mesh, for which a program is compiled.

  Args:
    old_logps: whether the batch has old log-probabilities; sampled: whether it has the sampler's.
    guide_width: of the rows that a guide reads in place of the learner's; 0: it reads the same.
  """
  # An absent field is not an argument of the program that is compiled.
  absent = set() if old_logps else {"old_logp_BT"}
  if not sampled:
    absent |= {"sampler_logp_BT", "behaviour_logp_BT"}
  guide_rows = {name for name in Batch._fields if name.endswith("_BG")}
  if not guide_width:
    absent |= guide_rows | {"guide_index_BT"}
  integers = guide_rows | {"inputs_BT", "targets_BT", "positions_BT", "segments_BT", "sequence_BT",
                           "guide_index_BT"}

  def shape(name: str) -> jax.ShapeDtypeStruct | None:
    if name in absent:
      return None
    dtype = np.int32 if name in integers else np.float32
    full = (rows, guide_width if name in guide_rows else width)
    return jax.ShapeDtypeStruct(full, dtype, sharding=sharding.batch_sharding(mesh, full))

  return Batch(*(shape(name) for name in Batch._fields))
