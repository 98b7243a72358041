"""`s2d-jax sample`: whole lines, with every row once, after a kill at any moment."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from configs import arithmetic
from s2d_jax import chat, evaluate, recipe, tasks
from s2d_jax import command as command_line
from s2d_jax.assets import tokenizer
from s2d_jax.data import jsonl
from s2d_jax.errors import InputError
from s2d_jax.sampler import __main__ as offline

ROOT = pathlib.Path(__file__).parents[2]
TEACHER = ROOT / "s2d_jax" / "assets" / "arithmetic" / "teacher"
PROBLEMS = [f"{a}+{b}+{c}" for a, b, c in zip(range(10, 50), range(50, 90), range(30, 70),
                                              strict=True)]


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text("".join(json.dumps({"problem": p, "id": 7 * i}) + "\n"
                          for i, p in enumerate(PROBLEMS)))
  return path


def command(prompts, out, **flags):
  flags = {"model": TEACHER, "prompts": prompts, "out": out, "n": 3, "temperature": 0.7,
           "max-tokens": 24, "seed": 1} | flags
  return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def rows(out):
  return {(row["id"], row["sample"]): row for row in map(json.loads, out.read_text().splitlines())}


@pytest.mark.medium
def test_a_killed_run_continues(prompts, tmp_path):
  whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
  offline.main(command(prompts, whole))
  want = rows(whole)
  assert want.keys() == {(7 * i, g) for i in range(40) for g in range(3)}
  lines = whole.read_bytes()
  assert lines.count(b"\n") == 120
  # Killed for good once some rows are there; then a line that was cut off is left behind too.
  process = subprocess.Popen([sys.executable, "-m", "s2d_jax.sampler", *command(prompts, out),
                              "--cache-gib", "0.0004"], cwd=ROOT, stderr=subprocess.DEVNULL)
  until = time.monotonic() + 120
  while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 5):
    assert time.monotonic() < until
    time.sleep(0.002)
  os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
  process.wait()
  there = out.read_bytes()
  out.write_bytes(there[: there.rfind(b"\n") - 7])
  assert 4 < out.read_bytes().count(b"\n") < 120
  offline.main(command(prompts, out))
  assert out.read_bytes().count(b"\n") == 120
  got = rows(out)
  assert got.keys() == want.keys()
  for key, row in want.items():
    assert got[key]["tokens"] == row["tokens"] and got[key]["response"] == row["response"]
    assert got[key]["logp"] == pytest.approx(row["logp"], abs=1e-5)
  before = out.read_bytes()
  offline.main(command(prompts, out))  # nothing is left to do
  assert out.read_bytes() == before
  longer = tmp_path / "more.jsonl"
  longer.write_bytes(before)
  longer.with_name("more.jsonl.settings.json").write_bytes(
      out.with_name("out.jsonl.settings.json").read_bytes())
  offline.main(command(prompts, longer, n=4))  # more samples of each
  assert rows(longer).keys() == {(7 * i, g) for i in range(40) for g in range(4)}


@pytest.mark.medium
def test_pages_hold_the_same_rows(prompts, tmp_path):
  one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
  offline.main(command(prompts, one, n=2, **{"compilation-cache": tmp_path / "programs"}))
  assert len(list(tmp_path.glob("programs/cpu-*/jit_decode*"))) > 0  # stored as a run's are
  offline.main(command(prompts, other, n=1, page=16))
  offline.main(command(prompts, other, n=2, page=16))  # a part of the rows
  got, want = rows(other), rows(one)
  assert got.keys() == want.keys()
  assert all(got[key]["tokens"] == row["tokens"] for key, row in want.items())


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text(json.dumps({"messages": [{"role": "user", "content": "1+2"}]}) + "\n")
  folder = tmp_path / "model"
  tokenizer.write(folder, max_length=64)
  with open(folder / "chat_template.jinja", "a") as template:
    template.write("{% if messages[0].content == '1+2' %}"
                   "{{ raise_exception('roles must alternate') }}{% endif %}")
  with pytest.raises(ValueError, match="line 1 is not a chat that .* takes .roles must altern"):
    offline.read(path, chat.Chat(folder))


@pytest.mark.medium
def test_the_output_is_an_input_of_teacher_sft(prompts, tmp_path):
  out, data = tmp_path / "out.jsonl", tmp_path / "data.jsonl"
  offline.main(command(prompts, out, n=2))
  data.write_text("".join(json.dumps({"problem": p, "id": 7 * i, "answer": "1"}) + "\n"
                          for i, p in enumerate(PROBLEMS)))
  found, loaded = jsonl.solved(jsonl.rows(data), out), chat.Chat(TEACHER)
  samples_of = rows(out)
  for row in found:
    samples = [samples_of[row["id"], g] for g in range(2)]
    finished = [s for s in samples if s["finish"] == "stop"]
    assert row.get("solution") == (finished[0]["response"] if finished else None)
    if finished:  # encoding the text again gives the sampled ids
      assert loaded.encode_response(row["solution"]) == finished[0]["tokens"]


@pytest.mark.medium
def test_a_stop_string_ends_a_response(prompts, tmp_path):
  out = tmp_path / "out.jsonl"
  offline.main(command(prompts, out, n=1, stop="=4"))
  texts = [row["response"] for row in rows(out).values()]
  assert any(text.endswith("=4") for text in texts)
  assert all("=4" not in text[:-1] for text in texts)


@pytest.mark.parametrize("line, flags, words", [
    ('{"problem": "1+2"}\n{"problem": "1+2"}', {}, "prompts.jsonl line 2 has id .* each once"),
    ('{"answer": "3"}', {}, 'line 1 is not a JSON object with "problem", a text, or "messages"'),
    ('{"problem": 3, "id": 1}', {}, 'line 1 is not a JSON object with "problem", a text'),
    ('{"messages": [3]}', {}, "line 1 is not a JSON object"),
    ('{"messages": [{"content": "1+2"}]}', {}, "line 1 is not a JSON object"),
    ('{"problem": "1+2"}', {"cache-gib": "inf"}, "--cache-gib is inf"),
    ('{"problem": "1+2"}', {"compilation-cache": "/dev/null/x"},
     "^--compilation-cache is '/dev/null/x': name a folder that can be written, or choose 'auto'"),
    ('{"problem": "1+2"}', {"mesh": "a,1,1"}, "--mesh is a,1,1: choose sizes such as 1,4,1"),
    ('{"problem": "1+2"}', {"mesh": "1,1"}, "--mesh is .1, 1., which .*: choose three"),
    ('{"problem": "1+2"}', {"temperature": "nan"}, "--temperature is nan"),
    ('{"problem": "1+2"}', {"stop": "<|end|>"}, "'<.end.>', a special token of"),
    ('{"problem": "1+2"}', {"cache-gib": 1e-9},
     "--cache-gib is 1e-09, and one row of .* raise it, or lower --max-tokens"),
    ("", {}, "has no prompts"),
    ('{"problem": "1+2"}', {"n": 0}, "--n is 0: set it to a whole number of at least 1"),
    ('{"problem": "1+2"}', {"temperature": -1}, "--temperature is -1.0"),
    ('{"problem": "1+2"}', {"min-tokens": 9, "max-tokens": 3},
     "^--min-tokens is 9: choose at most --max-tokens, 3"),
    ('{"problem": "1+2"}', {"stop": ""}, "^--stop is .*, none of them empty"),
    ('{"problem": "1+2", "id": 4}', {"max-tokens": 10_000}, "prompt 4 has 5 tokens and with 10000"),
])
def test_a_wrong_request_is_refused_before_anything_is_written(line, flags, words, tmp_path):
  path, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "out.jsonl"
  path.write_text(line)
  with pytest.raises(ValueError, match=words):
    offline.main(command(path, out, **flags))
  assert not out.parent.exists()


@pytest.fixture(scope="module", params=["norm", "head"])
def damaged(request, tmp_path_factory):
  """The student's folder, with NaN in its last norm's scale or one infinite row of the head."""
  folder = tmp_path_factory.mktemp("damaged") / "model"
  shutil.copytree(TEACHER.with_name("student"), folder)
  (folder / "SHA256SUMS").unlink()
  path = folder / "model.safetensors"
  weights = {name: x.copy() for name, x in safetensors.numpy.load_file(path).items()}
  if request.param == "norm":
    weights["model.norm.weight"][:] = np.nan
  else:
    weights["model.embed_tokens.weight"][7] = np.inf  # tied: the head's row too
  safetensors.numpy.save_file(weights, path, {"format": "pt"})
  return folder


@pytest.mark.medium
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_samples_that_are_not_finite_stop_the_command(damaged, temperature, prompts, tmp_path,
                                                      capsys):
  out = tmp_path / "out.jsonl"
  with pytest.raises(SystemExit) as error:
    command_line.call(offline.main, command(prompts, out, model=damaged, temperature=temperature))
  sentence = capsys.readouterr().err.splitlines()[-1]
  assert error.value.code == command_line.FAILED
  assert sentence.startswith(f"s2d_jax: {damaged}: sample ") and " of prompt " in sentence
  assert "log-probability that is not finite" in sentence
  assert out.read_text() == ""


@pytest.mark.medium
def test_an_evaluation_of_weights_that_are_not_finite_stops(damaged, tmp_path):
  with pytest.raises(FloatingPointError, match=f"{damaged}: sample . of prompt .* not finite"):
    evaluate.main(["--model", str(damaged), "--task=arithmetic", f"--data={tmp_path / 'data'}",
                   "--sets=validation", "--max-tokens=4"])


@pytest.mark.medium
def test_an_untrained_arm_that_is_not_finite_gets_no_score(damaged, tmp_path):
  config = arithmetic.get_config("tiny")
  config.student, config.arms, config.data.dir = str(damaged), "untrained", str(tmp_path)
  with pytest.raises(FloatingPointError, match=f"{damaged}: sample . of prompt .* not finite"):
    recipe.run(config, tmp_path / "work", tasks.get(config))
  assert not list((tmp_path / "work").glob("**/result.json"))


@pytest.mark.parametrize("program", ["sample", "eval"])
def test_a_token_without_an_embedding_is_refused(program, prompts, tmp_path):
  folder = shutil.copytree(TEACHER, tmp_path / "model")
  path = folder / "tokenizer.json"
  words = json.loads(path.read_text())
  words["added_tokens"].append({"id": 24, "content": "<|new|>", "special": False,
                                "single_word": False, "lstrip": False, "rstrip": False,
                                "normalized": False})
  path.write_text(json.dumps(words))
  with pytest.raises(ValueError, match=f"{folder} has the token id 24 and its model embeds 24 tok"):
    if program == "sample":
      offline.main(command(prompts, tmp_path / "new" / "out.jsonl", model=folder))
    else:
      evaluate.main(["--model", str(folder), "--task=arithmetic", f"--data={tmp_path / 'data'}",
                     "--sets=validation"])
  assert not (tmp_path / "new").exists()


def test_other_settings_and_another_writer_are_refused(prompts, tmp_path):
  out = tmp_path / "out.jsonl"
  def write(**settings):
    with offline.only_writer(out, {"seed": 1, "dtype": "float32"} | settings):
      out.write_text("")
  write()
  write()
  with pytest.raises(ValueError, match="was sampled with another seed, or without"):
    write(seed=2)
  with offline.only_writer(out, {"seed": 1, "dtype": "float32"}):
    with pytest.raises(ValueError, match="is being written by another process"):
      write()
  out.with_name("out.jsonl.settings.json").write_text('{"seed": 1')
  with pytest.raises(InputError, match="out.jsonl.settings.json is not JSON .*: choose another"):
    write()
  out.with_name("out.jsonl.settings.json").unlink()
  with pytest.raises(ValueError, match="another dtype and seed, or without out.jsonl.settings"):
    write()


def test_a_damaged_line_is_named(prompts, tmp_path):
  out = tmp_path / "out.jsonl"
  for damaged in ("{", '{"id": 1}', "3", '{"id": 1, "prompt": "00", "sample": "0"}',
                  '{"id": 1, "prompt": "00", "sample": 0, "logp": [NaN]}',
                  '{"id": [1], "prompt": "00", "sample": 0}', '{"id": 1, "sample": 0}',
                  '{"id": 1, "prompt": "00", "sample": 0, "sample": 1}',
                  '{"id": true, "prompt": "00", "sample": 0}', "[" * 3000):
    out.write_text('{"id": 0, "prompt": "00", "sample": 0}\n' + damaged + "\n{\"cut")
    before = out.read_bytes()
    with pytest.raises(ValueError, match="out.jsonl line 2 is not a sample: take the line out"):
      offline.existing_rows(out, [])
    assert out.read_bytes() == before


def test_a_sample_that_comes_twice_is_named(prompts, tmp_path):
  out = tmp_path / "out.jsonl"
  out.write_text('{"id": 3, "prompt": "00", "sample": 0}\n' * 2)
  with pytest.raises(InputError, match="out.jsonl line 2 has sample 0 of the id 3 again: take the"):
    offline.existing_rows(out, [])


@pytest.mark.parametrize("out", ["", "folder",
                                 "file/x.jsonl", "/proc/x.jsonl", "/dev/null/a/x.jsonl",
                                 "gs://bucket/x.jsonl", "y.jsonl", "x" * 300])
def test_a_place_that_cannot_be_written_is_refused(out, prompts, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("1")
  (tmp_path / "folder").mkdir()
  (tmp_path / "y.jsonl.settings.json").mkdir()
  before = sorted(tmp_path.rglob("*"))
  monkeypatch.setattr("s2d_jax.models.hf.load", None)
  with pytest.raises(InputError, match="cannot be written|--out is 'gs:"):
    offline.main(command(prompts, out if "://" in out else tmp_path / out))
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.medium
def test_another_problem_under_an_old_id_is_refused(prompts, tmp_path):
  out = tmp_path / "out.jsonl"
  offline.main(command(prompts, out, n=1))
  prompts.write_text(prompts.read_text().replace("10+50+30", "11+50+30"))
  with pytest.raises(ValueError, match="samples of another prompt with the id 0"):
    offline.main(command(prompts, out, n=2))


def test_lines_end_with_newlines_alone(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text(json.dumps({"problem": "1+2"}) + "\n"
                  + '{"messages": [{"role": "user", "content": "3\u2028+4"}], "id": 3}\n')
  class RefusingChat:
    def render(self, messages, name):
      return [len(messages[0]["content"])]
  assert [(p.id, p.tokens) for p in offline.read(path, RefusingChat())][1] == (3, (4,))


@pytest.mark.parametrize("word, found", [("enable_thinking=false", {"enable_thinking": False}),
                                         ("a=1", {"a": 1})])
def test_arguments_of_the_template(word, found):
  assert offline.template([word]) == found
  with pytest.raises(ValueError, match="is not KEY=JSON"):
    offline.template([word.replace("=", "")])
  for value in ("", "NaN", "1e999", '{"a": 1, "a": 2}', "[" * 3000, "\udce9"):
    with pytest.raises(InputError, match="is not KEY=JSON"):
      offline.template([f"x={value}"])
