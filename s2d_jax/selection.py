"""Which rows of a dense stage are learned from: a filter of stored samples, and a length gate.

A row that is left out keeps its place and has weight 0, so no shape changes. Its tokens are in the
ledger's `tokens_discarded`. Both options are after "The Many Faces of On-Policy Distillation"
(https://arxiv.org/abs/2605.11182).
"""

import numpy as np
from ml_collections import ConfigDict

from s2d_jax import keys, rollouts
from s2d_jax.errors import InputError
from s2d_jax.keys import Key
from s2d_jax.rollouts import Reward, StepRollouts

# Between 0.1 of sound responses and 0.5 of collapsed ones, as the paper's figures show them.
REPETITION_LIMIT = 0.3
CONDITIONS = ("right", "stopped", "unrepetitive")


def _split(names: str) -> tuple[str, ...]:
  """The names in a text with commas between them."""
  return tuple(filter(None, (name.strip() for name in names.split(","))))


# Of a stage that reads no rewards.
LENGTH_KEYS = {"longest": keys.at_least(1, neutral=0, optional=True)}
# Of such a stage whose samples come from a frozen model and are stored.
KEEP_KEYS = {"keep": Key(
    lambda names: {*_split(names)} <= {*CONDITIONS},
    f"choose several of {','.join(CONDITIONS)} with commas between",
    neutral="", optional=True)}


def conditions(hp: ConfigDict) -> tuple[str, ...]:
  """The names in `CONDITIONS` that a stored sample must meet; none where all are learned from."""
  return _split(hp.get("keep", ""))


def reads_labels(hp: ConfigDict) -> bool:
  """Whether samples are checked against their problems' answers, which spends labels."""
  return "right" in conditions(hp)


def check(hp: ConfigDict) -> None:
  """Raises InputError where the length gate leaves every response in."""
  longest = hp.get("longest", 0)
  if longest >= hp.sampling.max_tokens:
    raise InputError(f"longest is {longest} and no response has more than sampling.max_tokens = "
                     f"{hp.sampling.max_tokens}: lower it, or leave it out.")


def selected(found: StepRollouts, hp: ConfigDict, reward: Reward | None) -> StepRollouts:
  """The rollouts with weight 0 on the rows that hp.keep and hp.longest leave out.

  Args:
    reward: of the task, read where `keep` has "right"; all hosts must then call this function.
  """
  names = conditions(hp)
  longest = hp.get("longest", 0)
  if not names and not longest:
    return found
  rollout = found.rollout
  B = len(rollout.prompt_id_B)
  weight_B = np.ones(B, np.float32) if found.weight_B is None else found.weight_B
  if longest:
    weight_B = weight_B * (rollout.response_length_B <= longest)
  if "right" in names:
    weight_B = weight_B * (rollouts.score(reward, rollout) >= 1)
  if "stopped" in names:
    weight_B = weight_B * (rollout.finish_reason_B == rollouts.FINISHED.index("stop"))
  if "unrepetitive" in names:
    shares = [rollouts.repetition(rollout.response(b)) for b in range(B)]
    weight_B = weight_B * (np.array(shares) < REPETITION_LIMIT)
  return found._replace(weight_B=weight_B, metrics={**found.metrics, "kept": (weight_B > 0).mean()})
