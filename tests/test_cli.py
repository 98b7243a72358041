"""`s2d-jax`: each command's help, the diagnosis of a sound config, and one sentence for another."""

import errno
import importlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

from configs import arithmetic
from s2d_jax import chips, cli, command, main, supervisor
from s2d_jax.errors import InputError, WriteError, from_user_code

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data):
  config = arithmetic.get_config()
  config.data.dir = data
  return config


@pytest.mark.parametrize("environment, expected", [
    ({}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
    ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),
])
def test_a_command_lets_jax_take_a_share_of_a_gpu_unless_the_environment_says_one(
    monkeypatch, environment, expected):
  names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
  for name in names:
    # Set first, so that the value of before comes back after the test.
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  found = []
  command.call(lambda argv: found.append({name: os.environ[name] for name in names
                                          if name in os.environ}), [])
  assert found == [expected]


@pytest.mark.parametrize("environment, expected", [({}, "115"), ({chips.HOST_POOL: "7"}, "7")])
def test_a_command_lets_jax_pin_most_of_the_hosts_memory(monkeypatch, environment, expected):
  monkeypatch.setattr(chips, "host_memory", lambda: 128 * 2**30)
  monkeypatch.setenv(chips.HOST_POOL, "")
  monkeypatch.delenv(chips.HOST_POOL)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  found = []
  command.call(lambda argv: found.append(os.environ[chips.HOST_POOL]), [])
  assert found == [expected]


@pytest.mark.medium
def test_diagnosis_lists_models_problems_and_chains(config):
  text = main.diagnosis(config)
  for role in ("teacher", "student"):
    folder = ROOT / "s2d_jax" / "assets" / "arithmetic" / role
    assert re.search(rf"^{role}: {re.escape(str(folder))} \([0-9a-f]{{12}}\)$", text, re.M)
  # "12+34+56+78" between <|user|> and <|assistant|>: 13 tokens, one a character.
  split = r"^(\w+): (\d+) problems, prompts of at most 13 tokens; the window is 13$"
  found = {name: int(count) for name, count in re.findall(split, text, re.M)}
  assert found["1h"] + found["2h"] == 2048 and abs(found.pop("1h") - found.pop("2h")) < 200
  assert found == {"labelled": 2048, "all": 2048, "validation": 256, "test": 512}
  assert re.search(r"^test: content [0-9a-f]{12}, 0 of 512 problems are labelled ones$", text, re.M)
  assert re.sub("-[0-9a-f]{12}", "", text).splitlines()[-5:] == [
      "untrained: nothing to train",
      "cold_grpo: student_grpo",
      "raw_bridge: forward_kl -> reverse_kl",
      "bridge: teacher_grpo -> forward_kl -> reverse_kl",
      "half_bridge_grpo_2h: teacher_grpo -> forward_kl -> reverse_kl -> student_grpo"]


@pytest.mark.medium
@pytest.mark.parametrize(("key", "value", "sentence"), [
    ("remat", "auto", "config.remat is auto, and a cpu does not tell how much memory it has: "),
    ("mesh", (1, 64, 1), "config.mesh "),
    ("sweep", ({"remat": "auto"},), "config.remat is auto, and a cpu does not tell ")])
def test_diagnosis_names_a_setting_that_these_devices_lack(config, key, value, sentence):
  assert "would stop" not in main.diagnosis(config)
  with config.ignore_type(), config.unlocked():
    config[key] = value
  assert f"\ns2d-jax run would stop on this machine: {sentence}" in main.diagnosis(config)


def test_every_run_of_a_sweep_is_checked(config):
  with config.unlocked():
    config.sweep = ({"seed": 1}, {"arms": "nope"})
  with pytest.raises(ValueError, match="there is no arm 'nope'"):
    main.diagnosis(config)


@pytest.mark.parametrize("key, value, message", [
    ("arms", "nope", "there is no arm 'nope': choose config.arms from untrained, "),
    ("task", "chess", "config.task is 'chess': choose arithmetic or math or word_problems or "
     "composition, "),
    ("teacher", "nowhere", "nowhere is not a folder: "),
    ("prompt_tokens", 12, "takes 13 tokens and its window is 12: raise config.prompt_tokens."),
])
def test_a_wrong_config_exits_with_one_sentence(config, capsys, key, value, message):
  config[key] = value
  with pytest.raises(SystemExit) as error:
    command.call(lambda argv: main.diagnosis(config), [])
  assert error.value.code == 2
  sentence = capsys.readouterr().err.rstrip("\n")
  assert re.fullmatch(r"s2d_jax: [^\n]+[:,;] [^\n]+\.", sentence) and message in sentence
  assert not re.search(r"[.!?] +[A-Z]", sentence)


@pytest.mark.medium
def test_the_command_prints_the_sentence_alone(data):
  done = subprocess.run(
      [sys.executable, "-c", "from s2d_jax import cli; cli.main()", "doctor",
       "--config=configs/arithmetic.py:tiny", f"--config.data.dir={data}", "--config.arms=nope"],
      cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
      env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"})
  assert done.returncode != 0 and done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith("s2d_jax: there is no arm 'nope': choose config.arms from untrained, ")


def console(*words, env=None):
  """A finished `s2d-jax WORDS`, in a process of its own."""
  return subprocess.run([sys.executable, "-c", "from s2d_jax import cli; cli.main()", *words],
                        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=env)


def test_an_unexpected_error_where_the_disk_is_full_is_one_sentence(capsys, monkeypatch):
  def fails(argv):
    raise KeyError("no such weight")

  monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
  with pytest.raises(SystemExit):
    command.call(fails, [])
  assert capsys.readouterr().err == (
      "s2d_jax: an unexpected KeyError ended the command ('no such weight'): its traceback could "
      "not be written to a file (No such file or directory), and --debug prints it. What was saved "
      "holds.\n")


def test_an_unexpected_error_is_one_sentence_with_a_file_of_its_traceback(capsys):
  def fails(argv):
    raise KeyError(f"no such weight, and a second line\n{argv}")

  with pytest.raises(SystemExit) as error:
    command.call(fails, [])
  (line,) = capsys.readouterr().err.splitlines()
  found = re.fullmatch(
      r"s2d_jax: an unexpected KeyError ended the command \('no such weight, and a second .*\): "
      r"its traceback is in (\S+), and --debug prints it. What was saved holds.", line)
  path = pathlib.Path(found[1])
  text = path.read_text()
  path.unlink()
  assert error.value.code == 1 and "in fails" in text and text.startswith("Traceback")
  # The flag is not among those that the command gets.
  with pytest.raises(SystemExit):
    command.call(fails, ["--x", "--debug"])
  printed = capsys.readouterr().err
  assert "in fails" in printed and "['--x']" in printed and "its traceback is above" in printed


@pytest.mark.parametrize("error, code, said", [
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C. What was saved holds."),
    (OSError(errno.ENOSPC, "No space left on device", "w/a.json"), 1,
     "w/a.json cannot be written (No space left on device): free space or mend the disk, an"),
    (OSError(errno.EFBIG, "File too large", "w/a.json"), 1,
     "w/a.json cannot be written (File too large): free space or mend the disk, an"),
    (PermissionError(errno.EACCES, "Permission denied", "data/test.jsonl"), 1,
     "data/test.jsonl cannot be read or written (Permission denied): permit it or mend the di"),
    (OSError(errno.EIO, "Input/output error", "data/test.jsonl"), 1,
     "data/test.jsonl cannot be read or written (Input/output error): permit it or mend the di"),
    (FloatingPointError("a loss is not finite: lower the rate."), 1, "a loss is not finite: "),
    (WriteError("a.json cannot be written: free space."), 1, "a.json cannot be written: "),
])
def test_errors_of_a_run_have_a_sentence_and_a_code(error, code, said, capsys):
  def fails(argv):
    raise error

  with pytest.raises(SystemExit) as stopped:
    command.call(fails, [])
  (line,) = capsys.readouterr().err.splitlines()
  assert stopped.value.code == code and line.startswith(f"s2d_jax: {said}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_a_screen_and_ends_with_an_example(name, capsys):
  module, function, _ = cli.COMMANDS[name]
  with pytest.raises(SystemExit) as error:
    getattr(importlib.import_module(module), function)(["--help"])
  lines = capsys.readouterr().out.splitlines()
  assert error.value.code == 0 and len(lines) <= 24 and max(map(len, lines)) <= 100
  assert lines[-1].startswith(f"example: s2d-jax {name} ") and lines[-2] == ""
  described = [line for line in lines if re.match(r"  (--[a-z-]+|WORKDIR)( \S+)?( {2,}|$)", line)]
  assert len(described) == len([line for line in lines if line.startswith("  ")]) > 0


def test_help_and_an_unknown_command_print_the_list_of_commands(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["s2d-jax", "--help"])
  cli.main()
  text = capsys.readouterr().out
  assert text == cli.usage() + "\n" and len(text.splitlines()) <= 24
  for words, sentence in ((["trian"], "there is no command 'trian'"), ([], "no command was given")):
    monkeypatch.setattr(sys, "argv", ["s2d-jax", *words])
    with pytest.raises(SystemExit) as error:
      cli.main()
    assert error.value.code == 2  # a wrong request, as docs/run.md has it
    assert capsys.readouterr().err == f"{text}s2d_jax: {sentence}: choose one of these.\n"


@pytest.mark.parametrize("argv, message", [
    (["run", "--config=configs/arithmetic.py:tiny"], "missing: --workdir: s2d-jax run --help has"),
    (["run", "--workdir", "x"], "missing: --config: "),
    (["export", "--workdir=x", "--stage", "y"], "missing: --out: "),
    (["export", "--workdir=x", "--stage=y", "--out=z", "--dtype=int8"], "argument --dtype: "),
    (["export", "--workdir=x", "--stage=y", "--out=z"],
     "x has no finished stage: run its recipe first."),
    (["report", "nowhere"], "nowhere is not a folder: name the --workdir of a run."),
])
def test_a_wrong_command_line_exits_with_one_sentence(argv, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["s2d-jax", *argv])
  monkeypatch.setattr(supervisor, "begin", lambda argv: None)  # pytest has handlers of its own
  with pytest.raises(SystemExit) as error:
    cli.main()
  (line,) = capsys.readouterr().err.splitlines()
  assert error.value.code == 2 and line.startswith("s2d_jax: ") and message in line


@pytest.mark.parametrize("message, named", [
    ("max_tokens is 0: lower it.", "--max-tokens is 0: lower it."),
    ("the model's cache_gib is 1: lower max_tokens.", "the model's --cache-gib is 1: lower "
     "--max-tokens."),
    ("page is 3, and a page of it", "--page is 3, and a page of it"),
    # Paths and quoted values are a user's own text.
    ("runs/max_tokens/x.json is missing", "runs/max_tokens/x.json is missing"),
    ("max_tokens/hf is missing", "max_tokens/hf is missing"),
    ("max_tokens.json, a-max_tokens missing", "max_tokens.json, a-max_tokens missing"),
    ("the set 'a max_tokens b' is empty", "the set 'a max_tokens b' is empty"),
    ('the set "max_tokens" is empty', 'the set "max_tokens" is empty'),
    ("page/hf is missing", "page/hf is missing"),
    ("max_tokens_each is 3", "max_tokens_each is 3"),
])
def test_fields_become_flags_outside_paths_and_quotes(message, named):
  flags = {"max_tokens": "--max-tokens", "cache_gib": "--cache-gib", "page": "--page"}
  with pytest.raises(ValueError) as error, command.naming_flags(flags):
    raise InputError(message)
  assert str(error.value) == named


# ml_collections loads config files by importlib's old name.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_flags_take_a_space_or_an_equals_sign():
  parser = command.config_parser("x", "", "")
  parser.add_argument("--workdir")
  parsed = []
  for line in (["--config=configs/arithmetic.py:tiny", "--workdir=w", "--config.seed=3"],
               ["--workdir", "w", "--config", "configs/arithmetic.py:tiny", "--config.seed", "3"]):
    config, args = command.parse_config(parser, line)
    parsed.append((config.to_dict(), config.is_locked, vars(args)))
  assert parsed[0][0] == parsed[1][0] and parsed[0][0]["seed"] == 3
  assert parsed[0][1] and parsed[1][1]
  assert [args["workdir"] for _, _, args in parsed] == ["w", "w"]


@pytest.mark.medium
def test_a_plan_moves_no_folder(data, tmp_path):
  file = tmp_path / "sft-1" / "ledger.json"
  file.parent.mkdir()
  file.write_text("{}")
  done = console("run", "--config=configs/arithmetic.py:tiny", f"--config.data.dir={data}",
                 f"--workdir={tmp_path}", "--plan", "--redo=sft-1",
                 env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"})
  assert done.returncode == 0 and "distinct stages, 0 of them finished" in done.stdout, done.stderr
  assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.medium
@pytest.mark.parametrize("under, reason", [
    ("", "is a file: choose a folder."),
    ("/work", "cannot be written (Not a directory): choose another folder.")])
def test_a_work_folder_is_refused_before_a_model_is_looked_for(under, reason, tmp_path):
  (tmp_path / "file").write_text("")
  done = console("run", "--config=configs/arithmetic.py:tiny", "--config.teacher=nowhere",
                 f"--workdir={tmp_path}/file{under}",
                 env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"})
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr == f"s2d_jax: --workdir={tmp_path}/file{under} {reason}\n"


@pytest.mark.medium
def test_an_absent_optional_library_prints_no_warning():
  assert console("doctor", "--help").stderr == ""


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("flags, expected", [
    (["--config.template.date_string=26 Jul 2024"], {"date_string": "26 Jul 2024"}),
    (["--config.template.date_string", "26 Jul 2024"], {"date_string": "26 Jul 2024"}),
    (["--config.template.enable_thinking=false"], {"enable_thinking": False}),
    (["--config.template.enable_thinking=True"], {"enable_thinking": True}),
    (['--config.template.effort="low"', "--config.template.n=3"], {"effort": "low", "n": 3}),
    (["--config.template.a=1", "--config.template.a=x=y"], {"a": "x=y"}),
    (["--config.template.tools=[]"], {"tools": []}), (["--config.template.a="], {"a": ""}),
    ([], {}),
])
def test_arguments_of_a_template_need_not_stand_in_the_config(flags, expected):
  parser = command.config_parser("doctor", "Checks.", "s2d-jax doctor")
  config, _ = command.parse_config(parser, ["--config=configs/arithmetic.py", *flags])
  template = config.template.to_dict()
  assert {name: list(x) if isinstance(x, tuple) else x for name, x in template.items()} == expected
  assert config.is_locked


def test_debug_shows_where_a_function_of_the_task_failed(capsys):
  def reward(text):
    return {}[text]

  def fails(argv):
    with from_user_code("the task's reward"):
      reward("answer")

  for words, shown in (([], False), (["--debug"], True)):
    with pytest.raises(SystemExit) as exits:
      command.call(fails, words)
    printed = capsys.readouterr().err
    assert exits.value.code == 2
    assert "the task's reward failed (KeyError: 'answer'): mend it." in printed
    assert ("in reward" in printed) == shown
