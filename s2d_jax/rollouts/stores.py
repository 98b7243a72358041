"""Rollouts of frozen actors on disk, shared by the stages that learn from them."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath

from s2d_jax.rollouts.records import Prompt, Rollout, concatenate, from_bytes, take, to_bytes


class Store:
  """A frozen actor's rollouts, keyed by (prompt id, sample index). Stored parts never change.

  Stages that share an actor, its prompts' rendering, the sampling and the seed share the folder, so
  a response is sampled once however many stages learn from it.
  """

  def __init__(self, folder: epath.Path, write: Callable[[epath.Path, bytes], None]):
    """Opens `folder`; `write(path, data)` must write a whole file or nothing."""
    self._folder = folder
    self._write = write
    # (prompt id, sample index) -> (part, row of the part)
    self._location: dict[tuple[int, int], tuple[str, int]] = {}
    self._parts: dict[str, Rollout] = {}
    if folder.exists():
      # Sorted, so that every host and every start index the parts in one order.
      for path in sorted(p for p in folder.iterdir() if p.suffix == ".npz"):
        self._index(path.stem, from_bytes(path.read_bytes()))

  def _index(self, name: str, part: Rollout) -> None:
    self._parts[name] = part
    for row, key in enumerate(_keys(part)):
      # The part that had a row first keeps it, as in `add`.
      self._location.setdefault(key, (name, row))

  def missing(self, prompts: Iterable[Prompt], samples: Sequence[int]) -> list[Prompt]:
    """The prompts that lack one of the sample indices."""
    return [p for p in prompts if any((p.id, int(g)) not in self._location for g in samples)]

  def add(self, name: str, part: Rollout, leader: bool) -> None:
    """Keeps a rollout as the part `name`, which says who sampled it.

    Rows that the store holds already are left out: each belongs to the part that had it first.

    Args:
      leader: whether this process writes; every process indexes.

    Raises:
      ValueError: the store has a part of that name, and the rollout brings further rows.
    """
    new = [row for row, key in enumerate(_keys(part)) if key not in self._location]
    if not new:
      return
    if name in self._parts:
      raise ValueError(f"{self._folder} already holds {name}, and {len(new)} other rows would "
                       "replace it: give them a name of their own.")
    # A row belongs to the part that had it first, since that stage was charged for it.
    part = take(part, new)
    if leader:
      self._write(self._folder / f"{name}.npz", to_bytes(part))
    self._index(name, part)

  def get(self, prompts: Iterable[Prompt],
          samples: Sequence[int]) -> tuple[Rollout, list[str]]:
    """The rows of every (prompt, sample), a prompt's samples side by side, and each row's part."""
    locations = [self._location[p.id, int(g)] for p in prompts for g in samples]
    rows = [take(self._parts[name], slice(row, row + 1)) for name, row in locations]
    return concatenate(rows), [name for name, _ in locations]


def _keys(part: Rollout) -> list[tuple[int, int]]:
  """(prompt id, sample index) of each row."""
  ids = np.asarray(part.prompt_id_B).tolist()
  return list(zip(ids, np.asarray(part.sample_index_B).tolist(), strict=True))
