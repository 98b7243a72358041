"""Batches of rollouts: padding, weights, packing and the one shift. NumPy only.

Nothing outside this file aligns inputs with targets or decides which tokens count.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from s2d_jax.errors import InputError
from s2d_jax.rollouts.records import Rollout

MEANS = ("token", "sequence", "constant")  # the kinds of `token_weights`


class Batch(NamedTuple):
  """Sequences to train on. At index t a model has read inputs[: t + 1] and predicts targets[t]."""
  inputs_BT: np.ndarray        # int32 token ids
  targets_BT: np.ndarray       # int32, inputs shifted left by one
  positions_BT: np.ndarray     # int32, from 0 in every segment
  segments_BT: np.ndarray      # int32; 0 is padding, other values mark sequences that share a row
  weight_BT: np.ndarray        # float32; 0 on prompt and padding
  count_BT: np.ndarray         # float32; what a token adds to the count that sums are divided by
  advantage_BT: np.ndarray     # float32; constant along a response
  old_logp_BT: np.ndarray | None      # float32 nats, before an update; None: the update's own
  sampler_logp_BT: np.ndarray | None  # float32 nats, of the sampler; None: nothing was sampled
  behaviour_logp_BT: np.ndarray | None  # float32 nats, under the tempered, truncated distribution
  sequence_BT: np.ndarray      # int32 row of the rollout, -1 on prompt and padding
  # The guide's own rows of G tokens, where it reads another prompt (`with_hints`); else None.
  guide_inputs_BG: np.ndarray | None = None     # int32 token ids
  guide_positions_BG: np.ndarray | None = None  # int32, from 0
  guide_segments_BG: np.ndarray | None = None   # int32; 0 is padding
  guide_index_BT: np.ndarray | None = None  # int32 index g at which the guide predicts targets[t]


def token_weights(length_B: np.ndarray, mean: str, longest: int) -> tuple[np.ndarray, np.ndarray]:
  """(weight_B, count_B) of one response token of each row, float32, for a kind of mean.

  A loss is Σ weight · x / Σ count. `token`: 1 and 1, the mean over tokens (DAPO,
  https://arxiv.org/abs/2503.14476). `sequence`: 1 / response length twice, the mean over sequences
  of token means (GRPO, eq. 3 of https://arxiv.org/abs/2402.03300). `constant`: 1 / longest and
  1 / response length, the mean over sequences of token sums divided by a constant (Dr. GRPO,
  https://arxiv.org/abs/2503.20783).

  Raises:
    InputError: `mean` is not one of `MEANS`.
  """
  if mean not in MEANS:
    raise InputError(f"mean is {mean!r}: set it to one of {sorted(MEANS)}.")
  one_B = np.ones(len(length_B))
  # An empty response has no token with a weight, so any finite number will do.
  inverse_B = 1 / np.maximum(length_B, 1)
  weight_B = {"token": one_B, "sequence": inverse_B, "constant": one_B / longest}[mean]
  count_B = one_B if mean == "token" else inverse_B
  return weight_B.astype(np.float32), count_B.astype(np.float32)


def batch(rollout: Rollout, mean: str = "token", advantage_B: np.ndarray | None = None,
          row_weight_B: np.ndarray | None = None) -> Batch:
  """A Batch of one row per sequence, [B, prompt width + response width − 1].

  Args:
    rollout: what to train on.
    mean: see `token_weights`.
    advantage_B: float32, one number a sequence; zeros where the objective reads none.
    row_weight_B: float32 factor on each sequence's weight; 0 drops a row without changing a shape.

  Returns:
    The batch, without old_logp_BT: a pass that scores it before the update adds that field.
  """
  B, prompt_width = rollout.prompt_BT.shape
  # Of the padded arrays, not of this rollout's longest row, so that every step compiles once.
  width = prompt_width + rollout.response_BT.shape[1]
  prompt_B = rollout.prompt_length_B
  length_B = prompt_B + rollout.response_length_B
  tokens = np.zeros((B, width), np.int32)
  for b in range(B):
    tokens[b, : prompt_B[b]] = rollout.prompt_BT[b, : prompt_B[b]]
    tokens[b, prompt_B[b]: length_B[b]] = rollout.response(b)
  weight_B, count_B = token_weights(rollout.response_length_B, mean, rollout.response_BT.shape[1])
  # Scaled in sum and count, so that the mean is over the remaining rows.
  if row_weight_B is not None:
    weight_B = weight_B * row_weight_B
    count_B = count_B * row_weight_B
  advantage_B = np.zeros(B, np.float32) if advantage_B is None else advantage_B
  # Having read token t, predict token t + 1: the last token is never read, the first never
  # predicted. Every field below is indexed by t, so a response's first token, at index
  # prompt length of the sequence, is a target at prompt length − 1.
  index_T = np.arange(width - 1, dtype=np.int32)
  inside_BT = index_T[None] < length_B[:, None] - 1
  response_BT = inside_BT & (index_T[None] >= prompt_B[:, None] - 1)

  def on_response(value_B: np.ndarray) -> np.ndarray:
    return np.where(response_BT, value_B[:, None], 0).astype(np.float32)

  def aligned(logp_BT: np.ndarray | None) -> np.ndarray | None:
    if logp_BT is None:
      return None
    out = np.zeros((B, width), np.float32)
    for b in range(B):
      out[b, prompt_B[b]: length_B[b]] = logp_BT[b, : rollout.response_length_B[b]]
    return out[:, 1:]

  return Batch(
      inputs_BT=np.where(inside_BT, tokens[:, :-1], 0),
      targets_BT=np.where(inside_BT, tokens[:, 1:], 0),
      positions_BT=np.where(inside_BT, index_T[None], 0),
      segments_BT=inside_BT.astype(np.int32),
      weight_BT=on_response(weight_B),
      count_BT=on_response(count_B),
      advantage_BT=on_response(advantage_B),
      old_logp_BT=None,
      sampler_logp_BT=aligned(rollout.sampler_logp_BT),
      behaviour_logp_BT=aligned(rollout.behaviour_logp_BT),
      sequence_BT=np.where(response_BT, np.arange(B, dtype=np.int32)[:, None], np.int32(-1)))


def with_hints(batch: Batch, rollout: Rollout, hint_of: Mapping[int, Sequence[int]],
               width: int) -> Batch:
  """The batch of a rollout, in which the guide reads each response behind a prompt of its own.

  Args:
    hint_of: the guide's prompt of each problem id, as token ids; width: of its window, in tokens.
  """
  response_B = rollout.response_length_B
  hints = [hint_of[int(i)] for i in rollout.prompt_id_B]
  B = len(hints)
  tokens_BG = np.zeros((B, width + rollout.response_BT.shape[1]), np.int32)
  hint_B = np.array([len(hint) for hint in hints], np.int32)
  for b, hint in enumerate(hints):
    tokens_BG[b, : hint_B[b]] = hint
    tokens_BG[b, hint_B[b]: hint_B[b] + response_B[b]] = rollout.response(b)
  index_G = np.arange(tokens_BG.shape[1] - 1, dtype=np.int32)
  inside_BG = index_G[None] < (hint_B + response_B)[:, None] - 1
  # A response begins at another index in the guide's row: it moves by the difference of prompts.
  index_T = np.arange(batch.inputs_BT.shape[1], dtype=np.int32)
  moved_BT = index_T[None] + (hint_B - rollout.prompt_length_B)[:, None]
  return batch._replace(
      guide_inputs_BG=np.where(inside_BG, tokens_BG[:, :-1], 0),
      guide_positions_BG=np.where(inside_BG, index_G[None], 0),
      guide_segments_BG=inside_BG.astype(np.int32),
      guide_index_BT=np.where(batch.sequence_BT >= 0, moved_BT, 0).astype(np.int32))


def pack(batch: Batch, width: int) -> Batch:
  """Puts several sequences in a row of `width` tokens, longest first, each in the first that fits.

  The shape stays [B, width]: rows that are left over are padding, so that a fixed B compiles once.
  Each sequence is a segment of its own, and attention does not cross from one to the next.

  Raises:
    InputError: a sequence is longer than `width`, or the guide has rows of its own.
  """
  if batch.guide_inputs_BG is not None:
    raise InputError("a batch whose guide reads prompts of its own cannot be packed: leave "
                     "the hints out.")
  length_B = (batch.segments_BT > 0).sum(axis=1)
  if length_B.max(initial=0) > width:
    raise InputError(f"a sequence of {length_B.max()} tokens does not fit a packed row of {width}: "
                     "widen the row.")
  B = len(length_B)
  used_B = np.zeros(B, np.int64)
  segments_B = np.zeros(B, np.int64)
  packed = Batch(*(None if x is None else np.zeros((B, width), x.dtype) for x in batch))
  packed.sequence_BT[:] = -1
  # Longest first leaves the fewest gaps; ties by index make the result unique.
  for b in sorted(range(B), key=lambda i: (-length_B[i], i)):
    n = length_B[b]
    row = int(np.argmax(used_B + n <= width))
    columns = slice(used_B[row], used_B[row] + n)
    for field, x in zip(packed, batch, strict=True):
      if x is not None:
        field[row, columns] = x[b, :n]
    segments_B[row] += 1
    packed.segments_BT[row, columns] = segments_B[row]
    used_B[row] += n
  return packed


def minibatches(batch: Batch, count: int, seed: Sequence[int]) -> Iterator[Batch]:
  """Yields `count` equal slices of shuffled rows; the shuffle is a function of `seed`.

  Raises:
    InputError: `count` does not divide the rows.
  """
  B = len(batch.inputs_BT)
  if B % count:
    raise InputError(f"{B} rows do not split into {count} minibatches: "
                     "choose prompts x samples_per_prompt as a multiple of minibatches.")
  # A single minibatch needs no shuffle: its sums do not depend on the rows' order.
  order_B = np.random.default_rng(seed).permutation(B) if count > 1 else np.arange(B)
  for rows in np.split(order_B, count):
    yield batch_rows(batch, rows)


def batch_rows(batch: Batch, rows: np.ndarray) -> Batch:
  """The rows of a batch that an index selects, in its order."""
  return Batch(*(None if x is None else x[rows] for x in batch))
