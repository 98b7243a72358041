"""The needs of one compiled program: memory on a device, and the least time on a chip.

Memory is the compiler's own account. A least time is a bound from the chip's rates: a kernel takes
at least its FLOPs, its bytes or one launch, and messages may overlap with everything else.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import jax

from s2d_jax.chips import Chip
from s2d_jax.preflight import hlo
from s2d_jax.preflight.hlo import Kernel


class Account(NamedTuple):
  """The memory of a program on each device, in bytes."""
  arguments: int
  temporaries: int
  output: int  # beyond what reuses the arguments' memory
  code: int

  @property
  def total(self) -> int:
    """All of it."""
    return sum(self)


class Least(NamedTuple):
  """The least time of a program, by what bounds each kernel, in seconds."""
  products: float
  memory: float
  launches: float
  network: float

  @property
  def seconds(self) -> float:
    """The whole: messages overlap with kernels, and kernels follow each other."""
    return max(self.network, self.products + self.memory + self.launches)

  @property
  def bound(self) -> str:
    """The name of the largest part."""
    return max(self._fields, key=lambda name: getattr(self, name))


class Cost(NamedTuple):
  """One program of a config."""
  stage: str
  program: str
  account: Account | None  # None: the compiler found that it does not fit
  resident: int            # bytes beside it that the stage holds meanwhile
  runs: float              # in one step of the stage; 0: only its memory is counted
  kernels: Kernel          # their sum in one run
  least: Least | None      # of one run; None without a chip
  problem: str = ""        # the number that the compiler refused
  tokens: float = 0.0      # of one run, over the number of devices; 0: not counted

  @property
  def bytes(self) -> int:
    """The memory of a device while the program runs."""
    return self.resident + (self.account.total if self.account else 0)

  @property
  def sent_per_token(self) -> float | None:
    """Bytes that all devices together send for one token; None where no tokens are counted."""
    # A device's bytes over a device's tokens: both sums have one factor, the number of devices.
    return self.kernels.collective_bytes / self.tokens if self.tokens else None


class Read(NamedTuple):
  """All that is read of a compiled program."""
  account: Account
  text: str


class DoesNotFit(NamedTuple):
  """In place of a Read: the compiler's sentence with the numbers."""
  problem: str


class Moved(NamedTuple):
  """In place of a program: bytes that a step moves between each device and its host's memory."""
  bytes: int


def compile_or_refuse(lowered: jax.stages.Lowered) -> Read | DoesNotFit:
  """A program compiled and read, or the sentence of a compiler that refused it for its memory.

  Raises:
    jax.errors.JaxRuntimeError: compilation failed for another reason.
  """
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    # A TPU's memory is known to its compiler, which refuses what exceeds it.
    found = re.search(r"Used \S+ of \S+ hbm\. Exceeded hbm capacity by [\w.]+", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) and found is None:
      raise
    return DoesNotFit(found[0] if found else str(error).splitlines()[0])
  # The executable itself is dropped here, because dozens of them would fill the host's memory.
  return Read(account(compiled), compiled.as_text())


def account(compiled: jax.stages.Compiled) -> Account:
  """The Account of a program."""
  memory = compiled.memory_analysis()
  # Donated arguments hold a part of the output, which must not be counted twice.
  return Account(memory.argument_size_in_bytes, memory.temp_size_in_bytes,
                 memory.output_size_in_bytes - memory.alias_size_in_bytes,
                 memory.generated_code_size_in_bytes)


def least(kernels: Iterable[Kernel], chip: Chip) -> Least:
  """The Least of a program's kernels at the rates of a chip."""
  found = {"products": 0.0, "memory": 0.0, "launches": 0.0}
  sent = 0.0
  for kernel in kernels:
    bounds = {"products": kernel.flops / chip.flops, "memory": kernel.bytes / chip.bandwidth,
              "launches": chip.launch * kernel.count}
    bound = max(bounds, key=lambda name: bounds[name])
    found[bound] += bounds[bound]
    sent += kernel.collective_bytes
  return Least(**found, network=sent / chip.network)


def cost(stage: str, program: str, compiled: Read | DoesNotFit | Moved, resident: int, runs: float,
         trips: int, chip: Chip | None, tokens: float = 0.0) -> Cost:
  """The Cost of a compiled program, or of moves, whose bytes count as sent.

  Args:
    resident: bytes that the stage holds beside it.
    runs: of the program in one step of the stage.
    trips: of loops whose trips the compiler does not know.
    tokens: that one run reads or samples, over the number of devices.
  """
  if isinstance(compiled, DoesNotFit):
    return Cost(stage, program, None, resident, runs, hlo.total(()), None, compiled.problem,
                tokens)
  if isinstance(compiled, Moved):
    rate = chip and chip.host
    return Cost(stage, program, Account(0, 0, 0, 0), resident, runs,
                hlo.total(())._replace(collective_bytes=compiled.bytes),
                rate and Least(0.0, 0.0, 0.0, network=compiled.bytes / rate))
  kernels = hlo.kernels(compiled.text, trips)
  return Cost(stage, program, compiled.account, resident, runs, hlo.total(kernels),
              chip and least(kernels, chip), tokens=tokens)
