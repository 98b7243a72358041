"""Searches along the last displacement: rules by hand, weights bit for bit, a toy problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from s2d_jax import foresee, options, recipe, rollouts, sharding
from s2d_jax.errors import InputError
from s2d_jax.rollouts import Prompt
from tests.configs import test_stage_names as names

HP = {"candidates": 5, "stride": 2.0, "problems": 4, "samples": 1, "accept": "above",
      "signal": "reward", "leaves": "all"}


# Two responses, of two and of three tokens.
RESPONSES = rollouts.given_solutions([Prompt(0, (1,)), Prompt(1, (1,))], [[2, 3], [4, 5, 6]], 1, 3)


def block(**changes):
  return ConfigDict(HP | changes)


def jump(params, anchor, multiple):
  return foresee.extrapolate(params, anchor, jnp.float32(multiple), "all")


def scores(values):
  """A function that gives one score after the other, whatever the weights."""
  remaining = iter(values)
  return lambda params: foresee.Scored(next(remaining), RESPONSES)


def tree(value):
  return {"embed": jnp.full(3, value, jnp.float32)}


def test_searches_follow_the_steps_that_are_powers_of_two():
  assert [n for n in range(1, 40) if foresee.due(n)] == [1, 2, 4, 8, 16, 32]


# Scores of the weights themselves and of the candidates; how many displacements they move by.
@pytest.mark.parametrize("values, rule, multiple, scored", [
    ([0.5, 0.4], "above", 0, 2),                          # the first candidate is worse
    ([0.5, 0.6, 0.7, 0.7], "above", 4, 4),                # a tie ends the search
    ([0.5, 0.6, 0.7, 0.7, 0.6], "at_least", 6, 5),        # or is accepted
    ([0.0] * 6, "above", 0, 2),                           # nothing is ever right: stay
    ([0.0] * 6, "at_least", 10, 6),                       # the paper's text moves by all five
    ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "above", 10, 6),
    ([0.5, 0.6, 0.55, 0.9], "above", 2, 3),               # a better one behind is not looked at
])
def test_the_last_accepted_candidate_by_hand(values, rule, multiple, scored):
  found = foresee.search(tree(3.0), tree(1.0), scores(values), jump, block(accept=rule), (0,))
  assert found.multiple == multiple and len(found.scored) == scored
  # W + c · (W − A) = 3 + c · 2.
  np.testing.assert_array_equal(found.params["embed"], np.full(3, 3 + 2 * multiple))
  logged = found.metrics()
  assert logged["foresee_score_0"] == values[0]
  assert logged["foresee_length_0"] == 2.5 and logged["foresee_repetition_0"] == 0


def test_a_chance_accepts_as_often_as_it_says_and_asks_for_no_score():
  def never(params):
    raise AssertionError("scored")

  moved = [foresee.search(tree(1.0), tree(0.0), never, jump, block(accept=0.5, candidates=1),
                          (seed,)).multiple for seed in range(400)]
  # Binomial(400, 1/2): four standard deviations are 40.
  assert abs(np.count_nonzero(moved) - 200) < 40
  always = foresee.search(tree(1.0), tree(0.0), never, jump, block(accept=1.0), (0,))
  assert always.multiple == 10 and always.scored == []


def test_a_candidate_is_formed_in_float32_from_the_weights_and_0_keeps_every_bit():
  params = {"embed": jnp.array([-0.0, 1.0, np.inf, 1 / 3], jnp.bfloat16)}
  anchor = {"embed": jnp.array([0.0, 1.0078125, 0.0, 0.0], jnp.bfloat16)}
  unmoved = jump(params, anchor, 0.0)["embed"]
  assert unmoved.tobytes() == params["embed"].tobytes()
  far = jump(params, anchor, 10.0)["embed"]
  assert far.dtype == jnp.bfloat16
  third = np.float32(params["embed"][3])
  want = [0.0, 1 - 10 * 0.0078125, np.inf, third + 10 * third]
  np.testing.assert_array_equal(far, np.array(want, np.float32).astype(jnp.bfloat16))


def test_on_a_mesh_each_device_moves_its_part():
  rng = np.random.default_rng(0)
  params, anchor = ({"embed": rng.normal(size=(8, 4)).astype(np.float32)} for _ in range(2))
  want = params["embed"] + np.float32(6.0) * (params["embed"] - anchor["embed"])
  mesh = sharding.make_mesh((2, 2, 2))
  with jax.set_mesh(mesh):
    parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    moved = jax.jit(foresee.extrapolate, static_argnames="leaves")(
        jax.device_put(params, parts), jax.device_put(anchor, parts), jnp.float32(6.0),
        leaves="all")["embed"]
  assert moved.sharding.is_equivalent_to(parts, 2)
  # A product and a sum may be rounded once together or one after the other.
  np.testing.assert_allclose(moved, want, rtol=1e-6, atol=1e-6)


def test_blocks_are_all_of_a_layer_but_its_first_norm():
  ones = {"embed": jnp.ones(2), "norm": jnp.ones(2), "layers": {
      "attn_norm": jnp.ones(2), "mlp_norm": jnp.ones(2),
      "attn": {"q": jnp.ones(2), "q_norm": jnp.ones(2)}, "mlp": {"up": jnp.ones(2)}}}
  zeros = {"embed": jnp.zeros(2), "norm": jnp.zeros(2), "layers": {
      "attn_norm": jnp.zeros(2), "mlp_norm": jnp.zeros(2),
      "attn": {"q": jnp.zeros(2), "q_norm": jnp.zeros(2)}, "mlp": {"up": jnp.zeros(2)}}}
  moved = foresee.extrapolate(ones, zeros, jnp.float32(2.0), "blocks")
  layers = moved["layers"]
  for leaf, want in ((moved["embed"], 1), (moved["norm"], 1), (layers["attn_norm"], 1),
                     (layers["mlp_norm"], 3), (layers["attn"]["q"], 3),
                     (layers["attn"]["q_norm"], 3), (layers["mlp"]["up"], 3)):
    np.testing.assert_array_equal(leaf, want)


def test_on_a_quadratic_it_needs_fewer_steps_and_never_ends_worse():
  # Gradient descent on Σ λ w² / 2 with small steps; a score is minus the loss.
  curvature = np.array([1.0, 0.3, 0.1])
  loss = lambda w: float(np.sum(curvature * np.square(w)) / 2)

  def steps_to(tolerance, accept):
    w = {"embed": jnp.array([4.0, -2.0, 3.0])}
    anchor = w
    for step in range(1, 2000):
      w = {"embed": w["embed"] - 0.02 * curvature * w["embed"]}
      if foresee.due(step):
        before = loss(w["embed"])
        by_loss = lambda params: foresee.Scored(-loss(params["embed"]), None)
        score = by_loss if accept else scores([0, -1])
        w = anchor = foresee.search(w, anchor, score, jump, block(), (0,)).params
        assert loss(w["embed"]) <= before
      if loss(w["embed"]) < tolerance:
        return step
    return None

  plain = next(n for n in range(2000) if loss(
      np.array([4.0, -2.0, 3.0]) * (1 - 0.02 * curvature) ** n) < 0.05)
  assert steps_to(0.05, accept=True) < plain / 2
  assert steps_to(0.05, accept=False) == plain  # a score that always says no is the plain run


@pytest.mark.parametrize("changes, on_policy, taught, message", [
    ({}, False, True, "here another model samples"),
    ({"rank": 8}, True, True, "set lora.rank to 0"),
    ({"signal": "kl"}, True, False, "none but the learner's own start: choose 'reward'"),
])
def test_searches_that_a_stage_cannot_make_are_refused(changes, on_policy, taught, message):
  hp = ConfigDict({"lora": {"rank": changes.pop("rank", 0)}, "foresee": HP | changes})
  with pytest.raises(InputError, match=message):
    foresee.check(hp, on_policy, taught)


@pytest.mark.parametrize("row, changes, message", [
    # A penalty's reference is the learner's own start; without a penalty there is no guide.
    ("student_grpo", {"kl": "k3", "kl_coef": 0.1}, "foresee has the signal 'kl'.* own start: choo"),
    ("student_grpo", {}, "foresee has the signal 'kl'.* own start: choose 'reward'"),
    ("reverse_kl", {}, None), ("self_distillation", {"hint_tokens": 32}, None)])
def test_a_search_by_divergence_needs_a_guide_that_teaches(row, changes, message):
  stages = names.shipped().stages
  hp = stages.get(row, stages.reverse_kl)
  hp.update({"foresee": HP | {"signal": "kl"}} | changes)
  (stage,) = (stage for stage in recipe.STAGES if stage.name == row)
  if message is None:
    options.check(hp, stage)
    return
  with pytest.raises(InputError, match=message):
    options.check(hp, stage)


def plan_of(reward=lambda problem, text: 1.0, **changes):
  config = names.shipped()
  config.stages.reverse_kl.foresee = HP | changes
  return names.plan(config, reward=reward)


def test_a_search_by_reward_reads_the_answers_of_its_stage_and_others_do_not():
  def inputs(**changes):
    planned = plan_of(**changes)
    return next(node.inputs for name, node in planned.nodes.items() if name.startswith("reverse"))
  by_reward, by_kl, by_chance = inputs(), inputs(signal="kl"), inputs(accept=0.5)
  assert by_reward["task"] is not None and by_kl["task"] is by_chance["task"] is None
  assert by_reward["split"] != by_kl["split"] == by_chance["split"]


def test_a_raised_version_renames_the_stages_that_search(monkeypatch):
  before, without = set(plan_of().nodes), set(names.plan().nodes)
  monkeypatch.setattr(foresee, "VERSION", foresee.VERSION + 1)
  changed = before ^ set(plan_of().nodes)
  # Two bridges have the stage, and what goes on from it.
  assert changed and {name.partition("-")[0] for name in changed} <= {"reverse_kl", "student_grpo"}
  assert set(names.plan().nodes) == without


def test_a_search_by_reward_without_a_reward_is_refused():
  assert plan_of(reward=None, accept=0.5)  # a chance scores nothing
  with pytest.raises(InputError, match="config.stages.reverse_kl.foresee has the signal .reward. "
                                       "and the task has no reward: set it to .kl."):
    plan_of(reward=None)


@pytest.mark.parametrize("value", [None, 5, "read"])
def test_an_option_that_is_no_block_is_one_sentence(value):
  config = names.shipped()
  with config.ignore_type():
    config.stages.reverse_kl.foresee = value
  said = "config.stages.reverse_kl.foresee is .*: write a block of settings .docs/losses.md has one"
  with pytest.raises(InputError, match=said):
    names.plan(config)
