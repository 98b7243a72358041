"""Sampled rows: their inputs, their ends, and log-probabilities equal to the trainer's."""

import types
import weakref

import jax
import numpy as np
import pytest

from s2d_jax import hosts, metrics, models, objectives, rollouts, sharding, training
from s2d_jax.models import caches
from s2d_jax.sampler import Sampler, SamplerConfig, Sampling, capacity, decode, memory, stop_strings
from s2d_jax.sampler.sampler import check_prompts

G, T, WINDOW, SIZE, SEED = 4, 8, 6, 4, (0, 11)
STOPS = (3, 5)
SAMPLING = Sampling(samples_per_prompt=G, temperature=0.9, top_p=0.95, top_k=12, min_p=0.01,
                    max_tokens=T, min_tokens=2, stop_ids=STOPS)


# Bytes of a row's cache: two layers, keys and values, two heads of eight, four bytes. Of a prompt
# that is read: the same of its window, and its scores for four query heads.
TOKEN = 2 * 2 * 2 * 8 * 4
ROW, READ = TOKEN * (WINDOW + T), TOKEN * WINDOW + 4 * 4 * WINDOW * WINDOW


def prompts(count):
  """Prompts of 1 to 6 tokens, whose ids are not their indices."""
  rng = np.random.default_rng(3)
  return [rollouts.Prompt(1000 - 7 * i, tuple(rng.integers(0, 16, 1 + i % WINDOW).tolist()))
          for i in range(count)]


@pytest.fixture(scope="module")
def ten_prompts(tiny):
  """(sampler, params, rows, number of programs compiled by the call): ten prompts, four a batch."""
  model, params = tiny("qwen3")
  sampler = Sampler(model, SAMPLING, SIZE, WINDOW)
  with metrics.compilations() as compiled:
    rows = sampled(sampler, params, prompts(10), SEED, weight_version=5)
    count = compiled().count
  return sampler, params, rows, count


def sampled(sampler, *args, **fields):
  """The Rollout of a call."""
  return sampler(*args, **fields)[0]


def once(model, params, prompts, sampling):
  """The Rollout of the prompts, by a sampler of their width."""
  width = max(len(prompt.tokens) for prompt in prompts)
  return sampled(Sampler(model, sampling, len(prompts), width), params, prompts, SEED)


def assert_equal(got, want, atol=1e-5):
  """Checks equal tokens, and log-probabilities up to the order of float32 sums."""
  for field in ("prompt_id_B", "sample_index_B", "response_BT", "response_length_B",
                "finish_reason_B"):
    np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
  for field in ("sampler_logp_BT", "behaviour_logp_BT"):
    np.testing.assert_allclose(getattr(got, field), getattr(want, field), atol=atol, err_msg=field)


@pytest.mark.medium
def test_rows_are_the_samples_of_each_prompt_in_order(ten_prompts):
  _, _, rows, _ = ten_prompts
  want = prompts(10)  # the third call has two prompts: its padding is not among the rows
  np.testing.assert_array_equal(rows.prompt_id_B, np.repeat([p.id for p in want], G))
  np.testing.assert_array_equal(rows.sample_index_B, np.tile(range(G), 10))
  assert rows.response_BT.shape == (40, T) and rows.weight_version == 5
  for b, prompt in enumerate(np.repeat(np.arange(10), G)):
    tokens = rows.prompt_BT[b, : rows.prompt_length_B[b]]
    np.testing.assert_array_equal(tokens, want[prompt].tokens)
  assert len({tuple(row) for row in rows.response_BT.tolist()}) > 30


@pytest.mark.medium
def test_a_row_ends_at_its_stop_or_at_max_tokens(ten_prompts):
  _, _, rows, _ = ten_prompts
  for b in range(40):
    response, stopped = rows.response(b), rollouts.FINISHED[rows.finish_reason_B[b]] == "stop"
    n = len(response)
    assert not np.isin(response[:-1], STOPS).any()
    assert (response[-1] in STOPS) == stopped
    assert SAMPLING.min_tokens < n <= T if stopped else n == T
    assert not rows.response_BT[b, n:].any() and not rows.sampler_logp_BT[b, n:].any()
    assert (rows.sampler_logp_BT[b, :n] < 0).all()
  assert {0, 1} == set(rows.finish_reason_B)
  assert rows.response_length_B.min() == SAMPLING.min_tokens + 1


@pytest.mark.medium
def test_a_row_does_not_depend_on_other_rows_or_their_order(ten_prompts):
  sampler, params, rows, _ = ten_prompts
  some = prompts(10)[2:8]
  for order in ([3], [5, 0, 4, 2, 1, 3]):
    want = np.concatenate([np.arange(G) + (2 + i) * G for i in order])
    got = sampled(sampler, params, [some[i] for i in order], SEED)
    assert_equal(got, rollouts.take(rows, want))
  other = sampled(sampler, params, some, (0, 12))
  assert (other.response_BT != rows.response_BT[2 * G: 8 * G]).mean() > 0.3


@pytest.mark.medium
def test_samples_of_a_prompt_equal_single_samples_in_another_window(ten_prompts, tiny):
  _, params, rows, _ = ten_prompts
  one = SAMPLING._replace(samples_per_prompt=1)
  sampler = Sampler(tiny("qwen3")[0], one, SIZE, WINDOW + 5)
  for g in range(G):
    got = sampled(sampler, params, prompts(10), SEED, first_sample=g)
    assert_equal(got, rollouts.take(rows, np.arange(g, 10 * G, G)))


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_give_the_samples_of_one(shape, ten_prompts, tiny):
  _, params, rows, _ = ten_prompts
  model, _ = tiny("qwen3")
  mesh = sharding.make_mesh(shape)
  with jax.set_mesh(mesh):
    where = sharding.weight_shardings(mesh, models.axes(model.config), models.shapes(model.config))
    placed = jax.tree.map(jax.device_put, jax.device_get(params), where)
    assert_equal(sampled(Sampler(model, SAMPLING, SIZE, WINDOW), placed, prompts(10), SEED), rows)


@pytest.mark.medium
def test_new_weights_compile_nothing(ten_prompts, tiny):
  sampler, params, rows, compiled_at_first = ten_prompts
  model, other = tiny("qwen3", seed=1)
  with metrics.compilations() as compiled:
    again = Sampler(model, SAMPLING, SIZE, WINDOW)
    got = sampled(sampler, other, prompts(10), SEED)
    assert again.programs is sampler.programs and compiled_at_first == compiled().count == 0
  assert (got.response_BT != rows.response_BT).mean() > 0.3
  assert_equal(sampled(again, params, prompts(10), SEED), rows, atol=0)


def trainer_gap(model, params, rows):
  """|trainer's − sampler's| log-probability of every response token, and the trainer's."""
  batch = rollouts.batch(rows)
  hp = types.SimpleNamespace(microbatches=1, block=64)
  score = training.token_logps(model, objectives.logp, hp)
  logp_BT = np.asarray(score(params, jax.device_put(batch))[0])
  response_BT = batch.sequence_BT >= 0
  assert response_BT.sum() == rows.response_length_B.sum()
  return np.abs(logp_BT - batch.sampler_logp_BT)[response_BT], logp_BT[response_BT]


@pytest.mark.medium
def test_log_probabilities_are_the_trainers(ten_prompts, tiny):
  _, params, rows, _ = ten_prompts
  difference, logp = trainer_gap(tiny("qwen3")[0], params, rows)
  assert difference.max() < 1e-5 and logp.std() > 0.3


@pytest.mark.medium
def test_behaviour_log_probabilities_are_of_the_truncated_trainer(ten_prompts, tiny, truncated):
  _, params, rows, _ = ten_prompts
  model, _ = tiny("qwen3")
  for b in range(0, 40, 4):
    length = rows.prompt_length_B[b]
    ids = np.concatenate([rows.prompt_BT[b, :length], rows.response(b)])
    features, _ = model.apply(params, ids[None], np.arange(len(ids))[None],
                              np.ones((1, len(ids)), np.int32))
    logits = np.asarray(features[0] @ model.unembed(params).T, np.float64)[length - 1:]
    for t, token in enumerate(rows.response(b)):
      logits[t, list(STOPS)] = -np.inf if t < SAMPLING.min_tokens else logits[t, list(STOPS)]
      p = truncated(logits[t], temperature=0.9, top_p=0.95, top_k=12, min_p=0.01)
      np.testing.assert_allclose(rows.behaviour_logp_BT[b, t], np.log(p[token]), atol=1e-5)
  assert np.abs(rows.behaviour_logp_BT - rows.sampler_logp_BT).max() > 0.1


@pytest.mark.medium
def test_weights_laid_out_once_give_equal_samples(ten_prompts, tiny):
  sampler, params, rows, _ = ten_prompts
  assert_equal(sampled(sampler, sampler.lay_out(params), prompts(10), SEED), rows, atol=0)


@pytest.mark.medium
def test_hosts_compare_the_sampled_tokens(ten_prompts, tiny, monkeypatch):
  sampler, params, _, _ = ten_prompts
  def compared(params):
    digests = []
    monkeypatch.setattr(hosts, "agree", lambda name, digest, seconds: digests.append(digest))
    sampler(params, prompts(10), SEED)
    return digests
  first, other = compared(params), compared(tiny("qwen3", seed=1)[1])
  assert compared(params) == first and len(set(first)) == len(first) > 4
  assert first[:2] == other[:2] and not set(first[2:]) & set(other[2:])


@pytest.mark.medium
def test_the_cache_of_a_prompt_is_freed_with_its_last_waiting_row(tiny):
  # Seven slots and three prompts at a time, so that one filling reads three times.
  model, params = tiny("qwen3")
  sampler = Sampler(model, SAMPLING._replace(samples_per_prompt=1), 16, WINDOW,
                    SamplerConfig(cache_gib=(7.5 * ROW + 3 * READ) / 2**30))
  assert sampler.programs.shapes.batches[0] == 7 and sampler.programs.shapes.prompts == 3
  compiled, read, alive = sampler.programs, [], []
  def empty_prompts():
    alive.append(sum(ref() is not None for ref in read))
    return compiled.empty_prompts()
  def prefill(*args):
    features, kv = compiled.prefill(*args)
    read.append(weakref.ref(kv.k))
    return features, kv
  sampler.programs = compiled._replace(empty_prompts=empty_prompts, prefill=prefill)
  sampled(sampler, params, prompts(16), SEED)
  assert len(alive) >= 6 and len(read) == 2 * len(alive) and not any(alive)


@pytest.mark.medium
def test_weights_are_laid_out_without_another_rounding(tiny):
  # In bfloat16 the trainer multiplies norms' scales in float32 and matrices in bfloat16.
  model, params = tiny("qwen3", dtype="bfloat16")
  weights = decode.prepare(model, params)
  layers = weights.params["layers"]
  assert len(layers) == 2 and weights.head_DV.dtype == np.dtype("bfloat16")
  for i, layer in enumerate(layers):
    np.testing.assert_array_equal(layer["attn_norm"], params["layers"]["attn_norm"][i])
    np.testing.assert_array_equal(layer["attn"]["q"], np.asarray(params["layers"]["attn"]["q"][i]
                                                                 ).astype("bfloat16"))
  difference, _ = trainer_gap(model, params, once(model, params, prompts(3), SAMPLING))
  assert np.sqrt(np.mean(difference**2)) < 0.03  # sums of bfloat16 products in another order


@pytest.mark.medium
def test_log_probabilities_are_the_trainers_for_llama(tiny):
  model, params = tiny("llama")
  plain = SAMPLING._replace(samples_per_prompt=2, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)
  rows = once(model, params, prompts(3), plain)
  assert len(rows.prompt_id_B) == 6
  difference, logp = trainer_gap(model, params, rows)
  assert difference.max() < 1e-5 and logp.std() > 0.3


@pytest.mark.parametrize("bad, words", [
    ([rollouts.Prompt(1, (2,)), rollouts.Prompt(77, (1,) * 7)], "prompt 77 has 7 tokens .* 6"),
    ([rollouts.Prompt(78, ())], "prompt 78 has no tokens"),
    ([], "no prompts"),
    ([rollouts.Prompt(5, (1,)), rollouts.Prompt(5, (2,))], "two prompts have the id 5")])
def test_prompts_that_cannot_be_sampled_are_refused(bad, words):
  with pytest.raises(ValueError, match=words):
    check_prompts(bad, WINDOW)


@pytest.mark.parametrize("strings, words", [
    (("",), r"stop_strings is \('',\): give a tuple of texts, none of them empty"),
    ("ab", "stop_strings is 'ab': give a tuple"), (("\n",), "this sampler has no tokenizer")])
def test_stop_strings_that_cannot_be_found_are_refused(strings, words, tiny):
  with pytest.raises(ValueError, match=words):
    Sampler(tiny("qwen3")[0], SAMPLING._replace(stop_strings=strings), SIZE, WINDOW)


@pytest.mark.parametrize("change, words", [
    (lambda x: x.astype("bfloat16"), r"is bfloat16.* compiled for float32.*: give Sampler"),
    (lambda x: x[..., :1], r"params.* is float32.*: give Sampler")])
def test_weights_of_another_shape_are_refused(change, words, ten_prompts):
  sampler, params, _, _ = ten_prompts
  with pytest.raises(ValueError, match=words):
    sampler(jax.tree.map(change, params), prompts(1), SEED)
  with pytest.raises(ValueError, match="params are not the parameters"):
    sampler({"other": params}, prompts(1), SEED)


@pytest.mark.medium
def test_a_call_refuses_wrong_prompts(ten_prompts):
  sampler, params, _, _ = ten_prompts
  with pytest.raises(ValueError, match="prompt 77 has 7 tokens"):
    sampled(sampler, params, [rollouts.Prompt(77, (1,) * 7)], SEED)
  with pytest.raises(ValueError, match="no prompts"):
    sampler(params, [], SEED)


@pytest.mark.medium
@pytest.mark.parametrize("config", [
    SamplerConfig(tokens=1, chunk=1), SamplerConfig(tokens=3, chunk=4), SamplerConfig(page=2),
    SamplerConfig(cache_gib=(10.5 * ROW + 4 * READ) / 2**30)])
def test_a_row_does_not_depend_on_the_sampler_config(config, ten_prompts, tiny):
  # Tokens of a dispatch, of a prompt read at a time, and memory for ten slots of the sixteen.
  _, params, rows, _ = ten_prompts
  sampler = Sampler(tiny("qwen3")[0], SAMPLING, SIZE, WINDOW, config)
  assert sampler.programs.shapes.batches[0] == (10 if 0 < config.cache_gib < 1 else 16)
  got, stats = sampler(params, prompts(10), SEED)
  assert_equal(got, rows)
  assert stats.tokens == rows.response_length_B.sum()
  assert stats.tokens <= stats.slot_tokens


@pytest.mark.medium
def test_the_statistics_of_a_call(tiny):
  # No stop, so all is known: 10 prompts of one sample, 4 in slots, each of 8 tokens in dispatches
  # of 3. Of the 10, 4 are read at a time.
  model, params = tiny("qwen3")
  free = SAMPLING._replace(samples_per_prompt=1, stop_ids=(), min_tokens=0)
  sampler = Sampler(model, free, SIZE, WINDOW, SamplerConfig(tokens=3))
  _, stats = sampler(params, prompts(10), SEED)
  assert sampler.programs.shapes.batches == (4,) and sampler.programs.shapes.prompts == 4
  assert stats.prefills == 3        # 4, 4 and 2 prompts
  assert stats.dispatches == 9      # 3, 3 and 2 tokens for each 4 rows
  assert stats.tokens == 10 * 8 and stats.slot_tokens == 3 * 4 * 8 and stats.requeued == 0
  # The copy for decoding is float32 here: all weights, and the unembedding of 16 by 16 once more,
  # transposed.
  assert stats.weights_bytes == sum(x.nbytes for x in jax.tree.leaves(params)) + 4 * 16 * 16
  assert stats.weights_seconds > 0


@pytest.mark.medium
def test_a_sampler_of_bfloat16_weights(tiny):
  # A frozen model's weights are stored in the activations' type, so nothing is cast.
  model, params = tiny("qwen3", dtype="bfloat16")
  frozen = jax.tree.map(lambda x, like: x.astype(like.dtype), params,
                        models.frozen_shapes(model.config))
  want = once(model, params, prompts(3), SAMPLING)
  sampler = Sampler(model, SAMPLING, 3, 3, params=frozen)
  assert_equal(sampled(sampler, frozen, prompts(3), SEED), want, atol=0)
  with pytest.raises(ValueError, match="is float32.* compiled for bfloat16"):
    sampler(params, prompts(3), SEED)


class FakePrograms:
  """The sizes of a cache of pages of two tokens, for two slots of one device; runs nothing."""
  config = SamplerConfig(page=2, tokens=2)
  shapes = capacity.Shapes(batches=(2,), lengths=(16,), window=6, chunk=6, prompts=2, shards=1,
                           pages=12, table=8)

  def empty(self):
    return None


def test_samples_of_a_prompt_share_its_full_pages():
  # Five tokens: the last is read by decoding, so two pages are full and none is partial. Six: the
  # fifth is in a page of its own, which each sample copies.
  for count, partial in ((5, 0), (6, 1)):
    pages = memory.CachePages(FakePrograms(), max_tokens=8)
    prompt = rollouts.Prompt(7, (1,) * count)
    assert pages.reserve(0, prompt, source=1) and pages.reserve(1, prompt, source=1)
    first, second = pages.pages
    assert len(first) == 2 + partial and first[:2] == second[:2]
    assert set(first[2:]).isdisjoint(second[2:])
    # Of the cache of prompts, row 1 begins at page 3. The shared pages are copied once.
    sources, targets = pages.sources(np.zeros(2, np.int32), np.ones(2, bool))
    copied = [(s, t) for s, t in zip(sources.tolist(), targets.tolist(), strict=True) if t < 12]
    assert copied == [(3, first[0]), (4, first[1])] + [
        (5, page) for page in (*first[2:], *second[2:])]
    # A shared page is free only when both samples have ended.
    pages.release(0)
    assert not set(first[:2]) & set(pages.free[0]) and set(first[2:]) <= set(pages.free[0])
    pages.release(1)
    assert sorted(pages.free[0]) == list(range(1, 12))


@pytest.mark.medium
def test_the_cache_grows_with_the_longest_row(tiny):
  # No stop: every row has 150 tokens, past the 80 that the first cache holds.
  model, params = tiny("qwen3")
  long = SAMPLING._replace(max_tokens=150, stop_ids=(), min_tokens=0)
  before, capacity.LEAST_LENGTH = capacity.LEAST_LENGTH, 64
  try:
    sampler = Sampler(model, long, 2, WINDOW)
  finally:
    capacity.LEAST_LENGTH = before
  assert sampler.programs.shapes.lengths == (80, 156)
  # 8 slots and 20 rows. The cache is short again for the second 8 rows, while the last 4 wait;
  # for those it stays long, because then no row waits.
  shorten, calls = sampler.programs.shorten[156], []
  sampler.programs = sampler.programs._replace(
      shorten={156: lambda layer: calls.append(1) or shorten(layer)})
  rows = sampled(sampler, params, prompts(5), SEED)
  assert len(calls) == 2  # once, each of two layers
  difference, _ = trainer_gap(model, params, rows)
  assert difference.size == 5 * G * 150 and difference.max() < 1e-5


@pytest.mark.medium
def test_on_finish_gets_each_row_as_it_ends(ten_prompts):
  # All of them once, whole; and some before the last one is there.
  sampler, params, rows, _ = ten_prompts
  finished, waiting = [], []
  def on_finish(index, so_far):
    np.testing.assert_array_equal(so_far.response(index), rows.response(index))
    finished.append(index)
    waiting.append(int((so_far.response_length_B == 0).sum()))
  sampler(params, prompts(10), SEED, on_finish=on_finish)
  assert sorted(finished) == list(range(40)) and waiting[0] > 0 and waiting[-1] == 0


def cut(ids, start=0, min_tokens=0, strings=("bc",), text="".join):
  """Where a StopDetector ends a response whose ids are letters."""
  return stop_strings.StopDetector(strings, min_tokens, text).cut(list(ids), start)


@pytest.mark.parametrize("ids, arguments, want", [
    ("abcd", {}, 3), ("abd", {}, None), ("bcbc", {"min_tokens": 2}, 4),
    ("bcxxx", {"min_tokens": 2}, None), ("bcxxx", {"min_tokens": 1}, 2), ("abc", {"start": 2}, 3),
    ("xyzbc", {"strings": ("zz", "yz")}, 3), (["a", "xb", "cy", "z"], {}, 3),
    (["abcabc"], {}, 1), ("ab", {"min_tokens": 2}, None),
    # Occurrences that begin inside the one before, which is complete by min_tokens.
    ("aaaa", {"strings": ("aa",), "min_tokens": 2}, 3),
    ("xababab", {"strings": ("abab",), "min_tokens": 5}, 7)])
def test_the_token_at_which_a_stop_string_ends_a_response(ids, arguments, want):
  # With the token that completes it, however split; what was complete by min_tokens is not it.
  assert cut(ids, **arguments) == want


@pytest.mark.parametrize("ids, start, want", [
    (["a"] * 50 + ["b"] + [""] * 40 + ["c"], 91, 92), (["a"] * 50 + ["b", "x", "c"], 52, None),
    (["b", "c"] + ["a"] * 60, 60, None), (["a"] * 60 + ["b", "c"] + ["a"] * 9, 60, 62)])
def test_only_new_text_is_searched_for_a_stop_string(ids, start, want):
  # A stop string that is complete before `start` does not count, and is not searched for again.
  assert cut(ids, start=start) == want


def test_a_stop_string_behind_a_split_character_is_found():
  # A tokenizer of bytes that reads a run of them whole or not at all; `start` is in a character.
  def text(ids):
    try:
      return b"".join(ids).decode()
    except UnicodeDecodeError:
      return "\ufffd" * len(ids)
  ids = [bytes([x]) for x in ("aaa" + "\U0001f600" * 6 + "bc").encode()]
  assert cut(ids, start=len(ids) - 4, text=text) == len(ids)


def test_only_the_end_of_a_long_response_is_decoded():
  read = []
  def text(ids):
    read.append(len(ids))
    return "".join(ids)
  assert cut(["a"] * 10_000, start=9_990, text=text) is None
  assert sum(read) < 100


@pytest.mark.medium
def test_a_stop_string_may_be_split_over_tokens(ten_prompts, tiny):
  # Ids are letters, so a string of two letters is split over two tokens wherever it stands.
  _, params, _, _ = ten_prompts
  def text(ids):
    return "".join(chr(97 + int(i)) for i in ids)
  model, free = tiny("qwen3")[0], SAMPLING._replace(stop_ids=(), max_tokens=20, min_tokens=0)
  rows = sampled(Sampler(model, free, SIZE, WINDOW), params, prompts(10), SEED)
  whole = [text(rows.response(b)) for b in range(40)]
  stop = max((w[i: i + 2] for w in whole for i in range(2, 10)),
             key=lambda s: sum(s in w for w in whole))
  some = free._replace(stop_strings=(stop, "zz"))
  got = sampled(Sampler(model, some, SIZE, WINDOW, SamplerConfig(tokens=3), text),
                params, prompts(10), SEED)
  for b, full in enumerate(whole):
    end = full.find(stop) + 2 if stop in full else 20
    assert text(got.response(b)) == full[:end]
    assert rollouts.FINISHED[got.finish_reason_B[b]] == ("stop" if stop in full else "length")
    np.testing.assert_allclose(got.sampler_logp_BT[b, :end], rows.sampler_logp_BT[b, :end],
                               atol=1e-5)
    assert not got.sampler_logp_BT[b, end:].any() and not got.behaviour_logp_BT[b, end:].any()
  assert sum(stop in full[:18] for full in whole) > 3


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 2), (2, 2, 2)])
def test_rows_in_pages_equal_rows_in_slots(shape, tiny):
  # Memory for one and a half rows a device, so that rows enter late, and some wait again; prompts
  # of up to three pages, shared by their samples.
  model, params = tiny("qwen3")
  long = SAMPLING._replace(max_tokens=40, stop_ids=(3,))
  want = sampled(Sampler(model, long, SIZE, WINDOW), params, prompts(10), SEED)
  one = TOKEN * (WINDOW + 40)
  mesh = sharding.make_mesh(shape)
  with jax.set_mesh(mesh):
    where = sharding.weight_shardings(mesh, models.axes(model.config), models.shapes(model.config))
    placed = jax.tree.map(jax.device_put, jax.device_get(params), where)
    sampler = Sampler(model, long, SIZE, WINDOW, SamplerConfig(
        page=2, tokens=5, cache_gib=1.5 * one / shape[2] / 2**30))
    got, stats = sampler(placed, prompts(10), SEED)
  assert_equal(got, want)
  assert sampler.programs.shapes.batches[0] == 2 * shape[0] * shape[1]
  assert stats.tokens == want.response_length_B.sum()
  assert stats.requeued > 0


@pytest.mark.parametrize("platform, weights, largest, shards, want", [
    ("cpu", 10**7, 64, 1, (64, 48, 32, 24, 16, 12, 8, 4)), ("cpu", 10**7, 10, 1, (10, 5)),
    ("cpu", 10**7, 3, 1, (3,)), ("cpu", 10**7, 64, 8, (64, 48, 32, 24, 16, 8)),
    ("cpu", 10**6, 64, 1, (64, 32, 16, 8)), ("tpu", 10**9, 64, 1, (64, 32, 16, 8)),
    ("gpu", 10**9, 512, 4, (512, 256, 128, 64)), ("gpu", 10**9, 8, 1, (8,)),
    ("gpu", 10**9, 40, 1, (40, 24, 16, 8)), ("tpu", 10**9, 48, 2, (48, 32, 16))])
def test_batches_that_decoding_is_compiled_for(platform, weights, largest, shards, want,
                                               monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  assert capacity.batch_sizes(largest, shards, weights) == want


@pytest.mark.parametrize("platform, rows, fit, want", [
    ("gpu", 256, 189, 184), ("tpu", 256, 189, 184), ("cpu", 256, 189, 189),  # too little memory
    ("gpu", 189, 200, 192), ("gpu", 189, 190, 190), ("cpu", 189, 200, 189),  # enough
    ("gpu", 1, 100, 1), ("gpu", 8, 100, 8), ("gpu", 256, 7, 7), ("gpu", 64, 64, 64)])
def test_slots_of_an_accelerator_are_a_multiple_of_eight(platform, rows, fit, want, tiny,
                                                         monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  config = SamplerConfig(cache_gib=(fit + 0.5) * ROW / 2**30)
  assert capacity.slots_for(tiny("qwen3")[0].config, config, rows, WINDOW + T, 0) == want


# Qwen3-1.7B in bfloat16: 28 layers, 7 s a program. A token's cache has 2 * 28 * 8 * 128 * 2 =
# 114,688 bytes, a row's logits 16 * 151,936. A step reads 24.5 MB a row at 192 tokens and 120 MB
# at 1,024; weights take 1.13 ms, a row's products 4.25 µs and its logits 0.81.
@pytest.mark.parametrize("platform, dtype, max_tokens, batches, lengths, window, want", [
    # 32 rows less save 0.40 ms in 64 steps of each of 100 calls, 2.5 s.
    ("tpu", "bfloat16", 128, (64, 32, 16, 8), (192,), 64, ((64,), (192,))),
    # 1.41 ms in 256 steps, 36 s; 0.71 ms in 128, 9 s; 0.35 ms in 64, 2.3 s. No row begins shorter.
    ("tpu", "bfloat16", 512, (64, 32, 16, 8), (512, 1024), 512, ((64, 32, 16), (1024,))),
    # 9,728 tokens less of 16 rows save 5.9 ms in 6,656 steps, and 4,864 half that in 1,792.
    ("tpu", "bfloat16", 16_384, (16, 8), (4864, 9728, 19_456), 3072,
     ((16, 8), (4864, 9728, 19_456))),
    # cuDNN stops at each row's end, so that ended rows cost 5.1 µs: 32 of them 4.1 s.
    ("gpu", "bfloat16", 512, (64, 32, 16, 8), (256, 512, 1024), 128, ((64,), (1024,))),
    ("gpu", "bfloat16", 16_384, (16, 8), (4864, 9728, 19_456), 3072, ((16,), (19_456,))),
    # 8 rows less take 40 µs in 10,923 steps, 44 s, but 3 % of a step.
    ("gpu", "bfloat16", 16_384, (24, 16, 8), (19_456,), 3072, ((24,), (19_456,))),
    # 128 rows less save 0.65 ms of 2.4 in 192 steps, 12 s; 64 less 0.32 in 96, 3.1 s.
    ("gpu", "bfloat16", 384, (256, 128, 64, 32), (128, 256, 512), 128, ((256, 128), (512,))),
    # 512 rows less save 2.6 ms in 256 steps, 256 less 1.3 in 128, 128 less 0.65 in 64.
    ("gpu", "bfloat16", 512, (1024, 512, 256, 128), (1024,), 512, ((1024, 512, 256), (1024,))),
    # In float32 another kernel reads the cache to its end, of twice the bytes.
    ("gpu", "float32", 512, (64, 32, 16, 8), (512, 1024), 512, ((64, 32, 16), (1024,)))])
def test_an_accelerator_has_programs_for_the_sizes_that_pay(
    platform, dtype, max_tokens, batches, lengths, window, want, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  config = models.get("qwen3-1.7b", dtype=dtype).config
  shapes = capacity.Shapes(batches, lengths, window, 64, prompts=8, shards=1, pages=0, table=0)
  found = capacity.accelerator_sizes(config, Sampling(max_tokens), dtype, 1_700_000_000, shapes)
  assert (found.batches, found.lengths) == want
  assert found._replace(batches=batches, lengths=lengths) == shapes


# A row's products take 21.6 µs on a v5e and 4.6 on a v6e, its logits 3.3 and 1.6, 192 tokens of its
# cache 29.9 and 14.9. Programs take 7 s to compile.
@pytest.mark.parametrize("kind, batches", [
    ("TPU v5 lite", (64, 32)),  # 32 rows less save 1.8 ms of 8.1 in 64 steps of 100 calls, 11 s
    ("TPU v6 lite", (64,)),     # 0.68 ms, 4.3 s
])
def test_the_sizes_that_pay_depend_on_the_chips_rates(kind, batches, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  monkeypatch.setattr(sharding, "device_kind", lambda: kind)
  config = models.get("qwen3-1.7b", dtype="bfloat16").config
  shapes = capacity.Shapes((64, 32, 16, 8), (192,), 64, 64, prompts=8, shards=1, pages=0, table=0)
  found = capacity.accelerator_sizes(config, Sampling(128), "bfloat16", 1_700_000_000, shapes)
  assert found.batches == batches


@pytest.mark.medium
def test_stopped_rows_may_read_one_slot_and_change_no_other_row(ten_prompts, tiny, monkeypatch):
  _, params, rows, _ = ten_prompts
  monkeypatch.setattr(capacity, "stops_at_rows", lambda *_: True)
  sampler = Sampler(tiny("qwen3")[0], SAMPLING, SIZE, WINDOW, SamplerConfig(tokens=29))
  assert_equal(sampled(sampler, params, prompts(10), SEED), rows)


# Bytes of the tiny model: of a layer q and o 2 * 16 * 32, k and v 2 * 16 * 16, norms of 16, 16, 8
# and 8, the MLP's 3 * 16 * 24; then the last norm, the embedding and the head. Decoding has the
# head a second time.
WEIGHTS = 4 * (2 * (1024 + 512 + 48 + 1152) + 16 + 2 * 256)
COPY = WEIGHTS + 4 * 256


@pytest.mark.medium
def test_the_cache_has_the_memory_that_is_left(ten_prompts, tiny, monkeypatch):
  # Of 100 GiB a tenth stays free.
  assert capacity.available_bytes(100 * 2**30, 30 * 2**30) == 60 * 2**30
  assert capacity.available_bytes(16 * 2**30, 15 * 2**30) == 0
  # For seven rows and four prompts being read, beside the weights and their copy for decoding.
  model = tiny("qwen3")[0]
  _, params, rows, _ = ten_prompts
  # A change of size holds one of two layers twice.
  cache = 7.5 * 1.5 * ROW + 4 * READ
  memory = int((cache + WEIGHTS + COPY) / 0.9) + 16
  monkeypatch.setattr(hosts, "device_memory", lambda: memory)
  sampler = Sampler(model, SAMPLING, SIZE, WINDOW)
  assert sampler.programs.shapes.batches[0] == 7 and sampler.programs.shapes.prompts == 4
  # Started again on the same device it has the same shapes; samples do not depend on them.
  assert Sampler(model, SAMPLING, SIZE, WINDOW).programs is sampler.programs
  assert_equal(sampled(sampler, params, prompts(10), SEED), rows)
  # A number is taken as it is.
  one = Sampler(model, SAMPLING, SIZE, WINDOW, SamplerConfig(cache_gib=(1.5 * ROW + READ) / 2**30))
  assert one.programs.shapes.batches == (1,)
  monkeypatch.setattr(hosts, "device_memory", lambda: WEIGHTS + COPY)
  taken = (f"{WEIGHTS / 2**30:.3g} GiB of models, {COPY / 2**30:.3g} GiB of weights copied for "
           "decoding and the 10% of its memory that stay free")
  with pytest.raises(ValueError, match=f"cache_gib is 0 and a device has 0 GiB left beside {taken}"
                                       ", and one row of "
                                       "14 .* choose a number, use more devices, or lower max_tok"):
    Sampler(model, SAMPLING, SIZE, WINDOW)


def test_the_memory_that_is_left_holds_a_layer_twice(tiny):
  # 24 of 40 rows and ten prompts fit. A change of size holds one of the two layers twice, so each
  # row needs half as much again, and 16 fit.
  model = tiny("qwen3")[0]
  config = SamplerConfig(available=int(24.5 * ROW + 10 * READ))
  found = capacity.shapes(model.config, SAMPLING, config, 40, WINDOW)
  assert (found.batches, found.prompts) == ((16, 8), 10)
  # A number is taken as it is.
  config = SamplerConfig(cache_gib=(24.5 * ROW + 10 * READ) / 2**30)
  found = capacity.shapes(model.config, SAMPLING, config, 40, WINDOW)
  assert (found.batches, found.prompts) == ((24, 12), 10)
  # A row of which one layer cannot be held twice is refused.
  longer = SAMPLING._replace(max_tokens=SAMPLING.max_tokens + 304)
  row = ROW * (14 + 304) // 14
  found = capacity.shapes(model.config, longer, SamplerConfig(available=int(1.9 * row)), 40, WINDOW)
  assert (found.batches, found.lengths) == ((1,), (160, 318))
  with pytest.raises(capacity.Unfit, match="cache_gib is 0 and a device has"):
    capacity.shapes(model.config, longer, SamplerConfig(available=int(1.4 * row)), 40, WINDOW)


def test_a_change_of_layers_holds_one_twice():
  # Arrays that are still referred to would be in memory beside their copies.
  class Layers(memory.SlotMemory):
    def __init__(self, slots):
      self.slots = slots

  cache = tuple(caches.KV(np.full(3, i), np.full(3, -i)) for i in range(4))
  held = [weakref.ref(layer.k) for layer in cache]
  slots = Layers(decode.Slots(cache, *[np.zeros(3)] * 4))
  del cache
  alive = []
  def change(index, layer):
    alive.append(sum(ref() is not None for ref in held))
    assert layer.k[0] == index
    return caches.KV(layer.k + 10, layer.v)
  slots.change_layers(change)
  assert alive == [4, 3, 2, 1]
  assert [layer.k[0] for layer in slots.slots.cache] == [10, 11, 12, 13]


@pytest.mark.medium
def test_fine_batches_give_the_same_samples(ten_prompts, tiny, monkeypatch):
  _, params, rows, _ = ten_prompts
  monkeypatch.setattr(capacity, "FINE_WEIGHTS", 0)
  sampler = Sampler(tiny("qwen3")[0], SAMPLING, SIZE, WINDOW, SamplerConfig(tokens=31))
  assert sampler.programs.shapes.batches == (16, 12, 8, 4)
  assert_equal(sampled(sampler, params, prompts(10), SEED), rows)


@pytest.mark.medium
def test_the_number_of_slots_follows_from_the_memory(tiny):
  model, params = tiny("qwen3")
  for fit, read in ((1, 1), (7, 3)):  # a quarter of the memory at most is for prompts
    sampler = Sampler(model, SAMPLING, SIZE, WINDOW,
                        SamplerConfig(cache_gib=((fit + 0.5) * ROW + read * READ) / 2**30))
    assert sampler.programs.shapes.batches[0] == fit and sampler.programs.shapes.prompts == read
    cache = jax.tree.leaves(sampler.programs.slots[fit, WINDOW + T].cache)
    assert sum(x.size * x.dtype.itemsize for x in cache) == fit * ROW
  with pytest.raises(ValueError, match="cache_gib is 1e-09, and one row of 14 tokens and"):
    Sampler(model, SAMPLING, SIZE, WINDOW, SamplerConfig(cache_gib=1e-9))
  mesh = sharding.make_mesh((8, 1, 1))  # seven rows are eight slots, one a device
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, sharding.replicated(mesh))
    seven = SAMPLING._replace(samples_per_prompt=7)
    sampler = Sampler(model, seven, 1, WINDOW)
    assert_equal(sampled(sampler, placed, prompts(1), SEED), once(model, placed, prompts(1), seven))
  assert sampler.programs.shapes.batches == (8,)
  keys = sampler.programs.slots[8, WINDOW + T].cache[0].k
  assert keys.sharding.shard_shape(keys.shape)[0] == 1


@pytest.mark.medium
def test_an_int8_cache_is_close_to_the_trainer(ten_prompts, tiny):
  # A quarter of the bytes and four more for a scale; its log-probabilities are near the trainer's.
  _, params, _, _ = ten_prompts
  model = tiny("qwen3")[0]
  sampler = Sampler(model, SAMPLING, SIZE, WINDOW, SamplerConfig(cache="int8"))
  difference, _ = trainer_gap(model, params, sampled(sampler, params, prompts(10), SEED))
  assert 1e-5 < np.sqrt(np.mean(difference**2)) < 0.1
  assert capacity.slot_bytes(model.config, 10, np.int8) == 2 * 2 * 2 * 10 * (8 + 4)


@pytest.mark.parametrize("config, words", [
    (SamplerConfig(tokens=0), "tokens is 0: set it to .* at least 1"),
    (SamplerConfig(page=-4), "page is -4: choose 0 .no pages. or more"),
    (SamplerConfig(cache_gib=-1.0), "above 0, or 0 for what the device has left"),
    (SamplerConfig(page=4, cache="int8"), "page is 4 and the cache int8, which pages do not hold"),
    (SamplerConfig(cache="int4"), "cache is 'int4': choose it from auto, float32, bfloat16, int8")])
def test_a_config_out_of_range_is_refused(config, words, tiny):
  with pytest.raises(ValueError, match=words):
    Sampler(tiny("qwen3")[0], SAMPLING, SIZE, WINDOW, config)


@pytest.mark.parametrize("field, value, words", [
    ("temperature", -1.0, "^temperature is -1.0: choose 0"),
    ("temperature", float("nan"), "^temperature is nan: choose 0"),
    ("top_p", 2.0, "^top_p is 2.0: choose"), ("max_tokens", 0, "^max_tokens is 0: set it"),
    ("min_tokens", T + 1, "^min_tokens is 9: choose at most max_tokens, 8")])
def test_a_sampling_out_of_range_is_refused(field, value, words, tiny):
  with pytest.raises(ValueError, match=words):
    Sampler(tiny("qwen3")[0], SAMPLING._replace(**{field: value}), SIZE, WINDOW)
