"""The ledger of a stage: the labels, prompts, tokens, FLOPs and seconds that it spends.

A *label* is a problem's checked answer. It is spent when a reward or a given solution reads it.
One *use* is one problem in one step, however many of its samples are checked. A bridge stage
samples the same prompts and spends no label.

Rows that another stage has sampled are *reused*. `flops_reused` counts the FLOPs that sampling them
anew would have added to `flops`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from s2d_jax.errors import InputError
from s2d_jax.foresee import Found
from s2d_jax.models import Config
from s2d_jax.roles import Role, StageModels
from s2d_jax.rollouts import LabelUse, Prompt, Rollout, StepRollouts

COUNTS = ("label_uses", "prompt_uses", "sequences", "updates", "tokens_sampled", "tokens_reused",
          "tokens_discarded", "tokens_trained", "tokens_guide", "flops", "flops_reused")

# Costs of options, charged apart; absent where a stage has not the option.
PARTS = ("foresee", "allocate")

_Entry = dict[str, Any]


def forward_flops(config: Config, length_B: Sequence[int],
                  headed_B: Sequence[int] | None = None) -> float:
  """FLOPs of one forward pass over sequences of `length_B` tokens.

  2 per multiplying weight and token, and 4·N·H per layer and attended pair (causal): the count of
  Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361, table 1) with attention exact. A backward
  pass costs twice a forward. The formula assumes grouped-query attention and a gated MLP.

  Args:
    config: the model's `models.Config`.
    headed_B: tokens of each sequence that are unembedded; None: all.
  """
  c = config
  length_B = np.asarray(length_B, np.float64)
  headed_B = length_B if headed_B is None else np.asarray(headed_B, np.float64)
  # Queries and the output projection have `heads`, keys and values `kv_heads`.
  attention = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
  weights = c.layers * (attention + 3 * c.width * c.mlp)
  head = c.vocab_size * c.width
  pairs_B = length_B * (length_B + 1) / 2
  return float(np.sum(2 * (weights * length_B + head * headed_B)
                      + 4 * c.layers * c.heads * c.head_width * pairs_B))


def entry(step: int, prompt_ids: Iterable[int], labels: Iterable[int], **counts: float) -> _Entry:
  """One step's entry: which problems were sampled, whose labels were spent, and the counts.

  Args:
    prompt_ids: problem ids of the step, each once; labels: those whose answers were consulted.
    **counts: the other names of COUNTS: sequences, updates, tokens and FLOPs.

  Raises:
    InputError: a count is missing.
  """
  # JSON has no word for NumPy's integers.
  prompts = [int(i) for i in prompt_ids]
  spent = [int(i) for i in labels]
  found = {"step": step, "prompts": prompts, "labels": spent, "prompt_uses": len(prompts),
           "label_uses": len(spent), **counts}
  # A count that is forgotten would be added up as if it were 0.
  missing = set(COUNTS) - set(found)
  if missing:
    raise InputError(f"a ledger entry lacks {sorted(missing)}: pass every count.")
  return found


def labels(use: LabelUse, prompts: Sequence[Prompt], before: Iterable[Mapping]) -> list[int]:
  """Ids of the problems whose labels a step spends; `before` are the stage's earlier entries."""
  ids = [prompt.id for prompt in prompts]
  if use == "each_step":
    return ids
  if use == "none":
    return []
  # Pass rates consult an answer once; later steps reuse the samples and their rate.
  earlier_ids = {i for earlier in before for i in earlier["labels"]}
  return [i for i in ids if i not in earlier_ids]


def step_entry(step: int, rollouts: StepRollouts, spent_labels: Sequence[int], hp: ConfigDict,
               models: StageModels, pass_rate_rollout: Rollout | None,
               scored_first: bool,
               hint_of: Mapping[int, Sequence[int]] | None = None,
               guide_of: Mapping[int, str] | None = None) -> _Entry:
  """The entry of a step.

  Args:
    rollouts: the step's rollouts; spent_labels: as `labels` returns them.
    hp: the stage's config, of which epochs and minibatches are read.
    models: the stage's models, whose configs the FLOPs are counted from.
    pass_rate_rollout: what was sampled in this step to measure pass rates, or None.
    scored_first: whether a pass of its own took the actor's log-probabilities before the update.
    hint_of: the guide's own prompt of each problem id; None: it reads the learner's.
    guide_of: the role that guides each problem id; None: the one guide.
  """
  rollout = rollouts.rollout
  response_B = rollout.response_length_B
  length_B = rollout.prompt_length_B + response_B
  # A row of weight 0 is computed but not learned from.
  learned_B = response_B if rollouts.weight_B is None else response_B * (rollouts.weight_B > 0)
  learned = int(learned_B.sum())
  discarded = int(response_B.sum()) - learned
  if rollouts.dropped is not None:
    discarded += int(rollouts.dropped.response_length_B.sum())
  sampled, flops = _sampling(models, rollouts, pass_rate_rollout, fresh=True)
  reused, flops_reused = _sampling(models, rollouts, pass_rate_rollout, fresh=False)
  # A forward and a backward of two forwards; weights that stand still need no gradient.
  passes = 3 if models.non_trainable is None else 2
  # Only tokens with weight are unembedded in an update.
  update_flops = passes * forward_flops(models.learner.model.config, length_B, learned_B)
  guide_tokens = 0
  if models.guide is not None:
    # A frozen guide runs forward alone.
    guide_B = _guide_length_B(rollout, hint_of)
    update_flops += _guide_flops(models, rollout, guide_of, guide_B, learned_B)
    guide_tokens = hp.epochs * int(guide_B.sum())
  if scored_first:
    flops += forward_flops(models.actor.model.config, length_B, response_B)
  flops += hp.epochs * update_flops
  return entry(
      step, [prompt.id for prompt in rollouts.prompts], spent_labels, sequences=len(length_B),
      updates=hp.epochs * hp.minibatches, tokens_sampled=sampled, tokens_reused=reused,
      tokens_discarded=discarded, tokens_trained=hp.epochs * learned,
      tokens_guide=guide_tokens, flops=flops, flops_reused=flops_reused)


def _guide_flops(models: StageModels, rollout: Rollout, guide_of: Mapping[int, str] | None,
                 length_B: np.ndarray, headed_B: np.ndarray) -> float:
  """FLOPs of the guides' forward passes, each over its rows."""
  if guide_of is None:
    return forward_flops(models.guide.model.config, length_B, headed_B)
  role_B = np.array([guide_of[int(i)] for i in rollout.prompt_id_B])
  return sum(forward_flops(guide.model.config, length_B[role_B == role], headed_B[role_B == role])
             for role, guide in models.guides.items())


def _guide_length_B(rollout: Rollout, hint_of: Mapping[int, Sequence[int]] | None) -> np.ndarray:
  """Tokens that a guide reads of each row: its own prompt where it has one, and the response."""
  prompt_B = rollout.prompt_length_B
  if hint_of is not None:
    prompt_B = np.array([len(hint_of[int(i)]) for i in rollout.prompt_id_B], np.int32)
  return prompt_B + rollout.response_length_B


def with_search(found: _Entry, search: Found, signal: str, models: StageModels,
                hint_of: Mapping[int, Sequence[int]] | None = None) -> _Entry:
  """The entry of a step that a search followed, with the search's counts as the part `foresee`.

  Args:
    signal: "reward", which spends the labels of the search's problems for each score, or "kl".
    hint_of: as `step_entry` has it; hints spend labels too.
  """
  rollout_of = [scored.rollout for scored in search.scored]
  ids = sorted({int(i) for rollout in rollout_of for i in rollout.prompt_id_B})
  labels = ids if signal == "reward" or hint_of is not None else []
  tokens = 0
  guide_tokens = 0
  flops = 0.0
  for rollout in rollout_of:
    response_B = rollout.response_length_B
    length_B = rollout.prompt_length_B + response_B
    tokens += int(response_B.sum())
    flops += forward_flops(models.learner.model.config, length_B, response_B)
    if signal == "kl":
      # Both models run forward once more on the samples.
      guide_B = _guide_length_B(rollout, hint_of)
      guide_tokens += int(guide_B.sum())
      flops += forward_flops(models.learner.model.config, length_B, response_B)
      flops += forward_flops(models.guide.model.config, guide_B, response_B)
  part = {"sequences": sum(len(rollout.prompt_id_B) for rollout in rollout_of),
          "tokens_sampled": tokens, "tokens_guide": guide_tokens, "flops": flops,
          "label_uses": len(labels) * len(rollout_of)}
  return with_part(found, "foresee", part) | {"labels": found["labels"] + labels}


def with_part(found: _Entry, name: str, part: Mapping[str, float]) -> _Entry:
  """The entry with a part of `PARTS`, whose counts are in the entry's own too.

  Its sequences are not, because no update learned from them.
  """
  sums = {key: found[key] + count for key, count in part.items() if key != "sequences"}
  return found | sums | {name: dict(part)}


def probe_part(rollout: Rollout, fresh_B: np.ndarray, first: bool,
               models: StageModels) -> dict[str, float]:
  """The counts of a probe of `allocate`: the teacher's responses, and the learner's scores of them.

  Args:
    fresh_B: True for the responses that were sampled for this probe.
    first: whether it is the stage's first probe. The others that it finds are another stage's.
  """
  config = models.teacher.model.config
  response_B = rollout.response_length_B
  length_B = rollout.prompt_length_B + response_B
  reused_B = ~fresh_B & first
  flops = forward_flops(config, length_B[fresh_B], response_B[fresh_B])
  return {"sequences": int(fresh_B.sum()), "tokens_sampled": int(response_B[fresh_B].sum()),
          "tokens_reused": int(response_B[reused_B].sum()),
          "flops": flops + forward_flops(models.learner.model.config, length_B, response_B),
          "flops_reused": forward_flops(config, length_B[reused_B], response_B[reused_B])}


def _sampling(models: StageModels, rollouts: StepRollouts, pass_rate_rollout: Rollout | None,
              fresh: bool) -> tuple[int, float]:
  """(tokens, FLOPs) of sampling the rows that are fresh, or those that are not."""
  parts: list[tuple[Role, Rollout, np.ndarray]] = []
  if models.actor is not None:
    parts.append((models.actor, rollouts.rollout, rollouts.fresh_B))
    if rollouts.dropped is not None:
      parts.append((models.actor, rollouts.dropped, rollouts.dropped_fresh_B))
  if pass_rate_rollout is not None:  # of the learner's start; all of it is fresh
    every_B = np.ones(len(pass_rate_rollout.prompt_id_B), bool)
    parts.append((models.learner, pass_rate_rollout, every_B))
  tokens = 0
  flops = 0.0
  # Row by row, since a store may hold some of a step's rows and not the others.
  for role, rollout, fresh_B in parts:
    own_B = fresh_B == fresh
    response_B = rollout.response_length_B[own_B]
    tokens += int(response_B.sum())
    # A sampled token costs a forward pass of it.
    flops += forward_flops(role.model.config, rollout.prompt_length_B[own_B] + response_B,
                           response_B)
  return tokens, flops


def total(entries: Sequence[Mapping]) -> dict[str, Any]:
  """Sums of a stage's entries, and the distinct problems and labels behind them (sorted ids)."""
  label_ids = sorted({i for e in entries for i in e["labels"]})
  prompt_ids = sorted({i for e in entries for i in e["prompts"]})
  # Uses add up; distinct ids do not, so they are collected as sets above.
  sums = {name: sum(e[name] for e in entries) for name in COUNTS}
  for name in PARTS:
    parts = [e[name] for e in entries if name in e]
    if parts:
      sums[name] = {key: sum(part[key] for part in parts) for key in parts[0]}
  return {**sums, "labels_distinct": len(label_ids), "prompts_distinct": len(prompt_ids),
          "labels": label_ids, "prompts": prompt_ids}


def seconds(timing: Iterable[Mapping], lost: float, devices: int) -> dict[str, float]:
  """Device-seconds used (stage start and kept steps) and lost (done again after a kill)."""
  return {"device_seconds_used": devices * sum(t["seconds"] for t in timing),
          "device_seconds_lost": devices * lost}
