"""One call with a cache in pages: who holds which, and who waits while there are none."""

import collections

import jax
import numpy as np

from s2d_jax import sharding
from s2d_jax.sampler.scheduler import Call


class PagedCall(Call):
  """A Call with a cache in pages: a row holds as many as it fills, and shares its prompt's.

  Who finds no page makes the youngest row of its device wait again; what that one had drawn it will
  draw once more, the same.
  """

  def __init__(self, *args):
    super().__init__(*args)
    B, self.page = self.shapes.batches[0], self.made.room.page
    # Page 0 is nobody's.
    self.free = [list(range(self.shapes.count - 1, 0, -1)) for _ in range(self.shapes.shards)]
    self.held = [collections.Counter() for _ in range(self.shapes.shards)]
    self.pages = [[] for _ in range(B)]  # of each slot, in order
    self.prompts = {}  # (device, prompt id) -> the pages that its samples there share
    self.copies = []   # (page of what was read, page of all devices)
    self.shape = self.made.slots[B, self.shapes.lengths[0]].cache

  def _shard(self, b):
    return b // (len(self.pages) // len(self.free))

  def _take_page(self, b):
    shard = self._shard(b)
    page = self.free[shard].pop()
    self.held[shard][page] += 1
    self.pages[b].append(page)
    return page

  def _enter(self, b, row):
    """Pages for a row's prompt: full ones are shared, the one that it will write to is its own.

    One more must be free for each row of the device, so that rows that enter do not at once push
    others out.
    """
    shard, last = self._shard(b), len(row.prompt.tokens) - 1
    full, rest = divmod(last, self.page)
    shared = self.prompts.get((shard, row.prompt.id))
    need = (0 if shared is not None else full) + 1
    others = sum(row is not None and self._shard(i) == shard for i, row in enumerate(self.owners))
    if len(self.free[shard]) < need + others:
      return False
    first = self.read[row.prompt.id][1] * (self.shapes.width // self.page)
    if shared is None:
      for i in range(full):
        self._copy(first + i, b)
      self.prompts[shard, row.prompt.id] = list(self.pages[b])
    else:
      self.pages[b] += shared
      self.held[shard].update(shared)
    if rest:
      self._copy(first + full, b)
    return True

  def _copy(self, source, b):
    target = self._take_page(b) + self._shard(b) * self.shapes.count
    self.copies.append((source, target))

  def _from(self, source_B):
    shapes = self.shapes
    size = len(source_B) + shapes.prompts * shapes.shards * shapes.width // self.page
    from_M, to_M = np.zeros(size, np.int32), np.full(size, shapes.count * shapes.shards, np.int32)
    for m, (source, target) in enumerate(self.copies):
      from_M[m], to_M[m] = source, target
    self.copies = []
    return from_M, to_M

  def _leave(self, b):
    super()._leave(b)
    shard = self._shard(b)
    for page in self.pages[b]:
      self.held[shard][page] -= 1
      if not self.held[shard][page]:
        del self.held[shard][page]
        self.free[shard].append(page)
    self.pages[b] = []
    self.prompts = {(s, i): pages for (s, i), pages in self.prompts.items()
                    if s != shard or all(page in self.held[s] for page in pages)}

  def _fit(self):
    """Pages for the tokens of the next dispatch, the oldest rows first."""
    room, T = self.made.room.tokens, self.sampler.sampling.max_tokens
    by_age = sorted((b for b, row in enumerate(self.owners) if row is not None),
                    key=lambda b: (-self._drawn(b), b))
    for b in by_age:
      if self.owners[b] is None:
        continue
      wanted = len(self.owners[b].prompt.tokens) + min(self._drawn(b) + room, T)
      while len(self.pages[b]) * self.page < wanted and self.owners[b] is not None:
        if self.free[self._shard(b)]:
          self._take_page(b)
        else:
          self._wait_again(next(x for x in reversed(by_age) if self.owners[x] is not None
                                and self._shard(x) == self._shard(b)))
    table_Bn = np.zeros(self.shape.table_Bn.shape, np.int32)
    for b, pages in enumerate(self.pages):
      table_Bn[b, : len(pages)] = pages
    room_B = np.array([len(pages) * self.page for pages in self.pages], np.int32)
    self.slots = self.slots._replace(cache=self.slots.cache._replace(
        table_Bn=self._placed(table_Bn, self.shape.table_Bn),
        room_B=self._placed(room_B, self.shape.room_B)))

  def _placed(self, x, like):
    return jax.device_put(x) if self.sampler.mesh is None else sharding.put(x, like.sharding)

  def _drawn(self, b):
    return int(self.out.response_length_B[self.owners[b].place])

  def _wait_again(self, b):
    row, out = self.owners[b], self.out
    self.seen["tokens"] -= self._drawn(b)
    self.seen["waited_again"] = self.seen.get("waited_again", 0) + 1
    for x in (out.response_BT, out.response_length_B, out.sampler_logp_BT, out.behaviour_logp_BT):
      x[row.place] = 0
    self.rows.appendleft(row)
    self.waiting[row.prompt.id] += 1
    self._leave(b)
