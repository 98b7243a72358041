"""The tasks that `config.task` may name: problems, how they are asked, how answers are checked.

A task of your own is a `planning.Task`, handed to `recipe.run`; nothing here needs to know it.
"""

import os
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from s2d_jax import doctor
from s2d_jax.data import sources
from s2d_jax.planning import Task
from s2d_jax.rewards import arithmetic as arithmetic_reward
from s2d_jax.rewards import math as math_reward


def arithmetic(config: ConfigDict) -> Task:
  """Chained addition modulo 100, prepared under config.data.dir the first time."""
  doctor.check_keys("config.data", config.data, ("dir",))
  folder = os.path.expanduser(config.data.dir)
  return Task(lambda split: sources.tfds_source("arithmetic", split, folder),
              lambda problem: [{"role": "user", "content": problem["problem"]}],
              arithmetic_reward.reward)


def math(config: ConfigDict) -> Task:
  """Problems of JSON-lines files, config.data[split], answered in the last \\boxed{}."""
  ask = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
  def source(split: str) -> Sequence[dict]:
    if split not in config.data:
      raise ValueError(f"config.data names no split {split!r}: add its file, or choose from "
                       f"{', '.join(config.data)}.")
    return sources.solved(sources.jsonl(config.data[split]), config.data.get("solutions"))
  return Task(source, lambda problem: [{"role": "user", "content": problem["problem"] + ask}],
              math_reward.reward)


TASKS: dict[str, Callable[[ConfigDict], Task]] = {"arithmetic": arithmetic, "math": math}


def get(config: ConfigDict) -> Task:
  """The Task that config.task names.

  Raises:
    ValueError: an unknown name, or a key that config or config.data lacks.
  """
  doctor.check_keys("config", config, doctor.TOP)
  if config.task not in TASKS:
    raise ValueError(f"config.task is {config.task!r}: choose {' or '.join(TASKS)}, or call "
                     "recipe.run with a Task of your own.")
  return TASKS[config.task](config)
