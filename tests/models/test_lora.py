"""Low-rank adapters: the formula, what is trained, merging, on devices."""

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax import models, optim, sharding, training
from s2d_jax.models import layout

Rows = collections.namedtuple("Rows", "inputs_BT positions_BT segments_BT")
HP = types.SimpleNamespace(lr=1e-2, warmup=0, decay="constant", clip=1.0, weight_decay=0.1,
                           b1=0.9, b2=0.95, eps=1e-8)
ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def base(request, tiny_json, randomized):
  model = models.get(tiny_json(request.param))
  return model, randomized(model)


def adapted(model, targets=ALL, rank=3, alpha=6.0):
  return models.build(dataclasses.replace(
      model.config, lora=models.Lora(rank, alpha, tuple(targets))))


def random_adapters(adapted_model, seed=0):
  """Adapters of which B is not zero either."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 4, jnp.float32),
                      models.split(adapted_model.config, models.shapes(adapted_model.config))[0])


def features(model, params, apply=None):
  ids = np.random.default_rng(1).integers(0, 48, (2, 7)).astype(np.int32)
  positions = np.tile(np.arange(7, dtype=np.int32), (2, 1))
  return (apply or jax.jit(model.apply))(params, ids, positions, np.ones_like(ids))[0]


@pytest.mark.parametrize("targets", [ALL, ("q", "v"), ("o",), ("down",)])
def test_each_target_gets_two_matrices(targets, base):
  model, _ = base
  adapted_model = adapted(model, targets)
  flat = layout.flat(models.split(adapted_model.config, models.shapes(adapted_model.config))[0])
  names = {path.rpartition("/")[2] for path in flat}
  assert names == {f"{name}_{end}" for name in targets for end in "ab"}
  # Width 32, four query and two key heads of 16, MLP 40.
  shapes = {"q": ((32,), (4, 16)), "k": ((32,), (2, 16)), "v": ((32,), (2, 16)),
            "o": ((4, 16), (32,)), "gate": ((32,), (40,)), "up": ((32,), (40,)),
            "down": ((40,), (32,))}
  for path, x in flat.items():
    name, end = path.rpartition("/")[2].split("_")
    inputs, outputs = shapes[name]
    assert x.shape == (2, *((*inputs, 3) if end == "a" else (3, *outputs))), path


def test_new_adapters_change_nothing(base):
  model, params = base
  adapted_model = adapted(model)
  new = models.adapters(adapted_model, 0)
  assert all(np.any(x) == path.endswith("_a") for path, x in layout.flat(new).items())
  # One operation at a time: a compiler may round the sums of two programs differently.
  with jax.disable_jit():
    np.testing.assert_array_equal(
        features(adapted_model, training.join(new, params), adapted_model.apply),
        features(model, params, model.apply))


def test_merging_equals_the_formula(base):
  # In float64: W + (alpha / rank) A B, for every target of every layer; nothing else moves.
  model, params = base
  adapted_model, adapters = adapted(model), random_adapters(adapted(model))
  merged = layout.flat(models.merge(adapted_model.config, training.join(adapters, params)))
  low, flat = layout.flat(adapters), layout.flat(params)
  assert merged.keys() == flat.keys()
  for path, before in flat.items():
    want = np.asarray(before, np.float64)
    if f"{path}_a" in low:
      for at in range(2):
        a, b = (np.asarray(low[f"{path}_{end}"][at], np.float64) for end in "ab")
        want[at] += 2.0 * np.tensordot(a, b, 1)
    np.testing.assert_allclose(merged[path], want, rtol=1e-6, atol=1e-6)
  assert sum(not np.array_equal(merged[path], flat[path]) for path in flat) == len(ALL)


@pytest.mark.parametrize("targets", [ALL, ("q", "v"), ("o",), ("gate", "down")])
def test_merged_weights_equal_weights_with_adapters(targets, base):
  model, params = base
  adapted_model = adapted(model, targets)
  params = training.join(random_adapters(adapted_model), params)
  got = features(model, models.merge(adapted_model.config, params))
  want = features(adapted_model, params)
  np.testing.assert_allclose(got, want, atol=3e-5)
  assert np.abs(want - features(model, models.split(adapted_model.config, params)[1])).max() > 0.1


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_an_update_moves_the_adapters_alone(shape, base):
  model, params = base
  adapted_model = adapted(model)
  def objective(head, guide, batch, hp):
    return {"loss": (jnp.sum(head[0] ** 2), jnp.float32(batch.inputs_BT.size))}
  mesh = sharding.make_mesh(shape)
  with jax.set_mesh(mesh):
    layouts = sharding.weight_shardings(mesh, models.axes(model.config),
                                        models.shapes(model.config))
    frozen = jax.tree.map(jax.device_put, jax.device_get(params), layouts)
    new = models.adapters(adapted_model, 0)
    first = jax.device_get(new)
    optimizer = optim.make(HP, 9, models.trained(adapted_model.config))
    state = training.init(optimizer, mesh, new)
    hp = types.SimpleNamespace(microbatches=2)
    step = training.jit_update(adapted_model, None, objective, optimizer, hp,
                               training.shardings(state))
    rows = np.zeros((8, 6), np.int32)
    batch = sharding.put_batch(Rows(rows + 3, rows + np.arange(6, dtype=np.int32), rows + 1), mesh)
    for _ in range(2):
      state, metrics = step(state, None, batch, frozen)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), jax.device_get(params))
  moved = layout.flat(jax.tree.map(lambda a, b: bool(np.any(a != b)), first,
                                   jax.device_get(state.params)))
  assert all(moved.values())
  slots = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert sum(x.size for x in slots) == 2 * sum(x.size for x in jax.tree.leaves(first))


@pytest.mark.parametrize("changes", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()},
                                     {"targets": ("q", "w")}])
def test_impossible_adapters_are_refused(changes):
  with pytest.raises(ValueError, match="choose a rank of 1 or more, alpha above 0 and "):
    models.Lora(**{"rank": 2, "alpha": 4.0, "targets": ("q",)} | changes)
