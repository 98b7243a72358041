"""Several guides of one stage: updates against single guides, routes, refusals, a killed run."""

import dataclasses
import json
import shutil
import weakref

import jax
import numpy as np
import optax
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import common, composition
from s2d_jax import (
  compiling,
  guides,
  metrics,
  models,
  objectives,
  options,
  placement,
  recipe,
  rollouts,
  sampler,
  sharding,
  tasks,
  training,
  updates,
)
from s2d_jax.compiling import Samplers
from s2d_jax.errors import InputError
from s2d_jax.preflight import programs
from s2d_jax.roles import Role, StageModels
from s2d_jax.rollouts import Prompt
from tests import test_hints
from tests.test_hints import TINY
from tests.test_loop import params_of

HP = ConfigDict(common.stage(
    steps=1, prompts=8, microbatches=2, block=5, optim=common.adamw(lr=1.0),
    sampling=common.sampling(samples_per_prompt=1, max_tokens=6)) | common.reverse_kl())
SGD = optax.sgd(1.0)
WIDER = TINY | {"intermediate_size": 48}


def updated(mesh, role_B, guide_of_role, batch):
  """The weights and metrics after one update under several guides, which wait on the host."""
  guide_of_role = {role: Role(guide.model, guides.to_host(guide.params))
                   for role, guide in guide_of_role.items()}
  model = models.get(TINY)
  learner = Role(model, params_of(model, 0, mesh))
  stage_models = StageModels(learner, None, Role(model, sharding.abstract(learner.params)), True,
                             guide_of_role[guides.TEACHER], guides=guide_of_role)
  samplers = Samplers(sampler.SamplerConfig(), 4, (1,), str)
  compiled = compiling.compile_programs(stage_models, HP, objectives.REVERSE_KL, objectives.logp,
                                        SGD, samplers)
  assert compiled.update is None and compiled.routed.rows == 4
  state = training.init(SGD, mesh, learner.params)
  update = updates.of_step(compiled, stage_models, placement.Mover(), lambda _: np.array(role_B))
  return update(state, batch)


def single(mesh, guide, batch):
  """The weights and metrics after the update of one guide."""
  model = models.get(TINY)
  params = params_of(model, 0, mesh)
  state = training.init(SGD, mesh, params)
  update = training.jit_update(model, guide.model, objectives.REVERSE_KL, SGD, HP,
                               training.shardings(state))
  return update(state, guide.params, sharding.put_batch(batch, mesh))


def a_batch():
  batch = rollouts.batch(test_hints.rollout())
  zeros_BT = np.zeros(batch.weight_BT.shape, np.float32)
  # As the compiled program has them: an on-policy batch of one update.
  return batch._replace(sampler_logp_BT=zeros_BT, behaviour_logp_BT=zeros_BT)


def close(a, b, atol=2e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=atol), a, b)


@pytest.fixture(params=[(1, 1, 1), (2, 2, 1)])
def mesh(request):
  with jax.set_mesh(sharding.make_mesh(request.param)):
    yield sharding.current_mesh()


@pytest.mark.medium
def test_equal_guides_give_the_update_of_one(mesh):
  guide = Role(models.get(TINY), params_of(models.get(TINY), 1, mesh))
  batch = a_batch()
  # Five rows and three: both need filling up to batches of four.
  state, values = updated(mesh, ["", "", "b", "", "b", "", "b", ""], {"": guide, "b": guide}, batch)
  want, want_values = single(mesh, guide, batch)
  close(jax.device_get(state.params), jax.device_get(want.params))
  assert set(values) == set(want_values)
  close({k: values[k] for k in values}, {k: want_values[k] for k in values}, 1e-5)


@pytest.mark.medium
def test_unlike_guides_give_the_weighted_sum_of_their_updates(mesh):
  # Guides of two sizes. A gradient is a mean over tokens, so each part counts by its tokens.
  one = Role(models.get(TINY), params_of(models.get(TINY), 1, mesh))
  other = Role(models.get(WIDER), params_of(models.get(WIDER), 2, mesh))
  batch = a_batch()
  role_B = np.array(["b", "", "", "b", "b", "", "b", "b"])
  state, values = updated(mesh, role_B, {"": one, "b": other}, batch)
  start = jax.device_get(params_of(models.get(TINY), 0, mesh))
  total = jax.tree.map(np.zeros_like, start)
  loss = tokens = 0.0
  for role, guide in (("", one), ("b", other)):
    is_own_B1 = (role_B == role)[:, None]
    part = batch._replace(weight_BT=batch.weight_BT * is_own_B1,
                          count_BT=batch.count_BT * is_own_B1)
    found, part_values = single(mesh, guide, part)
    count = part.count_BT.sum()
    total = jax.tree.map(lambda sum, after, before, n=count: sum + n * (before - after), total,
                         jax.device_get(found.params), start)
    loss += count * float(part_values["loss"])
    tokens += count
  want = jax.tree.map(lambda before, step: before - step / tokens, start, total)
  close(jax.device_get(state.params), want, 1e-5)
  assert float(values["loss"]) == pytest.approx(loss / tokens, rel=1e-5)


def test_one_guide_at_a_time_is_on_the_devices(monkeypatch):
  placed = []
  to_device = guides._to_device

  def recorded(params):
    # All that was placed before is gone from the devices.
    assert [leaf for leaves in placed for leaf in leaves if leaf() is not None] == []
    found = to_device(params)
    placed.append([weakref.ref(leaf) for leaf in jax.tree.leaves(found)])
    return found

  monkeypatch.setattr(guides, "_to_device", recorded)
  with jax.set_mesh(sharding.make_mesh((1, 1, 1))) as mesh:
    mesh = sharding.current_mesh()
    several = {role: Role(models.get(TINY), params_of(models.get(TINY), seed, mesh))
               for seed, role in enumerate(("", "b", "c"), 1)}
    updated(mesh, ["", "c", "b", "", "b", "", "c", "b"], several, a_batch())
  assert len(placed) == 3


def block(**folders):
  return {"by": "family", "folders": folders}


@pytest.mark.parametrize("changes, guided, message", [
    ({}, False, "does not read one: take guides out, or choose a stage such as reverse_kl"),
    ({"foresee": {"signal": "kl"}}, True, "foresee.signal \"kl\" compares with one"),
    ({"allocate": {}}, True, "allocate probes with one: take one of the two out"),
])
def test_stages_that_cannot_have_several_guides_are_refused(changes, guided, message):
  with pytest.raises(InputError, match=message):
    guides.check(ConfigDict({"guides": block(a="x")} | changes), guided)


@pytest.mark.parametrize("value", [{}, {"by": "family", "folders": {}}, {"by": "family"},
                                   {"by": 3, "folders": {"a": "x"}},
                                   {"by": "answer", "folders": {"a": "x"}},
                                   {"by": "family", "folders": {"a": ""}},
                                   {"by": "family", "folders": {"a": 3}}])
def test_a_block_is_refused_by_its_shape(value):
  with pytest.raises(InputError, match="write {'by': 'family' or a text column that is no answer"):
    guides.keys.check_value("guides", ConfigDict(value), options.KEYS["guides"])


def test_a_problem_has_the_guide_of_its_value_or_the_teacher():
  prompts = [Prompt(i, (i,)) for i in range(3)]
  problems = {i: {"subject": subject} for i, subject in enumerate(("algebra", "sets", "algebra"))}
  task = ConfigDict({"family": None})

  def chosen(by="subject", **folders):
    hp = ConfigDict({"guides": {"by": by, "folders": folders}})
    return guides.chosen("config.stages.reverse_kl", hp, task, prompts, problems)

  assert chosen(algebra="/a") == {0: "guide /a", 1: guides.TEACHER, 2: "guide /a"}
  with pytest.raises(InputError, match="for 'logic' and no problem has that subject: choose from "
                                       "algebra, sets"):
    chosen(logic="/a")
  with pytest.raises(InputError, match="by is 'level' and problem 0 has no such text: name"):
    chosen(by="level", algebra="/a")
  with pytest.raises(InputError, match="by is 'family' and problem 0 has no such text"):
    chosen(by="family", algebra="/a")


def config_of(tmp_path, **folders):
  config = composition.get_config("tiny")
  with config.unlocked():
    config.arms = "raw_bridge"
    config.probe.problems = 0
    config.stages.forward_kl.steps = 0
    config.stages.reverse_kl.update({"save_every": 2, "minibatches": 2})
    config.stages.reverse_kl.guides = block(**folders)
  return config.lock()


def run(config, workdir):
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    plan = recipe.run(config, workdir, tasks.get(config))
  (node,) = plan.nodes.values()
  return node, epath.Path(workdir) / node.name


@pytest.mark.medium
def test_a_killed_run_under_several_guides_ends_in_the_same_bytes(tmp_path, monkeypatch):
  # The student's own base guides two families, and the teacher the others.
  config = config_of(tmp_path, left=composition.get_config().student, right="again")
  shutil.copytree(config.student, tmp_path / "again")
  with config.unlocked():
    config.stages.reverse_kl.guides.folders.right = str(tmp_path / "again")
  node, whole = run(config, tmp_path / "whole")
  assert set(node.guide_of.values()) == {
      "", f"guide {config.student}", f"guide {tmp_path / 'again'}"}

  totals = guides.totals
  calls = []

  def killed(*args):
    calls.append(args)
    if len(calls) == 6:  # in the middle of the third of four steps, behind a checkpoint
      raise SystemExit(137)
    return totals(*args)

  # Where the optimizer waits matters to no number on one device.
  with config.unlocked():
    config.offload = "optimizer"
  monkeypatch.setattr(guides, "totals", killed)
  with pytest.raises(SystemExit):
    run(config, tmp_path / "killed")
  monkeypatch.setattr(guides, "totals", totals)
  _, again = run(config, tmp_path / "killed")
  for name in ("ledger", "metrics"):
    assert metrics.read(again, name) == metrics.read(whole, name)
  assert ((again / "hf" / "model.safetensors").read_bytes()
          == (whole / "hf" / "model.safetensors").read_bytes())


@pytest.mark.medium
def test_a_stage_is_named_by_its_guides_and_not_by_their_folders(tmp_path):
  def name(**folders):
    config = config_of(tmp_path, **folders)
    return set(recipe.plan(config, tasks.get(config)).nodes)

  student = composition.get_config().student
  shutil.copytree(student, tmp_path / "copy")
  assert name(left=student) == name(left=str(tmp_path / "copy"))
  assert name(left=student) != name(right=student)
  plain = config_of(tmp_path, left=student)
  with plain.unlocked():
    del plain.stages.reverse_kl.guides
  assert set(recipe.plan(plain, tasks.get(plain)).nodes) != name(left=student)


def test_a_guide_of_another_tokenizer_is_refused(tmp_path):
  shutil.copytree(composition.get_config().student, tmp_path / "swapped")
  (tmp_path / "swapped" / "SHA256SUMS").unlink()
  tokenizer = tmp_path / "swapped" / "tokenizer.json"
  read = json.loads(tokenizer.read_text())
  vocabulary = read["model"]["vocab"]
  vocabulary["+"], vocabulary["-"] = vocabulary["-"], vocabulary["+"]
  tokenizer.write_text(json.dumps(read))
  config = config_of(tmp_path, left=str(tmp_path / "swapped"))
  with pytest.raises(InputError, match="config.stages.reverse_kl.guides: the guide .*swapped: "):
    recipe.plan(config, tasks.get(config))


# Prompts and responses of the tiny stage take up to 38 tokens.
@pytest.mark.parametrize("changes, message", [
    ({}, None),
    ({"vocab_size": 99}, r"the guide x embeds 99 tokens and the student \d+: pad the smaller"),
    ({"max_positions": 37}, "the guide x has 37 positions and a prompt .* up to 38: lower samp"),
    ({"max_positions": 38}, None)])
def test_a_guide_of_another_vocabulary_or_too_few_positions_is_refused(tmp_path, changes, message):
  config = config_of(tmp_path, left="x")
  model_config, chat = sampler.read_folder(
      config.student, dict(config.template), {key: config[key] for key in models.RUN})
  check = lambda: guides.check_models(
      config, (model_config, chat),
      lambda folder: (dataclasses.replace(model_config, **changes), chat))
  if message is None:
    check()
    return
  with pytest.raises(InputError, match=f"config.stages.reverse_kl.guides: {message}"):
    check()


@pytest.mark.medium
def test_the_ledger_counts_each_guide_by_its_size(tmp_path):
  student = composition.get_config().student
  # The student's own base guides three families, and the teacher the two others.
  config = config_of(tmp_path, sum=student, product=student, left=student)
  with config.unlocked():
    config.stages.reverse_kl.log_samples = 1000
  node, small = run(config, tmp_path / "small")
  with config.unlocked():
    del config.stages.reverse_kl.guides
  _, large = run(config, tmp_path / "large")
  # The samples of the first step are equal, because no update is before it.
  samples = [[row for row in metrics.read(folder, "samples") if row["step"] == 0]
             for folder in (small, large)]
  assert [row["tokens"] for row in samples[0]] == [row["tokens"] for row in samples[1]]
  prompts = {p.id: p for p in recipe.plan(config, tasks.get(config)).prompts[node.split]}
  length_of = lambda row: len(prompts[row["prompt_id"]].tokens) + len(row["tokens"])
  of_student = [row for row in samples[0] if node.guide_of[row["prompt_id"]]]
  assert 0 < len(of_student) < len(samples[0])
  saved = sum(forward_by_hand(config.teacher, length_of(row), len(row["tokens"]))
              - forward_by_hand(config.student, length_of(row), len(row["tokens"]))
              for row in of_student)
  entries = [metrics.read(folder, "ledger")[0] for folder in (small, large)]
  assert entries[1]["flops"] - entries[0]["flops"] == pytest.approx(saved, rel=1e-6) != 0


def forward_by_hand(folder, length, headed):
  """FLOPs of a forward pass over one sequence, by the shapes of the folder's config.json."""
  c = json.loads((epath.Path(folder) / "config.json").read_text())
  width, heads, head = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
  matrices = (2 * width * head * heads + 2 * width * head * c["num_key_value_heads"]
              + 3 * width * c["intermediate_size"])
  scores = sum(4 * heads * head * attended for attended in range(1, length + 1))
  return (c["num_hidden_layers"] * (2 * matrices * length + scores)
          + 2 * c["vocab_size"] * width * headed)


@pytest.mark.medium
def test_preflight_compiles_the_update_of_the_largest_guide(tmp_path):
  student = composition.get_config().student
  config = config_of(tmp_path, left=student)
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    found = {cost.program: cost for cost in programs.costs_of(config, programs.Target(fast=True))
             if cost.stage == "reverse_kl"}
  assert {"gradients", "apply"} < set(found) and "update" not in found
