"""The command line: every mistake is one sentence and exit code 2, and nothing is written."""

import json
import os
import socket
import time

import pytest

from configs import arithmetic
from s2d_jax import doctor, evals, keys, recipe, tasks
from s2d_jax.command import OPTIONAL_KEYS
from tests import interpreter


def run(module, *flags):
  done = interpreter.run("-m", module, *flags, seconds=120,
                         env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"})
  return done.returncode, [line for line in done.stderr.splitlines() if "s2d_jax: " in line]


@pytest.mark.medium
@pytest.mark.parametrize("flag, message", [
    ("--config.foo=1", "config has no key 'foo'"),
    ("--config.stages.reverse_kl.optim.lrr=1", "config has no key 'stages.reverse_kl.optim.lrr': "
     "the nearest is 'stages.reverse_kl.optim.lr'."),
    ("--config.stages.sft.kep=right", "config has no key 'stages.sft.kep': the nearest is "
     "'stages.sft.keep', which is optional"),
    ("--config.stages.sft.keep=right", "config has no key 'stages.sft.keep': it is optional, and a "
     "config file of your own adds it (docs/losses.md"),
    ("--config.stages.reverse_kl.foresee.candidates=3", "no key 'stages.reverse_kl.foresee': it is "
     "optional"),
    ("--config.stages.sft.steps.x=3", "--config.KEY=VALUE takes a key of the config file"),
    ("--config.seed=abc", "config.seed=abc"),
    ("stray", "is not a flag"),
    ("--config=configs/arithmetic.py:tinny",
     "'tinny' is unknown: use seed, cold_teacher, same_size, tiny"),
    ("--config=configs/none.py", "--config names 'configs/none.py', which is not a file in /"),
    ("--config.arms=nope", "there is no arm 'nope': choose config.arms from"),
    ("--config.task=chess", "config.task is 'chess': choose arithmetic or math"),
    ("--config.mesh=(64, 64, 64)", "config.mesh is (64, 64, 64), which needs 262144 devices"),
    ("--config.teacher=nowhere", "nowhere is not a folder"),
])
def test_a_mistake_prints_one_sentence_and_writes_nothing(tmp_path, flag, message):
  code, lines = run("s2d_jax.main", "--config=configs/arithmetic.py:tiny",
                    f"--config.data.dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'work'}",
                    flag)
  assert code == 2 and len(lines) == 1 and message in lines[0], (code, lines)
  assert not (tmp_path / "work").exists()


def test_the_optional_keys_are_those_of_the_records():
  records = [*map(doctor.stage_keys, recipe.STAGES), evals.PROBE_KEYS, evals.EVALUATION_KEYS,
             doctor.CONFIG_KEYS]
  found = {name for record in records for name, key in record.items()
           if isinstance(key, keys.Optional) or isinstance(key, keys.Key) and key.optional}
  # `offload` may be absent from a config too, but shipped ones have it.
  assert found == {*OPTIONAL_KEYS, "offload"}


@pytest.mark.medium
@pytest.mark.parametrize("key", ["mesh", "task", "arms"])
def test_a_config_file_without_a_key_is_refused(tmp_path, key):
  file = tmp_path / "short.py"
  file.write_text("from configs import arithmetic\ndef get_config():\n"
                  "  config = arithmetic.get_config('tiny').unlock()\n"
                  f"  del config[{key!r}]\n  return config\n")
  code, lines = run("s2d_jax.main", f"--config={file}", f"--workdir={tmp_path / 'work'}")
  assert code == 2 and lines == [f"s2d_jax: config lacks the key {key!r}: add it "
                                 "(configs/arithmetic.py has them all)."], (code, lines)
  assert not (tmp_path / "work").exists()


@pytest.mark.medium
def test_a_second_writer_is_refused_with_one_sentence(tmp_path):
  flags = ("--config=configs/arithmetic.py:tiny", "--config.arms=cold_grpo",
           f"--config.data.dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'work'}")
  config = arithmetic.get_config("tiny")
  with config.unlocked():
    config.arms, config.data.dir = "cold_grpo", str(tmp_path / "data")
  (name,) = recipe.plan(config, tasks.get(config)).nodes
  (tmp_path / "work" / name).mkdir(parents=True)
  (tmp_path / "work" / name / "writer.lock").write_text(
      json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "beat": time.time()}))
  code, lines = run("s2d_jax.main", *flags)
  assert code == 2 and len(lines) == 1
  assert f"is being written by process {os.getpid()} on" in lines[0]


@pytest.mark.medium
@pytest.mark.parametrize("command", ["doctor", "preflight"])
def test_doctor_and_preflight_refuse_an_unknown_key_as_run_does(command):
  program = f"import sys; sys.argv[1:1] = [{command!r}]; from s2d_jax import cli; cli.main()"
  done = interpreter.run("-c", program, "--config=configs/arithmetic.py:tiny", "--config.foo=1",
                         seconds=120)
  assert done.returncode == 2 and "s2d_jax: config has no key 'foo'" in done.stderr


@pytest.mark.medium
def test_the_console_entry_point_lists_its_commands():
  done = interpreter.run("-c", "from s2d_jax import cli; cli.main()", seconds=120)
  assert done.returncode == 2
  for command in ("run", "report", "preflight", "doctor"):
    assert f"  {command} " in done.stderr
