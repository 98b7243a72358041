"""The tasks that `config.task` may name: their problems, chat messages and rewards.

A task of your own is a `planning.Task` that you pass to `recipe.run`.
"""

import os
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from s2d_jax import doctor, keys
from s2d_jax.data import jsonl, leave_out, published, sources
from s2d_jax.data.arithmetic import problems as arithmetic_problems
from s2d_jax.data.composition import problems as composition_problems
from s2d_jax.data.word_problems import problems as word_problem_rows
from s2d_jax.errors import InputError
from s2d_jax.planning import Task
from s2d_jax.rewards import arithmetic as arithmetic_reward
from s2d_jax.rewards import math as math_reward

# Answered problems before the one to be solved: a small model follows them better than words.
EXAMPLES = (
    {"role": "system", "content": "Write the calculation, its result in \\boxed{}."},
    {"role": "user", "content": "Compute 3 + 4."},
    {"role": "assistant", "content": "3 + 4 = \\boxed{7}"},
    {"role": "user", "content": "Tom has 9 cups and breaks 3 of them. How many cups are left?"},
    {"role": "assistant", "content": "9 - 3 = \\boxed{6}"},
    {"role": "user", "content": "There are 2 bags with 4 nuts each. How many nuts are in all?"},
    {"role": "assistant", "content": "2 * 4 = \\boxed{8}"})


def _answered_before(problem: dict) -> list[dict]:
  """The problem, its answer as a turn, and the problem again."""
  # With the whole solution a response would exceed the positions of the embedded models.
  ask = {"role": "user", "content": problem["problem"]}
  return [ask, {"role": "assistant", "content": problem["answer"]}, ask]


def _with_solution(problem: dict) -> str:
  """The problem with its solution, or its answer where it has none, and what to do with it."""
  found = f"The answer is {problem['answer']}."
  if "solution" in problem:
    found = f"Here is a solution:\n\n{problem['solution']}"
  return f"{problem['problem']}\n\n{found}\n\nSolve the problem in your own words."


def _family(problem: dict) -> str:
  """The first column of `sources.FAMILIES` that the problem has.

  Raises:
    InputError: it has none.
  """
  for name in sources.FAMILIES:
    if name in problem:
      return problem[name]
  raise InputError(f"problem {problem['id']} names no family: give every problem a text under "
                   f"{' or '.join(sources.FAMILIES)}.")


def arithmetic(config: ConfigDict) -> Task:
  """Chained addition modulo 100, prepared under config.data.dir the first time."""
  keys.check_names("config.data", config.data, ("dir",))
  for name in doctor.TASK_KEYS:
    if name in config:
      raise InputError(f"config.{name} is not read by the task {config.get('task', 'arithmetic')}, "
                       "which compares digits: remove it.")
  folder = os.path.expanduser(config.data.dir)
  return Task(lambda split: sources.arithmetic(split, folder),
              lambda problem: [{"role": "user", "content": problem["problem"]}],
              arithmetic_reward.reward, arithmetic_reward.answer,
              family=arithmetic_problems.family, hint=_answered_before)


def composition(config: ConfigDict) -> Task:
  """Steps modulo 100 in the right order, prepared under config.data.dir the first time."""
  task = arithmetic(config)
  folder = os.path.expanduser(config.data.dir)
  return task._replace(source=lambda split: sources.composition(split, folder),
                       family=composition_problems.family)


def math(config: ConfigDict) -> Task:
  """Problems of config.data[split], as `sources.read` finds them, answered in \\boxed{}.

  The answer in the last box is checked by config.checker: "string" compares spellings, and
  "verify", the default, asks math-verify about answers that differ. config.list_order says whether
  the order of a list counts: "any", the default, or "fixed".

  Raises:
    InputError: an unknown checker or order, or a checker that is not installed.
  """
  if "grader" in config.data:
    raise InputError("config.data.grader was replaced by config.checker: remove it, and set "
                     "config.checker to 'string' or 'verify'.")
  checker = config.get("checker", "verify")
  order = config.get("list_order", "any")
  keys.check_value("config.checker", checker, keys.one_of(("string", "verify")))
  keys.check_value("config.list_order", order, keys.one_of(("any", "fixed")))
  # An optional package: without this check the first reward of a long run would fail.
  if checker == "verify" and not math_reward.INSTALLED:
    raise InputError("config.checker is 'verify' and math-verify is not installed: pip install "
                     "-e '.[math]', or set config.checker to 'string'.")
  # gap: the paper prints no prompt. Qwen3's model card recommends this sentence for mathematics.
  ask = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
  def source(split: str) -> Sequence[dict]:
    names = [name for name in config.data if name not in leave_out.NOT_SPLITS]
    if split not in names:
      raise InputError(f"config.data names no split {split!r}: add its file, or choose from "
                       f"{', '.join(names)}.")
    problems = sources.read(config.data[split], split, config.data.get("dir", ""))
    # Solutions that a stage learns from may be in a file of their own.
    if "solutions" not in config.data:
      return problems
    return sources.Problems(jsonl.solved(problems, config.data.solutions),
                            getattr(problems, "origin", None))
  reward, answer = _CHECKERS[checker, order]
  return Task(source, lambda problem: [{"role": "user", "content": problem["problem"] + ask}],
              reward, answer, lambda text: f"\\boxed{{{text}}}", family=_family,
              hint=lambda problem: [{"role": "user", "content": _with_solution(problem) + ask}])


# (config.checker, config.list_order) -> (reward, answer)
_CHECKERS = {
    ("string", "any"): (math_reward.reward, math_reward.answer),
    ("string", "fixed"): (math_reward.reward_in_order, math_reward.answer_in_order),
    ("verify", "any"): (math_reward.verified, math_reward.answer),
    ("verify", "fixed"): (math_reward.verified_in_order, math_reward.answer_in_order),
}


def word_problems(config: ConfigDict) -> Task:
  """Sums and word problems, answered in \\boxed{}; prepared under config.data.dir the first time.

  Raises:
    InputError: as `math`, whose answer check this is.
  """
  keys.check_names("config.data", config.data, ("dir",))
  folder = os.path.expanduser(config.data.dir)
  # Answers are whole numbers, of which the string match reads every spelling.
  checked = ConfigDict({"data": config.data, "checker": config.get("checker", "string"),
                        "list_order": config.get("list_order", "any")})
  return math(checked)._replace(
      source=lambda split: sources.word_problems(split, folder),
      messages=lambda problem: [*EXAMPLES, {"role": "user", "content": problem["problem"]}],
      family=word_problem_rows.family,
      hint=lambda problem: [*EXAMPLES, {"role": "user", "content": _with_solution(problem)}])


TASKS: dict[str, Callable[[ConfigDict], Task]] = {"arithmetic": arithmetic, "math": math,
                                                  "word_problems": word_problems,
                                                  "composition": composition}
# Where the sets of each task are by default, those of the worlds as in their configs.
FOLDERS = {"arithmetic": "~/.cache/s2d_jax/data", "math": "data",
           "word_problems": "~/.cache/s2d_jax/data", "composition": "~/.cache/s2d_jax/data"}
# The config.data of each task for sets that lie in one folder.
DATA: dict[str, Callable[[str, Sequence[str]], dict]] = {
    "arithmetic": lambda folder, sets: {"dir": folder},
    "word_problems": lambda folder, sets: {"dir": folder},
    "composition": lambda folder, sets: {"dir": folder},
    "math": lambda folder, sets: {"dir": folder} | {
        name: name if name in published.SOURCES else f"{folder}/{name}.jsonl" for name in sets},
}


def get(config: ConfigDict) -> Task:
  """The Task that config.task names.

  Raises:
    InputError: an unknown name, or a key that config or config.data lacks.
  """
  doctor.check_names(config)
  if config.task not in TASKS:
    raise InputError(f"config.task is {config.task!r}: choose {' or '.join(TASKS)}, or call "
                     "recipe.run with a Task of your own.")
  return TASKS[config.task](config)
