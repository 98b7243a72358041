"""What arms that are compared hold equal, and which labels they may spend: asserted, not assumed.

Each is checked twice where it can be: from the config before anything runs, and from the ledgers of
what did run.
"""

from typing import NamedTuple

from s2d_jax import checkpoint


class Budget(NamedTuple):
  """What a contrast holds equal: optimizer updates of the student and sequences they learned from,
  under a dense signal (a teacher's distribution or samples) and under reward."""
  dense_updates: int = 0
  dense_sequences: int = 0
  rewarded_updates: int = 0
  rewarded_sequences: int = 0


def configured(made):
  """{arm: Budget} of a `recipe.Plan`, as its config has it."""
  def part(node):
    hp = node.hp
    return _part(node, hp.steps * hp.epochs * hp.minibatches,
                 hp.steps * hp.prompts * hp.sampling.samples_per_prompt)
  return _by_arm(made, part)


def spent(made, workdir):
  """{arm: Budget} of a plan whose stages are finished, from their ledgers."""
  def part(node):
    ledger = checkpoint.read_json(workdir / node.name / "ledger.json")
    return _part(node, ledger["updates"], ledger["sequences"])
  return _by_arm(made, part)


def _part(node, updates, sequences):
  """A stage's part of its arm's Budget: none where it does not train the student."""
  if node.stage.learner != "student":
    return Budget()
  return Budget(0, 0, updates, sequences) if node.stage.reward else Budget(updates, sequences)


def _by_arm(made, part):
  parts = {arm: [part(made.nodes[name]) for name in names] for arm, names in made.arms.items()}
  return {arm: Budget(*map(sum, zip(Budget(), *found, strict=True)))
          for arm, found in parts.items()}


def check_equal(budgets, matched, how):
  """Asserts that arms which are compared train their students equally.

  Args:
    budgets: {arm: Budget}; matched: groups of arms that must be equal; how: ends the sentence.

  Raises:
    ValueError: two arms of one group have unequal budgets.
  """
  for group in matched:
    arms = [arm for arm in group if arm in budgets]
    for arm in arms[1:]:
      if budgets[arm] != budgets[arms[0]]:
        raise ValueError(f"{arms[0]} and {arm} are compared and have unequal budgets "
                         f"({budgets[arms[0]]} and {budgets[arm]}) {how}.")


def check_labels(made, arm, workdir):
  """Asserts from the ledgers that no stage used a label outside its split, nor 2H before its turn.

  Raises:
    ValueError: a ledger breaks the arm's split.
  """
  held_out = {p.id for p in made.prompts["2h"]}
  for name in made.arms[arm]:
    node, ledger = made.nodes[name], checkpoint.read_json(workdir / name / "ledger.json")
    stray = set(ledger["labels"]) - {p.id for p in made.prompts[node.split]}
    if stray:
      raise ValueError(f"{name} of {arm} spent the label {min(stray)}, which is not in its split "
                       f"{node.split}: delete the stage's folder and run it again.")
    for parent in made.ancestors(name)[:-1] if node.split == "2h" else ():
      leaked = held_out & set(checkpoint.read_json(workdir / parent / "ledger.json")["labels"])
      if leaked:
        raise ValueError(f"{parent} spent the held-out label {min(leaked)} before {name}: in "
                         f"config.arms {arm} is not a half_* arm, so give it another split.")
