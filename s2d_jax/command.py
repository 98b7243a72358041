"""The command line of every `s2d-jax` command: argparse, and config files with overrides.

A mistake gives one sentence on standard error and exit code 2. Flags are written `--name=value` or
`--name value`.
"""

import argparse
import contextlib
import difflib
import errno
import json
import os
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from s2d_jax import chips, writable
from s2d_jax.errors import InputError, WriteError

# Errors of a write alone: a disk is full or read-only, a quota is used up, a file is too large.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# A disk or a server of files that fails, or a lost permission: a read meets them as a write does.
_DISK = (errno.EIO, errno.EACCES, errno.ESTALE)
WRONG = 2  # exit code: the request has a mistake, and nothing was written
FAILED = 1  # exit code: a stage failed
_INTERRUPTED = 130  # exit code: Ctrl-C, as of a shell
_debug = False  # whether the traceback of an unexpected error is printed
# Keys that a block may lack, with what is off without them. No shipped config has them.
OPTIONAL_KEYS = ("allocate", "foresee", "guides", "hint_tokens", "keep", "longest", "prefixes")


class Parser(argparse.ArgumentParser):
  """A command's flags; its help has one line for each flag and ends with an example."""

  def __init__(self, command: str, description: str, example: str, arguments: str = "") -> None:
    # Without abbreviations a misspelt flag is an error, never another flag.
    super().__init__(
        prog=f"s2d-jax {command}", usage=f"s2d-jax {command} {arguments}[flags]",
        description=description, epilog=f"example: {example}", add_help=False, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=38, width=100))
    self.add_argument("--help", "-h", action="help", help=argparse.SUPPRESS)

  def error(self, message: str) -> NoReturn:
    """Exits with argparse's complaint as one sentence."""
    message = message.replace("the following arguments are required:", "missing:")
    fail(f"{message}: {self.prog} --help has an example.")


def config_parser(command: str, description: str, example: str) -> Parser:
  """A Parser with --config, for `parse_config`."""
  parser = Parser(command, description, example)
  parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]",
                      help="a file with get_config(ARG); --config.KEY=VALUE changes a key")
  return parser


def parse_config(parser: Parser, argv: Sequence[str]) -> tuple[ConfigDict, argparse.Namespace]:
  """Returns (config with its overrides applied, the command's own flags).

  Exits with a sentence where a flag, a file or a key is wrong.
  """
  args, others = parser.parse_known_args(argv)
  file = args.config.partition(":")[0]
  if not os.path.isfile(file):
    fail(f"--config names {file!r}, which is not a file in {os.getcwd()}: name a config file, "
         "such as configs/arithmetic.py in a checkout.")
  others, template = _template_flags(others)
  # Config files import others of their folder, as with python -m.
  sys.path.insert(0, os.getcwd())
  line = [parser.prog, f"--config={args.config}", *others]
  # A set of flags of its own, because absl's global one also holds those of imported libraries.
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values,
                                  sys_argv=line)
  try:
    strays = values(line)[1:]
    # The error of a config file that did not load is raised when the config is first read.
    values.config.keys()
  # ml_collections raises these two for an override of a key that the file lacks.
  except (AttributeError, KeyError) as error:
    key = re.search(r"\w+", str(error.args[0]))[0]
    # The error has the last name alone; the flag has those before it.
    found = [re.match(rf"--config\.((?:\w+\.)*{key})(?!\w)", word) for word in others]
    name = next((match[1] for match in found if match), key)
    fail(f"config has no key {name!r}: {_remedy(name, line[:2])}.")
  except (flags.Error, ValueError, OSError) as error:
    reason = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
    # The refusal of a config file's arguments is a sentence with its own remedy.
    fail(reason if reason.endswith(".") else f"{reason}: correct the command line.")
  if strays:
    fail(f"{strays[0]!r} is not a flag: write --config.KEY=VALUE.")
  if template:
    if "template" not in values.config:
      fail("config has no key 'template': --config.KEY=VALUE takes a key of the config file.")
    # The model's template says which arguments there are, so a config file need not have them.
    with values.config.unlocked():
      values.config.template = ConfigDict(dict(values.config.template) | template)
  return values.config, args


def _remedy(name: str, line: Sequence[str]) -> str:
  """The remedy for a dotted key that the config file lacks; `line` loads the file unchanged."""
  added = "optional, and a config file of your own adds it (docs/losses.md, 'A config of your own')"
  if not set(name.split(".")).isdisjoint(OPTIONAL_KEYS):
    return f"it is {added}"
  *path, last = name.split(".")
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=values,
                                  sys_argv=list(line))
  try:
    values(line)
    block = values.config
    for part in path:
      block = block[part]
    near = difflib.get_close_matches(last, [*block, *OPTIONAL_KEYS], n=1)
  # The file itself may have such an error, and a key on the way may hold no block.
  except (AttributeError, KeyError, TypeError):
    near = []
  if not near:
    return "--config.KEY=VALUE takes a key of the config file"
  nearest = f"the nearest is {'.'.join([*path, *near])!r}"
  return nearest if near[0] in block else f"{nearest}, which is {added}"


def _template_flags(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
  """(the words but for --config.template.NAME=VALUE, {name: value} of those).

  A value is JSON, or else a text: false is a boolean, and 26 Jul 2024 a text.
  """
  others = []
  found = {}
  following = iter(words)
  for word in following:
    match = re.fullmatch(r"--config\.template\.(\w+)(?:=(.*))?", word, re.DOTALL)
    if match is None:
      others.append(word)
      continue
    name, text = match.groups()
    # The value may be the next word.
    text = next(following, "") if text is None else text
    try:
      found[name] = json.loads(text)
    except ValueError:
      # Python's spelling, which other keys of a config take.
      found[name] = {"True": True, "False": False, "None": None}.get(text, text)
  return others, found


@contextlib.contextmanager
def naming_flags(flag_of: Mapping[str, str]) -> Iterator[None]:
  """Replaces fields by their flags in the message of an InputError that is raised within.

  Args:
    flag_of: {field: flag}. A field is a whole word, outside quotes and paths. One that is an
      English word, such as page, is replaced only where the message begins with it.
  """
  try:
    yield
  except InputError as error:
    fields = "|".join(field if "_" in field else f"^{field}" for field in flag_of)
    # A quoted value is matched first, as a whole, and stays. An apostrophe opens no quote.
    pattern = rf"""(?<!\w)'[^']*'|"[^"]*"|(?<![\w./\\-])({fields})(?![\w/\\-]|\.\w)"""
    raise InputError(re.sub(pattern, lambda match: flag_of.get(match[1], match[0]),
                            str(error))) from error


def check_output(path: str | os.PathLike) -> None:
  """Checks that the file of --out can be written, and leaves nothing behind.

  Raises:
    InputError: it cannot; says why.
  """
  text = os.fspath(path) or "."
  if "://" in text:
    raise InputError(f"--out is {text!r}, and samples and scores are written to a local file: "
                     "choose a path of this machine.")
  try:
    # Opening it raises every reason; a file that was not there must not be left behind.
    with contextlib.suppress(FileNotFoundError), open(text, "r+b"):
      pass
    writable.check_folder(pathlib.Path(text).absolute().parent)
  except OSError as error:
    raise InputError(f"{text} cannot be written ({error.strerror}): choose another --out."
                     ) from error


def check_workdir(path: str | os.PathLike) -> None:
  """Checks that files can be written to a --workdir, before anything is loaded.

  Raises:
    InputError: they cannot; says why.
  """
  text = os.fspath(path)
  if "://" in text:
    return  # an object store's first file tells
  folder = pathlib.Path(text).absolute()
  try:
    if folder.exists() and not folder.is_dir():
      raise InputError(f"--workdir={text} is a file: choose a folder.")
    writable.check_folder(folder)
  except OSError as error:
    raise InputError(f"--workdir={text} cannot be written ({error.strerror}): choose another "
                     "folder.") from error


_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of a GPU's memory; read when JAX starts its devices


def call(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
  """Runs a command; an error becomes one sentence and exit code 2, or 1 where a stage failed.

  With --debug the traceback of an unexpected error, or of a sentence's cause, is printed too.

  JAX then takes `chips.GPU_SHARE` of a GPU, and may pin nine tenths of the host's memory for GPUs,
  unless the environment has other values.
  """
  # JAX refuses an environment that has both of its names.
  if "XLA_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault(_SHARE, str(chips.GPU_SHARE))
  # JAX's default of 64 does not hold the optimizer of 8 B parameters with its guide. Memory is
  # pinned when it is used, so this reserves nothing.
  os.environ.setdefault(chips.HOST_POOL, str(max(chips.host_memory() * 9 // 10 // 2**30, 1)))
  global _debug
  _debug = "--debug" in argv
  try:
    main([word for word in argv if word != "--debug"])
  except (Exception, KeyboardInterrupt) as error:
    code, sentence = outcome(error)
    print(f"s2d_jax: {sentence}", file=sys.stderr)
    raise SystemExit(code) from error


def outcome(error: BaseException) -> tuple[int, str]:
  """(exit code, sentence) of what ended a command."""
  # Such as an error of a function of the task.
  if _debug and isinstance(error, InputError | WriteError) and error.__cause__ is not None:
    traceback.print_exception(error.__cause__)
  match error:
    case SystemExit():
      # `fail` has printed a sentence; a stop has saved.
      return error.code or 0, "it stopped"
    case InputError():
      return WRONG, str(error)
    case FloatingPointError() | WriteError():
      return FAILED, str(error)
    case KeyboardInterrupt():
      return _INTERRUPTED, "stopped by Ctrl-C. What was saved holds."
    case OSError() if error.errno in _DISK:
      return FAILED, (f"{error.filename or 'a file'} cannot be read or written ({error.strerror}): "
                      "permit it or mend the disk, and the same command goes on from what was "
                      "saved before.")
    case OSError() if error.errno in _WRITING:
      return FAILED, (f"{error.filename or 'a file'} cannot be written ({error.strerror}): free "
                      "space or mend the disk, and the same command goes on from what was saved "
                      "before.")
  return FAILED, _unexpected(error)


def _unexpected(error: BaseException) -> str:
  """The sentence of an error that is not the user's, whose traceback goes to a file."""
  first = str(error).strip().partition("\n")[0]
  name = f"an unexpected {type(error).__name__} ended the command ({first})"
  if _debug:
    traceback.print_exception(error)
    return f"{name}: its traceback is above. What was saved holds."
  # A long run may not meet it again, so the traceback is stored and not only shown on request.
  try:
    with tempfile.NamedTemporaryFile("w", prefix="s2d_jax-", suffix=".txt", delete=False) as file:
      traceback.print_exception(error, file=file)
  except OSError as failure:  # a full disk
    return (f"{name}: its traceback could not be written to a file ({failure.strerror}), and "
            "--debug prints it. What was saved holds.")
  return f"{name}: its traceback is in {file.name}, and --debug prints it. What was saved holds."


def fail(sentence: str, code: int = WRONG) -> NoReturn:
  """Prints a sentence on standard error and exits."""
  print(f"s2d_jax: {sentence}", file=sys.stderr)
  sys.exit(code)
