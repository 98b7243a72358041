"""The README's preflight line: published models with all of their layers, for a slice of TPUs."""

import re

import pytest

from s2d_jax import preflight, recipe
from tests.preflight import folders

pytestmark = [
    pytest.mark.tpu,
    # ml_collections loads config files by importlib's old name.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")]


def test_the_readmes_line_fits_for_distillation(tmp_path, capsys):
  models = folders.published(tmp_path, ("Qwen3-8B", "Qwen3-1.7B"))
  # All stages take nine minutes on two cores that do nothing else: too long for a test.
  left_out = [f"--config.stages.{stage.name}.steps=0" for stage in recipe.STAGES
              if stage.name not in ("reverse_kl", "self_distillation")]
  preflight.main([f"--config=configs/qwen3_math.py:models={models},data={models}",
                  "--topology=v5p:2x2x4", "--fast", *left_out])
  found = capsys.readouterr().out
  programs = dict(
      re.findall(r"^reverse_kl +(sample prefill|sample|update) +([\d,]+) ", found, re.M))
  assert set(programs) == {"sample", "sample prefill", "update"}
  # Of 16 chips: weights and two moments in float32, and the frozen teacher in bfloat16.
  held = (12 * 1_720_574_976 + 2 * 8_190_735_360) / 16
  assert held < int(programs["update"].replace(",", "")) < 1.02 * held
  assert "no formula has" not in found
  for name in ("reverse_kl", "the whole"):
    assert re.search(rf"^{name}: fits: [\d.]+ GB of 102.80 GB", found, re.M), name
