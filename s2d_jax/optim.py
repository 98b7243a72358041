"""AdamW from a config: learning-rate schedule, clipping by global norm, decay on matrices only."""

import jax
import jax.numpy as jnp
import optax

READS = ("lr", "warmup", "decay", "steps", "clip", "weight_decay", "b1", "b2", "eps")
DECAYS = {
    "constant": lambda progress: jnp.ones_like(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + jnp.cos(jnp.pi * progress)) / 2,
}


def schedule(hp):
  """Learning rate of update i = 0, 1, ...: a linear warmup, then the decay down to 0 at hp.steps.

    lr(i) = hp.lr · min(1, (i + 1) / warmup) · decay((i − warmup) / (steps − warmup)).

  The first update already moves; "constant" never decays; progress is held to [0, 1].

  Args:
    hp: lr; warmup and steps, in optimizer updates; decay: "constant", "linear" or "cosine".

  Raises:
    ValueError: an unknown decay, or a warmup that leaves no updates.
  """
  if hp.decay not in DECAYS:
    raise ValueError(f"decay = \"{hp.decay}\" is unknown: choose one of {sorted(DECAYS)}.")
  if not 0 <= hp.warmup < hp.steps:
    raise ValueError(f"warmup = {hp.warmup} does not fit in steps = {hp.steps} updates: "
                     "shorten the warmup or train longer.")

  def lr(count):
    count = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum(1.0, (count + 1) / max(hp.warmup, 1))
    progress = jnp.clip((count - hp.warmup) / (hp.steps - hp.warmup), 0.0, 1.0)
    return hp.lr * warm * DECAYS[hp.decay](progress)

  return lr


def make(hp, axes):
  """AdamW (https://arxiv.org/abs/1711.05101) as an optax transformation.

  Gradients are first scaled to global norm hp.clip at most (`inf` never clips); decay is hp.lr ·
  hp.weight_decay · w per update, on matrices and not on norm scales.

  Args:
    hp: the keys of `READS`.
    axes: the parameters' logical axes, as `models.axes(config)`. A matrix has two or more axes that
      are not "layer": the stacking makes a norm scale look like one to its rank.

  Raises:
    ValueError: a value out of its range.
  """
  fits = {"lr": hp.lr > 0, "clip": hp.clip > 0, "weight_decay": hp.weight_decay >= 0,
          "b1": 0 <= hp.b1 < 1, "b2": 0 <= hp.b2 < 1, "eps": hp.eps > 0}
  for key, fit in fits.items():
    if not fit:
      raise ValueError(f"{key} = {getattr(hp, key)} is out of range for AdamW: correct the config.")
  adamw = optax.chain(
      optax.clip_by_global_norm(hp.clip),
      optax.adamw(schedule(hp), b1=hp.b1, b2=hp.b2, eps=hp.eps, weight_decay=hp.weight_decay,
                  mask=matrices(axes)),
  )

  def update(updates, state, params):
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its integer count
      return adamw.update(updates, state, params)

  return optax.GradientTransformation(adamw.init, update)


def matrices(axes):
  """True for each parameter that is a matrix (or a stack of them), in the tree of `axes`."""
  return jax.tree.map(lambda names: sum(name != "layer" for name in names) >= 2, axes,
                      is_leaf=lambda x: isinstance(x, tuple))
