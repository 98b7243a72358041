"""A worker that hangs, spins, takes memory, raises or dies costs one text its reward, no more."""

import contextlib
import os
import signal
import time

import pytest

from s2d_jax.rewards import math, worker

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
  return "worker_checks:check"


def opened(check, seconds=30.0, cpu_seconds=30, memory_bytes=1 << 30):
  return contextlib.closing(worker.Worker(check, seconds, cpu_seconds, memory_bytes))


def rewards(score, answer, texts):
  return [score({"answer": answer}, text) for text in texts]


def test_rewards_of_many_texts(check):
  texts = [f"{i % 3}" for i in range(100)] + ["0" * 200_000, "print 0"]
  with opened(check) as score:
    assert rewards(score, "0", texts) == [1.0, 0.0, 0.0] * 33 + [1.0] * 3
    assert (score.timeouts, score.failures) == (0, 0)


def test_a_hanging_checker_is_killed_and_replaced(check):
  with opened(check, seconds=0.5) as score:
    start = time.monotonic()
    assert rewards(score, "a", ["a", "sleep", "spin", "a"]) == [1.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - start < 10.0
    assert (score.timeouts, score.failures) == (2, 0)


def test_cpu_seconds_end_a_spinning_checker(check):
  with opened(check, cpu_seconds=1) as score:
    assert rewards(score, "a", ["spin", "a"]) == [0.0, 1.0]
    assert (score.timeouts, score.failures) == (1, 0)


def test_too_much_memory_an_error_and_a_death_are_failures(check):
  with opened(check) as score:
    assert rewards(score, "a", ["a", "hog", "raise", "die", "a"]) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert (score.timeouts, score.failures) == (0, 3)


def test_a_stop_signal_to_all_processes_changes_no_reward(check):
  with opened(check) as score:
    process = score._process
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    assert rewards(score, "a", ["a"]) == [1.0]
    assert score._process is process


def test_closing_ends_the_process(check):
  with opened(check) as score:
    process = score._process
  assert process.poll() is not None


def test_a_checker_that_cannot_start_is_an_error():
  with pytest.raises(RuntimeError, match="a reward worker did not start"):
    opened("no_such_module:check")


@pytest.mark.medium
def test_math_verify_in_a_worker():
  boxed = ["\\boxed{\\frac{2}{4}}", "\\boxed{0.5}", "\\boxed{1/3}", "1/2", "\\boxed{9^{9^{9^9}}}"]
  try:
    found = rewards(math.verified, "\\frac{1}{2}", boxed)
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert math._verifier().timeouts == 1
  finally:
    math._verifier().close()
    math._verifier.cache_clear()
