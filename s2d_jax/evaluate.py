"""`s2d-jax eval`: scores one model on sets of checked problems, without a recipe."""

import argparse
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from s2d_jax import (
  chat,
  command,
  evals,
  files,
  keys,
  models,
  program_cache,
  rollouts,
  sampler,
  sharding,
  tasks,
)
from s2d_jax.errors import InputError
from s2d_jax.models import hf
from s2d_jax.planning import Task
from s2d_jax.rollouts import Reward
from s2d_jax.sampler import __main__ as sample

EXAMPLE = "s2d-jax eval --model FOLDER --task math --sets math500,aime24 --k 16"
DRAWS = 1000  # of the bootstrap behind an interval
LEVEL = 0.95


def main(argv: Sequence[str]) -> None:
  """Prints a line per set and statistic: the estimate and its 95 % interval; --out stores them.

  Raises:
    InputError: the model, a set or a number is refused, in one sentence.
  """
  parser = command.Parser("eval", "Scores a model on sets of checked problems.", EXAMPLE)
  parser.add_argument("--model", required=True, metavar="FOLDER", help="a Hugging Face folder")
  parser.add_argument("--task", required=True, choices=tuple(tasks.TASKS), metavar="TASK",
                      help=f"prompts and answer check: {', '.join(tasks.TASKS)}")
  parser.add_argument("--sets", required=True, help="names of sets, with commas between")
  parser.add_argument("--data", metavar="FOLDER",
                      help="has SET.jsonl; by default {math}, for arithmetic {arithmetic}".format(
                          **tasks.FOLDERS))
  parser.add_argument("--out", metavar="FILE.json",
                      help="stores every set's scores, and which samples are right")
  parser.add_argument("--k", type=int, default=1, help="samples of each problem")
  parser.add_argument("--batch", type=int, default=64, help="problems sampled at a time")
  sample.add_flags(parser)
  args = parser.parse_args(argv)
  sample.check_flags(args, "--k")
  keys.check_value("--batch", args.batch, keys.at_least(1))
  names = args.sets.split(",")
  if "" in names:
    raise InputError(f"--sets is {args.sets!r}: write names with one comma between them.")
  folder = args.data or tasks.FOLDERS[args.task]
  task = tasks.TASKS[args.task](ConfigDict({"data": tasks.DATA[args.task](folder, names)}))
  sets = {name: task.source(name) for name in names}
  results = {}
  with jax.set_mesh(sharding.make_mesh()), program_cache.opened(args.compilation_cache):
    for name, evaluation in evaluations(args, task, sets):
      for score, (value, low, high) in evaluation.scores.items():
        print(f"{name:<16}{score:<16}{value:8.3f} [{low:.3f}, {high:.3f}]", flush=True)
      results[name] = evals.record(evaluation)
      # Written after each set: an error in a later one loses none.
      if args.out:
        files.write_json(args.out, {"flags": vars(args), "sets": results})


def evaluations(args: argparse.Namespace, task: Task, sets: Mapping[str, Sequence[dict]],
                ) -> Iterator[tuple[str, evals.Evaluation]]:
  """Yields (name, Evaluation) of a model's samples on each set of problems."""
  _, tokenizer = sampler.read_folder(args.model, sample.template(args.template),
                                      {"dtype": args.dtype})
  sampling = sample.sampling_of(args, args.k, tokenizer)
  model, params = hf.load(args.model, sharding.current_mesh(), run={"dtype": args.dtype},
                          shapes=models.frozen_shapes)
  for name, source in sets.items():
    problems = {problem["id"]: problem for problem in (source[i] for i in range(len(source)))}
    prompts = [rollouts.Prompt(i, tuple(tokenizer.render(task.messages(problem),
                                                         f"problem {i} of {name}")))
               for i, problem in problems.items()]
    # Refused before the set is sampled: positions beyond the trained ones give no sensible text.
    longest = max(len(prompt.tokens) for prompt in prompts)
    if longest + args.max_tokens > model.config.max_positions:
      raise InputError(f"a prompt of {name} has {longest} tokens and with {args.max_tokens} new "
                       f"ones leaves the model's {model.config.max_positions} positions: lower "
                       "--max-tokens.")
    # Compiled for each set, because its longest prompt sets the shapes.
    with command.naming_flags(sample.FLAGS):
      compiled = sampler.Sampler(model, sampling, min(args.batch, len(prompts)), longest,
                                 sample.config_of(args), tokenizer.decode, params)
    statistics = evals.intervals((args.k,), args.seed, DRAWS, LEVEL)
    with sampler.naming(args.model):
      one = evals.run({"sampled": compiled}, params, prompts, reward_of(task, tokenizer, problems),
                      # The recipe's own seed, so that equal weights have equal samples here.
                      (args.seed, zlib.crc32(b"evaluation")), statistics,
                      answer_of(task, tokenizer))
    yield name, one


def reward_of(task: Task, tokenizer: chat.Chat, problems: dict[int, dict]) -> Reward:
  """The task's reward of (prompt id, response ids)."""
  return lambda prompt_id, ids: task.reward(problems[prompt_id], tokenizer.decode(ids))


def answer_of(task: Task, tokenizer: chat.Chat) -> evals.Answer | None:
  """The task's answer of response ids; None where the task has none."""
  if task.answer is None:
    return None
  return lambda ids: task.answer(tokenizer.decode(ids))


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
