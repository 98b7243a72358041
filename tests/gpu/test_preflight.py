"""Preflight for GPUs that are not here: published shapes, compiled for the card.

Run by `make test-gpu`, in an environment of its own that has CUDA's plugin; elsewhere left out.
"""

import functools
import re
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from configs import common
from s2d_jax import command, compiling, models, objectives, optim, preflight, sharding, training
from s2d_jax.preflight import costs, hlo, topologies
from s2d_jax.preflight import programs as preflight_programs
from s2d_jax.rollouts import Batch
from s2d_jax.sampler import capacity, decode, programs
from tests.preflight import folders, options

pytestmark = pytest.mark.gpu

LAYERS = 2  # of the published models' 36 and 28: a layer's programs are those of the whole model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Both models of qwen3_math as folders with config.json and tokenizer alone, of few layers."""
  return folders.published(tmp_path_factory.mktemp("models"), ("Qwen3-8B", "Qwen3-1.7B"),
                           num_hidden_layers=LAYERS)


class AnUpdate(NamedTuple):
  """An update by negative log-likelihood and AdamW of a published model, to be compiled for cards.
  """
  mesh: jax.sharding.Mesh
  model: models.Model
  hp: types.SimpleNamespace
  optimizer: optax.GradientTransformation
  state: training.TrainState
  batch: Batch

  def lowered(self):
    """The update in one program, lowered on the current mesh."""
    step = training.jit_update(self.model, None, objectives.NEGATIVE_LOG_LIKELIHOOD,
                               self.optimizer, self.hp, training.shardings(self.state))
    return step.lower(self.state, None, self.batch)


def an_update(name, rows, width, topology="h100", remat="block", mesh=None, microbatches=1,
              **changes):
  """An AnUpdate; without a mesh the weights are split over all cards, and the rows."""
  devices = topologies.devices(topology)
  where = sharding.make_mesh(mesh or (1, len(devices), 1), devices)
  model = models.get(models.PUBLISHED[name] | changes, dtype="bfloat16", remat=remat)
  hp = types.SimpleNamespace(**common.adamw(lr=1e-6), microbatches=microbatches, block=1024,
                             mean="token")
  with jax.set_mesh(where):
    optimizer = optim.make(hp, 10, models.axes(model.config))
    state = training.abstract(optimizer, where, models.laid_out(model.config, where))
    batch = compiling.abstract_batch(rows, width, where)
  return AnUpdate(where, model, hp, optimizer, state, batch)


def lowered_update(*args, **settings):
  """`AnUpdate.lowered` of `an_update`."""
  update = an_update(*args, **settings)
  with jax.set_mesh(update.mesh):
    return update.lowered()


def test_the_programs_of_options_are_compiled():
  config = options.config()
  with jax.set_mesh(sharding.make_mesh((1, 2, 1), topologies.devices("h100:2"))):
    found = list(preflight.costs_of(
        config, preflight_programs.Target(topologies.chip("h100"), fast=True)))
  assert {(cost.stage, cost.program) for cost in found} == options.programs("reward")
  assert all(cost.account is not None for cost in found)


STAGES = ("forward_kl", "reverse_kl", "sft", "student_grpo", "teacher_grpo", "teacher_sft",
          "weighted_fkl")


def flags(folder, topology, mesh, *stages, config="qwen3_math"):
  """The README's flags, for these stages of a config."""
  left_out = [f"--config.stages.{name}.steps=0" for name in STAGES if name not in stages]
  return [f"--config=configs/{config}.py:models={folder},data={folder}",
          f"--topology={topology}", f"--config.mesh={mesh}", *left_out]


# ml_collections loads config files by importlib's old name.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_readmes_line_on_eight_cards(folder, capsys):
  preflight.main([*flags(folder, "h100:8", "(1, 8, 1)", "reverse_kl", "teacher_sft"), "--fast",
                  "--price=2.5"])
  found = capsys.readouterr()
  lines = found.out.splitlines()
  programs = {tuple(line[:36].split(maxsplit=1)) for line in lines[2:6]}
  assert {(stage, program.strip()) for stage, program in programs} == {
      ("reverse_kl", "sample"), ("reverse_kl", "sample prefill"), ("reverse_kl", "update"),
      ("teacher_sft", "update")}
  for name in ("reverse_kl", "teacher_sft", "the whole"):
    assert re.search(rf"^{name}: fits: [\d.]+ GB of 78.15 GB", found.out, re.M), name
  # The guide of 8B: a layer in bfloat16 on eight cards, 192,946,432 and 1,244,663,808 numbers.
  assert "a device has 84.94 GB, of which JAX takes 92%: 78.15 GB" in lines
  (update,) = [line for line in lines if line.split()[:2] == ["reverse_kl", "update"]]
  arguments = int(update.split()[2].replace(",", ""))
  assert arguments > 12 * (2 * 50_337_024 + 311_164_928) / 8 + 2 * (
      LAYERS * 192_946_432 + 1_244_663_808) / 8
  assert "reverse_kl: update compiled in " in found.err
  # Of the arms' stages only reverse_kl has steps: of all labels in two arms, and of 1h in one.
  assert re.match(r"8 chips x [\d,.]+ hours at least x 2.5 = [\d,]+: 2 stages, every response of "
                  r"max_tokens; not counted: reverse_kl validation \(not compiled\), "
                  r"probe \(not compiled\), aime24 \(not compiled\), aime25 \(not compiled\), "
                  r"math500 \(not compiled\)$", lines[-1])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_sweep_counts_the_stages_of_all_its_runs(capsys):
  stages = ("teacher_grpo", "forward_kl", "reverse_kl")
  left_out = [f"--config.stages.{name}.steps=0" for name in STAGES if name not in stages]
  preflight.main(["--config=configs/sweep_seeds.py:tiny", "--config.arms=bridge", *left_out,
                  "--topology=h100", "--fast"])
  found = capsys.readouterr().out
  for name in (*stages, "the whole"):
    assert re.search(rf"^{name}: fits: [\d.]+ GB of 78.15 GB", found, re.M), name
  # Three stages under three seeds. The seeds share their programs, which are printed once.
  assert len(re.findall(r"^reverse_kl +update ", found, re.M)) == 1
  assert re.search(r"^1 chip x [\d.e-]+ hours at least: 9 stages, ", found, re.M)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the card's bytes are those of jax 0.11")
def test_an_update_of_qwen3_0_6b_by_hand():
  compiled = lowered_update("qwen3-0.6b", 4, 2048).compile()
  # An H200 with jax 0.11.2 had 10.66 GB of arguments, temporaries and outputs; jax 0.12.0.1 makes
  # 10.65 of them.
  account = costs.account(compiled)
  assert 12 * 596_049_920 <= account.arguments < 12 * 596_049_920 + 1e6
  assert abs(account.total / 10.66e9 - 1) < 0.02, f"jax {jax.__version__}: {account}"
  # 8,192 tokens in eight blocks. Each weight of a layer is multiplied forward, again where the
  # block is recomputed (but for the last of its products), and twice backward; the unembedding
  # once forward and twice backward.
  kernels = hlo.kernels(compiled.as_text(), unknown_trips=8)
  mlp = 1024 * 3072
  layer = 8 * (3 * 1024 * 2048 + 3 * mlp) - 2 * mlp
  products = hlo.total(kernel for kernel in kernels if "fmha" not in kernel.opcode)
  assert products.flops == pytest.approx(8192 * (28 * layer + 6 * 1024 * 151_936), rel=1e-3)
  # Attention: two products forward, twice, and five backward, for 16 heads of 128.
  attention = hlo.total(kernel for kernel in kernels if "fmha" in kernel.opcode)
  causal = 0.5 if "CAUSAL" in compiled.as_text() else 1.0
  assert attention.flops == pytest.approx(causal * 28 * 9 * 2 * 4 * 16 * 2048**2 * 128)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_search_prints_the_cheapest_candidate_and_the_verdict_on_all_its_programs(folder, capsys):
  preflight.main([*flags(folder, "h100", "(1, 1, 1)", "teacher_sft"), "--search", "--price=2.5",
                  "--config.stages.teacher_sft.prompts=2",
                  "--config.stages.teacher_sft.microbatches=2", "--config.probe.problems=0"])
  lines = capsys.readouterr().out.splitlines()
  # Two rows in two microbatches or in one, with remat and without.
  assert any(re.search(r"microbatches x 0.5.* at least [\d.]+ hours", line) for line in lines)
  assert re.match(r"the cheapest that fits: .*1 chip x [\d.]+ hours at least x 2.5 = ", lines[-3])
  assert lines[-2].startswith("as flags: --config.mesh=")
  assert re.match(r"with all of its programs: fits: [\d.]+ GB of 78.15 GB", lines[-1])


def test_an_odd_length_has_a_gradient():
  # A batch is one token shorter than its rollout, so lengths are odd. cuDNN has gradients for even
  # ones, and the causal kernel is used all the same.
  text = lowered_update("qwen3-0.6b", 2, 511, num_hidden_layers=1).as_text()
  assert "fmhaSoftmaxBackward" in text and "PADDING_CAUSAL" in text


def test_eight_cards_share_an_updates_products():
  found = {}
  for topology in ("h100", "h100:8"):
    text = lowered_update("qwen3-0.6b", 8, 1024, topology, num_hidden_layers=LAYERS
                          ).compile().as_text()
    found[topology] = hlo.total(hlo.kernels(text, unknown_trips=8 if topology == "h100" else 1))
  one = found["h100"]
  eight = found["h100:8"]
  assert abs(8 * eight.flops / one.flops - 1) < 0.1
  assert one.collective_bytes == 0 < eight.collective_bytes


def test_rows_move_between_eight_cards_without_all_of_them_on_each():
  devices = topologies.devices("h100:8")
  where = sharding.make_mesh((1, 8, 1), devices)
  config = models.get(models.PUBLISHED["qwen3-8b"], dtype="bfloat16").config
  # 64 slots of 18,432 tokens on each card, and 16 prompts of 2,048.
  shapes = capacity.Shapes((512,), (18_432,), 2048, 512, prompts=128, shards=8, pages=0, table=0)

  def layer(count, tokens):
    slots = programs.abstract_slots(config, capacity.SamplerConfig(), shapes, count, tokens, where)
    return slots.cache[0]

  def rows(count, dtype):
    return jax.ShapeDtypeStruct((count,), dtype, sharding=sharding.replicated(where))

  def account(move, result, *args, donate=()):
    """The memory of a move in eight pieces, whose result has the layout of `result`."""
    layouts = jax.tree.map(lambda x: x.sharding, result)
    move = jax.jit(functools.partial(move, 8), donate_argnums=donate, out_shardings=layouts)
    return costs.account(move.lower(*args).compile())

  with jax.set_mesh(where):
    slots = layer(512, 18_432)
    admitted = account(decode.admit, slots, slots, layer(128, 2048), rows(512, jnp.int32),
                       rows(512, bool), donate=0)
    shrunk = account(decode.shrink, layer(256, 18_432), slots, rows(256, jnp.int32))
  # Eight heads of 128 in bfloat16 for each token. A card's own part of the prompts' keys, which
  # are taken in eight pieces of all cards, and what a slot's row takes of a piece.
  token = 8 * 128 * 2
  assert admitted.temporaries < 1.1 * (16 + 2 * 64 // 8) * 2048 * token
  assert admitted.output < 1000  # the cache is updated in place
  # The keys of a card's own 64 slots.
  assert shrunk.temporaries < 1.1 * 64 * 18_432 * token
  assert 0 <= shrunk.output - 2 * 32 * 18_432 * token < 1000


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_program_that_does_not_fit_is_named_with_its_number(folder, capsys):
  with pytest.raises(SystemExit) as error:
    command.call(preflight.main, [*flags(folder, "a100", "(1, 1, 1)", "teacher_sft"), "--fast",
                                  "--config.stages.teacher_sft.microbatches=1"])
  assert error.value.code == 1
  found = capsys.readouterr().out
  assert re.search(r"^teacher_sft: does not fit: teacher_sft update needs [\d.]+ GB of 78.29 GB: "
                   r"arguments [\d.]+ GB, temporaries [\d.]+ GB", found, re.M)
  assert "the whole: does not fit" in found


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_mesh_of_other_size_is_refused_before_anything_compiles(folder, capsys):
  for mesh, said in (("(1, 4, 1)", "leaves 4 of the 8 devices"),
                     ("(1, 16, 1)", "needs 16 devices")):
    with pytest.raises(SystemExit) as error:
      command.call(preflight.main, flags(folder, "h100:8", mesh, *STAGES))
    assert error.value.code == 2
    found = capsys.readouterr()
    assert f"s2d_jax: config.mesh is {mesh}" in found.err and said in found.err
    assert "compiled" not in found.err


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_price_that_is_no_number_is_refused_before_anything_compiles(folder, capsys):
  with pytest.raises(SystemExit) as error:
    command.call(preflight.main, [*flags(folder, "h100", "(1, 1, 1)", *STAGES), "--price=cheap"])
  assert error.value.code == 2
  assert "--price is 'cheap'" in capsys.readouterr().err
