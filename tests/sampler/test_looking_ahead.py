"""Dispatches that are launched before the one in front of them is read."""

import itertools
import types

import jax
import numpy as np
import pytest

from s2d_jax import hosts, models, rollouts, sharding
from s2d_jax import sampler as samplers
from s2d_jax.sampler import Sampler, SamplerConfig, Sampling, capacity, decode, scheduler

WINDOW, SEED = 6, (0, 11)
# Rows end at 3 or 5 or after the last token.
STOPS = Sampling(max_tokens=8, temperature=0.9, min_tokens=2, stop_ids=(3, 5))
FREE = STOPS._replace(stop_ids=(), min_tokens=0)


def prompts(count):
  """Prompts of 1 to 6 tokens, whose ids are not their indices."""
  rng = np.random.default_rng(3)
  return [rollouts.Prompt(1000 - 7 * i, tuple(rng.integers(0, 16, 1 + i % WINDOW).tolist()))
          for i in range(count)]


@pytest.fixture
def watched(monkeypatch):
  """watched(sampler): a list of what its calls do.

  L0, L1, … where a dispatch is launched; R0, R1, … where its results are read; and D0, D1, … where
  only its counts are, because it decodes nothing.
  """
  def watch(sampler):
    events = []
    numbers = {}  # id of a dispatch's counts -> its number
    alive = []    # the arrays, whose ids so stay unique
    def noted(program):
      def run(*args):
        slots, alive_B, decoded = program(*args)
        number = sum(str(event).startswith("L") for event in events)
        numbers[id(decoded.count_B)] = number
        alive.append(decoded)
        events.append(f"L{number}")
        return slots, alive_B, decoded
      return run
    get = jax.device_get
    def read(x):
      whole = isinstance(x, decode.Decoded)
      number = numbers[id(x.count_B if whole else x)]
      events.append(f"{'R' if whole else 'D'}{number}")
      return get(x)
    monkeypatch.setattr(jax, "device_get", read)
    programs = sampler.programs
    sampler.programs = programs._replace(
        decode={size: noted(program) for size, program in programs.decode.items()})
    return events
  return watch


@pytest.mark.medium
@pytest.mark.parametrize("rows, config, fields, want", [
    # Every row has 8 tokens, in dispatches of 3, 3 and 2. The one behind the last decodes nothing.
    (4, {}, {}, "L0 L1 R0 L2 R1 L3 R2 D3"),
    # Four of the eight rows wait, and enter when the first four have ended.
    (8, {}, {}, "L0 R0 L1 R1 L2 R2 L3 L4 R3 L5 R4 L6 R5 D6"),
    (4, {}, {"stop_strings": ("zz",)}, "L0 R0 L1 R1 L2 R2"),
    (4, {"page": 2}, {}, "L0 R0 L1 R1 L2 R2")])
def test_a_dispatch_is_launched_before_the_last_one_is_read(rows, config, fields, want, tiny,
                                                            watched):
  model, params = tiny("qwen3")
  text = lambda ids: "".join(chr(97 + int(i)) for i in ids)
  sampler = Sampler(model, FREE._replace(**fields), 4, WINDOW, SamplerConfig(tokens=3, **config),
                    text)
  assert sampler.programs.shapes.batches == (4,)
  events = watched(sampler)
  _, stats = sampler(params, prompts(rows), SEED)
  assert " ".join(events) == want
  # A dispatch that decodes nothing does not count.
  assert stats.dispatches == want.count("R") and stats.slot_tokens == 8 * rows


def counting(programs, calls):
  """A dict of programs that note their name in `calls`."""
  def noted(size, program):
    def run(*args):
      calls.append(size)
      return program(*args)
    return run
  return {size: noted(size, program) for size, program in programs.items()}


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_rows_and_counts_are_those_without_looking_ahead(shape, tiny, watched, monkeypatch):
  # 16 rows of up to 150 tokens, of which a few reach the end: the batch shrinks step by step, and
  # the cache of 80 tokens grows.
  model, params = tiny("qwen3")
  monkeypatch.setattr(capacity, "LEAST_LENGTH", 64)
  sampling = STOPS._replace(max_tokens=150, stop_ids=(3,), samples_per_prompt=4, temperature=0.7)
  mesh = sharding.make_mesh(shape)
  with jax.set_mesh(mesh):
    where = sharding.weight_shardings(mesh, models.axes(model.config), models.shapes(model.config))
    placed = jax.tree.map(jax.device_put, jax.device_get(params), where)
    sampler = Sampler(model, sampling, 4, WINDOW, SamplerConfig(tokens=5))
    assert sampler.programs.shapes.lengths == (80, 156)
    weights = sampler.lay_out(placed)
    grown, shrunk, digests = [], [], []
    sampler.programs = sampler.programs._replace(
        grow=counting(sampler.programs.grow, grown),
        shrink=counting(sampler.programs.shrink, shrunk))
    monkeypatch.setattr(hosts, "agree", lambda name, digest, seconds: digests.append(digest))
    events = watched(sampler)
    got, stats = sampler(weights, prompts(4), SEED)
    ahead = list(events), list(digests)
    assert grown and len(set(shrunk)) >= len(sampler.programs.shapes.batches) - 1 > 0
    events.clear()
    digests.clear()
    monkeypatch.setattr(scheduler.Schedule, "_looks_ahead", lambda self: False)
    want, stats_before = sampler(weights, prompts(4), SEED)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert len(set(got.response_length_B.tolist())) > 5 and 150 in got.response_length_B
  assert (stats._replace(weights_seconds=0) == stats_before._replace(weights_seconds=0))
  # Processes compare the rows and tokens in the order of before, as often.
  assert ahead[1] == digests
  # Some dispatches went on behind another, and some decoded nothing: before a change of the cache,
  # and at the end.
  kinds = [event[0] for event in ahead[0]]
  assert kinds.count("R") == stats.dispatches == [event[0] for event in events].count("L")
  assert kinds.count("D") > 2 and kinds.count("L") == kinds.count("R") + kinds.count("D")
  assert "D" not in {event[0] for event in events}


@pytest.mark.medium
def test_rows_are_reported_while_the_next_dispatch_runs(tiny, watched):
  # Three rows in one batch that cannot shrink. A row of n tokens ends in dispatch (n - 1) // 3.
  model, params = tiny("qwen3")
  sampler = Sampler(model, STOPS._replace(samples_per_prompt=3), 1, WINDOW, SamplerConfig(tokens=3))
  assert sampler.programs.shapes.batches == (3,)
  events = watched(sampler)
  rows, _ = sampler(params, prompts(1), SEED)
  events.clear()
  def on_finish(index, rollout):
    np.testing.assert_array_equal(rollout.response(index), rows.response(index))
    assert rollout.response_length_B[index] == rows.response_length_B[index]
    events.append(index)
  sampler(params, prompts(1), SEED, on_finish=on_finish)
  last = (rows.response_length_B - 1) // 3
  assert len(set(last.tolist())) > 1
  want = ["L0"]
  for i in range(last.max() + 1):
    # The rows that ended in the one before, while this one runs and the next one is behind it.
    want += [f"L{i + 1}", *np.flatnonzero(last == i - 1), f"R{i}"]
  want += [f"D{last.max() + 1}", *np.flatnonzero(last == last.max())]
  assert events == want


@pytest.mark.medium
def test_sampling_stops_or_fails_with_a_dispatch_ahead(tiny, watched):
  model, params = tiny("qwen3")
  sampler = Sampler(model, STOPS, 4, WINDOW, SamplerConfig(tokens=1))
  events = watched(sampler)
  want, _ = sampler(params, prompts(4), SEED)
  calls = itertools.count()
  events.clear()
  with samplers.stopping(lambda: next(calls) == 2), pytest.raises(samplers.Stopped):
    sampler(params, prompts(4), SEED)
  assert events == ["L0", "L1", "R0", "L2", "R1"]
  def fail(index, rollout):
    raise KeyError(index)
  with pytest.raises(KeyError):
    sampler(params, prompts(4), SEED, on_finish=fail)
  # The next call does not find the dispatch that ran meanwhile.
  got, _ = sampler(params, prompts(4), SEED)
  jax.tree.map(np.testing.assert_array_equal, got, want)


class FakeSchedule(scheduler.Schedule):
  """Two slots with a cache of nine tokens, and rows with these tokens of (prompt, response)."""

  def __init__(self, *lengths):
    response_length_B = np.array([response for _, response in lengths])
    self.rollout = types.SimpleNamespace(response_length_B=response_length_B)
    self.owners = [scheduler.Row(i, rollouts.Prompt(i, (1,) * prompt), None)
                   for i, (prompt, _) in enumerate(lengths)]
    self.rows = []
    self.memory = types.SimpleNamespace(batch=2, length=9)
    self.programs = types.SimpleNamespace(shapes=types.SimpleNamespace(batches=(2, 1)))


def ahead(*counts):
  """A dispatch that decoded these tokens of each slot."""
  return scheduler.Dispatch(None, None, decode.Decoded(None, None, None, np.array(counts), None))


@pytest.mark.parametrize("lengths, goes_on", [
    # The last of a row's tokens is read next, so nine tokens need a ninth slot, and ten a tenth.
    ([(5, 4), (5, 3)], True), ([(5, 5), (5, 3)], False), ([(5, 2)], False), ([], False)])
def test_the_dispatch_ahead_is_taken_unless_the_slots_must_change(lengths, goes_on):
  found = ahead(1, 1) if goes_on else ahead(0, 0)
  assert FakeSchedule(*lengths)._next(found) is (found if goes_on else None)


def test_host_and_device_that_disagree_are_refused():
  with pytest.raises(RuntimeError, match="decoded tokens that the host did not expect"):
    FakeSchedule((5, 2))._next(ahead(0, 1))
  with pytest.raises(RuntimeError, match="decoded no token of rows that have not ended"):
    FakeSchedule((5, 2))._record(ahead(0, 0).decoded)
