"""The host's side of sampling: which rows are in which slots, and what they have sampled.

Rows wait in order, and a slot whose row has ended takes the next one. When no row waits, the batch
shrinks to the rows still alive. The cache grows with the longest row. The schedule is a function of
the tokens alone, so several hosts schedule alike, and they compare between dispatches.

Where no row waits, the host launches the next dispatch before it reads the results of the last one,
so that the device does not wait for it. See `Schedule._looks_ahead`.
"""

import collections
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from s2d_jax import hosts, rollouts
from s2d_jax.models.caches import KV
from s2d_jax.rollouts import OnFinish, Prompt, Rollout, SamplerStats
from s2d_jax.sampler.decode import Decoded, Weights
from s2d_jax.sampler.memory import CachePages, CacheRows, Length
from s2d_jax.sampler.programs import Programs
from s2d_jax.sampler.sampling import Sampling
from s2d_jax.sampler.stop_strings import StopDetector

REFILL_FRACTION = 8  # decoding stops to admit waiting rows when 1/8 of the slots are free

# (prompt, sample index) of a row that is to be sampled.
Request = tuple[Prompt, int]


class Stopped(Exception):
  """The run stops, so a call of a sampler ended early. The weights are as they were."""


_stop: Callable[[], bool] | None = None  # read between dispatches


@contextlib.contextmanager
def stopping(stop: Callable[[], bool] | None) -> Iterator[None]:
  """Within, sampling raises Stopped once `stop()` is true; with None it goes on to its end.

  A dispatch takes well under a second, and the answers of a step may take minutes.
  """
  global _stop
  before = _stop
  _stop = stop
  try:
    yield
  finally:
    _stop = before


class Row(NamedTuple):
  """A row that waits or is in a slot."""
  index: int              # in the rollout
  prompt: Prompt
  seed_key_2: np.ndarray  # uint32; all randomness of the row is a function of it


class Dispatch(NamedTuple):
  """A dispatch of decoding that the host has launched and not read yet."""
  alive_B: jax.Array     # bool: whose rows are alive after it
  stop_count: jax.Array  # int32: the number of rows alive at which it ended early
  decoded: Decoded


class Schedule:
  """The rows of one call: those that wait, those in slots, and the tokens sampled for each."""

  def __init__(self, programs: Programs, sampling: Sampling, stops: StopDetector,
               requests: Sequence[Request], seed: tuple[int, ...], rollout: Rollout) -> None:
    """Prepares the rows; `rollout` has their prompts and no tokens yet, and is filled by `run`."""
    self.programs = programs
    self.sampling = sampling
    self.stops = stops
    self.rollout = rollout
    self.rows = collections.deque(
        Row(index, prompt, rollouts.row_key(seed, prompt.id, sample_index))
        for index, (prompt, sample_index) in enumerate(requests))
    self.waiting = collections.Counter(row.prompt.id for row in self.rows)
    self.counts = collections.Counter()  # of the fields of SamplerStats
    # prompt id -> (the cache it was read into, its row there), while rows still wait for it
    self.prompt_caches: dict[int, tuple[tuple[KV, ...], int]] = {}
    self.digest = hashlib.blake2b(digest_size=16)
    for row in self.rows:
      self.digest.update(np.array([row.prompt.id, *row.prompt.tokens], np.int64).tobytes())
      self.digest.update(row.seed_key_2.tobytes())
    # Processes may come here from compiling or from loading weights, and not at once.
    self._agree(rollout.weight_version, sampling, programs.config, programs.shapes,
                seconds=hosts.START_SECONDS)

  def run(self, weights: Weights, on_finish: OnFinish | None) -> SamplerStats:
    """Samples every row to its end; `on_finish` is called as rows end, while others still decode.
    """
    self.weights = weights
    self.memory = (CachePages(self.programs, self.sampling.max_tokens) if self.programs.config.page
                   else CacheRows(self.programs))
    self.owners: list[Row | None] = [None] * self.memory.batch
    finished: list[int] = []
    running: Dispatch | None = None
    while self.rows or any(self.owners):
      # The processes make equal dispatches, so they call this equally often.
      if _stop is not None and _stop():
        raise Stopped
      # All that this iteration sends to the devices is a function of what is compared here.
      self._agree([row and row.index for row in self.owners], self.memory.batch, self.memory.length,
                  len(self.rows))
      if running is None:
        self._fill()
        self._fit()
        alive_B = np.array([row is not None for row in self.owners])
        running = self._launch(self.programs.put(alive_B),
                               self.programs.put(np.int32(self._stop_count())))
      ahead = self._launch(running.alive_B, running.stop_count) if self._looks_ahead() else None
      # The programs run asynchronously: rewards of the rows before are computed meanwhile.
      self._report(finished, on_finish)
      finished = self._record(jax.device_get(running.decoded))
      running = self._next(ahead)
    self._report(finished, on_finish)
    return SamplerStats(**self.counts)

  def _launch(self, alive_B: jax.Array, stop_count: jax.Array) -> Dispatch:
    """Starts a dispatch on the slots, which it takes and replaces."""
    decode = self.programs.decode[self.memory.batch, self.memory.length]
    self.memory.slots, alive_B, decoded = decode(self.weights, self.memory.slots, alive_B,
                                                 stop_count)
    return Dispatch(alive_B, stop_count, decoded)

  def _looks_ahead(self) -> bool:
    """Whether another dispatch is launched behind the one that runs, before that one is read.

    It takes the slots and rows alive from the device. Where the one before it ended early, the
    device's loop has no step and the host goes on as without it.
    """
    # A row that waits enters between two dispatches. A slot that stays empty for one dispatch more
    # costs more than the time in which the device waits for the host. Only the host finds stop
    # strings, and gives rows pages.
    return not (self.rows or self.sampling.stop_strings or self.programs.config.page)

  def _next(self, ahead: Dispatch | None) -> Dispatch | None:
    """The dispatch launched ahead, or None where the slots must change first or no row is left.

    The device decides by the tokens, as the host does here; nothing is decoded that is not read.
    """
    if ahead is None:
      return None
    lengths = self._lengths().values()
    longest = max((row.prompt + row.response for row in lengths), default=0)
    if len(lengths) > self._stop_count() and longest <= self.memory.length:
      return ahead
    # Waits for it: the cache may be copied next.
    if jax.device_get(ahead.decoded.count_B).any():
      raise RuntimeError("the device decoded tokens that the host did not expect: report it.")
    return None

  def _report(self, finished: list[int], on_finish: OnFinish | None) -> None:
    if on_finish is not None:
      for index in finished:
        on_finish(index, self.rollout)

  def _fill(self) -> None:
    """Gives free slots to waiting rows; one program admits those whose prompts share a cache."""
    group = None  # the cache of prompts that the slots in `entered` are filled from
    entered: list[int] = []
    for slot in [slot for slot, row in enumerate(self.owners) if row is None]:
      if not self.rows:
        break
      if self.rows[0].prompt.id not in self.prompt_caches:
        # Reading prompts frees the caches of others, so the rows of those enter first. The
        # variables are cleared because a reference would keep the old cache in memory beside the
        # new one, and memory is counted for one.
        self._admit(group, entered)
        group = None
        cache = None
        entered = []
        self._prefill()
      cache, source = self.prompt_caches[self.rows[0].prompt.id]
      if cache is not group:
        self._admit(group, entered)
        group = cache
        entered = []
      if self.memory.reserve(slot, self.rows[0].prompt, source):
        row = self.rows.popleft()
        self.owners[slot] = row
        self.waiting[row.prompt.id] -= 1
        entered.append(slot)
    self._admit(group, entered)
    self._forget()

  def _forget(self) -> None:
    """Frees the caches of prompts that no row waits for."""
    self.prompt_caches = {i: found for i, found in self.prompt_caches.items() if self.waiting[i]}

  def _prefill(self) -> None:
    """Reads the prompts of the next rows, each once for all its samples, until a batch is full."""
    self._forget()  # first: memory is counted for the prompts of one program
    shapes = self.programs.shapes
    by_id: dict[int, Prompt] = {}
    for row in self.rows:
      by_id.setdefault(row.prompt.id, row.prompt)
      if len(by_id) == shapes.prompts:
        break
    prompt_PW = np.zeros((shapes.prompts, shapes.window), np.int32)
    for p, prompt in enumerate(by_id.values()):
      prompt_PW[p, : len(prompt.tokens)] = prompt.tokens
    longest = max(len(prompt.tokens) for prompt in by_id.values())
    cache = self.programs.read_prompts(self.weights, prompt_PW, longest)
    for p, prompt in enumerate(by_id.values()):
      self.prompt_caches[prompt.id] = cache, p
    self.counts["prefills"] += 1

  def _admit(self, cache: tuple[KV, ...] | None, entered: list[int]) -> None:
    """Copies the prompts of new rows from `cache` to the slots `entered`."""
    if not entered:
      return
    B = self.memory.batch
    source_B = np.zeros(B, np.int32)
    new_B = np.zeros(B, bool)
    token_B = np.zeros(B, np.int32)
    position_B = np.zeros(B, np.int32)
    key_B2 = np.zeros((B, 2), np.uint32)
    for slot in entered:
      row = self.owners[slot]
      source_B[slot] = self.prompt_caches[row.prompt.id][1]
      new_B[slot] = True
      # The prompt's last token is read again: its logits are those of the first sampled token.
      token_B[slot] = row.prompt.tokens[-1]
      position_B[slot] = len(row.prompt.tokens) - 1
      key_B2[slot] = row.seed_key_2
    admit = self.programs.admit[self.memory.length]
    sources = [self.programs.put(x) for x in self.memory.sources(source_B, new_B)]
    self.memory.change_layers(lambda i, layer: admit(layer, cache[i], *sources))
    self.memory.change_rows(self.programs.start_rows, new_B, token_B, position_B, key_B2)

  def _fit(self) -> None:
    """Fits the cache to the rows alive; rows that lose their memory wait again."""
    order, requeued = self.memory.fit(self._lengths(), waiting=bool(self.rows))
    for slot in requeued:
      self._requeue(self.owners[slot])
      self.owners[slot] = None
    self.owners = [self.owners[slot] for slot in order]

  def _lengths(self) -> dict[int, Length]:
    """Tokens of the rows alive, by slot, in the order of the slots."""
    return {slot: Length(len(row.prompt.tokens), int(self.rollout.response_length_B[row.index]))
            for slot, row in enumerate(self.owners) if row is not None}

  def _requeue(self, row: Row) -> None:
    """Puts a row at the head of the queue, and clears its sampled tokens."""
    rollout = self.rollout
    self.counts["tokens"] -= int(rollout.response_length_B[row.index])
    self.counts["requeued"] += 1
    for x in (rollout.response_BT, rollout.response_length_B, rollout.sampler_logp_BT,
              rollout.behaviour_logp_BT):
      x[row.index] = 0
    self.rows.appendleft(row)
    self.waiting[row.prompt.id] += 1

  def _stop_count(self) -> int:
    """Rows alive at which the device loop should return: to refill slots, or to shrink the batch.
    """
    alive = sum(row is not None for row in self.owners)
    batch = self.memory.batch
    if self.rows:
      # A dispatch for every row that ends would cost more than the few slots that stay empty.
      refill = min(alive, len(self.rows), max(1, batch // REFILL_FRACTION))
      return min(alive, batch) - refill
    return max((B for B in self.programs.shapes.batches if B < batch), default=0)

  def _agree(self, *facts: object, seconds: int | None = None) -> None:
    """Stops unless every process is about to dispatch the same program on the same rows."""
    self.digest.update(repr(facts).encode())
    hosts.agree("sampler", self.digest.hexdigest(), seconds)

  def _record(self, decoded: Decoded) -> list[int]:
    """Writes a dispatch's tokens to the rollout; returns the indices of rows that have ended."""
    finished = []
    steps = int(decoded.count_B.max(initial=0))
    if not steps:  # or `run` would never end
      raise RuntimeError("the device decoded no token of rows that have not ended: report it.")
    self.counts["dispatches"] += 1
    self.counts["slot_tokens"] += self.memory.batch * steps
    for slot, row in enumerate(self.owners):
      if row is None:
        continue
      if self._record_row(row, slot, decoded):
        self.memory.release(slot)
        self.owners[slot] = None
        finished.append(row.index)
    # The next schedule depends on every token, so hosts compare these too.
    for x in (decoded.tokens_BN, decoded.count_B, decoded.stopped_B):
      self.digest.update(np.ascontiguousarray(x).tobytes())
    return finished

  def _record_row(self, row: Row, slot: int, decoded: Decoded) -> bool:
    """Writes a row's tokens of a dispatch to the rollout; returns whether the row has ended."""
    rollout = self.rollout
    index = row.index
    start = int(rollout.response_length_B[index])
    end = start + int(decoded.count_B[slot])
    stopped = bool(decoded.stopped_B[slot])
    rollout.response_BT[index, start: end] = decoded.tokens_BN[slot, : end - start]
    cut = self.stops.cut(rollout.response_BT[index, :end], start)
    if cut is not None:
      # The device decodes on past a stop string, which only the host can see in the text.
      rollout.response_BT[index, cut:] = 0
      end = cut
      stopped = True
    rollout.sampler_logp_BT[index, start: end] = decoded.logp_BN[slot, : end - start]
    rollout.behaviour_logp_BT[index, start: end] = decoded.behaviour_logp_BN[slot, : end - start]
    self._check_finite(index, rollout.sampler_logp_BT[index, start: end])
    self._check_finite(index, rollout.behaviour_logp_BT[index, start: end])
    rollout.response_length_B[index] = end
    rollout.finish_reason_B[index] = stopped
    self.counts["tokens"] += end - start
    return stopped or end == self.sampling.max_tokens

  def _check_finite(self, index: int, logp_N: np.ndarray) -> None:
    """Raises FloatingPointError unless the new log-probabilities of a row are finite.

    Every host holds equal numbers, so they all stop here.
    """
    if not np.isfinite(logp_N).all():
      raise FloatingPointError(
          f"sample {self.rollout.sample_index_B[index]} of prompt "
          f"{self.rollout.prompt_id_B[index]} has a log-probability that is not finite: look for "
          "NaN or infinite numbers in the model's weights.")
