"""One stage's loop, and the only `for step`: evaluate, save, sample, score, update, account.

A step is one rollout batch. In order: evaluate the old state when due, save *before* sampling,
decide the shares of families when due, sample, score the text, build the batch, then epochs ×
minibatches optimizer updates, and a search when due. Where the update cannot compute the old
log-probabilities itself, a separate pass before it does. Everything but the TrainState is a
function of (seed, stage, step) and of the logged decisions: a killed stage continues unchanged.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from s2d_jax import (
  checkpoint,
  foresee,
  hosts,
  keys,
  ledger,
  metrics,
  placement,
  rollouts,
  sampler,
  selection,
  sharding,
  stops,
  timing,
  training,
  updates,
)
from s2d_jax.compiling import Programs, Samplers, compile_programs, narrow_cache
from s2d_jax.errors import InputError
from s2d_jax.probing import Allocation
from s2d_jax.rewards import pool
from s2d_jax.roles import StageModels
from s2d_jax.rollouts import Batch, PassRates, Prompt, Rewards, RolloutSource
from s2d_jax.sharding import Params
from s2d_jax.timing import Clock
from s2d_jax.training import TrainState

KEYS = training.KEYS | {
    "steps": keys.Key(lambda steps: steps >= 0,
                      "set it to 1 or more, or to 0 to leave the stage out of every arm"),
    "prompts": keys.at_least(1),
    "sampling": sampler.Sampling.KEYS,
    "mean": keys.one_of(rollouts.MEANS, neutral="token"),
    "epochs": keys.at_least(1, neutral=1),
    "minibatches": keys.at_least(1, neutral=1),
    "save_every": keys.at_least(1, hashed=False),
    "log_samples": keys.at_least(0, hashed=False)}

MAX_LOGP_GAP_NATS = 0.01  # root mean square of sampler and trainer, allowed of a narrow cache

_Values = dict[str, Any]
_Logs = dict[str, metrics.Log]


class StageRun(NamedTuple):
  """One stage, ready to run."""
  name: str                   # it seeds the order of prompts and the samples
  folder: epath.Path
  seed: int
  hp: ConfigDict
  prompts_of: Callable[[int, int], list[Prompt]]   # (step, round) -> prompts
  models: StageModels
  samplers: Samplers
  objective: training.Loss
  logp: training.Logp         # as `training.token_logps` takes it
  optimizer: optax.GradientTransformation
  source: Callable[[sampler.Sampler | None], RolloutSource]     # of the actor's sampler
  label_use: rollouts.LabelUse
  rewards: Rewards | None     # None: no reward shapes an update
  pass_rates: Callable[[sampler.Sampler], PassRates] | None     # of the pass-rate model's sampler
  # of each evaluation between steps, by name: (steps between runs, weights -> metrics)
  evaluations: Mapping[str, tuple[int, Callable[[Params], Iterable[tuple[str, Any]]]]]
  profiled: range = range(0)  # steps of which a trace is written
  check: rollouts.Reward | None = None  # of samples, for `selection` and `foresee`
  ahead: list[Prompt] | None = None  # on which `foresee` scores weights; None: no searches
  allocation: Allocation | None = None  # decides the families of prompts; None: no family does
  guide_of: Mapping[int, str] | None = None  # the role that guides a problem id; None: the guide
  # the guide's own prompt of each problem id, as token ids; None: it reads the learner's
  hint_of: Mapping[int, Sequence[int]] | None = None
  mover: placement.Mover = placement.Mover()  # of what waits on the host while the stage samples


def update_count(hp: ConfigDict) -> int:
  """The optimizer updates that a stage makes in all."""
  return hp.steps * hp.epochs * hp.minibatches


def run(stage: StageRun, clock: Clock, heartbeat: Callable[[], None],
        last_heartbeat: float | None, stop: Callable[[], bool]) -> tuple[Params, _Values]:
  """Trains one stage from its newest checkpoint, or from the start, to its last step.

  Args:
    clock: started before the stage's models were loaded, which is charged to the stage too.
    heartbeat, last_heartbeat: as `files.only_writer` yields them.
    stop: whether to stop now, as `stops.requests` yields it.

  Returns:
    (params, totals): the learner's final weights, and the ledger's totals with device-seconds.

  Raises:
    FloatingPointError: a loss or gradient is not finite; names the step, keeps the last checkpoint.
    RuntimeError: a program compiled after the stage's start.
    SystemExit: code `hosts.RETRY` after a termination signal, once the state is saved.
  """
  mesh = sharding.current_mesh()
  checkpoints = checkpoint.Checkpoints(stage.folder)
  try:
    state = training.init(stage.optimizer, mesh, stage.models.learner.params,
                          stage.models.anchored)
    start = checkpoints.latest() or 0
    # Before the compilation, whose seconds a kill costs too.
    lost = checkpoint.lost_seconds(stage.folder, start, last_heartbeat)
    # The fresh state gives shapes and layouts; its numbers are replaced. On a mesh of another size
    # than the killed run's the checkpoint is thus read into this run's layout.
    state = stage.mover.slots_away(checkpoints.load_over(state) if start else state)
    # Logs lose what a killed run wrote after its last checkpoint.
    logs = {name: metrics.Log(stage.folder, name, start) for name in ("timing", "samples")}
    logs["ledger"] = metrics.Log(stage.folder, "ledger", start, every_step=True)
    logs["metrics"] = metrics.Log(stage.folder, "metrics", start, tensorboard=True, every_step=True)
    if stage.allocation is not None:
      logs["allocate"] = metrics.Log(stage.folder, "allocate", start)
      stage.allocation.order.decisions = logs["allocate"].rows
    metrics.announce(f"{stage.name}: compiles its programs, then begins at step {start} of "
                     f"{stage.hp.steps}")
    programs = compile_programs(stage.models, stage.hp, stage.objective, stage.logp,
                                stage.optimizer, stage.samplers)
    _check_cache(stage, programs, state)
    logs["timing"].add(timing.start_entry(start, clock))
    with stops.deferred():  # steps are saved before a signal ends the process
      state = _loop(stage, programs, state, start, checkpoints, logs, clock, heartbeat, stop)
      checkpoints.close()
  finally:
    # After an error too: Orbax finishes unfinished writes when it is closed.
    checkpoints.close()
  totals = ledger.total(logs["ledger"].rows)
  return state.params, {**totals, **ledger.seconds(logs["timing"].rows, lost, mesh.size)}


def _loop(stage: StageRun, programs: Programs, state: TrainState, start: int,
          checkpoints: checkpoint.Checkpoints, logs: _Logs, clock: Clock,
          heartbeat: Callable[[], None], stop: Callable[[], bool]) -> TrainState:
  """The steps. Saves fall only between them."""
  hp = stage.hp
  stage = _timed(stage, clock)
  source = stage.source(programs.sampler)
  cut_here = functools.partial(_saved_when_cut, stage, start, checkpoints, logs, clock, stop)
  pass_rates = stage.pass_rates and stage.pass_rates(programs.pass_rate_sampler)
  if pass_rates is not None:
    pass_rates = pass_rates._replace(reward=clock.timed("reward", pass_rates.reward))
  with (timing.trace(stage.folder, stage.profiled) as trace,
        metrics.bar(stage.name, start, hp.steps) as bar):
    for step in range(start, hp.steps):
      trace(step)
      heartbeat()
      unchecked = pool.unchecked()
      entry = {"step": step}
      for name, (every, evaluate) in stage.evaluations.items():
        if step % every == 0:
          with (sampler.naming(f"{stage.name}, {name} at step {step}"), clock.phase("evaluate"),
                cut_here(step, state)):
            entry |= dict(evaluate(stage.models.full(state.params)))
      # Save before sampling, so that a resumed step samples what the killed one sampled. The step
      # that was loaded is on disk already.
      if step % hp.save_every == 0 and step != start:
        with clock.phase("save"):
          _save(checkpoints, logs, step, state)
      # The signal is read on all hosts at the same step.
      with cut_here(step, state):
        if stop():
          raise sampler.Stopped
      # On several hosts the checkpointer compiles its own barriers, so it counts from here on.
      before = clock.compiled().count
      # A decision about families is in the log already, so that its step goes on to the end.
      cut = cut_here(step, state) if stage.allocation is None else contextlib.nullcontext()
      with sampler.naming(f"{stage.name}, step {step}"), cut:
        state, values, stats = _step(stage, programs, source, pass_rates, state, step, logs, clock)
      entry |= values
      if (stage.rewards is not None or pass_rates is not None
          or selection.reads_labels(stage.hp) or foresee.reads_labels(stage.hp)):
        counts = rollouts.unchecked_since(unchecked)._asdict()
        entry |= {name: float(count) for name, count in counts.items()}
      _check(stage, step, checkpoints, entry, clock.compiled().count - before)
      logs["metrics"].add(entry)
      seconds = timing.step_entry(step, clock)
      tokens_per_second = entry["tokens"] / seconds["seconds"]
      sampled = {} if stats is None else {f"sampler_{k}": x for k, x in stats._asdict().items()}
      logs["timing"].add({**seconds, "tokens_per_second": tokens_per_second, **sampled})
      shown = {key: f"{entry[key]:.3f}" for key in ("reward", "kl", "loss") if key in entry}
      shown |= {"tokens/s": f"{tokens_per_second:.0f}", **stage.mover.shown()}
      bar.set_postfix(shown, refresh=False)
      bar.update()
  _save(checkpoints, logs, hp.steps, state)
  return state


@contextlib.contextmanager
def _saved_when_cut(stage: StageRun, start: int, checkpoints: checkpoint.Checkpoints, logs: _Logs,
                    clock: Clock, stop: Callable[[], bool], step: int,
                    state: TrainState) -> Iterator[None]:
  """Within, sampling ends early on a signal, and `state` is saved as that before `step`."""
  try:
    with sampler.stopping(stop):
      yield
  except sampler.Stopped:
    checkpoint.add_lost(stage.folder, sum(clock.read().values()))
    # A step that was loaded is on disk; one that was saved just now is not written again.
    if step != start:
      _save(checkpoints, logs, step, state)
    raise SystemExit(hosts.RETRY) from None


def _timed(stage: StageRun, clock: Clock) -> StageRun:
  """The stage with a reward whose calls count to the phase `reward`."""
  if stage.rewards is None:
    return stage
  reward = clock.timed("reward", stage.rewards.reward)
  return stage._replace(rewards=stage.rewards._replace(reward=reward))


def _step(stage: StageRun, programs: Programs, source: RolloutSource, pass_rates: PassRates | None,
          state: TrainState, step: int, logs: _Logs,
          clock: Clock) -> tuple[TrainState, _Values, rollouts.SamplerStats | None]:
  """One rollout batch and its updates: the new state, the step's metrics, the sampler's counts."""
  hp = stage.hp
  # The whole learner, adapters joined, once a step: everything that reads it gets this one.
  live = stage.models.full(state.params)
  probe_cost = None
  if stage.allocation is not None and step % hp.allocate.interval == 0:
    with clock.phase("draw"):
      probe_cost = stage.allocation.decide(programs.probe, live, step, logs["allocate"])
  with clock.phase("draw"):
    step_rollouts = rollouts.sample_step(source, live, stage.prompts_of, step, hp,
                                         stage.rewards and stage.rewards.reward)
    step_rollouts = selection.selected(step_rollouts, hp, stage.check)
  values = dict(step_rollouts.metrics)
  weight_B = step_rollouts.weight_B
  advantage_B = pass_rate_rollout = None
  if pass_rates is not None:
    with clock.phase("draw"):
      weight_B, pass_rate_rollout, values["pass_rate"] = pass_rates.weights(step_rollouts, step)
    values["weighted"] = (weight_B > 0).mean()
  if stage.rewards is not None:
    advantage_B = stage.rewards.advantage_B(step_rollouts, hp.prompts)
  batch = rollouts.batch(step_rollouts.rollout, hp.mean, advantage_B, weight_B)
  # Before the first update: a ratio divides by the log-probabilities of the weights that sampled.
  if programs.scores_first:
    params = live if stage.models.on_policy else stage.models.actor.params
    with clock.phase("score"):
      logp_BT, gap_values = _sampler_gap(programs, params, batch)
    batch = batch._replace(old_logp_BT=logp_BT)
    values |= gap_values
  batch = _hinted(stage, batch, step_rollouts.rollout)
  with clock.phase("update"):
    state, losses = _updates(stage, programs, state, step, batch, step_rollouts.rollout)
  rollout = step_rollouts.rollout
  length_B = rollout.response_length_B
  values |= losses | {"tokens": int(length_B.sum()), "response_length": length_B.mean(),
                      "stopped": (rollout.finish_reason_B == 1).mean()}
  # Labels bought in earlier steps are in the log's entries, those of killed steps are not.
  spent = ledger.labels(stage.label_use, step_rollouts.prompts, logs["ledger"].rows)
  entry = ledger.step_entry(step, step_rollouts, spent, hp, stage.models, pass_rate_rollout,
                            programs.scores_first, stage.hint_of, stage.guide_of)
  if stage.ahead is not None and foresee.due(step + 1):
    # The evaluations that only watch a run are counted apart; this one shapes it.
    with clock.phase("draw"), sampler.stopping(None):  # the update is already in the state
      state, found = _search(stage, programs, state, step)
    values |= found.metrics()
    entry = ledger.with_search(entry, found, hp.foresee.signal, stage.models, stage.hint_of)
  if probe_cost is not None:
    entry = ledger.with_part(entry, "allocate", probe_cost)
  logs["ledger"].add(entry)
  for sample in rollouts.logged(step_rollouts, stage.samplers.decode, hp.log_samples):
    logs["samples"].add({"step": step, **sample})
  return state, values, step_rollouts.stats


def _hinted(stage: StageRun, batch: Batch, rollout: rollouts.Rollout) -> Batch:
  """The batch with the guide's own rows, where the stage's guide has prompts of its own."""
  return batch if stage.hint_of is None else rollouts.with_hints(
      batch, rollout, stage.hint_of, stage.hp.hint_tokens)


def _search(stage: StageRun, programs: Programs, state: TrainState,
            step: int) -> tuple[TrainState, foresee.Found]:
  """The state after a search along its last displacement (`foresee`), and what was found."""
  hp = stage.hp.foresee
  search = programs.search
  mesh = sharding.current_mesh()
  # Without a candidate's number in it: all candidates of a search have the same random numbers.
  seed = (stage.seed, zlib.crc32(stage.name.encode()), step, zlib.crc32(b"foresee"))

  def jump(params: Params, anchor: Params, multiple: float) -> Params:
    placed = sharding.put(np.float32(multiple), sharding.replicated(mesh))
    return search.jump(params, anchor, placed)

  def score(params: Params) -> foresee.Scored:
    rollout, _ = search.sampler(params, stage.ahead, seed)
    if hp.signal == "reward":
      return foresee.Scored(float(rollouts.score(stage.check, rollout).mean()), rollout)
    batch = _hinted(stage, rollouts.batch(rollout), rollout)
    kl_BT = jax.device_get(search.compare(params, stage.mover.guide(stage.models),
                                          sharding.put_batch(batch, mesh)))["reverse_kl"]
    return foresee.Scored(-float(kl_BT[batch.weight_BT > 0].mean(dtype=np.float64)), rollout)

  found = foresee.search(state.params, state.anchor, score, jump, hp, seed)
  hosts.agree("search", repr(found.metrics()))
  # A copy: the next update donates the state, and one buffer cannot be donated twice.
  anchor = jump(found.params, found.params, 0.0)
  return state._replace(params=found.params, anchor=anchor), found


def _updates(stage: StageRun, programs: Programs, state: TrainState, step: int,
             batch: Batch, rollout: rollouts.Rollout) -> tuple[TrainState, _Values]:
  """epochs × minibatches optimizer updates: the state and the means of their metrics."""
  hp = stage.hp
  update = updates.of_step(programs, stage.models, stage.mover,
                           stage.guide_of and functools.partial(_roles_of, stage, rollout))
  update_metrics = []
  for epoch in range(hp.epochs):
    # The shuffle depends on names alone, so a resumed step cuts the same minibatches.
    seed = (stage.seed, zlib.crc32(stage.name.encode()), step, epoch)
    for part in rollouts.minibatches(batch, hp.minibatches, seed):
      state, values = update(state, part)
      update_metrics.append({k: float(v) for k, v in jax.device_get(values).items()})
  # `finite` is a flag: one bad update makes the step bad.
  means = {k: float(np.mean([values[k] for values in update_metrics])) for k in update_metrics[0]}
  # The mean of squares is averaged over minibatches; only then is the root taken.
  if "logp_gap_square" in means:
    means["logp_gap_rms"] = np.sqrt(means.pop("logp_gap_square"))
  if not np.any(batch.weight_BT > 0):  # no token was compared
    means = {k: x for k, x in means.items() if not k.startswith("logp_gap")}
  means["finite"] = min(values["finite"] for values in update_metrics)
  return state, means


def _roles_of(stage: StageRun, rollout: rollouts.Rollout, batch: Batch) -> np.ndarray:
  """The role of the guide of each row of a minibatch."""
  # The row of the rollout; an empty response has none, and no weight under any guide.
  row_B = batch.sequence_BT.max(axis=1)
  return np.array([stage.guide_of[int(i)] for i in rollout.prompt_id_B[row_B]])


def _sampler_gap(programs: Programs, params: Params, batch: Batch) -> tuple[np.ndarray, _Values]:
  """(the trainer's log-probabilities of a batch, how far the sampler's are from them, in nats)."""
  placed = sharding.put_batch(batch, sharding.current_mesh())
  logp_BT, _ = jax.device_get(programs.token_logps(params, placed))
  gap_N = np.abs(logp_BT - batch.sampler_logp_BT)[batch.sequence_BT >= 0]
  return logp_BT, {"logp_gap_mean": gap_N.mean(), "logp_gap_rms": np.sqrt(np.mean(gap_N**2)),
                   "logp_gap_max": gap_N.max()}


def _save(checkpoints: checkpoint.Checkpoints, logs: _Logs, step: int, state: TrainState) -> None:
  """Logs first, then the checkpoint that makes them count."""
  written = [name for log in logs.values() for name in log.flush(step)]
  # The leader has written them before another process reads its share.
  hosts.barrier("logs")
  checkpoints.save(step, state, written)


def _check(stage: StageRun, step: int, checkpoints: checkpoint.Checkpoints, entry: _Values,
           compiled: int) -> None:
  """Raises where a step's numbers are not finite, or it compiled a program."""
  if not entry["finite"]:
    saved = checkpoints.latest()
    checkpoint_note = (f"no checkpoint was due yet in {stage.folder}" if saved is None else
                       f"the checkpoint of step {saved} in {stage.folder} is kept")
    raise FloatingPointError(
        f"{stage.name} met a loss or gradient that is not finite at step {step}; "
        f"{checkpoint_note}: lower the learning rate or look at its samples.")
  if compiled:
    raise RuntimeError(f"{stage.name} compiled {compiled} programs after its start, seen at step "
                       f"{step}: a shape or layout changed, and every shape must be fixed.")


def _check_cache(stage: StageRun, programs: Programs, state: TrainState) -> None:
  """Refuses a narrow cache whose log-probabilities are far from the trainer's, on one rollout."""
  if not narrow_cache(stage.models, stage.samplers):
    return
  params = (stage.models.full(state.params) if stage.models.on_policy
            else stage.models.actor.params)
  # A seed of its own: the samples of step 0 do not depend on whether a cache was checked.
  rollout, _ = programs.sampler(params, stage.prompts_of(0, 0), (stage.seed, zlib.crc32(b"cache")))
  _, gap_values = _sampler_gap(programs, params, rollouts.batch(rollout))
  rms = gap_values["logp_gap_rms"]
  if not rms <= MAX_LOGP_GAP_NATS:  # also true for NaN
    raise InputError(f"config.sampler.cache is {stage.samplers.config.cache} and the sampler's "
                     f"log-probabilities are {rms:.3f} nats (root mean square) from the trainer's "
                     f"in {stage.name}, where {MAX_LOGP_GAP_NATS} is allowed: set it to auto.")
