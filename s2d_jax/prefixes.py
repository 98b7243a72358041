"""Whether a guide can finish what a learner began: the prefix probe.

On-policy distillation asks the guide for the next token of a text that it would not write itself.
So a response of the learner to each problem is cut at a random place, and the guide finishes it
within the same limit of tokens. Beside that the guide answers the same problems on its own.

"The Many Faces of On-Policy Distillation", https://arxiv.org/abs/2605.11182.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2d_jax import hosts, rollouts
from s2d_jax.compiling import Samplers
from s2d_jax.errors import InputError
from s2d_jax.rollouts import Prompt, Reward, Rollout
from s2d_jax.sampler import Sampler
from s2d_jax.sharding import Params

Answer = Callable[[np.ndarray], str | None]  # response ids -> canonical answer, or None


class Settings(NamedTuple):
  """The arguments of `Samplers.compile`, beside the guide, for the sampler of the prefix probe."""
  samplers: Samplers
  batch: int                 # prompts a call
  changes: dict[str, Any]    # of the Sampling


def check(hp: ConfigDict) -> None:
  """Checks the key `prefixes` of config.probe, which it may lack, beside its other keys.

  Raises:
    InputError: there are fewer problems, or the sampling has what counts from a response's start.
      The message begins with a key's name.
  """
  count = hp.get("prefixes", 0)
  if count > hp.problems:
    raise InputError(f"prefixes is {count} and problems is {hp.problems}: lower prefixes, or raise "
                     "problems, whose responses are cut.")
  # The sampler sees the prefix as a part of the prompt, so it would count from the cut.
  if count and (hp.sampling.min_tokens or hp.sampling.stop_strings):
    raise InputError("prefixes needs sampling.min_tokens = 0 and no sampling.stop_strings, because "
                     "a sampler looks at what follows the cut alone: change them, or remove "
                     "prefixes.")


def settings(samplers: Samplers, hp: ConfigDict) -> Settings:
  """How the guide's sampler is compiled: one sample of prompts that hold a prefix as well."""
  wide = samplers._replace(prompt_tokens=samplers.prompt_tokens + hp.sampling.max_tokens)
  return Settings(wide, min(hp.prompts, hp.prefixes), {"samples_per_prompt": 1})


def cut(response_T: np.ndarray, seed: tuple[int, ...], prompt_id: int) -> np.ndarray:
  """The response's first n tokens, n uniform from 0 to its length − 1, as seed and id say."""
  # The last token is always the guide's, also where the response is complete.
  rng = np.random.default_rng(rollouts.row_key(seed, prompt_id, 0))
  return response_T[: rng.integers(max(len(response_T), 1))]


def measure(sample: Sampler, params: Params, prompts: Sequence[Prompt], begun: Rollout,
            reward: Reward, answer: Answer | None, seed: tuple[int, ...]) -> dict[str, Any]:
  """The prefix probe of a guide, by name of the number.

  Args:
    sample: of the guide, as `settings` says; params: the guide's.
    prompts: of the problems.
    begun: the learner's responses to them, and perhaps to others; the first of each is cut.
    answer: the canonical answer of a response; None: the task cannot read answers.
    seed: of the cuts and of both calls of the sampler. One that sampled `begun` would tie the
      guide's choices to the learner's.

  Returns:
    "problems", the number of them; "guide" and "after_prefix", the shares that are right;
    "drop", of each problem 1 where the guide alone is right less 1 where it is after the prefix;
    "right_to_wrong" and "wrong_to_right", the numbers of problems that the prefix changed so;
    "guide_well_formed" and "after_prefix_well_formed", the shares with an answer that the task can
    read, where it reads any.
  """
  row_of = {key: row for row, key in enumerate(rollouts.keys_of(begun))}
  prefixes = [cut(begun.response(row_of[p.id, 0]), seed, p.id) for p in prompts]
  nothing = [prefix[:0] for prefix in prefixes]
  found = {}
  right = {}
  for name, starts in (("guide", nothing), ("after_prefix", prefixes)):
    right_P, read_P = _finished(sample, params, prompts, starts, reward, answer, seed)
    right[name] = right_P
    found[name] = float(right_P.mean())
    if read_P is not None:
      found[f"{name}_well_formed"] = float(read_P.mean())
  return found | {
      "problems": len(prompts),
      "drop": (right["guide"].astype(int) - right["after_prefix"]).tolist(),
      "right_to_wrong": int((right["guide"] & ~right["after_prefix"]).sum()),
      "wrong_to_right": int((~right["guide"] & right["after_prefix"]).sum())}


def _finished(sample: Sampler, params: Params, prompts: Sequence[Prompt],
              starts: Sequence[np.ndarray], reward: Reward, answer: Answer | None,
              seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
  """Whether each finished response is right, bool [P], and whether its answer can be read."""
  longer = [Prompt(p.id, (*p.tokens, *start.tolist()))
            for p, start in zip(prompts, starts, strict=True)]
  rollout, _ = sample(params, longer, seed)
  # Tokens beyond the limit are dropped: the sampler's limit does not count the start.
  whole = [np.concatenate([start, rollout.response(row)])[: sample.sampling.max_tokens]
           for row, start in enumerate(starts)]
  # Each host checks its share. All checks begin before one is waited for: a pool may compute them.
  first, processes = hosts.share()
  rewards = {i: reward(prompts[i].id, whole[i]) for i in range(first, len(prompts), processes)}
  right_P = hosts.join_shares({i: rollouts.resolved(found) >= 1 for i, found in rewards.items()},
                              len(prompts)).astype(bool)
  return right_P, answer and np.array([answer(ids) is not None for ids in whole])
