"""A stage's models: which part each plays, and the bytes that the stage holds for them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

from s2d_jax import sharding, training
from s2d_jax.sharding import Params


class Role(NamedTuple):
  """A model with weights, or with their abstract arrays."""
  model: Any   # a models.Model
  params: Params


class StageModels(NamedTuple):
  """The models of a stage: what is compiled depends on these and on the config alone."""
  learner: Role               # its params are what is trained
  non_trainable: Params | None  # leaves of the learner that stand still beside adapters
  actor: Role | None          # whose samples are learned from; None: no model samples
  on_policy: bool             # the learner is the actor: actor.params are then its shapes
  guide: Role | None          # scored on the same tokens
  pass_rate_model: Role | None = None  # the learner's start, where pass rates weight prompts
  anchored: bool = False      # whether the state keeps an anchor, for `foresee`
  guides: dict[str, Role] | None = None  # by role, weights on the host (`guides`); None: one guide
  away: frozenset[str] = frozenset()  # of `resident`, what waits on the host (`placement`)

  def full(self, params: Params) -> Params:
    """All leaves of the learner, given those that are trained."""
    return training.join(params, self.non_trainable)

  @property
  def teacher(self) -> Role | None:
    """The model whose responses `allocate` scores: the frozen actor, or else the guide."""
    return self.guide if self.on_policy or self.actor is None else self.actor


_SEARCHES = "anchors and candidate"  # a name of `resident`
# At the end of a search that moved the weights: the old anchor and the new one, and the new weights
# beside the old ones.
_COPIES = 3


def anchor_bytes(held: Mapping[str, int]) -> int:
  """Bytes of the state's anchor on each device, by `resident`; 0 for a stage without searches."""
  return held.get(_SEARCHES, 0) // _COPIES


def resident(stage_models: StageModels, optimizer: optax.GradientTransformation) -> dict[str, int]:
  """Bytes on each device of what a stage holds from its start to its end, by name."""
  learner = stage_models.learner
  state = training.abstract(optimizer, sharding.current_mesh(), learner.params,
                            stage_models.anchored)
  found = {"learner": sharding.device_bytes((state.params, stage_models.non_trainable)),
           "optimizer": sharding.device_bytes(state.opt_state)}
  if stage_models.anchored:
    found[_SEARCHES] = _COPIES * sharding.device_bytes(state.anchor)
  # An on-policy actor is the learner, and an actor that is the guide too is loaded once.
  guide = stage_models.guide
  if stage_models.guides is not None:
    # The largest: one of them is on the devices at a time.
    found["guide"] = max(sharding.device_bytes(one.params) for one in stage_models.guides.values())
  elif guide is not None:
    found["guide"] = sharding.device_bytes(guide.params)
  actor = stage_models.actor
  if actor is not None and not stage_models.on_policy and actor is not guide:
    found["actor"] = sharding.device_bytes(actor.params)
  if stage_models.pass_rate_model is not None:
    found["pass rate model"] = sharding.device_bytes(stage_models.pass_rate_model.params)
  return found
