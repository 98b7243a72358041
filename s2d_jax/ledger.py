"""What a stage spends, in the currencies that are scarce: labels, prompts, tokens, FLOPs, seconds.

A *label* is a problem's checked answer. It is spent when a reward or a given solution consults it;
one *use* is one problem in one step, however many of its samples are checked. A bridge stage draws
the same prompts and spends no label. Samples that another stage had drawn are *reused*, and
`flops_reused` is what drawing them anew would have added to `flops`.
"""

import numpy as np

COUNTS = ("label_uses", "prompt_uses", "sequences", "updates", "tokens_sampled", "tokens_reused",
          "tokens_discarded", "tokens_trained", "tokens_guide", "flops", "flops_reused")


def forward_flops(config, length_B, headed_B=None):
  """FLOPs of one forward pass over sequences of `length_B` tokens, `headed_B` of them unembedded.

  None: all of them.

  2 per weight that multiplies and token, and 4·N·H per layer and attended pair (causal): the
  count of Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361, table 1) with attention exact.
  A backward pass costs twice a forward.
  """
  c, n = config, np.asarray(length_B, np.float64)
  headed = n if headed_B is None else np.asarray(headed_B, np.float64)
  attention = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
  weights, head = c.layers * (attention + 3 * c.width * c.mlp), c.vocab_size * c.width
  pairs = n * (n + 1) / 2
  return float(np.sum(2 * (weights * n + head * headed)
                      + 4 * c.layers * c.heads * c.head_width * pairs))


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


def labels(work, picked, before):
  """Whose answers a step of a `loop.Work` spends: all it draws; where they serve pass rates alone,
  those that no row `before` has."""
  problems = [p.id for p in picked]
  if work.advantages is not None or work.given is not None:
    return problems
  if work.judge is None:
    return []
  known = {i for entry in before for i in entry["labels"]}
  return [i for i in problems if i not in known]


def spent(work, step, drawn, labels, judged, scored):
  """One step's row.

  Args:
    work: the stage, a `loop.Work`; drawn: a `drawing.Drawn`; labels: whose answers were consulted.
    judged: the rows that a pass rate asked for, or None.
    scored: whether the actor's log-probabilities were taken in a pass of their own.
  """
  hp, rows, given = work.hp, drawn.rows, work.given is not None
  length_B, response_B = rows.prompt_length_B + rows.response_length_B, rows.response_length_B
  learned_B = response_B if drawn.weight_B is None else response_B * (drawn.weight_B > 0)
  learned = int(learned_B.sum())
  learner, actor = (work.learner.model.config, (work.actor or work.learner).model.config)
  guide = 0.0 if work.guide is None else forward_flops(
      work.guide.model.config, length_B, learned_B)
  passes = 3 if work.frozen is None else 2  # frozen weights ask for no gradient
  drawn_rows = [] if given else [(actor, rows, drawn.fresh_B)]  # a token drawn is a forward
  if drawn.dropped is not None:
    drawn_rows.append((actor, drawn.dropped, drawn.dropped_fresh_B))
  if judged is not None:
    drawn_rows.append((learner, judged, np.ones(len(judged.prompt_id_B), bool)))
  (sampled, flops), (reused, flops_reused) = (
      np.sum([_drawn(*each, fresh) for each in drawn_rows] or [(0, 0.0)], axis=0)
      for fresh in (True, False))
  discarded = int(response_B.sum()) - learned
  if drawn.dropped is not None:
    discarded += int(drawn.dropped.response_length_B.sum())
  return row(
      step, [p.id for p in drawn.picked], labels, sequences=len(length_B),
      updates=hp.epochs * hp.minibatches, tokens_sampled=int(sampled), tokens_reused=int(reused),
      tokens_discarded=discarded, tokens_trained=hp.epochs * learned,
      tokens_guide=0 if work.guide is None else hp.epochs * int(length_B.sum()),
      flops=float(flops) + scored * forward_flops(actor, length_B, response_B) + hp.epochs * (
          passes * forward_flops(learner, length_B, learned_B) + guide),
      flops_reused=float(flops_reused))


def _drawn(config, rows, fresh_B, fresh):
  """(tokens, FLOPs) of drawing those of the rows that are fresh, or those that are not."""
  own_B = fresh_B == fresh
  return (rows.response_length_B[own_B].sum(),
          forward_flops(config, (rows.prompt_length_B + rows.response_length_B)[own_B],
                        rows.response_length_B[own_B]))


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
