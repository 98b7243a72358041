"""Turns a config into a checked plan: a graph of stages, each named by a hash of its inputs.

Arms that begin with equal stages share nodes. All is checked here, before anything is written.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2d_jax import (
  allocate,
  chat,
  combinations,
  doctor,
  foresee,
  guides,
  hints,
  keys,
  manifest,
  models,
  rollouts,
  sampler,
  selection,
  splits,
)
from s2d_jax import bases as base_folders
from s2d_jax.data import prompts as data_prompts
from s2d_jax.errors import InputError, from_user_code
from s2d_jax.identity import identity_of
from s2d_jax.models import hf
from s2d_jax.objectives import Objective
from s2d_jax.rollouts import Prompt


class Stage(NamedTuple):
  """A kind of training: the model that samples, the one that learns, its guide, its objective."""
  name: str
  actor: str           # a name of rollouts.SOURCES: "teacher" or "student" samples, or "given"
  learner: str         # the model that is trained, "teacher" or "student"
  guide: str | None    # scored on the same tokens: "teacher", or "reference", the learner's start
  objective: Objective
  reward: bool = False  # whether the samples' rewards are read, and so labels are spent
  prompt_weights: Callable[[np.ndarray], np.ndarray] | None = None  # of the start's pass rates

  @property
  def source(self) -> rollouts.Source:
    """Where the stage's rollouts come from."""
    return rollouts.SOURCES[self.actor]

  @property
  def on_policy(self) -> bool:
    """Whether the learner is the model that samples."""
    return self.source.model == self.learner

  @property
  def label_use(self) -> rollouts.LabelUse:
    """How the stage spends labels: rewards in each step, pass rates once, its source as it says."""
    if self.reward:
      return "each_step"
    # A pass rate reads a label once: later steps weight the prompt by the rate that was measured.
    if self.prompt_weights is not None and self.source.label_use == "none":
      return "once"
    return self.source.label_use


class Use(NamedTuple):
  """A stage in an arm."""
  stage: str
  labels: str                        # "all", or one of the fixed halves "1h" and "2h"
  steps_from: tuple[str, ...] = ()   # stages whose steps it makes in sum, instead of its own


Arm = tuple[Use, ...]


class Task(NamedTuple):
  """The problems, their chat messages and the reward of an answer.

  A reward may have an attribute `submit`, which returns the reward or a future of it.
  """
  source: Callable[[str], Sequence[dict]]  # split -> {"id", "problem", "answer"[, "solution"]}
  messages: Callable[[dict], list[dict]]   # problem -> chat messages
  reward: Callable[[dict, str], float]     # (problem, text); an evaluation counts 1 or more right
  answer: Callable[[str], str | None] | None = None  # text -> one spelling of its answer, for maj@k
  # answer -> a response of reward 1, by which the answers of all problems are checked; None: not
  respond: Callable[[str], str] | None = None
  family: Callable[[Mapping], str] | None = None  # problem -> its kind, where problems have kinds
  # problem -> the chat messages that a guide reads in place of `messages` (`hints`)
  hint: Callable[[dict], list[dict]] | None = None

  def checker(self) -> dict[str, Any]:
    """Names what checks and reads answers, with versions: scores of two checkers are unlike.

    A reward that runs other packages names them in its attribute `packages`.
    """
    packages = getattr(self.reward, "packages", ())
    return {"reward": identity_of(self.reward),
            "answer": identity_of(self.answer) if self.answer is not None else None,
            "packages": {name: importlib.metadata.version(name) for name in packages}}


class Node(NamedTuple):
  """A stage placed in an arm. A role is "teacher" or "student" (a base model) or a node's name."""
  name: str            # of its folder: the stage and a hash of `inputs`
  stage: Stage
  split: str
  actor: str | None    # role; None where the learner samples, or no model does
  learner: str         # role
  guide: str | None    # role
  hp: ConfigDict       # the stage's config, its steps as the arm has them
  inputs: dict         # all that determines its result
  hint_of: Mapping[int, tuple[int, ...]] | None = None  # the guide's own prompts, by problem id
  guide_of: Mapping[int, str] | None = None  # of several guides the role, by problem id


class Plan(NamedTuple):
  """A checked config, with its problems, base models and the nodes of its arms."""
  config: ConfigDict
  task: Task | None                     # None in a plan without problems
  chat: chat.Chat
  # by split; "all", "1h" and "2h" are the labelled ones; {} in a plan without problems
  prompts: dict[str, list[Prompt]]
  problems: dict[int, dict]             # by id, over all splits
  bases: dict[str, dict[str, str]]      # "teacher", "student" -> {"folder", "identity"}
  compared: tuple[str, ...]             # arms that must train their students by equal budgets
  nodes: dict[str, Node]                # by name, parents first
  arms: dict[str, list[str]]            # arm -> names of its nodes
  scored: dict[str, dict[str, str]]     # arm -> {label in the table: role whose weights it scores}
  # by split: its "problems", their "sha256", those "among_labelled" and "left_out", its origin
  sets: Mapping[str, dict[str, Any]] = MappingProxyType({})

  def reward(self, prompt_id: int, ids: Sequence[int]) -> float | Future[float]:
    """The task's reward of a response or a future of it, from a problem's id and the tokens."""
    submit = getattr(self.task.reward, "submit", self.task.reward)
    return rollouts.checked_reward(submit, self.problems[prompt_id], self.chat.decode(ids))

  @property
  def family(self) -> Callable[[int], str] | None:
    """The kind of a problem, from its id; None where the task has no kinds."""
    if self.task is None or self.task.family is None:
      return None
    def family(prompt_id: int) -> str:
      with from_user_code(f"the task's family of problem {prompt_id}"):
        return self.task.family(self.problems[prompt_id])
    return family

  @property
  def answer(self) -> Callable[[Sequence[int]], str | None] | None:
    """The task's answer of a response, from its tokens; None where the task has none."""
    if self.task.answer is None:
      return None
    return lambda ids: self.task.answer(self.chat.decode(ids))

  def task_identity(self) -> list:
    """The task's name and its functions for a hash."""
    return [self.config.task, *map(identity_of, (self.task.messages, self.task.reward))]

  def identity(self, role: str) -> str:
    """The name of a role's weights: the base folder's identity, or the node's name."""
    return self.bases[role]["identity"] if role in self.bases else role

  def base(self, role: str) -> dict[str, str]:
    """The base folder that a role's weights descend from, and its identity."""
    return self.bases[role if role in self.bases else self.nodes[role].stage.learner]

  def ancestors(self, role: str | None) -> list[str]:
    """Names of every node behind a role's weights, parents first, itself last."""
    if role in self.bases or role is None:
      return []
    node = self.nodes[role]
    # A node can be reached by several ways: the guide of one stage is often the actor of another.
    found: list[str] = []
    for parent in (node.actor, node.guide, node.learner):
      found += [name for name in self.ancestors(parent) if name not in found]
    return [*found, role]


def plan(config: ConfigDict, task: Task, stages: Sequence[Stage], arms: Mapping[str, Arm],
         compared: tuple[str, ...]) -> Plan:
  """Checks a config and lays out the nodes of its arms.

  Args:
    config: as configs/arithmetic.py makes it.
    task: the problems and their reward.
    stages, arms: the tables.
    compared: arms that must train their students by equal budgets.

  Raises:
    InputError: the config is wrong; the message names the key and the remedy.
  """
  table = {stage.name: stage for stage in stages}
  doctor.check_config(config, table)
  # Scores are named by these at the end of a run, when a refusal would be late.
  for function in (task.messages, task.reward, task.answer):
    if function is not None:
      identity_of(function)
  chosen = _chosen_arms(config, arms)
  for arm in chosen:
    combinations.check_arm(arm, [config.stages[name].steps for use in arms[arm]
                                 for name in (use.stage, *use.steps_from)])
  tokenizer, bases = _load_pair(config)
  prompts, problems, sets = splits.load(config, task, tokenizer)
  # A share is chosen by a hash of the id, so a smaller share of labels is part of a larger one.
  ids = np.array([p.id for p in prompts["labelled"]])
  labelled_P = data_prompts.share(ids, config.half_seed, config.label_share)
  labelled = [p for p, label in zip(prompts["labelled"], labelled_P, strict=True) if label]
  prompts |= splits.halves(labelled, config.half_seed)
  empty = Plan(config, task, tokenizer, prompts, problems, bases, compared, {}, {}, {}, sets)
  return _laid_out(empty, table, arms, chosen)


def without_problems(config: ConfigDict, stages: Sequence[Stage],
                     arms: Mapping[str, Arm]) -> Plan:
  """The nodes and scores of a config's arms, where problems and weights are not at hand.

  Names are not those of a run's folders. Of several such plans, equal names mean equal stages.

  Raises:
    InputError: as `plan`, from what can be checked without problems and weights.
  """
  table = {stage.name: stage for stage in stages}
  doctor.check_config(config, table)
  chosen = _chosen_arms(config, arms)
  tokenizer = _checked_pair(config, sampler.read_description)
  bases = {role: {"folder": folder, "identity": folder}
           for role, folder in guides.folders(config).items()}
  empty = Plan(config, None, tokenizer, {}, {}, bases, (), {}, {}, {})
  return _laid_out(empty, table, arms, chosen)


def _laid_out(empty: Plan, table: Mapping[str, Stage], arms: Mapping[str, Arm],
              chosen: Sequence[str]) -> Plan:
  """A Plan with the nodes and scores of the chosen arms."""
  nodes: dict[str, Node] = {}
  arm_nodes: dict[str, list[str]] = {}
  scored: dict[str, dict[str, str]] = {}
  for arm in chosen:
    # The weights that each name stands for so far: a stage moves its learner's.
    current = {"teacher": "teacher", "student": "student"}
    arm_nodes[arm] = []
    for use in arms[arm]:
      node = _node(empty, table[use.stage], use, current)
      if node is not None:
        # An equal name means equal inputs, so arms with equal beginnings meet in one node.
        nodes.setdefault(node.name, node)
        arm_nodes[arm].append(node.name)
        current[node.stage.learner] = node.name
    scored[arm] = {arm: current["student"]}
  # Teachers are scored beside the untrained models, as they belong to no one arm.
  if "untrained" in chosen:
    teachers = {f"teacher after {node.stage.name} ({node.split})": name
                for name, node in nodes.items() if node.stage.learner == "teacher"}
    untrained = {"untrained student": "student", "untrained teacher": "teacher"}
    scored["untrained"] = untrained | teachers
  return empty._replace(nodes=nodes, arms=arm_nodes, scored=scored)


def _load_pair(config: ConfigDict) -> tuple[chat.Chat, dict[str, dict[str, str]]]:
  """The tokenizer that teacher and student share, and each base's folder and identity, checked."""
  base_folders.prepare(config)
  bases = {role: {"folder": folder, "identity": hf.identity(folder)}
           for role, folder in guides.folders(config).items()}
  return _checked_pair(config, sampler.read_folder), bases


def _checked_pair(config: ConfigDict,
                  read: Callable[..., tuple[models.Config, chat.Chat]]) -> chat.Chat:
  """The tokenizer that teacher and student share, checked; `read` reads a model's folder."""
  run = {key: config[key] for key in models.RUN}
  teacher, student = (read(config[role], dict(config.template), run)
                      for role in ("teacher", "student"))
  doctor.check_pair(config, teacher, student)
  hints.check_windows(config)
  guides.check_models(config, student, lambda folder: read(folder, dict(config.template), run))
  return teacher[1]


def _chosen_arms(config: ConfigDict, arms: Mapping[str, Arm]) -> list[str]:
  """The arms of config.arms, each once; "all" is every arm whose stages the config has."""
  # An arm that is named twice is trained once.
  names = config.arms.split(",")
  if config.arms == "all":
    # A stage that no shipped config has, such as self_distillation, is an option of one's own.
    names = [arm for arm, uses in arms.items() if all(use.stage in config.stages for use in uses)]
  chosen = list(dict.fromkeys(name.strip() for name in names if name.strip()))
  for arm in chosen:
    if arm not in arms:
      raise InputError(f"there is no arm {arm!r}: choose config.arms from {', '.join(arms)}.")
    for use in arms[arm]:
      if use.labels not in ("all", "1h", "2h"):
        raise InputError(f"the arm {arm} gives {use.stage} the labels {use.labels!r}: choose all, "
                         "1h or 2h.")
      for needed in (use.stage, *use.steps_from):
        if needed not in config.stages:
          raise InputError(f"the arm {arm} needs config.stages.{needed}: add it, or drop the arm.")
  if not chosen:
    raise InputError(f"config.arms is empty: choose from {', '.join(arms)}.")
  return chosen


def parents(stage: Stage, hp: ConfigDict, current: Mapping[str, str]) -> dict[str, str | None]:
  """The roles of a stage's "actor", "learner" and "guide" models.

  The actor is None where the learner samples, or no model does. The guide is None where the stage
  has none, or its objective does not read it, as with a KL penalty of weight 0.

  Args:
    current: the role that "teacher" and "student" stand for before the stage.
  """
  learner = current[stage.learner]
  actor = None
  if stage.source.model is not None and not stage.on_policy:
    actor = current[stage.source.model]
  # A guide that the loss does not read must not rename the stage, and need not be loaded.
  guide = None
  if stage.guide is not None and stage.objective.uses_guide(hp):
    guide = learner if stage.guide == "reference" else current[stage.guide]
  return {"actor": actor, "learner": learner, "guide": guide}


def _node(plan: Plan, stage: Stage, use: Use, current: Mapping[str, str]) -> Node | None:
  """A stage with the weights that an arm has so far, or None for a stage of 0 steps."""
  config = plan.config
  hp = config.stages[stage.name]
  # An arm without one stage of the bridge makes the steps of both, to be equal in updates.
  if use.steps_from:
    hp = hp.copy_and_resolve_references()
    with hp.unlocked():
      hp.steps = sum(config.stages[name].steps for name in use.steps_from)
  if hp.steps == 0:
    return None
  doctor.check_profile(config, stage.name, hp.steps)
  hint_of = guide_of = None
  if plan.prompts:
    _check_problems(plan, stage, hp, use.labels)
    guide_of = guides.chosen(f"config.stages.{stage.name}", hp, plan.task, plan.prompts[use.labels],
                             plan.problems)
    hint_of = hints.rendered(f"config.stages.{stage.name}", hp, plan.task,
                             plan.prompts[use.labels], plan.problems, plan.chat)
  roles = parents(stage, hp, current)
  inputs = _inputs(plan, stage, use.labels, hp, roles, hint_of)
  inputs |= guides.inputs(hp, guide_of, plan.identity)
  name = manifest.name(stage.name, inputs)
  return Node(name, stage, use.labels, roles["actor"], roles["learner"], roles["guide"], hp, inputs,
              hint_of, guide_of)


def _check_problems(plan: Plan, stage: Stage, hp: ConfigDict, split: str) -> None:
  """Refuses a split of fewer problems than a step takes, or without the texts of the source."""
  prompts = plan.prompts[split]
  with keys.prefixed(f"config.stages.{stage.name}."):
    combinations.check_problems(hp, len(prompts), split)
    if "allocate" in hp:
      allocate.check_families(hp, split, plan.family, prompts,
                              plan.prompts[plan.config.probe.split])
  for key in stage.source.texts:
    doctor.check_texts(f"config.stages.{stage.name}", key, hp.sampling.max_tokens, prompts,
                       plan.problems, plan.chat, plan.config.data.get("leave_out"))


def _inputs(plan: Plan, stage: Stage, split: str, hp: ConfigDict,
            roles: Mapping[str, str | None],
            hint_of: Mapping[int, tuple[int, ...]] | None) -> dict:
  """All that determines a stage's result up to rounding; its folder's name is a hash of it."""
  # The hash holds answers only where the stage reads rewards, and solutions only where it trains on
  # them: others must not rename it.
  checked = (stage.reward or stage.prompt_weights is not None or selection.reads_labels(hp)
             or foresee.reads_labels(hp))
  facts: list[Any] = []
  if not plan.prompts:
    # In place of the problems stands all of the config that chooses them.
    config = plan.config
    facts = [config.task, config.data.to_dict(), config.prompt_tokens, config.label_share]
    if split != "all" or config.label_share < 1:
      facts.append(config.half_seed)
  for p in plan.prompts.get(split, ()):
    problem = plan.problems[p.id]
    texts = [problem[key] for key in stage.source.texts] or [None]
    hint = [] if hint_of is None else [hint_of[p.id]]
    facts.append((p.id, p.tokens, problem["answer"] if checked else None, *texts, *hint))
  # A source of our own at its first version is named by the row alone.
  source = identity_of(getattr(stage.source.make, "__self__", stage.source.make))
  return {
      **({} if source[2] == 1 else {"source": source}), **foresee.inputs(hp),
      **allocate.inputs(hp, plan.prompts.get(split), plan.prompts.get(plan.config.probe.split),
                        plan.family),
      "row": {field: getattr(stage, field) for field in manifest.ROW},
      "objective": [identity_of(stage.objective.loss), stage.objective.version],
      "prompt_weights": stage.prompt_weights and identity_of(stage.prompt_weights),
      "task": plan.task_identity() if checked and plan.task else None,
      "config": keys.hashed(hp, doctor.stage_keys(stage)),
      "seed": plan.config.seed, "dtype": plan.config.dtype, "cache": plan.config.sampler.cache,
      "tokenizer": plan.chat.fingerprint(),
      "split": {"name": split, "problems": manifest.digest(facts)},
      "parents": {name: role and plan.identity(role) for name, role in roles.items()}}
