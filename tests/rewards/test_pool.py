"""A check that hangs, spins, takes memory, raises or dies costs one text its reward, no more."""

import contextlib
import json
import math as numbers
import os
import pathlib
import signal
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from s2d_jax import rollouts
from s2d_jax.rewards import math, pool

CHECKS = """
import os, signal, time

calls = []

def prepare():
  calls.append("prepared")

def check(problem, text):
  calls.append(text)
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
  if text == "parent":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
  if text == "print":
    print("0.0")
  if text == "calls":
    return float(len(calls))
  if text == "hash":
    return float(hash("a word") % 1000003)
  return float(problem["answer"] in text)
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
  (tmp_path / "worker_checks.py").write_text(CHECKS)
  monkeypatch.syspath_prepend(tmp_path)
  return "worker_checks:check"


def opened(check, seconds=30.0, cpu_seconds=30.0, memory_bytes=1 << 30, processes=1):
  return contextlib.closing(pool.Pool(check, seconds, cpu_seconds, memory_bytes, processes))


def rewards(score, answer, texts):
  return [score({"answer": answer}, text) for text in texts]


def test_rewards_of_many_texts(check):
  texts = [f"{i % 3}" for i in range(100)] + ["0" * 200_000, "print 0"]
  with opened(check) as score:
    assert rewards(score, "0", texts) == [1.0, 0.0, 0.0] * 33 + [1.0] * 3
    assert (score.timeouts, score.failures) == (0, 0)


def test_several_processes_give_one_processs_rewards(check):
  texts = [f"{i % 3}" for i in range(60)] + ["raise"]
  with opened(check, processes=3) as score:
    begun = [score.submit({"answer": "0"}, text) for text in texts]
    assert [future.result() for future in begun] == [1.0, 0.0, 0.0] * 20 + [0.0]


def test_a_hanging_checker_is_killed_and_replaced(check):
  with opened(check, seconds=0.5) as score:
    score({"answer": "a"}, "a")  # so that no import is timed
    start = time.monotonic()
    assert rewards(score, "a", ["a", "sleep", "spin", "a"]) == [1.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - start < 10.0
    assert (score.timeouts, score.failures) == (2, 0)


@pytest.mark.parametrize("cpu_seconds", [1, 0.25])
def test_cpu_seconds_end_a_spinning_checker(check, cpu_seconds):
  with opened(check, cpu_seconds=cpu_seconds) as score:
    assert rewards(score, "a", ["spin", "a"]) == [0.0, 1.0]
    assert (score.timeouts, score.failures) == (1, 0)


def test_too_much_memory_an_error_and_a_death_are_failures(check):
  with opened(check) as score:
    assert rewards(score, "a", ["a", "hog", "raise", "die", "a"]) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert (score.timeouts, score.failures) == (0, 3)


def test_the_end_of_the_process_itself_costs_one_text(check):
  with opened(check) as score:
    assert rewards(score, "a", ["a", "parent", "a"]) == [1.0, 0.0, 1.0]
    assert (score.timeouts, score.failures) == (0, 1)


def test_no_check_sees_the_checks_before_it(check):
  with opened(check) as score:
    # `prepare` and the check itself: what earlier checks have left is gone.
    assert rewards(score, "a", ["a", "a", "calls", "calls"]) == [1.0, 1.0, 2.0, 2.0]


def test_processes_order_a_set_alike(check):
  with opened(check) as first, opened(check) as second:
    assert rewards(first, "a", ["hash"]) == rewards(second, "a", ["hash"])


def test_a_stop_signal_to_all_processes_changes_no_reward(check):
  with opened(check) as score:
    process = score._processes[0]
    rewards(score, "a", ["a"])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      os.kill(process.pid, number)
    assert rewards(score, "a", ["a"]) == [1.0]
    assert score._processes[0] is process


def test_closing_ends_the_processes_and_cancels_checks_that_wait(check):
  with opened(check) as score:
    rewards(score, "a", ["a"])
    process = score._processes[0]
    running, waiting = (score.submit({"answer": "a"}, text) for text in ("sleep", "a"))
    while not running.running():
      time.sleep(0.01)
  assert process.poll() is not None and score._processes[0] is process
  assert waiting.cancelled()
  with pytest.raises(RuntimeError, match="was closed"):
    running.result()
  assert not any(thread.is_alive() for thread in score._threads)


def test_a_checker_that_cannot_start_is_an_error():
  with opened("no_such_module:check") as score:
    for _ in range(2):
      with pytest.raises(RuntimeError, match="a reward worker did not start"):
        score({"answer": "a"}, "a")


@pytest.mark.medium
def test_hostile_answers_hold_up_no_others(check):
  # 10 of 1,024 never end: two processes spend half of the limits each, beside the honest time.
  limit, workers, hostile = 1.0, 2, 10
  honest = ["0" if i % 2 else "1" for i in range(1024 - hostile)]
  mixed = list(honest)
  for k in range(hostile):
    mixed.insert(100 * k, "sleep")
  expected = [float("0" in text) for text in honest]

  def timed(texts):
    start = time.monotonic()
    begun = [score.submit({"answer": "0"}, text) for text in texts]
    found = [future.result() for future in begun]
    return time.monotonic() - start, found

  with opened(check, seconds=limit, processes=workers) as score:
    score({"answer": "a"}, "a")
    before, found = timed(honest)
    assert found == expected
    elapsed, found = timed(mixed)
    after, _ = timed(honest)
  assert [v for v, text in zip(found, mixed, strict=True) if text != "sleep"] == expected
  assert (score.timeouts, score.failures) == (hostile, 0)
  # The factor is for a machine that is busier in one half than in the other.
  assert elapsed < 2 * (before + after) + numbers.ceil(hostile / workers) * limit + 1


def test_a_killed_check_is_warned_of_at_powers_of_two(check, caplog):
  with opened(check) as score:
    rewards(score, "a", ["raise"] * 5)
  assert [record.args for record in caplog.records] == [(0, 1), (0, 2), (0, 4)]


def rollout(B):
  """B rows of one token each."""
  zeros = np.zeros((B, 1), np.float32)
  return rollouts.Rollout(
      np.arange(B), np.zeros(B, np.int32), np.zeros((B, 1), np.int32), np.ones(B, np.int32),
      np.arange(B, dtype=np.int32)[:, None], np.ones(B, np.int32), zeros, zeros,
      np.zeros(B, np.int32), 0)


def test_all_checks_of_a_batch_begin_before_one_is_waited_for():
  begun = []

  def reward(prompt_id, ids):
    future = Future()
    begun.append(future)
    # The last one decides all, so waiting for the first one early would never end.
    if len(begun) == 8:
      threading.Timer(0.1, lambda: [f.set_result(i % 2) for i, f in enumerate(begun)]).start()
    return future

  np.testing.assert_array_equal(rollouts.score(reward, rollout(8)), [0, 1] * 4)


@pytest.mark.medium
def test_math_verify_in_workers():
  boxed = ["\\boxed{\\frac{2}{4}}", "\\boxed{0.5}", "\\boxed{1/3}", "1/2", "\\boxed{9^{9^{9^9}}}"]
  checkers = math.checkers()
  before = checkers.timeouts
  found = rewards(math.verified, "\\frac{1}{2}", boxed)
  assert found == [1.0, 1.0, 0.0, 0.0, 0.0]
  assert checkers.timeouts - before == 1


# (answer, boxed, reward) where math-verify alone errs, or the parts around it decide.
ALGEBRA = [
  ("[1,2]", "1\\le x\\le 2", 1), ("(1,2)", "1\\le x\\le 2", 0), ("50\\%", "0.5", 1),
  ("50\\%", "0.05", 0),
  ("0.5", "50\\%", 1), ("\\frac13", "0.\\overline{3}", 1), ("\\frac13", "0.333333", 0),
  ("\\sqrt{3}", "\\tan 60^\\circ", 1), ("10^{-20}", "10^{-30}", 0), ("x^2+1=0", "x^2+2=0", 0),
  ("\\text{seat}", "\\text{east}", 0), ("x^2+y^2=1", "1", 0), ("1", "x^2+y^2=1", 0),
  ("\\sqrt{x^2}", "x", 0), ("2\\sqrt{5}", "\\sqrt{20}\\text{ cm}", 1), ("x+1", "y+1", 0),
  ("4", "\\pm 4", 0),
  ("x=2, y=3", "y=3, x=2", 1), ("7\\text{ cm}", "7\\text{ kg}", 0),
  ("2\\text{ m}", "\\sqrt{4}\\text{ cm}", 0), ("1, 2", "\\sqrt{4}, 1", 1),
  ("(1,2)", "(\\sqrt{4},1)", 0),
]


@pytest.mark.medium
def test_parts_around_expressions():
  found = [math.submit({"answer": answer}, f"\\boxed{{{boxed}}}") for answer, boxed, _ in ALGEBRA]
  wrong = [row for row, reward in zip(ALGEBRA, found, strict=True)
           if rollouts.resolved(reward) != row[2]]
  assert wrong == []


@pytest.mark.medium
def test_both_checkers_agree_with_the_labels():
  path = pathlib.Path(__file__).with_name("labelled_answers.jsonl")
  rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  begun = [math.submit(row, row["response"]) for row in rows]
  found = [rollouts.resolved(reward) == 1 for reward in begun]
  labels = [row["equal"] for row in rows]
  # No wrong answer is accepted, and of the rows that need algebra at least 98 % are right.
  accepted = [row for row, equal in zip(rows, found, strict=True) if equal and not row["equal"]]
  assert accepted == []
  algebra = [equal == label for row, equal, label in zip(rows, found, labels, strict=True)
             if row["algebra"]]
  assert np.mean(algebra) >= 0.98 and len(algebra) >= 100
  # A second time, the verdicts are the same.
  again = [math.submit(row, row["response"]) for row in rows[::-4]]
  assert [rollouts.resolved(reward) == 1 for reward in again] == found[::-4]
