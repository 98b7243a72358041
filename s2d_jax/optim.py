"""AdamW from a config: learning-rate schedule, clipping by global norm, decay on matrices only."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from s2d_jax import keys
from s2d_jax.errors import InputError
from s2d_jax.keys import Key

_Axes = Any  # the pytree of `models.axes`: a tuple of axis names for each parameter

# The share of the learning rate that is left when a share `progress` of the updates is made.
_DECAYS = {
    "constant": lambda progress: jnp.ones_like(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
}
# A clip of inf and a decay of 0 change nothing, but are not what a script wants without asking:
# the defaults are those of Adam's authors, with gradients clipped.
KEYS = {
    "lr": Key(lambda rate: rate > 0, "choose it above 0"),
    "warmup": keys.at_least(0, neutral=0),
    "decay": keys.one_of(_DECAYS, neutral="constant"),
    "clip": Key(lambda norm: norm > 0, "choose it above 0, inf to never clip", neutral=math.inf,
                default=1.0),
    "weight_decay": Key(lambda decay: decay >= 0, "choose 0 or more", neutral=0.0),
    "b1": Key(lambda b1: 0 <= b1 < 1, "choose it from 0 to below 1", default=0.9),
    "b2": Key(lambda b2: 0 <= b2 < 1, "choose it from 0 to below 1", default=0.999),
    "eps": Key(lambda eps: eps > 0, "choose it above 0", default=1e-8),
}


def check_warmup(hp: ConfigDict, updates: int) -> None:
  """Raises InputError unless the warmup leaves updates to decay over."""
  if hp.warmup >= updates:
    raise InputError(f"warmup is {hp.warmup} and the stage makes {updates} optimizer updates: "
                     "shorten the warmup or train longer.")


def schedule(hp: ConfigDict, updates: int) -> optax.Schedule:
  """The learning rate of update i = 0, 1, ...: a linear warmup, then the decay.

    lr(i) = hp.lr · min(1, (i + 1) / warmup) · decay((i − warmup) / (updates − warmup)).

  The first update already moves; "constant" never decays; progress is held to [0, 1].

  Raises:
    InputError: the warmup leaves no updates.
  """
  check_warmup(hp, updates)
  # Without a warmup the first update is at the full rate, and nothing is divided by 0.
  ramp = max(hp.warmup, 1)

  def lr(count: jax.Array) -> jax.Array:
    # optax counts in int32, which strict promotion does not mix with floats.
    count = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum(1.0, (count + 1) / ramp)
    progress = jnp.clip((count - hp.warmup) / (updates - hp.warmup), 0.0, 1.0)
    return hp.lr * warm * _DECAYS[hp.decay](progress)

  return lr


def make(hp: ConfigDict, updates: int, axes: _Axes | None) -> optax.GradientTransformation:
  """AdamW (https://arxiv.org/abs/1711.05101) as an optax transformation.

  Gradients are first scaled to global norm hp.clip at most; decay is hp.lr · hp.weight_decay · w
  per update, on matrices and not on norm scales.

  Args:
    hp: the keys of `KEYS`.
    updates: optimizer updates in all, over which the schedule decays.
    axes: the parameters' logical axes, as `models.axes(config)`. A matrix has two or more axes that
      are not "layer": the stacking makes a norm scale look like one to its rank. With None, decay
      acts on every parameter.

  Raises:
    InputError: a value out of its range.
  """
  keys.check_values(hp, KEYS)
  adamw = optax.chain(
      optax.clip_by_global_norm(hp.clip),
      optax.adamw(schedule(hp, updates), b1=hp.b1, b2=hp.b2, eps=hp.eps,
                  weight_decay=hp.weight_decay, mask=None if axes is None else matrices(axes)))

  def update(updates, state, params):
    # optax raises a float to the power of its integer count, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
      return adamw.update(updates, state, params)

  return optax.GradientTransformation(adamw.init, update)


def adamw(lr: float, axes: _Axes | None = None, **changes: Any) -> optax.GradientTransformation:
  """AdamW at a constant learning rate, for a script that has no config.

  Args:
    lr: the learning rate; changes: further keys of `KEYS`, such as weight_decay=0.1.
    axes: as in `make`.

  Raises:
    InputError: an unknown name, or a value out of its range.
  """
  # A decay needs the number of updates, which a script without a config need not know.
  constant = {name: key for name, key in KEYS.items() if name not in ("warmup", "decay")}
  hp = keys.defaults(constant, lr=lr, **changes)
  return make(ConfigDict({**hp, "warmup": 0, "decay": "constant"}), 1, axes)


def matrices(axes: _Axes) -> _Axes:
  """True for each parameter that is a matrix (or a stack of them), in the tree of `axes`."""
  return jax.tree.map(lambda names: sum(name != "layer" for name in names) >= 2, axes,
                      is_leaf=lambda x: isinstance(x, tuple))
