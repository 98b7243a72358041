"""The cost until a score, by hand from the logs of a teacher's and two student's stages."""

import json

import numpy as np
import pytest
from etils import epath

from s2d_jax import files, ladder, targets
from s2d_jax.errors import InputError

NAME = "validation/avg@1"


def stage(folder, learner, scores, labels=()):
  """Two steps of 8 sequences, 100 tokens, 5 GFLOPs and 3 seconds, 1 of them an evaluation."""
  files.write_json(folder / "manifest.json", {"inputs": {"row": {"learner": learner}}})
  logs = {"ledger": [{"step": i, "sequences": 8, "tokens_sampled": 90, "tokens_reused": 10,
                      "flops": 4e9, "flops_reused": 1e9, "label_uses": len(labels),
                      "labels": list(labels)} for i in range(2)],
          "metrics": [{"step": i, **({NAME: score} if score is not None else {})}
                      for i, score in enumerate(scores)],
          "timing": [{"step": 0, "seconds": 10.0},
                     *({"step": i, "seconds": 3.0, "evaluate_seconds": 1.0} for i in range(2))]}
  for name, rows in logs.items():
    files.write(folder / name / "00000000.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
  return folder


def run(tmp_path, seed=0, last=0.8):
  """A teacher on four labels, then two stages of its student, scored 0.2, 0.4, 0.3 and `last`."""
  folder = epath.Path(tmp_path)
  stages = [stage(folder / f"teacher_grpo-{seed}", "teacher", [0.9, 0.9], labels=(1, 2, 3, 4)),
            stage(folder / f"forward_kl-{seed}", "student", [0.2, 0.4]),
            stage(folder / f"reverse_kl-{seed}", "student", [0.3, last])]
  return ladder.Run("bridge", "bridge", seed, {}, stages, {}, "r", True, set(), [], {}, set())


def test_costs_by_hand(tmp_path):
  found = targets.curve(run(tmp_path), NAME)
  np.testing.assert_array_equal(found.score_N, [0.2, 0.4, 0.3, 0.8])
  # Before the student's first step: 2 teacher steps, whose seconds are 10 and twice 3 − 1.
  assert found.cost_NC[0].tolist() == [0, 0, 200, 10e9, 4, 8, 14]
  # Then one step, another one, and the second stage's start beside its first step.
  assert found.cost_NC[1:, 0].tolist() == [1, 2, 3]
  assert found.cost_NC[1:, 6].tolist() == [14 + 12, 14 + 14, 14 + 14 + 12]
  # 0.25 lies a quarter of the way from 0.2 to 0.4.
  np.testing.assert_allclose(targets.cost(found, 0.25),
                             [0.25, 2, 225, 11.25e9, 4, 8, 14 + 12 / 4])
  # The first crossing of 0.35 is before the fall to 0.3.
  np.testing.assert_allclose(targets.cost(found, 0.35)[0], 0.75)
  np.testing.assert_allclose(targets.cost(found, 0.55)[0], 2.5)
  np.testing.assert_allclose(targets.cost(found, 0.1), found.cost_NC[0])
  assert targets.cost(found, 0.81) is None


def test_the_table_says_which_seeds_reached_it(tmp_path):
  both = ladder.Group("bridge", "bridge", {0: run(tmp_path), 1: run(tmp_path, 1, last=0.5)})
  base = ladder.Group("untrained teacher", "untrained teacher",
                      {0: run(tmp_path)._replace(stages=[])})
  cells = [line.split(" | ") for line in targets.section([both, base], NAME, 0.4)[-1:]]
  assert cells == [["| bridge", "0 1", "all", "80.0", "1", "8", "300", "15", "4", "8", "26 |"]]
  (line,) = targets.section([both], NAME, 0.6)[-1:]
  assert line == "| bridge | 0 1 | 1 of 2 | 80.0 |" + " – |" * 7
  (line,) = targets.section([both], NAME, 0.9)[-1:]
  assert line.startswith("| bridge | 0 1 | not reached | 80.0 | – |")
  with pytest.raises(InputError, match="score other/avg@1: choose it from validation/avg@1.$"):
    targets.section([both], "other/avg@1", 0.4)
  with pytest.raises(InputError, match="has the score other/avg@1: give config.evals an entry"):
    targets.section([base], "other/avg@1", 0.4)


@pytest.mark.parametrize("text", ["validation", "validation/avg@1=", "validation/avg@1=x", "=0.5",
                                  "validation/avg@1=1.5", "validation/avg@1=0", "avg@1=0.5",
                                  "validation/avg@1=nan"])
def test_a_target_that_is_none_is_refused(text):
  with pytest.raises(InputError, match="write a score between steps and a rate above 0"):
    targets.parse(text)
  assert targets.parse("validation/avg@1=0.6") == (NAME, 0.6)
