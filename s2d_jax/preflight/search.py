"""Which mesh, microbatches and recomputation fit a config on some chips, and at which price.

`preflight --search` compiles each candidate as `--fast` does, and takes the one with the least time
of those that fit. Candidates that their resident memory alone excludes are not compiled.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from s2d_jax.preflight import verdicts
from s2d_jax.preflight.costs import Cost

REMAT = ("block", "dots")  # recompute whole blocks, or everything but products


class Candidate(NamedTuple):
  """One choice of a search; the choices' results differ by rounding alone."""
  mesh: tuple[int, int, int]
  divisor: int  # a stage's microbatches are divided by it: fewer and larger ones
  remat: str

  def apply(self, config: ConfigDict) -> ConfigDict:
    """A copy of a config with this candidate's mesh, microbatches and remat."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
      changed.mesh = self.mesh
      changed.remat = self.remat
      for hp in changed.stages.values():
        hp.microbatches = max(hp.microbatches // self.divisor, 1)
    return changed

  def __str__(self) -> str:
    return f"mesh {self.mesh}, microbatches / {self.divisor}, remat {self.remat}"


def meshes(count: int, key_heads: int, rows: int) -> Iterator[tuple[int, int, int]]:
  """Meshes of `count` devices of which each has heads and rows of its own.

  Args:
    key_heads: of a model; `tensor` divides them.
    rows: of a microbatch; data x fsdp divides them.
  """
  for tensor in range(1, count + 1):
    if count % tensor or key_heads % tensor or rows % (count // tensor):
      continue
    shards = count // tensor
    # Weights that are split over all devices need the least memory, so these come first.
    for data in range(1, shards + 1):
      if shards % data == 0:
        yield data, shards // data, tensor


def candidates(config: ConfigDict, count: int, key_heads: int) -> Iterator[Candidate]:
  """Every Candidate of a config on `count` devices, the largest microbatches last."""
  rows = [_update_rows(hp) for hp in config.stages.values() if hp.steps]
  fewest = min(hp.microbatches for hp in config.stages.values() if hp.steps)
  for divisor in (2**i for i in range(fewest.bit_length())):
    smallest = min(size * divisor for size in rows)
    for mesh in meshes(count, key_heads, smallest):
      for remat in REMAT:
        yield Candidate(mesh, divisor, remat)


def _update_rows(hp: ConfigDict) -> int:
  """Rows of one microbatch of a stage's update."""
  samples = hp.prompts * hp.sampling.samples_per_prompt
  return samples // (hp.minibatches * hp.microbatches)


def hours(config: ConfigDict, found: Sequence[Cost]) -> float:
  """The least hours of a config's stages, every answer being of max_tokens."""
  steps = {name: hp.steps for name, hp in config.stages.items()}
  return sum(steps.get(cost.stage, 0) * cost.runs * cost.least.seconds
             for cost in found if cost.least is not None) / 3600


def cheapest(config: ConfigDict, tried: Sequence[Candidate], limit: int,
             costs_of: Callable[[ConfigDict], Sequence[Cost]],
             resident_of: Callable[[ConfigDict], int],
             report: Callable[[str], None]) -> tuple[Candidate, float] | None:
  """(the Candidate of the least hours that fits, its hours), or None where none fits.

  Args:
    limit: bytes of a device's memory.
    costs_of: compiles a config; a ValueError says that not one row fits.
    resident_of: bytes on each device that the largest update of a config has at least.
    report: gets a line for each candidate.
  """
  best = None
  # Larger microbatches need more memory, so a mesh that failed is not tried with them.
  too_large: set[tuple[tuple[int, int, int], str]] = set()
  for candidate in tried:
    key = candidate.mesh, candidate.remat
    if key in too_large:
      continue
    changed = candidate.apply(config)
    held = resident_of(changed)
    if held > limit:
      too_large.add(key)
      report(f"{candidate}: does not fit: weights, optimizer and gradients alone need "
             f"{verdicts.gb(held)} of {verdicts.gb(limit)}")
      continue
    try:
      found = costs_of(changed)
    # The config itself was checked before, so a candidate's mesh or memory is refused.
    except ValueError as error:
      too_large.add(key)
      report(f"{candidate}: does not fit: {error}")
      continue
    if not verdicts.fits(found, limit):
      too_large.add(key)
      report(f"{candidate}: {verdicts.verdict(found, limit)}")
      continue
    needed = hours(changed, found)
    report(f"{candidate}: {verdicts.verdict(found, limit)}, at least {needed:,.1f} hours")
    if best is None or needed < best[1]:
      best = candidate, needed
  return best


def price_sentence(count: int, needed: float, price: float | None) -> str:
  """The chip-hours of a run, and their price where one is given per chip and hour."""
  sentence = f"{count} chips x {needed:,.1f} hours at least"
  if price is None:
    return sentence
  return f"{sentence} x {price:g} = {count * needed * price:,.0f}"


def check_price(text: str | None) -> float | None:
  """The price per chip and hour of a flag's text.

  Raises:
    ValueError: it is not a number above 0.
  """
  if text is None:
    return None
  try:
    price = float(text)
  except ValueError:
    price = math.nan
  if not 0 < price < math.inf:
    raise ValueError(f"--price is {text!r}: give what one chip costs an hour, such as 2.5.")
  return price
