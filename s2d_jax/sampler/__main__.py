"""Samples of a model for the prompts of a file, outside any training.

  s2d-jax sample --model FOLDER --prompts FILE.jsonl --out FILE.jsonl --n 16 \
      --temperature 0.7 --max-tokens 1024

A line of the prompts has "problem", a text, or "messages", a chat; and where it has one an "id", an
integer. A line of the output is one sample: {"id", "prompt", "sample", "response", "finish",
"tokens", "logp"}, prompt a hash of its tokens, finish "stop" or "length", logp the model's nats of
each token. Lines come as rows end, in any order. The same command again keeps what is there and
samples what is not: the samples of one run, but where another batch rounds otherwise
(docs/sampling.md). The output is what `config.data.solutions` takes.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import pathlib
import sys

import jax
import jinja2
from tqdm import tqdm

from s2d_jax import command, models, rollouts, sampler, sharding
from s2d_jax.data import jsonl
from s2d_jax.models import hf

EXAMPLE = "s2d-jax sample --model FOLDER --prompts FILE.jsonl --out FILE.jsonl --n 16"
SLICE = 16_384  # rows that are asked for at a time: the memory of a host is not a file's


def parse(argv):
  """The command line, read.

  Raises:
    ValueError: a number out of its range; names the flag.
  """
  flags = command.Parser("sample", __doc__.partition("\n")[0], EXAMPLE)
  flags.add_argument("--model", required=True, help="a Hugging Face folder")
  flags.add_argument("--prompts", required=True, help="JSON lines of problem or messages")
  flags.add_argument("--out", required=True, help="JSON lines, one a sample; kept and gone on with")
  flags.add_argument("--n", type=int, default=1, help="samples of each prompt")
  flags.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
  flags.add_argument("--top-p", type=float, default=1.0, help="1 is off")
  flags.add_argument("--top-k", type=int, default=0, help="0 is off")
  flags.add_argument("--min-p", type=float, default=0.0, help="0 is off")
  flags.add_argument("--max-tokens", type=int, default=1024)
  flags.add_argument("--min-tokens", type=int, default=0)
  flags.add_argument("--stop", action="append", default=[], help="a text that ends a response")
  flags.add_argument("--template", action="append", default=[], metavar="KEY=JSON",
                     help="an argument of the chat template, such as enable_thinking=false")
  flags.add_argument("--seed", type=int, default=0)
  flags.add_argument("--dtype", default="float32", help="of the activations: float32 or bfloat16")
  flags.add_argument("--mesh", default="1,1,1", help="data,fsdp,tensor")
  flags.add_argument("--cache-gib", type=float, default=4.0, help="of each device, for the cache")
  flags.add_argument("--page", type=int, default=0, help="tokens of a page of the cache; 0: none")
  asked = flags.parse_args(argv)
  for name, wrong, remedy in (
      ("n", asked.n < 1, "1 or more"), ("max-tokens", asked.max_tokens < 1, "1 or more"),
      ("min-tokens", not 0 <= asked.min_tokens <= asked.max_tokens, "0 to max-tokens"),
      ("temperature", not 0 <= asked.temperature < math.inf, "0 (greedy) or more"),
      ("top-p", not 0 < asked.top_p <= 1, "above 0, up to 1"),
      ("min-p", not 0 <= asked.min_p <= 1, "0 to 1"), ("top-k", asked.top_k < 0, "0 or more"),
      ("seed", asked.seed < 0, "0 or more"), ("page", asked.page < 0, "0 (none) or more"),
      ("cache-gib", not 0 < asked.cache_gib < math.inf, "more than 0"),
      ("mesh", not all(size.isdigit() for size in asked.mesh.split(",")), "sizes such as 1,4,1")):
    if wrong:
      raise ValueError(f"--{name} is {getattr(asked, name.replace('-', '_'))}: choose {remedy}.")
  return asked


def read(path, talk):
  """The prompts of a file, in order.

  Raises:
    ValueError: no such file, or a line that is no prompt or repeats one's id; names it.
  """
  found = {}
  for line_name, row in jsonl.objects(path, "problem or messages"):
    try:
      messages = row.get("messages") or [{"role": "user", "content": row["problem"]}]
      text = row.get("problem") or json.dumps(messages)
      words = [m[key] for m in messages for key in ("role", "content")]
      if not all(isinstance(x, str) for x in (text, *words)):
        raise TypeError("not a text")
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(f'{line_name} is no JSON object with "problem", a text, or "messages", a '
                       "chat: give it one.") from error
    number = jsonl.line_id(line_name, row, text)
    if number in found:
      raise ValueError(f"{line_name} has id {number} again: use each once.")
    try:
      found[number] = rollouts.Prompt(number, tuple(talk.render(messages)))
    except jinja2.TemplateError as error:
      raise ValueError(f"{line_name} is no chat that the model's template takes ({error}): "
                       "correct its messages.") from error
  if not found:
    raise ValueError(f"{path} has no prompts: give it one JSON object per line.")
  return list(found.values())


@contextlib.contextmanager
def only_writer(path, settings):
  """Holds the output's settings, beside it, while it is written.

  Raises:
    ValueError: another process writes it, or it was sampled from another model, or otherwise.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(path.name + ".settings.json")
  with open(beside, "a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(f"{path} is being written by another process: wait for it, or choose "
                       "another --out.") from error
    file.seek(0)
    text = file.read()
    before = json.loads(text) if text else {}
    differ = sorted(k for k in settings if before.get(k) != settings[k])
    if path.exists() and differ:
      raise ValueError(f"{path} was sampled with another {' and '.join(differ)}, or without "
                       f"{beside.name} beside it: choose another --out, or remove both.")
    if differ:
      file.truncate(0)
      file.write(json.dumps(settings, indent=1) + "\n")
      file.flush()
    yield


def kept(path, prompts):
  """{(id, sample)} of the whole lines of the output; a last line that was cut off is taken away.

  Raises:
    ValueError: a line is no sample, or of a prompt that has other tokens now.
  """
  if not path.exists():
    return set()
  data, found = path.read_bytes(), set()
  whole = data[: data.rfind(b"\n") + 1]
  names = {prompt.id: name_of(prompt) for prompt in prompts}
  for number, line in enumerate(whole.split(b"\n")[:-1], 1):
    try:
      row = json.loads(line)
      own, prompt, sample = row["id"], row["prompt"], row["sample"]
      hash((own, sample))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path} line {number} is no sample: take the line out, which will be "
                       "sampled again, or choose another --out.") from error
    if names.get(own, prompt) != prompt:
      raise ValueError(f"{path} has samples of another prompt with the id {own}: choose "
                       "another --out, or another id.")
    found.add((own, sample))
  if len(whole) < len(data):
    with open(path, "r+b") as out:
      out.truncate(len(whole))
  return found


def name_of(prompt):
  """Eight hexadecimal digits that tell a prompt's tokens from others."""
  return hashlib.blake2b(repr(prompt.tokens).encode(), digest_size=4).hexdigest()


def main(argv=None):
  """Samples what the output lacks."""
  asked = parse(argv)
  path = pathlib.Path(asked.out)
  config, talk = sampler.read_folder(asked.model, template(asked.template),
                                     {"dtype": asked.dtype})
  prompts = read(asked.prompts, talk)
  how = sampler.Sampling(asked.n, asked.temperature, asked.top_p, asked.top_k, asked.min_p,
                         asked.max_tokens, asked.min_tokens, tuple(talk.eos_ids), tuple(asked.stop))
  sampler.check_ends(how, talk.decode)
  talk.check_stops(how.stop_strings)
  model = models.build(config)
  for prompt in prompts:
    if len(prompt.tokens) + asked.max_tokens > model.config.max_positions:
      raise ValueError(f"prompt {prompt.id} has {len(prompt.tokens)} tokens and with "
                       f"{asked.max_tokens} new ones leaves the model's "
                       f"{model.config.max_positions} positions: lower --max-tokens or drop it.")
  settings = {"model": hf.identity(asked.model), "tokenizer": talk.fingerprint(),
              "sampling": how._replace(samples_per_prompt=1)._asdict(), "seed": asked.seed,
              "dtype": asked.dtype}
  settings = json.loads(json.dumps(settings))  # as it will be read: tuples are lists
  room = sampler.Room(cache_gib=asked.cache_gib, page=asked.page)
  size, width = min(len(prompts), SLICE), max(len(p.tokens) for p in prompts)
  with _in_our_words():
    mesh = sharding.make_mesh(tuple(map(int, asked.mesh.split(","))))
  with jax.set_mesh(mesh):
    with _in_our_words():
      sampler.check_memory(model, how, size, width, room)
    with only_writer(path, settings):
      there = kept(path, prompts)
      wanted = [(p, g) for p in prompts for g in range(asked.n) if (p.id, g) not in there]
      if wanted:
        # As the sampler reads them: no float32 copy beside those of bfloat16.
        model, params = hf.load(asked.model, mesh, run={"dtype": asked.dtype},
                                shapes=models.frozen_shapes)
        draw = sampler.make(model, params, how, size, width, room, talk.decode)
        weights = draw.lay_out(params)
        del params  # nobody else reads them
        with sampler.naming(asked.model):
          write(path, draw, weights, wanted, asked.seed, talk, len(there))
  print(path)


@contextlib.contextmanager
def _in_our_words():
  """Refusals name a config's keys: here they name the flags."""
  try:
    yield
  except ValueError as error:
    text = str(error)
    for key, flag in (("config.sampler.cache_gib", "--cache-gib"), ("max_tokens", "--max-tokens"),
                      ("config.sampler.page", "--page"), ("config.mesh", "--mesh")):
      text = text.replace(key, flag)
    raise ValueError(text) from error


def template(words):
  """The arguments of a chat template from KEY=JSON.

  Raises:
    ValueError: one is not that.
  """
  found = {}
  for word in words:
    key, equals, value = word.partition("=")
    try:
      found[key] = json.loads(value if equals else "")
    except json.JSONDecodeError as error:
      raise ValueError(f"--template {word} is not KEY=JSON: write enable_thinking=false."
                       ) from error
  return found


def write(path, draw, params, wanted, seed, talk, before):
  """Samples the wanted rows; each is a line as soon as it has ended."""
  with open(path, "a", encoding="utf-8") as out, tqdm(
      total=before + len(wanted), initial=before, unit="row", file=sys.stderr) as bar:
    def ended(place, rows):
      prompt, sample = part[place]
      ids = rows.response(place)
      out.write(json.dumps({
          "id": prompt.id, "prompt": name_of(prompt), "sample": sample,
          "response": talk.decode(ids),
          "finish": rollouts.FINISHED[rows.finish_reason_B[place]], "tokens": ids.tolist(),
          "logp": [round(float(x), 6) for x in rows.sampler_logp_BT[place, : len(ids)]]},
          allow_nan=False) + "\n")
      out.flush()
      bar.update()
    for start in range(0, len(wanted), SLICE):
      part = wanted[start: start + SLICE]
      draw.rows(params, part, (seed,), ended=ended)


if __name__ == "__main__":
  command.call(main, sys.argv[1:])
