"""The host's side of sampling: which rows are in which slots, and what they have sampled.

Rows wait in order, and a slot whose row has ended takes the next one. When no row waits, the batch
shrinks to the rows still alive. The cache grows with the longest row. The schedule is a function of
the tokens alone, so several hosts schedule alike, and they compare before each dispatch.
"""

import collections
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from s2d_jax import hosts, rollouts, sharding
from s2d_jax.models.caches import KV
from s2d_jax.rollouts import Prompt, Rollout
from s2d_jax.sampler.decode import Weights, Written
from s2d_jax.sharding import Params

if TYPE_CHECKING:  # the engine imports this module
  from s2d_jax.sampler.engine import Sampler

REFILL_FRACTION = 8  # decoding stops to admit waiting rows when 1/8 of the slots are free

# (prompt, sample index) of each row that is to be sampled.
RowList = Sequence[tuple[Prompt, int]]
# Called with a row's place in the rollout as soon as the row has ended.
OnEnd = Callable[[int, Rollout], None]


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
  prompt: Prompt
  seed_key_2: np.ndarray  # uint32; all randomness of the row is a function of it


class Schedule:
  """The rows of one call: those that wait, those in slots, and the tokens sampled for each."""

  def __init__(self, sampler: "Sampler", params: Params | Weights, wanted: RowList,
               seed: tuple[int, ...], weight_version: int) -> None:
    self.sampler = sampler
    self.programs = sampler.programs
    self.shapes = sampler.programs.shapes
    self.rows = collections.deque(
        Row(place, prompt, rollouts.row_key(seed, prompt.id, index))
        for place, (prompt, index) in enumerate(wanted))
    self.waiting = collections.Counter(row.prompt.id for row in self.rows)
    self.digest = hashlib.blake2b(digest_size=16)
    for row in self.rows:
      self.digest.update(np.array([row.prompt.id, *row.prompt.tokens], np.int64).tobytes())
      self.digest.update(row.seed_key_2.tobytes())
    # Processes may come here from compiling or from loading weights, and not at once.
    self._agree(weight_version, sampler.sampling, self.programs.room, self.shapes,
                seconds=hosts.START_SECONDS)
    began = time.monotonic()
    self.weights = params if isinstance(params, Weights) else sampler.lay_out(params)
    seconds = time.monotonic() - began
    self.out = _empty_rollout(wanted, sampler.width, sampler.sampling.max_tokens, weight_version)
    self.counts = dict.fromkeys(("dispatches", "prefills", "tokens", "slot_tokens"), 0) | {
        "weights_seconds": seconds,
        "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(self.weights))}
    # prompt id -> (the cache it was read into, its row there), while rows still wait for it
    self.prompt_caches: dict[int, tuple[tuple[KV, ...], int]] = {}

  def run(self, ended: OnEnd | None) -> Rollout:
    """The Rollout with every row sampled to its end; `ended` is called as rows end."""
    sampler = self.sampler
    self.batch = self.shapes.batches[0]
    self.length = self.shapes.lengths[0]
    self.slots = self.programs.empty()
    self.owners: list[Row | None] = [None] * self.batch
    places = []
    while self.rows or any(self.owners):
      # All that this iteration sends to the devices is a function of what is compared here.
      self._agree([row and row.place for row in self.owners], self.batch, self.length,
                  len(self.rows))
      self._fill()
      self._fit()
      alive_B = np.array([row is not None for row in self.owners])
      self.slots, written = self.programs.decode[self.batch, self.length](
          self.weights, self.slots, sampler.put(alive_B), sampler.put(np.int32(self._stop_count())))
      # The program runs asynchronously: rewards of the rows before are computed meanwhile.
      self._report(places, ended)
      places = self._record(sharding.fetch(written))
    self._report(places, ended)
    for name, count in self.counts.items():
      sampler.seen[name] = sampler.seen.get(name, 0) + count
    return self.out

  def _report(self, places: list[int], ended: OnEnd | None) -> None:
    if ended is not None:
      for place in places:
        ended(place, self.out)

  def _fill(self) -> None:
    """Gives free slots to waiting rows; one program admits those whose prompts share a cache."""
    group, entered = None, []
    for b in [b for b, row in enumerate(self.owners) if row is None]:
      if not self.rows:
        break
      if self.rows[0].prompt.id not in self.prompt_caches:
        # Reading prompts frees the caches of others, so the rows of those enter first.
        group, entered, cache = self._admit(group, entered), [], None
        self._prefill()
      cache, _ = self.prompt_caches[self.rows[0].prompt.id]
      if group is not None and cache is not group:
        group, entered = self._admit(group, entered), []
      if self._reserve(b, self.rows[0]):
        group = cache
        row = self.owners[b] = self.rows.popleft()
        self.waiting[row.prompt.id] -= 1
        entered.append(b)
    self._admit(group, entered)
    self._forget()

  def _forget(self) -> None:
    """Frees the caches of prompts that no row waits for."""
    self.prompt_caches = {i: found for i, found in self.prompt_caches.items() if self.waiting[i]}

  def _prefill(self) -> None:
    """Reads the prompts of the next rows, each once for all its samples, until a batch is full."""
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
    cache = self.programs.prefill(self.weights, self.sampler.put(prompt_PW),
                              self.sampler.put(np.int32(longest)))
    for i, prompt in enumerate(own):
      self.prompt_caches[prompt.id] = cache, i
    self.counts["prefills"] += 1

  def _admit(self, cache: tuple[KV, ...] | None, entered: list[int]) -> None:
    """Copies the prompts of new rows from `cache` to the slots `entered`."""
    if not entered:
      return
    B = self.batch
    source_B, token_B, position_B = (np.zeros(B, np.int32) for _ in range(3))
    new_B, key_B2 = np.zeros(B, bool), np.zeros((B, 2), np.uint32)
    for b in entered:
      row, tokens = self.owners[b], self.owners[b].prompt.tokens
      new_B[b], key_B2[b] = True, row.seed_key_2
      source_B[b], token_B[b] = self.prompt_caches[row.prompt.id][1], tokens[-1]
      # The prompt's last token is read again: its logits are those of the first sampled token.
      position_B[b] = len(tokens) - 1
    self.slots = self.programs.admit[self.length](self.slots, cache, *map(
        self.sampler.put, (*self._prompt_sources(source_B), new_B, token_B, position_B, key_B2)))

  def _reserve(self, b: int, row: Row) -> bool:
    """True if slot b has memory for the row; here each slot has memory of its own."""
    del b, row
    return True

  def _prompt_sources(self, source_B: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arguments of `admit` that say where in the prompts' cache each slot's prompt is."""
    return (source_B,)

  def _release(self, b: int) -> None:
    """Frees slot b."""
    self.owners[b] = None

  def _fit(self) -> None:
    """Fits the batch to the rows alive, once no row waits, and the cache's length to the longest.
    """
    alive = [b for b, row in enumerate(self.owners) if row is not None]
    fewer = [B for B in self.shapes.batches if B < self.batch]
    while not self.rows and fewer and len(alive) <= fewer[0]:
      size = fewer.pop(0)
      # Free slots fill up the smaller batch, which has a fixed size.
      kept = (alive + [b for b in range(self.batch) if b not in alive])[:size]
      self.slots = self.programs.shrink[self.batch, self.length](
          self.slots, self.sampler.put(np.array(kept, np.int32)))
      self.owners, self.batch = [self.owners[b] for b in kept], size
      alive = list(range(len(alive)))
    at = self.shapes.lengths.index
    longest = max(self._tokens(self.owners[b]) for b in alive)
    while longest > self.length:
      self.slots = self.programs.grow[self.batch, self.length](self.slots)
      self.length = self.shapes.lengths[at(self.length) + 1]
    # Shorter again only with a dispatch's tokens to spare, or the cache would grow at once.
    longest += self.programs.room.tokens
    while self.rows and at(self.length) and longest <= self.shapes.lengths[at(self.length) - 1]:
      self.slots = self.programs.shorten[self.length](self.slots)
      self.length = self.shapes.lengths[at(self.length) - 1]

  def _tokens(self, row: Row) -> int:
    """Tokens of a row so far: those in the cache and the one to be read."""
    return len(row.prompt.tokens) + int(self.out.response_length_B[row.place])

  def _stop_count(self) -> int:
    """Rows alive at which the device loop should return: to refill slots, or to shrink the batch.
    """
    alive = sum(row is not None for row in self.owners)
    if self.rows:
      # A dispatch for every row that ends would cost more than the few slots that stay empty.
      refill = min(alive, len(self.rows), max(1, self.batch // REFILL_FRACTION))
      return min(alive, self.batch) - refill
    return max((B for B in self.shapes.batches if B < self.batch), default=0)

  def _agree(self, *facts: object, seconds: int | None = None) -> None:
    """Stops unless every process is about to dispatch the same program on the same rows."""
    self.digest.update(repr(facts).encode())
    hosts.agree("sampler", self.digest.hexdigest(), seconds)

  def _record(self, written: Written) -> list[int]:
    """Writes a dispatch's tokens to the rollout; returns the places of rows that have ended."""
    done, T = [], self.sampler.sampling.max_tokens
    self.counts["dispatches"] += 1
    self.counts["slot_tokens"] += self.batch * int(written.count_B.max(initial=0))
    for b, row in enumerate(self.owners):
      if row is None:
        continue
      out, place, count = self.out, row.place, int(written.count_B[b])
      start, stopped = int(out.response_length_B[place]), bool(written.stopped_B[b])
      out.response_BT[place, start: start + count] = written.tokens_BN[b, :count]
      end = start + count
      cut = self._cut(out.response_BT[place, :end], start)
      if cut is not None:
        # The device decodes on past a stop string, which only the host can see in the text.
        out.response_BT[place, cut:], end, stopped = 0, cut, True
      for to, x in ((out.sampler_logp_BT, written.logp_BN),
                    (out.behaviour_logp_BT, written.behaviour_logp_BN)):
        to[place, start: end] = x[b, : end - start]
        self._check_finite(place, to[place, start: end])
      out.response_length_B[place], out.finish_reason_B[place] = end, stopped
      self.counts["tokens"] += end - start
      if stopped or end == T:
        self._release(b)
        done.append(place)
    # The next schedule depends on every token, so hosts compare these too.
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

  def _cut(self, ids: np.ndarray, start: int) -> int | None:
    """Length of a response up to the token that completes a stop string, or None without one.

    Tokens before `start` were searched before. A string complete by `min_tokens` does not count.
    """
    strings, text = self.sampler.sampling.stop_strings, self.sampler.text
    least = self.sampler.sampling.min_tokens
    if not strings or len(ids) <= least or not _may_contain(text, strings, ids, start):
      return None
    before = {s: text(ids[:least]).count(s) for s in strings}
    def ended(n: int) -> bool:
      return any(text(ids[:n]).count(s) > count for s, count in before.items())
    if not ended(len(ids)):
      return None
    # Which token completes the string is found by decoding prefixes: tokens split it anyhow.
    return next(n for n in range(max(start, least) + 1, len(ids) + 1) if ended(n))


def _may_contain(text: Callable[[np.ndarray], str], strings: tuple[str, ...], ids: np.ndarray,
                 start: int) -> bool:
  """False only if no stop string ends among the tokens from `start` on; decodes only the tail."""
  longest, back, before = max(map(len, strings)), 0, ""
  # A token may have no text of its own, or a part of a character that spoils the text after it.
  # So the tokens before `start` are taken until their text is longer than any string and begins
  # with a whole character.
  while back < start and (len(before) < longest + 8 or before.startswith("\ufffd")):
    back = 2 * back + 1
    before = text(ids[max(0, start - back): start])
  tail = text(ids[max(0, start - back):])
  return any(s in tail for s in strings)


def _empty_rollout(wanted: RowList, width: int, max_tokens: int, weight_version: int) -> Rollout:
  """A Rollout with the prompts of the rows and no response tokens yet."""
  B, T = len(wanted), max_tokens
  prompt_BW = np.zeros((B, width), np.int32)
  for row_W, (prompt, _) in zip(prompt_BW, wanted, strict=True):
    row_W[: len(prompt.tokens)] = prompt.tokens
  return Rollout(
      np.array([p.id for p, _ in wanted], np.int64), np.array([g for _, g in wanted], np.int32),
      prompt_BW, np.array([len(p.tokens) for p, _ in wanted], np.int32),
      np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros((B, T), np.float32),
      np.zeros((B, T), np.float32), np.zeros(B, np.int32), weight_version)
