"""One call with a cache in pages: which rows own which pages, and which rows are put back."""

import collections
from typing import TYPE_CHECKING

import jax
import numpy as np

from s2d_jax import sharding
from s2d_jax.sampler.decode import Weights
from s2d_jax.sampler.scheduler import Row, RowList, Schedule
from s2d_jax.sharding import Params

if TYPE_CHECKING:  # the engine imports this module
  from s2d_jax.sampler.engine import Sampler


class PagedSchedule(Schedule):
  """A Schedule with a cache in pages.

  A row owns the pages it fills and shares those of its prompt. With no free page, the youngest row
  on that device is put back in the queue and later re-sampled, with the same draws.
  """

  def __init__(self, sampler: "Sampler", params: Params | Weights, wanted: RowList,
               seed: tuple[int, ...], weight_version: int) -> None:
    super().__init__(sampler, params, wanted, seed, weight_version)
    B = self.shapes.batches[0]
    self.page = self.programs.room.page
    # Page 0 has no owner: the tables of free slots point to it, and what they write goes there.
    self.free = [list(range(self.shapes.count - 1, 0, -1)) for _ in range(self.shapes.shards)]
    # How many rows use each page: a prompt's page is free only when its last sample has ended.
    self.users = [collections.Counter() for _ in range(self.shapes.shards)]
    self.pages: list[list[int]] = [[] for _ in range(B)]  # of each slot, in order
    # (device, prompt id) -> the pages that the prompt's samples share there
    self.prompts: dict[tuple[int, int], list[int]] = {}
    # (page in the cache of prompts, page counted over all devices), for the next `admit`
    self.copies: list[tuple[int, int]] = []
    self.shape = self.programs.slots[B, self.shapes.lengths[0]].cache

  def _shard(self, b: int) -> int:
    """The device of slot b, counted over `data` and `fsdp`."""
    return b // (len(self.pages) // len(self.free))

  def _take_page(self, b: int) -> int:
    """Gives slot b a free page of its device."""
    shard = self._shard(b)
    page = self.free[shard].pop()
    self.users[shard][page] += 1
    self.pages[b].append(page)
    return page

  def _reserve(self, b: int, row: Row) -> bool:
    """Takes pages for a row's prompt, or returns False if too few are free.

    Samples share the full pages of a prompt. A page that is filled in part is copied for each,
    because the row will write to it.
    """
    shard, last = self._shard(b), len(row.prompt.tokens) - 1
    full, rest = divmod(last, self.page)
    shared = self.prompts.get((shard, row.prompt.id))
    need = (0 if shared is not None else full) + 1
    others = sum(row is not None and self._shard(i) == shard for i, row in enumerate(self.owners))
    # One page for each row of the device stays free, so that a new row does not at once push
    # others out.
    if len(self.free[shard]) < need + others:
      return False
    first = self.prompt_caches[row.prompt.id][1] * (self.shapes.width // self.page)
    if shared is None:
      for i in range(full):
        self._copy(first + i, b)
      self.prompts[shard, row.prompt.id] = list(self.pages[b])
    else:
      self.pages[b] += shared
      self.users[shard].update(shared)
    if rest:
      self._copy(first + full, b)
    return True

  def _copy(self, source: int, b: int) -> None:
    """Notes that page `source` of the prompts' cache is to be copied to a new page of slot b."""
    target = self._take_page(b) + self._shard(b) * self.shapes.count
    self.copies.append((source, target))

  def _prompt_sources(self, source_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source and target page of every copy; a target beyond the last page copies nothing."""
    shapes = self.shapes
    # The program has one shape, so the lists are as long as the most copies there can be.
    size = len(source_B) + shapes.prompts * shapes.shards * shapes.width // self.page
    from_M, to_M = np.zeros(size, np.int32), np.full(size, shapes.count * shapes.shards, np.int32)
    for m, (source, target) in enumerate(self.copies):
      from_M[m], to_M[m] = source, target
    self.copies = []
    return from_M, to_M

  def _release(self, b: int) -> None:
    """Frees slot b and the pages that no other row uses."""
    super()._release(b)
    shard = self._shard(b)
    for page in self.pages[b]:
      self.users[shard][page] -= 1
      if not self.users[shard][page]:
        del self.users[shard][page]
        self.free[shard].append(page)
    self.pages[b] = []
    # A prompt can be shared only while all its pages hold its tokens.
    self.prompts = {(s, i): pages for (s, i), pages in self.prompts.items()
                    if s != shard or all(page in self.users[s] for page in pages)}

  def _fit(self) -> None:
    """Gives rows the pages for the tokens of the next dispatch, and sends the tables of pages.

    The rows with the most tokens come first and those with the fewest are put back: they lose the
    least work.
    """
    T = self.sampler.sampling.max_tokens
    by_age = sorted((b for b, row in enumerate(self.owners) if row is not None),
                    key=lambda b: (-self._response_tokens(b), b))
    for b in by_age:
      if self.owners[b] is None:  # put back for an older row
        continue
      response = min(self._response_tokens(b) + self.programs.room.tokens, T)
      wanted = len(self.owners[b].prompt.tokens) + response
      while len(self.pages[b]) * self.page < wanted and self.owners[b] is not None:
        if self.free[self._shard(b)]:
          self._take_page(b)
        else:
          self._requeue(next(x for x in reversed(by_age) if self.owners[x] is not None
                                and self._shard(x) == self._shard(b)))
    table_Bn = np.zeros(self.shape.table_Bn.shape, np.int32)
    for b, pages in enumerate(self.pages):
      table_Bn[b, : len(pages)] = pages
    room_B = np.array([len(pages) * self.page for pages in self.pages], np.int32)
    self.slots = self.slots._replace(cache=self.slots.cache._replace(
        table_Bn=self._placed(table_Bn, self.shape.table_Bn),
        room_B=self._placed(room_B, self.shape.room_B)))

  def _placed(self, x: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The array on the devices, laid out as `like`."""
    return jax.device_put(x) if self.sampler.mesh is None else sharding.put(x, like.sharding)

  def _response_tokens(self, b: int) -> int:
    """Tokens sampled so far for the row in slot b."""
    return int(self.out.response_length_B[self.owners[b].place])

  def _requeue(self, b: int) -> None:
    """Puts the row of slot b at the head of the queue, and clears its sampled tokens."""
    row, out = self.owners[b], self.out
    self.counts["tokens"] -= self._response_tokens(b)
    self.counts["waited_again"] = self.counts.get("waited_again", 0) + 1
    for x in (out.response_BT, out.response_length_B, out.sampler_logp_BT, out.behaviour_logp_BT):
      x[row.place] = 0
    self.rows.appendleft(row)
    self.waiting[row.prompt.id] += 1
    self._release(b)
