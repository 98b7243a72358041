"""Where the rollouts of a step come from: the learner, a frozen actor, or given solutions.

Each class has the one method of `RolloutSource`, and a class method that makes it for a stage. A
new kind of source is one such class and its entry in SOURCES, which a stage's `actor` names. The
entry says all that planning, the doctor and the walk ask of a source.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from s2d_jax import checksums, files, hosts
from s2d_jax.errors import InputError
from s2d_jax.rollouts import records
from s2d_jax.rollouts.records import Prompt, Rollout, SamplerStats
from s2d_jax.sharding import Params

OnFinish = Callable[[int, Rollout], None]  # (index of a row, the rollout, in which it is complete)
Sample = Callable[..., tuple[Rollout, SamplerStats]]  # a `sampler.Sampler`, by its call
# How a stage spends labels: those of every prompt in every step, those of each prompt once, none.
LabelUse = Literal["each_step", "once", "none"]


class RolloutSource(Protocol):
  """Answers to a step's prompts."""

  def sample(self, params: Params, prompts: Sequence[Prompt], step: int, round: int = 0,
             on_finish: OnFinish | None = None,
             ) -> tuple[Rollout, np.ndarray, SamplerStats | None]:
    """A rollout of the prompts.

    Args:
      params: the learner's weights at the start of the step.
      prompts: the prompts of one round of the step.
      on_finish: called for each row when it is complete, while others are still decoded; a source
        that does not decode, or not for this step alone, does not call it.

    Returns:
      (rollout, fresh_B, stats): a prompt's samples side by side, in the order of the prompts;
      fresh_B is True where a row was sampled for this step; stats are None where nothing was
      sampled. A rollout that no model sampled has no log-probabilities of a sampler.
    """


class StageInputs(NamedTuple):
  """All of a stage that a source may be made from."""
  name: str                     # the stage's name in the recipe, which seeds its samples
  folder: str                   # the name of its folder, which marks what it adds to a store
  seed: int                     # of the run
  hp: ConfigDict                # the stage's config
  prompt_tokens: int
  epoch: Callable[[int, Prompt], int]  # (step, prompt) -> how often it was drawn before the step
  problem: Callable[[int], Mapping]          # problem id -> the problem
  encode: Callable[[str], Sequence[int]]     # a response's text -> token ids, the end included
  on_policy: bool               # whether the learner is the model that samples
  sampler: Sample | None        # compiled for the model that samples; None where none does
  params: Params | None         # of the model that samples; of the learner only the shapes
  open_store: Callable[[], "Store"]          # the store of that model's rollouts


class Source(NamedTuple):
  """One entry of SOURCES: a kind of source, and what a stage with it needs."""
  make: Callable[[StageInputs], RolloutSource]
  model: str | None                      # "teacher" or "student": it samples; None: no model does
  label_use: LabelUse = "none"           # rewards and pass rates aside
  samples_per_prompt: int | None = None  # the one number that fits; None: as the config says
  texts: tuple[str, ...] = ()            # keys of a problem whose texts are learned from
  probed: bool = True                    # whether the learner is probed before and after the stage


class OnPolicy(NamedTuple):
  """The learner's own samples, drawn anew in every step."""
  sampler: Sample
  seed: tuple[int, ...]
  updates_per_step: int

  def sample(self, params: Params, prompts: Sequence[Prompt], step: int, round: int = 0,
             on_finish: OnFinish | None = None,
             ) -> tuple[Rollout, np.ndarray, SamplerStats | None]:
    """As `RolloutSource.sample`; every row is fresh."""
    rollout, stats = self.sampler(params, prompts, (*self.seed, step, round),
                                  weight_version=step * self.updates_per_step,
                                  on_finish=on_finish)
    # Each step has other weights, so nothing is read from a store.
    return rollout, np.ones(len(rollout.prompt_id_B), bool), stats

  @classmethod
  def for_stage(cls, stage: StageInputs) -> "OnPolicy":
    """The source of a stage whose learner samples; the stage's name is in its seed."""
    return cls(stage.sampler, (stage.seed, zlib.crc32(stage.name.encode())),
               stage.hp.epochs * stage.hp.minibatches)


class Store:
  """A frozen actor's rollouts, keyed by (prompt id, sample index). Stored parts never change.

  Stages that share an actor, its prompts' rendering, the sampling and the seed share the folder, so
  a response is sampled once however many stages learn from it.
  """

  def __init__(self, folder: epath.Path):
    """Opens `folder`, which need not exist yet.

    Raises:
      InputError: a part is damaged; names it, with the remedy.
      WriteError: a part cannot be read, so nothing is known of it.
    """
    self._folder = folder
    # (prompt id, sample index) -> (part, row of the part)
    self._location: dict[tuple[int, int], tuple[str, int]] = {}
    self._parts: dict[str, Rollout] = {}
    # Sorted, so that every host and every start index the parts in one order.
    for path in [path for path in checksums.entries(folder) if path.suffix == ".npz"]:
      # A disk that fails says nothing of the part, so the error of reading it is another one.
      data = checksums.read(path)
      try:
        part = records.from_bytes(data)
      # The archive has a checksum of every array.
      except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, TypeError,
              ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, and its responses are sampled "
                         "again.") from error
      self._index(path.stem, part)

  def _index(self, name: str, part: Rollout) -> None:
    self._parts[name] = part
    for row, key in enumerate(records.keys_of(part)):
      # The part that had a row first keeps it, as in `add`.
      self._location.setdefault(key, (name, row))

  def __len__(self) -> int:
    """The number of rows."""
    return len(self._location)

  def rows(self) -> Rollout | None:
    """Every row once, in the order of the parts; None where the store is empty."""
    rows_of: dict[str, list[int]] = {}
    for name, row in self._location.values():
      rows_of.setdefault(name, []).append(row)
    if not rows_of:
      return None
    return records.concatenate([records.take(self._parts[name], rows)
                                for name, rows in rows_of.items()])

  def missing(self, prompts: Iterable[Prompt], samples: Sequence[int]) -> list[Prompt]:
    """The prompts that lack one of the sample indices."""
    return [p for p in prompts if any((p.id, int(g)) not in self._location for g in samples)]

  def add(self, name: str, part: Rollout) -> None:
    """Keeps a rollout as the part `name`, which says who sampled it.

    Rows that the store holds already are left out: each belongs to the part that had it first.
    One process writes, and every process indexes.

    Raises:
      InputError: the store has a part of that name, and the rollout brings further rows.
    """
    new = [row for row, key in enumerate(records.keys_of(part)) if key not in self._location]
    if not new:
      return
    if name in self._parts:
      raise InputError(f"{self._folder} already holds {name}, and {len(new)} other rows would "
                       "replace it: give them a name of their own.")
    # A row belongs to the part that had it first, since that stage was charged for it.
    part = records.take(part, new)
    if hosts.leader():
      files.write(self._folder / f"{name}.npz", records.to_bytes(part))
    self._index(name, part)

  def gather(self, name: str, whole: Rollout) -> None:
    """Puts one part in the place of all others: `whole` has every row of the store.

    The store's bytes then do not depend on the parts in which the rows came.
    """
    others = [other for other in self._parts if other != name]
    if hosts.leader():
      # Written first: a run that is killed here finds the rows twice and takes one of each.
      files.write(self._folder / f"{name}.npz", records.to_bytes(whole))
      for other in others:
        (self._folder / f"{other}.npz").unlink()
    self._location.clear()
    self._parts.clear()
    self._index(name, whole)

  def get(self, prompts: Iterable[Prompt],
          samples: Sequence[int]) -> tuple[Rollout, list[str]]:
    """The rows of every (prompt, sample), a prompt's samples side by side, and each row's part."""
    locations = [self._location[p.id, int(g)] for p in prompts for g in samples]
    rows = [records.take(self._parts[name], slice(row, row + 1)) for name, row in locations]
    return records.concatenate(rows), [name for name, _ in locations]


class FrozenActor(NamedTuple):
  """A frozen model's samples, each drawn once and kept in a store that other stages share."""
  sampler: Sample
  params: Params
  store: Store
  seed: tuple[int, ...]
  stage: str                    # the stage's folder name: it marks what this stage adds
  samples_per_prompt: int
  epoch: Callable[[int, Prompt], int]  # (step, prompt) -> its draws before; each has new samples

  def sample(self, params: Params, prompts: Sequence[Prompt], step: int, round: int = 0,
             on_finish: OnFinish | None = None,
             ) -> tuple[Rollout, np.ndarray, SamplerStats | None]:
    """As `RolloutSource.sample`; rows that the store holds already are not fresh."""
    del params, on_finish
    part = f"{self.stage}-{step:08d}-{round}"
    G = self.samples_per_prompt
    epoch_P = [self.epoch(step, prompt) for prompt in prompts]
    sampled = []
    # The prompts of a step need not have been drawn equally often.
    for epoch in sorted(set(epoch_P)):
      # Epoch e has samples e·G to e·G + G − 1, so a second draw learns from new responses.
      first = epoch * G
      same_epoch = [p for p, e in zip(prompts, epoch_P, strict=True) if e == epoch]
      # Whole prompts are sampled again where one sample is missing; the store keeps only new rows.
      missing = self.store.missing(same_epoch, range(first, first + G))
      if missing:
        sampled.append(self.sampler(self.params, missing, self.seed, first_sample=first))
    stats = records.add_stats([stats for _, stats in sampled])
    if sampled:
      self.store.add(part, records.concatenate([rollout for rollout, _ in sampled]))
    rows = [self.store.get([p], range(e * G, e * G + G))
            for p, e in zip(prompts, epoch_P, strict=True)]
    rollout = records.concatenate([one for one, _ in rows])
    parts = [name for _, names in rows for name in names]
    # By the part's name, not by what was missing: a step that a kill interrupted after the store
    # was written is charged for the same rows when it is done again.
    return rollout, np.array([name == part for name in parts]), stats

  @classmethod
  def for_stage(cls, stage: StageInputs) -> "FrozenActor":
    """The source of a stage that a frozen model samples for."""
    # The seed names no stage, because stages share the store.
    return cls(stage.sampler, stage.params, stage.open_store(), (stage.seed,), stage.folder,
               stage.hp.sampling.samples_per_prompt, stage.epoch)


class GivenSolutions(NamedTuple):
  """Solutions that come with the problems: nothing is sampled."""
  solution: Callable[[int], Sequence[int]]  # problem id -> token ids, the end token included
  prompt_tokens: int
  max_tokens: int

  def sample(self, params: Params, prompts: Sequence[Prompt], step: int, round: int = 0,
             on_finish: OnFinish | None = None,
             ) -> tuple[Rollout, np.ndarray, SamplerStats | None]:
    """As `RolloutSource.sample`, one row a prompt; no row is fresh."""
    del params, step, round, on_finish
    solutions = [self.solution(prompt.id) for prompt in prompts]
    rollout = records.given_solutions(prompts, solutions, self.prompt_tokens, self.max_tokens)
    return rollout, np.zeros(len(prompts), bool), None

  @classmethod
  def for_stage(cls, stage: StageInputs) -> "GivenSolutions":
    """The source of a stage that learns from the solutions of its problems."""
    def solution(prompt_id: int) -> Sequence[int]:
      return stage.encode(stage.problem(prompt_id)["solution"])
    return cls(solution, stage.prompt_tokens, stage.hp.sampling.max_tokens)


def of_model(stage: StageInputs) -> OnPolicy | FrozenActor:
  """The samples of a model: the learner itself, or a frozen one."""
  return OnPolicy.for_stage(stage) if stage.on_policy else FrozenActor.for_stage(stage)


# By the name that a stage has as its `actor`.
SOURCES: dict[str, Source] = {
    "teacher": Source(of_model, "teacher"),
    "student": Source(of_model, "student"),
    "given": Source(GivenSolutions.for_stage, None, label_use="each_step", samples_per_prompt=1,
                    texts=("solution",), probed=False)}
