"""Draws are pure functions of (seed, stage, step, round); halves are pure functions of the id."""

import numpy as np
import pytest

from s2d_jax.data import prompts


def test_an_epoch_draws_each_problem_once_and_the_next_in_another_order():
  steps = [prompts.at(100, 0, "teacher_grpo", step, 20) for step in range(10)]
  first, second = np.concatenate(steps[:5]), np.concatenate(steps[5:])
  np.testing.assert_array_equal(np.sort(first), np.arange(100))
  np.testing.assert_array_equal(np.sort(second), np.arange(100))
  assert np.any(first != second)


def test_the_short_tail_is_dropped():
  # 3 batches of 30 fit in 100: step 3 opens the second epoch, and no batch holds a problem twice.
  order = [prompts.at(100, 0, "sft", step, 30) for step in range(6)]
  assert len(set(np.concatenate(order[:3]))) == len(set(np.concatenate(order[3:]))) == 90


def test_rounds_are_consecutive_batches_and_do_not_move_later_steps():
  plain = [prompts.at(60, 5, "grpo", step, 10) for step in range(6)]
  rounds = [prompts.at(60, 5, "grpo", s, 10, round=r, rounds=3) for s in (0, 1) for r in (0, 1, 2)]
  np.testing.assert_array_equal(plain, rounds)


def test_no_problem_is_drawn_twice_in_a_step():
  # Three rounds of ten are a step, so an epoch of 100 has three steps, and its last ten are left.
  for step in range(12):
    order = np.concatenate([prompts.at(100, 5, "grpo", step, 10, r, 3) for r in range(3)])
    assert len(set(order)) == 30
    assert prompts.epoch(100, step, 10, 3) == step // 3
  with pytest.raises(ValueError, match="3 rounds of 10 problems per step were asked of 29 in grpo"):
    prompts.at(29, 0, "grpo", 0, 10, 0, 3)


def test_seed_and_stage_change_the_order():
  orders = {tuple(prompts.at(64, *key, 0, 16)) for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a"))}
  assert len(orders) == 3


def test_a_draw_computed_from_its_definition():
  """A resumed or later run must draw the same problems."""
  order = np.random.default_rng((7, 0xCBF43926, 0)).permutation(8)  # CRC-32 of "123456789"
  np.testing.assert_array_equal(prompts.at(8, 7, "123456789", 1, 4), order[4:])


def test_too_many_problems_per_step_and_a_round_too_many_are_refused():
  with pytest.raises(ValueError, match="33 problems per step were asked of 32 in sft"):
    prompts.at(32, 0, "sft", 0, 33)
  with pytest.raises(ValueError, match="round 2 of sft is outside its 2 rounds"):
    prompts.at(32, 0, "sft", 0, 4, round=2, rounds=2)


def test_splitmix64_reference():
  # First two outputs of splitmix64 from state 1234567, as published with the generator
  # (https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64).
  golden = np.uint64(0x9E3779B97F4A7C15)
  state = np.array([1234567], np.uint64)
  assert prompts._mix(state) == [6457827717110365317]
  assert prompts._mix(state + golden) == [3203168211198807973]


def test_half_depends_on_the_id_alone():
  ids = np.arange(4096)
  first = prompts.half(ids, seed=3)
  assert first.dtype == bool
  np.testing.assert_array_equal(prompts.half(ids[::-7], seed=3), first[::-7])
  assert abs(first.sum() - 2048) < 4 * 32  # four deviations of a fair coin


def test_shares_are_exact_nested_and_seeded():
  ids = np.arange(1000, 5096)
  quarter, half = (prompts.share(ids, 3, f) for f in (0.25, 0.5))
  assert (quarter.sum(), half.sum(), prompts.share(ids, 3, 1.0).sum()) == (1024, 2048, 4096)
  assert not (quarter & ~half).any()  # a larger budget adds labels and takes none away
  np.testing.assert_array_equal(prompts.share(ids[::-1], 3, 0.25), quarter[::-1])
  other = prompts.share(ids, 4, 0.5)
  assert abs((half == other).sum() - 2048) < 4 * 32
  # Halving cuts a share into fair halves: the two orders are independent.
  assert abs(prompts.half(ids[half], 3).sum() - 1024) < 4 * 23


def test_seeds_halve_independently():
  ids = np.arange(4096)
  agree = (prompts.half(ids, 0) == prompts.half(ids, 1)).sum()
  assert abs(agree - 2048) < 4 * 32


def test_neighbouring_ids_are_independent():
  first = prompts.half(np.arange(4097), seed=0)
  assert abs((first[1:] == first[:-1]).sum() - 2048) < 4 * 32
