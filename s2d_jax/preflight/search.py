"""Which mesh, microbatches, recomputation and placement fit a config, and at which price.

`preflight --search` compiles each candidate as `--fast` does, and takes the one with the least time
of those that fit. Candidates that their resident memory alone excludes are not compiled. Only where
nothing else fits do arrays wait in the host's memory (`config.offload`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from s2d_jax import placement
from s2d_jax.errors import InputError
from s2d_jax.preflight import verdicts
from s2d_jax.preflight.costs import Cost
from s2d_jax.preflight.runs import Total

REMAT = ("block", "named")  # recompute whole blocks, or what is cheap
# Values of config.offload by the number of parts that wait: each moves bytes in every step.
_PLACEMENTS = (("",), ("optimizer", "guide"), ("optimizer,guide",))
# Programs that read one microbatch at a time.
_IN_MICROBATCHES = ("token_logps", "update", "gradients")


class Candidate(NamedTuple):
  """One choice of a search; the choices' results differ by rounding alone."""
  mesh: tuple[int, int, int]
  factor: float  # of every stage's microbatches; a larger one means fewer rows in each
  remat: str
  offload: str = ""

  def apply(self, config: ConfigDict) -> ConfigDict:
    """A copy of a config with this candidate's mesh, microbatches, remat and placement."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
      changed.mesh = self.mesh
      changed.remat = self.remat
      if self.offload:
        changed.offload = self.offload
      for hp in changed.stages.values():
        hp.microbatches = self.microbatches(hp)
    return changed

  def microbatches(self, hp: ConfigDict) -> int:
    """The number nearest below `factor` times a stage's that splits its rows evenly, at least 1.

    Each shard of the mesh has a row of each microbatch, unless an update has fewer rows.
    """
    rows = max(_update_rows(hp) // (self.mesh[0] * self.mesh[1]), 1)  # of a shard
    count = min(max(int(hp.microbatches * self.factor), 1), rows)
    while rows % count:
      count -= 1
    return count

  def flags(self, config: ConfigDict) -> str:
    """The flags that make a config this candidate."""
    mesh = ", ".join(map(str, self.mesh))
    stages = [f"--config.stages.{name}.microbatches={self.microbatches(hp)}"
              for name, hp in config.stages.items() if hp.steps]
    offload = [f"--config.offload={self.offload}"] if self.offload else []
    return " ".join([f'--config.mesh="({mesh})"', f"--config.remat={self.remat}", *offload,
                     *stages])

  def __str__(self) -> str:
    offload = f", offload {self.offload}" if self.offload else ""
    return f"mesh {self.mesh}, microbatches x {self.factor:g}, remat {self.remat}{offload}"


def meshes(count: int, key_heads: int, rows: int) -> Iterator[tuple[int, int, int]]:
  """Meshes of `count` devices of which each has heads and rows of its own.

  Args:
    key_heads: of a model; `tensor` divides them.
    rows: of an update; data x fsdp divides them.
  """
  for tensor in range(1, count + 1):
    if count % tensor or key_heads % tensor or rows % (count // tensor):
      continue
    shards = count // tensor
    # Rows before heads: decoding adds features up twice a layer where heads are split, and of
    # equally fast candidates the first is taken. Weights over all devices need the least memory.
    for data in range(1, shards + 1):
      if shards % data == 0:
        yield data, shards // data, tensor


def placements(config: ConfigDict) -> Iterator[tuple[str, ...]]:
  """Values of `Candidate.offload` in the order in which they are tried, the config's first.

  Each further group has one part that the one before has not; the config's own parts all wait.
  """
  waiting = placement.parts(config.get("offload", ""))
  for group in _PLACEMENTS:
    fitting = tuple(value for value in group if placement.parts(value) >= waiting)
    if fitting:
      yield fitting


def candidates(config: ConfigDict, count: int, key_heads: int,
               offload: str = "") -> Iterator[Candidate]:
  """Every Candidate of a config on `count` devices, with one placement.

  First the config's microbatches, then fewer and larger ones, and at last more and smaller ones,
  down to one row of each shard.
  """
  stages = [hp for hp in config.stages.values() if hp.steps]
  fewest = min(hp.microbatches for hp in stages)
  rows = [_update_rows(hp) for hp in stages]
  factors = [2.0**-i for i in range(fewest.bit_length())]
  factors += [2.0**i for i in range(1, max(rows).bit_length())]
  found = set()
  for factor in factors:
    for mesh in meshes(count, key_heads, math.gcd(*rows)):
      for remat in REMAT:
        candidate = Candidate(mesh, factor, remat, offload)
        # Stages that have one row a shard already stay as they are.
        key = mesh, remat, tuple(candidate.microbatches(hp) for hp in stages)
        if key not in found:
          found.add(key)
          yield candidate


def _update_rows(hp: ConfigDict) -> int:
  """Rows of one update of a stage."""
  return hp.prompts * hp.sampling.samples_per_prompt // hp.minibatches


def cheapest(config: ConfigDict, tried: Sequence[Candidate], limit: int,
             costs_of: Callable[[ConfigDict], Sequence[Cost]],
             resident_of: Callable[[ConfigDict], int],
             hours_of: Callable[[Sequence[Cost]], float],
             report: Callable[[str], None]) -> tuple[Candidate, Sequence[Cost]] | None:
  """(the Candidate of the least hours that fits, its costs), or None where none fits.

  Args:
    limit: bytes of a device's memory.
    costs_of: compiles a config; an InputError says that not one row fits.
    resident_of: bytes on each device that the largest update of a config has at least.
    hours_of: of the whole run, by the costs of its programs.
    report: gets a line for each candidate.
  """
  best = None
  least = math.inf
  # By all but the factor. Larger microbatches need more memory, so where some failed no larger ones
  # are tried. Smaller ones take more time, so where some fit no smaller ones are.
  failed: dict[Candidate, float] = {}
  fitting: dict[Candidate, float] = {}
  for candidate in tried:
    key = candidate._replace(factor=1.0)
    if not failed.get(key, 0.0) < candidate.factor <= fitting.get(key, math.inf):
      continue
    changed = candidate.apply(config)
    held = resident_of(changed)
    if held > limit:
      failed[key] = math.inf
      report(f"{candidate}: does not fit: weights, optimizer and gradients alone need "
             f"{verdicts.gb(held)} of {verdicts.gb(limit)}")
      continue
    try:
      found = costs_of(changed)
    # The config itself was checked before, so a candidate's mesh or memory is refused, whatever its
    # microbatches.
    except InputError as error:
      failed[key] = math.inf
      report(f"{candidate}: does not fit: {error}")
      continue
    if not verdicts.fits(found, limit):
      others = [cost for cost in found if cost.program not in _IN_MICROBATCHES]
      failed[key] = candidate.factor if verdicts.fits(others, limit) else math.inf
      report(f"{candidate}: {verdicts.verdict(found, limit)}")
      continue
    fitting[key] = candidate.factor
    needed = hours_of(found)
    report(f"{candidate}: {verdicts.verdict(found, limit)}, at least {needed:,.1f} hours")
    if needed < least:
      best = candidate, found
      least = needed
  return best


def price_sentence(count: int, found: Total, price: float | None) -> str:
  """The chip-hours of a config's runs, their cost at a price per chip-hour, and what is counted."""
  chips = "1 chip" if count == 1 else f"{count} chips"
  sentence = f"{chips} x {_rounded(found.hours, 1)} hours at least"
  if price is not None:
    sentence = f"{sentence} x {price:g} = {_rounded(count * found.hours * price, 0)}"
  return f"{sentence}: {found}"


def _rounded(number: float, decimals: int) -> str:
  """A number with some decimals, or with two digits where those would be too few."""
  return f"{number:,.{decimals}f}" if number >= 10 else f"{number:.2g}"


def check_price(text: str | None) -> float | None:
  """The price per chip and hour of a flag's text.

  Raises:
    InputError: it is not a number above 0.
  """
  if text is None:
    return None
  try:
    price = float(text)
  except ValueError:
    price = math.nan
  if not 0 < price < math.inf:
    raise InputError(f"--price is {text!r}: give what one chip costs an hour, such as 2.5.")
  return price
