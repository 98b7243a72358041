"""Hints: prompts that a guide reads in place of the learner's, such as a problem with its solution.

The learner samples from the problem alone. The guide scores the same responses behind the hint, so
it knows more than the learner. Where the guide is the learner's own start, this is on-policy
self-distillation with privileged information (https://arxiv.org/abs/2605.11182).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from ml_collections import ConfigDict

from s2d_jax import keys
from s2d_jax.chat import Chat
from s2d_jax.errors import InputError, from_user_code
from s2d_jax.models import hf
from s2d_jax.rollouts import Prompt

# The width of the guide's prompt window. Absent: the guide reads the learner's own prompts.
KEYS = {"hint_tokens": keys.at_least(1, neutral=0, optional=True)}


class Task(Protocol):
  """The field of a `planning.Task` that is read; planning imports this file."""
  hint: Callable[[dict], list[dict]] | None


def used(hp: ConfigDict) -> bool:
  """Whether a stage's guide reads hints. They hold solutions or answers, so they spend labels."""
  return "hint_tokens" in hp


def width(hp: ConfigDict, max_tokens: int) -> int:
  """Tokens of a guide's row in a batch, with responses of at most `max_tokens`; 0 without hints."""
  # The last token of a sequence is a target only, as in `rollouts.batch`.
  return hp.hint_tokens + max_tokens - 1 if used(hp) else 0


def check(hp: ConfigDict, guided: bool) -> None:
  """Raises InputError, which begins with the key's name, where no guide can read the hints."""
  if used(hp) and not guided:
    raise InputError("hint_tokens is set and this stage has no guide, which alone reads hints: "
                     "leave it out.")


def check_windows(config: ConfigDict) -> None:
  """Raises InputError where a hint and a response may exceed a model's positions."""
  for name, hp in config.stages.items():
    if not used(hp):
      continue
    tokens = hp.hint_tokens + hp.sampling.max_tokens
    # The guide is one of the two, or a further folder, which `guides.check_models` compares.
    positions = min(hf.read_config(config[role]).max_positions for role in ("teacher", "student"))
    if tokens > positions:
      raise InputError(f"config.stages.{name}.hint_tokens + sampling.max_tokens is {tokens} and "
                       f"the guide has {positions} positions (max_position_embeddings): lower "
                       f"one; hint_tokens may be {positions - hp.sampling.max_tokens} here.")


def rendered(path: str, hp: ConfigDict, task: Task, prompts: Iterable[Prompt],
             problems: Mapping[int, dict], chat: Chat) -> dict[int, tuple[int, ...]] | None:
  """{problem id: the token ids of its hint}, checked; None for a stage without hints.

  Args:
    path: names the stage's config; prompts: of the stage's split; problems: by id.

  Raises:
    InputError: the task has no hints, a problem lacks a text that its hint needs, or a hint is
      longer than its window.
  """
  if not used(hp):
    return None
  if task.hint is None:
    raise InputError(f"{path}.hint_tokens is set and the task has no hints: leave it out, or give "
                     "the Task a function `hint`.")
  found = {}
  for prompt in prompts:
    # Without the texts that are None, so that a hint fails on those in the way of a missing key.
    problem = {key: x for key, x in problems[prompt.id].items() if x is not None}
    with from_user_code(f"the task's hint of problem {prompt.id}"):
      try:
        messages = task.hint(problem)
      except KeyError as error:
        raise InputError(f"problem {prompt.id} has no {error.args[0]} and the hints of {path} need "
                         "it: add one, or leave hint_tokens out.") from error
    ids = tuple(chat.render(messages, f"the hint of problem {prompt.id}"))
    if len(ids) > hp.hint_tokens:
      raise InputError(f"the hint of problem {prompt.id} takes {len(ids)} tokens and {path}."
                       f"hint_tokens is {hp.hint_tokens}: raise it.")
    found[prompt.id] = ids
  return found
