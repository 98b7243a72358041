"""Labels, tokens and FLOPs, counted by hand."""

from types import SimpleNamespace

import jax
import pytest

from s2d_jax import ledger, models

COUNTS = {name: 0 for name in ledger.COUNTS if name not in ("label_uses", "prompt_uses")}


def test_totals_count_distinct_labels_and_uses():
  rows = [ledger.entry(0, [1, 2], [1, 2], **COUNTS | {"tokens_sampled": 5}),
          ledger.entry(1, [2, 3], [2, 3], **COUNTS | {"tokens_sampled": 7}),
          ledger.entry(2, [4], [], **COUNTS | {"updates": 3})]
  got = ledger.total(rows)
  assert (got["labels_distinct"], got["label_uses"]) == (3, 4)
  assert (got["prompts_distinct"], got["prompt_uses"]) == (4, 5)
  assert got["labels"] == [1, 2, 3] and got["tokens_sampled"] == 12 and got["updates"] == 3


def test_a_step_may_spend_some_of_its_prompts_labels():
  rows = [ledger.entry(0, [1, 2, 3], [1, 3], **COUNTS), ledger.entry(1, [1, 2, 3], [2], **COUNTS)]
  got = ledger.total(rows)
  assert (got["labels_distinct"], got["label_uses"], got["prompt_uses"]) == (3, 3, 6)


def test_an_entry_without_a_count_is_refused():
  with pytest.raises(ValueError, match="tokens_guide"):
    ledger.entry(0, [1], [1], **{k: v for k, v in COUNTS.items() if k != "tokens_guide"})


def test_forward_flops_by_hand():
  # One layer: q 4·2·3=24, k and v 4·1·3 each=24, o 24, mlp 3·4·5=60, head 7·4=28: 160 weights.
  # Three tokens: 2·160·3 = 960, and pairs 1+2+3 = 6 of 4·heads·head width = 24: 144.
  config = SimpleNamespace(layers=1, width=4, heads=2, kv_heads=1, head_width=3, mlp=5,
                           vocab_size=7)
  assert ledger.forward_flops(config, [3]) == 960 + 144
  assert ledger.forward_flops(config, [3, 3]) == 2 * (960 + 144)
  # Two of three tokens of the first and none of the second unembedded: 28 weights at 4 less.
  assert ledger.forward_flops(config, [3, 3], [2, 0]) == 2 * (960 + 144) - 4 * 2 * 28


@pytest.mark.parametrize("name, parameters, not_multiplied", [
    # Published counts, less what multiplies nothing: norms, and an embedding that is not the head.
    ("qwen3-1.7b", 1_720_574_976, (2 * 2048 + 2 * 128) * 28 + 2048),
    ("qwen3-8b", 8_190_735_360, (2 * 4096 + 2 * 128) * 36 + 4096 + 151_936 * 4096),
    ("llama-3.2-1b", 1_235_814_400, 2 * 2048 * 16 + 2048),
    ("llama-3.3-70b", 70_553_706_496, 2 * 8192 * 80 + 8192 + 128_256 * 8192)])
def test_flops_of_published_models(name, parameters, not_multiplied):
  config = models.get(name).config
  assert sum(x.size for x in jax.tree.leaves(models.shapes(config))) == parameters
  pairs = 1000 * 1001 // 2
  attended = 4 * config.layers * config.heads * config.head_width * pairs
  assert ledger.forward_flops(config, [1000]) == 2 * (parameters - not_multiplied) * 1000 + attended


def test_seconds():
  assert ledger.seconds([{"seconds": 2.0}, {"seconds": 3.0}], 4.0, 8) == {
      "device_seconds_used": 40.0, "device_seconds_lost": 32.0}
