"""The examples run as they stand and learn in a few steps."""

import numpy as np
import pytest

from examples import grpo_loop, opd_loop


@pytest.mark.medium
def test_on_policy_distillation_brings_the_student_to_its_teacher(capsys):
  kls = opd_loop.main(["--steps=10", "--prompts=16"])
  assert len(kls) == 10 and np.mean(kls[-3:]) < 0.7 * np.mean(kls[:3])
  assert capsys.readouterr().out.count("KL to the teacher") == 10


@pytest.mark.medium
def test_grpo_raises_the_reward(capsys):
  rewards = grpo_loop.main(["--steps=12", "--prompts=16"])
  assert len(rewards) == 12 and np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.05
  assert capsys.readouterr().out.count("mean reward") == 12
