"""One stage's loop, and the only `for step`: draw, score, update, account, survive.

A step is one rollout batch. In order: evaluate the old state when due, save *before* the draw,
draw prompts and samples, score the text, build the batch, take the trainer's own log-probabilities
once where the update does not (`scored`), then epochs × minibatches optimizer updates. Everything
but the TrainState is a function of (seed, stage, step), so a stage that was killed goes on as if it
had not been.
"""

import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from s2d_jax import (
  checkpoint,
  drawing,
  files,
  hosts,
  keys,
  ledger,
  metrics,
  rollouts,
  sampler,
  sharding,
  training,
)

KEYS = {
    "steps": keys.Key(lambda steps: steps >= 0,
                      "set it to 1 or more, or to 0 to leave the stage out of every arm"),
    "prompts": keys.at_least(1),
    "sampling": sampler.Sampling.KEYS,
    "mean": keys.one_of(rollouts.MEANS, neutral="token"),
    "epochs": keys.at_least(1, neutral=1),
    "minibatches": keys.at_least(1, neutral=1),
    "eval_every": keys.Key(lambda steps: steps >= 0, "choose 0 (never) or more", hashed=False),
    "save_every": keys.at_least(1, hashed=False),
    "log_samples": keys.at_least(0, hashed=False)}


class Role(NamedTuple):
  """A model with weights."""
  model: Any
  params: Any


class Work(NamedTuple):
  """What one stage is made of; every field is plain data or a plain function."""
  name: str                # the row's name: it seeds the order of prompts and the samples
  folder: Any              # the stage's folder
  hp: Any                  # the stage's config
  seed: int
  prompts: list            # rollouts.Prompt of every problem the stage may draw
  width: int               # tokens of the longest prompt's window
  stop_ids: tuple
  learner: Role
  actor: Role | None       # None: the learner samples
  guide: Role | None
  frozen: Any              # leaves of the learner that are not trained, beside its params; or None
  given: Callable | None   # prompts -> Rollout of given solutions; then nobody samples
  reward: Callable | None  # (prompt id, response ids) -> float; None: no label is spent
  advantages: Callable | None  # reward_PG -> advantage_PG; None: rewards only weigh the prompts
  judge: Role | None       # the learner's start, where its pass rates weigh the prompts
  weigh: Callable | None   # pass_rate_P -> weight_P
  objective: Callable
  logp: Callable           # as `training.score` takes it
  optimizer: Any
  store: Callable          # () -> rollouts.Store of a frozen actor
  passes: Callable         # () -> rollouts.Store of the judge
  punish: Callable | None  # response lengths -> what is added to their rewards, for the advantages
  validate: Callable       # params -> iterable of (name, value)
  text: Callable           # ids -> str, for the samples log
  room: Any                # a sampler.Room


class Programs(NamedTuple):
  """Everything a stage runs on the device, compiled before the first step."""
  draw: Callable | None
  judge: Callable | None
  score: Callable | None
  step: Callable


def sampling(hp, stop_ids):
  """The Sampling of a stage's or an evaluation's config."""
  return sampler.Sampling(stop_ids=tuple(stop_ids), **hp.to_dict())


def room(hp):
  """The sampler.Room of config.sampler."""
  return sampler.Room(**{name: hp[name] for name in sampler.Room._fields})


def update_count(hp: ConfigDict) -> int:
  """The optimizer updates that a stage makes in all."""
  return hp.steps * hp.epochs * hp.minibatches


def run(work, beat, left, stop):
  """Trains one stage from its newest checkpoint, or from the start, to its last step.

  Args:
    work: the stage; beat, left: as `files.only_writer` yields them; stop: as `termination`
      yields it.

  Returns:
    (params, totals): the learner's final weights, and the ledger's totals with device-seconds.

  Raises:
    FloatingPointError: a loss or gradient is not finite; names the step, keeps the last checkpoint.
    RuntimeError: a program compiled after the stage's start.
    SystemExit: code `hosts.RETRY` after a termination signal, once the state is saved.
  """
  began, mesh = time.monotonic(), sharding.current_mesh()
  steps = checkpoint.Checkpoints(work.folder)
  try:
    state = training.init(work.optimizer, mesh, work.learner.params)
    start = steps.latest() or 0
    lost = _lost_seconds(work.folder, start, left)
    if start:
      state = steps.load(sharding.abstract(state))
    logs = {name: metrics.Log(work.folder, name, start)
            for name in ("metrics", "ledger", "timing", "samples")}
    metrics.cut_tensorboard(work.folder, start)
    programs = compile_programs(work, state, mesh)
    _check_cache(work, programs, state, mesh)
    logs["timing"].add({"step": start, "seconds": time.monotonic() - began})
    state = _loop(work, programs, state, start, steps, logs, beat, stop, mesh)
  finally:
    steps.close()
  totals = ledger.total(logs["ledger"].rows)
  return state.params, {**totals, **ledger.seconds(logs["timing"].rows, lost, mesh.size)}


def _loop(work, programs, state, start, steps, logs, beat, stop, mesh):
  """The steps themselves. Saves fall only between them."""
  hp = work.hp
  stores = (None if work.actor is None else work.store(),
            None if work.judge is None else work.passes())
  began, saved = start, start or None
  with metrics.compilations() as compiled, metrics.bar(work.name, start, hp.steps) as bar:
    for step in range(start, hp.steps):
      clock = time.monotonic()
      beat()
      row = {"step": step}
      if hp.eval_every and step % hp.eval_every == 0:
        row |= dict(work.validate(training.join(state.params, work.frozen)))
      if step % hp.save_every == 0 and step != began:
        _save(work.folder, steps, logs, step, state)
        saved = step
      if stop():
        if saved != step and step != began:
          _save(work.folder, steps, logs, step, state)
        raise SystemExit(hosts.RETRY)
      if programs.draw is not None:
        programs.draw.seen = {}
      before = compiled()  # on several hosts the checkpointer compiles its own barriers
      state, new = _step(work, programs, stores, state, step, logs, mesh)
      row |= new
      _check(work, step, saved, row, compiled() - before)
      logs["metrics"].add(row)
      seconds = time.monotonic() - clock
      sampled = {} if programs.draw is None else programs.draw.seen
      logs["timing"].add({"step": step, "seconds": seconds,
                          "tokens_per_second": row["tokens"] / seconds,
                          **{f"sampler_{name}": value for name, value in sampled.items()}})
      bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward", "kl", "loss") if k in row}
                      | {"tokens/s": f"{row['tokens'] / seconds:.0f}"}, refresh=False)
      bar.update()
  _save(work.folder, steps, logs, hp.steps, state)
  return state


def _step(work, programs, stores, state, step, logs, mesh):
  """One rollout batch: returns the new state and the step's metrics."""
  hp, row, judged = work.hp, {}, None
  drawn = drawing.drawn(work, programs, stores[0], state, step)
  picked, rows, weight_B = drawn.picked, drawn.rows, drawn.weight_B
  advantage_B = None
  if work.judge is not None:
    weight_B, judged, row["pass_rate"] = drawing.weigh(work, programs, stores[1], step, drawn)
    row["weighted"] = (weight_B > 0).mean()
  if work.advantages is not None:
    shaped_B = drawn.reward_B
    if work.punish is not None:
      shaped_B = shaped_B + work.punish(rows.response_length_B)
    groups = shaped_B.reshape(hp.prompts, -1)
    advantage_B = np.asarray(work.advantages(groups), np.float32).reshape(-1)
    row |= drawn.metrics
  batch = rollouts.batch(rows, hp.mean, advantage_B, weight_B)
  if scored(work):
    logp_BT, gap = _score(programs, _actor_params(work, state), batch, mesh)
    batch, row = batch._replace(old_logp_BT=logp_BT), row | gap
  state, losses = _updates(work, programs, state, step, known(work, batch), mesh)
  if "logp_gap_square" in losses:
    losses["logp_gap_rms"] = np.sqrt(losses.pop("logp_gap_square"))
  if not np.any(batch.weight_BT > 0):  # nothing was compared
    losses = {name: x for name, x in losses.items() if not name.startswith("logp_gap")}
  length_B = rows.response_length_B
  row |= losses | {"tokens": int(length_B.sum()), "response_length": length_B.mean(),
                   "stopped": (rows.finish_reason_B == 1).mean()}
  labels = ledger.labels(work, picked, logs["ledger"].rows)
  logs["ledger"].add(ledger.spent(work, step, drawn, labels, judged, scored(work)))
  for b in range(min(hp.log_samples, len(length_B))):
    logs["samples"].add({
        "step": step, "prompt_id": rows.prompt_id_B[b], "sample_index": rows.sample_index_B[b],
        "tokens": rows.response(b), "text": work.text(rows.response(b)),
        "logp": rows.sampler_logp_BT[b, : rows.response_length_B[b]],
        "finish_reason": rollouts.FINISHED[rows.finish_reason_B[b]],
        "reward": None if drawn.reward_B is None else drawn.reward_B[b]})
  return state, row


def _actor_params(work, state):
  """The weights that sample: the learner's own where nobody else does."""
  return training.join(state.params, work.frozen) if work.actor is None else work.actor.params


def _updates(work, programs, state, step, batch, mesh):
  """epochs × minibatches optimizer updates; returns the state and the means of their metrics."""
  hp, seen = work.hp, []
  guide = None if work.guide is None else work.guide.params
  for epoch in range(hp.epochs):
    seed = (work.seed, zlib.crc32(work.name.encode()), step, epoch)
    for part in rollouts.minibatches(batch, hp.minibatches, seed):
      state, values = programs.step(state, guide, sharding.put_batch(part, mesh), work.frozen)
      seen.append({k: float(v) for k, v in sharding.fetch(values).items()})
  means = {k: float(np.mean([s[k] for s in seen])) for k in seen[0]}
  return state, means | {"finite": min(s["finite"] for s in seen)}


def scored(work):
  """Whether the actor's log-probabilities are taken before the update, in a pass of their own.

  A learner that makes one update of its own samples finds them in it: they are the old ones of its
  ratio, and what the sampler's are held against. Given solutions ask for none. Where the guide's
  vocabulary is padded otherwise, an update sees only what both have.
  """
  if work.given is not None:
    return False
  sizes = {role.model.config.vocab_size for role in (work.learner, work.guide) if role is not None}
  return (work.actor is not None or work.hp.epochs * work.hp.minibatches > 1 or len(sizes) > 1)


def known(work, batch):
  """The batch without log-probabilities that nobody has taken."""
  if scored(work):
    return batch
  batch = batch._replace(old_logp_BT=None)
  if work.given is not None:
    batch = batch._replace(sampler_logp_BT=None, behaviour_logp_BT=None)
  return batch


def _score(programs, params, batch, mesh):
  """(the trainer's log-probabilities of a batch, how far the sampler's are from them, in nats)."""
  logp_BT, _ = sharding.fetch(programs.score(params, sharding.put_batch(batch, mesh)))
  gap = np.abs(logp_BT - batch.sampler_logp_BT)[batch.sequence_BT >= 0]
  return logp_BT, {"logp_gap_mean": gap.mean(), "logp_gap_rms": np.sqrt(np.mean(gap**2)),
                   "logp_gap_max": gap.max()}


def _save(folder, steps, logs, step, state):
  """Logs first, then the checkpoint that makes them count."""
  for name, log in logs.items():
    start, new = log.flush(step)
    if name == "metrics":
      metrics.write_tensorboard(folder, start, new)
  steps.save(step, state)


def _check(work, step, saved, row, compiled):
  if not row["finite"]:
    raise FloatingPointError(
        f"{work.name} met a loss or gradient that is not finite at step {step}; "
        f"{'no checkpoint was due yet' if saved is None else f'the checkpoint of step {saved}'} in "
        f"{work.folder}{'' if saved is None else ' is kept'}: lower the learning rate or look at "
        "its samples.")
  if compiled:
    raise RuntimeError(f"{work.name} compiled {compiled} programs after its start, seen at step "
                       f"{step}: a shape or layout changed, and every shape must be fixed.")


def compile_programs(work, state, mesh):
  """Every program of a stage, ahead of time, for shapes that never change.

  Args:
    work: of which hp, width, stop_ids, the roles, given, objective, logp, optimizer and room are
      read; the roles' weights may be abstract (`sharding.abstract`).
    state: the TrainState, or its `training.abstract`.
  """
  hp, actor = work.hp, work.actor or work.learner
  frozen = None if work.frozen is None else sharding.abstract(work.frozen)
  params = training.join(state.params, frozen) if work.actor is None else work.actor.params
  how = sampling(hp.sampling, work.stop_ids)
  draw = None
  if work.given is None:
    draw = sampler.make(actor.model, params, how, hp.prompts, work.width, work.room, work.text)
  judge = None
  if work.judge is not None:
    judge = sampler.make(work.judge.model, work.judge.params,
                         how._replace(samples_per_prompt=hp.pass_samples), hp.prompts, work.width,
                         work.room.exact(), work.text)
  rows = hp.prompts * how.samples_per_prompt
  width = work.width + how.max_tokens - 1
  hosts.sum_over_hosts(np.zeros(rows, np.float32))  # compiles on its first call
  if judge is not None:
    hosts.sum_over_hosts(np.zeros(hp.prompts * hp.pass_samples, np.float32))
  step = training.make(work.learner.model, None if work.guide is None else work.guide.model,
                     work.objective, work.optimizer, hp, training.shardings(state))
  guide = None if work.guide is None else sharding.abstract(work.guide.params)
  score = None
  if scored(work) or _narrow(work):
    score = training.score(actor.model, work.logp, hp).lower(
        sharding.abstract(params), abstract_batch(rows, width, mesh)).compile()
  part = known(work, abstract_batch(rows // hp.minibatches, width, mesh))
  return Programs(draw, judge, score,
                  step.lower(sharding.abstract(state), guide, part, frozen).compile())


MOST_GAP = 0.01  # nats, root mean square


def _narrow(work):
  """Does the stage sample with a cache of fewer bits than its activations?"""
  return work.given is None and work.room.narrow(work.learner.model.config.dtype)


def _check_cache(work, programs, state, mesh):
  """Refuses a narrow cache whose log-probabilities are too far from the trainer's, on one rollout.
  """
  if not _narrow(work):
    return
  params = _actor_params(work, state)
  rows = programs.draw(params, work.prompts[: work.hp.prompts], (work.seed, zlib.crc32(b"cache")))
  gap = _score(programs, params, rollouts.batch(rows), mesh)[1]["logp_gap_rms"]
  if not gap <= MOST_GAP:  # nor where it is no number
    raise ValueError(f"config.sampler.cache is {work.room.cache} and the sampler's "
                     f"log-probabilities are {gap:.3f} nats (root mean square) from the trainer's "
                     f"in {work.name}, where {MOST_GAP} is allowed: set it to auto.")


def abstract_batch(rows, width, mesh):
  """A `rollouts.Batch` of shapes, laid out on the mesh: what a program is compiled for."""
  types = {"weight_BT", "count_BT", "advantage_BT", "old_logp_BT", "sampler_logp_BT",
           "behaviour_logp_BT"}
  where = sharding.batch_sharding(mesh, (rows, width))
  return rollouts.Batch(*(
      jax.ShapeDtypeStruct((rows, width), np.float32 if f in types else np.int32, sharding=where)
      for f in rollouts.Batch._fields))


def _lost_seconds(folder, start, left):
  """Seconds of work that kills have cost this stage so far; notes this start for the next one.

  `left` is the last sign of life of a writer that died, or None. What it did since the newest
  checkpoint, or since its own start where that is later, is done again.
  """
  folder = epath.Path(folder)
  starts = [files.read_json(path) for path in files.finished_files(folder / "starts")]
  lost = 0.0
  if left is not None and starts:
    saved = folder / "checkpoints" / str(start)
    since = max(starts[-1]["at"], saved.stat().mtime if saved.exists() else 0.0)
    lost = max(0.0, left - since)
  if hosts.leader():
    files.write_json(folder / "starts" / f"{len(starts):08d}.json",
                          {"at": time.time(), "step": start, "lost": lost})
  return lost + sum(s["lost"] for s in starts)
