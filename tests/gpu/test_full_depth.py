"""The README's preflight line for cards, and Llama's: published models with all their layers."""

import re

import jax
import pytest

from configs import qwen3_math
from s2d_jax import preflight, program_cache, recipe, sharding
from s2d_jax.preflight import costs, pool, programs, topologies
from tests.gpu.test_preflight import flags
from tests.preflight import folders

pytestmark = [
    pytest.mark.gpu,
    # ml_collections loads config files by importlib's old name.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")]

TOKENS = 64 * 8 * (3072 + 16_384 - 1)  # of a step of on-policy distillation


def check(found, stage, student, teacher, cards):
  """The bytes and FLOPs of a stage's update, by the parameters of its two models."""
  programs = dict(
      re.findall(rf"^{stage} +(sample prefill|sample|update) +([\d,]+) ", found, re.M))
  assert set(programs) == {"sample", "sample prefill", "update"}
  # The weights and two moments in float32, and a frozen teacher in bfloat16.
  held = (12 * student + 2 * teacher) / cards
  assert held < int(programs["update"].replace(",", "")) < 1.01 * held
  # Forward and backward, and the teacher forward.
  (flops,) = re.findall(rf"^{stage} +update(?: +[\d,]+){{5}} +([\d,.]+)", found, re.M)
  assert 1e9 * float(flops.replace(",", "")) > (6 * student + 2 * teacher) * TOKENS / cards


def test_the_readmes_line_fits(tmp_path, capsys):
  models = folders.published(tmp_path, ("Qwen3-1.7B", "Qwen3-8B"))
  preflight.main([f"--config=configs/qwen3_math.py:models={models},data={models}",
                  "--topology=h100:8", "--config.mesh=(1,8,1)", "--fast"])
  found = capsys.readouterr().out
  check(found, "reverse_kl", 1_720_574_976, 8_190_735_360, cards=8)
  assert "no formula has" not in found
  # No shipped config has self_distillation.
  stages = {stage.name for stage in recipe.STAGES} - {"self_distillation"}
  for name in (*sorted(stages), "the whole"):
    assert re.search(rf"^{name}: fits: [\d.]+ GB of 78.15 GB", found, re.M), name


def test_distillation_of_llama_fits_64_cards(tmp_path, capsys):
  models = folders.published(tmp_path, ("Llama-3.1-8B-Instruct", "Llama-3.3-70B-Instruct"))
  preflight.main([*flags(models, "h100:64", "(1, 64, 1)", "reverse_kl", config="llama_math"),
                  "--fast", "--config.stages.reverse_kl.microbatches=8"])
  found = capsys.readouterr().out
  check(found, "reverse_kl", 8_030_261_248, 70_553_706_496, cards=64)
  for name in ("reverse_kl", "the whole"):
    assert re.search(rf"^{name}: fits: [\d.]+ GB of 78.15 GB", found, re.M), name


# The share of 16 GB that JAX takes, as of the described cards.
SIXTEEN = 0.92 * 16e9


class PrefillAlone(pool.Progress):
  """Compiles the reading of prompts and leaves out the other programs, which take minutes."""

  def costs(self, requests, chip):
    """The costs of the requests for that program."""
    return super().costs([one for one in requests if isinstance(one.lowered, costs.DoesNotFit)
                          or one.program == "sample prefill"], chip)


def test_the_config_for_one_card_fits_80_gb(tmp_path):
  # docs/sizes.md has all programs of the teacher's GRPO. This one needs most: the trained weights,
  # their copy for decoding, and the cache of as many rows as fit beside them.
  models = folders.published(tmp_path, ("Qwen3-1.7B", "Qwen3-8B"))
  config = qwen3_math.get_config(f"one_gpu,models={models},data={models}")
  with config.unlocked():
    for name, hp in config.stages.items():
      hp.steps = hp.steps if name == "teacher_grpo" else 0
  chip = topologies.chip("h100")
  mesh = sharding.make_mesh(config.mesh, topologies.devices("h100"))
  with program_cache.opened(""), jax.set_mesh(mesh):
    (cost,) = programs.costs_of(config, programs.Target(chip, fast=True), PrefillAlone())
  assert cost.account is not None, cost.problem
  # The weights in float32, and their copy in bfloat16 for decoding.
  assert cost.bytes > 6 * 8_190_735_360
  assert cost.bytes < chip.usable < 80e9


def test_the_small_config_fits_a_card_of_16_gb(tmp_path, capsys):
  # The teacher's GRPO needs most: 1.7 B weights in float32 beside their copy for decoding.
  models = folders.published(tmp_path, ("Qwen3-0.6B", "Qwen3-1.7B"))
  stages = ("teacher_sft", "forward_kl", "sft", "weighted_fkl", "reverse_kl", "student_grpo")
  preflight.main([f"--config=configs/qwen3_math.py:colab,models={models},data={models}",
                  "--topology=h100", "--fast",
                  *(f"--config.stages.{name}.steps=0" for name in stages)])
  found = capsys.readouterr().out
  # Each program's bytes, with what the stage holds meanwhile.
  resident = {program: int(number.replace(",", "")) for program, number in re.findall(
      r"^teacher_grpo +(sample prefill|sample|token_logps|update)(?: +[\d,]+){4} +([\d,]+)", found,
      re.M)}
  assert set(resident) == {"sample prefill", "sample", "token_logps", "update"}
  # The weights in float32, and their copy in bfloat16 while rows are decoded.
  assert resident["update"] > 4 * 1_720_574_976
  assert resident["sample"] > 6 * 1_720_574_976
  assert max(resident.values()) < SIXTEEN
