"""One node of the walk on disk: a stage's folder from its roles to its manifest.

It turns a node of `planning.Plan` into what `loop.run` takes, and leaves the folder finished:
final weights, a Hugging Face folder, the ledger, and last the manifest.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from s2d_jax import (
  allocate,
  checkpoint,
  compiling,
  evals,
  files,
  foresee,
  guides,
  hints,
  hosts,
  keys,
  loop,
  manifest,
  models,
  objectives,
  optim,
  placement,
  program_cache,
  rollouts,
  sampler,
  selection,
  sharding,
  timing,
  training,
)
from s2d_jax.compiling import Samplers
from s2d_jax.models import Config, Model, hf
from s2d_jax.planning import Node, Plan, Stage
from s2d_jax.probing import Allocation
from s2d_jax.roles import Role, StageModels, resident
from s2d_jax.sampler import Sampler
from s2d_jax.sharding import Params


def train_node(plan: Plan, node: Node, workdir: epath.Path, stop: Callable[[], bool]) -> None:
  """Runs one stage to its end and leaves its folder finished: the manifest is written last."""
  mesh = sharding.current_mesh()
  folder = workdir / node.name
  # The clock starts first: loading and compiling are charged to the stage too.
  with files.only_writer(folder) as (heartbeat, last_heartbeat), timing.clock() as clock:
    stage = _stage_run(plan, node, workdir, mesh, clock)
    params, totals = loop.run(stage, clock, heartbeat, last_heartbeat, stop)
    model, params = _merged(stage.models, params)
    # The manifest marks the folder finished, so it is written after everything else.
    checkpoint.save_final(folder, params)
    lineage = {"stage": node.name, "parents": plan.ancestors(node.name)[:-1],
               "bases": {r: b["identity"] for r, b in plan.bases.items()},
               "revision": manifest.revision()}
    with checkpoint.recording_final(folder) as final:
      _export(folder / "hf", model, params, plan.base(node.name)["folder"], lineage)
    if hosts.leader():
      files.write_json(folder / "ledger.json", totals)
    heartbeat()  # a folder that was removed, and written again in part, is not finished
    manifest.write(folder, {
        "inputs": node.inputs, "config": plan.config.to_dict(), "bases": plan.bases,
        "sets": dict(plan.sets), **manifest.provenance(mesh)}, recorded=final())
    checkpoint.drop_steps(folder)


def _evaluations(plan: Plan, samplers: Samplers, role: Role, stage: str,
                 ) -> dict[str, tuple[int, Callable[[Params], Iterable[tuple[str, Any]]]]]:
  """The evaluations between the steps of a stage, as `loop.StageRun` takes them."""
  found = {}
  for name, hp in evals.between_steps(plan.config.evals, stage).items():
    evaluate = evals.evaluator(hp, functools.partial(samplers.compile, role),
                               plan.prompts[hp.split], plan.reward, plan.answer,
                               plan.config.seed)
    found[name] = (evals.every(hp), functools.partial(evals.estimates, name, evaluate))
  return found


def _export(folder: epath.Path, *saved: Any) -> None:
  """`hf.save(folder, *saved)`, by way of a local folder where `folder` is in an object store.

  An object store has no atomic rename of a folder, which `hf.save` relies on.

  Raises:
    WriteError: the disk is full, or broken.
  """
  if "://" not in os.fspath(folder):
    try:
      hf.save(folder, *saved)
    except OSError as error:
      raise files.not_written(folder, error.strerror or str(error)) from error
    return
  with tempfile.TemporaryDirectory() as scratch:
    # Every process takes part, since weights are gathered; only the first one writes.
    written = hf.save(pathlib.Path(scratch) / "hf", *saved)
    if hosts.leader():
      for path in filter(pathlib.Path.is_file, written.rglob("*")):
        files.write(folder / path.relative_to(written), path.read_bytes())


def _merged(stage_models: StageModels, params: Params) -> tuple[Model, Params]:
  """The trained model without adapters, and its weights."""
  model = stage_models.learner.model
  if stage_models.non_trainable is None:
    return model, params
  # The merged weights take the layout of the weights they replace.
  merge = jax.jit(functools.partial(models.merge, model.config),
                  out_shardings=training.shardings(stage_models.non_trainable))
  return (models.build(dataclasses.replace(model.config, lora=None)),
          merge(stage_models.full(params)))


def load_models(stage: Stage, hp: ConfigDict, roles: Mapping[str, str | None],
                load_role: Callable[[str, Callable[[Config], Params]], Role],
                adapters: Callable[[Model], Params], offload: str = "") -> StageModels:
  """The models of a stage. With lora, the adapters alone train.

  Args:
    roles: as `planning.parents` returns them.
    load_role: load_role(role, shapes_of) -> the model of a role, and its weights in the types that
      shapes_of(config) gives them.
    adapters: new adapters of a model.
    offload: config.offload.
  """
  # In float32 also where adapters train and these weights stand still: merged, they are the result.
  learner = load_role(roles["learner"], models.shapes)
  non_trainable = None
  lora = models.lora(hp.lora)
  if lora is not None:
    non_trainable = learner.params
    model = models.build(dataclasses.replace(learner.model.config, lora=lora))
    learner = Role(model, adapters(model))
  frozen: dict[str | None, Role] = {}
  # In this order and not in a set's, which differs between processes: all load the same in turn.
  for role in (roles["actor"], roles["guide"]):
    if role is not None and role not in frozen:
      frozen[role] = load_role(role, models.frozen_shapes)
  several = None
  guide = frozen.get(roles["guide"])
  if "guides" in hp:
    # The arm's own teacher waits on the host like the others; as an actor it stays on the devices.
    guide = _on_host(guide)
    if roles["guide"] != roles["actor"]:
      del frozen[roles["guide"]]
    several = {guides.TEACHER: guide} | {
        role: _on_host(load_role(role, models.frozen_shapes))
        for role in map(guides.role, dict.fromkeys(hp.guides.folders.values()))}
  start = None
  # Pass rates are the start's in every step, and the learner's own weights move.
  if stage.prompt_weights is not None:
    start = load_role(roles["learner"], models.frozen_shapes)
  actor = frozen.get(roles["actor"])
  if stage.on_policy:
    # The learner's own weights change and are donated: only their shapes can be kept.
    actor = Role(learner.model, sharding.abstract(training.join(learner.params, non_trainable)))
  found = StageModels(learner, non_trainable, actor, stage.on_policy, guide, start,
                      anchored="foresee" in hp, guides=several)
  found = found._replace(away=placement.away(offload, found, hp))
  if "guide" in found.away:
    found = found._replace(guide=Role(guide.model, placement.to_host(guide.params)))
  return found


def _on_host(role: Role) -> Role:
  return Role(role.model, guides.to_host(role.params))


def _stage_run(plan: Plan, node: Node, workdir: epath.Path, mesh: Mesh,
               clock: timing.Clock) -> loop.StageRun:
  """Everything that `loop.run` reads of a stage."""
  hp = node.hp
  stage = node.stage
  seed = plan.config.seed
  # The adapters' start depends on the stage's name, not on its position in an arm.
  adapters_seed = zlib.crc32(f"{seed} {stage.name} adapters".encode())
  stage_models = load_models(
      stage, hp, {"actor": node.actor, "learner": node.learner, "guide": node.guide},
      lambda role, shapes_of: load(plan, role, workdir, mesh, shapes_of),
      lambda model: models.adapters(model, adapters_seed), plan.config.get("offload", ""))
  learner = stage_models.learner
  rewards = None
  if stage.reward:
    rewards = rollouts.Rewards(plan.reward, objectives.ADVANTAGES[hp.advantages],
                               objectives.length_penalty(hp))
  # The order and the seed take the row's name and not the folder's, whose hash changes with any key
  # of the config. Rounds draw further prompts of the same step, so each step reserves them.
  if "allocate" in hp:
    order = allocate.Order(plan.prompts[node.split], plan.family, seed, stage.name, hp.prompts)
  else:
    order = rollouts.PromptOrder(plan.prompts[node.split], seed, stage.name, hp.prompts,
                                 rounds=max(hp.rounds, 1) if stage.reward else 1)
  stage_optimizer = optimizer(hp, learner.model.config)
  held = resident(stage_models, stage_optimizer)
  placement.check_host(stage_models.away, held)
  placement.announce(stage.name, stage_models.away, held, hp.epochs * hp.minibatches)
  staying = placement.staying(held, stage_models.away)
  samplers = compiling.samplers(plan.config, plan.chat)._replace(held=sum(staying.values()))
  whole = Role(learner.model, stage_models.full(learner.params))
  return loop.StageRun(
      name=stage.name, folder=workdir / node.name, seed=seed, hp=hp, prompts_of=order,
      models=stage_models, samplers=samplers,
      objective=stage.objective, logp=objectives.logp,
      optimizer=stage_optimizer,
      source=_source(plan, node, stage_models, order, workdir),
      label_use=("each_step" if selection.reads_labels(hp) or hints.used(hp)
                 else stage.label_use),
      rewards=rewards, pass_rates=_pass_rates(plan, node, stage_models, workdir),
      evaluations=_evaluations(plan, samplers, whole, stage.name),
      profiled=timing.steps_of(plan.config.profile), check=plan.reward,
      ahead=(foresee.problems(plan.prompts[node.split], hp.foresee, seed)
             if "foresee" in hp else None),
      allocation=(_allocation(plan, node, stage_models, order, workdir)
                  if "allocate" in hp else None),
      hint_of=node.hint_of, guide_of=node.guide_of,
      mover=placement.Mover(stage_models.away, clock))


def _allocation(plan: Plan, node: Node, stage_models: StageModels, order: allocate.Order,
                workdir: epath.Path) -> Allocation:
  """The decisions of a stage's shares, and the problems that its learner is probed on."""
  role = node.actor or node.guide  # of `StageModels.teacher`: a learner that samples has no actor
  split = plan.config.probe.split
  seed = plan.config.seed

  # Once a stage: opening the store reads all of it.
  @functools.cache
  def source(compiled: Sampler) -> rollouts.FrozenActor:
    # The salt keeps these samples apart from those that a stage learns from.
    return rollouts.FrozenActor(
        compiled, stage_models.teacher.params,
        _store(plan, role, node.hp, workdir, "probed", split),
        (seed, zlib.crc32(b"allocate")), node.name, samples_per_prompt=1,
        epoch=lambda step, prompt: 0)

  probed = allocate.probed(plan.prompts[split], plan.family, order.families, node.hp)
  return Allocation(order, probed, source, stage_models, node.hp,
                    (seed, zlib.crc32(node.stage.name.encode())))


def optimizer(hp: ConfigDict, config: Config) -> optax.GradientTransformation:
  """The optimizer of a stage whose learner has this config."""
  updates = loop.update_count(hp)
  # Programs are compared by their optimizer's identity, so equal stages of a run have one.
  return program_cache.shared(
      ("optimizer", *(hp.optim[name] for name in optim.KEYS), updates, config),
      lambda: optim.make(hp.optim, updates, models.trained(config)))


def _source(plan: Plan, node: Node, stage_models: StageModels, order: rollouts.PromptOrder,
            workdir: epath.Path) -> Callable[[Sampler | None], rollouts.RolloutSource]:
  """The source of a stage's rollouts, as a function of its actor's compiled sampler."""
  inputs = rollouts.StageInputs(
      name=node.stage.name, folder=node.name, seed=plan.config.seed, hp=node.hp,
      prompt_tokens=plan.config.prompt_tokens, epoch=order.epoch,
      problem=plan.problems.__getitem__, encode=plan.chat.encode_response,
      on_policy=stage_models.on_policy, sampler=None,
      params=stage_models.actor and stage_models.actor.params,
      open_store=lambda: _store(plan, node.actor, node.hp, workdir))
  # The sampler is compiled when the stage starts, so the source is made and its store opened then.
  return lambda sampler: node.stage.source.make(inputs._replace(sampler=sampler))


def _pass_rates(plan: Plan, node: Node, stage_models: StageModels,
                workdir: epath.Path) -> Callable[[Sampler], rollouts.PassRates] | None:
  """The pass rates that weight a stage's prompts, as a function of the compiled sampler."""
  if stage_models.pass_rate_model is None:
    return None
  # No stage's name is in the seed: stages that weight by one start share its samples. The salt
  # keeps them apart from those that a frozen actor's stage learns from.
  seed = (plan.config.seed, zlib.crc32(b"pass rate"))
  return lambda sampler: rollouts.PassRates(
      rollouts.FrozenActor(
          sampler, stage_models.pass_rate_model.params,
          _store(plan, node.learner, node.hp, workdir, "passes"), seed, node.name,
          node.hp.pass_samples, epoch=lambda step, prompt: 0),
      plan.reward, node.stage.prompt_weights)


def load(plan: Plan, role: str, workdir: epath.Path, mesh: Mesh,
         shapes_of: Callable[[Config], Params] = models.frozen_shapes) -> Role:
  """A role's model and weights, in a copy of its own: the learner's buffers are donated.

  The weights are stored in the types of `shapes_of(config)`; by default those of a frozen model.
  """
  folder = plan.base(role)["folder"]
  run = {key: plan.config[key] for key in models.RUN}
  # A base comes as a Hugging Face folder; another role is a finished stage's checkpoint, whose
  # architecture is that of its base.
  if role in plan.bases:
    return Role(*hf.load(folder, mesh, run=run, shapes=shapes_of))
  model = models.build(hf.read_config(folder, **run))
  abstract = models.laid_out(model.config, mesh, shapes_of)
  manifest.check_files(workdir / role, weights=True)
  return Role(model, checkpoint.load_final(workdir / role, abstract))


def _store(plan: Plan, actor: str, hp: ConfigDict, workdir: epath.Path,
           kind: str = "rollouts", split: str = "all") -> rollouts.Store:
  """The store of a frozen actor's responses to a split, opened; its name says what is in it.

  samples_per_prompt is left out: it does not change what a row is.
  """
  # Everything that changes a row is in the name, so that no stage reads rows of other settings.
  record = {name: key for name, key in sampler.Sampling.KEYS.items()
            if name != "samples_per_prompt"}
  name = manifest.name(kind, {
      "actor": plan.identity(actor), "sampling": keys.hashed(hp.sampling, record),
      "seed": plan.config.seed,
      "prompts": manifest.digest(plan.prompts[split]), "width": plan.config.prompt_tokens,
      "tokenizer": plan.chat.fingerprint(), "dtype": plan.config.dtype,
      "cache": plan.config.sampler.cache, "drawn by": "one uniform number a token"})
  return rollouts.Store(workdir / name)
