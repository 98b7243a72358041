"""Labels, tokens and FLOPs, counted by hand."""

from types import SimpleNamespace

import pytest

from s2d_jax import ledger

COUNTS = {name: 0 for name in ledger.COUNTS if name not in ("label_uses", "prompt_uses")}


def test_labels_are_distinct_problems_and_uses():
  rows = [ledger.row(0, [1, 2], [1, 2], **COUNTS | {"tokens_sampled": 5}),
          ledger.row(1, [2, 3], [2, 3], **COUNTS | {"tokens_sampled": 7}),
          ledger.row(2, [4], [], **COUNTS | {"updates": 3})]
  got = ledger.total(rows)
  assert (got["labels_distinct"], got["label_uses"]) == (3, 4)
  assert (got["prompts_distinct"], got["prompt_uses"]) == (4, 5)
  assert got["labels"] == [1, 2, 3] and got["tokens_sampled"] == 12 and got["updates"] == 3


def test_some_of_a_steps_labels_may_have_been_bought_before():
  rows = [ledger.row(0, [1, 2, 3], [1, 3], **COUNTS), ledger.row(1, [1, 2, 3], [2], **COUNTS)]
  got = ledger.total(rows)
  assert (got["labels_distinct"], got["label_uses"], got["prompt_uses"]) == (3, 3, 6)


def test_a_row_without_a_count_is_refused():
  with pytest.raises(ValueError, match="tokens_guide"):
    ledger.row(0, [1], [1], **{k: v for k, v in COUNTS.items() if k != "tokens_guide"})


def test_forward_flops_by_hand():
  # One layer: q 4·2·3=24, k and v 4·1·3 each=24, o 24, mlp 3·4·5=60, head 7·4=28: 160 weights.
  # Three tokens: 2·160·3 = 960, and pairs 1+2+3 = 6 of 4·heads·head width = 24: 144.
  config = SimpleNamespace(layers=1, width=4, heads=2, kv_heads=1, head_width=3, mlp=5,
                           vocab_size=7)
  assert ledger.forward_flops(config, [3]) == 960 + 144
  assert ledger.forward_flops(config, [3, 3]) == 2 * (960 + 144)


def test_seconds():
  assert ledger.seconds([{"seconds": 2.0}, {"seconds": 3.0}], 4.0, 8) == {
      "device_seconds_used": 40.0, "device_seconds_lost": 32.0}
