"""The commands of docs/ and the README's Python run as they are written."""

import importlib
import json
import math
import pathlib
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from configs import arithmetic, composition, qwen3_math
from s2d_jax import recipe, tasks
from s2d_jax.data.composition import problems as composition_problems
from s2d_jax.data.word_problems import problems as word_problems
from tests.configs import test_every_row as every

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = ["-c", "from s2d_jax import cli; cli.main()"]  # the function of the entry point s2d-jax


def blocks(path, language):
  return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / path).read_text(), re.M | re.S)


@pytest.fixture
def checkout(tmp_path):
  """A folder in which the commands run as written, relative paths and all, and leave their runs."""
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  return tmp_path


def run(folder, words):
  done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                        check=False, timeout=900)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def test_the_page_of_arms_has_every_arm_with_its_stages():
  rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs/arms.md").read_text(), re.M)
  stages = {arm: re.findall(r"`(\w+)` \((\w+)\)", cell) for arm, cell in rows}
  assert stages == {arm: [(use.stage, use.labels) for use in uses]
                    for arm, uses in recipe.ARMS.items()}


@pytest.mark.slow
def test_the_commands_of_the_run_page(checkout):
  block, _ = blocks("docs/run.md", "sh")
  commands = [line.split() for line in block.splitlines() if line]
  assert {name for name, *_ in commands} == {"s2d-jax"}
  printed = [run(checkout, PROGRAM + flags) for _, *flags in commands]
  assert len(printed) == 2 and all("| bridge | 0 |" in text for text in printed)
  run_folder = checkout / "runs" / "tiny"
  assert (run_folder / "report.md").exists() and (run_folder / "report.png").exists()
  # The second run finds everything finished: it trains nothing and prints an equal table.
  again = run(checkout, PROGRAM + commands[0][1:])
  assert again == printed[0]


@pytest.mark.medium
def test_the_command_that_scores_one_model(checkout):
  (checkout / "s2d_jax").symlink_to(ROOT / "s2d_jax")
  _, block = blocks("docs/run.md", "sh")
  (words,) = map(str.split, block.splitlines())
  printed = run(checkout, PROGRAM + words[1:])
  sets = json.loads((checkout / "scores.json").read_text())["sets"]
  assert set(sets) == {"validation", "test"}
  for name, problems in (("validation", 256), ("test", 512)):
    correct_PG = sets[name]["samples"]["sampled"]["correct_PG"]
    assert len(correct_PG) == problems and {len(row) for row in correct_PG} == {4}
    mean = sum(map(sum, correct_PG)) / (4 * problems)
    assert re.search(rf"^{name} +avg@4 +{mean:.3f} \[", printed, re.M)


@pytest.mark.slow
def test_the_command_of_the_losses_page(checkout):
  block, _ = blocks("docs/losses.md", "sh")
  (words,) = map(str.split, block.splitlines())
  command = pathlib.Path(sys.executable).with_name(words[0])  # the entry point beside this Python
  run(checkout, [str(command), *words[1:]])
  manifests = list((checkout / "runs" / "gspo").glob("teacher_grpo-*/manifest.json"))
  assert manifests
  for path in manifests:
    rows = json.loads(path.read_text())["config"]["stages"]
    assert rows["teacher_grpo"]["surrogate"] == "gspo"


@pytest.mark.slow
def test_the_config_of_the_losses_page_runs_and_has_a_cost_to_target(checkout):
  mine, *_ = blocks("docs/losses.md", "python")
  (checkout / "mine.py").write_text(mine)
  _, block = blocks("docs/losses.md", "sh")
  train, report = map(str.split, block.splitlines())
  run(checkout, PROGRAM + train[1:])
  printed = run(checkout, PROGRAM + report[1:])
  assert "### Cost until validation/avg@1 is 2 %" in printed
  # The page of runs sends its reader here, with the command that was run.
  assert f"`{' '.join(report)}`" in (ROOT / "docs/run.md").read_text()
  (folder,) = (checkout / "runs" / "mine").glob("forward_kl-*")
  hp = json.loads((folder / "manifest.json").read_text())["config"]["stages"]["forward_kl"]
  assert hp["keep"] == "right,stopped"


@pytest.mark.parametrize("name", ["foresee", "self_distillation", "allocate"])
def test_the_further_python_of_the_losses_page_is_a_config(name):
  (lines,) = [block for block in blocks("docs/losses.md", "python")
              if re.search(rf"^config\.stages\.(\w+\.)?{name} = ", block, re.M)]
  world = composition if name == "allocate" else arithmetic
  mine = "def get_config(config):\n  with config.unlocked():\n" + re.sub("^", "    ", lines,
                                                                       flags=re.M)
  found = {}
  exec(compile(mine, "docs/losses.md", "exec"), found)  # noqa: S102
  config = world.get_config("tiny")
  found["get_config"](config)
  recipe.plan(config, tasks.get(config))


def test_the_page_of_losses_names_the_families_of_every_task():
  text = (ROOT / "docs/losses.md").read_text()
  rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text.partition("| task | families |")[2].
                         partition("\n\n")[0], re.M))
  assert set(rows) == set(tasks.TASKS)
  for task, families in (("composition", composition_problems.FAMILIES),
                         ("word_problems", word_problems.KINDS), ("arithmetic", "234")):
    assert set(re.findall(r"`(\w+)`", rows[task])) == set(families)


OF_RESULTS = r"python -m (results\.[\w.]+)"


@pytest.mark.parametrize("name", sorted({
    name for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"),
                      *(ROOT / "results").rglob("*.md"), *(ROOT / "results").rglob("*.py"))
    for name in re.findall(OF_RESULTS, path.read_text())}))
def test_a_command_of_the_results_finds_its_module(name):
  # The module imports others by their full names, as the command does from the checkout's root.
  assert callable(importlib.import_module(name).main)


def test_no_page_runs_a_file_of_results_by_its_path():
  # Such a command finds neither `results` nor `configs`.
  for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*")):
    if path.suffix in (".md", ".py", ".sh"):
      assert not re.search(r"python[\w.]* (results|benchmarks)/", path.read_text()), path


def test_a_command_of_the_results_starts():
  printed = run(ROOT, ["-m", "results.composition.study", "--help"])
  assert "--workdir" in printed


@pytest.mark.medium
def test_the_command_of_the_data_page(checkout, monkeypatch):
  monkeypatch.setitem(every.SHAPE, "max_position_embeddings", 40_960)
  config = qwen3_math.get_config(f"models={checkout / 'models'},data={checkout / 'data'}")
  every.write_pair(config, "qwen3_math")
  (checkout / "data").mkdir()
  wrapped = [{"prompt": [{"role": "user", "content": f"Sum {i} and 1?"}],
              "reward_model": {"ground_truth": str(i + 1)}} for i in range(300)]
  # The raw upload repeats its rows.
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wrapped * 2),
                              checkout / "data" / "dapo_math_17k.parquet")
  for name, count in {"math_train": 64, "math500": 1, "aime24": 1, "aime25": 1}.items():
    rows = [{"problem": f"{name} {i}?", "answer": "2", "solution": "$\\boxed{2}$"}
            for i in range(count)]
    path = checkout / "data" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  (block,) = blocks("docs/data.md", "sh")
  (words,) = map(str.split, block.splitlines())
  printed = run(checkout, PROGRAM + words[1:])
  assert re.search(r"^labelled: 300 problems, prompts of at most \d+ tokens", printed, re.M)
  assert re.search(r"^labelled: content \w{12}, from data/dapo_math_17k\.parquet \(SHA-256 \w{12}\)"
                   r", not the published file of dapo_math_17k, which has 17,398 rows$", printed,
                   re.M)
  assert re.search(r"^math500: content .*, 0 of 1 problems are labelled ones$", printed, re.M)
  (program,) = blocks("docs/data.md", "python")
  run(checkout, ["-c", program])
  rows = [json.loads(line) for line in (checkout / "problems.jsonl").read_text().splitlines()]
  assert [row["problem"] for row in rows] == [f"Sum {i} and 1?" for i in range(300)]
  assert len({row["id"] for row in rows}) == 300


@pytest.mark.medium
def test_the_models_page(checkout):
  (checkout / "s2d_jax").symlink_to(ROOT / "s2d_jax")
  (block,) = blocks("docs/models.md", "python")
  assert run(checkout, ["-c", block]).split() == ["8190735360"]
  assert (checkout / "child" / "tokenizer.json").exists()


def test_the_page_of_answers():
  (block,) = blocks("docs/answers.md", "python")
  run(ROOT, ["-c", block])  # its assertions are the test


@pytest.mark.medium
def test_the_sampling_page(checkout):
  (checkout / "s2d_jax").symlink_to(ROOT / "s2d_jax")
  (checkout / "prompts.jsonl").write_text('{"problem": "12+34+56"}\n{"problem": "7+8"}\n')
  (block,) = blocks("docs/sampling.md", "sh")
  words = block.replace("\\\n", " ").split()
  run(checkout, [*PROGRAM, *words[1:]])
  rows = [json.loads(line) for line in (checkout / "samples.jsonl").read_text().splitlines()]
  assert len({(row["id"], row["sample"]) for row in rows}) == len(rows) == 8


@pytest.mark.slow
def test_the_python_of_the_readme(checkout):
  reward, loss, stage, evaluation = blocks("README.md", "python")
  # The last line of the page's stage and arm is a comment: the loss is tried on what it plans.
  program = reward + loss + stage + evaluation + """
assert set(config.evals) == {"test", "held"}
with jax.set_mesh(sharding.make_mesh(config.mesh)):
  with config.unlocked():
    config.arms = "half"
    config.stages.half_kl = config.stages.reverse_kl.copy_and_resolve_references()
    for key in objectives.REVERSE_KL.keys.keys() - HALF.keys.keys():
      del config.stages.half_kl[key]
  recipe.run(config, "runs/half", task, stages, arms, compared=())
"""
  run(checkout, ["-c", program])
  assert list((checkout / "runs" / "mine" / "arms").iterdir())
  # The arm has a score of each of the two benchmarks that run at the end.
  (arm,) = (checkout / "runs" / "half" / "arms").glob("half-*.json")
  splits = {json.loads((checkout / "runs" / "half" / row["score"] / "manifest.json").read_text())[
      "inputs"]["evaluation"]["split"] for row in json.loads(arm.read_text())["rows"]}
  assert splits == {"test", "validation"}
  (folder,) = (checkout / "runs" / "half").glob("half_kl-*")
  assert (folder / "hf" / "model.safetensors").exists()


def test_the_readmes_topology_holds_the_configs_mesh():
  (name, arg, topology), = re.findall(r"configs/(\w+)\.py:(\S+) --topology=\w+:([\dx]+)",
                                      (ROOT / "README.md").read_text())
  mesh = importlib.import_module(f"configs.{name}").get_config(arg).mesh
  assert math.prod(map(int, topology.split("x"))) == math.prod(mesh)


def test_the_readme_names_every_target_of_make():
  text = (ROOT / "README.md").read_text()
  (block, *_) = blocks("README.md", "sh")
  makefile = (ROOT / "Makefile").read_text()
  for target in re.findall(r"^make ([\w-]+)", block, re.M):
    assert re.search(rf"^{target}:", makefile, re.M), target
  assert "configs/arithmetic.py" in text
