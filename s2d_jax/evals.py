"""Evaluation: which samples solve which problems, as generators of (name, value).

What is scored is a matrix correct_PG of zeros and ones; what is yielded are numbers with intervals
from `stats`. Training calls these on the old state; the recipe calls them on finished weights.
"""

import numpy as np

from s2d_jax import keys, sampler, stats
from s2d_jax.keys import Key

TRAINED = ("labelled", "all", "1h", "2h")  # splits that stages learn from
SPLIT = Key(lambda split: split not in TRAINED, "choose a split that arms do not learn from")
VALIDATION_KEYS = {"split": SPLIT, "problems": keys.at_least(1), "sampling": sampler.Sampling.KEYS}
PROBE_KEYS = {
    "split": SPLIT, "problems": keys.at_least(0), "prompts": keys.at_least(1, hashed=False),
    "sampling": sampler.Sampling.KEYS, "group": keys.at_least(1), "top_k": keys.at_least(1),
    "microbatches": keys.at_least(1, hashed=False), "block": keys.at_least(1, hashed=False)}
EVALUATION_KEYS = {
    "split": SPLIT, "prompts": keys.at_least(1, hashed=False), "sampling": sampler.Sampling.KEYS,
    "ks": Key(lambda ks: all(k >= 1 for k in ks), "choose each k at least 1"),
    "draws": keys.at_least(1),
    "level": Key(lambda level: 0 < level < 1, "choose it between 0 and 1"),
    "log_samples": keys.at_least(0, hashed=False)}


def check_evaluation(hp):
  """Raises ValueError, starting with a key's name, where a k asks for more than is sampled."""
  samples = hp.sampling.samples_per_prompt
  if max(hp.ks, default=1) > samples:
    raise ValueError(f"ks is {tuple(hp.ks)} and {samples} samples are drawn: choose each k at most "
                     "sampling.samples_per_prompt.")


def check_probe(hp):
  """Raises ValueError, starting with a key's name, unless samples fill groups and batches split."""
  samples = hp.sampling.samples_per_prompt
  if hp.group > samples:
    raise ValueError(f"group is {hp.group} and {samples} samples are drawn: raise "
                     "sampling.samples_per_prompt, or lower the group.")
  if hp.problems % hp.prompts:
    raise ValueError(f"problems is {hp.problems}: make it a multiple of prompts = {hp.prompts}, or "
                     "0 to measure nothing.")
  if hp.prompts * samples % hp.microbatches:
    raise ValueError(f"microbatches is {hp.microbatches} and does not divide the "
                     f"{hp.prompts * samples} rows that are scored at once: change one of them.")


def solve(draw, params, prompts, reward, seed):
  """Samples every prompt and checks every response as it ends, while others are decoded.

  Args:
    draw: as `sampler.make` returns it; params: the weights; prompts: rollouts.Prompt of P problems.
    reward: (prompt id, response ids) -> float; seed: a tuple of ints.

  Returns:
    (correct_PG, rollout): 1 where the reward is 1 or more, else 0, float32 [P, G], and the rows
    behind them.
  """
  correct = {}
  def ended(place, rows):
    correct[place] = reward(int(rows.prompt_id_B[place]), rows.response(place)) >= 1
  rows = draw(params, prompts, seed, ended=ended)
  correct_B = np.array([correct[place] for place in range(len(rows.prompt_id_B))], np.float32)
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


def mixed(correct_PG, group):
  """Chance that `group` samples of a problem are neither all right nor all wrong, for each, [P].

  Unbiased from the G ≥ group samples at hand, and 1 − p^g − (1 − p)^g in expectation: only such a
  group gives GRPO a gradient.
  """
  G = correct_PG.shape[1]
  right_P = np.asarray(correct_PG, np.int64).sum(axis=1)
  return (stats.pass_at_k(G, right_P, group) + stats.pass_at_k(G, G - right_P, group)) - 1


def text(correct_PG, rows, group):
  """Yields (name, value) of a model's own samples: how often right, how mixed, how long.

  stopped is the share that ended themselves; response_length is in tokens; entropy is the
  mean −log p of the samples, in nats a token. correct and mixed_prompts are each prompt's own.
  """
  yield "pass_rate", float(np.mean(correct_PG))
  mixed_P = mixed(correct_PG, group)
  yield "mixed_groups", float(mixed_P.mean())
  yield "mixed_prompts", mixed_P.tolist()
  yield "correct", np.asarray(correct_PG, int).tolist()
  T = rows.sampler_logp_BT.shape[1]
  inside_BT = np.arange(T) < rows.response_length_B[:, None]
  yield "entropy", float(-rows.sampler_logp_BT[inside_BT].mean(dtype=np.float64))
  yield "response_length", float(rows.response_length_B.mean())
  yield "stopped", float((rows.finish_reason_B == 1).mean())


def agreement(value_BT, weight_BT):
  """Yields (name, value): means over response tokens of what `losses.agreement` measures.

  A gradient becomes its concentration: the share of the summed lengths that the worst 1 % of the
  tokens have.
  """
  inside_BT = np.asarray(weight_BT) > 0
  for name, values in value_BT.items():
    value_N = np.asarray(values, np.float64)[inside_BT]
    if name.endswith("_gradient"):
      worst = np.sort(value_N)[::-1][: max(1, round(len(value_N) / 100))]
      yield f"{name}_worst", float(worst.sum() / max(value_N.sum(), 1e-30))
    else:
      yield name, float(value_N.mean())


def validation(draw, prompts, reward, seed):
  """validate(params) -> iterable of (name, value): the running score on `validation` problems."""
  def validate(params):
    correct_PG, rows = solve(draw, params, prompts, reward, seed)
    yield f"validation/avg@{correct_PG.shape[1]}", correct_PG.mean()
    yield "validation/response_length", rows.response_length_B.mean()
  return validate
