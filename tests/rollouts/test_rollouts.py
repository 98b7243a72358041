"""The shift of targets, the weights, packing, and the store of frozen rollouts."""

import io
import types
from concurrent import futures

import numpy as np
import pytest

from s2d_jax import evals, prefixes, rollouts
from s2d_jax.errors import InputError


def two_rows():
  """Prompts 5 6 7 and 8; responses 1 2 and 3 4 9, the widths 4 and 3."""
  return rollouts.Rollout(
      prompt_id_B=np.array([10, 20], np.int64), sample_index_B=np.zeros(2, np.int32),
      prompt_BT=np.array([[5, 6, 7, 0], [8, 0, 0, 0]], np.int32),
      prompt_length_B=np.array([3, 1], np.int32),
      response_BT=np.array([[1, 2, 0], [3, 4, 9]], np.int32),
      response_length_B=np.array([2, 3], np.int32),
      sampler_logp_BT=np.array([[-.1, -.2, 0], [-.3, -.4, -.5]], np.float32),
      behaviour_logp_BT=np.array([[-.01, -.02, 0], [-.03, -.04, -.05]], np.float32),
      finish_reason_B=np.array([1, 0], np.int32), weight_version=7)


def test_targets_are_inputs_shifted_by_one():
  got = rollouts.batch(two_rows(), "token", advantage_B=np.array([2., -1.], np.float32))
  # Row 0 is 5 6 7 1 2: having read 5, predict 6; the first response token, 1, is predicted at 2.
  np.testing.assert_array_equal(got.inputs_BT, [[5, 6, 7, 1, 0, 0], [8, 3, 4, 0, 0, 0]])
  np.testing.assert_array_equal(got.targets_BT, [[6, 7, 1, 2, 0, 0], [3, 4, 9, 0, 0, 0]])
  np.testing.assert_array_equal(got.positions_BT, [[0, 1, 2, 3, 0, 0], [0, 1, 2, 0, 0, 0]])
  np.testing.assert_array_equal(got.segments_BT, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(got.weight_BT, [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(got.advantage_BT, [[0, 0, 2, 2, 0, 0], [-1, -1, -1, 0, 0, 0]])
  np.testing.assert_array_equal(got.sequence_BT, [[-1, -1, 0, 0, -1, -1], [1, 1, 1, -1, -1, -1]])
  np.testing.assert_allclose(got.sampler_logp_BT,
                             [[0, 0, -.1, -.2, 0, 0], [-.3, -.4, -.5, 0, 0, 0]])
  np.testing.assert_allclose(got.behaviour_logp_BT, got.sampler_logp_BT / 10)


def test_constant_mean_gives_tokens_one_weight_and_sequences_a_count_of_one():
  # Responses of up to n tokens: a token has weight 1/n and a sequence counts one (Dr. GRPO).
  rows = two_rows()
  got = rollouts.batch(rows, "constant")
  n = rows.response_BT.shape[1]
  np.testing.assert_allclose(got.weight_BT[got.sequence_BT >= 0], 1 / n, rtol=1e-6)
  np.testing.assert_allclose(got.count_BT.sum(axis=1), [1, 1], rtol=1e-6)
  for mean in ("token", "sequence"):
    batch = rollouts.batch(rows, mean)
    np.testing.assert_array_equal(batch.count_BT, batch.weight_BT)


def test_sequence_mean_and_row_weights():
  got = rollouts.batch(two_rows(), "sequence").weight_BT
  np.testing.assert_allclose(got.sum(axis=1), [1, 1])  # each sequence counts once
  np.testing.assert_allclose(got[0, 2], 1 / 2)
  dropped = rollouts.batch(two_rows(), "token", row_weight_B=np.array([0., 1.], np.float32))
  np.testing.assert_allclose(dropped.weight_BT.sum(axis=1), [0, 3])
  with pytest.raises(ValueError, match="set it to one of"):
    rollouts.batch(two_rows(), "average")


def test_packing_keeps_every_sequence_whole():
  loose = rollouts.batch(two_rows(), "token")
  packed = rollouts.pack(loose, 8)
  # The 4 and the 3 tokens share the first row, longest first; the second row is padding.
  np.testing.assert_array_equal(packed.inputs_BT[0], [5, 6, 7, 1, 8, 3, 4, 0])
  np.testing.assert_array_equal(packed.segments_BT[0], [1, 1, 1, 1, 2, 2, 2, 0])
  np.testing.assert_array_equal(packed.positions_BT[0], [0, 1, 2, 3, 0, 1, 2, 0])
  np.testing.assert_array_equal(packed.segments_BT[1], np.zeros(8))
  assert packed.weight_BT.sum() == loose.weight_BT.sum()
  assert (packed.sequence_BT[1] == -1).all()
  with pytest.raises(ValueError, match="widen the row"):
    rollouts.pack(loose, 3)


def test_minibatches_partition_the_rows_by_seed():
  batch = rollouts.batch(two_rows(), "token")
  parts = list(rollouts.minibatches(batch, 2, (0, 1)))
  again = list(rollouts.minibatches(batch, 2, (0, 1)))
  rows = np.concatenate([p.inputs_BT for p in parts])
  assert sorted(rows.tolist()) == sorted(batch.inputs_BT.tolist())
  np.testing.assert_array_equal(rows, np.concatenate([p.inputs_BT for p in again]))
  def order(seed):
    return tuple(np.concatenate([p.targets_BT[:, 0]
                                 for p in rollouts.minibatches(batch, 2, (seed,))]))
  orders = {order(seed) for seed in range(8)}
  assert len(orders) == 2  # both orders of two rows turn up
  with pytest.raises(ValueError, match="multiple of minibatches"):
    list(rollouts.minibatches(batch, 3, (0,)))


def test_row_keys_differ_by_prompt_sample_and_seed():
  keys = {rollouts.row_key(seed, i, g).tobytes()
          for seed in ((0, 1), (0, 2)) for i in range(3) for g in range(3)}
  assert len(keys) == 18
  # (1, 23) and (12, 3) must not collide by concatenation.
  assert (rollouts.row_key((0,), 1, 23) != rollouts.row_key((0,), 12, 3)).any()


def test_a_rollouts_bytes_are_read_back_and_reproducible():
  rows = two_rows()
  data = rollouts.to_bytes(rows)
  assert data == rollouts.to_bytes(two_rows())
  for a, b in zip(rows, rollouts.from_bytes(data), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_rollout_stored_under_an_old_field_name_is_read():
  out = io.BytesIO()
  fields = two_rows()._asdict()
  np.savez_compressed(out, drawn_logp_BT=fields.pop("behaviour_logp_BT"), **fields)
  for a, b in zip(two_rows(), rollouts.from_bytes(out.getvalue()), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_store_lists_prompts_with_missing_samples(tmp_path):
  prompts = [rollouts.Prompt(10, (5, 6, 7)), rollouts.Prompt(20, (8,))]
  store = rollouts.Store(tmp_path / "r")
  assert store.missing(prompts, range(1)) == prompts
  store.add("stage-00000000", rollouts.take(two_rows(), slice(0, 1)))
  assert store.missing(prompts, range(1)) == prompts[1:]
  store.add("stage-00000001", rollouts.take(two_rows(), slice(1, 2)))
  reopened = rollouts.Store(tmp_path / "r")
  assert reopened.missing(prompts, range(1)) == []
  assert reopened.missing(prompts, range(1, 2)) == prompts  # another sample index
  rows, parts = reopened.get(prompts[::-1], range(1))
  np.testing.assert_array_equal(rows.prompt_id_B, [20, 10])
  np.testing.assert_array_equal(rows.response(0), [3, 4, 9])
  assert parts == ["stage-00000001", "stage-00000000"]


def test_a_store_keeps_a_row_in_its_first_part(tmp_path):
  # Part "b" brings a prompt's sample 0; part "a", whose name sorts first, brings samples 0 and 1.
  prompt = rollouts.Prompt(10, (5, 6, 7))
  both = two_rows()._replace(prompt_id_B=np.array([10, 10], np.int64),
                             sample_index_B=np.array([0, 1], np.int32))
  store = rollouts.Store(tmp_path / "r")
  store.add("b", rollouts.take(both, [0]))
  assert store.missing([prompt], range(2)) == [prompt]
  store.add("a", both)
  for opened in (store, rollouts.Store(tmp_path / "r")):
    rows, parts = opened.get([prompt], range(2))
    assert parts == ["b", "a"]
    np.testing.assert_array_equal(rows.sample_index_B, [0, 1])


def test_a_store_refuses_to_overwrite_a_part(tmp_path):
  store = rollouts.Store(tmp_path / "r")
  store.add("a", rollouts.take(two_rows(), [0]))
  with pytest.raises(ValueError, match="r already holds a, and 1 other rows would replace it"):
    store.add("a", two_rows())
  store.add("a", rollouts.take(two_rows(), [0]))  # brings no new row
  for opened in (store, rollouts.Store(tmp_path / "r")):
    rows, _ = opened.get([rollouts.Prompt(10, (5, 6, 7))], range(1))
    np.testing.assert_array_equal(rows.response(0), [1, 2])


def test_a_gathered_store_has_one_part_and_one_of_each_row(tmp_path):
  store = rollouts.Store(tmp_path / "r")
  store.add("a", rollouts.take(two_rows(), [1]))
  store.add("b", rollouts.take(two_rows(), [0]))
  first_part = (tmp_path / "r" / "a.npz").read_bytes()
  store.gather("all", two_rows())
  assert [path.name for path in (tmp_path / "r").iterdir()] == ["all.npz"]
  # A run that is killed meanwhile leaves a part and the whole.
  (tmp_path / "r" / "a.npz").write_bytes(first_part)
  reopened = rollouts.Store(tmp_path / "r")
  np.testing.assert_array_equal(np.sort(reopened.rows().prompt_id_B), [10, 20])
  reopened.gather("all", two_rows())
  assert [path.name for path in (tmp_path / "r").iterdir()] == ["all.npz"]
  for opened in (store, reopened, rollouts.Store(tmp_path / "r")):
    np.testing.assert_array_equal(opened.rows().prompt_id_B, [10, 20])


def test_given_solutions_as_a_rollout():
  rows = rollouts.given_solutions([rollouts.Prompt(3, (1, 2))], [[7, 8, 9]], 4, 5)
  np.testing.assert_array_equal(rows.prompt_BT, [[1, 2, 0, 0]])
  np.testing.assert_array_equal(rows.response(0), [7, 8, 9])
  assert rollouts.FINISHED[rows.finish_reason_B[0]] == "stop"


def test_statistics_of_several_calls_are_added():
  first = rollouts.SamplerStats(dispatches=2, prefills=1, tokens=30, slot_tokens=40, requeued=1,
                                weights_bytes=100, weights_seconds=0.5)
  second = rollouts.SamplerStats(dispatches=3, prefills=2, tokens=5, slot_tokens=8, requeued=0,
                                 weights_bytes=100, weights_seconds=0.25)
  assert rollouts.add_stats([first, None, second]) == (5, 3, 35, 48, 1, 200, 0.75)
  # A step that sampled nothing has no statistics, which are not those of zero tokens.
  assert rollouts.add_stats([None, None]) is None


WRONG = pytest.mark.parametrize("reward, said", [
    (lambda problem, text: None, " is None on '42': return a finite number."),
    (lambda problem, text: "1", " is '1' on '42': return a finite number."),
    (lambda problem, text: np.ones(2), r" is array\(\[1., 1.\]\) on '42': return a finite number."),
    (lambda problem, text: float("nan"), " is nan on '42': return a finite number."),
    (lambda problem, text: float("inf"), " is inf on '42': return a finite number."),
    (lambda problem, text: problem["key"], r", on '42', failed \(KeyError: 'key'\): mend it.")])


@WRONG
def test_a_reward_that_is_no_number_is_one_sentence_with_the_problem(reward, said):
  with pytest.raises(InputError, match=f"^the task's reward of problem 7{said}$"):
    rollouts.checked_reward(reward, {"id": 7}, "42")


def of_a_pool(reward):
  """The reward of prompt 7's response "42", computed in a thread, as a pool computes it."""
  threads = futures.ThreadPoolExecutor(1)
  return lambda prompt_id, ids: rollouts.checked_reward(
      lambda problem, text: threads.submit(reward, problem, text), {"id": prompt_id}, "42")


def row_of_prompt_7():
  return rollouts.given_solutions([rollouts.Prompt(7, (1, 2))], [[7, 8, 9]], 4, 5)


class GivenRows:
  """A sampler that returns one row of prompt 7, whatever it gets."""
  sampling = types.SimpleNamespace(max_tokens=5, samples_per_prompt=1)

  def __call__(self, params, prompts, seed, on_finish=None):
    rollout = row_of_prompt_7()
    if on_finish is not None:
      on_finish(0, rollout)
    return rollout, None


@WRONG
@pytest.mark.parametrize("use", [
    lambda reward, prompts: rollouts.resolved(reward(7, None)),
    lambda reward, prompts: rollouts.score(reward, row_of_prompt_7()),
    lambda reward, prompts: evals.solve(GivenRows(), None, prompts, reward, (0,)),
    lambda reward, prompts: prefixes.measure(
        GivenRows(), None, prompts, row_of_prompt_7(), reward, None, (0,))],
    ids=["resolved", "score", "evaluation", "prefixes"])
def test_a_pools_reward_that_is_no_number_is_one_sentence_with_the_problem(use, reward, said):
  with pytest.raises(InputError, match=f"^the task's reward of problem 7{said}$"):
    use(of_a_pool(reward), [rollouts.Prompt(7, (1, 2))])


def test_a_pools_reward_is_its_number():
  assert rollouts.resolved(of_a_pool(lambda problem, text: np.float32(0.5))(7, None)) == 0.5


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(1), np.array(1.0), np.int64(1)])
def test_a_reward_may_be_any_kind_of_number(value):
  assert rollouts.checked_reward(lambda problem, text: value, {"id": 7}, "x" * 999) == value
