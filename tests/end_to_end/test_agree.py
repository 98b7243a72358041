"""Processes that are about to run different programs say so in time, and do not wait for ever."""

import os
import re
import socket

import pytest

from configs import arithmetic
from s2d_jax import tasks
from tests import interpreter

CONFIG = interpreter.ROOT / "configs" / "arithmetic.py"

SCRIPT = """
import sys, time
import jax
from s2d_jax import hosts, sharding
process, port, seconds, *texts = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
hosts.AGREE_SECONDS = int(seconds)
try:
  if texts[0] == "sample":  # two samplers on one mesh, each with the prompts it was given
    from s2d_jax import models, rollouts, sampler
    model = models.get({"model_type": "qwen3", "vocab_size": 16, "hidden_size": 8, "head_dim": 4,
                        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
                        "tie_word_embeddings": True, "max_position_embeddings": 64})
    mesh = sharding.make_mesh((1, 2, 1))
    with jax.set_mesh(mesh):
      where = sharding.weight_shardings(
          mesh, models.axes(model.config), models.shapes(model.config))
      params = jax.jit(model.init, out_shardings=where)(jax.random.key(0))
      sampling = sampler.Sampling(4, samples_per_prompt=2, temperature=float(texts[2]))
      # Of several dispatches, each but the first is launched before the last one is read.
      compiled = sampler.Sampler(model, sampling, 1, 2, sampler.SamplerConfig(tokens=1))
      rows, _ = compiled(params, [rollouts.Prompt(int(texts[1]), (1, 2))], (0,))
      texts = [str(rows.response_length_B.sum())]
    print("drew", *texts)
    texts = []
  if texts[0] == "start":
    rate, microbatches = texts[1:]
    hosts.check_start({"stages.sft.optim": {"lr": float(rate)},
                       "stages.sft.microbatches": int(microbatches), "revision": "abc"})
    texts = []
  for text in texts:
    if text == "dead":
      time.sleep(20)
    hosts.agree("sampler", text)
  print("agreed", len(texts))
except (RuntimeError, ValueError) as error:
  print("refused:", error)
time.sleep(6 if process == "0" else 0)  # process 0 serves the other
"""

# `s2d-jax run` by one process of two in a working folder, up to the training.
RUN = """
import functools, os, pathlib, sys
import jax
from s2d_jax import command, hosts, main, tasks
process, port, config, data, folder, changed, *flags = sys.argv[1:]
os.chdir(folder)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize = functools.partial(
    jax.distributed.initialize, f"localhost:{port}", 2, int(process))
hosts.SHARED_SECONDS = 2
if changed == "data":  # this process has a problem less
  def shorter(config):
    task = tasks_get(config)
    return task._replace(source=lambda split: list(map(
        task.source(split).__getitem__, range(len(task.source(split)) - (split == "test")))))
  tasks_get, tasks.get = tasks.get, shorter
if changed == "source":  # this process has a checkout that was edited
  main.__file__ = f"{folder}/main.py"
if changed == "python":
  import platform
  platform.python_version = lambda: "3.11.0"
main.walk.run = lambda plan, workdir: print("trains in", workdir)
main.report.write = lambda workdirs: "reported"
command.call(main.main, [f"--config={config}:tiny", f"--config.data.dir={data}",
                         "--config.mesh=(1,2,1)", "--workdir=work", "--distributed", *flags])
"""


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return str(free.getsockname()[1])


def outputs(*texts, seconds=60):
  """The output of two processes that compare texts, one list of texts a process."""
  port = free_port()
  environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  both = [interpreter.start("-c", SCRIPT, i, port, seconds, *text, env=environment)
          for i, text in enumerate(texts)]
  return [process.wait(120).stdout.strip() for process in both]


@pytest.mark.medium
def test_equal_texts_pass():
  assert outputs(["a", "b", "c", "d"], ["a", "b", "c", "d"]) == ["agreed 4"] * 2


@pytest.mark.medium
def test_a_different_text_is_refused_by_name():
  for process, other, text in zip((0, 1), (1, 0), outputs(["a", "b"], ["a", "x"]), strict=True):
    assert text == (f"refused: processes {process} and {other} differ in round 1 of the sampler: "
                    "they must run one program on the same data; start again from the checkpoint.")


@pytest.mark.medium
def test_an_absent_process_is_named():
  here, _ = outputs(["a", "b"], ["a", "dead", "b"], seconds=10)
  assert here.startswith("refused: process 1 has not reached round 1 of the sampler within 10 s")


@pytest.mark.medium
def test_samplers_of_other_prompts_or_settings_do_not_start():
  one = ["sample", "5", "1.0"]
  assert all("drew 8" in text for text in outputs(one, one))
  for other in (["sample", "6", "1.0"], ["sample", "5", "0.9"]):
    for text in outputs(one, other):
      assert "differ in round 0 of the sampler" in text and "drew" not in text


@pytest.mark.medium
@pytest.mark.parametrize("other, said", [
    (("0.1", "2"), "stages.sft.microbatches = 1 and process 1 has 2"),
    (("0.2", "1"), "stages.sft.optim = {'lr': 0.1} and process 1 has {'lr': 0.2}")])
def test_processes_that_were_started_differently_name_the_difference(other, said):
  first, second = outputs(["start", "0.1", "1"], ["start", *other])
  assert first == (f"refused: process 0 has {said}: start all processes with one command, code and "
                   "data.")
  assert second.startswith("refused: process 1 has stages.sft.") and "process 0 has" in second


@pytest.mark.medium
def test_processes_that_were_started_alike_go_on():
  assert outputs(["start", "0.1", "1"], ["start", "0.1", "1"]) == ["agreed 0"] * 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder with the problems, prepared once."""
  folder = tmp_path_factory.mktemp("data")
  config = arithmetic.get_config("tiny")
  config.data.dir = str(folder)
  tasks.get(config).source("test")
  return folder


def runs(data, folders, changed=("", ""), flags=((), ())):
  """Two processes of a run, finished, each with its working folder, its change and its flags."""
  port = free_port()
  both = [interpreter.start("-c", RUN, i, port, CONFIG, data, folders[i], changed[i], *flags[i],
                            env=os.environ | {"JAX_PLATFORMS": "cpu"}) for i in range(2)]
  return [process.wait(150) for process in both]


def printed(process):
  """The lines on standard output, without those of the collectives' library."""
  return [line for line in process.stdout.splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.medium
@pytest.mark.parametrize("changed, flags, fact", [
    ("", ["--config.seed=7"], "config.seed"), ("", ["--redo=sft-1"], "--redo"),
    ("", ["--config.stages.sft.optim.lr=0.1"], "config.stages.sft.optim"),
    ("", ["--config.stages.sft.microbatches=2"], "config.stages.sft.microbatches"),
    ("data", [], "data.test"), ("source", [], "source"), ("python", [], "python")])
def test_a_run_refuses_processes_that_differ_before_it_writes(
    changed, flags, fact, data, tmp_path):
  (tmp_path / "main.py").write_text("")
  both = runs(data, [tmp_path] * 2, ("", changed), ((), flags))
  for process, (here, other) in zip(both, ((0, 1), (1, 0)), strict=True):
    assert process.returncode == 2 and printed(process) == [], process.stderr
    (line,) = (line for line in process.stderr.splitlines() if line.startswith("s2d_jax: "))
    assert re.fullmatch(
        f"s2d_jax: process {here} has {fact} = (['\"]).*\\1 and process {other} has (['\"]).*\\2: "
        "start all processes with one command, code and data.", line)
  assert [path.name for path in tmp_path.iterdir()] == ["main.py"]


@pytest.mark.medium
def test_a_run_goes_on_where_processes_are_alike_and_share_a_folder(data, tmp_path):
  both = runs(data, [tmp_path] * 2)
  assert [process.returncode for process in both] == [0, 0], both
  assert [printed(process) for process in both] == [["trains in work", "reported"],
                                                    ["trains in work"]]
  assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.medium
def test_a_work_folder_that_is_not_shared_is_refused(data, tmp_path):
  folders = [tmp_path / "a", tmp_path / "b"]
  for folder in folders:
    folder.mkdir()
  host = re.escape(socket.gethostname())
  for process in runs(data, folders):
    assert process.returncode == 2 and printed(process) == [], process.stderr
    (line,) = (line for line in process.stderr.splitlines() if line.startswith("s2d_jax: "))
    assert re.fullmatch(
        f"s2d_jax: process 1 on {host} cannot read what process 0 on {host} wrote to --workdir=work"
        r" \(No such file or directory\): choose a folder that all hosts reach, such as one on a "
        "network disk.", line)
  assert list(folders[0].rglob("*")) == [folders[0] / "work"] and list(folders[1].iterdir()) == []
