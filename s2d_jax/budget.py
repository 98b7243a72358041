"""Asserts that compared arms train by equal budgets, and that no label is used outside its split.

Budgets are checked twice: from the config before anything runs, and from the ledgers of finished
stages.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
from etils import epath

from s2d_jax import files
from s2d_jax.errors import InputError
from s2d_jax.planning import Node, Plan


class Part(NamedTuple):
  """Optimizer updates of the student, and sequences they learned from."""
  updates: int = 0
  sequences: int = 0


class Budget(NamedTuple):
  """The training of an arm's student, in two parts.

  Two arms of a contrast must be equal in each part that both have. A bridge has the dense part,
  cold GRPO the rewarded part and the full workflow both. Either therefore differs from the full
  workflow by the other part alone.
  """
  dense: Part = Part()     # under a teacher's distribution or samples
  rewarded: Part = Part()  # under reward


def configured(plan: Plan) -> dict[str, Budget]:
  """{arm: Budget} of a plan, as its config sets it."""
  def part(node: Node) -> Budget:
    hp = node.hp
    return _part(node, hp.steps * hp.epochs * hp.minibatches,
                 hp.steps * hp.prompts * hp.sampling.samples_per_prompt)
  return _by_arm(plan, part)


def spent(plan: Plan, workdir: epath.Path) -> dict[str, Budget]:
  """{arm: Budget} of a plan whose stages are finished, from their ledgers."""
  def part(node: Node) -> Budget:
    ledger = files.read_json(workdir / node.name / "ledger.json")
    return _part(node, ledger["updates"], ledger["sequences"])
  return _by_arm(plan, part)


def _part(node: Node, updates: int, sequences: int) -> Budget:
  """A stage's share of its arm's Budget: empty where it does not train the student."""
  # Arms differ in how their teachers are trained; only the students are compared.
  if node.stage.learner != "student":
    return Budget()
  part = Part(updates, sequences)
  return Budget(rewarded=part) if node.stage.reward else Budget(dense=part)


def _by_arm(plan: Plan, part: Callable[[Node], Budget]) -> dict[str, Budget]:
  """{arm: the sum of `part` over its nodes}."""
  found = {}
  for arm, names in plan.arms.items():
    # A Budget is a tree of numbers, which are summed one by one. An arm may have no nodes.
    budgets = [Budget(), *(part(plan.nodes[name]) for name in names)]
    found[arm] = jax.tree.map(lambda *numbers: sum(numbers), *budgets)
  return found


def check_equal(budgets: Mapping[str, Budget], compared: Collection[str], remedy: str) -> None:
  """Asserts that compared arms train their students equally, part by part.

  Args:
    budgets: of each arm.
    compared: names of the arms that are compared, any two of them.
    remedy: ends the error message.

  Raises:
    InputError: two arms have a part that is not equal.
  """
  for part in Budget._fields:
    # An arm without a part is compared in the other one alone.
    found = {arm: getattr(budget, part) for arm, budget in budgets.items()
             if arm in compared and getattr(budget, part) != Part()}
    # Equality is transitive, so every arm is held against the first.
    first = next(iter(found), None)
    for arm, part_budget in found.items():
      if part_budget != found[first]:
        raise InputError(f"{first} and {arm} are compared and have unequal {part} budgets "
                         f"({found[first]} and {part_budget}) {remedy}.")


def check_labels(plan: Plan, arm: str, workdir: epath.Path) -> None:
  """Asserts from the ledgers that no stage used a label outside its split.

  A label of the split 2h must also not be used by any stage before one that learns from 2h.

  Raises:
    InputError: a ledger breaks the arm's split.
  """
  held_out = {p.id for p in plan.prompts["2h"]}
  for name in plan.arms[arm]:
    node = plan.nodes[name]
    ledger = files.read_json(workdir / name / "ledger.json")
    stray = set(ledger["labels"]) - {p.id for p in plan.prompts[node.split]}
    if stray:
      raise InputError(f"{name} of {arm} spent the label {min(stray)}, which is not in its split "
                       f"{node.split}: delete the stage's folder and run it again.")
    # Each ancestor may keep to its own split and still have used labels that 2h holds out, where
    # that split is "all".
    for parent in plan.ancestors(name)[:-1] if node.split == "2h" else ():
      leaked = held_out & set(files.read_json(workdir / parent / "ledger.json")["labels"])
      if leaked:
        raise InputError(f"{parent} spent the held-out label {min(leaked)} before {name}: in "
                         f"config.arms {arm} is not a half_* arm, so give it another split.")
