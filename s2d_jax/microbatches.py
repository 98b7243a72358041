"""Slices of a batch: padding to a width that a device likes, microbatches, rows over devices."""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp

from s2d_jax import sharding
from s2d_jax.errors import InputError
from s2d_jax.rollouts import Batch

_Tree = TypeVar("_Tree")  # of arrays


def time_multiple() -> int:
  """Of this many tokens a row's length should be a multiple."""
  # A TPU keeps features in tiles. Where a device has several rows of another length, folding rows
  # and times to one axis moves every tile. It costs time, and minutes of compilation.
  tile = 128 if sharding.platform() == "tpu" else 1
  # And features are split over devices by time only where these divide it.
  return math.lcm(tile, sharding.shards("context", None))


def padded(batch: Batch, multiple: int) -> Batch:
  """The batch with padding after its tokens, so that rows become multiples of `multiple`.

  Padding is of segment 0, weight 0, count 0 and no sequence: it changes no sum and no gradient.
  """
  # The guide's rows may have another width than the learner's.
  if not any(x.shape[1] % multiple for x in jax.tree.leaves(batch)):
    return batch

  def pad(x: jax.Array, value: int = 0) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)), constant_values=value)

  # A token of a sequence would be scored, so here 0 would be work in vain.
  return jax.tree.map(pad, batch)._replace(sequence_BT=pad(batch.sequence_BT, -1))


def split(batch: Batch, k: int) -> Batch:
  """[rows, ...] -> [k, rows / k, ...], every k-th row together.

  Each device then finds its share of a microbatch among its own rows.
  """
  rows = jax.tree.leaves(batch)[0].shape[0]
  if rows % k:
    raise InputError(f"a batch of {rows} rows does not split into microbatches = {k}: "
                     "choose a divisor of the rows.")
  return jax.tree.map(
      lambda x: jnp.swapaxes(x.reshape(rows // k, k, *x.shape[1:]), 0, 1), batch)


def join(tree: _Tree) -> _Tree:
  """The inverse of `split`."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def spread(tree: _Tree) -> _Tree:
  """Splits the rows over the devices that share the batch; further axes are whole on each."""
  # XLA may lay out a microbatch as it likes, and could let every device compute all of its rows.
  def spread(x: jax.Array) -> jax.Array:
    further_axes = ["time"] * (x.ndim - 1)
    return sharding.constrain(x, "batch", *further_axes)

  return jax.tree.map(spread, tree)
