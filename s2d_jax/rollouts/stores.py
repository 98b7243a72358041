"""Rollouts of frozen actors on disk, shared by the stages that learn from them."""

from s2d_jax.rollouts.records import concatenate, from_bytes, take, to_bytes


class Store:
  """A frozen actor's rollouts on disk, keyed by (prompt id, sample index); parts are never changed.

  Stages that share an actor, its prompts' rendering, the sampling and the seed share the folder, so
  a response is sampled once however many stages learn from it.
  """

  def __init__(self, folder, write):
    """Opens `folder` (an epath.Path); `write(path, bytes)` must write whole files or none."""
    self._folder, self._write, self._where, self._parts = folder, write, {}, {}
    if folder.exists():
      for path in sorted(p for p in folder.iterdir() if p.suffix == ".npz"):
        self._index(path.stem, from_bytes(path.read_bytes()))

  def _index(self, name, part):
    self._parts[name] = part
    keys = zip(part.prompt_id_B.tolist(), part.sample_index_B.tolist(), strict=True)
    for row, key in enumerate(keys):
      self._where.setdefault(key, (name, row))

  def missing(self, prompts, samples):
    """The prompts that lack one of the `samples` (indices)."""
    return [p for p in prompts if any((p.id, int(g)) not in self._where for g in samples)]

  def add(self, name, part, leader):
    """Keeps a rollout under `name`, which says who sampled it; the leading process writes it.

    Rows that are here already are left out: each belongs to the part that had it first.

    Raises:
      ValueError: a part of that name is here, and other rows would take its place.
    """
    keys = zip(part.prompt_id_B.tolist(), part.sample_index_B.tolist(), strict=True)
    new = [row for row, key in enumerate(keys) if key not in self._where]
    if not new:
      return
    if name in self._parts:
      raise ValueError(f"{self._folder} already holds {name}, and {len(new)} other rows were to "
                       "take its place: give them a name of their own.")
    part = take(part, new)
    if leader:
      self._write(self._folder / f"{name}.npz", to_bytes(part))
    self._index(name, part)

  def get(self, prompts, samples):
    """The rows of every (prompt, sample), a prompt's samples side by side, and each row's part."""
    rows = [self._where[p.id, int(g)] for p in prompts for g in samples]
    whole = concatenate([take(self._parts[name], slice(row, row + 1)) for name, row in rows])
    return whole, [name for name, _ in rows]
