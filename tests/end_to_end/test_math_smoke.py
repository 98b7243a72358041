"""The mathematics configs from folder to the paper's tables, by the commands that a user types.

Every stage is trained, an exported student is scored on the benchmarks, and its greedy answers are
compared with those of transformers.

`make math-smoke` runs this file. The published tokenizers are read from the folder tokenizers/ of
the one that the environment's S2D_REAL_MODELS names: in it are small models called Qwen3-8B,
Qwen3-1.7B, Llama-3.3-70B-Instruct and Llama-3.1-8B-Instruct, with the published tokenizer files.
Without it the test builds tokenizers of the same format, and says so.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from s2d_jax import recipe
from s2d_jax.data import jsonl
from tests.end_to_end import real_format

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
REAL = os.environ.get("S2D_REAL_MODELS", "")
TOKENIZERS = str(pathlib.Path(REAL, "tokenizers").resolve()) if REAL else ""
TORCH = importlib.util.find_spec("torch") is not None  # transformers needs it to run a model
CLI = "from s2d_jax import cli; cli.main()"  # the function of the entry point s2d-jax
# The folders that each config names, as (family, width, layers, tied).
FOLDERS = {
    "qwen3_math": {"Qwen3-8B": ("qwen3", 96, 2, False), "Qwen3-1.7B": ("qwen3", 64, 2, True)},
    "llama_math": {"Llama-3.3-70B-Instruct": ("llama3", 96, 2, False),
                   "Llama-3.1-8B-Instruct": ("llama3", 64, 2, False)},
    "smollm2": {"SmolLM2-360M-Instruct": ("smollm2", 64, 4, True)}}
MATH = ("qwen3_math", "llama_math")
# Files of problems by the names of the published sets, placed as a user without a network does.
SETS = {"dapo_math_17k": 24, "math_train": 4, "math500": 4, "aime24": 4, "aime25": 4}
BENCHMARKS = ("math500", "aime24", "aime25")
# Together these arms have every stage once, and those of GRPO on halves as well.
ARMS = ("untrained", "cold_grpo", "half_sft_grpo_2h", "sft_teacher_bridge", "weighted_fkl")
SHORT_ARMS = ("untrained", "cold_grpo", "half_bridge_grpo_2h")
SHORT_STAGES = {"teacher_grpo", "forward_kl", "reverse_kl", "student_grpo"}
ARGUMENTS = {"qwen3_math": "tiny,sft_teacher", "llama_math": "tiny,sft_teacher",
             "smollm2": "tiny,layers=2"}
# Rows of the paper's tables as (heading, first cell): filled by these arms, and not.
FILLED = {"qwen3_math": [("Direct GRPO", "Qwen3-1.7B"),
                         ("Transfer only, all labels", "SFT'd 8B, bridge"),
                         ("Transfer on 1H, then GRPO on 2H", "RL'd 8B, teacher-sample SFT")],
          "llama_math": [("Llama: 8B from 70B", "direct GRPO")]}
MISSING = {"qwen3_math": [("Direct GRPO", "Qwen3-14B"),
                          ("Transfer only, all labels", "RL'd 8B, bridge")],
           "llama_math": [("Llama: 8B from 70B", "bridge from RL'd 70B")]}


class Job(NamedTuple):
  """A finished run."""
  name: str
  workdir: pathlib.Path
  printed: str          # by the run
  folder: pathlib.Path  # the exported student
  data: pathlib.Path


def command(*arguments: str) -> str:
  """The standard output of `s2d-jax ARGUMENTS`."""
  done = subprocess.run([sys.executable, "-c", CLI, *arguments], cwd=ROOT, text=True,
                        capture_output=True, check=False,
                        env=os.environ | {"JAX_PLATFORMS": "cpu",
                                          "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


def write_data(folder: pathlib.Path) -> None:
  """JSON lines of sums under the names of the published sets, and solutions to learn from."""
  for first, (name, count) in enumerate(SETS.items()):
    rows = [{"id": 10 * i + first, "problem": f"What is ${10 * i} + {first}$?",
             "answer": str(10 * i + first)} for i in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name == "dapo_math_17k":
      # A published set has ids of its text, whatever ids the file has.
      solutions = [{"id": jsonl.text_id(row["problem"]),
                    "response": f"\\boxed{{{row['answer']}}}"} for row in rows]
      (folder / "solutions.jsonl").write_text(
          "".join(json.dumps(row) + "\n" for row in solutions))


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def job(request, tmp_path_factory):
  """The arms of one config by the command line, a student of its last stage exported."""
  name = request.param
  folder = tmp_path_factory.mktemp(name)
  models = folder / "models"
  if TOKENIZERS and name in MATH:
    models = pathlib.Path(TOKENIZERS)
  else:
    for base, shape in FOLDERS[name].items():
      real_format.write(models / base, *shape)
  data = folder / "data"
  data.mkdir()
  arguments = f"{ARGUMENTS[name]},models={models}"
  if name in MATH:
    write_data(data)
    # Two steps show a stage's programs, its checkpoint and its hand-over.
    flags = [f"--config=configs/{name}.py:{arguments},data={data}",
             f"--config.arms={','.join(ARMS)}",
             *(f"--config.stages.{stage.name}.steps=2" for stage in recipe.STAGES
               if stage.name != "self_distillation")]
  else:
    # The tokenizer that the test builds needs more tokens than the published one.
    flags = [f"--config=configs/{name}.py:{arguments}", f"--config.arms={','.join(SHORT_ARMS)}",
             f"--config.data.dir={data}", "--config.prompt_tokens=400"]
  printed = command("run", *flags, f"--workdir={folder / 'run'}")
  (stage,) = sorted(p.name for p in (folder / "run").glob("student_grpo-*")
                    if json.loads((p / "manifest.json").read_text())["inputs"]["split"]["name"]
                    == "2h")
  command("export", f"--workdir={folder / 'run'}", f"--stage={stage}",
          f"--out={folder / 'student'}")
  return Job(name, folder / "run", printed, folder / "student", data)


def test_every_stage_finished_and_every_arm_stands_in_the_table(job):
  every = {stage.name for stage in recipe.STAGES} - {"self_distillation"}
  for stage in every if job.name in MATH else SHORT_STAGES:
    folders = list(job.workdir.glob(f"{stage}-*"))
    assert folders and all((folder / "manifest.json").exists() for folder in folders), stage
  arms = ARMS if job.name in MATH else SHORT_ARMS
  for line in ("untrained student", "untrained teacher", *arms[1:]):
    assert f"| {line} |" in job.printed
  assert command("report", str(job.workdir)) == job.printed


def cells(printed: str, heading: str, row: str) -> list[str]:
  """The cells behind the first one of a row in the paper's table of that heading."""
  _, _, tables = printed.partition("## The paper's tables\n")
  _, found, table = tables.partition(f"### {heading} (")
  assert found, f"no table {heading}"
  table, _, _ = table.partition("\n### ")
  (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
  return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_papers_tables_have_the_cells_of_the_run_and_name_the_missing_ones(job):
  if job.name not in MATH:
    assert "The paper's tables" not in job.printed
    return
  for heading, row in FILLED[job.name]:
    published, here = (cells(job.printed, heading, row)[first::2] for first in (0, 1))
    assert all(re.fullmatch(r"\d+\.\d ± \d\.\d", cell) for cell in published)
    # Four problems are not the benchmark, hence the mark.
    assert len(here) == 3
    assert all(re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\] †", cell) for cell in here)
  for heading, row in MISSING[job.name]:
    assert cells(job.printed, heading, row)[1::2] == ["missing"] * 3


def test_the_exported_student_is_evaluated_on_the_benchmarks(job, tmp_path):
  task, sets = ("math", BENCHMARKS) if job.name in MATH else ("word_problems", ("test",))
  printed = command("eval", f"--model={job.folder}", f"--sets={','.join(sets)}", f"--task={task}",
                    f"--data={job.data}", "--k=2", "--max-tokens=8", "--batch=64",
                    f"--out={tmp_path / 'scores.json'}")
  assert {line.split()[0] for line in printed.splitlines()} == set(sets)
  scores = json.loads((tmp_path / "scores.json").read_text())["sets"]
  for name in sets:
    assert re.search(rf"^{name} +avg@2 ", printed, re.M) and name in scores
    samples = (tmp_path / f"scores-{name}.jsonl").read_text().splitlines()
    assert job.name not in MATH or len(samples) == 2 * SETS[name]


@pytest.mark.skipif(not TORCH, reason="transformers runs a model only where torch is installed")
def test_greedy_answers_of_the_exported_student_equal_those_of_transformers(job, tmp_path):
  import torch
  import transformers
  problems = [f"Compute {i} + {2 * i}." for i in range(6)]
  prompts = tmp_path / "prompts.jsonl"
  prompts.write_text("".join(json.dumps({"id": i, "problem": text}) + "\n"
                             for i, text in enumerate(problems)))
  template = ["--template=enable_thinking=false"] if job.name == "qwen3_math" else []
  command("sample", f"--model={job.folder}", f"--prompts={prompts}", "--temperature=0",
          "--max-tokens=12", f"--out={tmp_path / 'out.jsonl'}", *template)
  samples = {row["id"]: row for row in map(
      json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
  tokenizer = transformers.AutoTokenizer.from_pretrained(job.folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32).eval()
  changes = {"enable_thinking": False} if template else {}
  # Rows of the embedding without a token are never sampled here, and a random model prefers some.
  absent = sorted(set(range(model.config.vocab_size)) - set(tokenizer.get_vocab().values()))
  for i, text in enumerate(problems):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_tensors="pt",
                                        add_generation_prompt=True, return_dict=True, **changes)
    out = model.generate(**ids, do_sample=False, max_new_tokens=12, suppress_tokens=absent)
    out = out[0, ids["input_ids"].shape[1]:]
    assert samples[i]["tokens"] == out.tolist()
    assert samples[i]["response"] == tokenizer.decode(out, skip_special_tokens=True)


def test_the_tokenizers_are_named(job, record_property, capsys):
  source = "built by the test in the published format"
  if TOKENIZERS and job.name != "smollm2":
    source = TOKENIZERS
  record_property("tokenizers", source)
  with capsys.disabled():
    print(f"\n{job.name}: tokenizers {source}")
