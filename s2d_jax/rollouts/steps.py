"""The rollouts of one step: rounds of prompts, their rewards, and which rows are learned from.

Every host has the same rollouts and scores its share of the responses.
"""

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from s2d_jax import hosts
from s2d_jax.data import prompts as data_prompts
from s2d_jax.errors import InputError, from_user_code
from s2d_jax.rewards.pool import Unchecked, unchecked
from s2d_jax.rollouts.records import (
  FINISHED,
  Prompt,
  Rollout,
  SamplerStats,
  add_stats,
  concatenate,
  take,
)
from s2d_jax.rollouts.sources import FrozenActor, OnFinish, RolloutSource
from s2d_jax.sharding import Params

# (prompt id, response ids) -> reward, or a future of it where its check runs in another process
Reward = Callable[[int, np.ndarray], float | Future[float]]
_PromptsOf = Callable[[int, int], list[Prompt]]   # (step, round) -> the round's prompts


class PromptOrder(NamedTuple):
  """The order in which a stage draws its prompts, by `data.prompts`."""
  prompts: Sequence[Prompt]
  seed: int
  stage: str
  size: int        # prompts of a round
  rounds: int = 1  # rounds that a step may need

  def __call__(self, step: int, round: int) -> list[Prompt]:
    """The prompts of a round of a step."""
    indices = data_prompts.at(len(self.prompts), self.seed, self.stage, step, self.size, round,
                              self.rounds)
    return [self.prompts[i] for i in indices]

  def epoch(self, step: int, prompt: Prompt) -> int:
    """The index of the pass over the prompts that a step belongs to, for each of its prompts."""
    del prompt
    return data_prompts.epoch(len(self.prompts), step, self.size, self.rounds)


class StepRollouts(NamedTuple):
  """The rollouts of a step, with their rewards and weights."""
  prompts: list[Prompt]              # of every round
  rollout: Rollout                   # what is learned from; its shape is the same in every step
  fresh_B: np.ndarray                # its rows sampled for this step, not taken from a store
  weight_B: np.ndarray | None = None       # factor on each row's weight; None: 1 for all
  reward_B: np.ndarray | None = None       # None: the stage reads no rewards
  dropped: Rollout | None = None           # rows that are not learned from
  dropped_fresh_B: np.ndarray | None = None
  metrics: Mapping[str, Any] = {}          # of the rewards of all rounds
  stats: SamplerStats | None = None        # of all rounds; None: nothing was sampled


class Rewards(NamedTuple):
  """How responses are scored, and what an update makes of the scores."""
  reward: Reward
  advantages: Callable[[np.ndarray], np.ndarray]               # reward_PG -> advantage_PG
  length_penalty: Callable[[np.ndarray], np.ndarray] | None    # tokens -> added to the reward

  def advantage_B(self, rollouts: StepRollouts, groups: int) -> np.ndarray:
    """float32 advantage of each row; the rows are `groups` prompts of equally many samples."""
    reward_B = rollouts.reward_B
    if self.length_penalty is not None:
      reward_B = reward_B + self.length_penalty(rollouts.rollout.response_length_B)
    advantage_PG = self.advantages(reward_B.reshape(groups, -1))
    return np.asarray(advantage_PG, np.float32).reshape(-1)


class PassRates(NamedTuple):
  """Weights of prompts from the pass rates of the learner's start."""
  source: FrozenActor                               # of the learner's start; its samples are kept
  reward: Reward
  prompt_weights: Callable[[np.ndarray], np.ndarray]  # pass_rate_P -> weight_P

  def weights(self, rollouts: StepRollouts, step: int) -> tuple[np.ndarray, Rollout, float]:
    """Weights of the rows that a step learns from.

    Returns:
      (weight_B, sampled, pass_rate): the prompt's weight times the row's own; the rows that the
      learner's start sampled for this step; the mean pass rate of the step's prompts.
    """
    # Rows name their prompt by id alone; the source needs its tokens.
    by_id = {prompt.id: prompt for prompt in rollouts.prompts}
    # A step may have dropped prompts: only those learned from are looked at.
    id_B = rollouts.rollout.prompt_id_B.tolist()
    prompts = [by_id[i] for i in dict.fromkeys(id_B)]
    rollout, fresh_B, _ = self.source.sample(None, prompts, step)
    pass_rate_P = score(self.reward, rollout).reshape(len(prompts), -1).mean(axis=1)
    weight_P = self.prompt_weights(pass_rate_P)
    # By id and not by position: a prompt's rows need not be the source's rows.
    weight_of = {prompt.id: w for prompt, w in zip(prompts, weight_P, strict=True)}
    weight_B = np.array([weight_of[i] for i in id_B], np.float32)
    # Multiplied, so that a group that rewards gave weight 0 stays out.
    if rollouts.weight_B is not None:
      weight_B = weight_B * rollouts.weight_B
    return weight_B, take(rollout, fresh_B), pass_rate_P.mean()


def sample_step(source: RolloutSource, params: Params, prompts_of: _PromptsOf, step: int,
                hp: ConfigDict, reward: Reward | None = None) -> StepRollouts:
  """The rollouts of a step: one round, or where there are rewards up to hp.rounds.

  A group whose rewards are all equal has advantage 0 and teaches nothing. With hp.rounds of 1 or
  more such groups are dropped, and new prompts are sampled until the batch is full or the rounds
  are over; then dropped groups fill the batch with weight 0 (dynamic sampling of DAPO,
  https://arxiv.org/abs/2503.14476). Dropped groups are charged like others. Length penalties play
  no part: they are added later. hp.overlong "mask" gives responses that were cut off weight 0.

  Args:
    source: where the rollouts come from; params: the learner's weights.
    reward: None where the stage reads no rewards.
  """
  if reward is None:
    prompts = prompts_of(step, 0)
    rollout, fresh_B, stats = source.sample(params, prompts, step)
    return StepRollouts(prompts, rollout, fresh_B, stats=stats)
  G = hp.sampling.samples_per_prompt
  prompts = []
  parts = []
  fresh = []
  rewards = []
  stats = []
  for round in range(max(hp.rounds, 1)):
    new = prompts_of(step, round)
    early = {}  # rewards by row, computed or begun while other rows are still decoded
    rollout, fresh_B, round_stats = source.sample(params, new, step, round,
                                                  _scorer(reward, new, G, early))
    stats.append(round_stats)
    prompts += new
    parts.append(rollout)
    fresh.append(fresh_B)
    rewards.append(score(reward, rollout, early))
    # Over all rounds so far: groups of earlier rounds fill the batch too.
    reward_PG = np.concatenate(rewards).reshape(-1, G)
    mixed_P = reward_PG.min(axis=1) < reward_PG.max(axis=1)
    # Enough mixed groups fill the batch, so no further round is paid for.
    if mixed_P.sum() >= hp.prompts:
      break
  metrics = {"reward": reward_PG.mean(), "mixed_groups": mixed_P.mean(), "rounds": len(parts)}
  learned = _learned(prompts, concatenate(parts), np.concatenate(fresh), reward_PG, mixed_P, hp)
  return learned._replace(metrics=metrics, stats=add_stats(stats))


def _learned(prompts: list[Prompt], rollout: Rollout, fresh_B: np.ndarray, reward_PG: np.ndarray,
             mixed_P: np.ndarray, hp: ConfigDict) -> StepRollouts:
  """Splits the rows of all rounds into hp.prompts groups that are learned from, and the others."""
  G = reward_PG.shape[1]
  # Mixed groups first, each kind in the order of sampling; without rounds nothing is dropped.
  order_P = np.argsort(~mixed_P, kind="stable") if hp.rounds else np.arange(len(mixed_P))
  # Sorted again, so that rows stay in the order in which they were sampled.
  learned_P = np.sort(order_P[: hp.prompts])
  dropped_P = np.sort(order_P[hp.prompts:])
  learned_B = _rows(learned_P, G)
  dropped_B = _rows(dropped_P, G)
  learned = take(rollout, learned_B)
  # Without rounds, groups of equal rewards stay in the mean; their advantage is 0.
  has_weight_P = mixed_P[learned_P] | (hp.rounds == 0)
  weight_B = np.repeat(has_weight_P, G).astype(np.float32)
  if hp.overlong == "mask":
    weight_B = weight_B * (learned.finish_reason_B == FINISHED.index("stop"))
  found = StepRollouts(prompts, learned, fresh_B[learned_B], weight_B,
                       reward_PG[learned_P].reshape(-1))
  if not len(dropped_B):
    return found
  return found._replace(dropped=take(rollout, dropped_B), dropped_fresh_B=fresh_B[dropped_B])


def _rows(group_P: np.ndarray, G: int) -> np.ndarray:
  """Indices of the rows of groups, G rows a group."""
  return (group_P[:, None] * G + np.arange(G)).reshape(-1)


def _scorer(reward: Reward, prompts: Sequence[Prompt], G: int,
            early: dict[int, float | Future[float]]) -> OnFinish:
  """A callback that scores this host's share of the rows, as each is complete, into `early`."""
  def on_finish(index: int, rollout: Rollout) -> None:
    # The share of a host is the same as in `score`.
    if index % jax.process_count() == jax.process_index():
      early[index] = reward(prompts[index // G].id, rollout.response(index))
  return on_finish


def logged(step: StepRollouts, decode: Callable[[np.ndarray], str],
           count: int) -> Iterator[dict[str, Any]]:
  """The first `count` responses of a step, as entries of the samples log without their step."""
  rollout = step.rollout
  logp_BT = rollout.sampler_logp_BT
  for b in range(min(count, len(rollout.prompt_id_B))):
    ids = rollout.response(b)
    yield {"prompt_id": rollout.prompt_id_B[b], "sample_index": rollout.sample_index_B[b],
           "tokens": ids, "text": decode(ids),
           "logp": None if logp_BT is None else logp_BT[b, : len(ids)],
           "finish_reason": FINISHED[rollout.finish_reason_B[b]],
           "reward": None if step.reward_B is None else step.reward_B[b]}


def checked_reward(reward: Callable[[dict, str], Any], problem: dict,
                   text: str) -> float | Future[float]:
  """The reward of a text, or a future of it, whose result is checked as a number is.

  Raises:
    InputError: the reward fails, or is not a finite number; names the problem, shows the text.
      Of a future, its `result` raises it.
  """
  name = f"the task's reward of problem {problem['id']}"
  shown = repr(text if len(text) <= 100 else f"…{text[-100:]}")
  with from_user_code(f"{name}, on {shown},"):
    found = reward(problem, text)
  if not isinstance(found, Future):
    return _finite(found, name, shown)
  checked: Future[float] = Future()

  def finish(done: Future) -> None:
    try:
      with from_user_code(f"{name}, on {shown},"):
        result = done.result()
      checked.set_result(_finite(result, name, shown))
    except InputError as error:
      checked.set_exception(error)

  found.add_done_callback(finish)
  return checked


def _finite(found: Any, name: str, shown: str) -> float:
  """The float of what a reward returned.

  Raises:
    InputError: it is not a finite number; the message has the name and the text that is shown.
  """
  if not isinstance(found, numbers.Real | np.ndarray | jax.Array) or np.ndim(found) or (
      not np.isfinite(float(found))):
    raise InputError(f"{name} is {found!r} on {shown}: return a finite number.")
  return float(found)


def resolved(reward: float | Future[float]) -> float:
  """A reward, waited for where it is a future.

  Raises:
    InputError: a future of `checked_reward` failed, or its result is not a finite number.
  """
  return reward.result() if isinstance(reward, Future) else reward


def score(reward: Reward, rollout: Rollout,
          early: Mapping[int, float | Future[float]] | None = None) -> np.ndarray:
  """float32 rewards of each row: every host scores its share, and the shares are added up.

  Args:
    early: rewards that are known or begun already, by row.

  Raises:
    InputError: a reward is not finite; the message names the prompt and the sample.
  """
  early = early or {}
  B = len(rollout.prompt_id_B)
  begun = {}
  for b in range(jax.process_index(), B, jax.process_count()):
    begun[b] = early[b] if b in early else reward(int(rollout.prompt_id_B[b]), rollout.response(b))
  # Only after all have begun: several processes may check them.
  reward_B = hosts.join_shares({b: resolved(found) for b, found in begun.items()}, B)
  # After the sum, so that every host raises and none waits for one that has stopped.
  for b in np.flatnonzero(~np.isfinite(reward_B)):
    raise InputError(f"prompt {rollout.prompt_id_B[b]}, sample {rollout.sample_index_B[b]} has the "
                     f"reward {reward_B[b]}: a reward must be a finite number; look at what the "
                     "task's reward makes of that answer.")
  return reward_B


def unchecked_since(before: Unchecked) -> Unchecked:
  """Checks without a verdict after those of `before`, of all hosts, which must all call it."""
  of_host = np.subtract(unchecked(), before).astype(np.float32)
  return Unchecked(*hosts.sum_over_hosts(of_host).astype(int).tolist())
