"""Evaluation: which samples solve which problems, as generators of (name, value).

What is scored is a matrix correct_PG of zeros and ones; what is yielded are numbers with intervals
from `stats`. Training calls these on the old state; the recipe calls them on finished weights.
"""

import numpy as np

from s2d_jax import stats


def solve(draw, params, prompts, reward, seed):
  """Samples every prompt and checks every response.

  Args:
    draw: as `sampler.make` returns it; params: the weights; prompts: rollout.Prompt of P problems.
    reward: (prompt id, response ids) -> float; seed: a tuple of ints.

  Returns:
    (correct_PG, rollout): 1 where the reward is 1 or more, else 0, float32 [P, G], and the rows
    behind them.
  """
  rows = draw(params, prompts, seed)
  correct_B = np.array([reward(int(i), rows.response(b)) >= 1
                        for b, i in enumerate(rows.prompt_id_B)], np.float32)
  return correct_B.reshape(len(prompts), -1), rows


def scores(correct_PG, ks, seed, draws, level):
  """Yields (name, stats.Interval): avg@G and unbiased pass@k for every k, nested bootstrap.

  Args:
    correct_PG: 0/1; ks: the ks of pass@k, each at most G; seed, draws, level: of the bootstrap.
  """
  G = correct_PG.shape[1]
  yield f"avg@{G}", stats.nested_bootstrap(correct_PG, stats.avg_at_k, seed, draws, level)
  for k in ks:
    yield f"pass@{k}", stats.nested_bootstrap(correct_PG, stats.mean_pass_at_k(k), seed, draws,
                                              level)


def validation(draw, prompts, reward, seed):
  """validate(params) -> iterable of (name, value): the running score on `validation` problems."""
  def validate(params):
    correct_PG, rows = solve(draw, params, prompts, reward, seed)
    yield f"validation/avg@{correct_PG.shape[1]}", correct_PG.mean()
    yield "validation/response_length", rows.response_length_B.mean()
  return validate
