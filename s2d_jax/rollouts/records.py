"""Rollouts and batches on the host: padding, weights, packing and the one shift. NumPy only.

Nothing outside this file aligns inputs with targets, and nothing outside it decides which tokens
count. Token ids stay ids from the sampler to the loss: text is never tokenized a second time.
"""

import hashlib
import io
from typing import NamedTuple

import numpy as np

OLD_NAMES = {"drawn_logp_BT": "behaviour_logp_BT"}  # of fields in files that are already stored
FINISHED = ("length", "stop")  # what finish_reason 0 and 1 mean


class Prompt(NamedTuple):
  """One rendered problem: a stable integer id and its token ids, chat template applied."""
  id: int
  tokens: tuple


class Rollout(NamedTuple):
  """What a sampler wrote: B = P·G rows, a prompt's samples side by side."""
  prompt_id_B: np.ndarray        # int64
  sample_index_B: np.ndarray     # int32; (prompt id, sample index) names a row for ever
  prompt_BT: np.ndarray          # int32, right-padded
  prompt_length_B: np.ndarray    # int32 tokens
  response_BT: np.ndarray        # int32, right-padded; a stop token belongs to the response
  response_length_B: np.ndarray  # int32 tokens
  sampler_logp_BT: np.ndarray    # float32 nats, of each response token under the whole model
  behaviour_logp_BT: np.ndarray  # float32 nats, under the tempered, truncated distribution
  finish_reason_B: np.ndarray    # int32 index into FINISHED
  weight_version: int            # optimizer updates behind the weights that sampled

  def response(self, row):
    """The ids row `row` generated, a stop token included."""
    return self.response_BT[row, : self.response_length_B[row]]


def row_key(seed, prompt_id, sample_index):
  """Two uint32 words that name a row's randomness: a hash of (seed…, prompt id, sample index).

  A row's samples then depend on nothing else: not on its neighbours, its place or the devices.
  """
  text = ",".join(str(int(s)) for s in (*seed, prompt_id, sample_index))
  return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)


def concatenate(rollouts):
  """Rollouts of equal widths, one after the other."""
  first = rollouts[0]
  arrays = [np.concatenate(xs) for xs in zip(*(r[:-1] for r in rollouts), strict=True)]
  return Rollout(*arrays, first.weight_version)


def take(rollout, rows):
  """The named rows, in that order."""
  return Rollout(*(x[rows] for x in rollout[:-1]), rollout.weight_version)


def to_bytes(rollout):
  """A rollout as one compressed .npz, the same bytes for the same rollout."""
  out = io.BytesIO()
  np.savez_compressed(out, **rollout._asdict())
  return out.getvalue()


def from_bytes(data):
  """The rollout that `to_bytes` wrote, now or when a field had its old name."""
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    fields = {OLD_NAMES.get(name, name): file[name] for name in file.files}
  return Rollout(**{**fields, "weight_version": int(fields["weight_version"])})


def given(prompts, responses, prompt_width, width):
  """A Rollout of responses nobody sampled: one row (a list of ids) a prompt, sample index 0."""
  B = len(prompts)
  prompt_BT, response_BT = np.zeros((B, prompt_width), np.int32), np.zeros((B, width), np.int32)
  for b, (prompt, ids) in enumerate(zip(prompts, responses, strict=True)):
    prompt_BT[b, : len(prompt.tokens)] = prompt.tokens
    response_BT[b, : len(ids)] = ids
  return Rollout(
      np.array([p.id for p in prompts], np.int64), np.zeros(B, np.int32), prompt_BT,
      np.array([len(p.tokens) for p in prompts], np.int32), response_BT,
      np.array([len(ids) for ids in responses], np.int32), np.zeros((B, width), np.float32),
      np.zeros((B, width), np.float32), np.ones(B, np.int32), 0)
