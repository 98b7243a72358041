r"""Check of a mathematical answer in the last \boxed{}: a string match, then math-verify if asked.

`reward` brings both answers to one spelling (`tex`) and compares them. `verified` asks math-verify
about the answers that differ, in processes with limits (`pool`). Neither evaluates a model's text
in this process.
"""

import fractions
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from concurrent.futures import Future

from s2d_jax.rewards import answers, boxes, choices, pool, tex

SECONDS = 60.0       # of one check by the clock, for a process that waits instead of working
CPU_SECONDS = 5.0    # of one check
MEMORY_BYTES = 4 << 30
# Short enough that math-verify compares all digits.
_RATIONAL = re.compile(r"(-?[0-9]{1,20})(?:/([0-9]{1,20}))?")


def last_boxed(text: str) -> str | None:
  r"""The text inside the last \boxed or \fbox, or None where there is none or it is cut."""
  return boxes.last(text)


def normalised(answer: str, ordered: bool = False) -> str:
  """One spelling for answers that mean the same; normalising it again changes nothing.

  " \\dfrac12 " and "0.5" are "1/2", and "1,000" is "1000". An answer without a value is "".

  Args:
    ordered: whether the order of a list without brackets counts.
  """
  return tex.read(answer).normalised(ordered)


def reward(problem: Mapping[str, str], text: str, ordered: bool = False) -> float:
  r"""1.0 where the last \boxed{} of the text matches the answer after normalisation, else 0.0.

  Several boxes that together are the answer count as a list. An answer of which normalisation
  leaves nothing matches nothing.

  Args:
    ordered: whether the order of a list without brackets counts.
  """
  found = reading(text)
  return float(found is not None and matches(problem["answer"], found, ordered))


def answer(text: str, ordered: bool = False) -> str | None:
  r"""The last boxed answer of a text in one spelling, or None where there is none."""
  found = reading(text)
  return normalised(found, ordered) or None if found else None


def reward_in_order(problem: Mapping[str, str], text: str) -> float:
  """As `reward`, and the order of a list counts."""
  return reward(problem, text, ordered=True)


def answer_in_order(text: str) -> str | None:
  """As `answer`, and the order of a list counts."""
  return answer(text, ordered=True)


# Raised with every change of a verdict. A stage's name holds its reward's `version`, which
# `identity.identity_of` reads, so that another checker trains the stage anew.
VERSION = 9
for _function in (reward, answer, reward_in_order, answer_in_order):
  _function.version = VERSION


def reading(text: str) -> str | None:
  """The answer of the last boxes of a text, or None without a box."""
  found = dict.fromkeys(boxes.joined(text))
  return "; ".join(found) if found else None


def matches(gold: str, boxed: str, ordered: bool = False) -> bool:
  """Whether two answers have one spelling, and no names or units that differ."""
  first = _gold(gold)
  if not first.parts:
    return False
  if gold == boxed or choices.letter(boxed) == first.spelled:
    return True
  return any(answers.equal(*tex.as_lists(first, found, ordered)) for found in tex.readings(boxed))


@functools.lru_cache(maxsize=1 << 15)
def _gold(answer: str) -> answers.Answer:
  """As `tex.read`; a problem's answer is compared with many."""
  return tex.read(answer)


def verified(problem: Mapping[str, str], text: str, ordered: bool = False) -> float:
  """1.0 where `reward` or math-verify finds the last box equal to the answer, else 0.0.

  math-verify runs in a process with limits: an answer that exceeds them gets 0.0, with a warning.
  """
  found = submit(problem, text, ordered)
  return found if isinstance(found, float) else found.result()


def submit(problem: Mapping[str, str], text: str, ordered: bool = False) -> float | Future[float]:
  """As `verified`, but returns before math-verify has decided: the reward, or a future of it."""
  found = reading(text)
  decided = reward(problem, text, ordered)
  # An answer that the string match accepts is right, and one without a value is wrong.
  if (decided or found is None or not _gold(problem["answer"]).parts
      or not any(x.parts for x in tex.readings(found))):
    return decided
  if _are_other_numbers(problem["answer"], found):
    return 0.0
  return checkers().submit({"answer": problem["answer"], "ordered": ordered}, found)


def _are_other_numbers(gold: str, boxed: str) -> bool:
  """Whether two answers are numbers that differ, which math-verify need not be asked."""
  value = _number(_gold(gold))
  if value is None:
    return False
  # "1,000" may also be a list, and then it is not one number.
  return not any(len(found.parts) == 1 and _number(found) in (None, value)
                 for found in tex.readings(boxed))


def _number(answer: answers.Answer) -> fractions.Fraction | None:
  """The value of an answer that is a whole number or a fraction of two, else None."""
  # Percent and degrees have a second reading.
  if len(answer.parts) != 1 or answer.parts[0].unit in ("percent", "degree"):
    return None
  found = _RATIONAL.fullmatch(answer.parts[0].value)
  if not found or int(found[2] or 1) == 0:
    return None
  return fractions.Fraction(int(found[1]), int(found[2] or 1))


def verified_in_order(problem: Mapping[str, str], text: str) -> float:
  """As `verified`, and the order of a list counts."""
  return verified(problem, text, ordered=True)


INSTALLED = importlib.util.find_spec("math_verify") is not None
# Another release of math-verify may decide otherwise.
_RELEASE = importlib.metadata.version("math-verify") if INSTALLED else "none"
verified.submit = submit
verified_in_order.submit = functools.partial(submit, ordered=True)
for _function in (verified, verified_in_order):
  _function.version = f"{VERSION} with math-verify {_RELEASE}"


@functools.cache
def checkers() -> pool.Pool:
  """The processes that run math-verify, started by the first answer that needs one."""
  return pool.Pool("s2d_jax.rewards.verify:check", SECONDS, CPU_SECONDS, MEMORY_BYTES)
