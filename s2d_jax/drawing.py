"""What a step draws: prompts, samples, rewards, and which of it is learned from.

A step may draw in several rounds; what frozen actors sampled is kept and shared by its name. Every
host draws the same and scores its share of the answers.
"""

import types
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from s2d_jax import hosts, rollouts, training
from s2d_jax.data import prompts as order


class Drawn(NamedTuple):
  """What a step drew, and what of it is learned from."""
  picked: list        # the prompts, of every round
  rows: Any           # the Rollout learned from, always of the same shape
  weight_B: Any       # a factor on each of its rows, 0 where nothing is learned; or None
  reward_B: Any       # its rewards, or None
  fresh_B: Any        # which of them were sampled for this step, and not taken from a store
  dropped: Any        # a Rollout of the rows that are not learned from, or None
  dropped_fresh_B: Any  # which of those were sampled for this step, or None
  metrics: dict       # of the rewards of all that was drawn


def drawn(work, programs, store, state, step):
  """The Drawn of a step: one round, or with hp.rounds as many as there are groups to replace.

  A group whose rewards are all equal teaches nothing: where hp.rounds is 1 or more it is dropped,
  and new prompts are drawn until the batch is full or the rounds are over, when dropped groups fill
  it up with weight 0 (dynamic sampling, DAPO, https://arxiv.org/abs/2503.14476). Their labels and
  tokens are charged. The reward alone decides, before work.punish adds to it: lengths that differ
  make no group worth learning from. Answers that were cut off are left out where hp.overlong is
  "mask".
  """
  hp = work.hp
  if work.advantages is None:
    picked = _picked(work, step, 0, 1)
    rows, fresh_B = _draw(work, programs, store, state, step, picked)
    return Drawn(picked, rows, None, None, fresh_B, None, None, {})
  picked, parts, fresh, groups, G = [], [], [], [], hp.sampling.samples_per_prompt
  for turn in range(max(hp.rounds, 1)):
    new, scored = _picked(work, step, turn, max(hp.rounds, 1)), {}
    rows, fresh_B = _draw(work, programs, store, state, step, new, turn,
                          _scorer(work.reward, new, G, scored))
    picked, parts, fresh = picked + new, [*parts, rows], [*fresh, fresh_B]
    groups.append(rewards(work.reward, rows, scored).reshape(-1, G))
    reward_PG = np.concatenate(groups)
    mixed_P = reward_PG.min(axis=1) < reward_PG.max(axis=1)
    if mixed_P.sum() >= hp.prompts:
      break
  every, fresh_B = rollouts.concatenate(parts), np.concatenate(fresh)
  order_P = np.argsort(~mixed_P, kind="stable") if hp.rounds else np.arange(len(mixed_P))
  own_P, rest_P = np.sort(order_P[: hp.prompts]), np.sort(order_P[hp.prompts:])
  own_B, rest_B = ((places_P[:, None] * G + np.arange(G)).reshape(-1)
                   for places_P in (own_P, rest_P))
  rows = rollouts.take(every, own_B)
  weight_B = np.repeat(mixed_P[own_P] | (hp.rounds == 0), G).astype(np.float32)
  if hp.overlong == "mask":
    weight_B = weight_B * (rows.finish_reason_B == rollouts.FINISHED.index("stop"))
  dropped = (rollouts.take(every, rest_B), fresh_B[rest_B]) if len(rest_B) else (None, None)
  return Drawn(picked, rows, weight_B, reward_PG[own_P].reshape(-1), fresh_B[own_B], *dropped,
               {"reward": reward_PG.mean(), "mixed_groups": mixed_P.mean(),
                "rounds": len(parts)})


def _picked(work, step, turn, rounds):
  return [work.prompts[i] for i in order.at(len(work.prompts), work.seed, work.name, step,
                                            work.hp.prompts, turn, rounds)]


def _scorer(reward, picked, G, scored):
  """ended(place, rows) that scores this host's share of the rows while others are still decoded."""
  def ended(place, rows):
    if place % jax.process_count() == jax.process_index():
      scored[place] = reward(picked[place // G].id, rows.response(place))
  return ended


def _draw(work, programs, store, state, step, picked, turn=0, ended=None):
  """A round's rollout, and which of its rows were sampled for it."""
  hp = work.hp
  G = hp.sampling.samples_per_prompt
  if work.given is not None:
    rows = work.given(picked)
    return rows, np.zeros(len(rows.prompt_id_B), bool)
  if store is None:
    seed = (work.seed, zlib.crc32(work.name.encode()), step, turn)
    version = step * hp.epochs * hp.minibatches
    params = training.join(state.params, work.frozen)
    return (programs.draw(params, picked, seed, weight_version=version, ended=ended),
            np.ones(len(picked) * G, bool))
  rounds = 1 if work.advantages is None else max(hp.rounds, 1)
  # Each epoch asks for new samples.
  first = order.epoch(len(work.prompts), step, hp.prompts, rounds) * G
  return _stored(store, work, step, turn, picked, range(first, first + G),
                 lambda missing: programs.draw(work.actor.params, missing, (work.seed,),
                                               first_sample=first))


def _stored(store, work, step, turn, picked, samples, draw):
  """The rows of every (prompt, sample), drawn where the store lacks them; which are this round's.
  """
  mine = f"{epath.Path(work.folder).name}-{step:08d}-{turn}"
  missing = store.missing(picked, samples)
  if missing:
    store.add(mine, draw(missing), hosts.leader())
  rows, parts = store.get(picked, samples)
  # By the part's name, not by what was missing: a killed step, done again, is charged the same.
  return rows, np.array([part == mine for part in parts])


def weigh(work, programs, store, step, drawn):
  """(weight of each row learned from, the judge's new samples, mean pass rate).

  A prompt's pass rate is that of the learner's start, on hp.pass_samples of its samples. They are
  drawn once, by this stage or by another. Its weight multiplies what `drawn` gives a row.
  """
  seed, prompts = (work.seed, zlib.crc32(b"pass rate")), {p.id: p for p in drawn.picked}
  id_B = drawn.rows.prompt_id_B.tolist()
  picked = [prompts[i] for i in dict.fromkeys(id_B)]
  rows, new_B = _stored(store, work, step, 0, picked, range(work.hp.pass_samples),
                        lambda missing: programs.judge(work.judge.params, missing, seed))
  pass_rate_P = rewards(work.reward, rows).reshape(len(picked), -1).mean(axis=1)
  weight_P = dict(zip((p.id for p in picked), work.weigh(pass_rate_P), strict=True))
  weight_B = np.array([weight_P[i] for i in id_B], np.float32)
  if drawn.weight_B is not None:
    weight_B = weight_B * drawn.weight_B
  return weight_B, rollouts.take(rows, new_B), pass_rate_P.mean()


def rewards(reward, rows, scored=types.MappingProxyType({})):
  """float32 [B]: every host scores its share of the rows, and reads the others'.

  What is scored already, by place, is not scored again.

  Raises:
    ValueError: a reward is not finite; names the prompt and the sample.
  """
  count, here = jax.process_count(), jax.process_index()
  B = len(rows.prompt_id_B)
  mine = np.zeros(B, np.float32)
  for b in range(here, B, count):
    mine[b] = scored[b] if b in scored else reward(int(rows.prompt_id_B[b]), rows.response(b))
  reward_B = hosts.sum_over_hosts(mine)
  for b in np.flatnonzero(~np.isfinite(reward_B)):
    raise ValueError(f"prompt {rows.prompt_id_B[b]}, sample {rows.sample_index_B[b]} has the "
                     f"reward {reward_B[b]}: a reward must be a finite number; look at what the "
                     "task's reward makes of that answer.")
  return reward_B
