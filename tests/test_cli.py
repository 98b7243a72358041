"""`s2d-jax doctor`: what it says of a sound config, and its one sentence for another."""

import pathlib
import re
import subprocess
import sys

import pytest

from configs import arithmetic
from s2d_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data):
  made = arithmetic.get_config()
  made.data.dir = data
  return made


@pytest.mark.medium
def test_diagnosis_lists_models_problems_and_chains(config):
  text = cli.diagnosis(config)
  for role in ("teacher", "student"):
    folder = ROOT / "s2d_jax" / "assets" / "arithmetic" / role
    assert re.search(rf"^{role}: {re.escape(str(folder))} \([0-9a-f]{{12}}\)$", text, re.M)
  # "12+34+56+78" between <|user|> and <|assistant|>: 13 tokens, one a character.
  split = r"^(\w+): (\d+) problems, prompts of at most 13 tokens; the window is 13$"
  found = {name: int(count) for name, count in re.findall(split, text, re.M)}
  assert found["1h"] + found["2h"] == 2048 and abs(found.pop("1h") - found.pop("2h")) < 200
  assert found == {"labelled": 2048, "all": 2048, "validation": 256, "test": 512}
  assert re.sub("-[0-9a-f]{12}", "", text).splitlines()[-5:] == [
      "untrained: nothing to train",
      "cold_grpo: student_grpo",
      "raw_bridge: forward_kl -> reverse_kl",
      "bridge: teacher_grpo -> forward_kl -> reverse_kl",
      "half_bridge_grpo_2h: teacher_grpo -> forward_kl -> reverse_kl -> student_grpo"]


def test_every_run_of_a_sweep_is_checked(config, capsys):
  with config.unlocked():
    config.sweep = ({"seed": 1}, {"arms": "nope"})
  with pytest.raises(SystemExit):
    cli.diagnosis(config)
  assert "there is no arm 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize("key, value, said", [
    ("arms", "nope", "there is no arm 'nope': choose config.arms from untrained, "),
    ("task", "chess", "config.task is 'chess': choose arithmetic or math, "),
    ("teacher", "nowhere", "nowhere is not a folder: "),
    ("prompt_tokens", 12, "takes 13 tokens and its window is 12: raise config.prompt_tokens."),
])
def test_a_wrong_config_ends_in_one_sentence(config, capsys, key, value, said):
  config[key] = value
  with pytest.raises(SystemExit) as error:
    cli.diagnosis(config)
  assert error.value.code == 2
  sentence = capsys.readouterr().err.rstrip("\n")
  assert re.fullmatch(r"s2d_jax: [^\n]+[:,;] [^\n]+\.", sentence) and said in sentence
  assert not re.search(r"[.!?] +[A-Z]", sentence)


@pytest.mark.medium
def test_the_command_says_the_sentence_and_no_more(data):
  done = subprocess.run(
      [sys.executable, "-c", "from s2d_jax import cli; cli.main()", "doctor",
       "--config=configs/arithmetic.py:tiny", f"--config.data.dir={data}", "--config.arms=nope"],
      cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
      env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"})
  assert done.returncode != 0 and done.stdout == ""
  (line,) = done.stderr.splitlines()
  assert line.startswith("s2d_jax: there is no arm 'nope': choose config.arms from untrained, ")
