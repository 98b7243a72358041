"""The recipe as tables, Stage, Arm and Task, and the walk over stages that makes an arm.

A stage says who samples, who learns and who guides, and by which objective. An arm is a short list
of stages, each with the labels it may use. A stage's folder is named by a hash of all that
determines its result, so arms that share a prefix share the work, a finished stage is skipped and
an unfinished one goes on. A user's own data, reward, stages or arms are arguments of `run`.
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from s2d_jax import budget, chat, checkpoint, doctor, manifest, objectives, stage, train
from s2d_jax.data import prompts as order
from s2d_jax.data import sources
from s2d_jax.rewards import arithmetic as arithmetic_reward
from s2d_jax.rewards import math as math_reward


class Stage(NamedTuple):
  """One row of the recipe."""
  name: str
  actor: str           # whose samples: "teacher", "student", or "given" solutions
  learner: str         # whose weights move: "teacher" or "student"
  guide: str | None    # scored on the same tokens: "teacher", or "reference", the learner's start
  objective: Callable
  reward: bool         # True where the samples' rewards are consulted, and so labels are spent
  weigh: Callable | None = None  # pass rates of the learner's start -> a weight for each prompt


class Task(NamedTuple):
  """The problems, how they are asked and how answers are checked."""
  source: Callable    # split -> sequence of {"id", "problem", "answer"[, "solution"]}
  messages: Callable  # problem -> chat messages
  reward: Callable    # (problem, text) -> float; an evaluation calls 1 or more right


STAGES = (
    Stage("teacher_grpo", "teacher", "teacher", "reference", objectives.clipped_surrogate, True),
    Stage("teacher_sft", "given", "teacher", None, objectives.negative_log_likelihood, False),
    Stage("forward_kl", "teacher", "student", "teacher", objectives.forward_kl, False),
    Stage("weighted_fkl", "teacher", "student", "teacher", objectives.forward_kl, False,
          objectives.learnable),
    Stage("sft", "teacher", "student", None, objectives.negative_log_likelihood, False),
    Stage("reverse_kl", "student", "student", "teacher", objectives.reverse_kl, False),
    Stage("student_grpo", "student", "student", "reference", objectives.clipped_surrogate, True),
)

# Each row with the labelled problems it draws, "all" or the fixed halves "1h" and "2h", and where
# it is not its own, the rows whose steps it takes: arms that leave a half of the bridge out make as
# many updates as the whole.
BRIDGE = ("forward_kl", "reverse_kl")


def _bridge(split):
  return tuple((row, split) for row in BRIDGE)


ARMS = {
    "untrained": (),
    "cold_grpo": (("student_grpo", "all"),),
    "cold_grpo_2h": (("student_grpo", "2h"),),
    "raw_bridge": _bridge("all"),
    "bridge": (("teacher_grpo", "all"), *_bridge("all")),
    "opd_only": (("teacher_grpo", "all"), ("reverse_kl", "all", BRIDGE)),
    "sft_only": (("teacher_grpo", "all"), ("sft", "all", BRIDGE)),
    "fkl_only": (("teacher_grpo", "all"), ("forward_kl", "all", BRIDGE)),
    "weighted_fkl": (("teacher_grpo", "all"), ("weighted_fkl", "all", BRIDGE)),
    "sft_teacher_bridge": (("teacher_sft", "all"), *_bridge("all")),
    "half_bridge": (("teacher_grpo", "1h"), *_bridge("1h")),
    "half_bridge_grpo_2h": (("teacher_grpo", "1h"), *_bridge("1h"), ("student_grpo", "2h")),
    "half_bridge_replay_1h": (("teacher_grpo", "1h"), *_bridge("1h"), ("student_grpo", "1h")),
    "half_opd_grpo_2h": (("teacher_grpo", "1h"), ("reverse_kl", "1h", BRIDGE),
                         ("student_grpo", "2h")),
    "half_sft_grpo_2h": (("teacher_grpo", "1h"), ("sft", "1h", BRIDGE), ("student_grpo", "2h")),
}

COMPARED = tuple(ARMS)  # so each trains its student by the budget of the others, `budget.Budget`


def arithmetic(config):
  """Chained addition modulo 100, prepared under config.data.dir the first time."""
  doctor.check_keys("config.data", config.data, ("dir",))
  folder = os.path.expanduser(config.data.dir)
  return Task(lambda split: sources.tfds_source("arithmetic", split, folder),
              lambda problem: [{"role": "user", "content": problem["problem"]}],
              arithmetic_reward.reward)


def math(config):
  """Problems of JSON-lines files, config.data[split], answered in the last \\boxed{}."""
  ask = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
  def source(split):
    if split not in config.data:
      raise ValueError(f"config.data names no split {split!r}: add its file, or choose from "
                       f"{', '.join(config.data)}.")
    return sources.solved(sources.jsonl(config.data[split]), config.data.get("solutions"))
  return Task(source, lambda problem: [{"role": "user", "content": problem["problem"] + ask}],
              math_reward.reward)


TASKS = {"arithmetic": arithmetic, "math": math}  # what config.task may say


def task(config):
  """The Task that config.task names; a task of your own goes to `run` directly.

  Raises:
    ValueError: an unknown name, or a key that config or config.data lacks.
  """
  doctor.check_keys("config", config, doctor.TOP)
  if config.task not in TASKS:
    raise ValueError(f"config.task is {config.task!r}: choose {' or '.join(TASKS)}, or call "
                     "recipe.run with a Task of your own.")
  return TASKS[config.task](config)


# What a stage's result does not depend on, up to rounding and logging.
UNHASHED = ("microbatches", "block", "eval_every", "save_every", "log_samples")


class Node(NamedTuple):
  """A stage in its place. A role is "teacher" or "student" (the base), or a node's name."""
  name: str            # of its folder: the row and a hash of `inputs`
  stage: Stage
  split: str
  actor: str | None    # None: the learner samples, or solutions are given
  learner: str
  guide: str | None
  hp: Any              # the row's config, its steps as the arm has them
  inputs: dict


class Plan(NamedTuple):
  """A checked config, and all that follows from it before anything runs or is written."""
  config: Any
  task: Task
  chat: chat.Chat
  prompts: dict   # split -> [rollout.Prompt]; "all", "1h" and "2h" are the labelled ones
  problems: dict  # id -> problem, over all splits
  bases: dict     # "teacher", "student" -> {"folder", "identity"}
  nodes: dict     # name -> Node, parents first
  arms: dict      # arm -> names of its nodes
  rows: dict      # arm -> {label: role}: whose weights the arm's rows in the table score

  def reward(self, prompt_id, ids):
    """The task's reward of a response, from a problem's id and the response's tokens."""
    return float(self.task.reward(self.problems[prompt_id], self.chat.decode(ids)))

  def task_identity(self):
    """What names the task's questions and checks: their functions, by name and source."""
    return [self.config.task, *map(source_of, (self.task.messages, self.task.reward))]

  def identity(self, role):
    """What names a role's weights: the base folder's identity, or the stage's name."""
    return self.bases[role]["identity"] if role in self.bases else role

  def base(self, role):
    """The base folder that a role's weights descend from, and its identity."""
    return self.bases[role if role in self.bases else self.nodes[role].stage.learner]

  def ancestors(self, role):
    """Names of every stage behind a role's weights, parents first, itself last."""
    if role in self.bases or role is None:
      return []
    node, found = self.nodes[role], []
    for parent in (node.actor, node.guide, node.learner):
      found += [name for name in self.ancestors(parent) if name not in found]
    return [*found, role]


def plan(config, task, stages=STAGES, arms=ARMS):
  """Checks everything that can be wrong before anything is written, and lays out the walk.

  Args:
    config: an ml_collections ConfigDict such as configs/arithmetic.py makes.
    task: the problems; stages, arms: the tables, ours or a user's.

  Raises:
    ValueError: one sentence that names what is wrong and the remedy.
  """
  table = {row.name: row for row in stages}
  doctor.check_config(config, table)
  chosen = list(dict.fromkeys(a.strip() for a in config.arms.split(",") if a.strip()))
  for arm in chosen:
    if arm not in arms:
      raise ValueError(f"there is no arm {arm!r}: choose config.arms from {', '.join(arms)}.")
    for row, _, *takes in arms[arm]:
      for needed in (row, *sum(takes, ())):
        if needed not in config.stages:
          raise ValueError(f"the arm {arm} needs config.stages.{needed}: add it, or drop the arm.")
  if not chosen:
    raise ValueError(f"config.arms is empty: choose from {', '.join(arms)}.")
  talk, bases = doctor.check_pair(config)
  prompts, problems = doctor.check_problems(config, task, talk)
  kept = order.share(np.array([p.id for p in prompts["labelled"]]), config.half_seed,
                     config.label_share)
  prompts |= _halves([p for p, k in zip(prompts["labelled"], kept, strict=True) if k],
                     config.half_seed)
  made = Plan(config, task, talk, prompts, problems, bases, {}, {}, {})
  for arm in chosen:
    at = {"teacher": "teacher", "student": "student"}
    placed = [_place(made, table[row], split, at, *takes) for row, split, *takes in arms[arm]]
    made.arms[arm] = [name for name in placed if name is not None]
    made.rows[arm] = {arm: at["student"]}
  if "untrained" in chosen:
    raw = {"untrained student": "student", "untrained teacher": "teacher"}
    shaped = {f"teacher after {node.stage.name} ({node.split})": name
              for name, node in made.nodes.items() if node.stage.learner == "teacher"}
    made.rows["untrained"] = raw | shaped
  budget.check_equal(budget.configured(made), COMPARED,
                     "by their config: give them equal steps, prompts and samples")
  return made


def source_of(function):
  """A function's module, name and source text (its own, not what it calls), for a hash.

  A partial is its function and arguments, another callable its class. Where there is no text (typed
  at a prompt), the compiled code stands for it.
  """
  if isinstance(function, functools.partial):
    return [source_of(function.func), repr(function.args), repr(sorted(function.keywords.items()))]
  if not (inspect.isroutine(function) or inspect.isclass(function)):
    function = type(function)
  try:
    text = inspect.getsource(function)
  except (OSError, TypeError):
    text = ""
    if inspect.isfunction(function):
      code = function.__code__
      text = f"{code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"
  return [function.__module__, function.__qualname__, text]


def _halves(labelled, seed):
  """{"all", "1h", "2h"}: the labelled prompts and their halves by a seeded hash of the id."""
  first = order.half(np.array([p.id for p in labelled]), seed)
  split = {"all": labelled, "1h": [p for p, f in zip(labelled, first, strict=True) if f],
           "2h": [p for p, f in zip(labelled, first, strict=True) if not f]}
  for name, prompts in split.items():
    if not prompts:
      raise ValueError(f"the split {name} has no problems: label more of them.")
  return split


def guided(row, hp):
  """Whether a row's objective looks at its guide: a KL penalty of no weight does not."""
  penalty = row.guide == "reference" and row.objective is objectives.clipped_surrogate
  return row.guide is not None and not (penalty and (hp.kl == "none" or hp.kl_coef == 0))


def _place(made, row, split, at, takes=()):
  """Adds a row's node to the plan, moves its learner in `at`, and returns the node's name.

  A row of 0 steps is left out: None. With `takes`, its steps are those of these rows together.
  """
  config, prompts = made.config, made.prompts[split]
  hp = config.stages[row.name]
  if takes:
    hp = hp.copy_and_resolve_references()
    with hp.unlocked():
      hp.steps = sum(config.stages[name].steps for name in takes)
  if hp.steps == 0:
    return None
  if hp.prompts > len(prompts):
    raise ValueError(f"config.stages.{row.name}.prompts is {hp.prompts} and the split {split} has "
                     f"{len(prompts)} problems: lower it.")
  if row.actor == "given":
    doctor.check_solutions(f"config.stages.{row.name}", hp.sampling.max_tokens, prompts,
                           made.problems, made.chat)
  learner = at[row.learner]
  actor = None if row.actor in ("given", row.learner) else at[row.actor]
  beside = learner if row.guide == "reference" else at.get(row.guide)
  guide = beside if guided(row, hp) else None
  checked = row.reward or row.weigh is not None
  facts = [(p.id, p.tokens, made.problems[p.id]["answer"] if checked else None,
            made.problems[p.id].get("solution") if row.actor == "given" else None)
           for p in prompts]
  inputs = {
      "row": [row.name, row.actor, row.learner, row.guide],
      "objective": source_of(row.objective), "weigh": row.weigh and source_of(row.weigh),
      "task": made.task_identity() if checked else None,
      "config": {k: v for k, v in hp.to_dict().items()
                 if k not in UNHASHED and not (k == "lora" and v["rank"] == 0)},
      "seed": config.seed, "dtype": config.dtype, "cache": config.sampler.cache,
      "tokenizer": made.chat.fingerprint(),
      "split": {"name": split, "problems": manifest.digest(facts)},
      "parents": {name: role and made.identity(role) for name, role in
                  (("actor", actor), ("learner", learner), ("guide", guide))}}
  name = manifest.name(row.name, inputs)
  made.nodes.setdefault(name, Node(name, row, split, actor, learner, guide, hp, inputs))
  at[row.learner] = name
  return name


def run(config, workdir, task, stages=STAGES, arms=ARMS):
  """Makes every arm of config.arms under `workdir` and scores it; returns the Plan.

  The same call again skips what is finished and goes on with what is not. Runs on the mesh of
  `jax.set_mesh`.

  Raises:
    ValueError: from `plan` and `check_folders`, before anything is written; then as `train.run`.
  """
  made = plan(config, task, stages, arms)
  check_folders(made, workdir)
  walk(made, workdir)
  return made


def check_folders(made, workdir):
  """Holds every folder of the plan that is there already, and every score, against its name.

  Raises:
    ValueError: a manifest disagrees with its folder's name, or is none.
  """
  workdir = epath.Path(workdir)
  there = (p.name for p in (workdir.iterdir() if workdir.exists() else ()))
  for name in (*made.nodes, *(n for n in there if n.startswith(("eval-", "probe-")))):
    manifest.read(workdir / name)


def walk(made, workdir):
  """Trains what is not finished, checks the labels spent, scores every row of every arm.

  Raises:
    SystemExit: code `train.RETRY`, told to stop, with everything saved.
  """
  workdir, probes = epath.Path(workdir), {}
  with train.termination() as stop:
    for name, node in made.nodes.items():
      before = _probe(made, node, node.learner, workdir)
      _warn(made, node, before, workdir)
      if manifest.read(workdir / name) is not None:
        checkpoint.drop_steps(workdir / name)  # where a kill came between the manifest and this
      else:
        stage.train_node(made, node, workdir, stop)
      after = None if node.stage.reward else _probe(made, node, name, workdir)
      probes[name] = {"stage": name, "before": before, "after": after}
      _leave(stop)
    budget.check_equal(budget.spent(made, workdir), COMPARED,
                       "by their ledgers: delete the stages of one and run it again")
    for arm in made.arms:
      budget.check_labels(made, arm, workdir)
      rows = []
      for label, role in made.rows[arm].items():
        rows.append({"label": label, "score": stage.evaluate(made, role, workdir),
                     "stages": made.ancestors(role)})
        _leave(stop)
      entry = {"arm": arm, "seed": made.config.seed, "rows": rows,
               "config": {k: v for k, v in made.config.to_dict().items()
                          if k not in ("arms", "seed", "mesh")},
               "probes": [probes[name] for name in made.arms[arm] if probes[name]["before"]]}
      path = workdir / "arms" / f"{manifest.name(arm, entry)}.json"
      if checkpoint.leader() and not path.exists():  # its age is its place in the report
        checkpoint.write_json(path, entry)
    checkpoint.barrier("arms")


def _leave(stop):
  if stop():
    raise SystemExit(train.RETRY)


def _probe(made, node, role, workdir):
  """The probe of a role beside a stage: with the stage's teacher where it distils one."""
  if node.stage.actor == "given":
    return None
  guide = None if node.stage.reward else node.guide or node.actor
  return stage.probe(made, role, guide, workdir)


def _warn(made, node, before, workdir):
  """Says before a stage begins that what the method asks for is not there."""
  if before is None:
    return
  found = checkpoint.read_json(workdir / before / "result.json")
  mixed = found["student"]["mixed_groups"]
  if node.stage.reward and mixed < 0.5:
    logging.warning("%s: %.0f %% of its groups of %d would be mixed, and the others teach nothing "
                    "(most groups are constant).", node.name, 100 * mixed, made.config.probe.group)
  guide = node.guide or node.actor
  if "teacher" in found and guide == "teacher":
    logging.warning("%s: its teacher is the untouched one, which no reward or solution has shaped.",
                    node.name)
  if "teacher" in found and guide in made.nodes:
    raw = checkpoint.read_json(workdir / stage.probe(made, "teacher", None, workdir)
                               / "result.json")["student"]["pass_rate"]
    if found["teacher"]["pass_rate"] <= raw:
      logging.warning("%s: its teacher solves %.1f %% of the probe's problems and the untouched "
                      "one %.1f %% (the teacher did not improve).", node.name,
                      100 * found["teacher"]["pass_rate"], 100 * raw)
