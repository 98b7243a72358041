"""Prompts and rollouts: the records that a sampler reads and returns. NumPy only."""

import hashlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The order is stored in rollouts on disk: a new reason is added at the end.
FINISHED = ("length", "stop")
# Names that fields have in files that are already stored.
_OLD_NAMES = {"drawn_logp_BT": "behaviour_logp_BT"}


class Prompt(NamedTuple):
  """One rendered problem: a stable integer id and its token ids, chat template applied."""
  id: int
  tokens: tuple[int, ...]


class Rollout(NamedTuple):
  """Responses to P prompts, G samples each: B = P·G rows, a prompt's samples side by side.

  (prompt id, sample index) names a row for ever. The log-probabilities are None where nothing was
  sampled, as for given solutions.
  """
  prompt_id_B: np.ndarray        # int64
  sample_index_B: np.ndarray     # int32
  prompt_BT: np.ndarray          # int32, right-padded
  prompt_length_B: np.ndarray    # int32 tokens
  response_BT: np.ndarray        # int32, right-padded; a stop token belongs to the response
  response_length_B: np.ndarray  # int32 tokens
  sampler_logp_BT: np.ndarray | None  # float32 nats, of each response token under the whole model
  behaviour_logp_BT: np.ndarray | None  # float32 nats, under the tempered, truncated distribution
  finish_reason_B: np.ndarray    # int32 index into FINISHED
  weight_version: int            # optimizer updates behind the weights that sampled

  def response(self, row: int) -> np.ndarray:
    """The token ids that row `row` generated, a stop token included."""
    return self.response_BT[row, : self.response_length_B[row]]


class SamplerStats(NamedTuple):
  """Counts of one call of a sampler, or of several added up."""
  dispatches: int = 0   # of the program that decodes, which decoded a token
  prefills: int = 0     # dispatches of the program that reads prompts
  tokens: int = 0       # of the responses
  slot_tokens: int = 0  # slots times steps: the cost of the tokens
  requeued: int = 0     # rows that lost their pages and were sampled again
  weights_bytes: int = 0        # of the weights' copy for decoding
  weights_seconds: float = 0.0  # to make that copy


def add_stats(parts: Sequence[SamplerStats | None]) -> SamplerStats | None:
  """The sums of counts; a part is None where nothing was sampled, and so is the result of none."""
  called = [part for part in parts if part is not None]
  if not called:
    return None
  return SamplerStats(*map(sum, zip(*called, strict=True)))


def row_key(seed: Sequence[int], prompt_id: int, sample_index: int) -> np.ndarray:
  """Two uint32 words that name a row's randomness: a hash of (seed…, prompt id, sample index).

  A row's samples then depend on neither its neighbours, its index in the batch nor the devices.
  """
  # With separators, or (1, 23) and (12, 3) would give one text.
  text = ",".join(str(int(s)) for s in (*seed, prompt_id, sample_index))
  return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)


def keys_of(rollout: Rollout) -> list[tuple[int, int]]:
  """(prompt id, sample index) of each row."""
  ids = np.asarray(rollout.prompt_id_B).tolist()
  return list(zip(ids, np.asarray(rollout.sample_index_B).tolist(), strict=True))


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
  """Rollouts of equal widths, one after the other; the weight version is that of the first."""
  # The last field, the weight version, is one number and no array of rows.
  fields = [None if xs[0] is None else np.concatenate(xs)
            for xs in zip(*(r[:-1] for r in rollouts), strict=True)]
  return Rollout(*fields, rollouts[0].weight_version)


def take(rollout: Rollout, rows: np.ndarray | slice | Sequence[int]) -> Rollout:
  """The rows that a NumPy index selects, in its order."""
  fields = [None if x is None else x[rows] for x in rollout[:-1]]
  return Rollout(*fields, rollout.weight_version)


_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64  # bytes


def to_bytes(rollout: Rollout) -> bytes:
  """A sampled rollout as one compressed .npz; equal rollouts give equal bytes.

  The comment of the archive, its last bytes, has the SHA-256 of all bytes before it.
  """
  out = io.BytesIO()
  np.savez_compressed(out, **rollout._asdict())
  # An archive ends in the length of its comment, two bytes, and the comment.
  before = out.getvalue()[:-2] + _COMMENT.to_bytes(2, "little")
  return before + _MARK + hashlib.sha256(before).hexdigest().encode()


def from_bytes(data: bytes) -> Rollout:
  """The rollout that `to_bytes` wrote, now or when a field had its old name.

  Raises:
    ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile or zlib.error: it is damaged.
  """
  before, comment = data[:-_COMMENT], data[-_COMMENT:]
  # An archive of an earlier version has no comment. One flipped bit leaves the length or the mark.
  if comment.startswith(_MARK) or before[-2:] == _COMMENT.to_bytes(2, "little"):
    if comment != _MARK + hashlib.sha256(before).hexdigest().encode():
      raise ValueError("its bytes are not those of its checksum")
  # Without pickle a store's file can hold arrays only, and reading it runs no code.
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    # Rollouts are expensive: a new field name must not make stored ones unreadable.
    fields = {_OLD_NAMES.get(name, name): file[name] for name in file.files}
  return Rollout(**{**fields, "weight_version": int(fields["weight_version"])})


def given_solutions(prompts: Sequence[Prompt], responses: Sequence[Sequence[int]],
                    prompt_width: int, width: int) -> Rollout:
  """A Rollout of responses that were not sampled: one row a prompt, sample index 0.

  Args:
    responses: the token ids of each prompt's response.
    prompt_width, width: padded widths of prompts and responses, in tokens.
  """
  B = len(prompts)
  prompt_BT = np.zeros((B, prompt_width), np.int32)
  response_BT = np.zeros((B, width), np.int32)
  for b, (prompt, ids) in enumerate(zip(prompts, responses, strict=True)):
    prompt_BT[b, : len(prompt.tokens)] = prompt.tokens
    response_BT[b, : len(ids)] = ids
  # Each solution ends with the end token, so each row has finished by "stop".
  return Rollout(
      prompt_id_B=np.array([p.id for p in prompts], np.int64),
      sample_index_B=np.zeros(B, np.int32),
      prompt_BT=prompt_BT,
      prompt_length_B=np.array([len(p.tokens) for p in prompts], np.int32),
      response_BT=response_BT,
      response_length_B=np.array([len(ids) for ids in responses], np.int32),
      sampler_logp_BT=None,
      behaviour_logp_BT=None,
      finish_reason_B=np.ones(B, np.int32),
      weight_version=0)
