"""TrainState and the one jitted optimizer update: objective, reduce once, gradients, optax.

It is handed a model, an objective and an optimizer and knows none of them: a head is the pair
(features_BTD, weight_VD), a batch any pytree with rows on the leading axis of every leaf and
inputs_BT, positions_BT and segments_BT among its fields. Runs under `jax.set_mesh`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from s2d_jax import keys, sharding

KEYS = {"microbatches": keys.at_least(1, neutral=1, hashed=False)}


class TrainState(NamedTuple):
  """All that training changes; `step` counts optimizer updates, `params` are trainable leaves."""
  step: jax.Array
  params: Any
  opt_state: Any


def abstract(optimizer, mesh, params):
  """Shapes, types and layouts of the state that `init` makes: enough to compile for.

  `params` are arrays, or abstract ones, laid out on `mesh`; the slots are laid out as they are.
  """
  params = sharding.abstract(params)
  shapes = jax.eval_shape(optimizer.init, params)
  whole = sharding.replicated(mesh)
  slots = []
  # optax finds the slots by running `optimizer.init`. It is traced here, because the mesh may be a
  # described topology, on whose devices nothing can run.
  jax.eval_shape(lambda: slots.append(optax.tree.map_params(
      optimizer, lambda _, p: p.sharding, shapes, params, transform_non_params=lambda _: whole)))
  return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), params,
                    sharding.laid_out(shapes, slots[0]))


def init(optimizer, mesh, params):
  """A state at update 0 around `params`, its optimizer slots laid out as the parameters are.

  `params` are already placed on `mesh`. They become the state's, whose buffers the update donates:
  a frozen copy for a reference must be its own.
  """
  layout = shardings(abstract(optimizer, mesh, params))
  start = jax.jit(lambda params: (jnp.int32(0), optimizer.init(params)),
                  out_shardings=(layout.step, layout.opt_state))
  step, opt_state = start(params)
  return TrainState(step, params, opt_state)


def shardings(state):
  """Where each leaf of a state (or of its shapes) lives: the last argument of `make`."""
  return jax.tree.map(lambda x: x.sharding, state)


def make(model, guide_model, objective, optimizer, hp, layout):
  """The jitted update: step(state, guide_params, batch, frozen=None) -> (state, metrics).

  One optimizer update on the whole batch, in hp.microbatches slices of its rows. Sums, counts and
  gradients of the loss's sum are added up in float32 and divided once, so the split changes
  nothing, nor do rows of weight 0. The state is donated and keeps its layout. `frozen` are the
  leaves of the model that are not trained (`join` puts both together); they are not donated.

  Args:
    model: what is trained; guide_model: a frozen model scored on the same tokens, or None.
    objective: objective(head, guide_head, batch, hp) -> {name: (sum, count)}, "loss" among them;
      (largest,) for what is not a mean.
    optimizer: an optax transformation.
    hp: microbatches, and what the objective reads.
    layout: `shardings` of the state.

  Returns:
    A function whose metrics are float32 scalars: the objective's, grad_norm (before
    clipping), update_norm, and finite, which is 0 where the loss or the gradient is not: the
    state is then returned as it came.
  """

  def gradients(params, frozen, guide_params, batch):
    guide_head = None if guide_model is None else _head(guide_model, guide_params, batch)

    def loss(params):
      sums = objective(_head(model, join(params, frozen), batch), guide_head, batch, hp)
      return sums["loss"][0], sums

    grads, sums = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, sums))

  def accumulated(params, frozen, guide_params, batch):
    def body(total, microbatch):
      grads, sums = gradients(params, frozen, guide_params, _spread(microbatch))
      total = jax.tree.map(jnp.add, total, grads)
      return jax.lax.with_sharding_constraint(total, layout.params), sums

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, sums = jax.lax.scan(body, zeros, _split(batch, hp.microbatches))
    return total, {name: [(jnp.sum if len(pair) == 2 else jnp.max)(x, axis=0) for x in pair]
                   for name, pair in sums.items()}

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, layout.step))
  def step(state, guide_params, batch, frozen=None):
    total, sums = accumulated(state.params, frozen, guide_params, batch)
    metrics = {name: _mean(*pair) if len(pair) == 2 else pair[0] for name, pair in sums.items()}
    grads = jax.tree.map(
        lambda g, p: _mean(g, sums["loss"][1]).astype(p.dtype), total, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["update_norm"] = optax.tree.norm(updates)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["finite"] = finite.astype(jnp.float32)
    new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), metrics

  return step


def join(params, frozen):
  """One tree of two nested dicts that share no leaf; `frozen` may be None."""
  if frozen is None:
    return params
  return {key: params.get(key, frozen.get(key)) if not isinstance(frozen.get(key), dict)
          else join(params.get(key, {}), frozen[key]) for key in {**frozen, **params}}


def score(model, logp, hp):
  """Jitted (params, batch) -> (logp_BT, entropy_BT), the model's own numbers on the batch's tokens.

  Args:
    model: the model scored; its parameters are not donated.
    logp: logp(head, batch, hp) -> (logp_BT, entropy_BT), as `objectives.logp`.
    hp: microbatches (slices of the rows, one at a time), and what `logp` reads.

  The results are replicated, so that every host reads the same.
  """

  mesh = sharding.current_mesh()

  @functools.partial(jax.jit, out_shardings=None if mesh is None else sharding.replicated(mesh))
  def scored(params, batch):
    def on_microbatch(microbatch):
      microbatch = _spread(microbatch)
      return logp(_head(model, params, microbatch), microbatch, hp)

    return _spread(_join(jax.lax.map(on_microbatch, _split(batch, hp.microbatches))))

  return scored


def compare(model, guide_model, measure, hp):
  """Jitted (params, guide_params, batch) -> {name: value_BT}: two models on the same tokens.

  Args:
    model, guide_model: the two; neither is trained.
    measure: measure(head, guide_head, batch, hp) -> {name: value_BT}, as `losses.agreement`.
    hp: microbatches, and what `measure` reads.

  The results are replicated, so that every host reads the same.
  """
  mesh = sharding.current_mesh()

  @functools.partial(jax.jit, out_shardings=None if mesh is None else sharding.replicated(mesh))
  def compared(params, guide_params, batch):
    def on_microbatch(microbatch):
      microbatch = _spread(microbatch)
      return measure(_head(model, params, microbatch),
                     _head(guide_model, guide_params, microbatch), microbatch, hp)

    return _spread(_join(jax.lax.map(on_microbatch, _split(batch, hp.microbatches))))

  return compared


def _head(model, params, batch):
  features_BTD, _ = model.apply(params, batch.inputs_BT, batch.positions_BT, batch.segments_BT)
  return features_BTD, model.unembed(params)


def _mean(total, count):
  """Sum over count; a batch without any weight has mean 0 and gradient 0."""
  return total / jnp.where(count > 0, count, 1.0)


def _split(batch, k):
  """Every k-th row together: each device then finds its share of a microbatch in its own rows."""
  rows = jax.tree.leaves(batch)[0].shape[0]
  if rows % k:
    raise ValueError(f"a batch of {rows} rows does not split into microbatches = {k}: "
                     "choose a divisor of the rows.")
  return jax.tree.map(
      lambda x: jnp.swapaxes(x.reshape(rows // k, k, *x.shape[1:]), 0, 1), batch)


def _join(batch):
  """The inverse of `_split`."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), batch)


def _spread(batch):
  """Rows over the devices that share the batch, whatever else an array has whole on each."""
  return jax.tree.map(
      lambda x: sharding.constrain(x, "batch", *("time",) * (x.ndim - 1)), batch)
