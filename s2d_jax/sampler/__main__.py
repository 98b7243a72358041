"""Samples of a model for the prompts of a file, outside any training.

  s2d-jax sample --model FOLDER --prompts FILE.jsonl --out FILE.jsonl --n 16 \
      --temperature 0.7 --max-tokens 1024

A line of the prompts has "problem", a text, or "messages", a chat. An integer "id" is optional.
A line of the output is one sample: {"id", "prompt", "sample", "response", "finish", "tokens",
"logp"}. "prompt" is a hash of the prompt's tokens, "finish" is "stop" or "length", and "logp" has
the model's log-probability of each token in nats. Lines come as rows end, in any order.

Started again, the command keeps the output's lines and samples the missing rows. They equal those
of one run, except where a batch of another size rounds otherwise (docs/sampling.md). The output is
a file that `config.data.solutions` takes.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from s2d_jax import (
  command,
  hosts,
  json_objects,
  keys,
  models,
  program_cache,
  rollouts,
  sampler,
  sharding,
)
from s2d_jax.chat import Chat
from s2d_jax.data import jsonl
from s2d_jax.errors import InputError
from s2d_jax.json_objects import Json
from s2d_jax.models import hf
from s2d_jax.rollouts import Prompt, Rollout
from s2d_jax.sampler import Sampler, SamplerConfig, Sampling
from s2d_jax.sampler.decode import Weights
from s2d_jax.sampler.scheduler import Request

EXAMPLE = "s2d-jax sample --model FOLDER --prompts FILE.jsonl --out FILE.jsonl --n 16"
# Rows of one call of the sampler. The host's memory holds the rollout of a call, and a file may
# have more rows than fit.
SLICE = 16_384
# The flag of each field that a command line sets; that of samples_per_prompt is a command's own.
FLAGS = {"stop_strings": "--stop", "temperature": "--temperature", "top_p": "--top-p",
         "top_k": "--top-k", "min_p": "--min-p", "max_tokens": "--max-tokens",
         "min_tokens": "--min-tokens", "cache_gib": "--cache-gib", "page": "--page",
         "mesh": "--mesh", "seed": "--seed"}


def add_flags(flags: argparse._ActionsContainer) -> None:
  """Adds the flags that every command that samples has, to a parser or to a group of one."""
  flags.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
  flags.add_argument("--top-p", type=float, default=1.0, help="1 is off")
  flags.add_argument("--top-k", type=int, default=0, help="0 is off")
  flags.add_argument("--min-p", type=float, default=0.0, help="0 is off")
  flags.add_argument("--max-tokens", type=int, default=1024, help="of a response")
  flags.add_argument("--template", action="append", default=[], metavar="KEY=JSON",
                     help="an argument of the chat template, such as enable_thinking=false")
  flags.add_argument("--seed", type=int, default=0)
  flags.add_argument("--dtype", default="float32", help="of the activations: float32 or bfloat16")
  flags.add_argument("--cache-gib", type=float, default=0.0,
                     help="of each device, for the cache; 0: what it has left")
  flags.add_argument("--compilation-cache", default="auto", metavar="FOLDER",
                     help="of compiled programs; auto: that of runs, '': none")


def check_flags(args: argparse.Namespace, samples: str) -> None:
  """Checks the flags of sampling before a model is loaded, which takes minutes for a large one.

  Args:
    samples: the flag of the number of samples.

  Raises:
    InputError: a value is out of its range; names the flag.
  """
  with command.naming_flags(FLAGS | {"samples_per_prompt": samples}):
    sampler.check_sampling(sampling_of(args, getattr(args, samples.strip("-"))))
    sampler.check_config(config_of(args))
    keys.check_value("seed", args.seed, keys.at_least(0))
  keys.check_value("--compilation-cache", args.compilation_cache, program_cache.KEY)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Reads the command line.

  Raises:
    InputError: as `check_flags`.
  """
  parser = command.Parser("sample", __doc__.partition("\n")[0], EXAMPLE)
  # A group has no heading, so that the help fits a screen of 24 lines.
  flags = parser.add_argument_group()
  flags.add_argument("--model", required=True, help="a Hugging Face folder")
  flags.add_argument("--prompts", required=True, help="JSON lines of problem or messages")
  flags.add_argument("--out", required=True, help="JSON lines of samples; continued if there")
  flags.add_argument("--n", type=int, default=1, help="samples of each prompt")
  flags.add_argument("--min-tokens", type=int, default=0)
  flags.add_argument("--stop", action="append", default=[], dest="stop_strings", metavar="TEXT",
                     help="ends a response")
  flags.add_argument("--mesh", default="1,1,1", help="data,fsdp,tensor")
  flags.add_argument("--page", type=int, default=0, help="tokens of a page of the cache; 0: none")
  add_flags(flags)
  args = parser.parse_args(argv)
  check_flags(args, "--n")
  if not all(size.isdigit() for size in args.mesh.split(",")):
    raise InputError(f"--mesh is {args.mesh}: choose sizes such as 1,4,1.")
  return args


def sampling_of(args: argparse.Namespace, samples: int,
                tokenizer: Chat | None = None) -> Sampling:
  """The Sampling that the flags ask for, with `samples` of each prompt.

  A field without a flag in the command has its default. The tokenizer ends responses, and only its
  own ids are drawn; None: the flags alone are of interest.
  """
  fields = {name: value for name, value in vars(args).items() if name in Sampling._fields}
  fields["stop_strings"] = tuple(fields.get("stop_strings", ()))
  if tokenizer is not None:
    fields |= {"stop_ids": tokenizer.eos_ids, "vocabulary": tokenizer.size}
  return Sampling(samples_per_prompt=samples, **fields)


def config_of(args: argparse.Namespace) -> SamplerConfig:
  """The SamplerConfig that the flags ask for; a field without a flag has its default."""
  return SamplerConfig(**{name: value for name, value in vars(args).items()
                          if name in SamplerConfig._fields})


def read(path: str | pathlib.Path, tokenizer: Chat) -> list[Prompt]:
  """The prompts of a file, in order.

  Raises:
    InputError: the file is absent or empty, or a line holds no prompt or repeats an id; names it.
  """
  found = {}
  for line_name, row in jsonl.objects(path, "problem or messages"):
    try:
      messages = row.get("messages") or [{"role": "user", "content": row["problem"]}]
      text = row.get("problem") or json.dumps(messages)
      # A chat template would print a number or a null as text, so both are refused.
      words = [m[key] for m in messages for key in ("role", "content")]
      if not all(isinstance(x, str) for x in (text, *words)):
        raise TypeError("not a text")
    except (AttributeError, KeyError, TypeError) as error:
      raise InputError(f'{line_name} is not a JSON object with "problem", a text, or "messages", a '
                       "chat: give it one.") from error
    # Without an id a line is named by its text, so that lines can be added or moved between runs.
    number = jsonl.line_id(line_name, row, text)
    if number in found:
      raise InputError(f"{line_name} has id {number} again: use each once.")
    found[number] = Prompt(number, tuple(tokenizer.render(messages, line_name)))
  if not found:
    raise InputError(f"{path} has no prompts: give it one JSON object per line.")
  return list(found.values())


@contextlib.contextmanager
def only_writer(path: pathlib.Path, settings: dict[str, Any]) -> Iterator[None]:
  """Locks the output while it is written, and keeps its settings in a file beside it.

  Raises:
    InputError: another process writes the output, or it was sampled with other settings.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  # Opened for appending, so that a second process that gets no lock leaves the settings unchanged.
  with open(_settings_path(path), "ab+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise InputError(f"{path} is being written by another process: wait for it, or choose "
                       "another --out.") from error
    if check_settings(path, settings):
      file.truncate(0)
      file.write(json.dumps(settings, indent=1, allow_nan=False).encode() + b"\n")
      file.flush()
    yield


def _settings_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(path.name + ".settings.json")


def check_settings(path: pathlib.Path, settings: dict[str, Any]) -> list[str]:
  """The settings that differ from those in the file beside the output, where there is no output.

  Raises:
    InputError: there is an output, and it was sampled with other settings; or a file is damaged or
      cannot be written.
  """
  settings_path = _settings_path(path)
  for file in (path, settings_path):
    command.check_output(file)
  before = {}
  if settings_path.exists() and (data := settings_path.read_bytes()):
    before = json_objects.parse(str(settings_path), data, "choose another --out, or remove it")
  # Rows of two models or two temperatures in one file could not be distinguished later.
  differ = sorted(k for k in settings if before.get(k) != settings[k])
  if path.exists() and differ:
    raise InputError(f"{path} was sampled with another {' and '.join(differ)}, or without "
                     f"{settings_path.name} beside it: choose another --out, or remove both.")
  return differ


def existing_rows(path: pathlib.Path, prompts: Sequence[Prompt]) -> set[tuple[int, int]]:
  """{(id, sample)} of the complete lines of the output; removes a last line that was cut off.

  Raises:
    InputError: as `read_rows`.
  """
  rows, size = read_rows(path, prompts)
  if path.exists() and size < path.stat().st_size:
    with open(path, "r+b") as out:
      out.truncate(size)
  return set(rows)


def read_rows(path: pathlib.Path,
              prompts: Sequence[Prompt]) -> tuple[dict[tuple[int, int], Json], int]:
  """({(id, sample): the object of its line}, their bytes) of the complete lines of the output.

  Raises:
    InputError: a line holds no sample, or that of an earlier line, or belongs to a prompt that has
      other tokens now.
  """
  found = {}
  data = path.read_bytes() if path.exists() else b""
  # A process that was killed may have left its last line without an end.
  whole = data[: data.rfind(b"\n") + 1]
  names = {prompt.id: prompt_hash(prompt) for prompt in prompts}
  for number, text in enumerate(whole.split(b"\n")[:-1], 1):
    name = f"{path} line {number}"
    remedy = "take the line out, which will be sampled again, or choose another --out"
    try:
      row = json_objects.Fields(name, json_objects.parse(name, text))
      key = row.integer("id", 0, 2**63 - 1), row.integer("sample", 0)
      prompt = row.text("prompt")
    except InputError as error:
      raise InputError(f"{name} is not a sample: {remedy}.") from error
    # Ids that the prompts do not have are of an earlier, longer file of prompts, and stay.
    if names.get(key[0], prompt) != prompt:
      raise InputError(f"{path} has samples of another prompt with the id {key[0]}: choose another "
                       "--out, or another id.")
    if key in found:
      raise InputError(f"{name} has sample {key[1]} of the id {key[0]} again: take the line out, "
                       "or choose another --out.")
    found[key] = row.json
  return found, len(whole)


def prompt_hash(prompt: Prompt) -> str:
  """A hash of a prompt's tokens, eight hexadecimal digits."""
  return hashlib.blake2b(repr(prompt.tokens).encode(), digest_size=4).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
  """Samples the rows that the output does not have yet."""
  args = parse(argv)
  command.check_output(args.out)
  path = pathlib.Path(args.out)
  config, tokenizer = sampler.read_folder(args.model, template(args.template),
                                          {"dtype": args.dtype})
  # Everything that can be refused without weights is refused before they are loaded.
  prompts = read(args.prompts, tokenizer)
  sampling = sampling_of(args, args.n, tokenizer)
  tokenizer.check_stops(sampling.stop_strings)
  model = models.build(config)
  for prompt in prompts:
    if len(prompt.tokens) + args.max_tokens > model.config.max_positions:
      raise InputError(f"prompt {prompt.id} has {len(prompt.tokens)} tokens and with "
                       f"{args.max_tokens} new ones leaves the model's "
                       f"{model.config.max_positions} positions: lower --max-tokens or drop it.")
  # The number of samples is not among the settings: a later run may add some to each prompt.
  chosen = sampling._replace(samples_per_prompt=1)._asdict()
  chosen.pop("vocabulary")  # the tokenizer's, whose fingerprint is a setting
  settings = {"model": hf.identity(args.model), "tokenizer": tokenizer.fingerprint(),
              "sampling": chosen, "seed": args.seed, "dtype": args.dtype}
  settings = json.loads(json.dumps(settings))  # as it will be read: tuples are lists
  check_settings(path, settings)
  size = min(len(prompts), SLICE)
  prompt_tokens = max(len(p.tokens) for p in prompts)
  with command.naming_flags(FLAGS):
    mesh = sharding.make_mesh(tuple(map(int, args.mesh.split(","))))
  with jax.set_mesh(mesh), program_cache.opened(args.compilation_cache):
    # The copy for decoding is the only one that stays.
    shapes = models.laid_out(model.config, mesh, models.frozen_shapes)
    sampler_config = sampler.fitted(config_of(args), model, shapes, hosts.device_memory(), held=0)
    # Before the output is created, so that a refused command leaves no file.
    with command.naming_flags(FLAGS):
      sampler.check_memory(model, sampling, size, prompt_tokens, sampler_config)
    with only_writer(path, settings):
      done = existing_rows(path, prompts)
      missing = [(p, g) for p in prompts for g in range(args.n) if (p.id, g) not in done]
      if missing:
        # As the sampler reads them: no float32 copy beside those of bfloat16.
        model, params = hf.load(args.model, mesh, run={"dtype": args.dtype},
                                shapes=models.frozen_shapes)
        compiled = Sampler(model, sampling, size, prompt_tokens, sampler_config, tokenizer.decode,
                           params)
        weights = compiled.lay_out(params)
        del params  # a second copy that nothing reads any more
        with sampler.naming(args.model):
          write(path, compiled, weights, missing, args.seed, tokenizer, len(done))
  print(path)


def template(words: Sequence[str]) -> dict[str, Any]:
  """The arguments of a chat template from a list of KEY=JSON.

  Raises:
    InputError: one has no "=" or no JSON behind it.
  """
  found = {}
  for word in words:
    key, equals, value = word.partition("=")
    try:
      found[key] = json_objects.value(word, value if equals else "")
    except InputError as error:
      raise InputError(f"--template {word} is not KEY=JSON: write enable_thinking=false."
                       ) from error
  return found


def line(rollout: Rollout, row: int, tokenizer: Chat) -> str:
  """The line of a file of samples for one row of a rollout."""
  ids = rollout.response(row)
  prompt = Prompt(int(rollout.prompt_id_B[row]),
                  tuple(rollout.prompt_BT[row, : rollout.prompt_length_B[row]].tolist()))
  return json.dumps({
      "id": prompt.id, "prompt": prompt_hash(prompt), "sample": int(rollout.sample_index_B[row]),
      "response": tokenizer.decode(ids),
      "finish": rollouts.FINISHED[rollout.finish_reason_B[row]], "tokens": ids.tolist(),
      "logp": [round(float(x), 6) for x in rollout.sampler_logp_BT[row, : len(ids)]]},
      allow_nan=False) + "\n"


def write(path: pathlib.Path, compiled: Sampler, weights: Weights, requests: Sequence[Request],
          seed: int, tokenizer: Chat, before: int) -> None:
  """Samples rows and appends each to the output as soon as it has ended.

  Args:
    requests: (prompt, sample index) of each row.
    before: number of rows that the output has already, for the progress bar.
  """
  with open(path, "a", encoding="utf-8") as out, tqdm(
      total=before + len(requests), initial=before, unit="row", file=sys.stderr) as bar:
    def on_finish(index: int, rollout: Rollout) -> None:
      out.write(line(rollout, index, tokenizer))
      # Each line reaches the file at once, so that a kill loses only the rows being decoded.
      out.flush()
      bar.update()
    for start in range(0, len(requests), SLICE):
      part = requests[start: start + SLICE]
      compiled.sample_rows(weights, part, (seed,), on_finish=on_finish)


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
