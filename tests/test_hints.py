"""Guides with prompts of their own: alignment by hand, transformers in float64, plans, refusals."""

import functools

import jax
import ml_collections
import numpy as np
import optax
import pytest

from configs import arithmetic, common
from s2d_jax import (
  compiling,
  hints,
  ledger,
  loop,
  metrics,
  microbatches,
  models,
  objectives,
  optim,
  recipe,
  rollouts,
  sharding,
  tasks,
  training,
)
from s2d_jax.data.arithmetic import problems
from s2d_jax.errors import InputError
from s2d_jax.models import hf
from s2d_jax.planning import Use
from s2d_jax.roles import Role, StageModels
from s2d_jax.rollouts import Prompt
from tests import test_loop
from tests.configs import test_stage_names as names

TINY = {"model_type": "qwen3", "vocab_size": 32, "hidden_size": 16, "head_dim": 8,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": True, "max_position_embeddings": 64}
WIDTH = 7  # of the hints' window
HP = ml_collections.ConfigDict(
    common.stage(steps=1, prompts=8, sampling={}, optim={}, microbatches=2, block=5)
    | common.reverse_kl())
SGD = optax.sgd(1.0)  # parameters move by minus the gradient


def rollout(seed=0, B=8):
  """Rows of random prompts and responses of unequal lengths, one problem a row."""
  rng = np.random.default_rng(seed)
  return rollouts.Rollout(
      np.arange(B), np.zeros(B, np.int32), rng.integers(0, 32, (B, 4)).astype(np.int32),
      rng.integers(1, 5, B).astype(np.int32), rng.integers(0, 32, (B, 6)).astype(np.int32),
      rng.integers(1, 7, B).astype(np.int32), None, None, np.ones(B, np.int32), 0)


def hint_of(seed=1, B=8):
  rng = np.random.default_rng(seed)
  return {b: tuple(int(i) for i in rng.integers(0, 32, rng.integers(1, WIDTH + 1)))
          for b in range(B)}


def hinted(rows, hint, width=WIDTH):
  return rollouts.with_hints(rollouts.batch(rows), rows, hint, width)


def params(model, seed, mesh):
  rng = np.random.default_rng(seed)
  tree = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape) / 3, np.float32),
                      models.shapes(model.config))
  return jax.tree.map(sharding.put, tree,
                      sharding.weight_shardings(mesh, models.axes(model.config), tree))


@functools.lru_cache
def program(shape):
  mesh = sharding.make_mesh(shape)
  model = models.get(TINY)
  with jax.set_mesh(mesh):
    layout = training.shardings(training.init(SGD, mesh, params(model, 1, mesh)))
  return mesh, model, training.jit_update(model, model, objectives.REVERSE_KL, SGD, HP, layout)


def gradient(batch, shape=(1, 1, 1)):
  """(gradient, metrics) of one update, on a mesh, from seeded weights of learner and guide."""
  mesh, model, update = program(shape)
  with jax.set_mesh(mesh):
    start = jax.device_get(params(model, 1, mesh))
    state = training.init(SGD, mesh, params(model, 1, mesh))
    state, values = update(state, params(model, 2, mesh), sharding.put_batch(batch, mesh))
    return jax.tree.map(np.subtract, start, jax.device_get(state.params)), jax.device_get(values)


def close(a, b, rtol=1e-5, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# The batch.


def test_a_row_of_the_guide_by_hand():
  rows = rollouts.given_solutions([Prompt(3, (10, 11)), Prompt(4, (12,))], [[5, 6, 1], [7, 1]],
                                  prompt_width=2, width=3)
  got = hinted(rows, {3: (20, 21, 22), 4: (30, 31)}, width=4)
  np.testing.assert_array_equal(got.guide_inputs_BG, [[20, 21, 22, 5, 6, 0], [30, 31, 7, 0, 0, 0]])
  np.testing.assert_array_equal(got.guide_positions_BG, [[0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 0, 0]])
  np.testing.assert_array_equal(got.guide_segments_BG, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
  # The learner predicts 5, 6, 1 at 1, 2, 3, the guide at 2, 3, 4; 7, 1 at 0, 1 and at 1, 2.
  np.testing.assert_array_equal(got.targets_BT, [[11, 5, 6, 1], [7, 1, 0, 0]])
  np.testing.assert_array_equal(got.guide_index_BT, [[0, 2, 3, 4], [1, 2, 0, 0]])
  with pytest.raises(ValueError, match="cannot be packed: leave the hints out"):
    rollouts.pack(got, 8)


def test_minibatches_take_the_guides_rows_along():
  batch = hinted(rollout(), hint_of())
  for part in rollouts.minibatches(batch, 4, (0,)):
    for row, inputs_G in zip(part.sequence_BT.max(axis=1), part.guide_inputs_BG, strict=True):
      np.testing.assert_array_equal(inputs_G, batch.guide_inputs_BG[row])


# The update.


@pytest.mark.medium
def test_gradient_and_loss_equal_transformers_in_float64_aligned_by_hand(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  mesh, model, _ = program((1, 1, 1))
  theirs = []
  for seed in (1, 2):
    with jax.set_mesh(mesh):
      hf.save(tmp_path / str(seed), model, params(model, seed, mesh))
    theirs.append(transformers.Qwen3ForCausalLM.from_pretrained(
        tmp_path / str(seed), dtype=torch.float64).eval())
  student, guide = theirs
  rows, hint = rollout(), hint_of()
  total, count = 0.0, 0
  for b in range(8):
    prompt, response = rows.prompt_BT[b, : rows.prompt_length_B[b]].tolist(), rows.response(b)
    R = len(response)
    whole = student(torch.tensor([prompt + response.tolist()])).logits[0]
    behind = guide(torch.tensor([[*hint[b], *response.tolist()]])).logits[0].detach()
    # The R logits that predict the response stand just before its end.
    log_p = torch.log_softmax(whole[len(prompt) - 1: len(prompt) + R - 1], -1)
    log_q = torch.log_softmax(behind[len(hint[b]) - 1: len(hint[b]) + R - 1], -1)
    total = total + (log_p.exp() * (log_p - log_q)).sum()
    count += R
  (total / count).backward()
  grads, values = gradient(hinted(rows, hint))
  np.testing.assert_allclose(values["loss"], (total / count).item(), rtol=1e-5)
  want = student.model.embed_tokens.weight.grad.numpy()
  assert np.abs(want).max() > 1e-2
  np.testing.assert_allclose(grads["embed"], want, rtol=1e-3, atol=2e-6)
  norm = np.sqrt(sum(float((p.grad**2).sum()) for p in student.parameters()))
  np.testing.assert_allclose(values["grad_norm"], norm, rtol=1e-5)


@pytest.mark.medium
def test_a_hint_that_is_the_prompt_changes_nothing():
  rows = rollout()
  unchanged = {b: tuple(rows.prompt_BT[b, : rows.prompt_length_B[b]].tolist()) for b in range(8)}
  close(gradient(hinted(rows, unchanged)), gradient(rollouts.batch(rows)))
  assert abs(gradient(hinted(rows, hint_of()))[1]["loss"]
             - gradient(rollouts.batch(rows))[1]["loss"]) > 1e-3


@pytest.mark.medium
def test_neither_padding_nor_the_order_of_rows_changes_a_gradient():
  rows, hint = rollout(), hint_of()
  plain = gradient(hinted(rows, hint))
  close(gradient(hinted(rows, hint, width=WIDTH + 5)), plain)
  order = np.random.default_rng(3).permutation(8)
  close(gradient(hinted(rollouts.take(rows, order), hint)), plain)


@pytest.mark.medium
def test_rows_of_either_width_are_padded_to_the_multiple():
  batch = hinted(rollout(), hint_of())
  padded = microbatches.padded(batch, 8)
  assert padded.inputs_BT.shape == (8, 16) and padded.guide_inputs_BG.shape == (8, 16)
  assert batch.inputs_BT.shape == (8, 9) and batch.guide_inputs_BG.shape == (8, 12)
  assert np.all(padded.sequence_BT[:, 9:] == -1) and not np.any(padded.guide_segments_BG[:, 12:])
  close(gradient(jax.tree.map(np.asarray, padded)), gradient(batch))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_a_gradient_is_equal_on_every_mesh(shape):
  big, hint = rollout(B=16), hint_of(B=16)
  close(gradient(hinted(big, hint), shape), gradient(hinted(big, hint)), rtol=2e-5)


def test_an_abstract_batch_has_the_shapes_of_a_batch():
  mesh = sharding.make_mesh()
  real = hinted(rollout(), hint_of())
  abstract = compiling.abstract_batch(8, 9, mesh, sampled=False, guide_width=12)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(abstract) == shapes(real)
  plain = compiling.abstract_batch(8, 9, mesh, sampled=False)
  assert len(jax.tree.leaves(plain)) == len(jax.tree.leaves(real)) - 4
  hp = ml_collections.ConfigDict({"hint_tokens": WIDTH})
  assert hints.width(hp, 6) == real.guide_inputs_BG.shape[1]


# The loop.


def _compiled_once():
  """`compiling.compile_programs` that returns its first result again."""
  found = []

  def compile_programs(*args):
    found[:] = found or [compiling.compile_programs(*args)]
    return found[0]
  return compile_programs


def stage_of(folder, mesh, hint):
  """A stage of self-distillation of four steps, saved every two."""
  base = test_loop.make(folder, mesh)
  hp = ml_collections.ConfigDict(
      common.stage(steps=4, prompts=4, save_every=2, optim=common.adamw(lr=1e-2),
                   sampling=common.sampling(samples_per_prompt=4, max_tokens=6))
      | common.reverse_kl())
  hp.hint_tokens = 5
  model = base.models.learner.model
  guide = Role(model, test_loop.params_of(model, 0, mesh))
  return base._replace(
      hp=hp, objective=objectives.REVERSE_KL, rewards=None, hint_of=hint,
      models=base.models._replace(guide=guide),
      optimizer=optim.make(hp.optim, loop.update_count(hp), models.axes(model.config)))


@pytest.mark.medium
def test_a_killed_stage_ends_as_a_whole_one_and_its_ledger_has_the_guides_lengths(
    tmp_path, monkeypatch):
  hint = {i: (3, 4, 5 + i)[: 1 + i % 3] + (9, 9) for i in range(8)}
  mesh = sharding.make_mesh((1, 1, 1))
  # One compilation serves the three runs. The guide is the start, so all of the KL is the hint's.
  monkeypatch.setattr(loop, "compile_programs", _compiled_once())
  with jax.set_mesh(mesh):
    whole, totals = test_loop.run(stage_of(tmp_path / "whole", mesh, hint))
    step = loop._step

    def killed(*args):
      done = step(*args)
      if args[5] == 3:
        raise SystemExit(137)
      return done

    monkeypatch.setattr(loop, "_step", killed)
    with pytest.raises(SystemExit):
      test_loop.run(stage_of(tmp_path / "killed", mesh, hint))
    monkeypatch.setattr(loop, "_step", step)
    again, totals_again = test_loop.run(stage_of(tmp_path / "killed", mesh, hint))
  test_loop.equal(whole, again)
  assert totals["tokens_guide"] == totals_again["tokens_guide"]
  rows = metrics.read(tmp_path / "whole", "ledger")
  # Four samples of each prompt, whose hint has 3 to 5 tokens; its own prompt has 2.
  hints_in = sum(4 * len(hint[i]) for row in rows for i in row["prompts"])
  assert totals["tokens_guide"] == hints_in + totals["tokens_sampled"]
  assert metrics.read(tmp_path / "whole", "metrics")[0]["kl"] > 1e-3


def test_flops_of_a_guide_by_its_own_lengths():
  rows = rollouts.given_solutions([Prompt(0, (2, 3)), Prompt(1, (4,))], [[5, 1], [6, 7, 1]], 2, 3)
  step = rollouts.StepRollouts([Prompt(0, (2, 3)), Prompt(1, (4,))], rows, np.ones(2, bool))
  role = Role(models.get(TINY), None)
  hp = ml_collections.ConfigDict({"epochs": 1, "minibatches": 1})
  stage_models = StageModels(role, None, None, on_policy=False, guide=role)
  plain, with_hint = (ledger.step_entry(0, step, [], hp, stage_models, None, False, hint)
                for hint in (None, {0: (9,) * 5, 1: (9,) * 4}))
  assert plain["tokens_guide"] == 4 + 4 and with_hint["tokens_guide"] == 7 + 7
  config = role.model.config
  assert with_hint["flops"] - plain["flops"] == pytest.approx(
      ledger.forward_flops(config, [7, 7], [2, 3]) - ledger.forward_flops(config, [4, 4], [2, 3]))


# Plans.


def with_stage(**changes):
  """The tiny shipped config with the stage of self-distillation."""
  config = names.shipped()
  hp = config.stages.reverse_kl.to_dict()
  config.stages.self_distillation = ml_collections.ConfigDict(hp | {"hint_tokens": 32} | changes)
  config.arms = "self_distilled,cold_grpo"
  config.data.dir = "unused"
  return config


def plan(config, change=lambda row: row, **of_task):
  splits = problems.splits(sizes={"labelled": 64, "validation": 8, "test": 8})
  splits = {name: [change(dict(row)) for row in rows] for name, rows in splits.items()}
  task = tasks.get(config)._replace(source=splits.__getitem__, **of_task)
  return recipe.plan(config, task, compared=())


def test_a_plan_has_the_hints_and_the_name_of_the_stage_depends_on_their_text():
  planned = plan(with_stage())
  name, = planned.arms["self_distilled"]
  node = planned.nodes[name]
  assert node.guide == node.learner == "student" and set(node.hint_of) == set(planned.problems) & {
      prompt.id for prompt in planned.prompts["all"]}
  first = planned.prompts["all"][0]
  text = planned.chat.decode(node.hint_of[first.id])
  problem = planned.problems[first.id]
  before, answered, again = text.partition(problem["problem"])[2].partition(problem["problem"])
  assert answered and problem["answer"] in before and problem["answer"] not in again
  other = plan(with_stage(), hint=lambda row: [{"role": "user", "content": row["solution"]}])
  assert other.arms["self_distilled"] != [name]
  assert other.arms["cold_grpo"] == planned.arms["cold_grpo"]
  assert all(n.hint_of is None for n in planned.nodes.values() if n is not node)


@pytest.mark.parametrize("of_task, said", [
    ({"hint": lambda row: 1 / 0}, r"the task's hint of problem \d+ failed \(ZeroDivisionError: "),
    ({"hint": lambda row: None}, r"the hint of problem \d+ is not a list of messages: give each"),
    ({"messages": lambda row: 1 / 0}, r"the task's messages of problem \d+ of labelled failed \("),
    ({"messages": lambda row: row["problem"]}, r"problem \d+ of labelled is not a list of m"),
])
def test_a_function_of_the_task_that_fails_is_one_sentence_with_the_problem(of_task, said):
  with pytest.raises(InputError, match=said):
    plan(with_stage(), **of_task)
  planned = plan(with_stage(), family=lambda row: row["kind"])
  with pytest.raises(InputError, match=r"the task's family of problem 3 failed \(KeyError: 'kind'"):
    planned.family(3)


def test_the_word_all_chooses_arms_with_stages():
  config = names.shipped()
  config.arms = "all"
  assert list(plan(config).arms) == list(recipe.COMPARED)


@pytest.mark.parametrize("task, solution, said", [
    ("math", "3 + 4 = 7", "Here is a solution:\n\n3 + 4 = 7\n\nSolve the problem in your own wor"),
    ("math", None, "The answer is 7.\n\nSolve the problem in your own words."),
    ("word_problems", "3 + 4 = 7", "Here is a solution:\n\n3 + 4 = 7\n\nSolve")])
def test_hints_of_the_text_tasks(task, solution, said):
  config = ml_collections.ConfigDict({"task": task, "data": {"dir": "unused"},
                                      "checker": "string", "list_order": "any"})
  task_of_config = tasks.TASKS[task](config)
  problem = {"id": 0, "problem": "Compute 3 + 4.", "answer": "7"}
  if solution:
    problem["solution"] = solution
  last = task_of_config.hint(problem)[-1]["content"]
  assert last.startswith("Compute 3 + 4.\n\n") and said in last
  assert task_of_config.messages(problem)[:-1] == task_of_config.hint(problem)[:-1]


@pytest.mark.parametrize("config, change, of_task, said", [
    (with_stage(), dict, {"hint": None}, "hint_tokens is set and the task has no hints: leave"),
    (with_stage(hint_tokens=9), dict, {}, r"the hint of problem \d+ takes \d+ tokens and conf"),
    (with_stage(), lambda row: row | {"solution": None},
     {"hint": lambda row: [{"role": "user", "content": row["solution"]}]},
     r"problem \d+ has no solution and th"),
    (with_stage(hint_tokens=5000), dict, {}, r"hint_tokens \+ sampling.max_tokens is 50\d+ and "
     r"the guide has 64 positions .* hint_tokens may be \d+ here\.$"),
    (with_stage(hint_tokens=0), dict, {}, "hint_tokens is 0: set it to a whole number of at le"),
])
def test_hints_that_do_not_fit_are_refused(config, change, of_task, said):
  with pytest.raises(ValueError, match=said):
    plan(config, change, **of_task)


def test_a_stage_without_a_guide_has_no_use_for_hints():
  config = names.shipped()
  config.stages.sft.hint_tokens = 9
  config.arms = "sft_only"
  with pytest.raises(ValueError, match="stages.sft.hint_tokens is set and this stage has no guide"):
    plan(config)


def test_the_arm_is_that_stage_alone():
  assert recipe.ARMS["self_distilled"] == (Use("self_distillation", "all"),)


def test_self_distillation_without_hints_is_refused(tmp_path):
  config = arithmetic.get_config("tiny").unlock()
  config.stages.self_distillation = config.stages.reverse_kl.copy_and_resolve_references()
  config.arms = "self_distilled"
  with pytest.raises(InputError, match="self_distillation.hint_tokens is absent and the guide is "
                                       "the learner's own start, which has nothing to teach"):
    recipe.plan(config, tasks.get(config))
