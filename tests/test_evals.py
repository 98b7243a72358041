"""Scores of problems, with a sampler that returns fixed responses."""

import contextlib
import zlib

import ml_collections
import numpy as np
import pytest

from configs import common
from s2d_jax import evals, keys, rollouts, stats
from s2d_jax.rewards import pool

PROMPTS = [rollouts.Prompt(30, (1, 2)), rollouts.Prompt(20, (3,))]
RESPONSES = [[7], [8, 9], [9, 7, 7], [8], [7, 7], [8, 8]]  # three samples of each


class FixedSampler:
  """A sampler that returns RESPONSES, with 99 behind every end, and records its calls.

  Its rows end in `order`.
  """

  def __init__(self, order=range(6)):
    self.calls, self.order = [], order

  def __call__(self, params, prompts, seed, on_finish=None):
    self.calls.append((params, prompts, seed))
    repeated = [p for p in prompts for _ in range(3)]
    rows = rollouts.given_solutions(repeated, RESPONSES, 2, 4)
    beyond = np.arange(4)[None] >= rows.response_length_B[:, None]
    rows = rows._replace(response_BT=np.where(beyond, 99, rows.response_BT))
    for index in self.order if on_finish is not None else ():
      on_finish(index, rows)
    self.calls.append("drawn")
    return rows, rollouts.SamplerStats()


def reward(prompt_id, ids):
  """Problem 30 is solved by an answer that ends in 7, problem 20 by one that ends in 8."""
  assert 99 not in ids
  return float(ids[-1] == {30: 7, 20: 8}[prompt_id])


def test_solve_by_hand():
  fixed = FixedSampler()
  samples, rows = evals.solve(fixed, "weights", PROMPTS, reward, (4, 2))
  np.testing.assert_array_equal(samples.correct_PG, [[1, 0, 1], [1, 0, 1]])
  assert samples.correct_PG.dtype == np.float32
  np.testing.assert_array_equal(samples.length_PG, [[1, 2, 3], [1, 2, 2]])
  np.testing.assert_array_equal(samples.truncated_PG, np.zeros((2, 3)))
  assert samples.answer_PG is None
  assert fixed.calls == [("weights", PROMPTS, (4, 2)), "drawn"]
  assert [rows.response(b).tolist() for b in range(6)] == RESPONSES


def test_a_row_is_scored_when_it_ends_and_once():
  fixed = FixedSampler(order=(5, 0, 3, 1, 2, 4))
  def telling(prompt_id, ids):
    fixed.calls.append((prompt_id, ids.tolist()))
    return reward(prompt_id, ids)
  samples, _ = evals.solve(fixed, "weights", PROMPTS, telling, (4, 2))
  np.testing.assert_array_equal(samples.correct_PG, [[1, 0, 1], [1, 0, 1]])
  assert fixed.calls[1:] == [(PROMPTS[b // 3].id, RESPONSES[b]) for b in fixed.order] + ["drawn"]


def test_each_process_scores_its_share_of_the_rows(monkeypatch):
  shares, scored = [], []
  # Of three processes: what each adds to the sum, one after the other.
  monkeypatch.setattr(evals.hosts, "sum_over_hosts", lambda own_B: shares.append(own_B) or own_B)
  for process in range(3):
    monkeypatch.setattr(evals.hosts, "share", lambda process=process: (process, 3))
    evals.solve(FixedSampler(), "weights", PROMPTS,
                lambda i, ids: scored.append(ids.tolist()) or reward(i, ids), (4, 2))
  assert scored == [RESPONSES[b] for b in (0, 3, 1, 4, 2, 5)]
  np.testing.assert_array_equal(shares, [[1, 0, 0, 1, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 1]])


def test_a_reward_of_one_or_more_is_right():
  graded = iter([0.0, 0.5, 0.99, 1.0, 2.0, -1.0])
  samples, _ = evals.solve(FixedSampler(), "weights", PROMPTS, lambda i, ids: next(graded), (0,))
  np.testing.assert_array_equal(samples.correct_PG, [[0, 0, 0], [1, 1, 0]])


def test_equal_answers_of_a_problem_have_equal_numbers():
  # The answer is the last token, and 9 stands for no answer. The first problem has 7, –, 7 and the
  # second 8, 7, 8.
  samples, _ = evals.solve(FixedSampler(), "weights", PROMPTS, reward, (0,),
                           lambda ids: None if ids[-1] == 9 else str(ids[-1]))
  np.testing.assert_array_equal(samples.answer_PG, [[0, -1, 0], [0, 1, 0]])


def test_a_response_cut_at_max_tokens_is_truncated():
  class Cut(FixedSampler):
    def __call__(self, *args, **kwargs):
      rows, counts = super().__call__(*args, **kwargs)
      return rows._replace(finish_reason_B=np.array([1, 0, 1, 1, 0, 0], np.int32)), counts
  samples, _ = evals.solve(Cut(), "weights", PROMPTS, reward, (0,))
  np.testing.assert_array_equal(samples.truncated_PG, [[0, 1, 0], [0, 1, 1]])


def scores(correct_PG, ks, seed, draws, level):
  return dict(evals.intervals(ks, seed, draws, level)({"sampled": stats.Samples(correct_PG)}))


def test_scores_by_hand():
  # Of 4 samples 1 and 2 are right: 3/8; of the 6 pairs 3 and 5 hold a right one; all four do.
  correct_PG = np.array([[1, 0, 0, 0], [1, 1, 0, 0]])
  found = scores(correct_PG, (1, 2, 4), seed=0, draws=200, level=0.9)
  assert list(found) == ["avg@4", "pass@1", "pass@2", "pass@4"]
  np.testing.assert_allclose([v.estimate for v in found.values()], [3 / 8, 3 / 8, 2 / 3, 1])
  assert all(v.low <= v.estimate <= v.high for v in found.values())
  assert found["avg@4"].low < 3 / 8 < found["avg@4"].high
  many = np.tile(correct_PG, (8, 1))
  narrow, wider, other = (scores(many, (), seed, 200, level)["avg@4"]
                          for seed, level in ((0, 0.9), (0, 0.99), (1, 0.9)))
  assert wider.low < narrow.low and other != narrow


def test_mixed_groups_by_hand():
  # Of 4 samples 0, 1, 2 and 4 right; of the 6 pairs, 0, 3, 4 and 0 have one of each.
  correct_PG = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
  np.testing.assert_allclose(evals.mixed(correct_PG, 2), [0, 3 / 6, 4 / 6, 0])


def test_mixed_groups_are_unbiased():
  # Over c ~ Binomial(16, p) they average to 1 − p^8 − (1 − p)^8.
  p, rng = 0.15, np.random.default_rng(0)
  value_P = evals.mixed(rng.random((100_000, 16)) < p, 8)
  want, error = 1 - p**8 - (1 - p) ** 8, value_P.std() / np.sqrt(len(value_P))
  assert abs(value_P.mean() - want) < 4 * error


def test_a_models_own_text_by_hand():
  samples, rows = evals.solve(FixedSampler(), "weights", PROMPTS, reward, (0,))
  # Eleven tokens, one of them at -11 nats; beyond each row's end nothing counts.
  logp_BT = np.where(np.arange(4)[None] < rows.response_length_B[:, None], 0.0, -99.0)
  logp_BT[1, 1] = -11
  found = dict(evals.text(samples.correct_PG, rows._replace(sampler_logp_BT=logp_BT), 2))
  assert (found.pop("correct"), found.pop("mixed_prompts")) == (
      [[1, 0, 1], [1, 0, 1]], pytest.approx([2 / 3, 2 / 3]))
  assert found == pytest.approx({"pass_rate": 4 / 6, "mixed_groups": 2 / 3, "stopped": 1.0,
                                 "response_length": 11 / 6, "entropy": 1.0, "repetition": 0})


def test_sampled_tokens_by_hand():
  # The second response ends with its first three tokens again: one token of eight is repeated.
  rows = rollouts.given_solutions(PROMPTS, [[7, 8], [4, 5, 6, 4, 5, 6]], 2, 7)
  batch = rollouts.batch(rows)
  # Row 0: a prompt of two tokens, so targets 1 and 2. Row 1: one token, so targets 0 to 5.
  rank_BT = np.array([[99, 1, 2, 99, 99, 99, 99, 99], [1, 4, 3, 5, 3, 9, 99, 99]], np.float32)
  delta_BT = np.array([[9, 1, 2, 9, 9, 9, 9, 9], [3, 4, 5, 6, 7, -8, 9, 9]], np.float32)
  found = dict(evals.sampled_tokens(rank_BT, delta_BT, batch, rows, 3))
  # Ranks 1 1 2 3 3 4 5 9; the others' differences are 1 to 7.
  assert found == {"teacher_rank": 3, "teacher_rank_in_top_k": 5 / 8, "delta_logp_repeated": -8,
                   "delta_logp_other": 4}
  rows = rollouts.take(rows, [0])
  found = dict(evals.sampled_tokens(rank_BT[:1], delta_BT[:1], rollouts.batch(rows), rows, 3))
  assert found.keys() == {"teacher_rank", "teacher_rank_in_top_k", "delta_logp_other"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["kl", "kl_gradient"])
def test_an_agreement_that_is_not_finite_stops(bad, name):
  values = {"kl": np.ones((1, 3)), "kl_gradient": np.ones((1, 3))}
  weight_BT = np.array([[0.0, 1, 1]])
  values[name][0, 0] = bad  # of the prompt
  assert dict(evals.agreement(values, weight_BT))["kl"] == 1
  values[name][0, 2] = bad
  with pytest.raises(FloatingPointError, match=f"^{name} of a token is not finite: look for NaN"):
    dict(evals.agreement(values, weight_BT))


def test_agreement_by_hand():
  # Two hundred tokens count and the worst two have 90 of 288 of the gradients' length.
  gradient_BT = np.concatenate([np.ones((1, 198)), [[40, 50, 1e6]]], axis=1)
  weight_BT = np.concatenate([np.ones((1, 200)), [[0]]], axis=1)
  value_BT = np.concatenate([np.full((1, 200), 0.25), [[9]]], axis=1)
  found = dict(evals.agreement({"kl": value_BT, "kl_gradient": gradient_BT}, weight_BT))
  assert set(found) == {"kl", "kl_gradient_worst"}
  np.testing.assert_allclose([found["kl"], found["kl_gradient_worst"]], [0.25, 90 / 288])


def test_more_tries_than_samples_are_refused():
  with pytest.raises(ValueError, match="pass@5 needs"):
    scores(np.zeros((2, 4)), (5,), 0, 10, 0.9)


def block(**changes):
  return ml_collections.ConfigDict(common.evaluation(
      split="validation", sampling=common.sampling(samples_per_prompt=3, max_tokens=4)) | changes)


def test_validation_by_hand():
  fixed = FixedSampler()
  compiled = []
  hp = block(statistics="avg,response_length", when="every 2", prompts=5, problems=2)
  evaluate = evals.evaluator(
      hp, lambda *args, **changes: (compiled.append((args, changes)), fixed)[1],
      [*PROMPTS, rollouts.Prompt(10, (4,))], reward, None, 3)
  def validate(params):
    return dict(evals.estimates("validation", evaluate, params))
  # Problems of 6 and 5 tokens. As at the end, a score is the mean over problems of each one's mean:
  # 2 and 5/3, the second rounded. The last bit differs from 11 / 6, which is rounded once.
  assert validate("old") == {"validation/avg@3": np.float32(4 / 6),
                             "validation/response_length": (2 + 5 / 3) / 2}
  assert validate("new") == validate("old")  # always the same draws
  assert [call[0] for call in fixed.calls[::2]] == ["old", "new", "old"]
  assert {call[2] for call in fixed.calls[::2]} == {(3, zlib.crc32(b"validation"))}
  assert compiled == [((hp.sampling, 2), {})]  # two prompts at a time, and no greedy sampler


@pytest.mark.parametrize("G", [1, 2, 4, 8, 16])
def test_a_power_of_two_samples_have_the_mean_over_all_samples(G):
  # A division by a power of two is exact, so the mean of means is rounded once, as the mean is.
  rng = np.random.default_rng(G)
  for _ in range(100):
    correct_PG = rng.integers(2, size=(61, G)).astype(np.float32)
    length_PG = rng.integers(16_385, size=(61, G))
    scores = dict(evals.intervals((), 0, 1, 0.95, ("avg", "response_length"))(
        {"sampled": stats.Samples(correct_PG, length_PG)}))
    assert scores[f"avg@{G}"].estimate == correct_PG.mean()
    assert scores["response_length"].estimate == length_PG.mean()


def test_an_evaluation_at_the_end_samples_greedily_as_well():
  class Greedy(FixedSampler):
    """The first response of each problem."""
    def __call__(self, params, prompts, seed, on_finish):
      rows, counts = super().__call__(params, prompts, seed)
      rows = rollouts.take(rows, [0, 3])
      for index in range(2):
        on_finish(index, rows)
      return rows, counts
  draws = {(): FixedSampler(), ("samples_per_prompt", "temperature"): Greedy()}
  def compiled(sampling, batch, **changes):
    return draws[tuple(changes)]
  found = evals.evaluator(block(ks=(1,), draws=20), compiled, PROMPTS, reward, None, 3)("weights")
  # The first response of each problem is right: greedily both are solved.
  assert {name: value.estimate for name, value in found.scores.items()} == pytest.approx(
      {"greedy": 1, "avg@3": 2 / 3, "pass@1": 2 / 3, "truncated": 0, "response_length": 11 / 6})
  assert {call[2] for fixed in draws.values() for call in fixed.calls[::2]} == {
      (3, zlib.crc32(b"evaluation"))}


def test_a_record_counts_the_checks_without_a_verdict():
  # In this pool each check raises, because json.loads takes one argument.
  with contextlib.closing(pool.Pool("json:loads", 60.0, 60.0, 4 << 30, 1)) as checks:
    found = evals.run({"sampled": FixedSampler()}, "weights", PROMPTS,
                      lambda prompt_id, ids: checks.submit({}, "1"), (0,),
                      evals.intervals((1,), 0, 20, 0.95))
  record = evals.record(found)
  assert (record["check_timeouts"], record["check_failures"]) == (0, 6)
  again = evals.run({"sampled": FixedSampler()}, "weights", PROMPTS, reward, (0,),
                    evals.intervals((1,), 0, 20, 0.95))
  assert evals.record(again)["check_failures"] == 0


def test_an_evaluation_without_any_score_is_refused():
  # maj@1 would be avg, so the least k of maj is 2.
  for ks in ((1,), ()):
    with pytest.raises(ValueError, match=r"statistics is 'maj' and ks .* there is no score"):
      evals.check_evaluation(block(statistics="maj", ks=ks, when="every 5"))
  evals.check_evaluation(block(statistics="maj,truncated", ks=(1,), when="every 5"))
  evals.check_evaluation(block(statistics="maj", ks=(1, 2), when="every 5"))


@pytest.mark.parametrize("when, steps", [("end", 0), ("every 1", 1), ("every 50", 50)])
def test_the_steps_at_which_an_evaluation_runs(when, steps):
  assert evals.every(block(when=when)) == steps


@pytest.mark.parametrize("when", ["", "every", "every 0", "every -1", "each 2", "every 2.5"])
def test_an_invalid_time_of_an_evaluation_is_refused(when):
  with pytest.raises(ValueError, match=f"when is '{when}': choose 'end', or 'every 50'"):
    keys.check_value("when", when, evals.EVALUATION_KEYS["when"])
