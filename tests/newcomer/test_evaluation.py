"""A new statistic touches the table of statistics alone: one place."""

import pytest

from tests.newcomer.checkout import Checkout

# The new code itself: a function of the samples, worst@k.
CODE = '''


def worst_of(samples, k):
  """1 where the first k samples are all right, else 0."""
  return np.min(samples.correct_PG[:, :k], axis=1)
'''
ENTRY = '''    "worst": Statistic(lambda samples, k: worst_of(samples, k), k="each"),
    "truncated":'''
# Scores samples by hand, and then reads a finished folder's scores that lack the new statistic.
SCORE = """
import numpy as np
from s2d_jax import evals, ladder, report, stats
correct_PG = np.array([[1, 1, 0], [1, 0, 1]])
samples = {"sampled": stats.Samples(correct_PG)}
found = dict(evals.intervals((2,), seed=0, draws=10, level=0.95)(samples))
print(list(found), found["worst@2"].estimate)
result = {"scores": {"avg@3": [2 / 3, 0, 1]}, "samples": {"sampled": {"correct_PG": correct_PG}}}
run = ladder.Run("arm", "label", 0, result, [], {"evaluation": {"level": 0.95}}, "", False, set(),
                 [], dict.fromkeys(("labels_distinct", "label_uses", "tokens_sampled",
                                    "tokens_trained", "tokens_guide", "flops",
                                    "device_seconds_used", "device_seconds_lost"), 0), set())
print(ladder.Group("label", "label", {0: run}).score("worst@2").estimate)
other = run._replace(label="other", result=result | {"scores": {"worst@2": [0.5, 0, 1],
                                                                 "avg@3": [2 / 3, 0, 1]}})
print(report.table([ladder.Group(r.label, r.label, {0: r}) for r in (run, other)])[0])
"""


def test_one_place_is_touched(tmp_path):
  checkout = Checkout(tmp_path)
  checkout.append("s2d_jax/stats.py", CODE)
  checkout.edit("s2d_jax/stats.py", '    "truncated":', ENTRY)
  assert len(checkout.touched) <= 2
  process = checkout.run(SCORE)
  names, late, head = process.stdout.splitlines() or pytest.fail(process.stderr)
  # Of the first two samples of each problem both are right, and one of two.
  assert names == "['avg@3', 'pass@2', 'worst@2'] 0.5"
  # A run that was scored before the statistic joined the table has it from its samples.
  assert late == "0.5"
  assert head.startswith("| arm | seeds | avg@3 | worst@2 | labels: distinct |")


def test_a_forgotten_entry_is_an_error(tmp_path):
  checkout = Checkout(tmp_path)
  checkout.append("s2d_jax/stats.py", CODE)
  process = checkout.run("from s2d_jax import stats; stats.statistic('worst@2')")
  assert process.returncode
  assert "there is no statistic 'worst@2': choose from greedy, avg, pass" in process.stderr
