r"""Check of a mathematical answer by math_verify, which parses and simplifies with sympy.

That may take unbounded time and memory on what a model writes, so only `worker` processes import
this module. `rewards.math.verified` starts one.
"""

from collections.abc import Mapping

import math_verify

from s2d_jax.rewards import math


def check(problem: Mapping[str, str], text: str) -> float:
  r"""1.0 where math_verify finds the last \boxed{} equal to the answer, else 0.0."""
  boxed = math.last_boxed(text)
  if boxed is None:
    return 0.0
  # math_verify's own time limits set alarms, which only the main thread may. The worker's limits
  # hold without them.
  gold, answer = (
    math_verify.parse(f"\\boxed{{{x}}}", parsing_timeout=None) for x in (problem["answer"], boxed)
  )
  return float(math_verify.verify(gold, answer, timeout_seconds=None))
