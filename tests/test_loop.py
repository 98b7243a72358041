"""One stage's loop: the order of things, epochs and minibatches, stopping and failing in order."""

import contextlib
import os
import signal
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
  drawing,
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
)
from s2d_jax.losses import grpo
from s2d_jax.rollouts import Prompt

CONFIG = {"model_type": "qwen3", "vocab_size": 16, "hidden_size": 8, "head_dim": 4,
          "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
          "tie_word_embeddings": True, "max_position_embeddings": 64}
PLAIN = loop.compile_programs
PROGRAMS = {}  # compiled once for all the tests of one setting


def params_of(model, seed, mesh):
  rng = np.random.default_rng(seed)
  tree = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape) / 2, np.float32),
                      models.shapes(model.config))
  return jax.tree.map(sharding.put, tree,
                      sharding.weight_shardings(mesh, models.axes(model.config), tree))


def odd(prompt_id, ids):
  """A reward that varies within a group: the parity of the response's ids."""
  del prompt_id
  return float(ids.sum() % 2)


def make(folder, mesh, reward=odd, validate=lambda params: (), **changes):
  """A student_grpo stage of four steps on eight prompts, saved every two."""
  model = models.get(CONFIG)
  hp = ml_collections.ConfigDict(
      common.stage(steps=4, prompts=4, save_every=2, optim=common.adamw(lr=1e-2),
                   sampling=common.sampling(samples_per_prompt=4, max_tokens=6))
      | common.grpo())
  hp.update(changes)
  return loop.Work(
      name="student_grpo", folder=folder, hp=hp, seed=0,
      prompts=[Prompt(i, (2, 3 + i)) for i in range(8)], width=3, stop_ids=(1,),
      learner=loop.Role(model, params_of(model, 0, mesh)), actor=None, guide=None, frozen=None,
      given=None,
      reward=reward, advantages=grpo.group_advantages, punish=objectives.length_penalty(hp),
      judge=None, weigh=None,
      objective=objectives.GRPO, logp=objectives.logp,
      optimizer=optim.make(hp.optim, loop.update_count(hp), models.axes(model.config)),
      store=None, passes=None, validate=validate, text=str, room=sampler.Room())


@pytest.fixture
def mesh(monkeypatch):
  """One device, and compiled programs shared between tests of equal settings."""
  compile_programs = loop.compile_programs

  def cached(work, state, mesh):
    key = work.hp.epochs, work.hp.minibatches, work.hp.clip_low
    if key not in PROGRAMS:
      PROGRAMS[key] = compile_programs(work, state, mesh)
    return PROGRAMS[key]

  monkeypatch.setattr(loop, "compile_programs", cached)
  mesh = sharding.make_mesh((1, 1, 1))
  with jax.set_mesh(mesh):
    yield mesh


def run(work):
  with files.only_writer(work.folder) as (beat, left):
    with hosts.stop_signal() as stop:
      return loop.run(work, beat, left, stop)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.medium
def test_one_update_a_batch_has_ratio_one_and_more_move_it(tmp_path, mesh):
  run(make(tmp_path / "one", mesh))
  for row in metrics.read(tmp_path / "one", "metrics"):
    assert abs(row["ratio_mean"] - 1) < 1e-6 and row["clip_fraction"] == 0
    assert row["logp_gap_max"] < 1e-5 and 0 <= row["mixed_groups"] <= 1
  work = make(tmp_path / "many", mesh, epochs=3, minibatches=2, clip_low=1e-4, clip_high=1e-4)
  run(work)
  rows = metrics.read(tmp_path / "many", "metrics")
  assert max(row["clip_fraction"] for row in rows) > 0.1
  assert max(abs(row["ratio_mean"] - 1) for row in rows) > 1e-4
  ledger = metrics.read(tmp_path / "many", "ledger")
  assert [r["tokens_trained"] for r in ledger] == [3 * r["tokens_sampled"] for r in ledger]


@pytest.mark.medium
def test_text_is_scored_before_the_update_only_where_the_update_cannot(tmp_path, mesh):
  one, two = make(tmp_path / "one", mesh), make(tmp_path / "two", mesh, minibatches=2)
  teacher = loop.Role(models.get(CONFIG), params_of(one.learner.model, 1, mesh))
  wide = loop.Role(models.get(CONFIG | {"vocab_size": 20}), None)
  for work, asked in ((one, False), (two, True), (one._replace(actor=teacher), True),
                      (one._replace(given=list), False), (one._replace(guide=teacher), False),
                      (one._replace(guide=wide), True)):
    assert loop.scored(work) == asked
  spent = []
  for work in (one, two):
    run(work)
    assert (loop.compile_programs(work, None, mesh).score is None) == (work is one)
    spent.append(metrics.read(work.folder, "ledger")[0])
    assert all(row["logp_gap_rms"] <= row["logp_gap_max"] < 1e-5 and "logp_gap_square" not in row
               for row in metrics.read(work.folder, "metrics"))
  # The same samples: drawn once, learned from at three forwards, and scored at one more.
  assert spent[0]["tokens_sampled"] == spent[1]["tokens_sampled"]
  assert spent[1]["flops"] / spent[0]["flops"] == pytest.approx(5 / 4)


@pytest.mark.medium
def test_where_every_group_is_dropped_no_gap_is_claimed(tmp_path, mesh):
  run(make(tmp_path, mesh, reward=lambda prompt_id, ids: 1.0, rounds=1, steps=2))
  for row in metrics.read(tmp_path, "metrics"):
    assert row["mixed_groups"] == 0 == row["loss"]
    assert not any(name.startswith("logp_gap") for name in row)


@pytest.mark.medium
@pytest.mark.parametrize("cache", ["int8", "bfloat16"])
def test_a_cache_too_far_from_the_trainer_is_refused(cache, tmp_path, mesh, monkeypatch):
  # Keys and values of fewer bits move log-probabilities; how far is allowed says MOST_GAP.
  monkeypatch.setattr(loop, "compile_programs", PLAIN)
  work = make(tmp_path, mesh, steps=1)._replace(room=sampler.Room(cache=cache))
  monkeypatch.setattr(loop, "MOST_GAP", 1e-6)
  with pytest.raises(ValueError, match=cache + r" and the sampler's log-probabilities are 0\.\d+ "
                     r"nats \(root mean square\) from the trainer's in student_grpo, where 1e-06"):
    run(work)
  assert not (tmp_path / "metrics").exists()
  monkeypatch.setattr(loop, "MOST_GAP", 1.0)
  run(work)
  (row,), (_, timing) = (metrics.read(tmp_path, name) for name in ("metrics", "timing"))
  assert 1e-5 < row["logp_gap_rms"] < 1 and row["logp_gap_rms"] <= row["logp_gap_max"]
  assert timing["sampler_tokens"] == row["tokens"] <= timing["sampler_slot_tokens"]


@pytest.mark.medium
@pytest.mark.parametrize("cache, gap, wrong", [
    ("int8", 0.0099, False), ("int8", 0.0101, True), ("int8", np.nan, True), ("auto", 1.0, False),
    ("float32", 1.0, False), ("bfloat16", 0.0101, True)])
def test_a_narrow_cache_may_be_a_hundredth_of_a_nat_away(cache, gap, wrong, tmp_path, mesh,
                                                        monkeypatch):
  work = make(tmp_path, mesh, steps=1)._replace(room=sampler.Room(cache=cache))
  monkeypatch.setattr(loop, "_score", lambda *_: (None, {"logp_gap_rms": gap}))
  programs = types.SimpleNamespace(
      draw=lambda *_: rollouts.given([Prompt(0, (1,))], [[1, 2]], 3, 2))
  with pytest.raises(ValueError, match=f"sampler.cache is {cache} and .* where 0.01 is"
                     ) if wrong else contextlib.nullcontext():
    loop._check_cache(work, programs, types.SimpleNamespace(params=None), mesh)


def step_batches(monkeypatch):
  """Every batch that `loop._updates` is given, as the steps go."""
  seen, updates = [], loop._updates
  monkeypatch.setattr(loop, "_updates", lambda *args: (seen.append(args[4]), updates(*args))[1])
  return seen


@pytest.mark.medium
def test_groups_of_equal_rewards_are_dropped_and_drawn_again(tmp_path, mesh, monkeypatch):
  # Prompts 0 to 3 are always right, so their groups are constant; the others' rewards are mixed.
  def reward(prompt_id, ids):
    return 1.0 if prompt_id < 4 else float(len(ids) % 2 == ids[0] % 2)
  batches, drawn, one = step_batches(monkeypatch), [], drawing._draw
  monkeypatch.setattr(drawing, "_draw", lambda *args: (drawn.append((args[4], args[6], [
      p.id for p in args[5]])), one(*args))[1])
  work = make(tmp_path, mesh, rounds=2, reward=reward, steps=4)
  run(work)
  assert {(step, turn) for step, turn, _ in drawn} >= {(step, 0) for step in range(4)}
  rows, ledger = metrics.read(tmp_path, "metrics"), metrics.read(tmp_path, "ledger")
  dropped = 0
  for step, (batch, row, entry) in enumerate(zip(batches, rows, ledger, strict=True)):
    asked = [i for at, _, ids in drawn if at == step for i in ids]
    assert sorted(entry["labels"]) == sorted(entry["prompts"]) == sorted(asked)  # all are charged
    assert row["rounds"] == len(asked) / 4 and batch.weight_BT.shape[0] == 16
    own = batch.weight_BT.sum(axis=1).reshape(4, 4) > 0
    assert np.all(own.all(axis=1) | ~own.any(axis=1))  # whole groups
    advantage = np.abs(batch.advantage_BT).max(axis=1).reshape(4, 4)
    assert np.array_equal(own[:, 0], advantage.max(axis=1) > 0)  # exactly those that teach
    assert entry["tokens_sampled"] == entry["tokens_trained"] + entry["tokens_discarded"]
    dropped += entry["tokens_discarded"]
  assert dropped > 0 and max(len(d[2]) for d in drawn) == 4


@pytest.mark.medium
def test_rounds_of_a_frozen_actor_are_all_in_the_store(tmp_path, mesh):
  # A student learns from a teacher's samples and its rewards; two rounds of four prompts a step,
  # so each step is an epoch of the eight. Prompts 0 to 3 are always right: dropped where possible.
  def reward(prompt_id, ids):
    return 1.0 if prompt_id < 4 else float(len(ids) % 2 == ids[0] % 2)
  model = models.get(CONFIG)
  opened = []
  def store():
    opened.append(rollouts.Store(epath.Path(tmp_path / "rollouts"), files.write))
    return opened[-1]
  def stage(name, steps):
    work = make(tmp_path / name, mesh, rounds=2, reward=reward, steps=steps, clip_low=0.21)
    return work._replace(actor=loop.Role(model, params_of(model, 1, mesh)), store=store)
  run(stage("one", 2))
  spent = metrics.read(tmp_path / "one", "ledger")
  assert [len(entry["prompts"]) for entry in spent] == [8, 8]
  store()
  every = [(prompt, sample) for prompt in range(8) for sample in range(8)]
  for kept in opened:  # as it was filled, and opened again
    for prompt, sample in every:
      rows, _ = kept.get([Prompt(prompt, ())], [sample])
      assert (rows.prompt_id_B[0], rows.sample_index_B[0]) == (prompt, sample)
  assert all(entry["tokens_reused"] == entry["flops_reused"] == 0 for entry in spent)
  # Another stage draws what is there: as much is reused, of kept and of dropped groups alike.
  run(stage("two", 3))
  again = metrics.read(tmp_path / "two", "ledger")
  for before, after in zip(spent, again, strict=False):
    assert before["tokens_sampled"] == after["tokens_reused"] > 0 == after["tokens_sampled"]
    assert before["tokens_discarded"] == after["tokens_discarded"] > 0
    assert before["flops"] == pytest.approx(after["flops"] + after["flops_reused"])
    assert 0 < after["flops_reused"] < before["flops"]
  assert again[2]["tokens_sampled"] > 0 == again[2]["tokens_reused"]  # a third epoch: new samples


@pytest.mark.medium
def test_answers_cut_off_are_left_out_or_punished(tmp_path, mesh, monkeypatch):
  batches = step_batches(monkeypatch)
  run(make(tmp_path / "mask", mesh, overlong="mask", steps=2))
  run(make(tmp_path / "soft", mesh, overlong="soft", overlong_cache=3, steps=2,
           reward=lambda prompt_id, ids: 0.0))
  for batch in batches[:2]:
    cut = (batch.sequence_BT >= 0).sum(axis=1) == 6  # all six tokens, the last one no stop token
    last = np.array([b.targets_BT[b.sequence_BT >= 0][-1] for b in
                     (jax.tree.map(lambda x, i=i: x[i: i + 1], batch) for i in range(16))])
    np.testing.assert_array_equal(batch.weight_BT.sum(axis=1) > 0, ~(cut & (last != 1)))
  for batch in batches[2:]:  # nothing but the length tells samples apart
    length = (batch.sequence_BT >= 0).sum(axis=1).reshape(4, 4)
    advantage = batch.advantage_BT.sum(axis=1).reshape(4, 4) / length
    shaped = -np.clip((length - 3) / 3, 0, 1)
    spread = shaped.std(axis=1, keepdims=True)
    want = (shaped - shaped.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    np.testing.assert_allclose(advantage, want, atol=1e-5)


@pytest.mark.medium
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_length_punished_does_not_make_a_group_worth_learning_from(tmp_path, mesh, monkeypatch,
                                                                     rounds):
  # The reward decides what is dropped, before anything is added to it: as many answers of prompts 0
  # to 3 as of the others are punished for their lengths, and none of those groups has a weight.
  def reward(prompt_id, ids):
    return 1.0 if prompt_id < 4 else odd(prompt_id, ids)
  batches, learned = step_batches(monkeypatch), []
  batch_of = rollouts.batch
  monkeypatch.setattr(rollouts, "batch", lambda rows, *more: (
      learned.append(rows), batch_of(rows, *more))[1])
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
    return value if prompt_id == 5 else odd(prompt_id, ids)
  with pytest.raises(ValueError, match=rf"prompt 5, sample \d has the reward {value}: a"):
    run(make(tmp_path, mesh, reward=reward, rounds=1))


@pytest.mark.medium
def test_evaluate_then_save_then_draw(tmp_path, mesh, monkeypatch):
  events = []
  save, step = checkpoint.Checkpoints.save, loop._step
  monkeypatch.setattr(checkpoint.Checkpoints, "save", lambda self, at, state: (
      events.append(("save", at)), save(self, at, state)))
  monkeypatch.setattr(loop, "_step", lambda *args: (events.append(("draw", args[4])),
                                                     step(*args))[1])
  run(make(tmp_path, mesh, eval_every=2,
           validate=lambda params: (events.append(("evaluate",)), [("validation/x", 1.0)])[1]))
  assert events == [("evaluate",), ("draw", 0), ("draw", 1), ("evaluate",), ("save", 2),
                    ("draw", 2), ("draw", 3), ("save", 4)]
  assert [("validation/x" in r) for r in metrics.read(tmp_path, "metrics")] == [
      True, False, True, False]


@pytest.mark.medium
def test_told_to_stop_it_saves_and_goes_on_to_the_same_end(tmp_path, mesh):
  whole, totals = run(make(tmp_path / "whole", mesh))
  told = []

  def stopping(prompt_id, ids):
    if not told and len(metrics.read(tmp_path / "cut", "metrics")) == 0:
      told.append(os.kill(os.getpid(), signal.SIGTERM))
    return odd(prompt_id, ids)

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
  seen = []

  def poisoned(reward_PG):
    seen.append(reward_PG)
    return reward_PG * (np.nan if len(seen) > 3 else 1.0)

  with pytest.raises(FloatingPointError, match=r"step 3; the checkpoint of step 2 in .* is kept"):
    run(make(tmp_path, mesh)._replace(advantages=poisoned))
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


@pytest.mark.medium
def test_nothing_compiles_after_the_start(tmp_path, mesh):
  with metrics.compilations() as count:
    counts = []
    run(make(tmp_path, mesh, eval_every=1,
             validate=lambda params: (counts.append(count()), [])[1]))
  assert len(counts) == 4 and counts[0] == counts[-1] == count()


@pytest.mark.medium
def test_pass_rates_weigh_the_prompts_and_their_labels_are_charged_once(tmp_path, mesh,
                                                                        monkeypatch):
  # A weighted supervised stage of two epochs over eight prompts: the learner's start samples each
  # prompt in the first epoch and never again, though the learner has moved by the second step.
  model, weights = models.get(CONFIG), []
  batch = rollouts.batch
  monkeypatch.setattr(rollouts, "batch", lambda rows, mean, advantage_B, weight_B: (
      weights.append(weight_B), batch(rows, mean, advantage_B, weight_B))[1])
  start, teacher = (loop.Role(model, params_of(model, seed, mesh)) for seed in (0, 1))

  def weighted(name):
    work = make(tmp_path / name, mesh, clip_low=0.3, pass_samples=4)
    return work._replace(
        name="weighted", advantages=None, weigh=objectives.learnable, actor=teacher, judge=start,
        objective=objectives.NEGATIVE_LOG_LIKELIHOOD,
        store=lambda: rollouts.Store(epath.Path(tmp_path / "rollouts"), files.write),
        passes=lambda: rollouts.Store(epath.Path(tmp_path / "passes"), files.write))

  run(weighted("one"))
  rows, spent = (metrics.read(tmp_path / "one", name) for name in ("metrics", "ledger"))
  prompts = [row["prompts"] for row in spent]
  assert sorted(prompts[0] + prompts[1]) == sorted(prompts[2] + prompts[3]) == list(range(8))
  parts = [rollouts.from_bytes(p.read_bytes()) for p in sorted((tmp_path / "passes").iterdir())]
  assert len(parts) == 2
  # The weights by hand: p(1 - p) of each prompt, for each of its four rows.
  right = {i: [] for i in range(8)}
  for part in parts:
    for b, i in enumerate(part.prompt_id_B.tolist()):
      right[i].append(odd(i, part.response(b)))
  rate = {i: np.mean(values) for i, values in right.items()}
  assert {len(values) for values in right.values()} == {4} and len(set(rate.values())) > 1
  for weight_B, row, entry in zip(weights, rows, spent, strict=True):
    want = [rate[i] * (1 - rate[i]) for i in entry["prompts"] for _ in range(4)]
    np.testing.assert_allclose(weight_B, want, rtol=1e-6)
    assert row["pass_rate"] == np.mean([rate[i] for i in entry["prompts"]])
    assert row["weighted"] == np.mean(np.array(want) > 0)
  # Samples of the second step are those of the start, and not of the learner as it was then.
  programs = loop.compile_programs(weighted("one"), None, mesh)
  again = programs.judge(start.params, [Prompt(i, (2, 3 + i)) for i in prompts[1]],
                         (0, zlib.crc32(b"pass rate")))
  np.testing.assert_array_equal(again.response_BT, parts[1].response_BT)
  np.testing.assert_array_equal(again.sampler_logp_BT, parts[1].sampler_logp_BT)
  # Labels and tokens in the first epoch alone; the actor asks for new samples in the second.
  actors = [rollouts.from_bytes(p.read_bytes()) for p in sorted((tmp_path / "rollouts").iterdir())]
  judged = [int(part.response_length_B.sum()) for part in parts] + [0, 0]
  assert [entry["tokens_sampled"] for entry in spent] == [
      tokens + int(part.response_length_B.sum())
      for tokens, part in zip(judged, actors, strict=True)]
  assert [entry["labels"] for entry in spent] == [*prompts[:2], [], []]
  # Another stage of the same row finds every sample there; its labels are its own.
  run(weighted("two"))
  again = metrics.read(tmp_path / "two", "ledger")
  assert [entry["tokens_sampled"] for entry in again] == [0, 0, 0, 0]
  assert [entry["labels"] for entry in again] == [*prompts[:2], [], []]
  assert [entry["flops"] + entry["flops_reused"] for entry in again[2:]] == [
      entry["flops"] for entry in spent[2:]]


@pytest.mark.medium
def test_pass_rates_weigh_what_rewards_left_and_bring_no_dropped_group_back(tmp_path, mesh,
                                                                            monkeypatch):
  # Prompts 0 to 3 are always right: their groups are dropped, drawn again in a second round, or
  # fill the batch up with weight 0.
  def reward(prompt_id, ids):
    return 1.0 if prompt_id < 4 else odd(prompt_id, ids)
  learned, batch = [], rollouts.batch
  monkeypatch.setattr(rollouts, "batch", lambda rows, mean, advantage_B, weight_B: (
      learned.append((rows, weight_B)), batch(rows, mean, advantage_B, weight_B))[1])
  work = make(tmp_path, mesh, reward=reward, clip_low=0.35, pass_samples=4, rounds=2)
  run(work._replace(
      weigh=lambda pass_rate_P: 1 + pass_rate_P,
      judge=loop.Role(work.learner.model, params_of(work.learner.model, 0, mesh)),
      passes=lambda: rollouts.Store(epath.Path(tmp_path / "passes"), files.write)))
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


def test_a_pass_rates_weight_by_hand():
  np.testing.assert_allclose(objectives.learnable(np.array([0, 1 / 4, 1 / 2, 1])),
                             [0, 3 / 16, 1 / 4, 0])
