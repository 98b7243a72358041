"""What arms that are compared hold equal, and which labels they may spend: asserted, not assumed.

Each is checked twice where it can be: from the config before anything runs, and from the ledgers of
what did run.
"""

from typing import NamedTuple

from s2d_jax import files


class Part(NamedTuple):
  """Optimizer updates of the student, and sequences they learned from."""
  updates: int = 0
  sequences: int = 0


class Budget(NamedTuple):
  """What two arms of a contrast hold equal, each part where both arms have it.

  dense: under a teacher's distribution or samples; rewarded: under reward. A bridge has the first,
  cold GRPO the second, the full workflow both: against either it differs by the other part alone.
  """
  dense: Part = Part()
  rewarded: Part = Part()


def configured(made):
  """{arm: Budget} of a `planning.Plan`, as its config has it."""
  def part(node):
    hp = node.hp
    return _part(node, hp.steps * hp.epochs * hp.minibatches,
                 hp.steps * hp.prompts * hp.sampling.samples_per_prompt)
  return _by_arm(made, part)


def spent(made, workdir):
  """{arm: Budget} of a plan whose stages are finished, from their ledgers."""
  def part(node):
    ledger = files.read_json(workdir / node.name / "ledger.json")
    return _part(node, ledger["updates"], ledger["sequences"])
  return _by_arm(made, part)


def _part(node, updates, sequences):
  """A stage's part of its arm's Budget: none where it does not train the student."""
  if node.stage.learner != "student":
    return Budget()
  part = Part(updates, sequences)
  return Budget(rewarded=part) if node.stage.reward else Budget(dense=part)


def _by_arm(made, part):
  return {arm: add(part(made.nodes[name]) for name in names) for arm, names in made.arms.items()}


def add(budgets):
  """The sum of some Budgets."""
  parts = zip(Budget(), *budgets, strict=True)
  return Budget(*(Part(*map(sum, zip(*each, strict=True))) for each in parts))


def check_equal(budgets, compared, how):
  """Asserts that arms which are compared train their students equally, part by part.

  Args:
    budgets: {arm: Budget}; compared: the arms that are, any two of them; how: ends the sentence.

  Raises:
    ValueError: two of them have a part that is not equal.
  """
  for part in Budget._fields:
    found = {arm: getattr(budget, part) for arm, budget in budgets.items()
             if arm in compared and getattr(budget, part) != Part()}
    (first, want), *others = found.items() or ((None, None),)
    for arm, got in others:
      if got != want:
        raise ValueError(f"{first} and {arm} are compared and have unequal {part} budgets ({want} "
                         f"and {got}) {how}.")


def check_labels(made, arm, workdir):
  """Asserts from the ledgers that no stage used a label outside its split, nor 2H before its turn.

  Raises:
    ValueError: a ledger breaks the arm's split.
  """
  held_out = {p.id for p in made.prompts["2h"]}
  for name in made.arms[arm]:
    node, ledger = made.nodes[name], files.read_json(workdir / name / "ledger.json")
    stray = set(ledger["labels"]) - {p.id for p in made.prompts[node.split]}
    if stray:
      raise ValueError(f"{name} of {arm} spent the label {min(stray)}, which is not in its split "
                       f"{node.split}: delete the stage's folder and run it again.")
    for parent in made.ancestors(name)[:-1] if node.split == "2h" else ():
      leaked = held_out & set(files.read_json(workdir / parent / "ledger.json")["labels"])
      if leaked:
        raise ValueError(f"{parent} spent the held-out label {min(leaked)} before {name}: in "
                         f"config.arms {arm} is not a half_* arm, so give it another split.")
