"""The sets that `s2d-jax eval` scores: their problems, checked before a model is loaded."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from s2d_jax import doctor, tasks
from s2d_jax.errors import InputError
from s2d_jax.planning import Task

_MOST = 10  # ids in an error message


class ProblemSet(NamedTuple):
  """The problems of a set by id, and the file that they are from, where that is known."""
  problems: dict[int, dict]
  origin: Mapping[str, Any] | None


def read_sets(args: argparse.Namespace) -> tuple[Task, dict[str, ProblemSet]]:
  """The task, and each set of --sets by its name.

  Raises:
    InputError: a name is empty or is written twice, or the task refuses a set.
  """
  # A space after a comma is not part of a name.
  paths = {name.strip(): path.strip()
           for name, _, path in (word.partition("=") for word in args.sets.split(","))}
  names = list(paths)
  if "" in names or len(names) <= args.sets.count(","):
    raise InputError(f"--sets is {args.sets!r}: write names with one comma between them, each "
                     "once.")
  # The name is part of the name of the file of samples.
  if any("/" in name for name in names):
    raise InputError(f"--sets is {args.sets!r}: write a name before the path, as mine=a/b.jsonl.")
  paths = {name: path for name, path in paths.items() if path}
  if paths and args.task != "math":
    raise InputError(f"--sets is {args.sets!r}: leave the paths out, which the task {args.task} "
                     "does not read.")
  task = _task(args, names, paths)
  sets = {}
  for name in names:
    source = task.source(name)
    sets[name] = ProblemSet(_by_id(name, source), getattr(source, "origin", None))
  _check_answers(task, sets)
  return task, sets


def _task(args: argparse.Namespace, names: Sequence[str], paths: Mapping[str, str]) -> Task:
  """The task of the flags for these sets, of which some have a path; InputErrors name flags."""
  data = tasks.DATA[args.task](args.data or tasks.FOLDERS[args.task], names)
  chosen = {key: value for key, value in
            (("checker", args.checker), ("list_order", args.list_order)) if value is not None}
  try:
    return tasks.TASKS[args.task](ConfigDict({"data": data | paths, **chosen}))
  except InputError as error:
    # A config has these as keys, and this command as flags.
    said = str(error).replace("config.checker", "--checker")
    raise InputError(said.replace("config.list_order", "--list-order")) from error


def _by_id(name: str, source: Sequence[dict]) -> dict[int, dict]:
  """The problems of a set by id; raises InputError where two have one id."""
  found = {}
  again = []
  for problem in (source[i] for i in range(len(source))):
    if problem["id"] in found:
      again.append(problem["id"])
    found[problem["id"]] = problem
  if again:
    raise InputError(f"the set {name} has {_listed(again)} for two problems or more: make every id "
                     "distinct, or leave the ids out.")
  return found


def _listed(ids: Sequence[int]) -> str:
  """Ids for an error message: "the ids 3, 5" or "the id 3"."""
  distinct = list(dict.fromkeys(ids))
  words = ", ".join(map(str, distinct[:_MOST]))
  omitted = f" and {len(distinct) - _MOST:,} others" if len(distinct) > _MOST else ""
  return f"the id{'s' if len(distinct) > 1 else ''} {words}{omitted}"


def _check_answers(task: Task, sets: Mapping[str, ProblemSet]) -> None:
  """Refuses a set with an answer that no response can match: all its samples would be wrong."""
  if task.respond is None:
    return
  for name, one in sets.items():
    wrong = doctor.unmatched(task.reward, task.respond, {name: one.problems.values()})
    if wrong:
      raise InputError(f"no response matches the answer of {_listed([i for _, i in wrong])} of the "
                       f"set {name} ({len(wrong):,} in all): write the answer alone, as in 5 or "
                       "\\frac{1}{2}, without box, mark or working, or take the problems out.")


def origin_line(facts: Mapping[str, Any]) -> str:
  """The number of problems of a set, and whether they are the published set of that name.

  Args:
    facts: "set" of the settings of a score.
  """
  origin = facts.get("origin") or {}
  if "set" not in origin:
    return f"{facts['count']:4}"
  if origin["is_published"]:
    return f"{facts['count']:4} of the published set"
  return (f"{facts['count']:4} of {origin['file']}, which is not the published file of "
          f"{origin['set']} ({origin['published_rows']:,} rows)")
