"""The recipe as two tables, STAGES and ARMS, and `run`, which trains and scores the arms.

A stage names the model that samples, the one that learns, the guide and the objective. An arm is a
list of stages, each with the labels it may use. Stages, arms and tasks of your own are arguments
of `run`.
"""

from collections.abc import Mapping

import jax
from etils import epath
from ml_collections import ConfigDict

from s2d_jax import (
  budget,
  hosts,
  objectives,
  placement,
  planning,
  program_cache,
  remat,
  walk,
)
from s2d_jax.errors import InputError
from s2d_jax.planning import Arm, Plan, Stage, Task, Use

STAGES = (
    Stage("teacher_grpo", "teacher", "teacher", "reference", objectives.GRPO,
          reward=True),
    Stage("teacher_sft", "given", "teacher", None, objectives.NEGATIVE_LOG_LIKELIHOOD),
    Stage("forward_kl", "teacher", "student", "teacher", objectives.FORWARD_KL),
    Stage("weighted_fkl", "teacher", "student", "teacher", objectives.FORWARD_KL,
          prompt_weights=objectives.learnable),
    Stage("sft", "teacher", "student", None, objectives.NEGATIVE_LOG_LIKELIHOOD),
    Stage("reverse_kl", "student", "student", "teacher", objectives.REVERSE_KL),
    Stage("student_grpo", "student", "student", "reference", objectives.GRPO,
          reward=True),
    # Its block has `hint_tokens`: the guide is the student's start, which reads more than it does.
    Stage("self_distillation", "student", "student", "reference", objectives.REVERSE_KL),
)

# The two stages of a bridge. An arm that leaves one out makes as many updates as both.
_BRIDGE = ("forward_kl", "reverse_kl")


def _bridge(labels: str) -> Arm:
  """Both stages of the bridge on the same labels."""
  return tuple(Use(stage, labels) for stage in _BRIDGE)


ARMS: dict[str, Arm] = {
    # Scores the two base models, and every teacher that another arm has trained.
    "untrained": (),
    "cold_grpo": (Use("student_grpo", "all"),),
    "cold_grpo_2h": (Use("student_grpo", "2h"),),
    "raw_bridge": _bridge("all"),
    "bridge": (Use("teacher_grpo", "all"), *_bridge("all")),
    "opd_only": (Use("teacher_grpo", "all"), Use("reverse_kl", "all", _BRIDGE)),
    "sft_only": (Use("teacher_grpo", "all"), Use("sft", "all", _BRIDGE)),
    "sft_bridge": (Use("teacher_grpo", "all"), Use("sft", "all", ("forward_kl",)),
                   Use("reverse_kl", "all")),
    "fkl_only": (Use("teacher_grpo", "all"), Use("forward_kl", "all", _BRIDGE)),
    "weighted_fkl": (Use("teacher_grpo", "all"), Use("weighted_fkl", "all", _BRIDGE)),
    "sft_teacher_bridge": (Use("teacher_sft", "all"), *_bridge("all")),
    # A half_* arm keeps the labels of the second half from everything before its student's GRPO.
    "half_bridge": (Use("teacher_grpo", "1h"), *_bridge("1h")),
    "half_bridge_grpo_2h": (Use("teacher_grpo", "1h"), *_bridge("1h"), Use("student_grpo", "2h")),
    "half_bridge_replay_1h": (Use("teacher_grpo", "1h"), *_bridge("1h"), Use("student_grpo", "1h")),
    "half_sft_teacher_bridge": (Use("teacher_sft", "1h"), *_bridge("1h")),
    "half_sft_teacher_bridge_grpo_2h": (Use("teacher_sft", "1h"), *_bridge("1h"),
                                        Use("student_grpo", "2h")),
    "half_sft_teacher_bridge_replay_1h": (Use("teacher_sft", "1h"), *_bridge("1h"),
                                          Use("student_grpo", "1h")),
    "half_opd_grpo_2h": (Use("teacher_grpo", "1h"), Use("reverse_kl", "1h", _BRIDGE),
                         Use("student_grpo", "2h")),
    # SFT on one half of the prompts, and the student's own samples on the other.
    "half_sft_opd": (Use("teacher_grpo", "1h"), Use("sft", "1h", ("forward_kl",)),
                     Use("reverse_kl", "2h")),
    "half_sft_grpo_2h": (Use("teacher_grpo", "1h"), Use("sft", "1h", _BRIDGE),
                         Use("student_grpo", "2h")),
    "self_distilled": (Use("self_distillation", "all"),),
}

# Arms whose students must train by equal budgets, `budget.Budget`. An exploratory arm that is left
# out of this list may make any number of updates.
COMPARED = tuple(arm for arm in ARMS if arm != "self_distilled")


def plan(config: ConfigDict, task: Task, stages: tuple[Stage, ...] = STAGES,
         arms: Mapping[str, Arm] = ARMS, compared: tuple[str, ...] = COMPARED) -> Plan:
  """The checked plan of a config; nothing is written.

  Args:
    config: as configs/arithmetic.py makes it.
    task: the problems and their reward.
    stages, arms: the tables of this file, or your own.
    compared: names of the arms that must have equal budgets.

  Raises:
    InputError: the config is wrong; the message names the key and the remedy.
  """
  for name, hp in config.stages.items() if task.reward is None else ():
    # Before the plan, which names the reward in the stage's hash.
    ahead = hp.get("foresee") or {}
    # With a chance in place of a rule nothing is scored.
    if ahead.get("signal") == "reward" and isinstance(ahead.get("accept"), str):
      raise InputError(f"config.stages.{name}.foresee has the signal 'reward' and the task has no "
                       "reward: set it to 'kl', or give the task one.")
    if "right" in str(hp.get("keep", "")):
      raise InputError(f"config.stages.{name}.keep has \"right\" and the task has no reward: leave "
                       "it out, or give the task one.")
  laid_out = planning.plan(config, task, stages, arms, compared)
  _check_budgets(laid_out, compared)
  return laid_out


def check_devices(config: ConfigDict) -> None:
  """Refuses settings that this process's devices do not have: `config.offload`, `config.remat`.

  A plan is made without it, because another machine may run it.

  Raises:
    InputError: names the key, the device and the remedy.
  """
  placement.check_devices(config, jax.local_devices())
  remat.check_memory(config.remat, hosts.local_memory())


def plan_without_problems(config: ConfigDict) -> Plan:
  """The plan of a config whose problems and weights are not at hand.

  Raises:
    InputError: as `plan`, from config, `config.json` and tokenizers alone.
  """
  laid_out = planning.without_problems(config, STAGES, ARMS)
  _check_budgets(laid_out, COMPARED)
  return laid_out


def _check_budgets(laid_out: Plan, compared: tuple[str, ...]) -> None:
  """Refuses a plan whose compared arms have unequal budgets."""
  budget.check_equal(budget.configured(laid_out), compared,
                     "by their config: give them equal steps, prompts and samples, or leave one "
                     "out of recipe.COMPARED")


def run(config: ConfigDict, workdir: epath.PathLike, task: Task,
        stages: tuple[Stage, ...] = STAGES, arms: Mapping[str, Arm] = ARMS,
        compared: tuple[str, ...] = COMPARED) -> Plan:
  """Trains every arm of config.arms under `workdir`, scores it, and returns the Plan.

  A second call skips finished stages and resumes an unfinished one. Runs on the mesh of
  `jax.set_mesh`. Arguments are those of `plan`.

  Raises:
    InputError: as `plan` and `walk.check_folders`, before anything is written.
    SystemExit: code `hosts.RETRY` after a stop signal, with everything saved.
  """
  checked = plan(config, task, stages, arms, compared)
  check_devices(config)
  walk.check_folders(checked, workdir)
  with program_cache.opened(config.compilation_cache):
    walk.run(checked, workdir)
  return checked
