"""Workers that hang, spin, hog memory, raise or die cost their own text and nothing else."""

import importlib
import time

import pytest

from s2d_jax.rewards import math, pool

CHECKS = """
import os, time

def check(problem, text):
  if text == "sleep":
    time.sleep(1000)
  if text == "spin":
    while True:
      pass
  if text == "hog":
    bytearray(8 << 30)
  if text == "raise":
    raise KeyError(text)
  if text == "die":
    os._exit(3)
  if text == "print":
    print("0.0")
  return float(problem["answer"] in text)
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
  (tmp_path / "worker_checks.py").write_text(CHECKS)
  monkeypatch.syspath_prepend(tmp_path)
  return importlib.import_module("worker_checks").check


def opened(check, workers=2, seconds=30.0, cpu_seconds=30, memory_bytes=1 << 30):
  return pool.Pool(check, workers, seconds, cpu_seconds, memory_bytes)


def test_rewards_come_back_in_order(check):
  texts = [f"{i % 3}" for i in range(100)] + ["0" * 200_000, "print 0"]
  with opened(check) as workers:
    assert workers.score([{"answer": "0"}] * 102, texts) == [1.0, 0.0, 0.0] * 33 + [1.0] * 3
    assert workers.score([], []) == []
    assert (workers.timeouts, workers.failures) == (0, 0)


def test_a_hanging_checker_is_killed_and_replaced(check):
  with opened(check, workers=1, seconds=0.5) as workers:
    start = time.monotonic()
    assert workers.score([{"answer": "a"}] * 4, ["a", "sleep", "spin", "a"]) == [1.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - start < 10.0
    assert (workers.timeouts, workers.failures) == (2, 0)


def test_cpu_seconds_end_a_spinning_checker(check):
  with opened(check, workers=1, cpu_seconds=1) as workers:
    assert workers.score([{"answer": "a"}] * 2, ["spin", "a"]) == [0.0, 1.0]
    assert (workers.timeouts, workers.failures) == (1, 0)


def test_a_memory_hog_an_error_and_a_death_are_failures(check):
  with opened(check) as workers:
    texts = ["a", "hog", "raise", "die", "a"]
    assert workers.score([{"answer": "a"}] * 5, texts) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert (workers.timeouts, workers.failures) == (0, 3)


def test_one_slow_worker_does_not_hold_the_others(check):
  with opened(check, workers=2, seconds=1.0) as workers:
    rewards = workers.score([{"answer": "a"}] * 201, ["sleep"] + ["a"] * 200)
    assert rewards == [0.0] + [1.0] * 200
    assert workers.timeouts == 1


def test_closing_ends_every_process(check):
  with opened(check) as workers:
    processes = [worker._process for worker in workers._workers]
  assert all(process.poll() is not None for process in processes)


def test_a_checker_that_cannot_start_is_an_error(check):
  check.__module__ = "no_such_module"
  with pytest.raises(RuntimeError, match="a reward worker did not start"):
    opened(check)


def test_no_workers_are_refused(check):
  with pytest.raises(ValueError, match="0 workers"):
    opened(check, workers=0)


@pytest.mark.medium
def test_math_verify_inside_the_pool():
  given = ["\\boxed{\\frac{2}{4}}", "\\boxed{0.5}", "\\boxed{1/3}", "1/2", "\\boxed{9^{9^{9^9}}}"]
  with pool.Pool(math.verified, 1, 60.0, 3, 2 << 30) as workers:
    assert workers.score([{"answer": "\\frac{1}{2}"}] * 5, given) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert workers.timeouts == 1
