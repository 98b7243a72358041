"""What a stage spends, in the currencies that are scarce: labels, prompts, tokens, FLOPs, seconds.

A *label* is a problem's checked answer. It is spent when a reward or a given solution consults it;
one *use* is one problem in one step, however many of its samples are checked. A bridge stage draws
the same prompts and spends no label. Samples that another stage had drawn are *reused*, and
`flops_reused` is what drawing them anew would have added to `flops`.
"""

import numpy as np

COUNTS = ("label_uses", "prompt_uses", "sequences", "updates", "tokens_sampled", "tokens_reused",
          "tokens_discarded", "tokens_trained", "tokens_guide", "flops", "flops_reused")


def forward_flops(config, length_B):
  """FLOPs of one forward pass over sequences of `length_B` tokens, unembedding included.

  2 per weight that multiplies and token, and 4·N·H per layer and attended pair (causal): the
  count of Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361, table 1) with attention exact.
  A backward pass costs twice a forward.
  """
  c, n = config, np.asarray(length_B, np.float64)
  attention = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
  weights = c.layers * (attention + 3 * c.width * c.mlp) + c.vocab_size * c.width
  pairs = n * (n + 1) / 2
  return float(np.sum(2 * weights * n + 4 * c.layers * c.heads * c.head_width * pairs))


def row(step, prompt_ids, labels, **counts):
  """One step's entry: which problems were drawn, whose labels were spent, and the counts.

  Args:
    step: the step.
    prompt_ids: problem ids of the step, each once.
    labels: those of them whose answers the step consulted.
    **counts: the rest of COUNTS, in sequences, updates, tokens and FLOPs.
  """
  entry = {"step": step, "prompts": [int(i) for i in prompt_ids],
           "labels": [int(i) for i in labels], "prompt_uses": len(prompt_ids),
           "label_uses": len(labels), **counts}
  missing = set(COUNTS) - set(entry)
  if missing:
    raise ValueError(f"a ledger row lacks {sorted(missing)}: pass every count.")
  return entry


def total(rows):
  """Sums of a stage's rows, and the distinct problems and labels behind them (sorted ids)."""
  labels = sorted({i for r in rows for i in r["labels"]})
  prompts = sorted({i for r in rows for i in r["prompts"]})
  sums = {name: sum(r[name] for r in rows) for name in COUNTS}
  return {**sums, "labels_distinct": len(labels), "prompts_distinct": len(prompts),
          "labels": labels, "prompts": prompts}


def seconds(rows, lost, devices):
  """Device-seconds used (stage start and kept steps) and lost (done again after a kill)."""
  return {"device_seconds_used": devices * sum(r["seconds"] for r in rows),
          "device_seconds_lost": devices * lost}
