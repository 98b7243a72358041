"""The devices' memory for the rows in slots: a whole row of the cache for each, or pages.

A schedule has one of the two classes. Both decide from the tokens alone, so all hosts decide alike.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from s2d_jax.models import caches
from s2d_jax.rollouts import Prompt
from s2d_jax.sampler import decode
from s2d_jax.sampler.programs import Programs


class Length(NamedTuple):
  """Tokens of a row in a slot."""
  prompt: int
  response: int  # so far


class SlotMemory:
  """The arrays of the slots, whose cache is changed one layer at a time."""
  programs: Programs
  slots: decode.Slots

  def change_layers(self, change: Callable[[int, caches.Layer], caches.Layer]) -> None:
    """Puts change(index, layer) in the place of each layer of the cache."""
    layers = list(caches.layers(self.slots.cache))
    cache = caches.with_layers(self.slots.cache, ())
    # A layer is freed as soon as no name refers to it, so that no second cache is held.
    self.slots = self.slots._replace(cache=None)
    for i in range(len(layers)):
      layers[i] = change(i, layers[i])
    self.slots = self.slots._replace(cache=caches.with_layers(cache, layers))

  def change_rows(self, program: Callable[..., decode.Slots], *rows: np.ndarray) -> None:
    """Replaces the rows' token, position, count and key by a program's result; the cache stays."""
    cache = self.slots.cache
    changed = program(self.slots._replace(cache=None), *map(self.programs.put, rows))
    self.slots = changed._replace(cache=cache)


class CacheRows(SlotMemory):
  """A cache with a row for each slot, whose batch and length follow the rows that are sampled.

  Attributes:
    slots: the device's arrays (`decode.Slots`).
    batch, length: slots, and tokens that the cache has for each.
  """

  def __init__(self, programs: Programs) -> None:
    self.programs = programs
    self.slots = programs.empty()
    self.batch = programs.shapes.batches[0]
    self.length = programs.shapes.lengths[0]

  def reserve(self, slot: int, prompt: Prompt, source: int) -> bool:
    """True if a slot has memory for a new row; here each slot has memory of its own.

    Args:
      source: the prompt's row in the cache of prompts that `admit` will copy from.
    """
    del slot, prompt, source
    return True

  def release(self, slot: int) -> None:
    """Frees the memory of a slot whose row has ended."""

  def sources(self, source_B: np.ndarray, new_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of `admit` that say which part of the prompts' cache is copied where.

    Args:
      source_B: each slot's row in the cache of prompts.
      new_B: whether the slot has a new row.
    """
    return source_B, new_B

  def fit(self, rows: Mapping[int, Length], waiting: bool) -> tuple[list[int], list[int]]:
    """Fits the cache to the tokens of the next dispatch.

    The batch shrinks when no row waits, and the length follows the longest row.

    Args:
      rows: the rows alive, by slot, in the order of the slots.
      waiting: whether rows wait for a slot.

    Returns:
      (order, requeued): the former slots in their new order, and the slots of rows that lost their
      memory and must be sampled again.
    """
    order = list(range(self.batch))
    if not waiting:
      order = self._shrink(list(rows))
    self._resize(max(row.prompt + row.response for row in rows.values()), waiting)
    return order, []

  def _shrink(self, alive: list[int]) -> list[int]:
    """Takes the smallest batch that holds the rows alive; returns the slots that stay, in order."""
    order = list(range(self.batch))
    for size in self.programs.shapes.batches:
      if size >= self.batch or len(alive) > size:
        continue
      # Free slots fill up the smaller batch, which has a fixed size.
      free = [slot for slot in range(self.batch) if slot not in alive]
      staying = (alive + free)[:size]
      self._resize_layers(self.programs.shrink[self.batch, self.length],
                          self.programs.put(np.array(staying, np.int32)))
      self.change_rows(self.programs.shrink_rows[self.batch], np.array(staying, np.int32))
      order = [order[slot] for slot in staying]
      self.batch = size
      alive = list(range(len(alive)))
    return order

  def _resize(self, longest: int, waiting: bool) -> None:
    """Grows the cache to hold `longest` tokens, or shortens it where that is enough."""
    lengths = self.programs.shapes.lengths
    while longest > self.length:
      self._resize_layers(self.programs.grow[self.batch, self.length])
      self.length = lengths[lengths.index(self.length) + 1]
    # Shorter again only with a dispatch's tokens to spare, or the cache would grow at once. The
    # program exists for the largest batch alone, which is the batch while rows wait.
    longest += self.programs.config.tokens
    while waiting and self.length > lengths[0]:
      shorter = lengths[lengths.index(self.length) - 1]
      if longest > shorter:
        break
      self._resize_layers(self.programs.shorten[self.length])
      self.length = shorter

  def _resize_layers(self, program: Callable[..., caches.KV], *rows: jax.Array) -> None:
    """Puts program(layer, *rows) in the place of each layer of the cache."""
    # Waits for each layer: otherwise the host would ask for the next one's memory before a device
    # has freed the last one's.
    self.change_layers(lambda i, layer: jax.block_until_ready(program(layer, *rows)))


class CachePages(SlotMemory):
  """A cache in pages: a row owns the pages it fills and shares those of its prompt.

  With no free page, the row of that device with the fewest sampled tokens is put back in the queue
  and later re-sampled, with the same tokens. Attributes are those of `CacheRows`; the batch and the
  length never change.
  """

  def __init__(self, programs: Programs, max_tokens: int) -> None:
    shapes = programs.shapes
    self.programs = programs
    self.max_tokens = max_tokens
    self.slots = programs.empty()
    self.batch = shapes.batches[0]
    self.length = shapes.lengths[0]
    self.page = programs.config.page
    # Page 0 has no owner: the tables of free slots point to it, and what they write goes there.
    self.free = [list(range(shapes.pages - 1, 0, -1)) for _ in range(shapes.shards)]
    # How many rows use each page: a prompt's page is free only when its last sample has ended.
    self.users = [collections.Counter() for _ in range(shapes.shards)]
    self.pages: list[list[int]] = [[] for _ in range(self.batch)]  # of each slot, in order
    self.occupied: set[int] = set()  # slots
    # (device, prompt id) -> the pages that the prompt's samples share there
    self.prompts: dict[tuple[int, int], list[int]] = {}
    # (page in the cache of prompts, page counted over all devices), for the next `admit`
    self.copies: list[tuple[int, int]] = []

  def reserve(self, slot: int, prompt: Prompt, source: int) -> bool:
    """Takes pages for a row's prompt, or returns False if too few are free.

    Samples share the full pages of a prompt. A page that is filled in part is copied for each,
    because the row will write to it. Arguments as `CacheRows.reserve`.
    """
    shard = self._shard(slot)
    # The prompt's last token is read by decoding, which writes it to the cache itself.
    full, partial = divmod(len(prompt.tokens) - 1, self.page)
    shared = self.prompts.get((shard, prompt.id))
    need = 1 if shared is not None else full + 1
    others = sum(self._shard(other) == shard for other in self.occupied)
    # One page for each row of the device stays free, so that a new row does not at once push
    # others out.
    if len(self.free[shard]) < need + others:
      return False
    self.occupied.add(slot)
    first = source * (self.programs.shapes.window // self.page)
    if shared is None:
      for i in range(full):
        self._copy(first + i, slot)
      self.prompts[shard, prompt.id] = list(self.pages[slot])
    else:
      self.pages[slot] += shared
      self.users[shard].update(shared)
    if partial:
      self._copy(first + full, slot)
    return True

  def release(self, slot: int) -> None:
    """Frees a slot and the pages that no other row uses."""
    shard = self._shard(slot)
    self.occupied.discard(slot)
    for page in self.pages[slot]:
      self.users[shard][page] -= 1
      if not self.users[shard][page]:
        del self.users[shard][page]
        self.free[shard].append(page)
    self.pages[slot] = []
    # A prompt can be shared only while all its pages hold its tokens.
    self.prompts = {(s, i): pages for (s, i), pages in self.prompts.items()
                    if s != shard or all(page in self.users[s] for page in pages)}

  def sources(self, source_B: np.ndarray, new_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source and target page of every copy that is due, which are then forgotten.

    A target beyond the last page copies nothing.
    """
    del new_B
    shapes = self.programs.shapes
    # The program has one shape, so the lists are as long as the most copies there can be.
    size = len(source_B) + shapes.prompts * shapes.shards * shapes.window // self.page
    from_M = np.zeros(size, np.int32)
    to_M = np.full(size, shapes.pages * shapes.shards, np.int32)
    for m, (source, target) in enumerate(self.copies):
      from_M[m] = source
      to_M[m] = target
    self.copies = []
    return from_M, to_M

  def fit(self, rows: Mapping[int, Length], waiting: bool) -> tuple[list[int], list[int]]:
    """Gives rows the pages for the tokens of the next dispatch, and sends the tables of pages.

    The rows with the most tokens come first and those with the fewest are put back: they lose the
    least work. Arguments and result as `CacheRows.fit`.
    """
    del waiting
    requeued: list[int] = []
    longest_first = sorted(rows, key=lambda slot: (-rows[slot].response, slot))
    for slot in longest_first:
      response = min(rows[slot].response + self.programs.config.tokens, self.max_tokens)
      need = rows[slot].prompt + response
      while slot in self.occupied and len(self.pages[slot]) * self.page < need:
        if self.free[self._shard(slot)]:
          self._take_page(slot)
        else:
          shortest = self._last_of_device(longest_first, self._shard(slot))
          self.release(shortest)
          requeued.append(shortest)
    self._send_tables()
    return list(range(self.batch)), requeued

  def _last_of_device(self, slots: Iterable[int], shard: int) -> int:
    """The last of the slots that has a row and is on the device `shard`."""
    return [slot for slot in slots if slot in self.occupied and self._shard(slot) == shard][-1]

  def _send_tables(self) -> None:
    """Puts each slot's list of pages, and the tokens that they hold, on the devices."""
    like = self.programs.slots[self.batch, self.length].cache
    table_Bn = np.zeros(like.table_Bn.shape, np.int32)
    for slot, pages in enumerate(self.pages):
      table_Bn[slot, : len(pages)] = pages
    capacity_B = np.array([len(pages) * self.page for pages in self.pages], np.int32)
    self.slots = self.slots._replace(cache=self.slots.cache._replace(
        table_Bn=self.programs.put(table_Bn, like.table_Bn.sharding),
        capacity_B=self.programs.put(capacity_B, like.capacity_B.sharding)))

  def _shard(self, slot: int) -> int:
    """The device of a slot, counted over `data` and `fsdp`."""
    return slot // (self.batch // self.programs.shapes.shards)

  def _take_page(self, slot: int) -> int:
    """Gives a slot a free page of its device."""
    shard = self._shard(slot)
    page = self.free[shard].pop()
    self.users[shard][page] += 1
    self.pages[slot].append(page)
    return page

  def _copy(self, source: int, slot: int) -> None:
    """Notes that page `source` of the prompts' cache is to be copied to a new page of a slot."""
    target = self._take_page(slot) + self._shard(slot) * self.programs.shapes.pages
    self.copies.append((source, target))
