"""The host's side of sampling: which rows are in which slots, and what comes back of them.

Rows wait in order; a slot whose row has ended takes the next one; once nobody waits, the batch
shrinks to the rows still alive, and the cache grows with the longest. What is scheduled is a
function of the tokens alone, so several hosts schedule the same, and compare before each dispatch.
"""

import collections
import contextlib
import hashlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from s2d_jax import hosts, rollouts, sharding
from s2d_jax.sampler.decode import Weights

SHARE = 8  # one slot in so many is free before decoding stops to fill it


@contextlib.contextmanager
def naming(model: str) -> Iterator[None]:
  """Puts a model's name before the sentence of a FloatingPointError that is raised within."""
  try:
    yield
  except FloatingPointError as error:
    raise FloatingPointError(f"{model}: {error}") from error


class Row(NamedTuple):
  """A row that waits or is in a slot."""
  place: int     # in the rollout
  prompt: Any
  key_2: Any     # what its randomness is named by


class Call:
  """One call's rows: those that wait, those in slots, and what has been written of each."""

  def __init__(self, sampler, params, wanted, seed, weight_version):
    self.sampler, self.made, self.shapes = sampler, sampler.programs, sampler.programs.shapes
    self.rows = collections.deque(
        Row(place, prompt, rollouts.row_key(seed, prompt.id, index))
        for place, (prompt, index) in enumerate(wanted))
    self.waiting = collections.Counter(row.prompt.id for row in self.rows)
    self.digest = hashlib.blake2b(digest_size=16)
    for row in self.rows:
      self.digest.update(np.array([row.prompt.id, *row.prompt.tokens], np.int64).tobytes())
      self.digest.update(row.key_2.tobytes())
    # Processes may come here from compiling or from loading weights, and not at once.
    self._agree(weight_version, sampler.sampling, self.made.room, self.shapes,
                seconds=hosts.START_SECONDS)
    began = time.monotonic()
    self.weights = params if isinstance(params, Weights) else sampler.lay_out(params)
    seconds = time.monotonic() - began
    B, T = len(wanted), sampler.sampling.max_tokens
    prompt_BW = np.zeros((B, sampler.width), np.int32)
    for row_W, (prompt, _) in zip(prompt_BW, wanted, strict=True):
      row_W[: len(prompt.tokens)] = prompt.tokens
    self.out = rollouts.Rollout(
        np.array([p.id for p, _ in wanted], np.int64), np.array([g for _, g in wanted], np.int32),
        prompt_BW, np.array([len(p.tokens) for p, _ in wanted], np.int32),
        np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros((B, T), np.float32),
        np.zeros((B, T), np.float32), np.zeros(B, np.int32), weight_version)
    self.seen = dict.fromkeys(("dispatches", "prefills", "tokens", "slot_tokens"), 0) | {
        "weights_seconds": seconds,
        "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(self.weights))}
    self.read = {}  # prompt id -> (its cache, its row in it), of prompts that rows still wait for

  def run(self, ended):
    """The Rollout, every row to its end."""
    sampler = self.sampler
    self.batch, self.length = self.shapes.batches[0], self.shapes.lengths[0]
    self.slots, self.owners = self.made.empty(), [None] * self.batch
    ready = []
    while self.rows or any(self.owners):
      # All that this turn sends to the devices is a function of what is compared here.
      self._agree([row and row.place for row in self.owners], self.batch, self.length,
                  len(self.rows))
      self._fill()
      self._fit()
      alive_B = np.array([row is not None for row in self.owners])
      self.slots, written = self.made.decode[self.batch, self.length](
          self.weights, self.slots, sampler.put(alive_B), sampler.put(np.int32(self._enough())))
      for place in ready if ended is not None else ():  # while the device decodes
        ended(place, self.out)
      ready = self._take(sharding.fetch(written))
    for place in ready if ended is not None else ():
      ended(place, self.out)
    for name, count in self.seen.items():
      sampler.seen[name] = sampler.seen.get(name, 0) + count
    return self.out

  def _fill(self):
    """Gives free slots to the rows that wait, those together whose prompts were read together."""
    group, entered = None, []
    for b in [b for b, row in enumerate(self.owners) if row is None]:
      if not self.rows:
        break
      if self.rows[0].prompt.id not in self.read:
        group, entered, cache = self._admit(group, entered), [], None
        self._prefill()
      cache, _ = self.read[self.rows[0].prompt.id]
      if group is not None and cache is not group:
        group, entered = self._admit(group, entered), []
      if self._enter(b, self.rows[0]):
        group = cache
        row = self.owners[b] = self.rows.popleft()
        self.waiting[row.prompt.id] -= 1
        entered.append(b)
    self._admit(group, entered)
    self._forget()

  def _forget(self):
    """Frees the caches of prompts that no row waits for."""
    self.read = {i: read for i, read in self.read.items() if self.waiting[i]}

  def _prefill(self):
    """Reads the prompts of the next rows, as many as the program takes: each once for its samples.
    """
    self._forget()  # first: memory is counted for the prompts of one program
    own = {}
    for row in self.rows:
      own.setdefault(row.prompt.id, row.prompt)
      if len(own) == self.shapes.prompts:
        break
    own = list(own.values())
    prompt_PW = np.zeros((self.shapes.prompts, self.shapes.width), np.int32)
    for row_W, prompt in zip(prompt_PW, own, strict=False):
      row_W[: len(prompt.tokens)] = prompt.tokens
    longest = max(len(prompt.tokens) for prompt in own)
    cache = self.made.prefill(self.weights, self.sampler.put(prompt_PW),
                              self.sampler.put(np.int32(longest)))
    for i, prompt in enumerate(own):
      self.read[prompt.id] = cache, i
    self.seen["prefills"] += 1

  def _admit(self, cache, entered):
    """Sends the rows that have entered to their slots, with their prompts' part of `cache`."""
    if not entered:
      return
    B = self.batch
    source_B, token_B, position_B = (np.zeros(B, np.int32) for _ in range(3))
    new_B, key_B2 = np.zeros(B, bool), np.zeros((B, 2), np.uint32)
    for b in entered:
      row, tokens = self.owners[b], self.owners[b].prompt.tokens
      new_B[b], key_B2[b] = True, row.key_2
      source_B[b], token_B[b] = self.read[row.prompt.id][1], tokens[-1]
      position_B[b] = len(tokens) - 1
    self.slots = self.made.admit[self.length](self.slots, cache, *map(
        self.sampler.put, (*self._from(source_B), new_B, token_B, position_B, key_B2)))

  def _enter(self, b, row):
    """Is there memory for a row that is to go to slot b? A slot has its own."""
    del b, row
    return True

  def _from(self, source_B):
    """Where `admit` finds the rows' prompts: each slot's row of those that were read."""
    return (source_B,)

  def _leave(self, b):
    """The row of slot b is gone."""
    self.owners[b] = None

  def _fit(self):
    """Shrinks the batch to the rows alive once nobody waits; the cache is as long as the longest.
    """
    alive = [b for b, row in enumerate(self.owners) if row is not None]
    fewer = [B for B in self.shapes.batches if B < self.batch]
    while not self.rows and fewer and len(alive) <= fewer[0]:
      size = fewer.pop(0)
      kept = (alive + [b for b in range(self.batch) if b not in alive])[:size]
      self.slots = self.made.shrink[self.batch, self.length](
          self.slots, self.sampler.put(np.array(kept, np.int32)))
      self.owners, self.batch = [self.owners[b] for b in kept], size
      alive = list(range(len(alive)))
    longest, at = max(self._tokens(self.owners[b]) for b in alive), self.shapes.lengths.index
    while longest > self.length:
      self.slots = self.made.grow[self.batch, self.length](self.slots)
      self.length = self.shapes.lengths[at(self.length) + 1]
    while self.rows and at(self.length) and longest + self.made.room.tokens <= self.shapes.lengths[
        at(self.length) - 1]:
      self.slots = self.made.shorten[self.length](self.slots)
      self.length = self.shapes.lengths[at(self.length) - 1]

  def _tokens(self, row):
    """Tokens of a row so far: those in the cache and the one to be read."""
    return len(row.prompt.tokens) + int(self.out.response_length_B[row.place])

  def _enough(self):
    """So few rows alive that something else is to be done: fill slots, or shrink the batch."""
    alive = sum(row is not None for row in self.owners)
    if self.rows:
      return min(alive, self.batch) - min(alive, len(self.rows), max(1, self.batch // SHARE))
    return max((B for B in self.shapes.batches if B < self.batch), default=0)

  def _agree(self, *facts, seconds=None):
    """Every process is about to dispatch the same."""
    self.digest.update(repr(facts).encode())
    hosts.agree("sampler", self.digest.hexdigest(), seconds)

  def _take(self, written):
    """Notes what a dispatch wrote; returns the places of the rows that have ended."""
    done, T = [], self.sampler.sampling.max_tokens
    self.seen["dispatches"] += 1
    self.seen["slot_tokens"] += self.batch * int(written.count_B.max(initial=0))
    for b, row in enumerate(self.owners):
      if row is None:
        continue
      out, place, count = self.out, row.place, int(written.count_B[b])
      start, stopped = int(out.response_length_B[place]), bool(written.stopped_B[b])
      out.response_BT[place, start: start + count] = written.tokens_BN[b, :count]
      end = start + count
      cut = self._cut(out.response_BT[place, :end], start)
      if cut is not None:
        out.response_BT[place, cut:], end, stopped = 0, cut, True
      for to, x in ((out.sampler_logp_BT, written.logp_BN),
                    (out.behaviour_logp_BT, written.behaviour_logp_BN)):
        to[place, start: end] = x[b, : end - start]
        self._check_finite(place, to[place, start: end])
      out.response_length_B[place], out.finish_reason_B[place] = end, stopped
      self.seen["tokens"] += end - start
      if stopped or end == T:
        self._leave(b)
        done.append(place)
    # Every token has part in what is scheduled next.
    for x in (written.tokens_BN, written.count_B, written.stopped_B):
      self.digest.update(np.ascontiguousarray(x).tobytes())
    return done

  def _check_finite(self, index: int, logp_N: np.ndarray) -> None:
    """Raises FloatingPointError unless the new log-probabilities of a row are finite.

    Every host holds equal numbers, so they all stop here.
    """
    if not np.isfinite(logp_N).all():
      raise FloatingPointError(
          f"sample {self.out.sample_index_B[index]} of prompt {self.out.prompt_id_B[index]} has a "
          "log-probability that is not finite: look for NaN or infinite numbers in the model's "
          "weights.")

  def _cut(self, ids, start):
    """Length of a response up to the token that completes a stop string, or None.

    What was complete by `min_tokens` does not count.
    """
    strings, text = self.sampler.sampling.stop_strings, self.sampler.text
    least = self.sampler.sampling.min_tokens
    if not strings or len(ids) <= least or not _near(text, strings, ids, start):
      return None
    before = {s: text(ids[:least]).count(s) for s in strings}
    def ended(n):
      return any(text(ids[:n]).count(s) > count for s, count in before.items())
    if not ended(len(ids)):
      return None
    return next(n for n in range(max(start, least) + 1, len(ids) + 1) if ended(n))


def _near(text, strings, ids, start):
  """May one of the strings end among the tokens from `start` on? Reads no more text than it must.
  """
  longest, back, before = max(map(len, strings)), 0, ""
  # A token may have no text of its own, or a part of a character, which would spoil what comes
  # after: so many before that theirs is longer than any string, and begins whole.
  while back < start and (len(before) < longest + 8 or before.startswith("\ufffd")):
    back = 2 * back + 1
    before = text(ids[max(0, start - back): start])
  tail = text(ids[max(0, start - back):])
  return any(s in tail for s in strings)
