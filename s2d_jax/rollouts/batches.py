"""Batches of rollouts: padding, weights, packing and the one shift. NumPy only.

Nothing outside this file aligns inputs with targets or decides which tokens count.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """Index t of every field: having read inputs[: t + 1], predict targets[t]."""
  inputs_BT: np.ndarray        # int32 token ids
  targets_BT: np.ndarray       # int32, inputs shifted left by one
  positions_BT: np.ndarray     # int32, from 0 in every segment
  segments_BT: np.ndarray      # int32; 0 is padding, other values mark sequences that share a row
  weight_BT: np.ndarray        # float32; 0 on prompt and padding
  count_BT: np.ndarray         # float32; what a token adds to the count that sums are divided by
  advantage_BT: np.ndarray     # float32; constant along a response
  old_logp_BT: np.ndarray      # float32 nats, before an update; None: the update's own are the old
  sampler_logp_BT: np.ndarray  # float32 nats, as the sampler's model had it; None: nobody sampled
  behaviour_logp_BT: np.ndarray  # float32 nats, as the tempered, truncated distribution had it
  sequence_BT: np.ndarray      # int32 row of the rollout, -1 on prompt and padding


MEANS = ("token", "sequence", "constant")


def token_weights(length_B, mean, longest):
  """(weight, count) of one response token, float32 [B] each: the kind of mean is data, no flag.

  A loss is Σ weight · x / Σ count. `token`: 1 and 1, the mean over tokens (DAPO,
  https://arxiv.org/abs/2503.14476). `sequence`: 1 / response length twice, the mean over sequences
  of token means (GRPO, eq. 3 of https://arxiv.org/abs/2402.03300). `constant`: 1 / longest and
  1 / response length, the mean over sequences of token sums over a constant, whatever their
  lengths (Dr. GRPO, https://arxiv.org/abs/2503.20783).
  """
  ones, own = np.ones(len(length_B)), 1 / np.maximum(length_B, 1)
  kinds = {"token": (ones, ones), "sequence": (own, own), "constant": (ones / longest, own)}
  if mean not in kinds:
    raise ValueError(f"mean is {mean!r}: set it to one of {sorted(kinds)}.")
  return tuple(x.astype(np.float32) for x in kinds[mean])


def batch(rollout, mean="token", advantage_B=None, row_weight_B=None):
  """One row per sequence, [B, prompt width + response width − 1]: the shift, the mask, the weights.

  Args:
    rollout: what to train on.
    mean: see `token_weights`.
    advantage_B: float32, one number a sequence; zeros where the objective needs none.
    row_weight_B: float32 factor on each sequence's weight; 0 drops a row without moving a shape.

  Returns:
    A Batch whose `old_logp_BT` is zero until the trainer has scored it, or taken it out.
  """
  B, prompt_width = rollout.prompt_BT.shape
  width = prompt_width + rollout.response_BT.shape[1]
  length_B = rollout.prompt_length_B + rollout.response_length_B
  tokens = np.zeros((B, width), np.int32)
  weight, logp, behaviour_logp = (np.zeros((B, width), np.float32) for _ in range(3))
  per_token_B, count_B = token_weights(rollout.response_length_B, mean,
                                       rollout.response_BT.shape[1])
  if row_weight_B is not None:
    per_token_B, count_B = per_token_B * row_weight_B, count_B * row_weight_B
  for b in range(B):
    p, n = rollout.prompt_length_B[b], length_B[b]
    tokens[b, :p] = rollout.prompt_BT[b, :p]
    tokens[b, p:n] = rollout.response(b)
    weight[b, p:n] = per_token_B[b]
    logp[b, p:n] = rollout.sampler_logp_BT[b, : n - p]
    behaviour_logp[b, p:n] = rollout.behaviour_logp_BT[b, : n - p]
  place_T = np.arange(width - 1, dtype=np.int32)
  # Having read token t, predict token t + 1: inputs lose the last column, all the rest the first.
  inside_BT = place_T[None] < length_B[:, None] - 1
  response_BT = inside_BT & (place_T[None] >= rollout.prompt_length_B[:, None] - 1)
  advantage_B = np.zeros(B, np.float32) if advantage_B is None else advantage_B
  return Batch(
      inputs_BT=np.where(inside_BT, tokens[:, :-1], 0),
      targets_BT=np.where(inside_BT, tokens[:, 1:], 0),
      positions_BT=np.where(inside_BT, place_T[None], 0),
      segments_BT=inside_BT.astype(np.int32),
      weight_BT=weight[:, 1:],
      count_BT=np.where(response_BT, count_B[:, None], 0).astype(np.float32),
      advantage_BT=np.where(response_BT, advantage_B[:, None], 0).astype(np.float32),
      old_logp_BT=np.zeros_like(logp[:, 1:]),
      sampler_logp_BT=logp[:, 1:],
      behaviour_logp_BT=behaviour_logp[:, 1:],
      sequence_BT=np.where(response_BT, np.arange(B, dtype=np.int32)[:, None], np.int32(-1)))


def pack(batch_, width):
  """Puts several sequences in a row of `width` tokens, first fit, longest first; each a segment.

  Shapes stay [B, width]: rows that are left over are padding, so a fixed B compiles once and
  attention, told by `segments_BT`, never crosses from one sequence to the next.

  Raises:
    ValueError: a sequence is longer than `width`.
  """
  length_B = (batch_.segments_BT > 0).sum(axis=1)
  if length_B.max(initial=0) > width:
    raise ValueError(f"a sequence of {length_B.max()} tokens does not fit a packed row of {width}: "
                     "widen the row.")
  B = len(length_B)
  used, segments = np.zeros(B, np.int64), np.zeros(B, np.int64)
  packed = Batch(*(None if x is None else np.zeros((B, width), x.dtype) for x in batch_))
  packed.sequence_BT[:] = -1
  for b in sorted(range(B), key=lambda i: (-length_B[i], i)):
    n = length_B[b]
    row = int(np.argmax(used + n <= width))
    for to, x in zip(packed, batch_, strict=True):
      if x is not None:
        to[row, used[row]: used[row] + n] = x[b, :n]
    segments[row] += 1
    packed.segments_BT[row, used[row]: used[row] + n] = segments[row]
    used[row] += n
  return packed


def minibatches(batch_, count, seed):
  """`count` equal slices of shuffled rows; the shuffle is a function of `seed`, a tuple of ints.

  Raises:
    ValueError: `count` does not divide the rows.
  """
  B = len(batch_.inputs_BT)
  if B % count:
    raise ValueError(f"{B} rows do not split into {count} minibatches: "
                     "choose prompts x samples_per_prompt as a multiple of minibatches.")
  order = np.random.default_rng(seed).permutation(B) if count > 1 else np.arange(B)
  for rows in np.split(order, count):
    yield Batch(*(None if x is None else x[rows] for x in batch_))
