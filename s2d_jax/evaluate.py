"""`s2d-jax eval`: scores one model on sets of checked problems, without a recipe.

With --out every sample is a line of a file beside the scores, in the format of `s2d-jax sample`.
The command started again reads those lines and samples the missing ones.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from s2d_jax import (
  chat,
  command,
  evals,
  files,
  intervals,
  json_objects,
  keys,
  manifest,
  models,
  program_cache,
  rollouts,
  sampler,
  sharding,
  splits,
  tasks,
)
from s2d_jax.errors import InputError
from s2d_jax.models import hf
from s2d_jax.planning import Task
from s2d_jax.problem_sets import ProblemSet, origin_line, read_sets
from s2d_jax.rollouts import Prompt, Reward, Rollout
from s2d_jax.sampler import Sampling
from s2d_jax.sampler import __main__ as sample

EXAMPLE = "s2d-jax eval --model FOLDER --sets math500,aime24,aime25 --k 16 --out scores.json"
DRAWS = 1000  # of the bootstrap behind an interval
LEVEL = 0.95
THINKING = "enable_thinking"  # the argument of Qwen3's template
MOST_TRUNCATED = 0.5  # above this share of samples that --max-tokens cut, warn
LEAST_ANSWERED = 0.1  # below this share of samples with an answer, warn
# The recipe's own salt, so that equal weights have equal samples in a run and here.
SALT = zlib.crc32(b"evaluation")


def main(argv: Sequence[str]) -> None:
  """Prints a line per set and statistic: the estimate and its 95 % interval; --out stores them.

  Raises:
    InputError: the model, a set or a number is refused, in one sentence.
  """
  parser = command.Parser("eval", "Scores a model on sets of checked problems.", EXAMPLE)
  # A group has no heading, so that the help fits a screen of 24 lines.
  flags = parser.add_argument_group()
  flags.add_argument("--model", required=True, metavar="FOLDER", help="a Hugging Face folder")
  flags.add_argument("--task", default="math", choices=tuple(tasks.TASKS), metavar="TASK",
                     help=f"prompts and answer check: {', '.join(tasks.TASKS)}")
  flags.add_argument("--sets", required=True,
                     help="names of sets, or of task math NAME=PATH, with commas between")
  flags.add_argument("--data", metavar="FOLDER",
                     help="has SET.jsonl; by default {math}, for arithmetic {arithmetic}".format(
                         **tasks.FOLDERS))
  flags.add_argument("--out", metavar="FILE.json",
                     help="stores scores, with samples beside it; continued if there")
  flags.add_argument("--k", type=int, default=1, help="samples of each problem")
  flags.add_argument("--batch", type=int, default=64, help="problems sampled at a time")
  flags.add_argument("--checker", choices=("string", "verify"), metavar="NAME",
                     help="of boxes: verify or string; --list-order fixed: lists are ordered")
  # Its help stands in the line above, because the screen has no other.
  flags.add_argument("--list-order", choices=("any", "fixed"), help=argparse.SUPPRESS)
  sample.add_flags(flags)
  args = parser.parse_args(argv)
  sample.check_flags(args, "--k")
  keys.check_value("--batch", args.batch, keys.at_least(1))
  if args.temperature == 0 and args.k > 1:
    raise InputError(f"--k is {args.k} and --temperature 0 gives the same answer {args.k} times: "
                     "set --k 1, or a temperature above 0.")
  task, sets = read_sets(args)
  results = {}
  if args.out is not None:
    command.check_output(args.out)
    results = read_results(pathlib.Path(args.out))
  with jax.set_mesh(sharding.make_mesh()), program_cache.opened(args.compilation_cache):
    for name, result in evaluations(args, task, sets, results):
      print_result(name, result, args.max_tokens)
      results = results | {name: result}
      # Written after each set: an error in a later one loses none.
      if args.out:
        files.write_json(args.out, {"flags": vars(args), "sets": results})


def print_result(name: str, result: Mapping[str, Any], max_tokens: int) -> None:
  """Prints the lines of a set: its problems, each score, and what makes the scores doubtful."""
  print(f"{name:<16}{'problems':<16}{origin_line(result['settings']['set'])}", flush=True)
  for score, (value, low, high) in result["scores"].items():
    print(f"{name:<16}{score:<16}{value:8.3f} [{low:.3f}, {high:.3f}]", flush=True)
  for count in ("check_timeouts", "check_failures"):
    if result.get(count):
      print(f"{name:<16}{count:<16}{result[count]:4}: answers that count as wrong, because "
            "their check was ended", flush=True)
  cut = result["scores"].get("truncated", [0.0])[0]
  if cut > MOST_TRUNCATED:
    print(f"{name:<16}{'warning':<16}{100 * cut:.0f} % of the samples were cut at --max-tokens "
          f"{max_tokens} and most of them count as wrong: raise --max-tokens.", flush=True)
  answered = result["scores"].get("format", [1.0])[0]
  if answered < LEAST_ANSWERED:
    print(f"{name:<16}{'warning':<16}{100 * (1 - answered):.0f} % of the samples have no answer "
          "that can be read, such as one in \\boxed{}, and count as wrong: look at the samples.",
          flush=True)


def read_results(path: pathlib.Path) -> dict[str, Any]:
  """{set: its result} of a file of scores; {} where there is none.

  Raises:
    InputError: the file is not one of scores.
  """
  if not path.exists():
    return {}
  remedy = "choose another --out, or remove it"
  results = json_objects.read(path, remedy).get("sets")
  if not isinstance(results, dict) or not all(map(_is_result, results.values())):
    raise InputError(f"{path} is not a file of scores of this command: {remedy}.")
  return results


def _is_result(found: Any) -> bool:
  """Whether a value of JSON is the result of a set, as this command stores it."""
  return (isinstance(found, dict) and isinstance(found.get("settings"), dict)
          and isinstance(found.get("scores"), dict)
          and all(map(_is_interval, found["scores"].values())))


def _is_interval(found: Any) -> bool:
  """Whether a value of JSON is an estimate and the ends of its interval."""
  return (isinstance(found, list) and len(found) == 3
          and all(isinstance(x, int | float) and not isinstance(x, bool) for x in found))


def evaluations(args: argparse.Namespace, task: Task, sets: Mapping[str, ProblemSet],
                results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (name, result) of each set: its scores, the samples behind them, their settings.

  Args:
    results: of earlier calls, by set. A set that has its result there is not sampled again.

  Raises:
    InputError: a set cannot be scored, or its scores would be unlike those of `results`.
  """
  config, tokenizer = sampler.read_folder(args.model, sample.template(args.template),
                                          {"dtype": args.dtype})
  sampling = sample.sampling_of(args, args.k, tokenizer)
  _warn_of_thinking(sets, tokenizer)
  prompts = {name: rendered(task, name, one, tokenizer) for name, one in sets.items()}
  settings = {name: settings_of(args, task, sets[name], prompts[name], tokenizer, sampling)
              for name in sets}
  # Everything that can be refused without weights is refused before they are loaded.
  for name in sets:
    _check_positions(args, name, prompts[name], config.max_positions)
    for other in results.keys() - sets.keys():
      differ = evals.unlike(settings[name], results[other].get("settings", {}))
      if differ:
        named = " and ".join(_difference(key, results[other].get("settings", {}), settings[name])
                             for key in differ)
        raise InputError(f"{args.out} has scores of {other} with another {named}, "
                         f"to which those of {name} cannot be compared: choose another --out.")
    if args.out and results.get(name, {}).get("settings") != settings[name]:
      path = rows_path(args, name)
      sample.check_settings(path, rows_settings(settings[name]))
      check_rows(path, prompts[name], sampling.max_tokens, tokenizer.size)
  model = None
  for name, one in sets.items():
    if results.get(name, {}).get("settings") == settings[name]:
      yield name, results[name]
      continue
    if model is None:
      model, params = hf.load(args.model, sharding.current_mesh(), run={"dtype": args.dtype},
                              shapes=models.frozen_shapes)
    # Compiled for each set, because its longest prompt sets the shapes.
    longest = max(len(prompt.tokens) for prompt in prompts[name])
    with command.naming_flags(sample.FLAGS):
      compiled = sampler.Sampler(model, sampling, min(args.batch, len(prompts[name])), longest,
                                 sample.config_of(args), tokenizer.decode, params)
    statistics = evals.intervals((args.k,), args.seed, DRAWS, LEVEL)
    with sampler.naming(args.model), stored(args, name, settings[name], prompts[name],
                                            tokenizer, compiled) as of_set:
      found = evals.run({"sampled": compiled}, params, prompts[name],
                        reward_of(task, tokenizer, one.problems), (args.seed, SALT), statistics,
                        answer_of(task, tokenizer), of_set)
    yield name, evals.record(found) | {"settings": settings[name]}


def _difference(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
  """The name of a setting that differs, and where it is the sampling, the flags with both values.
  """
  fields = here[key]
  if key != "sampling" or key not in there:
    return key
  flags = sample.FLAGS | {"samples_per_prompt": "--k"}
  differ = (f"{flags.get(name, name)} {there[key].get(name)} there, {value} here"
            for name, value in fields.items() if there[key].get(name) != value)
  return f"{key} ({'; '.join(differ)})"


def _warn_of_thinking(sets: Mapping[str, ProblemSet], tokenizer: chat.Chat) -> None:
  """Prints a line where a template's default decides whether the model thinks at length."""
  published = [name for name, one in sets.items() if "set" in (one.origin or {})]
  if published and tokenizer.leaves_open(THINKING):
    print(f"{published[0]:<16}{'warning':<16}the chat template reads {THINKING}, which is not set "
          f"and often on by default: choose --template {THINKING}=false, or =true with a larger "
          "--max-tokens.", flush=True)


def _check_positions(args: argparse.Namespace, name: str, prompts: Sequence[Prompt],
                     positions: int) -> None:
  """Refuses a set whose longest prompt and response leave the model's positions."""
  # Positions beyond the trained ones give no sensible text.
  longest = max(len(prompt.tokens) for prompt in prompts)
  if longest >= positions:
    raise InputError(f"a prompt of {name} has {longest} tokens and the model has {positions} "
                     "positions: choose a model with more, or leave the problem out.")
  if longest + args.max_tokens > positions:
    raise InputError(f"a prompt of {name} has {longest} tokens and with {args.max_tokens} new ones "
                     f"leaves the model's {positions} positions: lower --max-tokens.")


def rendered(task: Task, name: str, one: ProblemSet, tokenizer: chat.Chat) -> list[Prompt]:
  """The prompts of a set."""
  return [splits.prompt_of(task, tokenizer, name, problem) for problem in one.problems.values()]


def settings_of(args: argparse.Namespace, task: Task, one: ProblemSet, prompts: Sequence[Prompt],
                tokenizer: chat.Chat, sampling: Sampling) -> dict[str, Any]:
  """All that a score depends on: it stands beside the score, and unlike scores share no row."""
  facts = [(p.id, p.tokens, one.problems[p.id]["answer"]) for p in prompts]
  settings = {
      "model": hf.identity(args.model), "tokenizer": tokenizer.fingerprint(),
      "sampling": sampling._asdict(), "seed": args.seed, "dtype": args.dtype, "task": args.task,
      "checker": task.checker(),
      "interval": {"draws": DRAWS, "level": LEVEL, "rule": intervals.RULE},
      "set": {"count": len(prompts), "origin": one.origin, "problems": manifest.digest(facts)}}
  return json.loads(json.dumps(settings))  # as it will be read: tuples are lists


@contextlib.contextmanager
def stored(args: argparse.Namespace, name: str, settings: Mapping[str, Any],
           prompts: Sequence[Prompt], tokenizer: chat.Chat,
           compiled: sampler.Sampler) -> Iterator[dict[str, evals.Stored] | None]:
  """The samples of a set that stand beside --out, and the file that further ones are added to.

  Yields:
    `stored` of `evals.run`; None without --out.

  Raises:
    InputError: the file was sampled with other settings, is being written, or has a wrong line.
  """
  if not args.out:
    yield None
    return
  path = rows_path(args, name)
  with sample.only_writer(path, rows_settings(settings)):
    rows = None
    # Takes out a line that a kill cut off.
    if sample.existing_rows(path, prompts):
      rows = read_rows(path, prompts, compiled, tokenizer.size)
    with open(path, "a", encoding="utf-8") as file:
      def on_finish(row: int, rollout: Rollout) -> None:
        file.write(sample.line(rollout, row, tokenizer))
        # Each line reaches the file at once, so that a kill loses only the rows being decoded.
        file.flush()
      yield {"sampled": evals.Stored(rows, on_finish)}


def rows_path(args: argparse.Namespace, name: str) -> pathlib.Path:
  """The file of a set's samples, beside --out."""
  out = pathlib.Path(args.out)
  return out.with_name(f"{out.stem}-{name}.jsonl")


def rows_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that make a row what it is; the check and the number of samples do not."""
  of_rows = {key: settings[key] for key in ("model", "tokenizer", "seed", "dtype")}
  of_rows["sampling"] = settings["sampling"] | {"samples_per_prompt": 1}
  return of_rows | {"command": "eval"}


def check_rows(path: pathlib.Path, prompts: Sequence[Prompt], max_tokens: int,
               vocabulary: int) -> list[dict[str, Any]]:
  """The samples of the prompts in a file of samples, an object each.

  Args:
    max_tokens: of a response.
    vocabulary: number of ids that have tokens.

  Raises:
    InputError: a line is not a whole sample of a prompt.
  """
  ids = {prompt.id for prompt in prompts}
  found = []
  rows, _ = sample.read_rows(path, prompts)
  # Every line is a row, in the order of the lines.
  for number, ((prompt_id, _), row) in enumerate(rows.items(), 1):
    if prompt_id not in ids:
      continue
    tokens = row.get("tokens")
    whole = isinstance(tokens, list) and row.get("finish") in rollouts.FINISHED
    # To Python a boolean is an integer.
    if not whole or not 0 < len(tokens) <= max_tokens or not all(
        type(token) is int and 0 <= token < vocabulary for token in tokens):
      raise InputError(f"{path} line {number} is not a sample: take the line out, which will be "
                       "sampled again, or choose another --out.")
    found.append(row)
  return found


def read_rows(path: pathlib.Path, prompts: Sequence[Prompt], compiled: sampler.Sampler,
              vocabulary: int) -> Rollout | None:
  """The rows of a file of samples, as a Rollout without log-probabilities; None without any.

  Args:
    compiled: the sampler, whose widths the Rollout has.
    vocabulary: number of ids that have tokens.
  """
  rows = check_rows(path, prompts, compiled.sampling.max_tokens, vocabulary)
  if not rows:
    return None
  of_prompt = {prompt.id: prompt for prompt in prompts}
  found = rollouts.given_solutions(
      [of_prompt[row["id"]] for row in rows], [row["tokens"] for row in rows],
      compiled.prompt_tokens, compiled.sampling.max_tokens)
  return found._replace(
      sample_index_B=np.array([row["sample"] for row in rows], np.int32),
      finish_reason_B=np.array([rollouts.FINISHED.index(row["finish"]) for row in rows], np.int32))


def reward_of(task: Task, tokenizer: chat.Chat, problems: dict[int, dict]) -> Reward:
  """The task's reward of (prompt id, response ids)."""
  submit = getattr(task.reward, "submit", task.reward)
  return lambda prompt_id, ids: submit(problems[prompt_id], tokenizer.decode(ids))


def answer_of(task: Task, tokenizer: chat.Chat) -> evals.Answer | None:
  """The task's answer of response ids; None where the task has none."""
  if task.answer is None:
    return None
  return lambda ids: task.answer(tokenizer.decode(ids))


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
