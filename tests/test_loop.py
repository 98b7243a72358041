"""One stage's loop: the order of things, epochs and minibatches, stopping and failing in order."""

import contextlib
import os
import signal
import time
import types
import zlib

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from configs import common
from s2d_jax import (
  checkpoint,
  compiling,
  files,
  hosts,
  loop,
  metrics,
  models,
  objectives,
  optim,
  rollouts,
  sampler,
  sharding,
  timing,
)
from s2d_jax.compiling import Samplers
from s2d_jax.losses import grpo
from s2d_jax.rewards import pool
from s2d_jax.roles import Role, StageModels
from s2d_jax.rollouts import Prompt
from s2d_jax.sampler import scheduler

CONFIG = {"model_type": "qwen3", "vocab_size": 16, "hidden_size": 8, "head_dim": 4,
          "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
          "tie_word_embeddings": True, "max_position_embeddings": 64}
COMPILE = compiling.compile_programs
PROGRAMS = {}  # compiled once for all the tests of one setting


def params_of(model, seed, mesh):
  rng = np.random.default_rng(seed)
  tree = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape) / 2, np.float32),
                      models.shapes(model.config))
  return jax.tree.map(sharding.put, tree,
                      sharding.weight_shardings(mesh, models.axes(model.config), tree))


def parity(prompt_id, ids):
  """A reward that varies within a group: the parity of the response's ids."""
  del prompt_id
  return float(ids.sum() % 2)


def make(folder, mesh, reward=parity, evaluations=None, **changes):
  """A student_grpo stage of four steps on eight prompts, saved every two."""
  model = models.get(CONFIG)
  hp = ml_collections.ConfigDict(
      common.stage(steps=4, prompts=4, save_every=2, optim=common.adamw(lr=1e-2),
                   sampling=common.sampling(samples_per_prompt=4, max_tokens=6))
      | common.grpo())
  hp.update(changes)
  learner = Role(model, params_of(model, 0, mesh))
  actor = Role(model, sharding.abstract(learner.params))
  order = rollouts.PromptOrder([Prompt(i, (2, 3 + i)) for i in range(8)], 0, "student_grpo",
                               hp.prompts, rounds=max(hp.rounds, 1))
  return loop.StageRun(
      name="student_grpo", folder=folder, seed=0, hp=hp, prompts_of=order,
      models=StageModels(learner, None, actor, on_policy=True, guide=None),
      samplers=Samplers(sampler.SamplerConfig(), prompt_tokens=3, stop_ids=(1,), decode=str),
      objective=objectives.GRPO, logp=objectives.logp,
      optimizer=optim.make(hp.optim, loop.update_count(hp), models.axes(model.config)),
      source=lambda sampler: rollouts.OnPolicy(
          sampler, (0, zlib.crc32(b"student_grpo")), hp.epochs * hp.minibatches),
      label_use="each_step",
      rewards=rollouts.Rewards(reward, grpo.group_advantages, objectives.length_penalty(hp)),
      pass_rates=None, evaluations=evaluations or {})


def with_cache(stage, cache):
  """The stage with another type of the sampler's cache."""
  return stage._replace(samplers=stage.samplers._replace(config=sampler.SamplerConfig(cache=cache)))


def frozen_actor(stage, model, params, store):
  """A stage that learns from a frozen actor's samples, kept in store()."""
  actor = Role(model, params)
  return stage._replace(
      models=stage.models._replace(actor=actor, on_policy=False),
      source=lambda sampler: rollouts.FrozenActor(
          sampler, params, store(), (0,), epath.Path(stage.folder).name,
          stage.hp.sampling.samples_per_prompt, stage.prompts_of.epoch))


def weighted(stage, params, prompt_weights, reward, folder):
  """A stage whose prompts are weighted by the pass rates of a learner's start, kept in `folder`."""
  start = Role(stage.models.learner.model, params)
  return stage._replace(
      models=stage.models._replace(pass_rate_model=start),
      pass_rates=lambda sampler: rollouts.PassRates(
          rollouts.FrozenActor(
              sampler, params, rollouts.Store(epath.Path(folder)),
              (0, zlib.crc32(b"pass rate")), epath.Path(stage.folder).name, stage.hp.pass_samples,
              lambda step, prompt: 0),
          reward, prompt_weights))


@pytest.fixture
def mesh(monkeypatch):
  """One device, and compiled programs shared between tests of equal settings."""
  def cached(models, hp, *args):
    key = hp.epochs, hp.minibatches, hp.clip_low
    if key not in PROGRAMS:
      PROGRAMS[key] = COMPILE(models, hp, *args)
    return PROGRAMS[key]

  monkeypatch.setattr(loop, "compile_programs", cached)
  mesh = sharding.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    yield mesh


def run(stage):
  with files.only_writer(stage.folder) as (heartbeat, last):
    with hosts.stop_signal() as stop, timing.clock() as clock:
      return loop.run(stage, clock, heartbeat, last, stop)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.medium
def test_ratios_are_one_in_a_single_update_and_move_in_further_ones(tmp_path, mesh):
  run(make(tmp_path / "one", mesh))
  for row in metrics.read(tmp_path / "one", "metrics"):
    assert abs(row["ratio_mean"] - 1) < 1e-6 and row["clip_fraction"] == 0
    assert row["logp_gap_max"] < 1e-5 and 0 <= row["mixed_groups"] <= 1
  stage = make(tmp_path / "many", mesh, epochs=3, minibatches=2, clip_low=1e-4, clip_high=1e-4)
  run(stage)
  rows = metrics.read(tmp_path / "many", "metrics")
  assert max(row["clip_fraction"] for row in rows) > 0.1
  assert max(abs(row["ratio_mean"] - 1) for row in rows) > 1e-4
  ledger = metrics.read(tmp_path / "many", "ledger")
  assert [r["tokens_trained"] for r in ledger] == [3 * r["tokens_sampled"] for r in ledger]


@pytest.mark.medium
def test_old_log_probabilities_are_taken_first_only_where_the_update_cannot(tmp_path, mesh):
  one, two = make(tmp_path / "one", mesh), make(tmp_path / "two", mesh, minibatches=2)
  guide = Role(models.get(CONFIG), None)
  wide = Role(models.get(CONFIG | {"vocab_size": 20}), None)
  for stage, changes, needed in (
      (one, {}, False), (two, {}, True), (one, {"on_policy": False}, True),
      (one, {"actor": None}, False), (one, {"guide": guide}, False), (one, {"guide": wide}, True)):
    changed = stage.models._replace(**changes)
    assert compiling.needs_old_logps(changed, stage.hp) == needed
  spent = []
  for stage in (one, two):
    run(stage)
    programs = loop.compile_programs(stage.models, stage.hp)
    assert (programs.token_logps is None) == (stage is one)
    spent.append(metrics.read(stage.folder, "ledger")[0])
    assert all(row["logp_gap_rms"] <= row["logp_gap_max"] < 1e-5 and "logp_gap_square" not in row
               for row in metrics.read(stage.folder, "metrics"))
  # Both sample once and update at the cost of three forward passes; one also scores at one more.
  assert spent[0]["tokens_sampled"] == spent[1]["tokens_sampled"]
  assert spent[1]["flops"] / spent[0]["flops"] == pytest.approx(5 / 4)


@pytest.mark.medium
def test_the_phases_of_a_step_add_up_to_its_seconds(tmp_path, mesh):
  def slow(prompt_id, ids):
    time.sleep(0.002)
    return parity(prompt_id, ids)

  def evaluate(params):
    time.sleep(0.05)
    return []

  run(make(tmp_path, mesh, reward=slow, minibatches=2, evaluations={"validation": (2, evaluate)}))
  start, *steps = metrics.read(tmp_path, "timing")
  assert start["compile_seconds"] >= 0 and start["programs_compiled"] >= 1
  assert [entry["step"] for entry in steps] == [0, 1, 2, 3]
  for entry in steps:
    phases = {phase: entry[f"{phase}_seconds"] for phase in timing.PHASES}
    assert sum(phases.values()) == pytest.approx(entry["seconds"], rel=1e-9)
    # Sixteen rewards a step; validation at steps 0 and 2; a checkpoint at step 2.
    assert phases["reward"] >= 16 * 0.002 and phases["draw"] > 0 and phases["update"] > 0
    assert phases["score"] > 0 and (phases["evaluate"] >= 0.05) == (entry["step"] in (0, 2))
    assert (phases["save"] > 0) == (entry["step"] == 2)


@pytest.mark.medium
def test_a_profile_is_written_for_its_steps_and_changes_no_number(tmp_path, mesh):
  run(make(tmp_path / "plain", mesh))
  run(make(tmp_path / "traced", mesh)._replace(profiled=range(1, 3)))
  (trace,) = (tmp_path / "traced" / "profile").rglob("*.xplane.pb")
  data = trace.read_bytes()
  assert b"draw" in data and b"update" in data and b"save" in data
  assert not (tmp_path / "plain" / "profile").exists()
  for name in ("metrics", "ledger", "samples"):
    assert metrics.read(tmp_path / "plain", name) == metrics.read(tmp_path / "traced", name)


@pytest.mark.medium
def test_checks_without_a_verdict_are_counted_at_each_step(tmp_path, mesh):
  # In this pool each check raises, because json.loads takes one argument.
  with contextlib.closing(pool.Pool("json:loads", 60.0, 60.0, 4 << 30, 1)) as checks:
    stage = make(tmp_path, mesh, reward=lambda prompt_id, ids: checks.submit({}, "1"), steps=2)
    run(stage)
  rows = stage.hp.prompts * stage.hp.sampling.samples_per_prompt
  assert [(row["check_timeouts"], row["check_failures"])
          for row in metrics.read(tmp_path, "metrics")] == [(0, rows)] * 2


@pytest.mark.medium
def test_no_gap_is_logged_where_every_group_is_dropped(tmp_path, mesh):
  run(make(tmp_path, mesh, reward=lambda prompt_id, ids: 1.0, rounds=1, steps=2))
  for row in metrics.read(tmp_path, "metrics"):
    assert row["mixed_groups"] == 0 == row["loss"]
    assert not any(name.startswith("logp_gap") for name in row)


@pytest.mark.medium
@pytest.mark.parametrize("cache", ["int8", "bfloat16"])
def test_a_cache_too_far_from_the_trainer_is_refused(cache, tmp_path, mesh, monkeypatch):
  # Keys and values of fewer bits move log-probabilities; how far is allowed says MAX_LOGP_GAP_NATS.
  monkeypatch.setattr(loop, "compile_programs", COMPILE)
  stage = with_cache(make(tmp_path, mesh, steps=1), cache)
  monkeypatch.setattr(loop, "MAX_LOGP_GAP_NATS", 1e-6)
  with pytest.raises(ValueError, match=cache + r" and the sampler's log-probabilities are 0\.\d+ "
                     r"nats \(root mean square\) from the trainer's in student_grpo, where 1e-06"):
    run(stage)
  assert not (tmp_path / "metrics").exists()
  monkeypatch.setattr(loop, "MAX_LOGP_GAP_NATS", 1.0)
  run(stage)
  (row,), (_, timing) = (metrics.read(tmp_path, name) for name in ("metrics", "timing"))
  assert 1e-5 < row["logp_gap_rms"] < 1 and row["logp_gap_rms"] <= row["logp_gap_max"]
  assert timing["sampler_tokens"] == row["tokens"] <= timing["sampler_slot_tokens"]


@pytest.mark.medium
@pytest.mark.parametrize("cache, rms, wrong", [
    ("int8", 0.0099, False), ("int8", 0.0101, True), ("int8", np.nan, True), ("auto", 1.0, False),
    ("float32", 1.0, False), ("bfloat16", 0.0101, True)])
def test_a_narrow_cache_may_be_a_hundredth_of_a_nat_away(cache, rms, wrong, tmp_path, mesh,
                                                        monkeypatch):
  stage = with_cache(make(tmp_path, mesh, steps=1), cache)
  monkeypatch.setattr(loop, "_sampler_gap", lambda *_: (None, {"logp_gap_rms": rms}))
  programs = types.SimpleNamespace(
      sampler=lambda *_: (rollouts.given_solutions([Prompt(0, (1,))], [[1, 2]], 3, 2), None))
  with pytest.raises(ValueError, match=f"sampler.cache is {cache} and .* where 0.01 is"
                     ) if wrong else contextlib.nullcontext():
    loop._check_cache(stage, programs, types.SimpleNamespace(params=None))


def step_batches(monkeypatch):
  """A list to which each step adds the batch that `loop._updates` is given."""
  batches = []
  updates = loop._updates

  def recorded(*args):
    batches.append(args[4])
    return updates(*args)

  monkeypatch.setattr(loop, "_updates", recorded)
  return batches


@pytest.mark.medium
def test_groups_of_equal_rewards_are_dropped_and_other_prompts_sampled(tmp_path, mesh, monkeypatch):
  # Prompts 0 to 3 are always right, so their groups are constant; the others' rewards are mixed.
  def reward(prompt_id, ids):
    return 1.0 if prompt_id < 4 else float(len(ids) % 2 == ids[0] % 2)
  batches = step_batches(monkeypatch)
  sampled = []
  sample = rollouts.OnPolicy.sample

  def recorded(self, params, prompts, step, round=0, on_finish=None):
    sampled.append((step, round, [p.id for p in prompts]))
    return sample(self, params, prompts, step, round, on_finish)

  monkeypatch.setattr(rollouts.OnPolicy, "sample", recorded)
  stage = make(tmp_path, mesh, rounds=2, reward=reward, steps=4)
  run(stage)
  assert {(step, round) for step, round, _ in sampled} >= {(step, 0) for step in range(4)}
  rows, ledger = metrics.read(tmp_path, "metrics"), metrics.read(tmp_path, "ledger")
  dropped = 0
  for step, (batch, row, entry) in enumerate(zip(batches, rows, ledger, strict=True)):
    prompt_ids = [i for at, _, ids in sampled if at == step for i in ids]
    # Every round is charged.
    assert sorted(entry["labels"]) == sorted(entry["prompts"]) == sorted(prompt_ids)
    assert row["rounds"] == len(prompt_ids) / 4 and batch.weight_BT.shape[0] == 16
    counted_GK = batch.weight_BT.sum(axis=1).reshape(4, 4) > 0
    assert np.all(counted_GK.all(axis=1) | ~counted_GK.any(axis=1))  # whole groups
    advantage = np.abs(batch.advantage_BT).max(axis=1).reshape(4, 4)
    assert np.array_equal(counted_GK[:, 0], advantage.max(axis=1) > 0)  # exactly those that teach
    assert entry["tokens_sampled"] == entry["tokens_trained"] + entry["tokens_discarded"]
    dropped += entry["tokens_discarded"]
  assert dropped > 0 and max(len(d[2]) for d in sampled) == 4


@pytest.mark.medium
def test_rounds_of_a_frozen_actor_are_all_in_the_store(tmp_path, mesh):
  # A student learns from a teacher's samples and its rewards; two rounds of four prompts a step,
  # so each step is an epoch of the eight. Prompts 0 to 3 are always right: dropped where possible.
  def reward(prompt_id, ids):
    return 1.0 if prompt_id < 4 else float(len(ids) % 2 == ids[0] % 2)
  model = models.get(CONFIG)
  opened = []
  def store():
    opened.append(rollouts.Store(epath.Path(tmp_path / "rollouts")))
    return opened[-1]
  def stage(name, steps):
    learner = make(tmp_path / name, mesh, rounds=2, reward=reward, steps=steps, clip_low=0.21)
    return frozen_actor(learner, model, params_of(model, 1, mesh), store)
  run(stage("one", 2))
  spent = metrics.read(tmp_path / "one", "ledger")
  assert [len(entry["prompts"]) for entry in spent] == [8, 8]
  store()
  every = [(prompt, sample) for prompt in range(8) for sample in range(8)]
  for opened_store in opened:  # as it was filled, and opened again
    for prompt, sample in every:
      rows, _ = opened_store.get([Prompt(prompt, ())], [sample])
      assert (rows.prompt_id_B[0], rows.sample_index_B[0]) == (prompt, sample)
  assert all(entry["tokens_reused"] == entry["flops_reused"] == 0 for entry in spent)
  # Another stage finds every row there: as much is reused, in trained and in dropped groups alike.
  run(stage("two", 3))
  again = metrics.read(tmp_path / "two", "ledger")
  for before, after in zip(spent, again, strict=False):
    assert before["tokens_sampled"] == after["tokens_reused"] > 0 == after["tokens_sampled"]
    assert before["tokens_discarded"] == after["tokens_discarded"] > 0
    assert before["flops"] == pytest.approx(after["flops"] + after["flops_reused"])
    assert 0 < after["flops_reused"] < before["flops"]
  assert again[2]["tokens_sampled"] > 0 == again[2]["tokens_reused"]  # a third epoch: new samples


@pytest.mark.medium
def test_responses_cut_off_get_no_weight_or_a_length_penalty(tmp_path, mesh, monkeypatch):
  batches = step_batches(monkeypatch)
  run(make(tmp_path / "mask", mesh, overlong="mask", steps=2))
  run(make(tmp_path / "soft", mesh, overlong="soft", overlong_cache=3, steps=2,
           reward=lambda prompt_id, ids: 0.0))
  for batch in batches[:2]:
    cut = (batch.sequence_BT >= 0).sum(axis=1) == 6  # all six tokens, the last one no stop token
    last = np.array([b.targets_BT[b.sequence_BT >= 0][-1] for b in
                     (jax.tree.map(lambda x, i=i: x[i: i + 1], batch) for i in range(16))])
    np.testing.assert_array_equal(batch.weight_BT.sum(axis=1) > 0, ~(cut & (last != 1)))
  for batch in batches[2:]:  # samples differ by their length alone
    length = (batch.sequence_BT >= 0).sum(axis=1).reshape(4, 4)
    advantage = batch.advantage_BT.sum(axis=1).reshape(4, 4) / length
    shaped = -np.clip((length - 3) / 3, 0, 1)
    spread = shaped.std(axis=1, keepdims=True)
    want = (shaped - shaped.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    np.testing.assert_allclose(advantage, want, atol=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_length_penalty_makes_no_group_of_equal_rewards_mixed(tmp_path, mesh, monkeypatch,
                                                                rounds):
  # The reward decides what is dropped, before anything is added to it: as many answers of prompts 0
  # to 3 as of the others get a length penalty, and none of those groups has a weight.
  def reward(prompt_id, ids):
    return 1.0 if prompt_id < 4 else parity(prompt_id, ids)
  batches, learned = step_batches(monkeypatch), []
  batch_of = rollouts.batch
  monkeypatch.setattr(rollouts, "batch", lambda rows, *arguments: (
      learned.append(rows), batch_of(rows, *arguments))[1])
  run(make(tmp_path, mesh, reward=reward, rounds=rounds, overlong="soft", overlong_cache=3))
  dropped = 0
  for rows, batch in zip(learned, batches, strict=True):
    raw = [reward(i, rows.response(b)) for b, i in enumerate(rows.prompt_id_B.tolist())]
    shaped_PG = np.reshape(raw - np.clip((rows.response_length_B - 3) / 3, 0, 1), (4, 4))
    mixed_P = np.ptp(np.reshape(raw, (4, 4)), axis=1) > 0
    np.testing.assert_array_equal(batch.weight_BT.max(axis=1).reshape(4, 4) > 0,
                                  np.repeat(mixed_P[:, None], 4, axis=1))
    advantage_PG = batch.advantage_BT.sum(axis=1).reshape(4, 4) / np.reshape(
        rows.response_length_B, (4, 4))
    np.testing.assert_allclose(advantage_PG[mixed_P], grpo.group_advantages(shaped_PG)[mixed_P],
                               atol=1e-5)
    dropped += (~mixed_P & (np.ptp(shaped_PG, axis=1) > 0)).sum()
  assert dropped > 0  # of groups that differ by their lengths alone


@pytest.mark.medium
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_names_its_prompt(tmp_path, mesh, value):
  def reward(prompt_id, ids):
    return value if prompt_id == 5 else parity(prompt_id, ids)
  with pytest.raises(ValueError, match=rf"prompt 5, sample \d has the reward {value}: a"):
    run(make(tmp_path, mesh, reward=reward, rounds=1))


@pytest.mark.medium
def test_a_step_evaluates_then_saves_then_samples(tmp_path, mesh, monkeypatch):
  events = []
  save, step = checkpoint.Checkpoints.save, loop._step
  monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda self, at, state, logs: (
      events.append(("save", at)), save(self, at, state, logs)))
  monkeypatch.setattr(loop, "_step", lambda *args: (events.append(("draw", args[5])),
                                                     step(*args))[1])
  run(make(tmp_path, mesh, evaluations={"validation": (
      2, lambda params: (events.append(("evaluate",)), [("validation/x", 1.0)])[1])}))
  assert events == [("evaluate",), ("draw", 0), ("draw", 1), ("evaluate",), ("save", 2),
                    ("draw", 2), ("draw", 3), ("save", 4)]
  assert [("validation/x" in r) for r in metrics.read(tmp_path, "metrics")] == [
      True, False, True, False]


@pytest.mark.medium
def test_a_stop_within_an_evaluation_or_a_steps_samples_is_saved(tmp_path, mesh):
  """`stop` is called before each dispatch of a sampler and before each step."""
  def evaluate(params):
    del params
    for _ in range(2):  # as a sampler with two dispatches
      if scheduler._stop():
        raise sampler.Stopped
    return [("validation/x", 1.0)]

  evaluations = {"validation": (2, evaluate)}
  whole, _ = run(make(tmp_path / "whole", mesh, evaluations=evaluations))
  saved = set()
  for call in range(1, 10):
    folder = tmp_path / f"cut at {call}"
    calls = iter(range(1, 1000))
    stage = make(folder, mesh, evaluations=evaluations)
    with files.only_writer(folder) as (heartbeat, last), timing.clock() as clock:
      with pytest.raises(SystemExit) as stopped:
        loop.run(stage, clock, heartbeat, last, lambda calls=calls, call=call: next(calls) >= call)
    assert stopped.value.code == 75
    saved.add(len(metrics.read(folder, "metrics")))
    again, _ = run(make(folder, mesh, evaluations=evaluations))
    equal(whole, again)
    for log in ("metrics", "ledger", "samples"):
      assert metrics.read(tmp_path / "whole", log) == metrics.read(folder, log), call
  assert saved == {0, 1, 2}
  # The seconds of the step that was given up are lost.
  starts = [files.read_json(path) for path in files.finished_files(folder / "starts")]
  assert [s.get("cut", 0.0) > 0 for s in starts] == [True, False]
  assert checkpoint.lost_seconds(folder, 4, None) == starts[0]["cut"]


@pytest.mark.medium
def test_a_stage_that_is_stopped_saves_and_resumes_to_the_same_end(tmp_path, mesh):
  whole, totals = run(make(tmp_path / "whole", mesh))
  signalled = []

  def stopping(prompt_id, ids):
    if not signalled and len(metrics.read(tmp_path / "cut", "metrics")) == 0:
      signalled.append(os.kill(os.getpid(), signal.SIGTERM))
    return parity(prompt_id, ids)

  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as stop:
    run(make(tmp_path / "cut", mesh, reward=stopping))
  assert stop.value.code == hosts.RETRY == 75
  assert signal.getsignal(signal.SIGTERM) == before
  assert len(metrics.read(tmp_path / "cut", "metrics")) == 1  # step 0, saved between two saves
  again, totals_again = run(make(tmp_path / "cut", mesh))
  equal(whole, again)
  for log in ("metrics", "ledger", "samples"):
    assert metrics.read(tmp_path / "whole", log) == metrics.read(tmp_path / "cut", log)
  seconds = ("device_seconds_used", "device_seconds_lost")
  assert {k: v for k, v in totals.items() if k not in seconds} == \
      {k: v for k, v in totals_again.items() if k not in seconds}


@pytest.mark.medium
def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, mesh):
  calls = []

  def poisoned(reward_PG):
    calls.append(reward_PG)
    return reward_PG * (np.nan if len(calls) > 3 else 1.0)

  with pytest.raises(FloatingPointError, match=r"step 3; the checkpoint of step 2 in .* is kept"):
    stage = make(tmp_path, mesh)
    run(stage._replace(rewards=stage.rewards._replace(advantages=poisoned)))
  steps = checkpoint.Checkpoints(tmp_path)
  assert steps.latest() == 2
  steps.close()


@pytest.mark.medium
def test_a_compilation_after_the_start_is_an_error(tmp_path, mesh):
  late = jax.jit(lambda x: x % 2)

  def compiling(prompt_id, ids):
    return float(late(np.float32(ids.sum())))

  with pytest.raises(RuntimeError, match="compiled 1 programs after its start, seen at step 0"):
    run(make(tmp_path, mesh, reward=compiling))


def test_a_sampler_that_does_not_fit_names_the_key_of_the_config(tmp_path, mesh):
  small = sampler.SamplerConfig(cache_gib=1e-9)
  stage = make(tmp_path, mesh)
  with pytest.raises(ValueError, match=r"^config\.sampler\.cache_gib is 1e-09, and one row of 9"):
    stage.samplers._replace(config=small).compile(stage.models.learner, stage.hp.sampling, 4)


@pytest.mark.medium
def test_nothing_compiles_after_the_start(tmp_path, mesh):
  with metrics.compilations() as count:
    counts = []
    run(make(tmp_path, mesh, evaluations={
        "validation": (1, lambda params: (counts.append(count().count), [])[1])}))
  assert len(counts) == 4 and counts[0] == counts[-1] == count().count


@pytest.mark.medium
def test_pass_rates_weight_the_prompts_and_their_labels_are_charged_once(tmp_path, mesh,
                                                                        monkeypatch):
  # A weighted supervised stage of two epochs over eight prompts: the learner's start samples each
  # prompt in the first epoch and never again, though the learner has moved by the second step.
  model, weights = models.get(CONFIG), []
  batch = rollouts.batch
  monkeypatch.setattr(rollouts, "batch", lambda rows, mean, advantage_B, weight_B: (
      weights.append(weight_B), batch(rows, mean, advantage_B, weight_B))[1])
  start, teacher = (params_of(model, seed, mesh) for seed in (0, 1))

  def stage(name):
    learner = make(tmp_path / name, mesh, clip_low=0.3, pass_samples=4)
    learner = learner._replace(
        name="weighted", prompts_of=learner.prompts_of._replace(stage="weighted"), rewards=None,
        label_use="once", objective=objectives.NEGATIVE_LOG_LIKELIHOOD)
    taught = frozen_actor(learner, model, teacher,
                          lambda: rollouts.Store(epath.Path(tmp_path / "rollouts")))
    return weighted(taught, start, objectives.learnable, parity, tmp_path / "passes")

  run(stage("one"))
  rows, spent = (metrics.read(tmp_path / "one", name) for name in ("metrics", "ledger"))
  prompts = [row["prompts"] for row in spent]
  assert sorted(prompts[0] + prompts[1]) == sorted(prompts[2] + prompts[3]) == list(range(8))
  parts = [rollouts.from_bytes(p.read_bytes()) for p in sorted((tmp_path / "passes").iterdir())]
  assert len(parts) == 2
  # The weights by hand: p(1 - p) of each prompt, for each of its four rows.
  right = {i: [] for i in range(8)}
  for part in parts:
    for b, i in enumerate(part.prompt_id_B.tolist()):
      right[i].append(parity(i, part.response(b)))
  rate = {i: np.mean(values) for i, values in right.items()}
  assert {len(values) for values in right.values()} == {4} and len(set(rate.values())) > 1
  for weight_B, row, entry in zip(weights, rows, spent, strict=True):
    want = [rate[i] * (1 - rate[i]) for i in entry["prompts"] for _ in range(4)]
    np.testing.assert_allclose(weight_B, want, rtol=1e-6)
    assert row["pass_rate"] == np.mean([rate[i] for i in entry["prompts"]])
    assert row["weighted"] == np.mean(np.array(want) > 0)
  # Samples of the second step are those of the start, and not of the learner as it was then.
  one = stage("one")
  programs = loop.compile_programs(one.models, one.hp)
  again, _ = programs.pass_rate_sampler(start, [Prompt(i, (2, 3 + i)) for i in prompts[1]],
                                        (0, zlib.crc32(b"pass rate")))
  np.testing.assert_array_equal(again.response_BT, parts[1].response_BT)
  np.testing.assert_array_equal(again.sampler_logp_BT, parts[1].sampler_logp_BT)
  # Labels and tokens in the first epoch alone; the actor asks for new samples in the second.
  actors = [rollouts.from_bytes(p.read_bytes()) for p in sorted((tmp_path / "rollouts").iterdir())]
  pass_rate_tokens = [int(part.response_length_B.sum()) for part in parts] + [0, 0]
  assert [entry["tokens_sampled"] for entry in spent] == [
      tokens + int(part.response_length_B.sum())
      for tokens, part in zip(pass_rate_tokens, actors, strict=True)]
  assert [entry["labels"] for entry in spent] == [*prompts[:2], [], []]
  # Another stage of the same row finds every sample there; its labels are its own.
  run(stage("two"))
  again = metrics.read(tmp_path / "two", "ledger")
  assert [entry["tokens_sampled"] for entry in again] == [0, 0, 0, 0]
  assert [entry["labels"] for entry in again] == [*prompts[:2], [], []]
  assert [entry["flops"] + entry["flops_reused"] for entry in again[2:]] == [
      entry["flops"] for entry in spent[2:]]


@pytest.mark.medium
def test_stored_samples_that_are_left_out_are_charged_as_discarded(tmp_path, mesh, monkeypatch):
  batches, model = step_batches(monkeypatch), models.get(CONFIG)
  teacher = params_of(model, 1, mesh)
  learner = make(tmp_path / "kept", mesh, steps=2, keep="right", longest=5, clip_low=0.31)
  learner = learner._replace(rewards=None, objective=objectives.NEGATIVE_LOG_LIKELIHOOD,
                             check=parity)
  run(frozen_actor(learner, model, teacher,
                   lambda: rollouts.Store(epath.Path(tmp_path / "rollouts"))))
  rows, spent = (metrics.read(tmp_path / "kept", name) for name in ("metrics", "ledger"))
  parts = [rollouts.from_bytes(p.read_bytes()) for p in sorted((tmp_path / "rollouts").iterdir())]
  assert len(parts) == len(batches) == 2
  for part, batch, row, entry in zip(parts, batches, rows, spent, strict=True):
    length_B = part.response_length_B
    kept_B = [len(ids) <= 5 and ids.sum() % 2 == 1 for ids in map(part.response, range(16))]
    assert 0 < sum(kept_B) < 16 and row["kept"] == np.mean(kept_B)
    np.testing.assert_array_equal((batch.weight_BT > 0).sum(axis=1), length_B * kept_B)
    assert entry["tokens_trained"] == (length_B * kept_B).sum()
    assert entry["tokens_discarded"] == length_B.sum() - entry["tokens_trained"]
    assert entry["sequences"] == 16 and entry["labels"] == entry["prompts"]


@pytest.mark.medium
def test_pass_rates_multiply_the_weights_that_rewards_leave(tmp_path, mesh, monkeypatch):
  # Prompts 0 to 3 are always right: their groups are dropped, drawn again in a second round, or
  # fill the batch up with weight 0.
  def reward(prompt_id, ids):
    return 1.0 if prompt_id < 4 else parity(prompt_id, ids)
  learned, batch = [], rollouts.batch
  monkeypatch.setattr(rollouts, "batch", lambda rows, mean, advantage_B, weight_B: (
      learned.append((rows, weight_B)), batch(rows, mean, advantage_B, weight_B))[1])
  stage = make(tmp_path, mesh, reward=reward, clip_low=0.35, pass_samples=4, rounds=2)
  start = params_of(stage.models.learner.model, 0, mesh)
  run(weighted(stage, start, lambda pass_rate_P: 1 + pass_rate_P, reward, tmp_path / "passes"))
  right = {}
  for path in (tmp_path / "passes").iterdir():
    part = rollouts.from_bytes(path.read_bytes())
    for b, i in enumerate(part.prompt_id_B.tolist()):
      right.setdefault(i, []).append(reward(i, part.response(b)))
  dropped = 0
  for rows, weight_B in learned:
    rewards = [reward(i, rows.response(b)) for b, i in enumerate(rows.prompt_id_B.tolist())]
    mixed_P = np.ptp(np.reshape(rewards, (4, 4)), axis=1) > 0
    rate_P = [np.mean(right[i]) for i in rows.prompt_id_B[::4].tolist()]
    np.testing.assert_allclose(weight_B, np.repeat((1 + np.array(rate_P)) * mixed_P, 4), rtol=1e-6)
    dropped += (~mixed_P).sum()
  redrawn = [row["rounds"] for row in metrics.read(tmp_path, "metrics")]
  assert dropped > 0 and max(redrawn) == 2


def test_learnable_weights_by_hand():
  np.testing.assert_allclose(objectives.learnable(np.array([0, 1 / 4, 1 / 2, 1])),
                             [0, 3 / 16, 1 / 4, 0])


def searching(folder, mesh, prompts, **changes):
  """The stage of `make` with searches after its steps 1, 2 and 4, on four prompts."""
  block = {"candidates": 2, "stride": 2.0, "problems": 4, "samples": 2, "accept": "at_least",
           "signal": "reward", "leaves": "all"} | changes
  stage = make(folder, mesh)
  stage.hp.foresee = block
  return stage._replace(models=stage.models._replace(anchored=True), ahead=prompts, check=parity)


@pytest.mark.medium
def test_a_search_that_is_killed_repeats_to_the_same_end(tmp_path, mesh, monkeypatch):
  monkeypatch.setattr(loop, "compile_programs", COMPILE)
  ahead = [Prompt(i, (2, 3 + i)) for i in range(4)]
  whole, totals = run(searching(tmp_path / "whole", mesh, ahead))
  rows = metrics.read(tmp_path / "whole", "metrics")
  assert [("foresee_multiple" in row) for row in rows] == [True, True, False, True]
  assert any(row.get("foresee_multiple") for row in rows)  # the weights did move

  # In the search after step 4, behind the last checkpoint, at its second score.
  of_steps = [sum("foresee_score" in name for name in row) for row in rows]
  countdown = iter([*range(sum(of_steps[:3]) + 1, -1, -1)])
  score = rollouts.score

  def killed(*args):
    if next(countdown) == 0:
      raise SystemExit(137)
    return score(*args)

  monkeypatch.setattr(rollouts, "score", killed)
  with pytest.raises(SystemExit):
    run(searching(tmp_path / "killed", mesh, ahead))
  monkeypatch.setattr(rollouts, "score", score)
  again, totals_again = run(searching(tmp_path / "killed", mesh, ahead))
  equal(whole, again)
  assert totals["foresee"] == totals_again["foresee"]
  assert totals["labels"] == totals_again["labels"]


@pytest.mark.medium
def test_a_search_by_divergence_reads_no_label_and_runs_both_models_once_more(
    tmp_path, mesh, monkeypatch):
  monkeypatch.setattr(loop, "compile_programs", COMPILE)
  ahead = [Prompt(i, (2, 3 + i)) for i in range(4)]
  first = {}
  for scored_by in ("reward", "kl"):
    stage = searching(tmp_path / scored_by, mesh, ahead, candidates=1, signal=scored_by)
    guide = Role(stage.models.learner.model, params_of(stage.models.learner.model, 1, mesh))
    _, totals = run(stage._replace(models=stage.models._replace(guide=guide)))
    first[scored_by] = metrics.read(tmp_path / scored_by, "ledger")[0]["foresee"]
    row = metrics.read(tmp_path / scored_by, "metrics")[0]
    # Two scores of eight responses, whose lengths add up to the tokens.
    tokens = 8 * (row["foresee_length_0"] + row["foresee_length_1"])
    assert tokens == first[scored_by]["tokens_sampled"]
    assert 0 <= row["foresee_repetition_0"] <= 1
  assert row["foresee_score_0"] < 0 and totals["foresee"]["label_uses"] == 0
  # The samples of both are the same. Learner and guide have one size, and the prompts two tokens.
  assert first["kl"]["tokens_sampled"] == first["reward"]["tokens_sampled"]
  assert first["kl"]["tokens_guide"] == first["kl"]["tokens_sampled"] + 2 * 16
  assert first["kl"]["flops"] == pytest.approx(3 * first["reward"]["flops"])
  assert first["reward"]["label_uses"] == 8 and first["kl"]["label_uses"] == 0


@pytest.mark.medium
def test_a_search_is_charged_to_its_own_part(tmp_path, mesh, monkeypatch):
  monkeypatch.setattr(loop, "compile_programs", COMPILE)
  ahead = [Prompt(i, (2, 3 + i)) for i in (1, 9, 10, 11)]  # the stage has 0 to 7
  _, totals = run(searching(tmp_path / "searched", mesh, ahead, accept="above"))
  _, plain = run(make(tmp_path / "plain", mesh))
  rows = metrics.read(tmp_path / "searched", "metrics")
  scores = sum("foresee_score" in name for row in rows for name in row)
  part = totals["foresee"]
  # Eight responses a score, and every label once a score.
  assert part["sequences"] == 8 * scores and part["label_uses"] == 4 * scores
  assert totals["sequences"] == plain["sequences"] and totals["updates"] == plain["updates"]
  assert totals["label_uses"] == plain["label_uses"] + part["label_uses"]
  assert {9, 10, 11} < set(totals["labels"]) and "foresee" not in plain
  assert totals["tokens_sampled"] - part["tokens_sampled"] == totals["tokens_trained"]
