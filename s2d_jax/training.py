"""TrainState and the one jitted optimizer update: objective, reduce once, gradients, optax.

The update is handed a model, an objective and an optimizer and imports none of them. A head is the
pair (features_BTD, weight_VD). A batch is a `rollouts.Batch`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from s2d_jax import keys, microbatches, program_cache, sharding
from s2d_jax.keys import Key
from s2d_jax.rollouts import Batch
from s2d_jax.sharding import Params

KEYS = {"microbatches": keys.at_least(1, neutral=1, hashed=False)}

_Head = tuple[jax.Array, jax.Array]                # (features_BTD, weight_VD)
Metrics = dict[str, jax.Array]                    # float32 scalars
# (gradients of the loss's sum, {name: its sum and count, or its largest value}) of a batch.
Totals = tuple[Params, dict[str, Sequence[jax.Array]]]
# (head, guide_head, batch, hp) -> {name: (sum, count)}, as `jit_update` describes it.
Loss = Callable[..., dict[str, tuple[jax.Array, ...]]]
# (head, batch, hp) -> (logp_BT, entropy_BT)
Logp = Callable[..., tuple[jax.Array, jax.Array]]


class Objective(Protocol):
  """A loss that declares the keys of the config that it reads, as `objectives.Objective` does."""
  keys: Mapping[str, Key]

  def __call__(self, student_head: _Head, guide_head: _Head | None, batch: Batch,
               hp: ConfigDict) -> dict[str, tuple[jax.Array, ...]]:
    """{name: (sum, count)}, "loss" among them."""


class Model(Protocol):
  """The methods of a model that an update calls; `models.Model` has both."""

  def apply(self, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array,
            segments_BT: jax.Array) -> tuple[jax.Array, Any]:
    """(features_BTD, cache) of tokens."""

  def unembed(self, params: Params) -> jax.Array:
    """weight_VD, which turns features into logits."""


class TrainState(NamedTuple):
  """All that training changes."""
  step: jax.Array             # optimizer updates so far
  params: Params              # the trainable leaves
  opt_state: optax.OptState
  anchor: Params | None = None  # `foresee`: the weights after the last search; None: no searches


def make(model: Model, params: Params, objective: Objective,
         optimizer: optax.GradientTransformation, guide: Model | None = None,
         hp: Mapping[str, Any] | None = None, mesh: Mesh | None = None,
         ) -> tuple[TrainState, Callable[[TrainState, Params | None, Batch],
                                         tuple[TrainState, Metrics]]]:
  """A TrainState around `params`, and the update that moves it.

    state, update = training.make(student, params, objectives.REVERSE_KL, optim.adamw(1e-3),
                                  guide=teacher)
    state, metrics = update(state, teacher_params, rollouts.batch(rollout))

  Args:
    model: the model that is trained; params: its weights. The update frees their buffers: load
      them a second time for a guide that is the learner's own start.
    objective: an `objectives.Objective`; hp: values for the keys that it reads, and microbatches;
      each key that is not named has its default.
    optimizer: an optax transformation.
    guide: a frozen model on the same tokens, where the objective reads one.
    mesh: by default the current one, or a mesh of one device. On a given or current mesh the
      params are laid out already.

  Returns:
    (state, update). `update(state, guide_params, batch)` puts a batch of the host on the mesh and
    does what `jit_update` describes.
  """
  mesh = mesh or sharding.current_mesh()
  # Without a mesh, all runs on one device: placing the arrays on a mesh of it copies nothing.
  if mesh is None:
    mesh = sharding.make_mesh()
    params = jax.device_put(params, sharding.replicated(mesh))
  hp = keys.defaults({**objective.keys, **KEYS}, **(hp or {}))
  with jax.set_mesh(mesh):
    state = init(optimizer, mesh, params)
    step = jit_update(model, guide, objective, optimizer, hp, shardings(state))

  def update(state: TrainState, guide_params: Params | None,
             batch: Batch) -> tuple[TrainState, Metrics]:
    with jax.set_mesh(mesh):
      return step(state, guide_params, sharding.put_batch(batch, mesh))

  return state, update


def abstract(optimizer: optax.GradientTransformation, mesh: Mesh, params: Params,
             anchored: bool = False) -> TrainState:
  """Shapes, types and layouts of the state that `init` returns: enough to compile for.

  `params` are arrays or abstract arrays, laid out on `mesh`; the optimizer's slots are laid out as
  the parameters are.
  """
  params = sharding.abstract(params)
  # Slots such as Adam's moments are laid out as their parameters, counters on every device.
  shapes = jax.eval_shape(optimizer.init, params)
  whole = sharding.replicated(mesh)
  slots = []
  # optax finds the slots by running `optimizer.init`. It is traced here, because the mesh may be a
  # described topology, on whose devices nothing can run.
  jax.eval_shape(lambda: slots.append(optax.tree.map_params(
      optimizer, lambda _, p: p.sharding, shapes, params, transform_non_params=lambda _: whole)))
  return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), params,
                    sharding.laid_out(shapes, slots[0]), params if anchored else None)


def init(optimizer: optax.GradientTransformation, mesh: Mesh, params: Params,
         anchored: bool = False) -> TrainState:
  """A state at update 0 around `params`, which are laid out on `mesh`; `anchored` copies them.

  The parameters become the state's, whose buffers the update donates: a reference model needs its
  own copy.
  """
  def jitted() -> Callable[[Params], tuple[jax.Array, optax.OptState]]:
    layout = shardings(abstract(optimizer, mesh, params))
    return jax.jit(lambda params: (jnp.int32(0), optimizer.init(params)),
                   out_shardings=(layout.step, layout.opt_state))

  # A new closure would be compiled again, so equal stages of a run share one.
  start = program_cache.shared(
      ("init", optimizer, mesh, program_cache.shapes_of(params)), jitted)
  step, opt_state = start(params)
  anchor = jax.tree.map(lambda x: x.copy(), params) if anchored else None
  return TrainState(step, params, opt_state, anchor)


def shardings(tree: Params) -> Params:
  """The sharding of each leaf of a state, or of any tree of arrays or their shapes."""
  return jax.tree.map(lambda x: x.sharding, tree)


def jit_update(model: Model, guide_model: Model | None, objective: Loss,
               optimizer: optax.GradientTransformation, hp: ConfigDict,
               layout: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
  """The jitted update: update(state, guide_params, batch, non_trainable=None) -> (state, metrics).

  One optimizer update on the whole batch, in hp.microbatches slices of its rows. Sums, counts and
  gradients of the loss's sum are added in float32 and divided once, so that neither the split nor
  rows of weight 0 change the result. The state is donated and keeps its layout. `non_trainable`
  are the leaves of the model that are not trained (`join` unites the two); they are not donated.
  Trace and call it under `jax.set_mesh`.

  Args:
    model: what is trained; guide_model: a frozen model scored on the same tokens, or None.
    objective: objective(head, guide_head, batch, hp) -> {name: (sum, count)}, "loss" among them; a
      tuple of one value is reduced by the largest.
    hp: microbatches, and what the objective reads.
    layout: `shardings` of the state.

  Returns:
    A function whose metrics are float32 scalars: the objective's, grad_norm (before clipping),
    update_norm, and finite. `finite` is 0 where the loss or the gradient is not finite; the state
    is then returned unchanged.
  """
  accumulated = _accumulated(model, guide_model, objective, hp, layout)

  # The old state is donated: two do not fit. A layout of XLA's choice would not fit the next call.
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, layout.step))
  def update(state, guide_params, batch, non_trainable=None):
    return _apply(optimizer, state,
                  *accumulated(state.params, non_trainable, guide_params, batch))

  return update


def jit_totals(model: Model, guide_model: Model | None, objective: Loss, hp: ConfigDict,
               layout: TrainState) -> Callable[..., Any]:
  """Jitted part of an update that reads no optimizer slots: `jit_apply` is the other part.

  (params, non_trainable, guide_params, batch) -> Totals of the whole batch. Nothing is donated.
  Arguments as `jit_update`.
  """
  return jax.jit(_accumulated(model, guide_model, objective, hp, layout),
                 out_shardings=(layout.params, layout.step))


def _accumulated(model: Model, guide_model: Model | None, objective: Loss, hp: ConfigDict,
                 layout: TrainState) -> Callable[..., Any]:
  """(params, non_trainable, guide_params, batch) -> sums over all microbatches, as `jit_totals`."""
  gradients = _gradients(model, guide_model, objective, hp)

  def accumulated(params, non_trainable, guide_params, batch):
    def body(total, microbatch):
      grads, sums = gradients(params, non_trainable, guide_params, microbatches.spread(microbatch))
      total = jax.tree.map(jnp.add, total, grads)
      # Without the constraint XLA may gather the gradients whole on every device.
      return jax.lax.with_sharding_constraint(total, layout.params), sums

    batch = microbatches.padded(batch, microbatches.time_multiple())
    # float32 whatever the weights' type: sums of many microbatches lose bits in bfloat16.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, sums = jax.lax.scan(body, zeros, microbatches.split(batch, hp.microbatches))
    return total, {name: _over_microbatches(pair) for name, pair in sums.items()}

  return accumulated


def _gradients(model: Model, guide_model: Model | None, objective: Loss, hp: ConfigDict,
               ) -> Callable[..., tuple[Params, dict[str, tuple[jax.Array, ...]]]]:
  """(params, non_trainable, guide_params, batch) -> gradients of the loss's sum, and the sums."""
  def gradients(params, non_trainable, guide_params, batch):
    # Outside the differentiated function: the guide gets no gradient and keeps no activations.
    guide_head = None if guide_model is None else _guide_head(guide_model, guide_params, batch)

    def loss(params):
      sums = objective(_head(model, join(params, non_trainable), batch), guide_head, batch, hp)
      # The sum is differentiated, not the mean: the count is known only after all microbatches.
      return sums["loss"][0], sums

    grads, sums = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, sums))

  return gradients


def jit_gradients(model: Model, guide_model: Model, objective: Loss, hp: ConfigDict,
                  layout: TrainState) -> Callable[..., Any]:
  """Jitted part of an update that several guides share: sums of one microbatch, under one guide.

  (params, non_trainable, guide_params, batch) -> (gradients, {name: sums}), to be added by
  `jit_add` and applied by `jit_apply`. Arguments as `jit_update`; the batch is not split.
  """
  gradients = _gradients(model, guide_model, objective, hp)

  # Layouts of our choice, so that the results of several guides can be added.
  @functools.partial(jax.jit, out_shardings=(layout.params, layout.step))
  def of_microbatch(params, non_trainable, guide_params, batch):
    batch = microbatches.padded(batch, microbatches.time_multiple())
    return gradients(params, non_trainable, guide_params, microbatches.spread(batch))

  return of_microbatch


def jit_add(layout: TrainState) -> Callable[..., Any]:
  """Jitted (total, found) -> their sum, of two results of `jit_gradients`; the total is donated."""
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout.params, layout.step))
  def add(total, found):
    def added(name: str) -> tuple[jax.Array, ...]:
      # As over microbatches: sums and counts are added, of one value the largest is taken.
      pairs = jax.tree.map(lambda *x: jnp.stack(x), total[1][name], found[1][name])
      return tuple(_over_microbatches(pairs))

    return jax.tree.map(jnp.add, total[0], found[0]), {name: added(name) for name in total[1]}

  return add


def jit_apply(optimizer: optax.GradientTransformation, layout: TrainState) -> Callable[..., Any]:
  """Jitted (state, totals) -> (state, metrics): the end of `jit_update`; the state is donated."""
  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, layout.step))
  def apply(state, totals):
    return _apply(optimizer, state, *totals)

  return apply


def _over_microbatches(pair: tuple[jax.Array, ...]) -> list[jax.Array]:
  """A sum and its count, each added up over the leading axis; of one value the largest."""
  reduce = jnp.sum if len(pair) == 2 else jnp.max
  return [reduce(x, axis=0) for x in pair]


def _apply(optimizer: optax.GradientTransformation, state: TrainState, total: Params,
           sums: Mapping[str, Sequence[jax.Array]]) -> tuple[TrainState, Metrics]:
  """One optimizer update and its metrics; the state is unchanged where a value is not finite."""
  metrics = {name: _mean(*pair) if len(pair) == 2 else pair[0] for name, pair in sums.items()}
  # The one division: sums over all microbatches by the count over all of them.
  grads = jax.tree.map(
      lambda g, p: _mean(g, sums["loss"][1]).astype(p.dtype), total, state.params)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  metrics["grad_norm"] = optax.tree.norm(grads)
  metrics["update_norm"] = optax.tree.norm(_for_norm(optimizer, grads, state, updates))
  # One bad update would spoil the state for good, so it is not taken.
  finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
  metrics["finite"] = finite.astype(jnp.float32)
  new = state._replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                       opt_state=opt_state)
  return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), metrics


def _for_norm(optimizer: optax.GradientTransformation, grads: Params, state: TrainState,
              updates: Params) -> Params:
  """The updates, in the form in which a backend computes their norm with least traffic."""
  if sharding.platform() != "gpu":
    return updates
  # XLA for GPUs writes the updates to memory where the new weights and the norm both read them. Had
  # each its own, one kernel makes new weights, new moments and the norm. The barrier on the counts
  # keeps the two from being merged; their values are equal.
  counts_apart = jax.tree.map(
      lambda x: x if x.ndim else jax.lax.optimization_barrier(x), state.opt_state)
  return optimizer.update(grads, counts_apart, state.params)[0]


def join(params: Params, non_trainable: Params | None) -> Params:
  """One tree of two nested dicts that share no leaf; with None, `params` as it is."""
  if non_trainable is None:
    return params
  joined = {}
  for key in {**non_trainable, **params}:
    other = non_trainable.get(key)
    if isinstance(other, dict):
      joined[key] = join(params.get(key, {}), other)
    else:
      joined[key] = params.get(key, other)
  return joined


def token_logps(model: Model, logp: Logp, hp: ConfigDict,
               ) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
  """Jitted (params, batch) -> (logp_BT, entropy_BT): a model's own numbers on a batch, in nats.

  Args:
    model: the model; its parameters are not donated.
    logp: logp(head, batch, hp) -> (logp_BT, entropy_BT), as `objectives.logp`.
    hp: microbatches (slices of the rows, one at a time), and what `logp` reads.
  """
  def on_microbatch(params, batch):
    return logp(_head(model, params, batch), batch, hp)

  return _jit_per_token(on_microbatch, hp.microbatches)


def compare(model: Model, guide_model: Model, measure: Callable[..., dict[str, jax.Array]],
            hp: ConfigDict) -> Callable[[Params, Params, Batch], dict[str, jax.Array]]:
  """Jitted (params, guide_params, batch) -> {name: value_BT}: two models on the same tokens.

  Args:
    model, guide_model: the two models; neither is trained.
    measure: measure(head, guide_head, batch, hp) -> {name: value_BT}, as `losses.agreement`.
    hp: microbatches, and what `measure` reads.
  """
  def on_microbatch(params, guide_params, batch):
    head = _head(model, params, batch)
    return measure(head, _guide_head(guide_model, guide_params, batch), batch, hp)

  return _jit_per_token(on_microbatch, hp.microbatches)


def _jit_per_token(f: Callable[..., Any], slices: int) -> Callable[..., Any]:
  """Jitted (*params, batch) -> f(*params, microbatch), its [B, T] results in the rows' order.

  The results are replicated, so that every host reads all of them.
  """
  mesh = sharding.current_mesh()

  @functools.partial(jax.jit, out_shardings=None if mesh is None else sharding.replicated(mesh))
  def per_token(*args):
    *params, batch = args
    width = jax.tree.leaves(batch)[0].shape[1]
    batch = microbatches.padded(batch, microbatches.time_multiple())
    # One microbatch at a time bounds the memory of activations.
    sliced = jax.lax.map(lambda part: f(*params, microbatches.spread(part)),
                         microbatches.split(batch, slices))
    return jax.tree.map(lambda x: x[:, :width], microbatches.spread(microbatches.join(sliced)))

  return per_token


def _head(model: Model, params: Params, batch: Batch) -> _Head:
  # Features and the unembedding, not logits: [tokens, vocabulary] is too large to form at once.
  features_BTD, _ = model.apply(params, batch.inputs_BT, batch.positions_BT, batch.segments_BT)
  return features_BTD, model.unembed(params)


def _guide_head(model: Model, params: Params, batch: Batch) -> _Head:
  """A guide's head at the learner's tokens; where it has rows of its own, it reads those."""
  if batch.guide_inputs_BG is None:
    return _head(model, params, batch)
  features_BGD, _ = model.apply(params, batch.guide_inputs_BG, batch.guide_positions_BG,
                                batch.guide_segments_BG)
  # Gathered before the unembedding, so that the loss has one row of features for each token.
  features_BTD = jnp.take_along_axis(features_BGD, batch.guide_index_BT[..., None], axis=1)
  return sharding.constrain(features_BTD, "batch", "time", "embed"), model.unembed(params)


def _mean(total: jax.Array, count: jax.Array) -> jax.Array:
  """Sum over count; a batch without any weight has mean 0 and gradient 0."""
  return total / jnp.where(count > 0, count, 1.0)
