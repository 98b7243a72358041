"""Where the rollouts of a step come from: the learner, a frozen actor, or given solutions.

Each class has the one method of `RolloutSource`. A new kind of source is a new class of this form.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from s2d_jax import hosts
from s2d_jax.rollouts.records import Prompt, Rollout, SamplerStats, given_solutions
from s2d_jax.rollouts.stores import Store
from s2d_jax.sharding import Params

OnFinish = Callable[[int, Rollout], None]  # (index of a row, the rollout, in which it is complete)
Sample = Callable[..., tuple[Rollout, SamplerStats]]  # a `sampler.Sampler`, by its call


class RolloutSource(Protocol):
  """Answers to a step's prompts."""

  def sample(self, params: Params, prompts: Sequence[Prompt], step: int, round: int = 0,
             on_finish: OnFinish | None = None,
             ) -> tuple[Rollout, np.ndarray, SamplerStats | None]:
    """A rollout of the prompts.

    Args:
      params: the learner's weights at the start of the step.
      prompts: the prompts of one round of the step.
      on_finish: called for each row when it is complete, while others are still decoded; a source
        that does not decode, or not for this step alone, does not call it.

    Returns:
      (rollout, fresh_B, stats): a prompt's samples side by side, in the order of the prompts;
      fresh_B is True where a row was sampled for this step; stats are None where nothing was
      sampled.
    """


class OnPolicy(NamedTuple):
  """The learner's own samples, drawn anew in every step."""
  sampler: Sample
  seed: tuple[int, ...]
  updates_per_step: int

  def sample(self, params: Params, prompts: Sequence[Prompt], step: int, round: int = 0,
             on_finish: OnFinish | None = None,
             ) -> tuple[Rollout, np.ndarray, SamplerStats | None]:
    """As `RolloutSource.sample`; every row is fresh."""
    rollout, stats = self.sampler(params, prompts, (*self.seed, step, round),
                                  weight_version=step * self.updates_per_step,
                                  on_finish=on_finish)
    # Each step has other weights, so nothing is read from a store.
    return rollout, np.ones(len(rollout.prompt_id_B), bool), stats


class FrozenActor(NamedTuple):
  """A frozen model's samples, each drawn once and kept in a store that other stages share."""
  sampler: Sample
  params: Params
  store: Store
  seed: tuple[int, ...]
  stage: str                    # the stage's folder name: it marks what this stage adds
  samples_per_prompt: int
  epoch: Callable[[int], int]   # step -> the pass over the prompts; each pass has new samples

  def sample(self, params: Params, prompts: Sequence[Prompt], step: int, round: int = 0,
             on_finish: OnFinish | None = None,
             ) -> tuple[Rollout, np.ndarray, SamplerStats | None]:
    """As `RolloutSource.sample`; rows that the store holds already are not fresh."""
    del params, on_finish
    # Epoch e has samples e·G to e·G + G − 1, so a second pass learns from new responses.
    first = self.epoch(step) * self.samples_per_prompt
    indices = range(first, first + self.samples_per_prompt)
    part = f"{self.stage}-{step:08d}-{round}"
    # Whole prompts are sampled again where one sample is missing; the store keeps only new rows.
    missing = self.store.missing(prompts, indices)
    stats = None
    if missing:
      rollout, stats = self.sampler(self.params, missing, self.seed, first_sample=first)
      self.store.add(part, rollout, hosts.leader())
    rollout, parts = self.store.get(prompts, indices)
    # By the part's name, not by what was missing: a step that a kill interrupted after the store
    # was written is charged for the same rows when it is done again.
    return rollout, np.array([name == part for name in parts]), stats


class GivenSolutions(NamedTuple):
  """Solutions that come with the problems: nothing is sampled."""
  solution: Callable[[int], Sequence[int]]  # problem id -> token ids, the end token included
  prompt_tokens: int
  max_tokens: int

  def sample(self, params: Params, prompts: Sequence[Prompt], step: int, round: int = 0,
             on_finish: OnFinish | None = None,
             ) -> tuple[Rollout, np.ndarray, SamplerStats | None]:
    """As `RolloutSource.sample`, one row a prompt; no row is fresh."""
    del params, step, round, on_finish
    rollout = given_solutions(prompts, [self.solution(prompt.id) for prompt in prompts],
                              self.prompt_tokens, self.max_tokens)
    return rollout, np.zeros(len(prompts), bool), None
