"""The host's side of sampling: which rows are in which slots, and what comes back of them.

Rows wait in order; a slot whose row has ended takes the next one; once nobody waits, the batch
shrinks to the rows still alive, and the cache grows with the longest. What is scheduled is a
function of the tokens alone, so several hosts schedule the same, and compare before each dispatch.
"""

import collections
import hashlib
from typing import Any, NamedTuple

import jax
import numpy as np

from s2d_jax import rollout, sharding
from s2d_jax.sampler import decode, programs
from s2d_jax.sampler.programs import Room

SHARE = 8  # one slot in so many is free before decoding stops to fill it


def check(prompts, sampling, width, text=None):
  """Refuses what cannot be sampled, by name, before any device is asked.

  Raises:
    ValueError: no prompts, a prompt without tokens or with more than `width`, or stop strings and
      nobody to turn ids into text.
  """
  if sampling.stop_strings and text is None:
    raise ValueError("stop_strings are looked for in text and this sampler was given no tokenizer: "
                     "give it `text`, or use stop_ids.")
  if not prompts:
    raise ValueError("there are no prompts to sample from: check the split's name and its size.")
  for prompt in prompts:
    if not len(prompt.tokens):
      raise ValueError(f"prompt {prompt.id} has no tokens, so nothing to continue: give its "
                       "problem a text.")
    if len(prompt.tokens) > width:
      raise ValueError(f"prompt {prompt.id} has {len(prompt.tokens)} tokens and its window is "
                       f"{width}: raise config.prompt_tokens or drop the problem.")


class Row(NamedTuple):
  """A row that waits or is in a slot."""
  place: int     # in the rollout
  prompt: Any
  key_2: Any     # what its randomness is named by


def make(model, params, sampling, size, width, room=Room(), text=None):
  """Compiles a sampler of prompts of at most `width` tokens; nothing compiles later.

  Args:
    model: a Model; params: its weights, or their abstract arrays, laid out as they will be.
    sampling: a Sampling.
    size: prompts that are sampled side by side where memory suffices; any number may be asked for.
    width: tokens of the longest prompt.
    room: a Room.
    text: ids -> str, for stop strings.

  Returns:
    draw(params, prompts, seed, first_sample=0, weight_version=0, ended=None) -> Rollout, its rows a
    prompt's samples side by side, in the order of `prompts`. `seed` is a tuple of ints; row (prompt
    id, sample index) draws from (seed…, prompt id, sample index) and from nothing else.
    ended(place, rollout) is called as rows end, while others still decode; that row is whole. `draw.programs` is what was
    compiled, and `draw.seen` counts what the last call did.
  """
  return Sampler(model, params, sampling, size, width, room, text)


class Sampler:
  """What `make` returns."""

  def __init__(self, model, params, sampling, size, width, room, text):
    if sampling.stop_strings and text is None:
      check((), sampling, width)
    if room.tokens < 1 or room.chunk < 1 or room.cache not in (*programs.KINDS, "auto"):
      raise ValueError(f"config.sampler is {room}: tokens and chunk are 1 or more, and cache is "
                       f"auto, {', '.join(programs.KINDS)}.")
    self.mesh = sharding.current_mesh()
    leaves, tree = jax.tree.flatten(sharding.abstract(params))
    self.programs = programs.build(
        model, sampling, room, size * sampling.samples_per_prompt, width, self.mesh, tree,
        tuple(leaves))
    self.sampling, self.width, self.text, self.seen = sampling, width, text, {}

  def __call__(self, params, prompts, seed, first_sample=0, weight_version=0, ended=None):
    samples = range(first_sample, first_sample + self.sampling.samples_per_prompt)
    return self.rows(params, [(p, g) for p in prompts for g in samples], seed, weight_version,
                     ended)

  def rows(self, params, wanted, seed, weight_version=0, ended=None):
    """The Rollout of (prompt, sample index) pairs, best a prompt's side by side."""
    check([prompt for prompt, _ in wanted], self.sampling, self.width, self.text)
    return _Call(self, params, wanted, seed, weight_version).run(ended)

  @property
  def compiled(self):
    """The executable that decodes the largest batch to its longest."""
    return self.programs.decode[self.programs.batches[0], self.programs.lengths[-1]]

  def put(self, x):
    """A host's array on the devices, whole on each."""
    return jax.device_put(x) if self.mesh is None else sharding.put(
        x, sharding.replicated(self.mesh))


class _Call:
  """One call's rows: those that wait, those in slots, and what has been written of each."""

  def __init__(self, sampler, params, wanted, seed, weight_version):
    self.sampler = sampler
    self.weights = sampler.programs.prepare(params)
    self.rows = collections.deque(
        Row(place, prompt, rollout.row_key(seed, prompt.id, index))
        for place, (prompt, index) in enumerate(wanted))
    B, T = len(wanted), sampler.sampling.max_tokens
    prompt_BW = np.zeros((B, sampler.width), np.int32)
    for row_W, (prompt, _) in zip(prompt_BW, wanted, strict=True):
      row_W[: len(prompt.tokens)] = prompt.tokens
    self.out = rollout.Rollout(
        np.array([p.id for p, _ in wanted], np.int64), np.array([g for _, g in wanted], np.int32),
        prompt_BW, np.array([len(p.tokens) for p, _ in wanted], np.int32), np.zeros((B, T), np.int32),
        np.zeros(B, np.int32), np.zeros((B, T), np.float32), np.zeros((B, T), np.float32),
        np.zeros(B, np.int32), weight_version)
    self.digest = hashlib.blake2b(digest_size=16)
    self.seen = dict.fromkeys(("dispatches", "prefills", "tokens", "slot_tokens"), 0)
    self.read = {}  # prompt id -> (its cache, its row in it), of prompts that rows still wait for

  def run(self, ended):
    """The Rollout, every row to its end."""
    made, sampler = self.sampler.programs, self.sampler
    self.batch, self.length = made.batches[0], made.lengths[0]
    self.slots, self.owners = made.empty(), [None] * self.batch
    ready = []
    while self.rows or any(self.owners):
      self._fill()
      self._fit()
      alive_B = np.array([row is not None for row in self.owners])
      self._agree(alive_B)
      self.slots, written = made.decode[self.batch, self.length](
          self.weights, self.slots, sampler.put(alive_B), sampler.put(np.int32(self._enough())))
      for place in ready if ended is not None else ():  # while the device decodes
        ended(place, self.out)
      ready = self._take(sharding.fetch(written))
    for place in ready if ended is not None else ():
      ended(place, self.out)
    sampler.seen = self.seen
    return self.out

  def _fill(self):
    """Gives free slots to the rows that wait, a group of prompts that were read together at a time.
    """
    free = [b for b, row in enumerate(self.owners) if row is None]
    while self.rows and free:
      group, picked = None, []
      while self.rows and len(picked) < len(free):
        if self.rows[0].prompt.id not in self.read:
          if picked:
            break
          self._prefill()
        cache, _ = self.read[self.rows[0].prompt.id]
        if group is not None and cache is not group:
          break
        group = cache
        picked.append(self.rows.popleft())
      self._admit(group, picked, free[: len(picked)])
      free = free[len(picked):]
      waiting = {row.prompt.id for row in self.rows}
      self.read = {k: v for k, v in self.read.items() if k in waiting}

  def _prefill(self):
    """Reads the prompts of the next rows, as many as the program takes: each once for its samples.
    """
    made, own = self.sampler.programs, {}
    for row in self.rows:
      own.setdefault(row.prompt.id, row.prompt)
      if len(own) == made.prompts:
        break
    own = list(own.values())
    prompt_PW = np.zeros((made.prompts, made.width), np.int32)
    for row_W, prompt in zip(prompt_PW, own, strict=False):
      row_W[: len(prompt.tokens)] = prompt.tokens
    longest = max(len(prompt.tokens) for prompt in own)
    cache = made.prefill(self.weights, self.sampler.put(prompt_PW),
                             self.sampler.put(np.int32(longest)))
    for i, prompt in enumerate(own):
      self.read[prompt.id] = cache, i
    self.seen["prefills"] += 1

  def _admit(self, cache, picked, free):
    B = self.batch
    source_B, token_B, position_B = (np.zeros(B, np.int32) for _ in range(3))
    new_B, key_B2 = np.zeros(B, bool), np.zeros((B, 2), np.uint32)
    for b, row in zip(free, picked, strict=True):
      tokens = row.prompt.tokens
      self.owners[b], new_B[b], key_B2[b] = row, True, row.key_2
      source_B[b], token_B[b] = self.read[row.prompt.id][1], tokens[-1]
      position_B[b] = len(tokens) - 1
    self.slots = self.sampler.programs.admit[self.length](
        self.slots, cache, *map(self.sampler.put, (source_B, new_B, token_B, position_B, key_B2)))

  def _fit(self):
    """Shrinks the batch to the rows alive once nobody waits; grows the cache for the longest."""
    made = self.sampler.programs
    alive = [b for b, row in enumerate(self.owners) if row is not None]
    fewer = [B for B in made.batches if B < self.batch]
    while not self.rows and fewer and len(alive) <= fewer[0]:
      size = fewer.pop(0)
      kept = (alive + [b for b in range(self.batch) if b not in alive])[:size]
      self.slots = made.shrink[self.batch, self.length](
          self.slots, self.sampler.put(np.array(kept, np.int32)))
      self.owners, self.batch = [self.owners[b] for b in kept], size
      alive = list(range(len(alive)))
    while max(self._tokens(self.owners[b]) for b in alive) > self.length:
      self.slots = made.grow[self.batch, self.length](self.slots)
      self.length = made.lengths[made.lengths.index(self.length) + 1]

  def _tokens(self, row):
    """Tokens of a row so far: those in the cache and the one to be read."""
    return len(row.prompt.tokens) + int(self.out.response_length_B[row.place])

  def _enough(self):
    """So few rows alive that something else is to be done: fill slots, or shrink the batch."""
    if self.rows:
      return self.batch - min(len(self.rows), max(1, self.batch // SHARE))
    return max((B for B in self.sampler.programs.batches if B < self.batch), default=0)

  def _agree(self, alive_B):
    """Every process is about to dispatch the same."""
    self.digest.update(np.packbits(alive_B).tobytes())
    self.digest.update(f"{self.batch},{self.length},{len(self.rows)}".encode())
    sharding.agree("sampler", self.digest.hexdigest())

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
                    (out.drawn_logp_BT, written.drawn_logp_BN)):
        to[place, start: end] = x[b, : end - start]
      out.response_length_B[place], out.finish_reason_B[place] = end, stopped
      self.seen["tokens"] += end - start
      if stopped or end == T:
        self.owners[b] = None
        done.append(place)
    # Every token has part in what is scheduled next.
    for x in (written.tokens_BN, written.count_B, written.stopped_B):
      self.digest.update(np.ascontiguousarray(x).tobytes())
    return done

  def _cut(self, ids, start):
    """Length of a response up to the token that completes a stop string, or None."""
    strings, text = self.sampler.sampling.stop_strings, self.sampler.text
    if not strings or not any(s in text(ids) for s in strings):
      return None
    first = max(start + 1, self.sampler.sampling.min_tokens + 1)
    return next((n for n in range(first, len(ids) + 1)
                 if any(s in text(ids[:n]) for s in strings)), None)


def sample(model, params, prompts, sampling, seed, room=Room(), text=None):
  """Samples every prompt: `make` then draw, for when compiling once does not matter.

  Args:
    model: a Model; params: its weights; prompts: list of rollout.Prompt; sampling: a Sampling.
    seed: a tuple of ints; room, text: as `make` takes them.

  Returns:
    A Rollout of len(prompts) · samples_per_prompt rows.

  Raises:
    ValueError: no prompts, or stop strings without `text`.
  """
  width = max((len(p.tokens) for p in prompts), default=0)
  check(prompts, sampling, width, text)
  return make(model, params, sampling, len(prompts), width, room, text)(params, prompts, seed)
