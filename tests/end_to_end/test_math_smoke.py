"""The mathematics configs from folder to table: stages, evaluation, export, as a user runs them.

`make math-smoke` runs this file. The published tokenizers are read from the folder tokenizers/ of
the one that the environment's S2D_REAL_MODELS names: in it are small models called Qwen3-8B,
Qwen3-1.7B, Llama-3.3-70B-Instruct and Llama-3.1-8B-Instruct, with the published tokenizer files.
Without it the test builds tokenizers of the same format, and says so.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.end_to_end import real_format

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
REAL = os.environ.get("S2D_REAL_MODELS", "")
TOKENIZERS = str(pathlib.Path(REAL, "tokenizers").resolve()) if REAL else ""
TORCH = importlib.util.find_spec("torch") is not None  # transformers needs it to run a model
CLI = "from s2d_jax import cli; cli.main()"  # the function of the entry point s2d-jax
STAGES = ("teacher_grpo", "forward_kl", "reverse_kl", "student_grpo")
# The folders that each config names, as (family, width, layers, tied).
FOLDERS = {
    "qwen3_math": {"Qwen3-8B": ("qwen3", 96, 2, False), "Qwen3-1.7B": ("qwen3", 64, 2, True)},
    "llama_math": {"Llama-3.3-70B-Instruct": ("llama3", 96, 2, False),
                   "Llama-3.1-8B-Instruct": ("llama3", 64, 2, False)},
    "smollm2": {"SmolLM2-360M-Instruct": ("smollm2", 64, 4, True)}}
SPLITS = {"labelled": 24, "validation": 4, "math500": 4, "aime24": 4, "aime25": 4}  # problems
ARGUMENTS = {"qwen3_math": "tiny", "llama_math": "tiny", "smollm2": "tiny,layers=2"}


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
  """JSON lines of sums, in place of the published sets that the mathematics configs name."""
  for first, (split, count) in enumerate(SPLITS.items()):
    rows = [{"problem": f"What is ${10 * i} + {first}$?", "answer": str(10 * i + first)}
            for i in range(count)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def job(request, tmp_path_factory):
  """Every stage of one config by the command line, its student exported."""
  name = request.param
  folder = tmp_path_factory.mktemp(name)
  models = folder / "models"
  if TOKENIZERS and name != "smollm2":
    models = pathlib.Path(TOKENIZERS)
  else:
    for base, shape in FOLDERS[name].items():
      real_format.write(models / base, *shape)
  data = folder / "data"
  data.mkdir()
  write_data(data)
  flags = [f"--config=configs/{name}.py:{ARGUMENTS[name]},models={models}",
           "--config.arms=untrained,cold_grpo,half_bridge_grpo_2h"]
  if name == "smollm2":
    # The tokenizer that the test builds needs more tokens than the published one.
    flags += [f"--config.data.dir={data}", "--config.prompt_tokens=400"]
  else:
    flags += [f"--config.data.{split}={data / split}.jsonl" for split in SPLITS]
  printed = command("run", *flags, f"--workdir={folder / 'run'}")
  (stage,) = sorted(p.name for p in (folder / "run").glob("student_grpo-*")
                    if json.loads((p / "manifest.json").read_text())["inputs"]["split"]["name"]
                    == "2h")
  command("export", f"--workdir={folder / 'run'}", f"--stage={stage}",
          f"--out={folder / 'student'}")
  return Job(name, folder / "run", printed, folder / "student", data)


def test_every_stage_finished_and_stands_in_the_table(job):
  for stage in STAGES:
    folders = list(job.workdir.glob(f"{stage}-*"))
    assert folders and all((folder / "manifest.json").exists() for folder in folders)
  for line in ("untrained student", "untrained teacher", "cold_grpo", "half_bridge_grpo_2h"):
    assert f"| {line} |" in job.printed
  assert command("report", str(job.workdir)) == job.printed


def test_the_exported_student_is_evaluated(job, tmp_path):
  task = "word_problems" if job.name == "smollm2" else "math"
  # A set of another name, because that of a published set is read as such.
  sets = "test" if job.name == "smollm2" else "validation"
  printed = command("eval", f"--model={job.folder}", f"--sets={sets}", f"--task={task}",
                    f"--data={job.data}", "--k=2", "--max-tokens=8", "--batch=64",
                    f"--out={tmp_path / 'scores.json'}")
  assert printed.startswith(sets) and "avg@2" in printed
  assert sets in json.loads((tmp_path / "scores.json").read_text())["sets"]


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
