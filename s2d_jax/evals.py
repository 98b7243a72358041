"""Evaluation: samples problems, checks the responses, and computes the statistics of `stats`.

`run` is the one evaluator: training calls it between steps, the probe around a stage, and scoring
on finished weights.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2d_jax import hosts, keys, prefixes, rollouts, sampler, stats
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.rewards import pool
from s2d_jax.rollouts import OnFinish, Prompt, Reward, Rollout
from s2d_jax.sampler import Sampler
from s2d_jax.sharding import Params

Answer = Callable[[np.ndarray], str | None]  # response ids -> canonical answer, or None
Statistics = Callable[[Mapping[str, stats.Samples]], Iterable[tuple[str, stats.Interval]]]

TRAINED = ("labelled", "all", "1h", "2h")  # splits that stages learn from
SPLIT = Key(lambda split: split not in TRAINED, "choose a split that arms do not learn from")
PROBE_KEYS = {
    "split": SPLIT, "problems": keys.at_least(0), "prompts": keys.at_least(1, hashed=False),
    "sampling": sampler.Sampling.KEYS, "group": keys.at_least(1), "top_k": keys.at_least(1),
    "microbatches": keys.at_least(1, hashed=False), "block": keys.at_least(1, hashed=False),
    # problems whose responses the guide finishes too, after a cut (`prefixes`)
    "prefixes": keys.at_least(1, neutral=0, optional=True)}


def statistics_of(hp: ConfigDict) -> tuple[str, ...]:
  """The statistics that an evaluation's config names, or all of the table."""
  return tuple(stats.STATISTICS) if hp.statistics == "all" else tuple(hp.statistics.split(","))


def every(hp: ConfigDict) -> int:
  """The steps from one run of an evaluation to the next, or 0 where it runs at the end."""
  return _steps(hp.when)


def between_steps(blocks: ConfigDict, stage: str) -> dict[str, ConfigDict]:
  """Those blocks of config.evals that run between the steps of a stage, by name."""
  return {name: hp for name, hp in blocks.items()
          if every(hp) and (hp.stages == "all" or stage in hp.stages.split(","))}


def _steps(when: str) -> int | None:
  """50 for "every 50", 0 for "end", and None for a text that is neither."""
  if when == "end":
    return 0
  word, _, steps = when.partition(" ")
  valid = word == "every" and steps.isdecimal() and int(steps) >= 1
  return int(steps) if valid else None


EVALUATION_KEYS = {
    "split": SPLIT, "problems": keys.at_least(0, neutral=0),
    "prompts": keys.at_least(1, hashed=False), "sampling": sampler.Sampling.KEYS,
    "statistics": Key(
        lambda names: names == "all" or {*names.split(",")} <= {*stats.STATISTICS},
        f"choose 'all', or several of {','.join(stats.STATISTICS)} with commas between",
        neutral="all"),
    "ks": Key(lambda ks: all(map(keys.at_least(1).check, ks)),
              "choose each k a whole number of at least 1"),
    "draws": keys.at_least(1),
    "level": Key(lambda level: 0 < level < 1, "choose it between 0 and 1"),
    "log_samples": keys.at_least(0, hashed=False),
    "when": Key(lambda when: _steps(when) is not None,
                "choose 'end', or 'every 50' for any number of steps", hashed=False),
    # Whether the config has these stages is checked by the doctor, which sees the whole config.
    "stages": Key(lambda stages: isinstance(stages, str),
                  "choose 'all', or stages with commas between", hashed=False)}


def check_evaluation(hp: ConfigDict) -> None:
  """Raises InputError, starting with a key's name, where values do not combine."""
  if every(hp) == 0 and hp.stages != "all":
    raise InputError(f"stages is {hp.stages!r} and when is 'end', which is after every stage: set "
                     "stages to 'all', or when to 'every 50'.")
  names = statistics_of(hp)
  # A report compares arms by this statistic, and would fail after all training.
  if every(hp) == 0 and stats.HEADLINE not in names:
    raise InputError(f"statistics is {hp.statistics!r} and when is 'end': add {stats.HEADLINE}, by "
                     "which a report compares arms.")
  entries = [stats.STATISTICS[name] for name in names]
  if not any(stats.chosen_ks(entry, hp.ks) for entry in entries):
    raise InputError(f"statistics is {hp.statistics!r} and ks {tuple(hp.ks)}, of which there is no "
                     f"score: add {stats.HEADLINE}, or a larger k.")
  samples = hp.sampling.samples_per_prompt
  # pass@k and maj@k are of k different samples of one problem.
  if max(hp.ks, default=1) > samples:
    raise InputError(f"ks is {tuple(hp.ks)} and {samples} samples are drawn: choose each k at most "
                     "sampling.samples_per_prompt.")


def check_probe(hp: ConfigDict) -> None:
  """Raises InputError, starting with a key's name, unless samples fill groups and batches split."""
  samples = hp.sampling.samples_per_prompt
  if hp.group > samples:
    raise InputError(f"group is {hp.group} and {samples} samples are drawn: raise "
                     "sampling.samples_per_prompt, or lower the group.")
  if hp.problems % hp.prompts:
    raise InputError(f"problems is {hp.problems}: make it a multiple of prompts = {hp.prompts}, or "
                     "0 to measure nothing.")
  if hp.prompts * samples % hp.microbatches:
    raise InputError(f"microbatches is {hp.microbatches} and does not divide the "
                     f"{hp.prompts * samples} rows that are scored at once: change one of them.")
  prefixes.check(hp)


class Stored(NamedTuple):
  """Rows that an evaluation sampled before it was stopped, and what stores each further one."""
  rows: Rollout | None   # in any order; None where there are none yet
  on_finish: OnFinish


def solve(sample: Sampler, params: Params, prompts: Sequence[Prompt], reward: Reward,
          seed: tuple[int, ...], answer: Answer | None = None,
          stored: Stored | None = None) -> tuple[stats.Samples, Rollout]:
  """Samples every prompt and checks every response as it ends, while others are decoded.

  On several processes it is a collective: each checks its share of the responses.

  Args:
    prompts: of P problems.
    answer: the canonical answer of a response; None: the samples have no answers.
    stored: rows that are read and not sampled again; None: every row is sampled.

  Returns:
    (samples, rollout): a sample is right where its reward is 1 or more; and the rows behind them.
  """
  # Filled while other rows are decoded, so that a slow grader costs no time of the device.
  begun: dict[int, float | Future[float]] = {}  # rewards, some of which a pool computes
  first, processes = hosts.share()

  def check(index: int, row: int, rollout: Rollout) -> None:
    if index % processes == first:
      begun[index] = reward(int(rollout.prompt_id_B[row]), rollout.response(row))

  if stored is None:
    rollout, _ = sample(params, prompts, seed,
                        on_finish=lambda row, rollout: check(row, row, rollout))
  else:
    rollout = _resumed(sample, params, prompts, seed, stored, check)
  P = len(prompts)
  rows = range(len(rollout.prompt_id_B))
  # float32, because the scores of finished runs were computed in it.
  correct_PG = hosts.join_shares({index: rollouts.resolved(found) >= 1
                                  for index, found in begun.items()}, len(rows)).reshape(P, -1)
  answer_PG = None
  if answer is not None:
    answers = [answer(rollout.response(index)) for index in rows]
    answer_PG = _numbered(np.array(answers, object).reshape(P, -1))
  truncated_B = rollout.finish_reason_B == rollouts.FINISHED.index("length")
  return stats.Samples(
      correct_PG, rollout.response_length_B.reshape(P, -1),
      truncated_B.astype(np.float32).reshape(P, -1), answer_PG), rollout


def _resumed(sample: Sampler, params: Params, prompts: Sequence[Prompt], seed: tuple[int, ...],
             stored: Stored, check: Callable[[int, int, Rollout], None]) -> Rollout:
  """The rollout of all samples of the prompts, of which the stored rows are not sampled again.

  Args:
    check: called as check(index of the row in the result, row, rollout) for each row that ends.
  """
  requests = [(prompt, g) for prompt in prompts for g in range(sample.sampling.samples_per_prompt)]
  index_of = {(prompt.id, g): index for index, (prompt, g) in enumerate(requests)}

  def index(row: int, rollout: Rollout) -> int:
    return index_of[int(rollout.prompt_id_B[row]), int(rollout.sample_index_B[row])]

  def finish(row: int, rollout: Rollout) -> None:
    stored.on_finish(row, rollout)
    check(index(row, rollout), row, rollout)

  parts = []
  absent = {}
  read = set()
  if stored.rows is not None:
    # A file may hold rows of other problems, or further samples of each.
    of_prompts = [row for row, key in enumerate(rollouts.keys_of(stored.rows)) if key in index_of]
    parts.append(rollouts.take(stored.rows, of_prompts))
    for row in range(len(of_prompts)):
      read.add(index(row, parts[0]))
      check(index(row, parts[0]), row, parts[0])
    absent = {field: None for field, x in stored.rows._asdict().items() if x is None}
  missing = [request for number, request in enumerate(requests) if number not in read]
  if missing:
    sampled, _ = sample.sample_rows(params, missing, seed, on_finish=finish)
    parts.append(sampled._replace(**absent))
  rollout = rollouts.concatenate(parts)
  order = np.argsort([index_of[key] for key in rollouts.keys_of(rollout)])
  return rollouts.take(rollout, order)


def _numbered(answers_PG: np.ndarray) -> np.ndarray:
  """Texts as numbers, equal where a problem's texts are equal; -1 for None."""
  answer_PG = np.full(answers_PG.shape, -1)
  for p, texts in enumerate(answers_PG.tolist()):
    # A vote only asks which texts are equal, so the first sample with a text stands for it.
    first = {}
    for g, text in enumerate(texts):
      if text is not None:
        answer_PG[p, g] = first.setdefault(text, g)
  return answer_PG


class Evaluation(NamedTuple):
  """The result of `run`: the scores, and the samples behind them by way of sampling."""
  scores: dict[str, stats.Interval]
  samples: dict[str, stats.Samples]
  rollouts: dict[str, Rollout]
  unchecked: pool.Unchecked   # checks of answers without a verdict, which count as wrong


def run(samplers: Mapping[str, Sampler], params: Params, prompts: Sequence[Prompt], reward: Reward,
        seed: tuple[int, ...], statistics: Statistics, answer: Answer | None = None,
        stored: Mapping[str, Stored] | None = None) -> Evaluation:
  """Samples the prompts in every way, and computes the statistics of all samples.

  Args:
    samplers: by way of sampling, "sampled" or "greedy" (`stats.Statistic.of`).
    statistics: the samples by way of sampling -> their scores; see `intervals`.
    answer: as `solve` takes it; stored: likewise, by way of sampling.
  """
  # One seed for every way of sampling: a greedy row and a sampled one share no random number.
  samples = {}
  rows = {}
  before = pool.unchecked()
  for way, sample in samplers.items():
    samples[way], rows[way] = solve(sample, params, prompts, reward, seed, answer,
                                    stored and stored[way])
  return Evaluation(dict(statistics(samples)), samples, rows, rollouts.unchecked_since(before))


def record(evaluation: Evaluation) -> dict[str, Any]:
  """The scores of an evaluation and the samples behind them, without texts, for a JSON file."""
  samples = {}
  for way, found in evaluation.samples.items():
    samples[way] = {field: np.asarray(values, int).tolist()
                    for field, values in found._asdict().items() if values is not None}
  return {"scores": evaluation.scores, "samples": samples} | evaluation.unchecked._asdict()


def unlike(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
  """The settings by which two scores differ, by name; they may be of different sets of problems.

  Scores that differ in the model's prompt, its sampling or the check of answers measure different
  things, so they may not stand in one row.
  """
  names = sorted((first.keys() | other.keys()) - {"set"})
  return [name for name in names if first.get(name) != other.get(name)]


def intervals(ks: Sequence[int], seed: int, draws: int, level: float,
              kinds: Sequence[str] = tuple(stats.STATISTICS)) -> Statistics:
  """Statistics for `run`: those of the table that the samples have, bootstrapped.

  Args:
    ks: of the statistics that have several, each at most the number of samples.
    seed, draws, level: of the bootstrap.
    kinds: statistics; others are left out.
  """
  def statistics(samples: Mapping[str, stats.Samples]) -> Iterator[tuple[str, stats.Interval]]:
    for name in stats.names(samples, ks, kinds):
      yield name, stats.score(name, samples, seed, draws, level)
  return statistics


def batch(hp: ConfigDict) -> int:
  """The prompts that an evaluation samples side by side."""
  return min(hp.prompts, hp.problems) if hp.problems else hp.prompts


def ways(hp: ConfigDict) -> dict[str, dict[str, Any]]:
  """The ways of sampling that an evaluation's statistics need, as changes to its Sampling."""
  changes = {"sampled": {}, "greedy": {"samples_per_prompt": 1, "temperature": 0.0}}
  needed = {stats.STATISTICS[name].of for name in statistics_of(hp)}
  return {way: change for way, change in changes.items() if way in needed}


def evaluator(hp: ConfigDict, compiled: Callable[..., Sampler], prompts: Sequence[Prompt],
              reward: Reward, answer: Answer | None, seed: int,
              stored: Mapping[str, Stored] | None = None) -> Callable[[Params], Evaluation]:
  """An evaluation of config.evals as a function of the weights; its samplers are compiled now.

  Args:
    compiled: (config of a Sampling, prompts a call, **changes) -> Sampler.
    prompts: of the evaluation's split.
    seed: of the run. An evaluation between steps has other samples than one at the end.
    stored: as `run` takes it.
  """
  samplers = {way: compiled(hp.sampling, batch(hp), **change) for way, change in ways(hp).items()}
  salt = zlib.crc32(b"validation" if every(hp) else b"evaluation")
  statistics = intervals(hp.ks, seed, hp.draws, hp.level, statistics_of(hp))
  chosen = prompts[: hp.problems] if hp.problems else prompts
  return lambda params: run(samplers, params, chosen, reward, (seed, salt), statistics, answer,
                            stored)


def mixed(correct_PG: np.ndarray, group: int) -> np.ndarray:
  """The chance that `group` samples of a problem are neither all right nor all wrong, [P].

  Unbiased from the G >= group samples, and 1 − p^g − (1 − p)^g in expectation. Only such a group
  gives GRPO a gradient.
  """
  G = correct_PG.shape[1]
  # pass@group of the right samples is the chance of at least one right one; of the wrong samples,
  # of at least one wrong one. Both happen unless the group is constant.
  right_P = np.asarray(correct_PG, np.int64).sum(axis=1)
  return (stats.pass_at_k(G, right_P, group) + stats.pass_at_k(G, G - right_P, group)) - 1


def text(correct_PG: np.ndarray, rollout: Rollout, group: int) -> Iterator[tuple[str, Any]]:
  """Yields (name, value) of a model's own samples.

  `stopped` is the share that ended with a stop token or string. `response_length` is in tokens.
  `repetition` is the mean share of runs of three tokens that a response had before.
  `entropy` is the mean −log p of the samples, in nats a token. `correct` and `mixed_prompts` have a
  value for each prompt.
  """
  yield "pass_rate", float(np.mean(correct_PG))
  mixed_P = mixed(correct_PG, group)
  yield "mixed_groups", float(mixed_P.mean())
  yield "mixed_prompts", mixed_P.tolist()
  yield "correct", np.asarray(correct_PG, int).tolist()
  T = rollout.sampler_logp_BT.shape[1]
  inside_BT = np.arange(T) < rollout.response_length_B[:, None]
  # In float64: a probe has thousands of tokens, and float32 sums of them depend on their order.
  yield "entropy", float(-rollout.sampler_logp_BT[inside_BT].mean(dtype=np.float64))
  yield "response_length", float(rollout.response_length_B.mean())
  repetition_B = [rollouts.repetition(rollout.response(b)) for b in range(len(inside_BT))]
  yield "repetition", float(np.mean(repetition_B))
  yield "stopped", float((rollout.finish_reason_B == rollouts.FINISHED.index("stop")).mean())


def agreement(value_BT: Mapping[str, np.ndarray],
              weight_BT: np.ndarray) -> Iterator[tuple[str, float]]:
  """Yields (name, value): means over response tokens of the fields of `losses.agreement`.

  A gradient becomes its concentration: the share of the summed lengths that the worst 1 % of the
  tokens have.

  Raises:
    FloatingPointError: a value of a response token is not finite.
  """
  inside_BT = np.asarray(weight_BT) > 0
  for name, values in value_BT.items():
    value_N = np.asarray(values, np.float64)[inside_BT]
    if not np.isfinite(value_N).all():
      raise FloatingPointError(f"{name} of a token is not finite: look for NaN or infinite numbers "
                               "in the weights of both models.")
    if name.endswith("_gradient"):
      worst = np.sort(value_N)[::-1][: max(1, round(len(value_N) / 100))]
      # The floor keeps a model that equals its teacher, whose gradients are all 0, from 0 / 0.
      yield f"{name}_worst", float(worst.sum() / max(value_N.sum(), 1e-30))
    else:
      yield name, float(value_N.mean())


def sampled_tokens(rank_BT: np.ndarray, delta_logp_BT: np.ndarray, batch: rollouts.Batch,
                   rollout: Rollout, k: int) -> Iterator[tuple[str, float]]:
  """Yields (name, value) of the tokens that a model sampled, as its teacher sees them.

  `teacher_rank` is the median place of a token by the teacher's probability, 1 the likeliest, and
  `teacher_rank_in_top_k` the share of places up to k. `delta_logp_repeated` and `delta_logp_other`
  are means of teacher − student log-probability, in nats: of tokens that end a run of three which
  the response had before, and of all others. Of no such token there is no mean.

  Args:
    rank_BT, delta_logp_BT: as `losses.agreement` returns them for the batch of the rollout.
  """
  inside_BT = batch.sequence_BT >= 0
  repeated_BT = np.zeros(inside_BT.shape, bool)
  for b, inside_T in enumerate(inside_BT):
    repeated_BT[b, inside_T] = rollouts.repeated(rollout.response(b))
  rank_N = np.asarray(rank_BT)[inside_BT]
  yield "teacher_rank", float(np.median(rank_N))
  yield "teacher_rank_in_top_k", float((rank_N <= k).mean())
  for name, which_BT in (("repeated", repeated_BT), ("other", inside_BT & ~repeated_BT)):
    if which_BT.any():
      yield f"delta_logp_{name}", float(np.asarray(delta_logp_BT, np.float64)[which_BT].mean())


def estimates(name: str, evaluate: Callable[[Params], Evaluation],
              params: Params) -> Iterator[tuple[str, float]]:
  """Yields (metric, value) of an evaluation between steps: ("validation/avg@4", 0.5)."""
  for score, interval in evaluate(params).scores.items():
    yield f"{name}/{score}", interval.estimate
