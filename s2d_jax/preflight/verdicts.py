"""The lines that preflight prints: programs, whether each stage fits, and its least time."""

from collections.abc import Iterable, Sequence

from s2d_jax import chips
from s2d_jax.chips import Chip
from s2d_jax.preflight.costs import Cost

HEADER = "\n".join((
    "arguments to with resident: bytes on each device. GFLOP of products, GB moved in memory, "
    "kernels, GB sent, least ms: of one run of the program, or one dispatch of decoding. "
    "sent B/token: bytes that all devices send for one token",
    f"{'stage':<16} {'program':<28} {'arguments':>16} {'temporaries':>16} {'output':>16}"
    f" {'code':>13} {'with resident':>16} {'GFLOP':>14} {'GB':>11} {'kernels':>11} {'sent GB':>10}"
    f" {'sent B/token':>14} {'least ms':>13} bound"))

FAST = ("--fast compiled no evaluation, no probe, and of each sampler only decoding and the reading"
        " of prompts: others may need more memory.")


def line(cost: Cost) -> str:
  """One program in a line of the table."""
  # The program's column has blanks to spare for a longer first one: "reverse_kl validation".
  named = f"{f'{cost.stage:<16} {cost.program}':<45}"
  if cost.account is None:
    return f"{named} does not fit: {cost.problem}"
  account = cost.account
  memory = (f" {account.arguments:>16,} {account.temporaries:>16,} {account.output:>16,}"
            f" {account.code:>13,} {cost.bytes:>16,}")
  kernels = cost.kernels
  counts = (f" {kernels.flops / 1e9:>14,.1f} {kernels.bytes / 1e9:>11,.2f} {kernels.count:>11,}"
            f" {kernels.collective_bytes / 1e9:>10,.3f}"
            + (f" {'-':>14}" if cost.sent_per_token is None else f" {cost.sent_per_token:>14,.0f}"))
  if cost.least is None:
    return named + memory + counts
  return f"{named}{memory}{counts} {cost.least.seconds * 1e3:>13,.2f} {cost.least.bound}"


def fits(found: Iterable[Cost], limit: int | None) -> bool:
  """Whether every program fits a device of `limit` bytes; an unknown limit holds everything."""
  return all(cost.account is not None and (limit is None or cost.bytes <= limit)
             for cost in found)


def summary(runs: Sequence[Sequence[Cost]], limit: int | None) -> str:
  """A verdict and the least time of a step for each stage, and a verdict of the whole.

  Args:
    runs: the costs of each run, of which a sweep has several.
  """
  found = [cost for costs in runs for cost in costs]
  lines = [""]
  for stage in dict.fromkeys(cost.stage for cost in found):
    of_runs = [[cost for cost in costs if cost.stage == stage] for costs in runs]
    every = [cost for costs in of_runs for cost in costs]
    lines.append(f"{stage}: {verdict(every, limit)}{_step(of_runs)}")
  unknown = sorted(frozenset().union(*(cost.kernels.unknown for cost in found)))
  if unknown:
    lines.append(f"not counted, because no formula has their products: {', '.join(unknown)}. "
                 "The least times above leave these kernels' FLOPs out.")
  return "\n".join([*lines, f"the whole: {verdict(found, limit)}"])


def memory(chip: Chip) -> str:
  """Says how much memory a device has for programs."""
  if chip.usable == chip.memory:
    return f"a device has {gb(chip.memory)}"
  return (f"a device has {gb(chip.memory)}, of which JAX takes {chips.GPU_SHARE:.0%}: "
          f"{gb(chip.usable)}")


def verdict(found: Sequence[Cost], limit: int | None) -> str:
  """Says whether programs fit, with the largest or the one that does not."""
  refused = [cost for cost in found if cost.account is None]
  if refused:
    return f"does not fit: {refused[0].stage} {refused[0].program}: {refused[0].problem}"
  largest = max(found, key=lambda cost: cost.bytes)
  name = f"{largest.stage} {largest.program}"
  if limit is None:
    return f"needs {gb(largest.bytes)} ({name})"
  if largest.bytes <= limit:
    return f"fits: {gb(largest.bytes)} of {gb(limit)} ({name})"
  account = largest.account
  return (f"does not fit: {name} needs {gb(largest.bytes)} of {gb(limit)}: arguments "
          f"{gb(account.arguments)}, temporaries {gb(account.temporaries)}, output "
          f"{gb(account.output)}, code {gb(account.code)}, "
          f"resident beside it {gb(largest.resident)}")


def gb(size: float) -> str:
  """Bytes as text in units of 10**9."""
  return f"{size / 1e9:,.2f} GB"


def _step(runs: Sequence[Sequence[Cost]]) -> str:
  """The least time of a stage's step by program, in the run whose step takes longest.

  Args:
    runs: the stage's costs in each run.
  """
  # Without the programs that the compiler refused the sum would be too short.
  if any(cost.account is None for costs in runs for cost in costs):
    return ""
  seconds = [sum(cost.runs * cost.least.seconds for cost in costs if cost.least is not None)
             for costs in runs]
  longest = max(range(len(runs)), key=lambda k: seconds[k])
  parts = [f"{cost.program} {cost.runs * cost.least.seconds:,.1f} ({cost.least.bound})"
           for cost in runs[longest] if cost.least is not None and cost.runs]
  # The rates of this machine's own devices are not known.
  if not parts:
    return ""
  return f"; a step takes at least {seconds[longest]:,.1f} s: {', '.join(parts)}"
