"""The README's preflight line for cards: published models with all of their layers."""

import importlib.util
import re

import pytest

from s2d_jax import preflight
from tests.gpu.test_preflight import flags
from tests.preflight import folders

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None,
                       reason="make test-gpu has the plugin"),
    # ml_collections loads config files by importlib's old name.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")]

TOKENS = 64 * 8 * (3072 + 16_384 - 1)  # of a step of on-policy distillation


@pytest.mark.parametrize("config, names, cards, microbatches, student, teacher", [
    ("qwen3_math", ("Qwen3-1.7B", "Qwen3-8B"), 8, 64, 1_720_574_976, 8_190_735_360),
    ("llama_math", ("Llama-3.1-8B-Instruct", "Llama-3.3-70B-Instruct"), 64, 8, 8_030_261_248,
     70_553_706_496)])
def test_distillation_of_published_models_fits(config, names, cards, microbatches, student, teacher,
                                               tmp_path, capsys):
  models = folders.published(tmp_path, names)
  preflight.main([*flags(models, f"h100:{cards}", f"(1, {cards}, 1)", "reverse_kl", config=config),
                  "--fast", f"--config.stages.reverse_kl.microbatches={microbatches}"])
  found = capsys.readouterr().out
  programs = dict(
      re.findall(r"^reverse_kl +(sample prefill|sample|update) +([\d,]+) ", found, re.M))
  assert set(programs) == {"sample", "sample prefill", "update"}
  # The weights and two moments in float32, and a frozen teacher in bfloat16.
  held = (12 * student + 2 * teacher) / cards
  assert held < int(programs["update"].replace(",", "")) < 1.01 * held
  # Forward and backward, and the teacher forward.
  (flops,) = re.findall(r"^reverse_kl +update(?: +[\d,]+){5} +([\d,.]+)", found, re.M)
  assert 1e9 * float(flops.replace(",", "")) > (6 * student + 2 * teacher) * TOKENS / cards
  for name in ("reverse_kl", "the whole"):
    assert re.search(rf"^{name}: fits: [\d.]+ GB of 78.15 GB", found, re.M), name
