"""The options of a stage, each off unless its block has it: their keys, and whether they fit a row.
"""

from typing import Protocol

from ml_collections import ConfigDict

from s2d_jax import allocate, foresee, guides, hints, keys, objectives, rollouts
from s2d_jax.errors import InputError

KEYS: keys.Record = {"foresee": keys.Optional(foresee.KEYS),
                     "allocate": keys.Optional(allocate.KEYS), **hints.KEYS, **guides.KEYS}


class Stage(Protocol):
  """The fields of a `planning.Stage` that are read; planning imports this file."""
  source: rollouts.Source
  learner: str
  guide: str | None
  objective: objectives.Objective


def check(hp: ConfigDict, stage: Stage) -> None:
  """Refuses options that a stage cannot have; a message begins with the key's name.

  Args:
    hp: the stage's config; stage: its row.

  Raises:
    InputError: as the functions that are called.
  """
  guided = stage.guide is not None and stage.objective.uses_guide(hp)
  taught = guided and stage.guide == "teacher"
  foresee.check(hp, stage.source.model == stage.learner, taught or guided and hints.used(hp))
  allocate.check(hp, taught or stage.source.model not in (None, stage.learner))
  hints.check(hp, guided)
  if (stage.objective is objectives.REVERSE_KL and stage.guide == "reference"
      and not hints.used(hp)):
    raise InputError("hint_tokens is absent and the guide is the learner's own start, which has "
                     "nothing to teach without hints: add hint_tokens.")
  guides.check(hp, taught)
