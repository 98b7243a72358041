"""The variants of the study: each is sound, differs from its control, and is compared."""

import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import composition
from results.composition import compare, criteria, study, variants
from s2d_jax import doctor, files, ladder, recipe, rollouts, sweep, tasks
from tests.configs.test_configs import blocks


def plan_of(variant):
  config = sweep.expand(variants.get_config(f"variant={variant}"))[0]
  return recipe.plan(config, tasks.get(config))


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_variant_is_locked_and_passes_the_doctor(variant):
  for config in sweep.expand(variants.get_config(f"variant={variant},tiny")):
    assert all(block.is_locked for block in blocks(config).values())
    doctor.check_config(config, {row.name: row for row in recipe.STAGES})
    assert config.task == "composition"


@pytest.mark.medium
def test_variants_of_a_study_differ_and_share_the_stages_before():
  names = {name: set(plan_of(name).nodes) for name, one in variants.VARIANTS.items()
           if one.study == "search"}
  assert len({frozenset(nodes) for nodes in names.values()}) == len(names)
  # The teacher's stage and the warmup.
  assert len(set.intersection(*names.values())) == 2


def test_every_study_has_a_table_with_a_control_of_its_own():
  assert set(compare.STUDIES) == {one.study for one in variants.VARIANTS.values()}
  for name, one in compare.STUDIES.items():
    assert variants.VARIANTS[one.control].study == name


@pytest.mark.parametrize("variant", [*variants.VARIANTS, "unnormalised_2", "unnormalised_4"])
def test_the_page_explains_every_variant(variant):
  lines = compare.STUDIES[compare.study_of(variant)].variants
  explained = {name for line in lines for name in re.findall(r"`(\w+)`", line.partition(": ")[0])
               } | {name for line in lines for name in re.findall(r"; `(\w+)`", line)}
  name = variant
  for suffix in (name for name in explained if name.startswith("_")):
    name = name.removesuffix(suffix)
  # A form without a warmup is explained with those after one.
  forms = {name for line in compare.STUDIES["forms"].variants
           for name in re.findall(r"`(\w+)`", line)}
  assert name in explained or name in forms and variant.endswith("_cold")


def test_the_page_has_the_text_that_is_printed():
  page = (pathlib.Path(compare.__file__).parent / "methods.md").read_text(encoding="utf-8")
  assert page.startswith(compare.INTRODUCTION + "\n\n")
  assert page.endswith(f"\n\n{compare.REVISIONS}\n")
  for name in compare.STUDIES:
    assert "\n".join([*compare.lead(name), "| variant"]) in page


def test_the_searches_of_a_variant_by_hand(tmp_path):
  # Two searches: the first took two of three candidates, the second refused its first one.
  rows = [{"step": 0, "foresee_multiple": 4.0, "foresee_score_0": 0.25, "foresee_score_1": 0.5,
           "foresee_score_2": 0.75, "foresee_score_3": 0.5},
          {"step": 1, "foresee_multiple": 0.0, "foresee_score_0": 0.5, "foresee_score_1": 0.0},
          {"step": 2, "loss": 1.0}]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  files.write(tmp_path / "metrics" / "00000000.jsonl", text)
  files.write_json(tmp_path / "manifest.json", {"inputs": {"config": {
      "foresee": {"stride": 2.0, "candidates": 5}}}})
  run = types.SimpleNamespace(stages=[tmp_path])
  found = criteria.searches(ladder.Group("x", "x", {0: run}))
  assert found == (2, 4, [0.25, 0.5], [0.5, 0.0])
  assert compare._searched(found) == ["2 of 4", "25 to 50, 0 to 50"]
  # Without scores the chance decided: of five candidates the third was refused.
  files.write(tmp_path / "metrics" / "00000000.jsonl", json.dumps(
      {"step": 0, "foresee_multiple": 4.0}) + "\n")
  found = criteria.searches(ladder.Group("x", "x", {0: run}))
  assert compare._searched(found) == ["2 of 3", "–"]


def test_a_variant_changes_only_its_own_keys():
  world = composition.get_config()
  config = variants.get_config("variant=generalised_4")
  assert config.stages.reverse_kl.form == "generalised" and config.stages.reverse_kl.top_k == 4
  for name in ("teacher_grpo", "forward_kl", "sft"):
    assert config.stages[name].to_dict() == world.stages[name].to_dict()


def test_an_unknown_variant_is_refused():
  with pytest.raises(ValueError, match="variant is 'fast': choose it from plain, "):
    variants.get_config("variant=fast")


def test_a_ratio_of_costs_by_hand():
  # Ratios 2, 2 and 2: no spread.
  value, low, high = criteria.ratio(np.array([2.0, 4, 6]), np.array([1.0, 2, 3]))
  assert (value, low, high) == pytest.approx((2, 2, 2))
  # log ratios 0, log 2 and log 4: mean log 2, standard error log 2 / sqrt 3, t of 2 degrees 4.3027.
  value, low, high = criteria.ratio(np.array([1.0, 2, 4]), np.array([1.0, 1, 1]))
  assert value == pytest.approx(2)
  assert high / value == pytest.approx(value / low) == pytest.approx(2 ** (4.3027 / 3 ** 0.5), 1e-4)


def test_the_refused_loss_takes_probability_off_its_support_even_at_the_teacher():
  # One position, features 1: the logits are the unembedding. p = q, and the top two have mass 0.8.
  q_V = np.array([0.5, 0.3, 0.15, 0.05])
  logits_V1 = jnp.log(q_V)[:, None].astype(jnp.float32)
  ones_BT = jnp.ones((1, 1))
  batch = rollouts.Batch(*[None] * 11)._replace(weight_BT=ones_BT, count_BT=ones_BT)
  hp = ConfigDict({"top_k": 2, "block": 4})

  def loss(weight_V1):
    head = (jnp.ones((1, 1, 1)), weight_V1)
    return study.unnormalised(head, (jnp.ones((1, 1, 1)), logits_V1), batch, hp)["loss"][0]

  value, grad_V1 = jax.value_and_grad(loss)(logits_V1)
  # Σ_S p (log p/q + 1) ∇ log p = p_v (1_S − 0.8) at p = q.
  assert value == pytest.approx(0, abs=1e-6)
  np.testing.assert_allclose(grad_V1[:, 0], q_V * (np.array([1, 1, 0, 0]) - 0.8), atol=1e-6)


def test_the_cost_of_probes_is_that_of_a_stage_alone():
  # Sampled here or found: 2 of scores and 6 of responses, in a stage that alone would spend 100.
  sampled = {"flops": 100.0, "flops_reused": 0.0, "allocate": {"flops": 8.0, "flops_reused": 0.0}}
  found = {"flops": 94.0, "flops_reused": 6.0, "allocate": {"flops": 2.0, "flops_reused": 6.0}}
  assert criteria.probe_cost(sampled) == criteria.probe_cost(found) == 0.08
  assert criteria.probe_cost({"flops": 100.0, "flops_reused": 0.0}) == 0


def interval(low, estimate, high):
  return criteria.Interval(estimate, low, high)


@pytest.mark.parametrize("found, met", [
    (interval(-0.029, 0.0, 0.1), True), (interval(0.01, 0.05, 0.1), True),
    (interval(-0.2, -0.1, -0.031), False), (interval(-0.1, 0.0, 0.1), None)])
def test_the_verdict_of_a_form(found, met):
  assert criteria.form_verdict(found).met is met


@pytest.mark.parametrize("cost, points, met, why", [
    (criteria.Cost(3, 3, None, interval(1.01, 1.5, 2), 9.0), -0.02, True, "score"),
    (criteria.Cost(3, 3, None, interval(1.01, 1.5, 2), 9.0), -0.021, False, "score"),
    (criteria.Cost(3, 3, None, interval(0.99, 1.5, 2), 9.0), 0.1, False, "cost"),
    (criteria.Cost(3, 2, None, None, None), 0.1, False, "cost"),
    # A target below the first score costs nothing, and says nothing.
    (criteria.Cost(3, 3, None, None, 0.0), 0.1, None, "met before the first step")])
def test_the_verdict_of_a_search(monkeypatch, cost, points, met, why):
  monkeypatch.setattr(criteria, "cost", lambda *_: cost)
  monkeypatch.setattr(criteria, "difference", lambda *_: interval(-1, points, 1))
  assert criteria.search_verdict(None, None) == (met, why)


def test_the_verdict_of_shares_has_four_parts(monkeypatch):
  found = {"long": interval(-0.1, 0.0, 0.1), "lost": -1.0, "probes": 0.06}
  gaps = {"control": interval(0.001, 0.1, 0.2), "fixed": interval(-1, -0.02, 1)}
  monkeypatch.setattr(criteria, "shares", lambda *_: criteria.Shares(**found))
  monkeypatch.setattr(criteria, "difference", lambda _, other: gaps[other])
  def verdict():
    return criteria.shares_verdict("rule", "control", ["fixed"])
  assert verdict() == (True, "")
  gaps["control"] = interval(-0.001, 0.1, 0.2)
  assert verdict() == (False, "no gain")
  found["long"] = interval(0.001, 0.1, 0.2)
  assert verdict() == (True, "")
  gaps["fixed"] = interval(-1, -0.021, 1)
  found |= {"lost": -1.1, "probes": 0.061}
  assert verdict() == (False, "below fixed, harm, cost")


@pytest.mark.parametrize("estimates, low, met", [
    ((0.6, 0.06, 0.0), 0.5, True), ((0.6, 0.06, 0.07), 0.5, False), ((0.6, 0.7, 0.0), 0.5, False),
    ((0.6, 0.06, 0.0), -0.1, False)])
def test_the_verdict_of_a_prefix_probe(monkeypatch, estimates, low, met):
  drops = [interval(low, estimate, 1.0) for estimate in estimates]
  monkeypatch.setattr(criteria, "drops", lambda _: drops)
  assert criteria.drops_verdict(None).met is met


def test_the_verdict_of_the_refused_form(monkeypatch):
  masses, points = {0: [0.9], -1: [0.8]}, [-0.1]
  monkeypatch.setattr(criteria, "logged", lambda _, name, index: masses[index])
  monkeypatch.setattr(criteria, "difference", lambda *_: interval(-1, points[0], 1))
  assert criteria.refused_form_verdict(None, None).met
  points[0] = -0.09
  assert criteria.refused_form_verdict(None, None) == (False, "score")
  masses[-1] = [0.95]
  assert criteria.refused_form_verdict(None, None) == (False, "mass")
