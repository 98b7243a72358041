"""The problems of a run: every split read, checked and rendered, and the halves of the labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from s2d_jax import doctor, manifest
from s2d_jax.chat import Chat
from s2d_jax.data import leave_out
from s2d_jax.data import prompts as data_prompts
from s2d_jax.errors import InputError, from_user_code
from s2d_jax.rollouts import Prompt


class Task(Protocol):
  """The fields of a `planning.Task` that are read; planning imports this file."""
  source: Callable[[str], Sequence[dict]]
  messages: Callable[[dict], list[dict]]
  reward: Callable[[dict, str], float]
  respond: Callable[[str], str] | None


def load(config: ConfigDict, task: Task, tokenizer: Chat,
         ) -> tuple[dict[str, list[Prompt]], dict[int, dict], dict[str, dict[str, Any]]]:
  """Reads, checks and renders the labelled split and every split that is scored.

  Returns:
    (prompts by split, problems by id, `Plan.sets`).
  """
  names = ("labelled", config.probe.split, *(hp.split for hp in config.evals.values()))
  # Two blocks may name one split, which is read once.
  sources = {split: task.source(split) for split in dict.fromkeys(names)}
  every = {split: [source[i] for i in range(len(source))] for split, source in sources.items()}
  splits = leave_out.remaining(every, config.data)
  shared = doctor.check_splits(config, splits)
  if task.respond is not None:
    doctor.check_answers(task.reward, task.respond, splits, config.data.get("leave_out", ""))
  # The texts are checked before they are rendered: a split that is empty, or shares a problem, has
  # a remedy of its own.
  prompts = {split: [prompt_of(task, tokenizer, split, problem) for problem in problems]
             for split, problems in splits.items()}
  doctor.check_prompts(config, prompts)
  by_id = {problem["id"]: problem for problems in splits.values() for problem in problems}
  return prompts, by_id, _sets(sources, splits, shared)


def prompt_of(task: Task, tokenizer: Chat, split: str, problem: dict) -> Prompt:
  """The rendered prompt of a problem."""
  name = f"problem {problem['id']} of {split}"
  with from_user_code(f"the task's messages of {name}"):
    messages = task.messages(problem)
  return Prompt(problem["id"], tuple(tokenizer.render(messages, name)))


def _sets(sources: Mapping[str, Sequence[dict]], splits: Mapping[str, list[dict]],
          shared: Mapping[str, list[dict]]) -> dict[str, dict[str, Any]]:
  """`Plan.sets` of the sources, their problems, and those that are labelled too."""
  content = {split: [[int(row["id"]), row["problem"], row["answer"], row.get("solution")]
                     for row in problems] for split, problems in splits.items()}
  return {split: {"problems": len(problems), "sha256": manifest.digest(content[split]),
                  "among_labelled": len(shared.get(split, ())),
                  "left_out": len(sources[split]) - len(problems),
                  # A task of your own may have a plain list.
                  "origin": getattr(sources[split], "origin", None)}
          for split, problems in splits.items()}


def halves(labelled: list[Prompt], seed: int) -> dict[str, list[Prompt]]:
  """{"all", "1h", "2h"}: the labelled prompts and their halves by a seeded hash of the id."""
  first = data_prompts.half(np.array([p.id for p in labelled]), seed)
  split = {"all": labelled, "1h": [p for p, f in zip(labelled, first, strict=True) if f],
           "2h": [p for p, f in zip(labelled, first, strict=True) if not f]}
  for name, prompts in split.items():
    if not prompts:
      raise InputError(f"the split {name} has no problems: label more of them.")
  return split
